"""Numbers to text: aligned tables, intervals, progress. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A Markdown table whose columns also line up as plain text; `align` has one of "<>^" a column."""
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * (w - 1) + ":" if side == ">" else "-" * w for side, w in zip(align, widths, strict=True)]
    lines = [head, rule, *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:{side}{w}}" for cell, side, w in zip(line, align, widths, strict=True)) + " |"
        for line in lines
    )


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of the true share of right answers; (0, 1) without data."""
    if count == 0:
        return 0.0, 1.0
    share, square = right / count, z * z
    middle = share + square / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    low, high = (middle - spread) / (1 + square / count), (middle + spread) / (1 + square / count)
    return max(0.0, low), min(1.0, high)


def tokens(count: int) -> str:
    """A token count as people write it: 32768 is 32K, 1048576 is 1M, 1000 stays."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def progress() -> Progress:
    """A progress display with the time left, on standard error; silent unless that is a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
    )
