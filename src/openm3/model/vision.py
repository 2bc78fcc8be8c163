"""The vision tower and its projector: patches of pixels become tokens of the text's width.

A CLIP-like ViT over patches of 2 frames x 14 x 14 pixels with rotary positions along time, height and width. A row of a
grid (a picture, or a segment of a video) attends to itself alone. Four neighbouring patches become one token.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm3.config import VisionConfig

Grid = tuple[int, int, int]
"""Patches along time, height and width."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue, pixels from 0 to 1: what CLIP was trained with."""


def normalised(patch_IC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels [I, C] (uint8, channel-major within a patch) as the tower takes them."""
    mean, std = (torch.tensor(values, device=patch_IC.device)[:, None] for values in (MEAN, STD))
    x = patch_IC.view(patch_IC.shape[0], len(MEAN), -1).float()
    return ((x / 255 - mean) / std).view(patch_IC.shape).to(dtype)


class Tower(nn.Module):
    """Pre-norm transformer layers over packed patches; no norm after the last."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embed = nn.Conv3d(config.num_channels, config.hidden_size, size, stride=size, bias=False)
        self.pre_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.layers = nn.ModuleList(TowerLayer(config) for _ in range(config.num_layers))

    def forward(self, patch_IC: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Features [I, hidden] of normalised patches, those of each row of `grids` after those of the row before.

        Patches are in the order of `positions`.
        """
        return finished(self.walk(patch_IC, grids, patch_IC.shape[0]))

    def walk(self, patch_IC: Tensor, grids: Sequence[Grid], most: int) -> Generator[float, None, Tensor]:
        """The same in pieces of at most about `most` patches of a layer, for who has other work to do between them.

        Yields what was done since, in patches through all layers; a patch that attends to many counts for more.
        """
        rope = rotary(self.config, grids, patch_IC.device)
        groups = list(_groups(grids, most))
        sizes = [group.rows * group.length for group in groups]
        x_IC: Tensor = self.pre_norm(F.linear(patch_IC, self.patch_embed.weight.flatten(1)))
        # A layer's products are 24 C^2 a patch, its attention 4 C for each other patch of the row.
        wide = 6 * self.config.hidden_size
        for layer in cast(Iterable[TowerLayer], self.layers):
            qkv = [
                layer.attn.project(layer.attn_norm(part_IC), turns)
                for part_IC, *turns in zip(x_IC.split(most), *(x.split(most) for x in rope), strict=True)
            ]
            q_INH, k_INH, v_INH = (_joined(parts) for parts in zip(*qkv, strict=True))
            done = []
            # Splits, not slices: the gradient of a slice is as large as all there is.
            for group, x, q, k, v in zip(groups, *(y.split(sizes) for y in (x_IC, q_INH, k_INH, v_INH)), strict=True):
                for part, queries in zip(x.split(group.most), q.split(group.most), strict=True):
                    y_IC = part + layer.attn.attend(queries, k, v, group.rows)
                    done.append(y_IC + layer.mlp(layer.mlp_norm(y_IC)))
                    yield len(y_IC) * (1 + group.length / wide) / len(self.layers)
            x_IC = _joined(done)
        return x_IC


class TowerLayer(nn.Module):
    """Attention within each row and a GELU feed-forward, both on normed input, with plain residuals."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.attn = TowerAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = TowerMlp(config)


class TowerMlp(nn.Module):
    """Two products with a GELU between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_IC: Tensor) -> Tensor:
        y_IC: Tensor = self.down(F.gelu(self.up(x_IC)))
        return y_IC


class TowerAttention(nn.Module):
    """Full attention among the patches of a row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def project(self, x_IC: Tensor, rope: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [I, N, H], the first two turned to their places."""
        q, k, v = (projection(x_IC).view(x_IC.shape[0], self.num_heads, -1) for projection in (self.q, self.k, self.v))
        return _rotate(q, rope), _rotate(k, rope), v

    def attend(self, q_INH: Tensor, k_INH: Tensor, v_INH: Tensor, rows: int) -> Tensor:
        """What queries get from their rows: all patches of `rows` of equal length, or some of the only one."""
        q, k, v = (x_INH.unflatten(0, (rows, -1)).transpose(1, 2) for x_INH in (q_INH, k_INH, v_INH))
        y_IC: Tensor = self.o(_attention(q, k, v).transpose(1, 2).flatten(0, 1).flatten(1))
        return y_IC


class Projector(nn.Module):
    """Features of patches as tokens of the text's width: an MLP a patch, then one over each four neighbours."""

    def __init__(self, config: VisionConfig, text_size: int) -> None:
        super().__init__()
        self.merged = config.spatial_merge_size**2
        inner = config.projector_hidden_size
        self.linear_1 = nn.Linear(config.hidden_size, inner)
        self.linear_2 = nn.Linear(inner, text_size)
        self.merge_1 = nn.Linear(self.merged * text_size, inner)
        self.merge_2 = nn.Linear(inner, text_size)

    def forward(self, x_IC: Tensor) -> Tensor:
        """Tokens [I / 4, D] of features [I, hidden]."""
        y_ID = self.linear_2(F.gelu(self.linear_1(x_IC)))
        y_TD: Tensor = self.merge_2(F.gelu(self.merge_1(y_ID.view(-1, self.merged * y_ID.shape[-1]))))
        return y_TD


@dataclass(frozen=True)
class Group:
    """Neighbouring rows of one length that are computed together, at most `most` patches at a time."""

    rows: int
    length: int
    most: int


def _groups(grids: Sequence[Grid], most: int) -> Iterator[Group]:
    """All rows, in order: as many at once as make `most` patches, or one that is longer in parts of `most`."""
    for length, same in groupby(t * h * w for t, h, w in grids):
        left = len(list(same))
        while left:
            rows = min(left, max(1, most // length))
            yield Group(rows, length, most if length > most else rows * length)
            left -= rows


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention [rows, heads, patches, H]; with gradients in products, twice as fast as the fused backward."""
    if not (torch.is_grad_enabled() and q.requires_grad and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v)
    out: Tensor = (q @ (k * q.shape[-1] ** -0.5).mT).softmax(-1) @ v
    return out


def finished(walk: Generator[float, None, Tensor]) -> Tensor:
    """What a walk comes to."""
    while True:
        try:
            next(walk)
        except StopIteration as end:
            found: Tensor = end.value
            return found


def positions(grids: Sequence[Grid], merge: int) -> Tensor:
    """Where each patch stands, [I, 3] along time, height and width, in the order in which patches are packed.

    Rows one after another, in a row times, in a time squares of `merge` x `merge` patches, left to right and down.
    """
    found = []
    for t, h, w in grids:
        at_THW = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w))
        squares = at_THW.view(t, h // merge, merge, w // merge, merge, 3).transpose(2, 3)
        found.append(squares.reshape(-1, 3))
    return torch.cat(found)


def rotary(config: VisionConfig, grids: Sequence[Grid], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [I, 1, R]: a third of the rotary channels for each axis, the same for both halves of a head."""
    width = 2 * (config.head_dim // 3 // 2)
    frequency = config.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    place_I3 = positions(grids, config.spatial_merge_size).float()
    angle = (place_I3[:, :, None] * frequency).flatten(1).to(device)[:, None]
    return angle.cos(), angle.sin()


def _rotate(x_INH: Tensor, rope: Sequence[Tensor]) -> Tensor:
    """Turn pairs of channels (i, R + i) by their angles, in the channels' dtype; what is left over stays as it is."""
    cos, sin = (x.to(x_INH.dtype) for x in rope)
    half = cos.shape[-1]
    a, b, rest = x_INH.split((half, half, x_INH.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
