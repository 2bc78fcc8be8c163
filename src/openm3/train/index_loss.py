"""The loss that trains the index branch: KL divergence from the attention it should predict.

For query i and group g, over the causally visible tokens of a set of blocks (all in the warm-up, the selected ones
after it): P = mean over the group's heads of softmax(q . k * scale), detached; Q = softmax(index_q .
index_k / sqrt(J)). The loss is the mean of KL(P || Q) over queries and groups. Only the index projections and norms
get a gradient. Source: MiniMax Sparse Attention, equations 9 and 10.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openm3.config import BLOCK
from openm3.model.attention import Heads
from openm3.model.batch import Batch


def index_kl(heads: Heads, batch: Batch, rows: list[Tensor], *, selected: bool) -> Tensor:
    """Mean KL divergence (nats) over some rows of each request: `rows[r]` holds offsets into request r's tokens.

    `selected=False` compares over every visible token (warm-up), True over the selected blocks only.
    """
    total = heads.q_TNH.new_zeros((), dtype=torch.float32)
    count = 0
    assert heads.index_q_TGJ is not None and heads.pool.index_k_MBJ is not None and heads.block_TGK is not None
    groups, width = heads.index_q_TGJ.shape[1:]
    for r, (start, length) in enumerate(zip(batch.start_R1.tolist()[:-1], batch.length_R.tolist(), strict=True)):
        row = rows[r]
        if row.numel() == 0:
            continue
        pages = batch.page_RP[r, : -(-length // BLOCK)].long()
        token = start + row
        position = length - (int(batch.start_R1[r + 1]) - start) + row
        key_SJ = heads.pool.index_k_MBJ[pages].flatten(0, 1)
        unseen_GtS = (torch.arange(key_SJ.shape[0]) > position[:, None])[None]
        if selected:
            member_GtP = torch.zeros((groups, row.shape[0], pages.shape[0] + 1), dtype=torch.bool)
            chosen = heads.block_TGK[token].transpose(0, 1).long()
            member_GtP.scatter_(2, chosen.where(chosen >= 0, pages.shape[0]), True)
            unseen_GtS = unseen_GtS | ~member_GtP[..., :-1].repeat_interleave(BLOCK, -1)
        with torch.no_grad():
            key_GHS = heads.pool.k_MGBH[pages].transpose(0, 1).flatten(1, 2).mT
            query_GhtH = heads.q_TNH[token].unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
            score = (query_GhtH @ key_GHS[:, None]).float() * heads.scale
            teacher_GtS = score.masked_fill(unseen_GtS[:, None], -torch.inf).softmax(-1).mean(1)
        student = (heads.index_q_TGJ[token].transpose(0, 1) @ key_SJ.T).float() * width**-0.5
        log_student_GtS = student.masked_fill(unseen_GtS, -1e9).log_softmax(-1)
        total = total + F.kl_div(log_student_GtS, teacher_GtS, reduction="sum")
        count += groups * row.shape[0]
    return total / max(1, count)
