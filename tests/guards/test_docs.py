"""What the documents say is true: their commands run, their paths and links exist."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from openm3 import cli

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "openm3"
HISTORY = {"CHANGELOG.md", "log.md"}
"""Documents that speak of the past, and so may name what is gone."""

FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SUFFIXES = {".py", ".md", ".toml", ".txt", ".cpp"}
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")


def documents() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").rglob("*.md")]


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(words after ```bash on its line, command words) of every `openm3` or `make` command in the bash blocks."""
    for language, marks, body in FENCE.findall(text):
        if language != "bash":
            continue
        for line in body.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            command: list[str] = []
            for word in [*lexer, ";"]:
                if not set(word) <= set("|&;<>()"):
                    command.append(word)
                    continue
                if command and command[0] in {"openm3", "make"}:
                    yield marks.strip(), command
                # What follows < or > is a file, and no command of ours has that name.
                command = []


def named_paths(text: str) -> Iterator[str]:
    """Inline code and link targets that claim to be files or folders of this repository."""
    prose = FENCE.sub("", text)
    tops = {path.name for path in (*ROOT.iterdir(), *PACKAGE.iterdir())}
    for words in CODE.findall(prose):
        word = re.sub(r"::?\w+$", "", words)
        if not PATH.fullmatch(word):
            continue
        first, *rest = word.split("/")
        if word.endswith("/") or Path(word).suffix in SUFFIXES or (rest and first in tops):
            yield word
    for target in LINK.findall(prose):
        if not re.match(r"[a-z]+:|#", target):
            yield target.partition("#")[0]


def exists(name: str, document: Path) -> bool:
    places = (document.parent, ROOT, PACKAGE)
    if "/" not in name and "*" not in name:
        return any((place / name).exists() for place in places) or any(PACKAGE.rglob(name))
    return any(any(place.glob(name)) for place in places)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_readme_commands_parse() -> None:
    found = list(commands(readme()))
    assert {command[0] for _, command in found} == {"openm3", "make"}
    for _, command in found:
        if command[0] == "make":
            assert {word for word in command[1:] if "=" not in word} <= make_targets(), command
            continue
        try:
            cli.build_parser().parse_args(command[1:])
        except SystemExit as stop:
            assert stop.code == 0, command  # --help and --version leave this way


def test_quick_readme_commands_run() -> None:
    """Blocks that open with ```bash quick hold commands of seconds."""
    for marks, command in commands(readme()):
        if command[0] == "openm3" and "quick" in marks.split():
            subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True, timeout=120)


def test_every_command_is_documented() -> None:
    text = "\n".join(path.read_text() for path in documents())
    assert [name for name in cli.HANDLERS if f"openm3 {name}" not in text] == []


def test_make_targets_are_documented_by_make_help() -> None:
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^  make (\w+) ", result.stdout, re.MULTILINE))
    assert listed == make_targets() == {"help", "demo", "test", "check", "bench", "e2e", "sanitize", "clean"}


def test_documented_paths_exist() -> None:
    missing = [
        f"{document.relative_to(ROOT)}: {name}"
        for document in documents()
        if document.name not in HISTORY
        for name in named_paths(document.read_text())
        if not exists(name, document)
    ]
    assert missing == []


def test_the_command_reader_sees() -> None:
    text = (
        '```bash quick\ncat a | openm3 ask "a b" \\\n  --file - > out.json  # why\nmake demo && ls\n```\n'
        "```python\nmake x\n```\n"
    )
    assert list(commands(text)) == [("quick", ["openm3", "ask", "a b", "--file", "-"]), ("quick", ["make", "demo"])]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("see `src/openm3/cli.py` and `make test`", ["src/openm3/cli.py"]),
        ("see `config.py::ModelConfig`", ["config.py"]),
        ("`q/k` and `bash/zsh` are no paths here", []),
        ("`gone/` and `src/gone` claim to be", ["gone/", "src/gone"]),
        ("[a](docs/msa.md#top) [b](https://example.org/x.md) [c](#here)", ["docs/msa.md"]),
    ],
)
def test_the_path_reader_sees(text: str, names: list[str]) -> None:
    assert list(named_paths(text)) == names
