"""Agreement with recorded outputs: logits, selected blocks and greedy tokens of a checkpoint against another program's.

A recording is a folder of safetensors files, one a case, and `manifest.json`. A case holds `input_ids` and
`attention_mask` [R, S] (rows padded at the right), `logits` [R, n, V] of the last n positions, `blocks.{layer}`
[R, G, S, K] with `block_margin.{layer}` [R, G, S] (how clearly the last block won), and the greedy `gen_ids` with their
`gen_blocks.*`. What a case with pictures or a video holds beside that `agree_media` says. `NAME_dense` holds only the
logits of case NAME with selection off: a model that agrees with it does not select.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from openm3.errors import CheckpointError, PromptError
from openm3.eval.agree_media import has_media, pixel_errors, pixels_agree, recorded_media, vision_error
from openm3.eval.report import table
from openm3.model.model import Model, load
from openm3.tokens.media import Media

TOLERANCE = 2e-4
"""Largest allowed difference of a float32 logit."""

NEAR_TIE = 1e-4
"""Selections won by less than this are not compared: float32 sums in another order may decide them otherwise."""

_DENSE = "_dense"


@dataclass(frozen=True)
class Agreement:
    """One case compared: what differs, out of how much, and whether that is as it should be.

    `blocks` counts selections (one a token, group and layer), `near_ties` those left out of it. `vision_error` is of
    features and of tokens made of pictures, `pixel_error` of pixels made of them, of a range of 1.
    """

    case: str
    verdict: str
    ok: bool = True
    tokens: int = 0
    logit_error: float | None = None
    blocks: int = 0
    blocks_differ: int = 0
    near_ties: int = 0
    greedy: int = 0
    greedy_differ: int = 0
    vision_error: float | None = None
    pixel_error: float | None = None


def run(args: argparse.Namespace) -> int:
    """`openm3 agree`: print a line a case; 0 if all agree, 1 if not."""
    recording = find_recording(Path(args.dir))
    model = load(args.model or recording.parent / "model", device=args.device)
    cases = list(compare(model, recording))
    ok = all(case.ok for case in cases)
    if args.json:
        summary = {"model": model.name, "recording": str(recording), "tolerance": TOLERANCE, "agrees": ok}
        print(json.dumps({**summary, "cases": [asdict(case) for case in cases]}))
    else:
        print(render(cases))
    return 0 if ok else 1


def find_recording(folder: Path) -> Path:
    """The folder with the manifest: `folder/golden` or `folder` itself. Raises CheckpointError."""
    for place in (folder / "golden", folder):
        if (place / "manifest.json").is_file():
            return place
    raise CheckpointError(f"no recorded outputs in {folder}: expected manifest.json there or in its folder golden")


def compare(model: Model, recording: Path) -> Iterator[Agreement]:
    """Compare every recorded case with the model, in the manifest's order. Raises CheckpointError for unusable files.

    Cases with images or video are skipped for a model that sees none.
    """
    named = list(_manifest(recording))
    if missing := [name for name in named if not (recording / f"{name}.safetensors").is_file()]:
        raise CheckpointError(f"{recording} lacks the recorded cases {', '.join(missing)}")
    others = sorted({path.stem for path in recording.glob("*.safetensors")} - set(named))
    for name in [*named, *others]:
        yield _compare_case(model, recording, name)


def render(cases: list[Agreement]) -> str:
    """The comparison as a table and a closing sentence."""
    rows = []
    for case in cases:
        skipped = case.logit_error is None
        blocks = f"{case.blocks_differ:,} of {case.blocks:,}" if case.blocks else ""
        greedy = f"{case.greedy_differ} of {case.greedy}" if case.greedy else ""
        error = "" if skipped else f"{case.logit_error:.1e}"
        ties = f"{case.near_ties:,}" if case.blocks else ""
        vision = "" if case.vision_error is None else f"{case.vision_error:.1e}"
        pixels = "" if case.pixel_error is None else f"{case.pixel_error * 255:.0f}/255"
        tokens = f"{case.tokens:,}" if case.tokens else ""
        rows.append([case.case, tokens, error, blocks, ties, greedy, vision, pixels, case.verdict])
    head = ["case", "tokens", "logit error", "blocks differ", "near ties", "greedy differ"]
    head += ["vision error", "pixels", "verdict"]
    bad = [case.case for case in cases if not case.ok]
    checked = sum(case.logit_error is not None for case in cases)
    end = f"outside tolerance: {', '.join(bad)}" if bad else f"all {checked} compared cases are as they should be"
    return f"{table(head, rows, '<>>>>>>><')}\n\n{end} (logits within {TOLERANCE:g}, blocks and greedy tokens equal)"


def _manifest(recording: Path) -> dict[str, dict[str, Any]]:
    path = recording / "manifest.json"
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable manifest with cases: {error!r}") from None
    if not isinstance(cases, dict) or not all(isinstance(info, dict) for info in cases.values()):
        raise CheckpointError(f"{path} must map each case to an object")
    return cases


def _compare_case(model: Model, recording: Path, name: str) -> Agreement:
    tensors = _tensors(recording / f"{name}.safetensors")
    if has_media(tensors) and model.config.vision is None:
        return Agreement(name, "skipped: the model sees no pictures")
    dense = name.endswith(_DENSE) and "input_ids" not in tensors
    base = recording / f"{name.removesuffix(_DENSE)}.safetensors"
    if dense and base.is_file():
        tensors |= {key: value for key, value in _tensors(base).items() if key in ("input_ids", "attention_mask")}
    if "input_ids" not in tensors:
        return Agreement(name, "skipped: no input_ids")
    media = recorded_media(tensors, name) if has_media(tensors) else []
    rows = [_compare_row(model, row, name, media) for row in _rows(tensors, name)]
    total = _sum(name, rows)
    seen = True
    if media:
        pixels = pixel_errors(tensors, media, name)
        vision = vision_error(model, tensors, media)
        total = replace(total, vision_error=vision, pixel_error=None if pixels is None else pixels[0])
        seen = (vision or 0.0) <= TOLERANCE
        seen &= pixels is None or pixels_agree(*pixels)
    close = total.logit_error is not None and total.logit_error <= TOLERANCE
    if dense:
        verdict = "agrees, but must not: the model does not select" if close else "differs, as it must"
        return Agreement(**{**asdict(total), "verdict": verdict, "ok": not close})
    ok = close and seen and not total.blocks_differ and not total.greedy_differ
    return Agreement(**{**asdict(total), "verdict": "agrees" if ok else "differs", "ok": ok})


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is torn or not a safetensors file: {error}") from None


def _rows(tensors: Mapping[str, Tensor], name: str) -> Iterator[dict[str, Tensor]]:
    """Each row alone, without its padding: `ids`, `logits` of its last positions, and the other tensors' rows."""
    if tensors.get("logits", torch.empty(0)).ndim != 3 or tensors["input_ids"].ndim != 2:
        raise CheckpointError(f"case {name} must hold input_ids [R, S] and logits [R, n, V]")
    layers = [key.removeprefix("blocks.") for key in tensors if key.startswith("blocks.")]
    if without := [layer for layer in layers if f"block_margin.{layer}" not in tensors]:
        raise CheckpointError(f"case {name} has blocks without block_margin for layers {', '.join(without)}")
    padded = tensors["input_ids"].shape[1]
    mask = tensors.get("attention_mask", torch.ones_like(tensors["input_ids"]))
    for r, length in enumerate(mask.sum(1).tolist()):
        if not mask[r, :length].all():
            raise CheckpointError(f"case {name} is not padded at the right: only such rows can be compared")
        first = padded - tensors["logits"].shape[1]
        row = {"ids": tensors["input_ids"][r, :length], "logits": tensors["logits"][r, : max(0, length - first)]}
        for key, value in tensors.items():
            if key.startswith(("blocks.", "block_margin.")):
                row[key] = value[r, :, :length]
            elif key.startswith(("gen_blocks.", "gen_block_margin.", "gen_ids")):
                row[key] = value[r]
        yield row


