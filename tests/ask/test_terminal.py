"""What reaches a terminal: nothing that could move it, styles only where there is one."""

import io

import pytest

from openm3.ask import terminal
from openm3.evidence.quotes import Evidence
from openm3.tokens import Content, Thinking


class Stream(io.TextIOWrapper):
    """A text stream over memory that may claim to be a terminal."""

    def __init__(self, encoding: str = "utf-8", is_terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="")
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    @property
    def written(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


def test_control_characters_do_not_pass() -> None:
    stream = Stream()
    terminal.write("a\x1b[2Jb\tc\nd\r\x9b\u202ee é", stream)
    assert stream.written == "a\ufffd[2Jb\tc\nd\ufffd\ufffd\ufffde é"


def test_what_the_stream_cannot_show_is_replaced() -> None:
    stream = Stream("ascii")
    terminal.write("é\udcff ok", stream)
    assert stream.written == "?? ok"


def test_style_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen, pipe = Stream(is_terminal=True), Stream()
    for stream in (screen, pipe):
        terminal.write("x", stream, style="\x1b[2m")
    assert (screen.written, pipe.written) == ("\x1b[2mx\x1b[0m", "x")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.write("y", screen, style="\x1b[2m")
    assert screen.written.endswith("my\x1b[0m") is False and screen.written.endswith("y")


def test_thinking_stands_apart(capsys: pytest.CaptureFixture[str]) -> None:
    voice = terminal.Voice()
    for part in (Thinking("hm"), Thinking(" so"), Content("yes"), Content("!")):
        voice.say(part)
    assert capsys.readouterr() == ("yes!", "hm so\n")


def test_evidence_has_line_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_evidence(Evidence("a.py", 9, 10, "def f():\n    pass", 0.126))
    terminal.show_evidence(Evidence("b.py", 3, 3, "x\x1b[0m", 0.5))
    assert capsys.readouterr().out == (
        "\na.py:9-10  13% of attention\n      9  def f():\n     10      pass\n"
        "\nb.py:3  50% of attention\n      3  x\ufffd[0m\n"
    )


def test_the_bar_shows_on_a_terminal_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Stream(is_terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with terminal.Bar() as bar:
        bar.update(0, 2000)
        bar.update(1000, 2000)
        bar._progress.refresh()
        assert "1,000 of 2,000 tokens" in screen.written
        bar.update(2000, 2000)
        assert bar._progress.finished and not bar._progress.live.is_started


def test_the_bar_is_nothing_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Stream()
    monkeypatch.setattr("sys.stderr", pipe)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with terminal.Bar() as bar:
        bar.update(0, 10)
        bar.update(10, 10)
    assert pipe.written == ""
