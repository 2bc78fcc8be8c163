"""The public face: sorted, complete, documented, and cheap to import."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import openm3


def test_exports_are_sorted_and_unique() -> None:
    def order(name: str) -> tuple[bool, bool, str]:
        return not name.isupper(), not name[0].isupper(), name

    assert list(openm3.__all__) == sorted(set(openm3.__all__), key=order)


def test_every_export_resolves_and_is_listed_by_dir() -> None:
    missing = [name for name in openm3.__all__ if not hasattr(openm3, name)]
    assert missing == []
    assert set(openm3.__all__) <= set(dir(openm3))


def test_every_public_name_is_exported(trees: dict[Path, ast.Module]) -> None:
    defined = {
        node.name
        for node in trees[Path("__init__.py")].body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert defined <= set(openm3.__all__)


def test_every_exported_class_and_function_has_a_docstring() -> None:
    exported = {name: getattr(openm3, name) for name in openm3.__all__}
    bare = [name for name, value in exported.items() if callable(value) and not (inspect.getdoc(value) or "").strip()]
    assert bare == []


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, openm3; print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"
