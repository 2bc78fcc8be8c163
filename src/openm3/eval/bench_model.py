"""`openm3 bench model`: a whole model reading a chunk behind a context, and decoding there.

The model is a checkpoint, or random weights for a config. Contexts are filled with random keys and values, so that a
million tokens do not have to be read first; `whole` reads them through the model instead.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openm3.config import BLOCK, ModelConfig
from openm3.errors import ConfigError
from openm3.eval.bench_ops import require_memory
from openm3.eval.bench_peaks import Work, seconds_of
from openm3.eval.report import progress
from openm3.model import cost
from openm3.model.model import load
from openm3.model.moe import Router
from openm3.model.network import Network
from openm3.model.session import Session
from openm3.ops.cache import write_pages
from openm3.ops.native import on_huge_pages

CHUNK, DECODED = 512, 24
_FILLED_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Timing:
    """Reading a chunk ("prefill") or one token ("decode") behind `context` tokens: median seconds, and the work."""

    what: str
    context: int
    tokens: int
    seconds: float
    work: Work


def open_network(model: str, config: str | None, dtype: torch.dtype, weights: str | None) -> tuple[Network, str]:
    """The network to measure and its name: a checkpoint's, or with a config file one of random weights."""
    if config is None:
        loaded = load(model, dtype=dtype, weights=weights)
        return loaded.network, loaded.name
    if weights is not None:
        raise ConfigError(
            f"{weights} weights are made from a checkpoint's: give --model, or --config without --weights"
        )
    return random_network(ModelConfig.from_file(config), dtype), Path(config).name


def random_network(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> Network:
    """A network of random weights that keep activations' size. Raises ConfigError without the memory."""
    require_memory("a model of this config", cost.parameters(config)["total"] * dtype.itemsize)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        network = Network(config).to(dtype)
    for module in network.modules():
        if isinstance(module, Router):
            module.float()
    network.to_empty(device="cpu").requires_grad_(False)
    for name, p in [*network.named_parameters(), *network.named_buffers()]:
        on_huge_pages(p)
        if p.ndim == 1:
            p.zero_()
        else:
            p.normal_(std=1.0 if name == "embed.weight" else p.shape[-1] ** -0.5, generator=generator)
    return network.eval()


def measure(network: Network, lengths: Sequence[int], *, whole: bool = False, repeats: int = 3) -> Iterator[Timing]:
    """A prefill and a decode timing at each length. Raises ConfigError for lengths beyond the model or the memory."""
    config = network.config
    longest = max(lengths) + CHUNK + DECODED
    if longest > config.max_positions:
        raise ConfigError(
            f"{max(lengths)} tokens with {CHUNK + DECODED} more exceed the model's limit of {config.max_positions}"
        )
    size = network.embed.weight.itemsize
    cache = cost.kv_bytes_per_token(config, size) + 2 * cost.index_bytes_per_token(config, size)
    require_memory(f"a cache of {longest} tokens", longest * cache)
    with progress() as bar:
        task = bar.add_task("measuring", total=2 * len(lengths))
        for length in lengths:
            session = Session(network, length + CHUNK + DECODED)
            bar.update(task, description=f"filling {length:,} tokens")
            fill(session, length, whole=whole)
            for what, timed in (("prefill", _prefill), ("decode", _decode)):
                bar.update(task, description=f"{what} behind {length:,} tokens")
                yield timed(session, length, repeats)
                bar.advance(task)


@torch.inference_mode()
def fill(session: Session, length: int, *, whole: bool = False, seed: int = 0) -> None:
    """Make a fresh session hold `length` tokens: random keys and values, or with `whole` random tokens, read."""
    if whole:
        session.read(random_ids(session.network.config, length, seed))
        return
    for layer in range(len(session.pools)):
        parts = random_keys(session.network.config, layer, length, seed)
        for first, (key_TGH, value_TGH, index_TJ) in zip(range(0, length, _FILLED_AT_ONCE), parts, strict=True):
            slot_T = torch.arange(first, first + key_TGH.shape[0])
            write_pages(key_TGH, value_TGH, index_TJ, session.pools[layer], slot_T)
    session.length = length


def random_keys(
    config: ModelConfig, layer: int, length: int, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """A layer's keys, values and index keys (None without a selection) of `length` tokens, in bfloat16, part by part.

    Normal numbers: what norms leave keys with. The same seed gives the same numbers.
    """
    generator = torch.Generator().manual_seed(seed * 10_007 + layer)
    sparse = config.layer_types[layer] == "sparse"
    for first in range(0, length, _FILLED_AT_ONCE):
        count = min(_FILLED_AT_ONCE, length - first)
        shapes = [(count, config.num_groups, config.head_dim)] * 2 + [(count, config.index_dim)] * sparse
        key_TGH, value_TGH, *index = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
        yield key_TGH, value_TGH, index[0] if sparse else None


def random_ids(config: ModelConfig, count: int, seed: int = 0) -> list[int]:
    """Tokens without a meaning."""
    ids: list[int] = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def prefill_flops(config: ModelConfig, start: int, count: int) -> int:
    """Operations to read `count` tokens behind `start`: each at the context it sees (up to a block more), one head."""
    flops = 0
    for end in range(start, start + count, BLOCK):
        some = min(BLOCK, start + count - end)
        parts = cost.flops_per_token(config, end + some)
        flops += (parts["total"] - parts["head"]) * some
    return flops + cost.flops_per_token(config, 1)["head"]


def prefill_bytes(network: Network, start: int, count: int) -> int:
    """Bytes that a chunk reads at least: every weight but idle rows of the embedding, and every key of the context."""
    config, size = network.config, network.embed.weight.itemsize
    counts = cost.parameters(config)
    weights = counts["total"] - counts["embeddings"] - counts["vision"] - counts["projector"]
    cache = cost.kv_bytes_per_token(config, size) + cost.index_bytes_per_token(config, size)
    return round(weights * bytes_per_weight(network)) + cache * (start + count)


def bytes_per_weight(network: Network) -> float:
    """Mean bytes of a weight as it is kept, scales of quantised ones included; the router's always take four."""
    parameters = [p for name, p in network.named_parameters() if ".router." not in name]
    scales = [b for name, b in network.named_buffers() if ".router." not in name]
    return sum(x.nbytes for x in (*parameters, *scales)) / sum(p.numel() for p in parameters)


def _prefill(session: Session, length: int, repeats: int) -> Timing:
    config = session.network.config
    times = []
    for i in range(repeats + 1):
        session.rewind(length)
        ids = random_ids(config, CHUNK, seed=i)
        times.append(seconds_of(lambda ids=ids: session.read(ids)))  # type: ignore[misc]
    work = Work(prefill_flops(config, length, CHUNK), prefill_bytes(session.network, length, CHUNK), "gemm")
    return Timing("prefill", length, CHUNK, statistics.median(times[1:]), work)


def _decode(session: Session, length: int, repeats: int) -> Timing:
    config, size = session.network.config, session.network.embed.weight.itemsize
    session.rewind(length)
    times = [
        seconds_of(lambda token=token: session.read([token]))  # type: ignore[misc]
        for token in random_ids(config, DECODED, seed=repeats)
    ]
    fixed, more = (cost.bytes_per_token(config, length, weight_bytes=n, cache_bytes=size)["total"] for n in (0, 1))
    nbytes = fixed + round((more - fixed) * bytes_per_weight(session.network))
    work = Work(cost.flops_per_token(config, length)["total"], nbytes, "read")
    return Timing("decode", length, 1, statistics.median(times), work)
