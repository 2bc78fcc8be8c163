"""The wiring of the initial weights: who looks where before any training."""

import pytest
import torch
from torch import Tensor

from openm3.model.attention import Heads
from openm3.model.batch import Batch
from openm3.model.network import Network
from openm3.train.initial import MATCHING_LAYERS, initialise
from openm3.train.recipe import tiny_model


@pytest.fixture(scope="module")
def network() -> Network:
    """The shape of m3-tiny, with fewer words."""
    network = Network(tiny_model(512))
    initialise(network, seed=0)
    return network


def attention(network: Network, ids_T: Tensor, position_T: Tensor | None = None) -> dict[int, Tensor]:
    """Each layer's attention weights [N, T, T], in one pass over one sequence."""
    seen: dict[int, Tensor] = {}

    def observer(layer: int, heads: Heads, batch: Batch) -> None:
        key_TGH = heads.pool.k_MGBH.transpose(1, 2).flatten(0, 1)[batch.slot_T]
        key_TNH = key_TGH.repeat_interleave(heads.q_TNH.shape[1] // key_TGH.shape[1], 1)
        score_NTT = torch.einsum("tnh,snh->nts", heads.q_TNH, key_TNH) * heads.scale
        future_TT = torch.ones(score_NTT.shape[1:], dtype=torch.bool).triu(1)
        seen[layer] = score_NTT.masked_fill(future_TT, -torch.inf).softmax(-1)

    with torch.no_grad():
        network.hidden(Batch.whole([ids_T], None if position_T is None else [position_T]), observer=observer)
    return seen


def test_first_layer_looks_back(network: Network) -> None:
    weight_NTT = attention(network, torch.randint(0, 512, (300,)))[0]
    for head in range(network.config.num_heads):
        share_T = weight_NTT[head].diagonal(-(head + 1))
        assert share_T.mean() > 0.8, head


def test_first_layer_looks_back_a_long_way_from_the_start(network: Network) -> None:
    """Far back the fastest rotary channels come round again: the slower ones must keep the heads at their place."""
    position_T = torch.cat([torch.arange(200) + start for start in (0, 900, 5_000, 31_000, 130_000, 999_000)])
    ids_T = torch.randint(0, 512, position_T.shape, generator=torch.Generator().manual_seed(0))
    weight_NTT = attention(network, ids_T, position_T)[0]
    for head in range(network.config.num_heads):
        share_T = weight_NTT[head].diagonal(-(head + 1))[-190:]
        assert share_T.mean() > 0.9, head


def test_matching_layers_look_after_the_same_text(network: Network) -> None:
    once = torch.randperm(512)[:64]
    seen = attention(network, torch.cat((once, once)))
    for layer in MATCHING_LAYERS:
        induction_NT = seen[layer].diagonal(-63, dim1=1, dim2=2)[:, 4:]
        assert induction_NT.mean(1).min() > 0.9, layer


def test_index_branch_starts_as_a_copy(network: Network) -> None:
    c = network.config
    step = c.num_heads // c.num_groups
    for layer in network.layers:
        a = layer.attn
        heads = a.q.weight.unflatten(0, (c.num_heads, c.head_dim))
        assert torch.equal(a.index_q.weight.unflatten(0, (c.num_groups, c.head_dim)), heads[::step])
        assert torch.equal(a.index_k.weight, a.k.weight[: c.head_dim])
        assert torch.equal(a.index_q_norm.weight, a.q_norm.weight)
        assert torch.equal(a.index_k_norm.weight, a.k_norm.weight)


def test_feed_forward_starts_silent(network: Network) -> None:
    for layer in network.layers:
        assert not layer.mlp.experts.down.any() and not layer.mlp.shared.down.weight.any()


def test_seed_decides() -> None:
    first, second, other = (Network(tiny_model(400, num_layers=2)) for _ in range(3))
    for network, seed in ((first, 1), (second, 1), (other, 2)):
        initialise(network, seed)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if name.endswith(("q.weight", "gate_up", "head.weight", "embed.weight")):
            assert not torch.equal(a, c), name
