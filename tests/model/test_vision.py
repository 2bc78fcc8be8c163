"""The vision tower and its projector: recorded features, positions, rows that know nothing of each other."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from openm3.model.model import load
from openm3.model.network import Network
from openm3.model.vision import normalised, positions

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"


@pytest.fixture(scope="module")
def network() -> Network:
    return load(GOLDEN / "model").network


def recorded(name: str) -> tuple[dict[str, Tensor], Tensor, list[tuple[int, int, int]]]:
    case = load_file(GOLDEN / f"golden/{name}.safetensors")
    kind = "image" if "pixel_values" in case else "video"
    pixels = case["pixel_values" if kind == "image" else "pixel_values_videos"]
    return case, pixels, [(t, h, w) for t, h, w in case[f"{kind}_grid_thw"].tolist()]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["image0", "image1", "video", "video_resized"])
def test_features_are_the_recorded_ones(network: Network, name: str) -> None:
    case, pixels, grids = recorded(name)
    feature_IC = network.vision(pixels, grids)
    torch.testing.assert_close(feature_IC, case["vision_last_hidden"], atol=5e-5, rtol=0)
    image_ID = case["image_embeds" if "image_embeds" in case else "video_embeds"]
    torch.testing.assert_close(network.projector(feature_IC), image_ID, atol=5e-5, rtol=0)


@torch.inference_mode()
def test_pictures_of_any_sizes_together_are_each_alone(network: Network) -> None:
    grids = [(1, 2, 4), (1, 4, 4), (1, 2, 4), (3, 4, 2), (1, 4, 4), (1, 4, 4)]
    sizes = [t * h * w for t, h, w in grids]
    patch_IC = torch.randint(0, 256, (sum(sizes), 1176), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    alone = [network.see(part, [grid]) for part, grid in zip(patch_IC.split(sizes), grids, strict=True)]
    together = network.see(patch_IC, grids)
    assert together.shape == (sum(sizes) // 4, network.config.hidden_size)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("most", [1, 5, 16, 24, 1000])
def test_a_walk_in_pieces_is_the_whole(network: Network, most: int) -> None:
    grids = [(1, 2, 4), (1, 2, 4), (2, 4, 4), (1, 2, 4)]
    patch_IC = torch.rand((56, 1176), generator=torch.Generator().manual_seed(2))
    walk, done = network.vision.walk(patch_IC, grids, most), 0.0
    with pytest.raises(StopIteration) as end:
        while True:
            step = next(walk)
            assert 0 < step <= max(most, 1) * 1.1
            done += step
    torch.testing.assert_close(end.value.value, network.vision(patch_IC, grids), atol=2e-5, rtol=0)
    # Each patch once, and a little for what it attends to.
    wide = 6 * network.config.vision.hidden_size
    assert done == pytest.approx(56 + (24 * 8 + 32 * 32) / wide)


def test_gradients_are_slopes(network: Network) -> None:
    vision, grids = deepcopy(network.vision).double(), [(1, 2, 4), (1, 4, 4)]
    patch_IC = torch.rand((24, 1176), generator=torch.Generator().manual_seed(1), dtype=torch.double).requires_grad_()
    (own,) = torch.autograd.grad(vision(patch_IC, grids).square().sum(), patch_IC)
    step = torch.zeros_like(patch_IC)
    step[3, 100] = step[20, 7] = 1e-4
    with torch.no_grad():
        before, after = (vision(patch_IC + sign * step, grids).square().sum() for sign in (-1, 1))
    torch.testing.assert_close((own * step).sum(), (after - before) / 2, rtol=1e-4, atol=0)


def test_patches_go_by_squares() -> None:
    assert positions([(1, 2, 4)], 2).tolist() == [[0, y, x] for y, x in ((0, 0), (0, 1), (1, 0), (1, 1))] + [
        [0, y, x] for y, x in ((0, 2), (0, 3), (1, 2), (1, 3))
    ]
    two = positions([(2, 4, 2), (1, 2, 2)], 2)
    assert two[:, 0].tolist() == [0] * 8 + [1] * 8 + [0] * 4
    assert two[4].tolist() == [0, 2, 0] and two[16:].equal(positions([(1, 2, 2)], 2))


def test_pixels_are_normalised_by_colour() -> None:
    patch_IC = torch.zeros((1, 1176), dtype=torch.uint8)
    patch_IC[0, 392:784] = 255
    expected = [-0.48145466 / 0.26862954, (1 - 0.4578275) / 0.26130258, -0.40821073 / 0.27577711]
    assert normalised(patch_IC)[0, ::392].tolist() == pytest.approx(expected, abs=1e-6)