def _compare_row(model: Model, row: Mapping[str, Tensor], name: str, media: Sequence[Media] = ()) -> Agreement:
    ids, recorded = row["ids"].tolist(), row["logits"]
    if recorded.shape[1] != model.config.vocab_size:
        vocab = model.config.vocab_size
        raise CheckpointError(f"case {name} records {recorded.shape[1]} logits a token, the model has {vocab}")
    try:
        logit_TV = model.logits(ids, media).cpu()
    except PromptError as wrong:
        raise CheckpointError(f"case {name} cannot be run: {wrong}") from None
    difference = logit_TV[len(ids) - recorded.shape[0] :] - recorded
    # NaN and infinity count as the largest error there is, which JSON can still hold.
    largest = torch.finfo(torch.float32).max
    error = difference.nan_to_num(nan=largest).abs().max().item() if recorded.shape[0] else 0.0
    target = row["gen_ids"].tolist() if "gen_ids" in row else []
    made = list(model.generate(ids, media=media, max_new_tokens=len(target))) if target else []
    misses = sum(a != b for a, b in zip(made, target, strict=True))
    has_blocks = any(key.startswith("blocks.") for key in row)
    counts = _compare_blocks(model, ids + target[:-1], row, media) if has_blocks else {}
    return Agreement(name, "", tokens=len(ids), logit_error=error, greedy=len(target), greedy_differ=misses, **counts)


