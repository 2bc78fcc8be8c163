"""Pictures and videos on their way to the network: a part of them encoded in each step, kept by content.

A row of a grid (a picture, or a segment of a video) is encoded on its own, in pieces that leave room for the tokens of
other requests between them. What came out is kept by the content's hash: the same picture is not encoded again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterable

import torch
from torch import Tensor

from openm3.engine.request import Request
from openm3.model.network import Network
from openm3.tokens.media import Media

PIECE = 512
"""Patches of a layer that are computed at once."""

WRITERS_SHARE = 1 / 8
"""Part of a step's patches that is encoded while replies wait for the step."""

_Key = tuple[bytes, int]


class Encoder:
    """Encodes what requests wait for, first come first served, and keeps up to `cache_bytes` of what came out.

    A step encodes until it has done about `step_patches`, fewer where it also has replies to go on with.
    """

    def __init__(self, network: Network, *, step_patches: int, cache_bytes: int) -> None:
        self.encoded = 0
        self._network = network
        self._step_patches = step_patches
        self._cache_bytes = cache_bytes
        self._kept: OrderedDict[_Key, Tensor] = OrderedDict()
        self._wanted: OrderedDict[_Key, Media] = OrderedDict()
        self._walk: tuple[_Key, Generator[float, None, Tensor]] | None = None

    def ready(self, request: Request, first: int, count: int) -> int:
        """How many of a request's tokens from `first` on can be computed now; what the next one waits for is noted."""
        for part in request.media:
            if not part.within(first, first + count):
                continue
            if part.key in self._kept:
                self._kept.move_to_end(part.key)
                continue
            self._wanted.setdefault(part.key, part.media)
            return max(0, part.first - first)
        return count

    @torch.inference_mode()
    def run(self, *, writing: bool) -> None:
        """A step's part of encoding; `writing` says that replies wait for the step."""
        left = self._step_patches * (WRITERS_SHARE if writing else 1.0)
        while left > 0 and self._wanted:
            key, media = next(iter(self._wanted.items()))
            if self._walk is None or self._walk[0] != key:
                self._walk = key, self._looking(media, key[1])
            try:
                left -= next(self._walk[1])
            except StopIteration as end:
                self._kept[key] = end.value
                self._walk = None
                del self._wanted[key]
                self.encoded += 1

    def inputs(self, spans: Iterable[tuple[Request, int, int, int]]) -> tuple[Tensor, Tensor] | None:
        """What stands for the placeholders among a step's tokens: their places in the step, and inputs [I, D].

        Each span is a request, its first token and the one behind its last, and where the first is in the step. All
        were `ready`. None where there are no placeholders.
        """
        places: list[Tensor] = []
        inputs: list[Tensor] = []
        for request, first, stop, start in spans:
            for part in request.media if request.sees(first, stop) else ():
                if own := part.within(first, stop):
                    begin = own.start - part.first + part.offset
                    inputs.append(self._kept[part.key][begin : begin + len(own)])
                    places.append(torch.arange(own.start, own.stop) - first + start)
        self._trim()
        return (torch.cat(places), torch.cat(inputs)) if places else None

    def forget(self, requests: Iterable[Request]) -> None:
        """Encode nothing any more that none of these requests wants."""
        wanted = {part.key for request in requests for part in request.media}
        for key in self._wanted.keys() - wanted:
            del self._wanted[key]
        if self._walk is not None and self._walk[0] not in self._wanted:
            self._walk = None

    def _looking(self, media: Media, row: int) -> Generator[float, None, Tensor]:
        first = sum(t * h * w for t, h, w in media.grids[:row])
        t, h, w = media.grids[row]
        patch_IC = torch.from_numpy(media.patch_IC[first : first + t * h * w])
        return self._network.looking(patch_IC, [media.grids[row]], PIECE)

    def _trim(self) -> None:
        size = sum(image_ID.nbytes for image_ID in self._kept.values())
        while len(self._kept) > 1 and size > self._cache_bytes:
            size -= self._kept.popitem(last=False)[1].nbytes
