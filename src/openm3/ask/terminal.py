"""Text on a terminal or in a pipe: a bar while the model reads, its words as they come, then evidence and cost.

In a pipe everything is plain. What a model or a document says cannot move the cursor or recolour the terminal.
"""

from __future__ import annotations

import os
import re
import sys
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from openm3.ask.answer import Answer, Reader
from openm3.ask.documents import Collection
from openm3.ask.memory import forecast
from openm3.evidence.quotes import Evidence
from openm3.tokens.router import Content, Thinking

_BOLD, _DIM, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and those that turn the direction of writing."""


def write(text: str, stream: TextIO | None = None, *, style: str = "") -> None:
    """Write at once, with characters that the stream cannot show replaced; styled on a terminal only."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    text = _UNSAFE.sub("\ufffd", text).encode(encoding, "replace").decode(encoding)
    if style and text and stream.isatty() and "NO_COLOR" not in os.environ:
        text = f"{style}{text}{_PLAIN}"
    stream.write(text)
    stream.flush()


class Bar:
    """A progress bar with the time left, on standard error; nothing where that is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("reading"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=0)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, done: int, total: int) -> None:
        """Show how much is read; all read, the bar goes away."""
        self._progress.update(self._task, completed=done, total=total)
        if done == 0:
            self._progress.start()
        if done == total:
            self._progress.stop()


class Voice:
    """Writes a reply as it comes: the answer to standard output, thinking dim to standard error."""

    def __init__(self) -> None:
        self._last: Thinking | Content | None = None

    def say(self, part: Thinking | Content) -> None:
        """Write one part; a line break stands between thinking and the answer."""
        if isinstance(self._last, Thinking) and isinstance(part, Content):
            write("\n", sys.stderr)
        self._last = part
        if isinstance(part, Content):
            write(part.text)
        else:
            write(part.text, sys.stderr, style=_DIM)


def show_answer(reader: Reader, question: str, *, thinking: str, max_new_tokens: int) -> Answer:
    """Ask and show it all: bar, answer, evidence, cost. Raises as `Reader.answer` does."""

    def tell(num_tokens: int) -> None:
        network = reader.model.network
        if line := forecast(network.config, num_tokens, network.embed.weight.element_size()):
            write(line + "\n", sys.stderr, style=_DIM)

    with Bar() as bar:
        answer = reader.answer(
            question,
            thinking=thinking,
            max_new_tokens=max_new_tokens,
            on_start=tell,
            on_progress=bar.update,
            on_text=Voice().say,
        )
    write(
        {"end": "\n", "length": f"\n[cut at {max_new_tokens} tokens]\n", "interrupted": "\n[interrupted]\n"}[
            answer.stop
        ]
    )
    for evidence in answer.evidence:
        show_evidence(evidence)
    if answer.no_evidence:
        write(f"\nno evidence: {answer.no_evidence}\n")
    write("\n")
    write(cost_line(answer), style=_DIM)
    write("\n")
    return answer


def show_evidence(evidence: Evidence) -> None:
    """File, lines and share of attention, then the lines with their numbers."""
    first, last = evidence.first_line, evidence.last_line
    lines = f"{first}-{last}" if last > first else f"{first}"
    write("\n")
    write(f"{evidence.file}:{lines}", style=_BOLD)
    write(f"  {evidence.share:.0%} of attention", style=_DIM)
    write("\n")
    for number, line in enumerate(evidence.text.split("\n"), first):
        write(f"{number:>7}  {line}\n")


def cost_line(answer: Answer) -> str:
    """What an answer cost, in one line."""
    tokens, timings = answer.tokens, answer.timings
    known = tokens["prompt"] - tokens["read"]
    parts = [
        f"read {tokens['read']:,} tokens in {_timed(timings['read_seconds'], timings['read_tokens_per_second'])}",
        f"wrote {tokens['answer']:,} in {_timed(timings['answer_seconds'], timings['answer_tokens_per_second'])}",
    ]
    if known:
        parts[0] += f", {known:,} known before"
    if answer.attended_share is not None:
        parts.append(f"attended to {answer.attended_share:.1%} of the context")
    return " · ".join(parts)


def show_notes(found: Collection) -> None:
    """Say on standard error what was left out, and what was read in a guessed encoding."""
    for document in found.documents:
        if not document.encoding.startswith("utf") or "(" in document.encoding:
            write(f"note: {document.name} read as {document.encoding}\n", sys.stderr)
    for skipped in found.skipped:
        write(f"note: {skipped.name} skipped: {skipped.reason}\n", sys.stderr)


def _timed(seconds: float | None, rate: float | None) -> str:
    return f"{seconds or 0.0:.1f} s" + (f" ({rate:,.0f}/s)" if rate is not None else "")
