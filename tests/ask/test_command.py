"""`openm3 ask` from its command line to its output: people's, pipes', programs', and errors."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from openm3 import cli
from openm3.ask import chat, command
from openm3.model.model import Model

TEXT = "one fish\ntwo fish\n\nred fish\nblue fish\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two documents and a picture in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/fish.txt").write_text(TEXT)
    (tmp_path / "docs/latin.txt").write_bytes("señor\n".encode("cp1252"))
    (tmp_path / "docs/logo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    return tmp_path


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, model: Model, checkpoint: str):
    """Run `openm3 ask` with the model already in memory."""
    monkeypatch.setattr(command, "load", lambda path, **_: model)

    def run(*words: str, question: str = "How many?") -> int:
        return cli.main(["ask", question, "--model", checkpoint, "--max-new-tokens", "4", *words])

    return run


def test_json_is_one_object(ask, here: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("--file", "docs", "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    value = json.loads(out)
    assert list(value) == [
        *("model", "question", "answer", "thinking", "stop", "evidence", "no_evidence", "tokens", "timings"),
        *("attended_share", "documents", "media", "skipped"),
    ]
    assert (value["model"], value["question"], value["stop"]) == (checkpoint, "How many?", "length")
    assert value["answer"]
    assert 1 <= len(value["evidence"]) <= 3
    for item in value["evidence"]:
        assert list(item) == ["file", "first_line", "last_line", "text", "share"]
        text = {"docs/fish.txt": TEXT, "docs/latin.txt": "señor\n"}[item["file"]]
        assert item["text"] == "\n".join(text.split("\n")[item["first_line"] - 1 : item["last_line"]])
        assert 0 < item["share"] <= 1
    assert list(value["tokens"]) == ["prompt", "documents", "read", "restored", "answer"]
    assert list(value["timings"]) == [
        *("read_seconds", "answer_seconds", "read_tokens_per_second", "answer_tokens_per_second"),
    ]
    assert value["documents"] == [
        {"name": "docs/fish.txt", "encoding": "utf-8"},
        {"name": "docs/latin.txt", "encoding": "cp1252"},
    ]
    assert value["skipped"] == [{"name": "docs/logo.png", "reason": "is binary"}]


def test_text_is_plain_in_a_pipe(ask, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("--file", "docs", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert ask("--file", "docs") == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert err == "note: docs/latin.txt read as cp1252\nnote: docs/logo.png skipped: is binary\n"
    assert out.endswith("\n")
    assert "\n[cut at 4 tokens]\n" in out
    for item in value["evidence"]:
        lines = (
            f"{item['first_line']}-{item['last_line']}"
            if item["last_line"] > item["first_line"]
            else item["first_line"]
        )
        assert f"\n{item['file']}:{lines}  {item['share']:.0%} of attention\n" in out
        for number, line in enumerate(item["text"].split("\n"), item["first_line"]):
            assert f"{number:>7}  {line}\n" in out
    cost = rf"read {value['tokens']['prompt']} tokens in [\d.]+ s \([\d,]+/s\) · wrote 4 in [\d.]+ s \([\d,]+/s\) · "
    assert re.fullmatch(cost + r"attended to [\d.]+% of the context", out.splitlines()[-1])


def test_standard_input(ask, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert ask("--file", "-", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["documents"] == [{"name": "standard input", "encoding": "utf-8"}]
    assert {item["file"] for item in value["evidence"]} == {"standard input"}


def test_implementation_changes_no_word(ask, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for words in ([], ["--implementation", "reference"], ["--threads", "1"]):
        assert ask("--file", "docs/fish.txt", "--json", *words) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("words", "question", "message"),
    [
        (["--file", "gone.txt"], "Who?", "gone.txt does not exist"),
        (["--file", "docs/logo.png"], "Who?", "docs/logo.png is binary"),
        (["--file", "*.md"], "Who?", "no file matches '*.md'"),
        (["--file", "docs"], " ", "the question is empty"),
        (["--file", "docs", "--max-new-tokens", "9999999"], "Who?", "exceed the model's limit of 1048576"),
        (["--file", "docs", "--implementation", "magic"], "Who?", "--implementation must be one of reference, "),
    ],
)
def test_errors_are_one_line(
    ask, here: Path, words: list[str], question: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(*words, "--json", question=question) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1


def test_a_missing_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", "Who?", "--file", "docs", "--model", "nowhere"]) == 2
    assert "no checkpoint folder at nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_interrupted_while_answering(ask, here: Path, as_json: bool, monkeypatch, capsys) -> None:
    from openm3.ask.conversation import _Writer

    def push(self: _Writer, token: int) -> None:
        self.text += "So far"
        raise KeyboardInterrupt

    monkeypatch.setattr(_Writer, "push", push)
    assert ask("--file", "docs/fish.txt", *(["--json"] if as_json else [])) == 130
    out = capsys.readouterr().out
    if as_json:
        assert (json.loads(out)["answer"], json.loads(out)["stop"]) == ("So far", "interrupted")
    else:
        assert "[interrupted]\n" in out and "docs/fish.txt:" in out


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_while_reading(tmp_path: Path, checkpoint: str) -> None:
    document = tmp_path / "long.txt"
    document.write_text(TEXT * 8000)
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from openm3 import cli\n"
        "from openm3.model.session import Session\n"
        "read = Session.read\n"
        "def told(self, ids, **rest):\n"
        "    print('reading', flush=True)\n"
        "    return read(self, ids, **rest)\n"
        "Session.read = told\n"
        f"sys.exit(cli.main(['ask', 'Who?', '--file', {str(document)!r}, '--model', {checkpoint!r}]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        watchdog = threading.Timer(300, process.kill)
        watchdog.start()
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        watchdog.cancel()
    *before, last = err.splitlines()
    assert (process.returncode, out, last) == (130, "", "interrupted")
    assert all("tokens need" in line for line in before)


def test_precision_flags_reach_the_model(
    here: Path, model: Model, checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, object]] = []
    for module in (command, chat):
        monkeypatch.setattr(module, "load", lambda path, **options: asked.append(options) or model)
    flags = ["--model", checkpoint, "--max-new-tokens", "1", "--dtype", "bfloat16", "--weights", "int8-channel"]
    assert cli.main(["ask", "Who?", "--file", "docs/fish.txt", *flags]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main(["chat", *flags]) == 0
    assert asked == [{"dtype": torch.bfloat16, "weights": "int8-channel"}] * 2
