"""Who holds which page of the pool, and which pages hold what: allocation, reference counts, the prefix cache.

A page is 128 tokens of every layer: keys, values, index keys and their codes. Requests hold pages; full ones are
published under the hash of all tokens up to their end, and stay when nobody holds them until the room is needed, the
longest unused first and of those the deepest. Knows page numbers and token ids, neither tensors nor requests.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from openm3.config import BLOCK

SIBLINGS = 64
"""How many continuations of one prefix are compared, the newest first, when a page is to be reused up to its middle."""


def page_hashes(ids: Sequence[int], root: bytes, known: Sequence[bytes] = ()) -> Iterator[bytes]:
    """The hash of each full page: of its tokens and the hash before it, `root` before the first.

    `ids` name tokens by what their keys depend on (`Request.names`), `root` stands for everything else: the model, its
    precision. The first `known` hashes are given and not computed again.
    """
    parent = known[-1] if known else root
    for first in range(len(known) * BLOCK, len(ids) - BLOCK + 1, BLOCK):
        parent = hashlib.blake2b(array("q", ids[first : first + BLOCK]).tobytes(), key=parent, digest_size=32).digest()
        yield parent


@dataclass(frozen=True)
class Published:
    """A full page that can be found again: its hash, that of the page before it, and its tokens."""

    hash: bytes
    parent: bytes
    ids: tuple[int, ...]


class Pages:
    """The pages 0 to `num_pages - 1`. Every page is free, held by someone, or published and held by nobody."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = deque(range(num_pages))
        self._holders = [0] * num_pages
        self._published: dict[int, Published] = {}
        self._by_hash: dict[bytes, int] = {}
        self._children: dict[bytes, OrderedDict[int, None]] = {}
        # Published pages that nobody holds, the longest unused first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.evicted = 0

    @property
    def num_available(self) -> int:
        """Pages that could be allocated now."""
        return len(self._free) + len(self._idle)

    @property
    def num_published(self) -> int:
        """Pages that can be found again."""
        return len(self._published)

    @property
    def num_held(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - self.num_available

    def allocate(self, count: int) -> list[int] | None:
        """Pages of unknown content, held by the caller alone; None, and nothing changes, if there are not as many."""
        if count > self.num_available:
            return None
        while len(self._free) < count:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self._free.append(page)
            self.evicted += 1
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def hold(self, page: int) -> None:
        """One more holder of a page that is held or published."""
        assert self._holders[page] or page in self._published, f"page {page} is free"
        self._holders[page] += 1
        self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each page of a sequence. Of its published pages the last will be evicted first."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"nobody holds page {page}"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._published:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int, entry: Published) -> bool:
        """Let others find a page that is held and full; False if a page of the same content is published already."""
        assert self._holders[page] > 0 and page not in self._published
        if entry.hash in self._by_hash:
            return False
        self._published[page] = entry
        self._by_hash[entry.hash] = page
        self._children.setdefault(entry.parent, OrderedDict())[page] = None
        return True

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The pages of as many of these hashes, from the first, as are published."""
        return [self._by_hash[key] for key in takewhile(self._by_hash.__contains__, hashes)]

    def find_partly(self, parent: bytes, ids: Sequence[int]) -> tuple[int, int]:
        """Of the published pages after `parent` the one that shares most first tokens with `ids`, and how many."""
        best = (0, 0)
        for page in islice(reversed(self._children.get(parent, ())), SIBLINGS):
            pairs = zip(self._published[page].ids, ids, strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if same > best[1]:
                best = page, same
        return best

    def is_shared(self, page: int) -> bool:
        """Whether others hold the page or can find it: then nobody may write to it."""
        return self._holders[page] > 1 or page in self._published

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """AssertionError unless `held`, the pages of each holder, accounts for every page."""
        count = [0] * self.num_pages
        for pages in held:
            assert len(set(pages)) == len(pages), f"a holder has a page twice: {pages}"
            for page in pages:
                count[page] += 1
        assert count == self._holders, "the holders' pages and the counts differ"
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free) and not free & idle, "a page is free twice"
        assert all(page in free or page in idle or count[page] for page in range(self.num_pages)), "a page is lost"
        assert not any(count[page] for page in free | idle), "a held page can be given away"
        assert idle <= set(self._published) and not free & set(self._published), "an unpublished page is kept"
        assert self._by_hash == {entry.hash: page for page, entry in self._published.items()}, "hashes and pages differ"
        children = {(entry.parent, page) for page, entry in self._published.items()}
        assert children == {(parent, page) for parent, pages in self._children.items() for page in pages}

    def _forget(self, page: int) -> None:
        entry = self._published.pop(page)
        del self._by_hash[entry.hash]
        siblings = self._children[entry.parent]
        del siblings[page]
        if not siblings:
            del self._children[entry.parent]
