"""Agreement on pictures and videos: pixels made from recorded pictures and frames, and what the tower makes of pixels.

A case with media holds `pixel_values` [I, C] with `image_grid_thw` [n, 3] (or `pixel_values_videos` and
`video_grid_thw`, the segments of one video), normalised as the model takes them; and where they were recorded the
pictures themselves (`image_u8`, `image_u8.0` and so on [H, W, 3], or `video_u8` [frames, H, W, 3]), the features
`vision_last_hidden` [I, hidden] and the tokens `image_embeds` or `video_embeds` [I / 4, D].
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from openm3.errors import CheckpointError, PromptError
from openm3.model.model import Model
from openm3.model.vision import MEAN, STD, normalised
from openm3.tokens.media import Media
from openm3.tokens.pictures import read_image
from openm3.tokens.video import video_from_frames


def has_media(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a recorded case shows pictures or a video."""
    return any(key.startswith("pixel_values") for key in tensors)


def recorded_media(tensors: Mapping[str, Tensor], name: str) -> list[Media]:
    """What a case shows, of its recorded pixels. Raises CheckpointError for pixels without their grids."""
    kind = "image" if "pixel_values" in tensors else "video"
    pixels = tensors["pixel_values" if kind == "image" else "pixel_values_videos"]
    rows = tensors.get(f"{kind}_grid_thw", torch.zeros((0, 3))).tolist()
    grids = [(int(t), int(h), int(w)) for t, h, w in rows]
    ends = [0, *accumulate(t * h * w for t, h, w in grids)]
    if pixels.ndim != 2 or ends[-1] != pixels.shape[0]:
        raise CheckpointError(f"case {name} records pixels {list(pixels.shape)} that {kind}_grid_thw does not describe")
    patch_IC = _pixels(pixels).numpy()
    if kind == "video":
        return [Media.of("video", patch_IC, grids, (0, 0))]
    return [Media.of("image", patch_IC[ends[i] : ends[i + 1]], [grid], (0, 0)) for i, grid in enumerate(grids)]


def pixel_errors(tensors: Mapping[str, Tensor], media: list[Media], name: str) -> tuple[float, float] | None:
    """Largest and mean difference of pixels made from recorded pictures, of a range of 1; None where none are recorded.

    Raises CheckpointError for pictures that cannot be read.
    """
    try:
        if "video_u8" in tensors:
            made = [video_from_frames(tensors["video_u8"].numpy())]
        else:
            pictures = sorted(key for key in tensors if key.startswith("image_u8"))
            made = [read_image(tensors[key].numpy()) for key in pictures]
    except PromptError as error:
        raise CheckpointError(f"case {name} records a picture that cannot be read: {error}") from None
    if not made:
        return None
    if [one.grids for one in made] != [one.grids for one in media]:
        return 1.0, 1.0
    ours, theirs = (torch.cat([torch.from_numpy(one.patch_IC).float() for one in some]) for some in (made, media))
    difference = (ours - theirs).abs() / 255
    return difference.max().item(), difference.mean().item()


def pixels_agree(largest: float, mean: float) -> bool:
    """Whether pixels differ by at most 2 of 255, and by a thousandth of the range in the mean."""
    return round(largest * 255) <= 2 and mean <= 1e-3


@torch.inference_mode()
def vision_error(model: Model, tensors: Mapping[str, Tensor], media: list[Media]) -> float | None:
    """Largest difference of features and tokens from those recorded; None where none are."""
    patch_IC = torch.cat([torch.from_numpy(one.patch_IC) for one in media]).to(model.device)
    network, dtype = model.network, model.network.embed.weight.dtype
    feature_IC = network.vision(normalised(patch_IC, dtype), [grid for one in media for grid in one.grids])
    found = {"vision_last_hidden": feature_IC, "image_embeds": network.projector(feature_IC)}
    found["video_embeds"] = found["image_embeds"]
    errors = [
        (made.cpu().float() - tensors[key]).abs().max().item()
        for key, made in found.items()
        if key in tensors and tensors[key].shape == made.shape
    ]
    return max(errors, default=None)


def _pixels(normal_IC: Tensor) -> Tensor:
    """Normalised pixels as bytes again."""
    mean, std = (torch.tensor(values)[:, None] for values in (MEAN, STD))
    x = normal_IC.float().view(normal_IC.shape[0], len(MEAN), -1) * std + mean
    return (x * 255).round().clamp(0, 255).to(torch.uint8).view(normal_IC.shape)
