"""What one step computes: the frozen description that goes through every layer."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from openm3.config import BLOCK


@dataclass(frozen=True)
class Batch:
    """The tokens of R requests, packed, and where their keys live.

    Request r owns tokens `start_R1[r]:start_R1[r+1]`, the last ones of its `length_R[r]` keys. `page_RP` maps its
    logical blocks to pages of the pools, `slot_T` is `page * 128 + offset` of each token, `position_T` its rotary
    position. Where pictures are among the tokens, `image_ID` are the inputs of the tokens `place_I`, ascending, in the
    embeddings' stead.
    """

    ids_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    page_RP: Tensor
    start_R1: Tensor
    length_R: Tensor
    place_I: Tensor | None = None
    image_ID: Tensor | None = None

    @classmethod
    def whole(cls, rows: list[Tensor], positions: list[Tensor] | None = None) -> Batch:
        """Whole sequences in pages of their own, in order: the identity page table of training and of the oracle."""
        lengths = [row.shape[0] for row in rows]
        pages = [-(-n // BLOCK) for n in lengths]
        first = [sum(pages[:r]) for r in range(len(rows))]
        page_RP = torch.zeros((len(rows), max(pages, default=0)), dtype=torch.int32)
        for r in range(len(rows)):
            page_RP[r, : pages[r]] = torch.arange(first[r], first[r] + pages[r])
        order = [torch.arange(n) for n in lengths]
        slots = [index + first[r] * BLOCK for r, index in enumerate(order)]
        return cls(
            ids_T=torch.cat(rows),
            position_T=torch.cat(positions or order),
            slot_T=torch.cat(slots),
            page_RP=page_RP,
            start_R1=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            length_R=torch.tensor(lengths, dtype=torch.int32),
        )

    @classmethod
    def step(cls, ids_T: Tensor, start: int, page_P: Tensor) -> Batch:
        """The next tokens of one request whose first `start` keys are already in the pages `page_P`."""
        position_T = torch.arange(start, start + ids_T.shape[0])
        return cls(
            ids_T=ids_T,
            position_T=position_T,
            slot_T=page_P[position_T // BLOCK].long() * BLOCK + position_T % BLOCK,
            page_RP=page_P[None].to(torch.int32),
            start_R1=torch.tensor([0, ids_T.shape[0]], dtype=torch.int32),
            length_R=torch.tensor([start + ids_T.shape[0]], dtype=torch.int32),
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in tensors.items() if x is not None})

    def with_images(self, place_I: Tensor, image_ID: Tensor) -> Batch:
        """The same batch with these inputs [I, D] of the tokens `place_I` [I], ascending."""
        return replace(self, place_I=place_I, image_ID=image_ID) if len(place_I) else self

    @property
    def num_pages(self) -> int:
        """Pages that a pool needs to hold every page named here."""
        return int(self.page_RP.max()) + 1 if self.page_RP.numel() else 0
