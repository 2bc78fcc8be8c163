"""Imports go one way between rooms, and a reference needs torch alone."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MAY_IMPORT = {
    "errors": "",
    "config": "errors hf_config",
    "hf_config": "errors config",
    "tokens": "errors config",
    "ops": "errors config",
    "model": "errors config tokens ops",
    "train": "errors config tokens ops model",
    "engine": "errors config tokens ops model",
    "evidence": "errors config tokens",
    "server": "errors config tokens ops model engine evidence",
    "gateway": "errors config tokens ops model engine server",
    "ask": "errors config tokens ops model engine evidence",
    "agent": "errors config tokens ops model engine server gateway ask",
    "eval": "errors config tokens ops model train engine server gateway ask",
}
"""What each room may import beside itself; the top (`openm3`, `openm3.cli`, `openm3.__main__`) may import all."""

TOP = {"", "cli", "cli_bench", "cli_options", "cli_serve", "__main__"}


def room_of(file: Path) -> str:
    """errors.py -> errors, ops/index/reference.py -> ops, __init__.py -> the empty name."""
    return file.parts[0].removesuffix(".py").removeprefix("__init__")


def imported(tree: ast.Module, file: Path) -> Iterator[str]:
    """Absolute names of all modules a file imports, at any depth of its code; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["openm3", *file.parts[:-1]]
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def wrong_imports(tree: ast.Module, file: Path) -> list[str]:
    room = room_of(file)
    if room in TOP:
        return []
    allowed = {room, *MAY_IMPORT[room].split()}
    inside = [name.split(".") for name in imported(tree, file) if name.split(".")[0] == "openm3"]
    return [".".join(parts) for parts in inside if len(parts) < 2 or parts[1] not in allowed]


def test_imports_go_one_way(trees: dict[Path, ast.Module]) -> None:
    unknown = {room_of(file) for file in trees} - set(MAY_IMPORT) - TOP
    assert unknown == set(), "a new room: say in MAY_IMPORT what it may import"
    wrong = {str(file): names for file, tree in trees.items() if (names := wrong_imports(tree, file))}
    assert wrong == {}


def test_references_import_torch_alone(trees: dict[Path, ast.Module]) -> None:
    references = {file: tree for file, tree in trees.items() if file.name == "reference.py"}
    assert references
    allowed = {"torch", "openm3", *sys.stdlib_module_names}
    for file, tree in references.items():
        assert {name.split(".")[0] for name in imported(tree, file)} <= allowed, file


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        ("ops/index/reference.py", "from openm3.model import Model", ["openm3.model.Model"]),
        ("ops/index/reference.py", "from ...engine import pages", ["openm3.engine.pages"]),
        ("ops/index/reference.py", "from ..dispatch import find", []),
        ("ops/__init__.py", "from .dispatch import find", []),
        ("config.py", "import openm3", ["openm3"]),
        ("config.py", "from openm3 import load", ["openm3.load"]),
        ("eval/needles.py", "from openm3.train.data import stories", []),
        ("model/model.py", "def late():\n    import openm3.server.app", ["openm3.server.app"]),
        ("cli.py", "from openm3 import __version__", []),
    ],
)
def test_the_guard_sees(file: str, line: str, wrong: list[str]) -> None:
    assert wrong_imports(ast.parse(line), Path(file)) == wrong
