"""One attention layer: project, norm and rotate, store the keys, select blocks, attend, project back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from openm3.config import BLOCK, ModelConfig
from openm3.model.batch import Batch
from openm3.model.linear import Linear
from openm3.ops.attention import dense_attention, sparse_attention
from openm3.ops.cache import HeadNorms, Pool, Projections, turn_heads, write_heads
from openm3.ops.index import select_blocks
from openm3.ops.linear import linear_each


@dataclass(frozen=True)
class Heads:
    """What one layer attends with: queries and paged keys, after norm and rotation.

    `index_q_TGJ` and `block_TGK` are None in dense layers, as is the pool's index part.
    """

    q_TNH: Tensor
    pool: Pool
    index_q_TGJ: Tensor | None
    block_TGK: Tensor | None
    scale: float


class Observer(Protocol):
    """Sees each layer's heads before attention runs: how traces are taken and index losses computed."""

    def __call__(self, layer: int, heads: Heads, batch: Batch) -> None: ...


class Norm(nn.Module):
    """The weight of an RMS norm with unit offset."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))


class Attention(nn.Module):
    """Grouped-query attention with per-head norms and partial rotation; with an index branch in sparse layers."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c = self.config = config
        self.layer = layer
        self.sparse = c.layer_types[layer] == "sparse"
        self.scale = c.head_dim**-0.5
        self.q = Linear(c.hidden_size, c.num_heads * c.head_dim)
        self.k = Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.v = Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.o = Linear(c.num_heads * c.head_dim, c.hidden_size)
        self.q_norm = Norm(c.head_dim)
        self.k_norm = Norm(c.head_dim)
        if self.sparse:
            self.index_q = Linear(c.hidden_size, c.num_groups * c.index_dim)
            self.index_k = Linear(c.hidden_size, c.index_dim)
            self.index_q_norm = Norm(c.index_dim)
            self.index_k_norm = Norm(c.index_dim)
        # Inside tuples, modules are not registered a second time.
        self._qkv = self.q, self.k, self.v
        self._index = (self.index_q, self.index_k) if self.sparse else ()
        index_norms = (self.index_q_norm, self.index_k_norm) if self.sparse else ()
        self._norms = self.q_norm, self.k_norm, *index_norms

    def forward(
        self, x_TD: Tensor, batch: Batch, rope: tuple[Tensor, Tensor], pool: Pool | None, observer: Observer | None
    ) -> Tensor:
        c, eps = self.config, self.config.norm_eps
        heads, norms = self._project(x_TD), HeadNorms(*[norm.weight for norm in self._norms])
        if pool is None:
            turned = turn_heads(heads, norms, rope, eps)
            q_TNH, index_q_TGJ, pool = turned.q_TNH, turned.index_q_TGJ, own_pages(turned, batch)
        else:
            q_TNH, index_q_TGJ = write_heads(heads, norms, rope, eps, pool, batch.slot_T)
        where = (batch.page_RP, batch.start_R1, batch.length_R)
        block_TGK = None
        if index_q_TGJ is not None and pool.index_k_MBJ is not None:
            keys, codes = pool.index_k_MBJ, pool.codes
            block_TGK = select_blocks(
                index_q_TGJ, keys, *where, num_selected=c.num_selected, num_local=c.num_local, codes=codes
            )
        if observer is not None:
            observer(self.layer, Heads(q_TNH, pool, index_q_TGJ, block_TGK, self.scale), batch)
        if block_TGK is None or batch.page_RP.shape[1] <= c.num_selected:
            out_TNH = dense_attention(q_TNH, pool.k_MGBH, pool.v_MGBH, *where, scale=self.scale)
        else:
            out_TNH = sparse_attention(q_TNH, pool.k_MGBH, pool.v_MGBH, *where, block_TGK, scale=self.scale)
        out_TD: Tensor = self.o(out_TNH.flatten(1))
        return out_TD

    def _project(self, x_TD: Tensor) -> Projections:
        """Heads before norm and rotation. The index branch's input is detached: only the index loss trains it."""
        c, count = self.config, x_TD.shape[0]
        qkv, index = ([linear.stored() for linear in linears] for linears in (self._qkv, self._index))
        if torch.is_grad_enabled():
            outs = linear_each(x_TD, qkv) + linear_each(x_TD.detach(), index)
        else:
            outs = linear_each(x_TD, qkv + index)
        q_TNH = outs[0].view(count, c.num_heads, c.head_dim)
        k_TGH, v_TGH = (x.view(count, c.num_groups, c.head_dim) for x in outs[1:3])
        if not self.sparse:
            return Projections(q_TNH, k_TGH, v_TGH)
        index_q_TX, index_k_TJ = outs[3:]
        return Projections(q_TNH, k_TGH, v_TGH, index_q_TX.view(count, c.num_groups, c.index_dim), index_k_TJ)


def own_pages(heads: Projections, batch: Batch) -> Pool:
    """Pages made of this step's own tokens, differentiable: what a pass without a cache attends to."""
    size = batch.num_pages * BLOCK

    def paged(x: Tensor) -> Tensor:
        pages: Tensor = x.new_zeros((size, *x.shape[1:])).index_copy(0, batch.slot_T, x).unflatten(0, (-1, BLOCK))
        return pages

    index_k_MBJ = None if heads.index_k_TJ is None else paged(heads.index_k_TJ)
    return Pool(paged(heads.k_TGH).transpose(1, 2), paged(heads.v_TGH).transpose(1, 2), index_k_MBJ)
