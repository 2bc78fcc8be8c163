"""What attention rests on while a model writes: one number a token of the context.

A witness looks at the selected blocks only, which is all that the model itself looked at. Weights are squared before
they are added: an answer is copied by the few heads that point at single tokens, and these must not be outvoted by the
many that spread thinly over everything or rest on line ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.config import BLOCK
from openm3.model.attention import Heads
from openm3.model.batch import Batch

BLOCKS_AT_ONCE = 512
"""Blocks whose keys are copied at a time: of a dense layer the context may have thousands."""


class Witness:
    """An observer that adds up, while `watching`, what `tokens` of each step, all of one request, attend to.

    `attended_share` is the part of the visible tokens that was selected, averaged.
    """

    def __init__(self, length: int, *, request: int = 0, tokens: slice = slice(None)) -> None:
        # The last place is for all tokens behind the first `length`.
        self._mass_S1 = torch.zeros(length + 1, dtype=torch.float64)
        self.shares: list[float] = []
        self.watching = True
        self._request = request
        self._tokens = tokens

    def __call__(self, layer: int, heads: Heads, batch: Batch) -> None:
        """Add one layer's attention of one step."""
        if not self.watching:
            return
        weight_TGhS, slot_TGS, seen_TGS = attention_weights(heads, batch, self._request, self._tokens)
        visible_T = batch.position_T[self._tokens] + 1
        self.shares.append(float((seen_TGS.sum(-1) / visible_T[:, None]).mean()))
        # In place: there may be heads times a million weights. Those of tokens that are not seen are zero.
        square_TGS = weight_TGhS.square_().mean(2).double() / weight_TGhS.shape[1]
        slot_TGS = slot_TGS.clamp(0, len(self._mass_S1) - 1)
        self._mass_S1 = self._mass_S1.to(slot_TGS.device)
        self._mass_S1.index_add_(0, slot_TGS.flatten(), square_TGS.flatten())

    @property
    def mass_S(self) -> Tensor:
        """The squared attention paid to each of the first `length` tokens: averaged over heads, summed over layers."""
        return self._mass_S1[:-1]

    @property
    def attended_share(self) -> float | None:
        """None before anything was seen."""
        return sum(self.shares) / len(self.shares) if self.shares else None

    def forget(self) -> None:
        """Begin anew."""
        self._mass_S1.zero_()
        self.shares.clear()


def attention_weights(
    heads: Heads, batch: Batch, request: int = 0, tokens: slice = slice(None)
) -> tuple[Tensor, Tensor, Tensor]:
    """What some tokens of a request attend to: weights of each group's h heads, positions, and which are visible.

    S counts the tokens of the selected blocks (of all blocks in a dense layer); rows of weights sum to 1. Memory grows
    with T times S: meant for the few tokens of a decoding step.
    """
    query_TGhH = heads.q_TNH[tokens].unflatten(1, (heads.pool.k_MGBH.shape[1], -1)).float()
    num_tokens, num_groups = query_TGhH.shape[:2]
    device = query_TGhH.device
    if heads.block_TGK is None:
        num_blocks = -(-int(batch.length_R[request]) // BLOCK)
        block_TGK = torch.arange(num_blocks, device=device).expand(num_tokens, num_groups, num_blocks)
    else:
        block_TGK = heads.block_TGK[tokens].long()
    page_TGK = batch.page_RP[request].long()[block_TGK.clamp(min=0)]
    slot_TGS = (block_TGK[..., None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(2)
    seen_TGS = (block_TGK >= 0).repeat_interleave(BLOCK, 2) & (slot_TGS <= batch.position_T[tokens, None, None])
    # Whole pages of one group are copied, which lie in one piece.
    key_XBH = heads.pool.k_MGBH.flatten(0, 1)
    key_TGK = page_TGK * num_groups + torch.arange(num_groups, device=device)[:, None]
    score_TGhS = query_TGhH.new_empty((*query_TGhH.shape[:3], slot_TGS.shape[2]))
    for first in range(0, block_TGK.shape[2], BLOCKS_AT_ONCE):
        key_TGk = key_TGK[..., first : first + BLOCKS_AT_ONCE]
        key_TGsH = key_XBH.index_select(0, key_TGk.flatten()).unflatten(0, key_TGk.shape).flatten(2, 3).float()
        part = slice(first * BLOCK, first * BLOCK + key_TGsH.shape[2])
        torch.mul(query_TGhH @ key_TGsH.mT, heads.scale, out=score_TGhS[..., part])
    score_TGhS.masked_fill_(~seen_TGS[:, :, None], -torch.inf)
    return score_TGhS.softmax(-1), slot_TGS, seen_TGS
