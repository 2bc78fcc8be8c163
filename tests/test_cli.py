"""The command line: parsing, help that teaches, exit codes, and errors without a traceback. Handlers are stubs."""

import argparse
import ast
import json
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from openm3 import __version__, cli
from openm3.errors import CheckpointError

Stub = Callable[[Callable[[argparse.Namespace], int]], None]


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    actions = cli.build_parser()._actions
    return next(action.choices for action in actions if isinstance(action, argparse._SubParsersAction))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Put a function in the place of `openm3 doctor`'s handler."""

    def install(run: Callable[[argparse.Namespace], int]) -> None:
        monkeypatch.setitem(sys.modules, "stub_handler", types.SimpleNamespace(run=run))
        monkeypatch.setitem(cli.HANDLERS, "doctor", "stub_handler")

    return install


def test_ask_defaults() -> None:
    args = cli.build_parser().parse_args(["ask", "why?", "--file", "a.txt", "--file", "-"])
    assert vars(args) == {
        "command": "ask",
        "question": "why?",
        "file": ["a.txt", "-"],
        "image": None,
        "video": None,
        "model": "m3-tiny",
        "dtype": "float32",
        "weights": None,
        "max_new_tokens": 128,
        "thinking": "disabled",
        "cache": None,
        "implementation": None,
        "threads": None,
        "json": False,
    }


def test_eval_takes_many_lengths() -> None:
    args = cli.build_parser().parse_args(["eval", "needles", "--lengths", "8192", "32768", "--count", "5"])
    assert (args.task, args.lengths, args.count) == ("needles", [8192, 32768], [5])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ask --file a.txt", "required: QUESTION"),
        ("ask why? --file a.txt --max-new-tokens 0", "'0' is not a whole number of at least 1"),
        ("ask why? --file a.txt --thinking hard", "invalid choice: 'hard'"),
        ("eval needles --lengths -1", "--lengths"),
        ("fly", "invalid choice: 'fly'"),
    ],
)
def test_usage_error_is_one_sentence_and_code_2(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(shlex.split(line))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_no_command_prints_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "Start here:" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"openm3 {__version__}\n"


@pytest.mark.parametrize("name", sorted(cli.HANDLERS))
def test_examples_in_help_parse(name: str) -> None:
    _, _, examples = command_parsers()[name].format_help().partition("examples:\n")
    lines = [line.rpartition(" | ")[2].strip() for line in examples.strip().splitlines()]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["openm3", name]
        assert cli.build_parser().parse_args(words[1:]).command == name


def test_every_command_has_a_handler() -> None:
    assert set(command_parsers()) == set(cli.HANDLERS)
    package = Path(cli.__file__).parent
    for name, module in cli.HANDLERS.items():
        path = package.joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert path.is_file(), f"openm3 {name} has no {path}"
        functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert {"report", "render"} <= functions if name == "inspect" else "run" in functions, f"openm3 {name}"


def test_handler_gets_the_arguments_and_gives_the_exit_code(stub: Stub) -> None:
    seen: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int:
        seen.append(args)
        return 1

    stub(run)
    assert cli.main(["doctor", "--json"]) == 1
    assert seen[0].json is True


def test_deliberate_error_is_one_line_and_code_2(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: argparse.Namespace) -> int:
        raise CheckpointError("no config.json at nowhere")

    stub(run)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr() == ("", "error: no config.json at nowhere\n")


def test_bug_keeps_its_traceback(stub: Stub) -> None:
    def run(args: argparse.Namespace) -> int:
        raise KeyError("a bug of ours")

    stub(run)
    with pytest.raises(KeyError, match="a bug of ours"):
        cli.main(["doctor"])


def test_interrupt_is_one_line_and_code_130(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    stub(run)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_reader_that_went_away_is_quiet() -> None:
    code = (
        "import sys, types; from openm3 import cli\n"
        "sys.modules['stub'] = types.SimpleNamespace(run=lambda args: print('x' * 100_000) or 0)\n"
        "cli.HANDLERS['doctor'] = 'stub'\n"
        "sys.stdin.read(1)\n"
        "sys.exit(cli.main(['doctor']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(b"go")
    assert (process.returncode, errors) == (141, b"")


@dataclass
class Report:
    layers: int


def test_inspect_prints_its_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    handler = types.SimpleNamespace(report=lambda path: Report(4), render=lambda report: f"{report.layers} layers")
    monkeypatch.setitem(sys.modules, "stub_handler", handler)
    monkeypatch.setitem(cli.HANDLERS, "inspect", "stub_handler")
    assert cli.main(["inspect", "m3-tiny"]) == 0
    assert capsys.readouterr().out == "4 layers\n"
    assert cli.main(["inspect", "m3-tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"layers": 4}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from openm3 import cli; cli.build_parser().format_help()\n"
        "print(sorted({'torch', 'numpy', 'rich', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_module_runs_as_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "openm3", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"openm3 {__version__}\n"
