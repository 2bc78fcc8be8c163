"""Habits of form: the line budget, and what a source file may not hold."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

FILE_AIM, FILE_CEILING = 400, 450
FUNCTION_AIM, FUNCTION_CEILING = 40, 60
KERNELS = "triton"
BIGGEST = 8

FOREIGN_PATH = re.compile(r"(?<![\w.~>)/-])/(?:work|root|home|Users)/\w|\.\./shared\b")
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".json", ".jsonl", ".log", ".jinja", ".sh", ".cpp", ".cu", ""}
FOLDERS = ("src", "tests", "docs", "bench", "examples", ".ci")


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring not counted: a contract should not be short for the budget's sake."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def public_signatures(tree: ast.Module) -> list[ast.FunctionDef]:
    """Functions and methods that a caller elsewhere can name."""
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]
    found = [node for scope in scopes for node in scope.body if isinstance(node, ast.FunctionDef)]
    return [node for node in found if not node.name.startswith("_") or node.name == "__init__"]


def biggest(title: str, sizes: dict[str, int], aim: int) -> list[str]:
    rows = [(size, name) for name, size in Counter(sizes).most_common(BIGGEST) if size > aim / 2]
    return [f" lines  {title} (aim: {aim})", *(f"{size:>6}  {name}" for size, name in rows)]


def test_line_budget(
    root: Path,
    trees: dict[Path, ast.Module],
    pytestconfig: pytest.Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = root / "src" / "openm3"
    budgeted = {file: tree for file, tree in trees.items() if not file.name.startswith(KERNELS)}
    files = {str(file): len((package / file).read_text().splitlines()) for file in budgeted}
    bodies = {
        f"{file}:{node.lineno} {node.name}": num_lines(node)
        for file, tree in budgeted.items()
        for node in functions(tree)
    }
    if pytestconfig.pluginmanager.has_plugin("terminalreporter"):  # A worker of xdist has no terminal.
        with capsys.disabled():
            print("", *biggest("files", files, FILE_AIM), *biggest("functions", bodies, FUNCTION_AIM), sep="\n")
    assert {name: size for name, size in files.items() if size > FILE_CEILING} == {}
    assert {name: size for name, size in bodies.items() if size > FUNCTION_CEILING} == {}


def test_no_file_is_named_utils(trees: dict[Path, ast.Module]) -> None:
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert [str(file) for file in trees if vague & {part.removesuffix(".py") for part in file.parts}] == []


def test_no_base_class_with_one_child(trees: dict[Path, ast.Module]) -> None:
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    children = Counter(ast.unparse(base).rpartition(".")[2] for node in classes for base in node.bases)
    bases = [node.name for node in classes if node.name.lstrip("_").startswith("Base") or node.name.endswith("Base")]
    assert [name for name in bases if children[name] < 2] == []


def test_public_signatures_name_every_argument(trees: dict[Path, ast.Module]) -> None:
    loose = [
        f"{file}:{node.lineno} {node.name}"
        for file, tree in trees.items()
        for node in public_signatures(tree)
        if node.args.kwarg is not None
    ]
    assert loose == []


def test_public_names_have_docstrings(trees: dict[Path, ast.Module]) -> None:
    """An operator's implementations are exempt: its contract is written once, in the operator's __init__.py."""
    bare = [
        f"{file}:{node.lineno} {node.name}"
        for file, tree in trees.items()
        if not (file.parts[0] == "ops" and len(file.parts) == 3 and file.name != "__init__.py")
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert bare == []


def test_every_module_says_its_job(trees: dict[Path, ast.Module]) -> None:
    assert [str(file) for file, tree in trees.items() if tree.body and ast.get_docstring(tree) is None] == []


def test_nothing_names_the_machine_it_was_written_on(root: Path) -> None:
    files = [path for path in root.iterdir() if path.is_file()]
    files += [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file()]
    found = []
    for path in files:
        if path.suffix not in TEXT or path.name in {"tokenizer.json", Path(__file__).name}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if FOREIGN_PATH.search(line):
                found.append(f"{path.relative_to(root)}:{number}")
    assert found == []
