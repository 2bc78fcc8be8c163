"""Muon: updates of one size in every direction, for single matrices and stacks."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openm3.train.optim import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16), (64, 3)])
def test_singular_values_are_near_one(shape: tuple[int, int]) -> None:
    scale = math.sqrt(max(1.0, shape[0] / shape[1]))
    for size in (1e-3, 1.0, 1e3):
        value = torch.linalg.svdvals(orthogonalised(torch.randn(shape) * size)) / scale
        assert value.min() > 0.6 and value.max() < 1.3


def test_directions_are_kept() -> None:
    matrix = torch.randn(12, 6)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    mixed = u.mT @ orthogonalised(matrix) @ v.mT
    assert (mixed - mixed.diagonal().diag()).abs().max() < 1e-4
    assert mixed.diagonal().min() > 0.6


@pytest.mark.parametrize("shape", [(3, 10, 4), (3, 4, 10)])
def test_stack_is_its_matrices(shape: tuple[int, int, int]) -> None:
    stack = torch.randn(shape)
    torch.testing.assert_close(orthogonalised(stack), torch.stack([orthogonalised(m) for m in stack]))


def test_zero_gradient_moves_nothing() -> None:
    assert not orthogonalised(torch.zeros(4, 4)).any()


def test_step_moves_by_the_learning_rate() -> None:
    start, grad = torch.randn(10, 20), torch.randn(10, 20)
    p = torch.nn.Parameter(start.clone())
    p.grad = grad.clone()
    Muon([p], lr=0.25, weight_decay=0.1).step()
    # The first momentum is a share of the gradient, so their mixture points where the gradient does.
    torch.testing.assert_close(p.detach(), start * (1 - 0.25 * 0.1) - 0.25 * orthogonalised(grad))
    assert torch.equal(p.grad, grad)


def test_momentum_is_a_running_mean() -> None:
    first, second = torch.randn(2, 6, 6)
    p = torch.nn.Parameter(torch.zeros(6, 6))
    muon = Muon([p], lr=1.0, momentum=0.9)
    p.grad = first
    muon.step()
    before = p.detach().clone()
    p.grad = second
    muon.step()
    mean = 0.9 * (0.1 * first) + 0.1 * second
    torch.testing.assert_close(p.detach() - before, -orthogonalised(0.1 * second + 0.9 * mean), atol=1e-4, rtol=1e-4)


def test_parameters_without_gradient_stay() -> None:
    p = torch.nn.Parameter(torch.ones(2, 2))
    Muon([p], weight_decay=0.5).step()
    assert torch.equal(p.detach(), torch.ones(2, 2))


def test_state_round_trip() -> None:
    grads = torch.randn(3, 2, 5, 7)
    straight, resumed = (torch.nn.Parameter(torch.zeros(2, 5, 7)) for _ in range(2))
    muon = Muon([straight], lr=0.1)
    for grad in grads[:2]:
        straight.grad = grad
        muon.step()
    other = Muon([resumed], lr=0.9)
    other.load_state_dict(copy.deepcopy(muon.state_dict()))
    resumed.data.copy_(straight.data)
    for p, optimiser in ((straight, muon), (resumed, other)):
        p.grad = grads[2]
        optimiser.step()
    assert torch.equal(straight, resumed)


SHARED = """
import sys, torch, torch.distributed as dist
from openm3.train.optim import Muon
rank, workers = int(sys.argv[1]), int(sys.argv[3])
if workers > 1:
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=workers)
torch.manual_seed(0)
weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (2, 5, 3), (4, 3, 2, 2), (7, 7), (3, 9))]
muon = Muon(weights, lr=0.1, weight_decay=0.01)
for _ in range(3):
    for p in weights:
        p.grad = torch.randn_like(p)
    muon.step()
print([round(p.sum().item(), 4) for p in weights], [round(p.square().sum().item(), 3) for p in weights])
"""


def test_workers_share_the_work_and_come_to_the_same(tmp_path: Path) -> None:
    def outputs(workers: int) -> list[str]:
        command = [sys.executable, "-c", SHARED]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(tmp_path / "meeting"), str(workers)], stdout=subprocess.PIPE, text=True
            )
            for rank in range(workers)
        ]
        return [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]

    (alone,) = outputs(1)
    assert outputs(2) == [alone, alone]
