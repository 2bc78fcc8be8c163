"""Attention in native code. Source: cpu.cpp beside this file."""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.ops import native


def sparse_attention(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    block_TGK: Tensor,
    scale: float,
) -> Tensor:
    return _attend(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, block_TGK, scale, None)


def sparse_attention_lse(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    block_TGK: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    lse_TN = torch.empty(q_TNH.shape[:2], dtype=torch.float32)
    return _attend(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, block_TGK, scale, lse_TN), lse_TN


def dense_attention(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    scale: float,
) -> Tensor:
    return _attend(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, None, scale, None)


def supports(q_TNH: Tensor, k_MGBH: Tensor, v_MGBH: Tensor, *_where: object) -> str | None:
    reason = native.refusal(q_TNH, k_MGBH, v_MGBH)
    if reason is None and k_MGBH.dtype != v_MGBH.dtype:
        return "needs keys and values of one dtype"
    return reason


def _attend(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    block_TGK: Tensor | None,
    scale: float,
    lse_TN: Tensor | None,
) -> Tensor:
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype)
    native.loaded().attention(
        native.dense(q_TNH),
        native.dense(k_MGBH),
        native.dense(v_MGBH),
        native.table(page_RP),
        start_R1,
        length_R,
        None if block_TGK is None else native.table(block_TGK),
        scale,
        out_TNH,
        lse_TN,
        native.threads(),
    )
    return out_TNH
