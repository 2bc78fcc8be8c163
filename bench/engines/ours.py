"""openm3 as an engine to compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engines import CONFIG, ROOM
from openm3.eval.bench_model import fill, random_network
from openm3.model.session import Session


class OpenM3:
    """The plain session of one request."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.network = random_network(CONFIG, torch.bfloat16)
        if dtype == torch.float32:
            # The same weights, computed with in more digits.
            self.network.float()

    def fill(self, length: int) -> None:
        self.length = length
        self.session = Session(self.network, length + ROOM)
        fill(self.session, length)

    def read(self, ids: Sequence[int]) -> None:
        self.last_V = self.session.read(list(ids))

    def logits(self) -> list[float]:
        logits: list[float] = self.last_V.tolist()
        return logits

    def rewind(self) -> None:
        self.session.rewind(self.length)
