"""Pictures and videos as the model takes them: patches, their grids, and where in a prompt they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Media:
    """A picture or a video, cut into patches of 14x14 pixels and two frames; every 2x2 of them become one token."""

    kind: Literal["image", "video"]

    patch_IC: NDArray[np.uint8]
    """Pixels from 0 to 255, before normalisation. A row is (3 colours, 2 frames, 14 rows, 14 columns), flat. Rows go
    by frame pair, then by 2x2 group from top left, then inside the group; the segments of a video one after another."""

    grids: tuple[tuple[int, int, int], ...]
    """(t, h, w) in patches: one row for a picture, one a segment (4 temporal patches at most) for a video."""

    seconds: tuple[float, ...] | None
    """When each temporal patch of a video was; None for a picture and for a video without times."""

    size: tuple[int, int]
    """Height and width in pixels of the picture, or of a frame, as it was given (turned upright)."""

    digest: bytes
    """Hash of all that the model sees: kind, grids, patches. (Times are part of the prompt's text.)"""

    @property
    def num_tokens(self) -> int:
        """How many placeholders stand for it in a prompt."""
        return sum(t * h * w for t, h, w in self.grids) // 4