def _compare_blocks(model: Model, ids: list[int], row: Mapping[str, Tensor], media: Sequence[Media]) -> dict[str, Any]:
    """Selections over a prompt and its recorded continuation, compared as sets where the recorded margin is clear."""
    traced = model.trace(ids, media).blocks
    counts: dict[str, Any] = {"blocks": 0, "blocks_differ": 0, "near_ties": 0}
    for layer in (int(key.removeprefix("blocks.")) for key in row if key.startswith("blocks.")):
        recorded_TGK, margin_TG = _whole(row, "block", layer), _whole(row, "block_margin", layer)
        clear_TG = margin_TG >= NEAR_TIE
        counts["blocks"] += int(clear_TG.sum())
        counts["near_ties"] += int((~clear_TG).sum())
        equal_TG = torch.zeros_like(clear_TG)
        if layer in traced and traced[layer].shape[1] == recorded_TGK.shape[1]:
            equal_TG = _same_sets(torch.from_numpy(traced[layer])[: recorded_TGK.shape[0]], recorded_TGK)
        counts["blocks_differ"] += int((clear_TG & ~equal_TG).sum())
    return counts


def _whole(row: Mapping[str, Tensor], kind: str, layer: int) -> Tensor:
    """What was recorded for the prompt, and then for the continuation, token by token: [T, G, ...]."""
    names = ("blocks", "gen_blocks") if kind == "block" else ("block_margin", "gen_block_margin")
    return torch.cat([row[f"{name}.{layer}"] for name in names if f"{name}.{layer}" in row], dim=1).transpose(0, 1)


def _same_sets(a_TGK: Tensor, b_TGK: Tensor) -> Tensor:
    """Where two selections hold the same blocks, [T, G]; -1 is none, and they may differ in K."""
    wide = max(a_TGK.shape[2], b_TGK.shape[2])
    a, b = (torch.nn.functional.pad(x, (0, wide - x.shape[2]), value=-1).sort(-1).values for x in (a_TGK, b_TGK))
    return (a == b).all(-1)


def _sum(name: str, rows: list[Agreement]) -> Agreement:
    def total(field: str) -> int:
        return sum(getattr(row, field) for row in rows)

    counts: dict[str, Any] = {
        f: total(f) for f in ("tokens", "blocks", "blocks_differ", "near_ties", "greedy", "greedy_differ")
    }
    return Agreement(name, "", logit_error=max((row.logit_error or 0.0 for row in rows), default=0.0), **counts)
