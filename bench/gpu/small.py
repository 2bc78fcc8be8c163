"""Every Triton kernel on small cases, each once: what compute-sanitizer watches, which slows it a hundredfold.

python bench/gpu/small.py
"""

from __future__ import annotations

import torch

from openm3.ops.attention import dense_attention, sparse_attention_lse
from openm3.ops.cases import PACKED, Packed, packed
from openm3.ops.dispatch import use
from openm3.ops.doctor import OPERATORS, typical_calls
from openm3.ops.index import select_blocks

BATCHES = ("some_requests_empty", "verify_eight_tokens", "mixed_batch", "odd_widths", "small_blocks")


def main() -> None:
    device = torch.device("cuda")
    ran = 0
    with use("triton"):
        for dtype in (torch.float32, torch.bfloat16):
            calls = typical_calls(device, dtype)
            for operator in OPERATORS:
                for kernel in operator.implementations:
                    if kernel.name == "triton" and kernel.supports(*calls[operator.name]) is None:
                        kernel.run(*calls[operator.name])
                        ran += 1
            for case in (case for case in PACKED if case.name in BATCHES):
                p = Packed(*(x.to(device) for x in packed(case, dtype=dtype)))
                keys = p.q_TNH, p.k_MGBH, p.v_MGBH, *p.where
                select_blocks(p.index_q_TGJ, p.index_k_MBJ, *p.where, num_selected=case.num_selected)
                sparse_attention_lse(*keys, p.block_TGK, scale=0.3)
                dense_attention(*keys, scale=0.3)
                ran += 3
    torch.cuda.synchronize()
    print(f"{ran} calls ran")


if __name__ == "__main__":
    main()
