"""What the Triton kernels of attention are called with, and the shapes in which they work."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

WORKSPACE = 576 << 20
"""Bytes of partial results at a time: 8,192 tokens of one group of M3, with room for the ends of requests."""

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Tile:
    """How one program works: `tokens` x `heads` rows meet `keys` keys at a time, `width` numbers each.

    `stages` steps are under way or at work, and a thread has no more than `registers` of them, if that is given.
    """

    tokens: int
    heads: int
    keys: int
    width: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Call:
    """The tensors of a call; `block_TGK` is None in dense layers, `lse_TN` where nobody asks for it."""

    q_TNH: Tensor
    k_MGBH: Tensor
    v_MGBH: Tensor
    page_RP: Tensor
    start_R1: Tensor
    length_R: Tensor
    block_TGK: Tensor | None
    scale: float
    out_TNH: Tensor
    lse_TN: Tensor | None

    @property
    def heads(self) -> int:
        return self.q_TNH.shape[1] // self.k_MGBH.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What the products multiply: what came in, the queries' dtype over 8 bits, float32 for other mixtures."""
        dtypes = {x.dtype for x in (self.q_TNH, self.k_MGBH, self.v_MGBH)} - {torch.float8_e4m3fn}
        return self.q_TNH.dtype if len(dtypes) == 1 else torch.float32

    def pools(self) -> dict[str, object]:
        """The arguments that all kernels over keys and values share."""
        return {
            "p_q": self.q_TNH,
            "p_k": self.k_MGBH,
            "p_v": self.v_MGBH,
            "scale": self.scale * math.log2(math.e),
            **strides("q", "tnh", self.q_TNH),
            **strides("k", "mgbh", self.k_MGBH),
            **strides("v", "mgbh", self.v_MGBH),
            "USED_HEADS": self.heads,
            "USED_WIDTH": self.q_TNH.shape[2],
            "BLOCK": self.k_MGBH.shape[2],
            "DTYPE": _TRITON_DTYPES[self.dtype],
        }

    def where(self) -> dict[str, object]:
        """The arguments of kernels that find their request by themselves."""
        return {
            "p_page": self.page_RP,
            "p_start": self.start_R1,
            "p_length": self.length_R,
            "num_requests": self.length_R.shape[0],
            "num_tokens": self.q_TNH.shape[0],
            **strides("page", "rp", self.page_RP),
        }


@dataclass(frozen=True)
class Marks:
    """Which tiles do not walk, and what they leave behind instead, for each chunk of `tiles` tiles and each group.

    A tile is marked if its union exceeds `most` blocks and its request has tokens enough, within a chunk, to choose
    every block that the tile sees `shared` times. `chosen_XGM` counts the choices of each page by marked tiles,
    `listed_XG` these tiles, and `tile_XGU` lists them; `items_XG` is for those who take them on.
    """

    most: int
    shared: int
    tiles: int
    chosen_XGM: Tensor
    listed_XG: Tensor
    tile_XGU: Tensor
    items_XG: Tensor

    def arguments(self) -> dict[str, object]:
        """Those of kernels that mark, or read the marks."""
        return {
            "p_chosen": self.chosen_XGM,
            "p_listed": self.listed_XG,
            "p_tile": self.tile_XGU,
            "tiles": self.tiles,
            "num_pages": self.chosen_XGM.shape[2],
        }


def shape(tile: Tile) -> dict[str, object]:
    """The arguments that a tile stands for, but for its tokens."""
    return {
        "HEADS": tile.heads,
        "KEYS": tile.keys,
        "WIDTH": tile.width,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
    }


def strides(name: str, axes: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=True)}
