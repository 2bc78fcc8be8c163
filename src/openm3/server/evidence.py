"""Evidence for a reply: the lines of its prompt that it was drawn from, by the rules of `openm3 ask`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from openm3.engine.request import Attention
from openm3.evidence.places import decoded, placed
from openm3.evidence.quotes import CHANGED, UNATTENDED, rank
from openm3.server.calls import Call, Evidence, Finished, Passage
from openm3.server.conversation import conversation
from openm3.server.parts import Part, located
from openm3.tokens import StreamDecoder

UNANSWERED = "the reply ended before its answer began"
NOTHING = "there is nothing to quote but the question"


@dataclass(frozen=True)
class _Text:
    name: str
    text: str


def find(call: Call, ids: Sequence[int], decoder: StreamDecoder, attention: Attention | None) -> Evidence:
    """The passages of a prompt that got the most of an answer's attention; None for a reply without an answer.

    They are of the documents or, where there are none, of what users and tools said, up to the question: the last line
    of the last user. Takes time in proportion to the prompt: seconds for a million tokens.
    """
    text, begins = decoded(decoder, ids)
    quotable = _quotable(call, text)
    parts = quotable or []
    # A line's end belongs to it, and the last one stands behind the part.
    spans = [(part.body, part.stop + text.startswith("\n", part.stop)) for part in parts]
    places = placed(text, begins, spans)
    texts = [_Text(part.source or "", text[part.body : part.stop]) for part in parts]
    if attention is None or attention.share is None:
        return Evidence((), UNANSWERED, None, places.num_tokens)
    passages = [
        Passage(one.text, one.share, one.file or None, (one.first_line, one.last_line) if one.file else None)
        for one in rank(attention.mass_S, places, texts)
    ]
    missing = None if passages else CHANGED if quotable is None else UNATTENDED if quotable else NOTHING
    return Evidence(passages, missing, attention.share, places.num_tokens)


def report(event: Finished) -> dict[str, Any] | None:
    """What `openm3 ask --json` tells beside an answer, for a protocol's extra fields; None where nobody asked."""
    if event.evidence is None:
        return None
    found, usage, timings = event.evidence, event.usage, event.timings
    read = usage.prompt_tokens - usage.cached_tokens
    seconds = {}
    if timings is not None:
        answering = timings.total - timings.first_token
        seconds = {
            "queue_seconds": timings.queue,
            "read_seconds": timings.prefill,
            "answer_seconds": answering,
            "read_tokens_per_second": _rate(read, timings.prefill),
            # The first token came with the prompt.
            "answer_tokens_per_second": _rate(usage.completion_tokens - 1, answering),
        }
    return {
        "evidence": [
            {"text": one.text, "share": one.share, "source": one.source, "lines": one.lines} for one in found.passages
        ],
        "no_evidence": found.missing,
        "attended_share": found.attended_share,
        "tokens": {
            "prompt": usage.prompt_tokens,
            "documents": found.num_tokens,
            "read": read,
            "answer": usage.completion_tokens,
        },
        "timings": seconds,
    }


def _quotable(call: Call, text: str) -> list[Part] | None:
    """What may be quoted of a prompt's text; None where nothing of the conversation is found in it."""
    if call.messages is None:
        return [Part("prompt", None, 0, len(text), 0)]
    parts = list(located(conversation(call.messages), text))
    if not parts:
        return None
    documents = [part for part in parts if part.source is not None and part.role != "assistant"]
    return documents or _said([part for part in parts if part.role in ("user", "tool")], text)


def _said(parts: list[Part], text: str) -> list[Part]:
    """What users and tools said but for the question."""
    last = max((i for i, part in enumerate(parts) if part.role == "user"), default=None)
    if last is None:
        return parts
    question = text.rfind("\n", parts[last].start, parts[last].stop)
    before = [] if question < 0 else [replace(parts[last], stop=question)]
    return [*parts[:last], *before, *parts[last + 1 :]]


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None
