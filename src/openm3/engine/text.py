"""A reply's tokens as text, while they come: whole characters only, and nothing that may yet become a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from openm3.tokens.tokenizer import StreamDecoder


class ReplyText:
    """Decodes one reply. What `push` and `finish` return together is its text, up to the first stop string."""

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain by now and was not returned yet; `stopped` says that a stop string was met."""
        return self._take(self._decoder.push(token), final=False)

    def finish(self) -> str:
        """What was still held back."""
        return "" if self.stopped else self._take(self._decoder.finish(), final=True)

    def _take(self, new: str, *, final: bool) -> str:
        self._held += new
        # The string that is whole first, of several the longest: however the text is cut into tokens.
        met = [(at + len(text), at) for text in self._stop if (at := self._held.find(text)) >= 0]
        if met:
            self.stopped = True
            certain, self._held = self._held[: min(met)[1]], ""
        else:
            keep = 0 if final else self._possible()
            certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += certain
        return certain

    def _possible(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max((len(text) for text in self._stop), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-count:]) for text in self._stop):
                return count
        return 0
