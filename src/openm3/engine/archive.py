"""Pages of keys on disk: what of a page is kept, under which model, and how it comes back into a pool."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from openm3.engine.store import PageStore
from openm3.model.network import Network
from openm3.ops.cache import Pool

READERS = 4
"""Threads that restore pages: reading waits for the disk, and for memory that is touched for the first time."""

FORMAT = 1
"""Raise it whenever a page of the same tokens comes to hold something else."""


class Archive:
    """The pages of one network in a folder that others may use too. Raises ConfigError if it cannot be written to."""

    def __init__(self, network: Network, pools: Sequence[Pool], folder: str | Path, *, most_bytes: int) -> None:
        self.root = fingerprint(network, pools)
        self.store = PageStore(folder, self.root.hex(), most_bytes=most_bytes)

    def keep(self, key: bytes, pools: Sequence[Pool], page: int) -> None:
        """Have a page written under a hash, unless there is one already."""
        if not self.store.has(key):
            parts = [x[page].contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() for x in _tensors(pools)]
            self.store.save(key, parts)

    def restore(self, key: bytes, pools: Sequence[Pool], page: int) -> bool:
        """Fill a page with what was kept under a hash; False if there is nothing, or nothing whole."""
        targets = [x[page] for x in _tensors(pools)]
        body = self.store.load(key, sum(x.nbytes for x in targets))
        if body is None:
            return False
        first = 0
        with torch.inference_mode():
            for x in targets:
                x.copy_(torch.frombuffer(body, dtype=x.dtype, count=x.numel(), offset=first).view(x.shape))
                first += x.nbytes
        return True

    def restore_all(self, keys: Sequence[bytes], pools: Sequence[Pool], first: int) -> Iterator[int]:
        """Fill pages from `first` on, several at a time, as far as all of them are whole; yields each page filled."""
        pages = range(first, first + len(keys))
        readers = ThreadPoolExecutor(READERS, "openm3 page reader")
        try:
            done = readers.map(lambda key, page: self.restore(key, pools, page), keys, pages)
            yield from (page for page, _ in takewhile(lambda pair: pair[1], zip(pages, done, strict=True)))
        finally:
            readers.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Write what is still to be written."""
        self.store.close()


def fingerprint(network: Network, pools: Sequence[Pool]) -> bytes:
    """Stands for all that a page's content depends on beside its tokens: the model, its weights, the format."""
    digest = hashlib.blake2b(repr((FORMAT, network.config)).encode(), digest_size=16)
    for x in _tensors(pools):
        digest.update(f"{x.dtype} {list(x.shape[1:])}".encode())
    for name, weight in network.state_dict().items():
        # A training step changes nearly every number: some of them, evenly spaced, tell weights apart.
        flat = weight.flatten()
        some = flat[:: max(1, flat.numel() // 256)].contiguous().view(torch.uint8).cpu()
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.digest()


def _tensors(pools: Sequence[Pool]) -> list[Tensor]:
    return [x for pool in pools for x in pool.tensors()]
