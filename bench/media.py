"""Pictures and videos: the encoder against transformers', a cached picture, and a long video beside replies.

- encoder: tower and projector on the same random weights and patches as transformers' own, in turns
- cached: what a picture adds to a request that has been seen before
- beside: eight replies are written; so while a process decodes a clip of 60 s in 720p, and while that is encoded

    pip install transformers==5.23.0
    python bench/media.py [--model PATH]

Without transformers, or with a model that sees nothing, that part is left out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from openm3 import read_image
from openm3.config import EngineConfig, VisionConfig
from openm3.engine.asynchronous import AsyncEngine, Reply
from openm3.engine.engine import Engine
from openm3.engine.request import SamplingParams
from openm3.eval.report import table
from openm3.model.model import Model, load
from openm3.model.vision import Grid, Projector, Tower
from openm3.server.media.process import Job
from openm3.server.media.workers import Workers
from openm3.tokens.media import Media
from openm3.tokens.pictures import ImageOptions
from openm3.tokens.sources import MediaLimits
from openm3.tokens.video import VideoOptions

GEOMETRIES = {
    "m3-tiny's tower": VisionConfig(
        hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=4, projector_hidden_size=384
    ),
    "M3's, 2 of 32 layers": VisionConfig(num_layers=2),
}
SHOWN: dict[str, list[Grid]] = {
    "one picture of 672 x 672": [(1, 48, 48)],
    "32 pictures of 112 x 168": [(1, 8, 12)] * 32,
    "16 pictures of 16 sizes": [(1, 2 * h, 2 * w) for h, w in zip(range(2, 18), range(18, 2, -1), strict=True)],
    "4 segments of 8 frames of 224 x 224": [(4, 16, 16)] * 4,
}
STREAMS, SECONDS = 8, 60.0


def hugging_face(tower: Tower, projector: Projector, config: VisionConfig) -> Callable[[Tensor, Tensor], Tensor] | None:
    """transformers' tower and projector with these weights; None if it is not installed."""
    # Its processors import torchvision, whose operators are not there beside PyTorch's build for CPUs.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as theirs
        from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLConfig
    except ImportError:
        return None
    text_size = projector.merge_2.out_features
    whole = MiniMaxM3VLConfig(
        vision_config={
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
        },
        text_config={"hidden_size": text_size},
        projector_hidden_size=config.projector_hidden_size,
    )
    vision = theirs.MiniMaxM3VLVisionModel._from_config(whole.vision_config, attn_implementation="sdpa").eval()
    merger = theirs.MiniMaxM3VLMultiModalProjector(whole).eval()
    renamed = {"patch_embed": "embeddings.proj", "pre_norm": "pre_layrnorm", "attn_norm": "layer_norm1"}
    renamed |= {"mlp_norm": "layer_norm2", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2", "attn.o": "self_attn.out_proj"}
    renamed |= {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkv"} | {f"merge_{i}": f"merge_linear_{i}" for i in (1, 2)}
    for ours, other in ((tower, vision), (projector, merger)):
        other.load_state_dict({_renamed(name, renamed): value for name, value in ours.state_dict().items()})

    def see(patch_IC: Tensor, grid_N3: Tensor) -> Tensor:
        found = vision(patch_IC, grid_N3).last_hidden_state
        tokens: Tensor = merger(found.reshape(-1, found.shape[-1]))
        return tokens.reshape(-1, text_size)

    return see


def _renamed(name: str, renamed: dict[str, str]) -> str:
    for ours, theirs in renamed.items():
        name = name.replace(f"{ours}.", f"{theirs}.") if f"{ours}." in name else name
    return name


def random_eyes(config: VisionConfig, text_size: int) -> tuple[Tower, Projector]:
    """A tower and a projector with random weights that keep the size of what passes through."""
    torch.manual_seed(0)
    eyes = Tower(config).eval(), Projector(config, text_size).eval()
    for module in eyes:
        for name, p in module.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=p[0].numel() ** -0.5)
            elif "norm.weight" not in name:
                nn.init.normal_(p, std=0.1)
    return eyes


@torch.inference_mode()
def encoder(rounds: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of ours and theirs, in turns."""
    for geometry, config in GEOMETRIES.items():
        tower, projector = random_eyes(config, 192 if config.hidden_size == 256 else 6144)
        theirs = hugging_face(tower, projector, config)
        for name, grids in SHOWN.items():
            patch_IC = torch.randn((sum(t * h * w for t, h, w in grids), 1176))
            grid_N3 = torch.tensor(grids)
            runs: dict[str, Callable[[], Tensor]] = {"openm3": lambda: projector(tower(patch_IC, grids))}  # noqa: B023
            if theirs is not None:
                runs["transformers"] = lambda: theirs(patch_IC, grid_N3)  # noqa: B023
            times: dict[str, list[float]] = {key: [] for key in runs}
            made = {key: run() for key, run in runs.items()}
            for _ in range(rounds):
                for key, run in runs.items():
                    begin = time.perf_counter()
                    run()
                    times[key].append(time.perf_counter() - begin)
            row: dict[str, Any] = {"geometry": geometry, "shown": name, "patches": len(patch_IC)}
            row |= {key: 1e3 * statistics.median(values) for key, values in times.items()}
            if theirs is not None:
                ratios = [b / a for a, b in zip(times["openm3"], times["transformers"], strict=True)]
                row |= {"ratio": statistics.median(ratios)}
                row |= {"difference": (made["openm3"] - made["transformers"]).abs().max().item()}
            yield row


def clip(seconds: float, height: int = 720, width: int = 1280, rate: int = 30) -> bytes:
    """A made-up H.264 clip: a camera that moves over a textured picture, with things that move in it."""
    random = np.random.default_rng(0)
    scene = np.asarray(
        Image.fromarray(random.integers(0, 256, (90, 160, 3), np.uint8)).resize(
            (2 * width, 2 * height), Image.Resampling.BICUBIC
        )
    )
    scene = np.clip(scene.astype(np.int16) + random.integers(-12, 13, scene.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(round(seconds * rate)):
            x, y = (int((0.5 + 0.5 * np.sin(i / period)) * side) for period, side in ((170, width), (230, height)))
            frame = scene[y : y + height, x : x + width].copy()
            frame[200 + i % 300 : 320 + i % 300, 3 * i % 1100 : 3 * i % 1100 + 150] = (i % 256, 90, 200)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return buffer.getvalue()


def prompt(model: Model, media: Media) -> list[int]:
    content = [{"type": media.kind}, {"type": "text", "text": "What do you see?"}]
    return model.tokenizer.chat([{"role": "user", "content": content}], thinking="disabled", media=[media])


async def cached(model: Model, rounds: int) -> dict[str, float]:
    """Milliseconds to the first token: of a text, and of the same text with a picture that was seen before."""
    picture = np.random.default_rng(0).integers(0, 256, (672, 672, 3), np.uint8)
    media = read_image(picture)
    pairs: list[tuple[float, float]] = []
    async with AsyncEngine(Engine(model, EngineConfig(cache_tokens=1 << 16, prefix_cache=False))) as engine:

        async def first(ids: list[int], media: list[Media]) -> float:
            begin = time.perf_counter()
            await _drain(await engine.submit(ids, SamplingParams(max_tokens=1, ignore_eos=True), media=media))
            return time.perf_counter() - begin

        with_picture = prompt(model, media)
        # As many tokens without a picture.
        text = [token if token != model.config.image_id else 5 for token in with_picture]
        fresh = await first(with_picture, [media])
        for _ in range(rounds):
            pairs.append((await first(text, []), await first(with_picture, [media])))
    added = statistics.median(b - a for a, b in pairs)
    return {
        "fresh_ms": 1e3 * fresh,
        "text_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "cached_ms": 1e3 * statistics.median(b for _, b in pairs),
        "added_ms": 1e3 * added,
    }


async def _drain(reply: Reply) -> None:
    async for _ in reply:
        pass


async def beside(model: Model, film: bytes) -> dict[str, Any]:
    """Between tokens of eight replies, in milliseconds: alone, while a clip is decoded, and while it is encoded."""
    params = SamplingParams(max_tokens=1 << 20, ignore_eos=True)
    gaps: dict[str, list[float]] = {}
    phase = "warm"

    async def listen(reply: Reply) -> None:
        last = None
        async for delta in reply:
            now = time.perf_counter()
            if last is not None and len(delta.ids):
                gaps.setdefault(phase, []).extend([(now - last) / len(delta.ids)] * len(delta.ids))
            last = now

    job = Job("video", ImageOptions(), VideoOptions(), MediaLimits(), 600.0)
    workers = Workers()
    config = EngineConfig(cache_tokens=1 << 18, draft_tokens=0)
    async with AsyncEngine(Engine(model, config)) as engine:
        replies = [await engine.submit([5 + i] * 200, params) for i in range(STREAMS)]
        listening = [asyncio.create_task(listen(reply)) for reply in replies]
        await workers.read(Job("image", job.image, job.video, job.limits, 60.0), _png())
        await asyncio.sleep(3)
        phase = "alone"
        await asyncio.sleep(15)
        phase = "decoding"
        begin = time.perf_counter()
        media = await workers.read(job, film)
        took = time.perf_counter() - begin
        phase = "between"
        viewer = await engine.submit(prompt(model, media), SamplingParams(max_tokens=1, ignore_eos=True), media=[media])
        phase = "encoding"
        begin = time.perf_counter()
        await asyncio.wait_for(_drain(viewer), 1200)
        encoded = time.perf_counter() - begin
        phase = "after"
        for reply in replies:
            reply.close()
        for task in listening:
            task.cancel()
    workers.close()
    found: dict[str, Any] = {
        name: {f"p{p}": 1e3 * float(np.percentile(gaps[name], p)) for p in (50, 95, 99)} | {"tokens": len(gaps[name])}
        for name in ("alone", "decoding", "encoding")
    }
    found |= {"decode_seconds": took, "times_real": SECONDS / took, "encode_seconds": encoded}
    found |= {"video_tokens": media.num_tokens, "patches": len(media.patch_IC)}
    for name in ("decoding", "encoding"):
        found[f"{name}_p95_ratio"] = found[name]["p95"] / found["alone"]["p95"]
    return found


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56)).save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="m3-tiny", metavar="PATH", help="one that sees (default: m3-tiny)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="turns of each comparison (default: 9)")
    parser.add_argument("--clip", metavar="FILE", help="a clip of 60 s to use, made here if it is not there")
    args = parser.parse_args()
    rows = list(encoder(args.rounds))
    head = ["tower", "shown", "patches", "openm3 ms", "transformers ms", "ratio"]
    cells = [
        [row["geometry"], row["shown"], f"{row['patches']:,}", f"{row['openm3']:.1f}"]
        + ([f"{row['transformers']:.1f}", f"{row['ratio']:.2f}"] if "ratio" in row else ["", ""])
        for row in rows
    ]
    print(table(head, cells, "<<>>>>"), flush=True)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "encoder": rows}
    model = load(args.model)
    if model.config.vision is not None:
        found["cached"] = asyncio.run(cached(model, args.rounds))
        print(f"\na picture of 576 tokens that was seen before adds {found['cached']['added_ms']:.1f} ms", flush=True)
        film = _film(args.clip)
        found["beside"] = asyncio.run(beside(model, film))
        print(
            f"a clip of 60 s in 720p is decoded at {found['beside']['times_real']:.1f} times real time beside "
            f"{STREAMS} replies, whose p95 between tokens is {found['beside']['decoding_p95_ratio']:.2f} times as long"
        )
    print(json.dumps(found))


def _film(path: str | None) -> bytes:
    if path is not None and Path(path).exists():
        return Path(path).read_bytes()
    film = clip(SECONDS)
    if path is not None:
        Path(path).write_bytes(film)
    return film


if __name__ == "__main__":
    main()
