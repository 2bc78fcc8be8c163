"""A temporary folder that goes with its process: one of a process that was killed is removed by the next."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from uuid import uuid4
from weakref import finalize

PREFIX = "openm3-files-"

_LOCK = "lock"


class TemporaryFolder:
    """A folder at `path`, there from `make` to `remove`, which comes at the latest when Python ends."""

    def __init__(self) -> None:
        remove_left_behind()
        self.path = Path(gettempdir(), f"{PREFIX}{uuid4().hex}")
        self._finalizer: finalize[..., TemporaryFolder] | None = None

    def make(self) -> None:
        """Make it if it is not there."""
        if self._finalizer is None:
            self.path.mkdir(mode=0o700)
            # Not to be seen by others before it is locked.
            lock = os.open(self.path / "new", os.O_CREAT | os.O_WRONLY, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            (self.path / "new").rename(self.path / _LOCK)
            self._finalizer = finalize(self, _remove, self.path, lock)

    def remove(self) -> None:
        """Remove it with all that is in it, if it is there."""
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer = None


def remove_left_behind() -> None:
    """Remove the folders of processes that live no more: nobody holds their locks."""
    for path in Path(gettempdir()).glob(f"{PREFIX}*/{_LOCK}"):
        # Held by a process that lives, or another user's.
        with suppress(OSError):
            lock = os.open(path, os.O_WRONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent, ignore_errors=True)
            finally:
                os.close(lock)


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
