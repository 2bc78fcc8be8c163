"""Pictures and videos as the model takes them, and where they stand in a prompt.

In a prompt each is a row of placeholders that the vision tower's outputs replace. `expand` writes these rows, `runs`
finds them in the ids. How pixels become patches is the business of `pictures` and `video`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from openm3.errors import PromptError

Kind = Literal["image", "video"]

PLACEHOLDERS: dict[str, Kind] = {"]<]image[>[": "image", "]<]video[>[": "video"}
"""The control tokens that stand for one token of a picture or video, or, before `expand`, for a whole one."""

_START, _END = "]<]start of image[>[", "]<]end of image[>["


@dataclass(frozen=True, eq=False)
class Media:
    """A picture or a video, cut into patches of 14x14 pixels and two frames; every 2x2 of them become one token.

    `openm3.read_image`, `openm3.read_video` and `openm3.video_from_frames` make one. Small (uint8) and picklable.
    """

    kind: Kind

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

    @classmethod
    def of(
        cls,
        kind: Kind,
        patch_IC: NDArray[np.uint8],
        grids: Sequence[tuple[int, int, int]],
        size: tuple[int, int],
        seconds: Sequence[float] | None = None,
    ) -> Media:
        """Media with its digest."""
        patch_IC = np.ascontiguousarray(patch_IC)
        seen = hashlib.blake2b(f"{kind} {[tuple(grid) for grid in grids]} ".encode(), digest_size=32)
        seen.update(patch_IC.data)
        return cls(kind, patch_IC, tuple(grids), None if seconds is None else tuple(seconds), size, seen.digest())

    @property
    def num_tokens(self) -> int:
        """How many placeholders stand for it in a prompt."""
        return sum(t * h * w for t, h, w in self.grids) // 4


@dataclass(frozen=True)
class Run:
    """Consecutive placeholders in a prompt: ids `first` to `first + count` are tokens `offset` to `offset + count`
    of the `media`-th picture or video."""

    media: int
    first: int
    offset: int
    count: int


def expand(pieces: Iterable[tuple[str, bool]], media: Sequence[Media]) -> Iterator[tuple[str, bool]]:
    """The pieces of a prompt, (text, whether it is one control token), with each media placeholder written out.

    A picture becomes its tokens between a start and an end; a video becomes that for each temporal patch, after its
    time as ordinary text. `media` is in order of appearance. Raises PromptError when it is not what the prompt shows.
    """
    shown = 0
    for text, is_control in pieces:
        kind = PLACEHOLDERS.get(text) if is_control else None
        if kind is None:
            yield text, is_control
            continue
        if shown < len(media):
            check_kinds([kind], media[shown : shown + 1], shown)
            yield from _written_out(text, media[shown])
        shown += 1
    if shown != len(media):
        raise PromptError(f"the prompt shows {shown} pictures and videos, but {len(media)} are given")


def check_kinds(kinds: Sequence[str], media: Sequence[Media], start: int = 0) -> None:
    """Raise PromptError unless `media` are of these kinds, in order; `start` is the number of the first in messages."""
    if len(kinds) != len(media):
        raise PromptError(f"the messages show {len(kinds)} pictures and videos, but {len(media)} are given")
    for i, (kind, item) in enumerate(zip(kinds, media, strict=True), start):
        if kind != item.kind:
            raise PromptError(f"media {i} is of kind {item.kind}, but the prompt shows kind {kind} in its place")


def runs(ids: Sequence[int], media: Sequence[Media], image_id: int | None, video_id: int | None) -> list[Run]:
    """Which placeholders of a prompt are filled by which tokens of `media`, in the order of the ids.

    `image_id` and `video_id` are the placeholders' ids, None if there is none. Raises PromptError when the ids do not
    hold as many of each kind, in this order, as the media need.
    """
    id_T = np.asarray(ids, np.int64)
    kind_of = {id_: kind for id_, kind in ((image_id, "image"), (video_id, "video")) if id_ is not None}
    place_N = np.flatnonzero(np.isin(id_T, list(kind_of)))
    needed = sum(item.num_tokens for item in media)
    if len(place_N) != needed:
        raise PromptError(f"the prompt has {len(place_N):,} media placeholders, the media need {needed:,}")
    found, start = [], 0
    for number, item in enumerate(media):
        own_N = place_N[start : start + item.num_tokens]
        if wrong := {kind_of[int(id_)] for id_ in np.unique(id_T[own_N])} - {item.kind}:
            raise PromptError(f"media {number} is of kind {item.kind}, but the prompt has kind {wrong.pop()} there")
        breaks = np.flatnonzero(np.diff(own_N) != 1) + 1
        for run_N in np.split(own_N, breaks) if len(own_N) else []:
            offset = int(np.searchsorted(own_N, run_N[0]))
            found.append(Run(number, int(run_N[0]), offset, len(run_N)))
        start += item.num_tokens
    return found


def _written_out(placeholder: str, item: Media) -> Iterator[tuple[str, bool]]:
    temporal = [h * w // 4 for t, h, w in item.grids for _ in range(t)]
    if item.seconds is not None and len(item.seconds) != len(temporal):
        raise PromptError(f"a video has {len(temporal)} temporal patches, but times for {len(item.seconds)}")
    for i, count in enumerate(temporal):
        if item.seconds is not None:
            yield f"]<]{item.seconds[i]:.1f} seconds[>[", False
        yield _START, True
        yield from [(placeholder, True)] * count
        yield _END, True
