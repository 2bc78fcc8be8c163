"""What a reply may be made of: the engine asks before it draws each token, and tells which one it took."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """Follows one reply. If a method raises, or no token is allowed, that reply alone ends, with reason "error".

    Methods are called between steps, by the engine's thread: they should take well below a millisecond.
    """

    def mask(self) -> NDArray[np.bool_] | None:
        """Which tokens may come next, by id; None for all. Ids beyond its end are forbidden. Changes nothing."""

    def accept(self, token: int) -> None:
        """Note that a token was taken, once for each token of the reply but the one that ends it."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but an end token: the reply then ends at once, with reason "stop"."""
