"""The cases themselves: reproducible, valid, poisoned where nothing may be read."""

import pytest
import torch

from openm3.ops.cases import EXPERTS, PACKED, SPARE_PAGES, PackedCase, packed, random_blocks, routed


def test_names_are_unique() -> None:
    for cases in (PACKED, EXPERTS):
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_shapes_follow_the_case(case: PackedCase) -> None:
    p = packed(case)
    tokens, requests = sum(case.num_tokens), len(case.lengths)
    assert p.q_TNH.shape == (tokens, case.num_groups * case.heads_per_group, case.head_dim)
    assert p.k_MGBH.shape == p.v_MGBH.shape == (p.k_MGBH.shape[0], case.num_groups, case.block_size, case.head_dim)
    assert p.index_q_TGJ.shape == (tokens, case.num_groups, case.index_dim)
    assert p.index_k_MBJ.shape == (p.k_MGBH.shape[0], case.block_size, case.index_dim)
    assert p.start_R1.diff().tolist() == list(case.num_tokens) and p.length_R.tolist() == list(case.lengths)
    assert p.page_RP.shape[0] == requests
    used = p.page_RP[p.page_RP >= 0]
    assert used.unique().numel() == used.numel()


def test_cases_are_reproducible_and_poisoned() -> None:
    case = next(case for case in PACKED if case.name == "mixed_batch")
    p, again = packed(case), packed(case)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(p, again, strict=True))
    num_keys = sum(case.lengths)
    for pool in (p.k_MGBH[:, 0], p.v_MGBH[:, 1], p.index_k_MBJ):
        assert int((~pool[..., 0].isnan()).sum()) == num_keys
    assert p.k_MGBH.shape[0] == sum(-(-n // 128) for n in case.lengths) + SPARE_PAGES
    assert not torch.equal(packed(case, seed=1).index_q_TGJ, p.index_q_TGJ)


def test_random_blocks_are_valid_selections() -> None:
    for case in PACKED:
        p = packed(case)
        assert torch.equal(p.block_TGK, packed(case).block_TGK)
        block_TGK = random_blocks(case, torch.Generator().manual_seed(9)).long()
        assert block_TGK.shape == (sum(case.num_tokens), case.num_groups, case.num_selected)
        present = block_TGK >= 0
        assert not (present[..., 1:] & ~present[..., :-1]).any()
        assert (block_TGK[..., 1:] > block_TGK[..., :-1])[present[..., 1:]].all()
        own = [
            (length - count + i) // case.block_size
            for count, length in zip(case.num_tokens, case.lengths, strict=True)
            for i in range(count)
        ]
        assert torch.equal(block_TGK.amax(-1), torch.tensor(own).long()[:, None].expand(-1, case.num_groups))


def test_experts_are_distinct_and_weights_sum_to_one() -> None:
    for case in EXPERTS:
        x_TD, expert_TA, weight_TA, *_ = routed(case)
        assert x_TD.shape == (case.num_tokens, case.width) and expert_TA.dtype == torch.int32
        assert all(len(set(row)) == case.num_active for row in expert_TA.tolist())
        torch.testing.assert_close(weight_TA.sum(-1), torch.ones(case.num_tokens))
        assert not case.crowded or expert_TA.unique().tolist() == list(range(case.num_active))
