"""Questions about documents: the engine of `openm3 ask`, without a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from openm3.ask.conversation import Conversation, OnProgress, OnText, Reply
from openm3.ask.documents import Document
from openm3.ask.media import Shown, content
from openm3.errors import PromptError
from openm3.evidence.places import Places, locate
from openm3.evidence.quotes import CHANGED, UNATTENDED, Evidence, rank
from openm3.model.model import Model
from openm3.model.witness import Witness

MAX_NEW_TOKENS = 128

NO_DOCUMENTS = "there is no document to quote"


@dataclass(frozen=True)
class Answer:
    """An answer, where it came from and what it cost.

    `no_evidence` says why `evidence` is empty, None if it is not. `tokens` counts the `prompt`, its part in the
    `documents`, those `read` now and those `restored` from a cache folder (the rest was read for an earlier question),
    and those of the `answer`, thinking included. `timings` are `read_seconds`, `answer_seconds`, and
    `read_tokens_per_second`, `answer_tokens_per_second` (None where nothing was timed). `attended_share` is the part of
    the visible context that attention read.
    """

    answer: str
    thinking: str
    stop: str
    evidence: tuple[Evidence, ...]
    no_evidence: str | None
    tokens: dict[str, int]
    timings: dict[str, float | None]
    attended_share: float | None


class Reader:
    """Reads documents once and answers any number of questions about them; with a folder `cache_dir`, also later ones.

    What is `shown`, pictures and videos, stands before them.

    Raises ConfigError for a folder that cannot be written to. `close` writes what is still to be kept there.
    """

    def __init__(
        self,
        model: Model,
        documents: Sequence[Document],
        cache_dir: str | Path | None = None,
        shown: Sequence[Shown] = (),
    ) -> None:
        self.documents = tuple(documents)
        self._shown = tuple(shown)
        self._conversation = Conversation(model, cache_dir)

    def answer(
        self,
        question: str,
        *,
        thinking: str = "disabled",
        max_new_tokens: int = MAX_NEW_TOKENS,
        on_start: Callable[[int], None] | None = None,
        on_progress: OnProgress | None = None,
        on_text: OnText | None = None,
    ) -> Answer:
        """Answer one question, greedily, in at most `max_new_tokens`.

        `on_start` gets the length of all there will be, in tokens, before anything is read; `on_progress` the tokens
        read so far and in all, `on_text` the parts of the answer as they come. Raises PromptError, before anything is
        read, for an empty question, and for a prompt longer than the model or the memory takes. Ctrl-C while reading
        raises KeyboardInterrupt; while answering it ends the answer.
        """
        if not question.strip():
            raise PromptError("the question is empty")
        messages = [{"role": "user", "content": content(self._shown, self.documents, question)}]
        media = [one.media for one in self._shown]
        ids = self._conversation.encode(messages, thinking=thinking, max_new_tokens=max_new_tokens, media=media)
        if on_start is not None:
            on_start(len(ids) + max_new_tokens)
        places = locate(self._conversation.model.tokenizer, ids, self.documents)
        witness = Witness(len(ids) + max_new_tokens)
        reply = self._conversation.reply(
            ids,
            thinking=thinking,
            max_new_tokens=max_new_tokens,
            media=media,
            witness=witness,
            on_progress=on_progress,
            on_text=on_text,
        )
        return self._answer(reply, places, witness)

    @property
    def model(self) -> Model:
        """What answers."""
        return self._conversation.model

    def close(self) -> None:
        """Write what is still to be kept in the cache folder."""
        self._conversation.close()

    def _answer(self, reply: Reply, places: Places | None, witness: Witness) -> Answer:
        evidence = rank(witness.mass_S.cpu().numpy(), places, self.documents) if places else ()
        reason = None
        if places is None:
            reason = CHANGED
        elif not self.documents:
            reason = NO_DOCUMENTS
        elif not evidence:
            reason = UNATTENDED
        return Answer(
            answer=reply.text,
            thinking=reply.thinking,
            stop=reply.stop,
            evidence=evidence,
            no_evidence=reason,
            tokens={
                "prompt": reply.num_prompt,
                "documents": places.num_tokens if places else 0,
                "read": reply.num_read,
                "restored": reply.num_restored,
                "answer": reply.num_written,
            },
            timings={
                "read_seconds": reply.read_seconds,
                "answer_seconds": reply.write_seconds,
                "read_tokens_per_second": _rate(reply.num_read, reply.read_seconds),
                # The first token came with the prompt.
                "answer_tokens_per_second": _rate(reply.num_written - 1, reply.write_seconds),
            },
            attended_share=witness.attended_share,
        )


def ask(
    model: Model,
    documents: Sequence[Document],
    question: str,
    *,
    thinking: str = "disabled",
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_progress: OnProgress | None = None,
    on_text: OnText | None = None,
) -> Answer:
    """Answer one question about documents; see `Reader.answer`."""
    return Reader(model, documents).answer(
        question, thinking=thinking, max_new_tokens=max_new_tokens, on_progress=on_progress, on_text=on_text
    )


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None
