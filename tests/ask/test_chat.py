"""`openm3 chat` through a pipe: history, files, commands, and that nothing ends it but its user."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from openm3 import cli
from openm3.ask import chat
from openm3.ask.chat import Talk
from openm3.model.model import Model

Say = Callable[..., tuple[str, str]]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, model: Model, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run `openm3 chat` with lines (or exceptions, raised where a line is waited for) typed into it: (out, err)."""
    monkeypatch.setattr(chat, "load", lambda path, **_: model)

    def run(*lines: str | type[BaseException], words: tuple[str, ...] = ()) -> tuple[str, str]:
        typed: Iterator[str | type[BaseException]] = iter([*lines, EOFError])

        def read(prompt: str) -> str:
            assert prompt == ""
            line = next(typed)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        assert cli.main(["chat", "--max-new-tokens", "4", *words]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.fixture
def talk(model: Model) -> Talk:
    return Talk(model, "disabled", 4)


def test_replies_are_the_models_own(model: Model, talk: Talk) -> None:
    for text in ("hello", "and then?"):
        before = list(talk.messages)
        assert talk.take(text)
        ids = model.tokenizer.chat([*before, {"role": "user", "content": text}], thinking="disabled")
        reply = model.tokenizer.decode(model.generate(ids, max_new_tokens=4, stop_ids=[model.tokenizer.eos_id]))
        assert talk.messages == [*before, {"role": "user", "content": text}, {"role": "assistant", "content": reply}]


def test_a_pipe_gets_the_replies_alone(say: Say) -> None:
    out, err = say("hello", "", "/quit", "never said")
    assert err == ""
    assert out.endswith(" [length]\n")
    assert out.count("[length]") == 1


def test_files_go_with_the_next_message(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.txt").write_text("words\n")
    talk.take("/file a b.txt")
    talk.take("first")
    talk.take("second")
    assert [m["content"] for m in talk.messages if m["role"] == "user"] == ["File: a b.txt\nwords\n\nfirst", "second"]


def test_reset_forgets(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words\n")
    talk.take("first")
    talk.take(f"/file {tmp_path / 'a.txt'}")
    talk.take("/reset")
    assert talk.messages == []
    talk.take("second")
    assert talk.messages[0]["content"] == "second"


def test_commands(say: Say) -> None:
    out, err = say("/help", "/file", "/nothing", "/file gone.txt")
    assert out == chat.HELP + "\n"
    assert err.splitlines() == [
        "/file is no command, or lacks its PATH: see /help",
        "/nothing is no command, or lacks its PATH: see /help",
        "error: gone.txt does not exist: give a file, a folder, a glob, or - for standard input",
    ]


def test_too_long_is_said_and_forgotten(say: Say, monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setattr("openm3.ask.memory.free_bytes", lambda: 50 << 20)
    out, err = say("hello", "x" * 20_000, "hello again")
    assert out.count("[length]") == 2
    assert err.startswith("error: a context of ") and err.count("\n") == 1


def test_file_flag(say: Say, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words\n")
    _, err = say("hello", words=("--file", str(tmp_path / "a.txt"), "--threads", "1"))
    assert err == "1 file(s), 6 characters\n"


def test_a_missing_file_flag_is_an_error(monkeypatch: pytest.MonkeyPatch, model: Model, capsys) -> None:
    monkeypatch.setattr(chat, "load", lambda path, **_: model)
    assert cli.main(["chat", "--file", "gone.txt"]) == 2
    assert capsys.readouterr().err.startswith("error: gone.txt does not exist")


def test_ctrl_c_at_the_prompt_goes_on(say: Say) -> None:
    out, err = say(KeyboardInterrupt, "/help")
    assert (out, err) == ("\n" + chat.HELP + "\n", "")


def test_ctrl_c_stops_the_answer_and_keeps_it(talk: Talk, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def stop(self: object, part: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.Voice, "say", stop)
    assert talk.take("hello")
    assert capsys.readouterr().out == " [interrupted]\n"
    assert len(talk.messages) == 2
    assert talk.messages[1]["content"]


def test_ctrl_c_while_reading_takes_the_message_back(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: object, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.Bar, "update", stop)
    _, err = say("hello")
    assert err == "interrupted: the message is not part of the conversation\n"


def test_run_takes_parsed_arguments(say: Say) -> None:
    args = cli.build_parser().parse_args(["chat", "--file", "a", "--file", "b"])
    assert isinstance(args, argparse.Namespace)
    assert (args.file, args.thinking, args.max_new_tokens, args.threads) == (["a", "b"], "disabled", 512, None)
