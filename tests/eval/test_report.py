"""Tables, intervals and token counts, to the character."""

from __future__ import annotations

import pytest

from openm3.eval.report import progress, table, tokens, wilson


def test_table_lines_up_and_is_markdown() -> None:
    assert table(["task", "right"], [["pass keys", "1 of 2"], ["x", "10"]], "<>").splitlines() == [
        "| task      |  right |",
        "| --------- | -----: |",
        "| pass keys | 1 of 2 |",
        "| x         |     10 |",
    ]


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (0, 0, 0.0, 1.0),
        (10, 10, 0.7225, 1.0),
        (0, 10, 0.0, 0.2775),
        (95, 100, 0.8882, 0.9785),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


def test_tokens_as_people_write_them() -> None:
    written = [tokens(n) for n in (0, 1000, 1024, 32768, 131072, 1 << 20, 3 << 20)]
    assert written == ["0", "1,000", "1K", "32K", "128K", "1M", "3M"]


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as bar:
        bar.update(bar.add_task("reading", total=2), advance=1)
    assert capsys.readouterr() == ("", "")
