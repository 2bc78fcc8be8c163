"""The vision tower and its projector: patches of pixels become tokens of the text's width.

A CLIP-like ViT over patches of 2 frames x 14 x 14 pixels with rotary positions along time, height and width. A row of a
grid (a picture, or a segment of a video) attends to itself alone. Four neighbouring patches become one token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

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
        rope = rotary(self.config, grids, patch_IC.device)
        x_IC = self.pre_norm(F.linear(patch_IC, self.patch_embed.weight.flatten(1)))
        rows = _Rows(grids)
        for layer in self.layers:
            x_IC = layer(x_IC, rows, rope)
        feature_IC: Tensor = x_IC
        return feature_IC


class TowerLayer(nn.Module):
    """Attention within each row and a GELU feed-forward, both on normed input, with plain residuals."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.attn = TowerAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = TowerMlp(config)

    def forward(self, x_IC: Tensor, rows: _Rows, rope: tuple[Tensor, Tensor]) -> Tensor:
        x_IC = x_IC + self.attn(self.attn_norm(x_IC), rows, rope)
        y_IC: Tensor = x_IC + self.mlp(self.mlp_norm(x_IC))
        return y_IC


class TowerMlp(nn.Module):
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

    def forward(self, x_IC: Tensor, rows: _Rows, rope: tuple[Tensor, Tensor]) -> Tensor:
        q_INH, k_INH, v_INH = (
            projection(x_IC).view(x_IC.shape[0], self.num_heads, -1) for projection in (self.q, self.k, self.v)
        )
        q_INH, k_INH = (_rotate(x_INH, rope) for x_INH in (q_INH, k_INH))
        y_IC: Tensor = self.o(rows.attend(q_INH, k_INH, v_INH).flatten(1))
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


class _Rows:
    """Which packed patches attend to each other: rows of equal length are computed together."""

    def __init__(self, grids: Sequence[Grid]) -> None:
        self._lengths = [t * h * w for t, h, w in grids]
        places: dict[int, list[int]] = defaultdict(list)
        first = 0
        for length in self._lengths:
            places[length].append(first)
            first += length
        # Rows of one length that follow each other need no gathering.
        self._runs = [run for length, firsts in places.items() for run in _runs(length, firsts)]
        self._num_patches = first

    def attend(self, q_INH: Tensor, k_INH: Tensor, v_INH: Tensor) -> Tensor:
        parts = {}
        for first, count, length in self._runs:
            own = slice(first, first + count * length)
            q, k, v = (x_INH[own].unflatten(0, (count, length)).transpose(1, 2) for x_INH in (q_INH, k_INH, v_INH))
            parts[first] = _attention(q, k, v).transpose(1, 2).flatten(0, 1)
        return torch.cat([parts[first] for first in sorted(parts)]) if len(parts) != 1 else next(iter(parts.values()))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention [rows, heads, patches, H]; with gradients in products, twice as fast as the fused backward."""
    if not (torch.is_grad_enabled() and q.requires_grad and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v)  # type: ignore[no-any-return]
    out: Tensor = (q @ (k * q.shape[-1] ** -0.5).mT).softmax(-1) @ v
    return out


def _runs(length: int, firsts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first patch, rows, patches of each) of neighbours among rows of one length."""
    begin = 0
    for i in range(1, len(firsts) + 1):
        if i == len(firsts) or firsts[i] != firsts[i - 1] + length:
            yield firsts[begin], i - begin, length
            begin = i


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


def _rotate(x_INH: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of channels (i, R + i) by their angles, in the channels' dtype; what is left over stays as it is."""
    cos, sin = (x.to(x_INH.dtype) for x in rope)
    half = cos.shape[-1]
    a, b, rest = x_INH.split((half, half, x_INH.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
