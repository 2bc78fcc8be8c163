"""A loaded model: weights, config and tokenizer, and the plain ways to run them that all else is checked against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openm3.config import ModelConfig
from openm3.errors import CheckpointError, ConfigError, PromptError
from openm3.model import checkpoint
from openm3.model.attention import Heads
from openm3.model.batch import Batch
from openm3.model.linear import Linear, joined
from openm3.model.moe import Experts
from openm3.model.network import Network
from openm3.model.session import Session
from openm3.ops.linear import Weight
from openm3.ops.native import on_huge_pages
from openm3.tokens.media import Media, Run, runs
from openm3.tokens.tokenizer import Tokenizer

WEIGHT_GROUPS: dict[str, int | None] = {"int8": 32, "int8-channel": None}
"""How `load` can quantise weights: inputs that share a scale, None for all the inputs of an output."""


@dataclass(frozen=True)
class Trace:
    """What each sparse layer selected: `blocks[layer]` is block_TGK (int32, ascending, -1 tail)."""

    blocks: dict[int, NDArray[np.int32]]


class Model:
    """One M3-family model in memory. Made by `load`."""

    def __init__(self, network: Network, tokenizer: Tokenizer, name: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config: ModelConfig = network.config
        self.tokenizer = tokenizer
        self.name = name

    @property
    def device(self) -> torch.device:
        """Where the weights are, and what is computed with them."""
        return self.network.embed.weight.device

    def check_ids(self, ids: Sequence[int], room: int = 0) -> list[int]:
        """The ids as a list. Raises PromptError if empty, out of range, or too long for the model with `room` more."""
        ids = [int(i) for i in ids]
        limit, vocab = self.config.max_positions, self.config.vocab_size
        if not ids:
            raise PromptError("the prompt is empty: give at least one token")
        bad = next((i for i in ids if not 0 <= i < vocab), None)
        if bad is not None:
            raise PromptError(f"token id {bad} is outside the vocabulary of {vocab}")
        if len(ids) + room > limit:
            more = f" and {room} to generate" if room else ""
            raise PromptError(f"{len(ids)} tokens{more} exceed the model's limit of {limit}")
        return ids

    def check_media(self, ids: Sequence[int], media: Sequence[Media]) -> list[Run]:
        """Which placeholders of a prompt stand for what of its pictures and videos; none without any of these.

        Raises PromptError when they do not fit each other, or the model sees nothing.
        """
        if not media:
            return []
        if self.config.vision is None:
            raise PromptError("this model reads text only: it has no vision tower for pictures and videos")
        return runs(ids, media, self.config.image_id, self.config.video_id)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], media: Sequence[Media] = ()) -> Tensor:
        """Next-token logits after every token, [T, V] float32, where the model is, in one pass without a cache.

        `media` are the pictures and videos that the placeholders stand for, in order. Raises PromptError for ids that
        cannot be run.
        """
        logit_TV: Tensor = self.network(self._whole(ids, media)).float()
        return logit_TV

    def generate(
        self,
        ids: Sequence[int],
        *,
        media: Sequence[Media] = (),
        max_new_tokens: int = 128,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[int]:
        """Greedy tokens after a prompt, with a cache. Ends after `max_new_tokens`, or before a token of `stop_ids`.

        Raises PromptError as `logits` does.
        """
        if max_new_tokens < 0:
            raise PromptError(f"max_new_tokens must not be negative, not {max_new_tokens}")
        ids = self.check_ids(ids, max_new_tokens)
        return self._generate(ids, self.see(ids, media), max_new_tokens, frozenset(stop_ids))

    def _whole(self, ids: Sequence[int], media: Sequence[Media]) -> Batch:
        ids = self.check_ids(ids)
        batch, seen = Batch.whole([torch.tensor(ids)]).to(self.device), self.see(ids, media)
        return batch if seen is None else batch.with_images(*seen)

    @torch.inference_mode()
    def see(self, ids: Sequence[int], media: Sequence[Media]) -> tuple[Tensor, Tensor] | None:
        """Where a prompt's placeholders stand, and the inputs [I, D] that stand there; None without any.

        Raises PromptError as `check_media` does.
        """
        places = [place for run in self.check_media(ids, media) for place in range(run.first, run.first + run.count)]
        if not places:
            return None
        images = [self.network.see(torch.from_numpy(item.patch_IC), item.grids) for item in media]
        return torch.tensor(places, device=self.device), torch.cat(images)

    def _generate(
        self,
        ids: list[int],
        seen: tuple[Tensor, Tensor] | None,
        max_new_tokens: int,
        stop_ids: frozenset[int],
    ) -> Iterator[int]:
        session = self.session(len(ids) + max_new_tokens)
        for token in session.decode(session.read(ids, images=seen), max_new_tokens):
            if token in stop_ids:
                return
            yield token

    def session(self, capacity: int) -> Session:
        """A fresh cache for up to `capacity` tokens."""
        if capacity > self.config.max_positions:
            raise PromptError(f"{capacity} tokens exceed the model's limit of {self.config.max_positions}")
        return Session(self.network, capacity)

    @torch.inference_mode()
    def trace(self, ids: Sequence[int], media: Sequence[Media] = ()) -> Trace:
        """Run a prompt and record the blocks that every sparse layer selected. Raises PromptError as `logits` does."""
        blocks: dict[int, NDArray[np.int32]] = {}

        def observer(layer: int, heads: Heads, batch: Batch) -> None:
            if heads.block_TGK is not None:
                blocks[layer] = heads.block_TGK.cpu().numpy().copy()

        self.network.hidden(self._whole(ids, media), observer=observer)
        return Trace(blocks)


def load(
    path: str | Path = "m3-tiny",
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: str | None = None,
) -> Model:
    """Load a bundled model by name or a checkpoint folder in the published layout, MXFP8 included.

    `device` is "cpu" or a CUDA GPU ("cuda", "cuda:1").
    Weights are converted to `dtype`, except the router's, which stay float32. With `weights="int8"` those of the
    layers' projections and experts are kept in a byte each, with a scale for every 32 inputs of an output, or one for
    all of them with "int8-channel"; the file is read tensor by tensor. Raises ConfigError or CheckpointError.
    """
    where = _device(device)
    if weights is not None and weights not in WEIGHT_GROUPS:
        raise ConfigError(f"weights must be {' or '.join(map(repr, WEIGHT_GROUPS))} or None, not {weights!r}")
    folder = checkpoint.BUNDLED.get(str(path), Path(path))
    if not folder.is_dir():
        names = ", ".join(sorted(checkpoint.BUNDLED))
        raise CheckpointError(f"no checkpoint folder at {path}; give a folder or one of: {names}")
    config = ModelConfig.from_file(folder)
    checkpoint.check(folder, config)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}")
    with torch.device("meta"):
        network = Network(config)
    checkpoint.load_into(_materialise(network, where, dtype, weights), folder, config)
    return Model(network, tokenizer, str(path))


def _device(name: str) -> torch.device:
    """The device of this name. Raises ConfigError for one that models do not run on, or that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'cpu', 'cuda' or 'cuda:N', not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"there is no device {name!r}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs")
    return device


def _materialise(network: Network, device: torch.device, dtype: torch.dtype, weights: str | None) -> dict[str, Weight]:
    """Empty memory for every parameter, by name: float32 for the router, codes where quantised, else `dtype`."""
    room: dict[str, Weight] = {}
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        path, _, leaf = name.rpartition(".")
        module = network.get_submodule(path)
        scale = None
        kind = torch.float32 if ".router." in name else dtype
        if weights is not None and isinstance(module, Linear | Experts) and module is not network.head:
            group = WEIGHT_GROUPS[weights] or value.shape[-1]
            if value.shape[-1] % group:
                raise ConfigError(
                    f"{weights} weights need inputs in groups of {group}, but {name} has {value.shape[-1]}: "
                    "load them as 'int8-channel'"
                )
            kind = torch.int8
            scale = torch.empty((*value.shape[:-1], value.shape[-1] // group), dtype=torch.float32, device=device)
            setattr(module, leaf + "_scale", scale)
        empty = on_huge_pages(torch.empty(value.shape, dtype=kind, device=device))
        if leaf in module._parameters:
            module._parameters[leaf] = torch.nn.Parameter(empty, requires_grad=False)
        else:
            module._buffers[leaf] = empty
        room[name] = joined(empty, scale)
    return room
