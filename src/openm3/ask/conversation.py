"""One growing context on one model: reads only what it has not read yet, then writes a reply.

What a new prompt has in common with the tokens already read is kept, so asking again about the same documents, or going
on with a talk, costs only the new part. Knows no documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from torch import Tensor

from openm3.ask.memory import check_memory
from openm3.config import BLOCK
from openm3.engine.archive import Archive
from openm3.engine.pages import page_hashes
from openm3.engine.request import named, placed
from openm3.model.model import Model
from openm3.model.session import Session
from openm3.model.witness import Witness
from openm3.tokens.media import Media
from openm3.tokens.router import Content, Event, StreamRouter, Thinking

MOST_BYTES = 64 << 30
"""Room for pages in a cache folder: several contexts of a million tokens of m3-tiny."""

SPARE_TOKENS = 1024
"""Room beyond what is needed now, so that the cache does not move with every question."""

OnProgress = Callable[[int, int], None]
OnText = Callable[[Thinking | Content], None]


@dataclass(frozen=True)
class Reply:
    """What the model wrote and what that took.

    `stop` says why it ended: the model's own "end", the "length" limit, or "interrupted" by Ctrl-C. `num_read` tokens
    of the prompt were new, `num_restored` came from a cache folder; `num_written` counts the end token too. Times in
    seconds.
    """

    text: str
    thinking: str
    stop: Literal["end", "length", "interrupted"]
    num_prompt: int
    num_read: int
    num_restored: int
    num_written: int
    read_seconds: float
    write_seconds: float


class Conversation:
    """The cache of one context, and the ids in it. With a folder `cache_dir` what is read is also kept there.

    Raises ConfigError for a folder that cannot be written to.
    """

    def __init__(self, model: Model, cache_dir: str | Path | None = None) -> None:
        self.model = model
        self._session: Session | None = None
        self._archive: Archive | None = None
        if cache_dir is not None:
            self._archive = Archive(model.network, model.session(1).pools, cache_dir, most_bytes=MOST_BYTES)
        self._kept = 0
        # The tokens read, by what their keys depend on.
        self._names: list[int] = []
        ends = {model.tokenizer.eos_id, model.config.eos_id}
        self._end_ids = frozenset(i for i in ends if i is not None)
        self._think_end = model.tokenizer.token_id("</mm:think>")

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: str,
        max_new_tokens: int,
        media: Sequence[Media] = (),
    ) -> list[int]:
        """The ids of a prompt; `media` are the pictures and videos of its messages, in order.

        Raises PromptError if it and the reply exceed the model's limit or the memory, or the model sees no media.
        """
        ids = self.model.tokenizer.chat(messages, thinking=thinking, media=media)
        self.model.check_media(self.model.check_ids(ids, max_new_tokens), media)
        needed = len(ids) + max_new_tokens
        if self._session is None or needed > self._session.capacity:
            check_memory(self.model.config, needed, self.model.network.embed.weight.element_size())
        return ids

    def reply(
        self,
        ids: Sequence[int],
        *,
        thinking: str,
        max_new_tokens: int,
        media: Sequence[Media] = (),
        witness: Witness | None = None,
        on_progress: OnProgress | None = None,
        on_text: OnText | None = None,
    ) -> Reply:
        """Read the prompt (made with the mode `thinking` and these media) and write greedily up to an end token.

        `on_progress` gets the new tokens read so far and in all, `on_text` each part of the reply. The witness counts
        the steps that write the answer, not those of thinking. Ctrl-C while reading raises KeyboardInterrupt and keeps
        what was read; while writing it ends the reply.
        """
        begin = perf_counter()
        prompt = _Prompt(list(ids), media, self.model)
        num_read, num_restored, logit_V = self._read(prompt, max_new_tokens, thinking, witness, on_progress)
        read = perf_counter()
        writer = _Writer(self.model, thinking, on_text)
        stop = self._write(logit_V, max_new_tokens, writer, witness)
        return Reply(
            text=writer.text,
            thinking=writer.thinking,
            stop=stop,
            num_prompt=len(ids),
            num_read=num_read,
            num_restored=num_restored,
            num_written=len(self._names) - len(ids),
            read_seconds=read - begin,
            write_seconds=perf_counter() - read,
        )

    def _read(
        self, prompt: _Prompt, room: int, thinking: str, witness: Witness | None, on_progress: OnProgress | None
    ) -> tuple[int, int, Tensor]:
        """Read what is new of a prompt; its last token alone, as the first step of the answer.

        Returns how many tokens were computed and restored, and the logits after the last.
        """
        ids, names = prompt.ids, prompt.names
        session = self._with_room(len(ids) + room)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._names, names, strict=False)))
        known = min(same, session.length, len(ids) - 1)
        session.rewind(known)
        self._names = names.copy()
        num_new = len(ids) - known

        def report(done: int) -> None:
            if on_progress is not None:
                on_progress(done, num_new)

        report(0)
        hashes = [] if self._archive is None else list(page_hashes(names, self._archive.root))
        begin = session.length
        self._restore(hashes[: (len(ids) - 1) // BLOCK], session, lambda: report(session.length - known))
        restored = session.length
        self._kept = restored // BLOCK

        def read(done: int) -> None:
            # Before anyone is told, so that an interruption loses nothing.
            self._keep(hashes, session)
            report(restored - known + done)

        if restored < len(ids) - 1:
            session.read(ids[restored:-1], on_progress=read, images=prompt.images(restored))
        if witness is not None:
            witness.watching = thinking != "enabled"
        logit_V = session.read(ids[-1:], observer=witness)
        self._keep(hashes, session)
        report(num_new)
        return len(ids) - restored, restored - begin, logit_V

    def _restore(self, hashes: Sequence[bytes], session: Session, on_page: Callable[[], None]) -> None:
        """Go on from the whole pages in the folder, as far as they reach beyond what the session holds."""
        first = session.length // BLOCK
        if self._archive is not None:
            for page in self._archive.restore_all(hashes[first:], session.pools, first):
                session.length = (page + 1) * BLOCK
                on_page()

    def _keep(self, hashes: Sequence[bytes], session: Session) -> None:
        """Have the pages written that have become full."""
        if self._archive is not None:
            full = min(session.length // BLOCK, len(hashes))
            for page in range(self._kept, full):
                self._archive.keep(hashes[page], session.pools, page)
            self._kept = full

    def _write(
        self, logit_V: Tensor, limit: int, writer: _Writer, witness: Witness | None
    ) -> Literal["end", "length", "interrupted"]:
        assert self._session is not None
        stop: Literal["end", "length", "interrupted"] = "length"
        answering = False
        try:
            for token in self._session.decode(logit_V, limit, witness):
                self._names.append(token)
                if token in self._end_ids:
                    stop = "end"
                    break
                writer.push(token)
                answering |= token == self._think_end or bool(writer.text)
                if witness is not None:
                    witness.watching |= answering
                    if token == self._think_end:
                        witness.forget()
        except KeyboardInterrupt:
            stop = "interrupted"
        writer.finish()
        if witness is not None and writer.thinking and not answering:
            witness.forget()
        return stop

    def close(self) -> None:
        """Write what is still to be kept in the cache folder."""
        if self._archive is not None:
            self._archive.close()

    def _with_room(self, needed: int) -> Session:
        """The session, moved to a larger one if it is too small."""
        old = self._session
        if old is not None and needed <= old.capacity:
            return old
        limit = self.model.config.max_positions
        new = self.model.session(min(limit, needed + SPARE_TOKENS))
        if old is not None:
            for source, target in zip(old.pools, new.pools, strict=True):
                for pages, more in zip(source.tensors(), target.tensors(), strict=True):
                    more[: pages.shape[0]] = pages
            new.length = old.length
        self._session = new
        return new


class _Prompt:
    """A prompt's ids, and what stands for the placeholders among them."""

    def __init__(self, ids: list[int], media: Sequence[Media], model: Model) -> None:
        self.ids = ids
        self._media = media
        self._model = model
        self.names = named(ids, placed(media, model.check_media(ids, media)))

    def images(self, first: int) -> tuple[Tensor, Tensor] | None:
        """Places from `first` on, counted from there, and the inputs [I, D] that stand there."""
        last = max((i for i, name in enumerate(self.names) if name < 0), default=-1)
        if last < first or (seen := self._model.see(self.ids, self._media)) is None:
            return None
        begin = int((seen[0] < first).sum())
        return seen[0][begin:] - first, seen[1][begin:]


class _Writer:
    """Gathers a reply's ids as text, thinking apart."""

    def __init__(self, model: Model, thinking: str, on_text: OnText | None) -> None:
        self.text = ""
        self.thinking = ""
        self._decoder = model.tokenizer.decoder()
        self._router = StreamRouter(thinking=thinking)
        self._on_text = on_text

    def push(self, token: int) -> None:
        self._take(self._router.push(self._decoder.push(token)))

    def finish(self) -> None:
        self._take(self._router.push(self._decoder.finish()) + self._router.finish())

    def _take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Content):
                self.text += event.text
            elif isinstance(event, Thinking):
                self.thinking += event.text
            else:
                continue
            if self._on_text is not None:
                self._on_text(event)
