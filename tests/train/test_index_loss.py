"""The index loss against equations 9 and 10 written out token by token in float64, and whom it trains."""

import math

import pytest
import torch
from torch import Tensor

from openm3.config import BLOCK
from openm3.model.attention import Heads
from openm3.model.batch import Batch
from openm3.model.network import Network
from openm3.train.index_loss import index_kl
from openm3.train.initial import initialise
from openm3.train.recipe import Recipe

LENGTHS = (520, 300)
ROWS = [torch.tensor([0, 5, 127, 128, 300, 519, 519]), torch.tensor([0, 130, 256, 299])]


@pytest.fixture
def network(recipe: Recipe) -> Network:
    network = Network(recipe.model)
    initialise(network, seed=0)
    for name, p in network.named_parameters():
        if "index_" in name:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return network


@pytest.fixture
def batch(recipe: Recipe) -> Batch:
    return Batch.whole([torch.randint(0, recipe.vocab_size, (n,)) for n in LENGTHS])


def by_definition(heads: Heads, batch: Batch, selected: bool) -> float:
    """Mean over queries and groups of KL(P || Q), one query and group at a time."""
    assert heads.index_q_TGJ is not None and heads.pool.index_k_MBJ is not None and heads.block_TGK is not None
    q_TNH, index_q_TGJ = heads.q_TNH.double(), heads.index_q_TGJ.double()
    k_TGH = heads.pool.k_MGBH.transpose(1, 2).flatten(0, 1)[batch.slot_T].double()
    index_k_TJ = heads.pool.index_k_MBJ.flatten(0, 1)[batch.slot_T].double()
    num_groups, per_group = k_TGH.shape[1], q_TNH.shape[1] // k_TGH.shape[1]
    losses = []
    for first, row in zip(batch.start_R1.tolist(), ROWS, strict=False):
        for t in row.tolist():
            for g in range(num_groups):
                blocks = heads.block_TGK[first + t, g].tolist()
                visible = [first + s for s in range(t + 1) if not selected or s // BLOCK in blocks]
                teacher = torch.zeros(len(visible), dtype=torch.float64)
                for n in range(g * per_group, (g + 1) * per_group):
                    score = k_TGH[visible, g] @ q_TNH[first + t, n] / math.sqrt(q_TNH.shape[2])
                    teacher += score.softmax(0) / per_group
                student = (index_k_TJ[visible] @ index_q_TGJ[first + t, g] / math.sqrt(index_k_TJ.shape[1])).softmax(0)
                losses.append((teacher * (teacher / student).log()).sum().item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("selected", [False, True])
def test_loss_is_the_equations(network: Network, batch: Batch, selected: bool) -> None:
    pairs: list[tuple[float, float]] = []

    def observer(layer: int, heads: Heads, batch: Batch) -> None:
        loss = index_kl(heads, batch, ROWS, selected=selected)
        pairs.append((loss.item(), by_definition(heads, batch, selected)))

    with torch.no_grad():
        network.hidden(batch, observer=observer)
    assert len(pairs) == 2
    for actual, expected in pairs:
        assert expected > 0.01
        assert actual == pytest.approx(expected, rel=1e-4)


def index_losses(network: Network, batch: Batch, rows: list[Tensor], selected: bool) -> Tensor:
    losses: list[Tensor] = []
    network.hidden(
        batch, observer=lambda _layer, heads, batch: losses.append(index_kl(heads, batch, rows, selected=selected))
    )
    return torch.stack(losses)


def test_selection_changes_the_loss(network: Network, batch: Batch) -> None:
    with torch.no_grad():
        dense, sparse = (index_losses(network, batch, ROWS, selected) for selected in (False, True))
    assert (dense - sparse).abs().min() > 1e-4


@pytest.mark.parametrize("selected", [False, True])
def test_only_the_index_branch_learns(network: Network, batch: Batch, selected: bool) -> None:
    index_losses(network, batch, ROWS, selected).sum().backward()
    for name, p in network.named_parameters():
        moved = p.grad is not None and bool(p.grad.any())
        assert moved == (".index_" in name), name


def test_no_rows_no_loss(network: Network, batch: Batch) -> None:
    none = torch.tensor([], dtype=torch.long)
    with torch.no_grad():
        assert index_losses(network, batch, [none, none], False).tolist() == [0.0, 0.0]
