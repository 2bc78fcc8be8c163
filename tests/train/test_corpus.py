"""The text to train on: what is held out, and how pieces of files are cut."""

import random
from pathlib import Path

import pytest

from openm3.errors import DocumentError
from openm3.train import corpus
from openm3.train.corpus import DEFINITION, Source, excerpt, gather, is_held_out, outline, standard_library, words


def numbered(name: str, num_lines: int) -> Source:
    return Source(name, "".join(f"{name} line {i}\n" for i in range(num_lines)))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of 64 files, one of them no text, beside tests and foreign packages."""
    for folder in ("", "json/", "test/", "json/tests/", "idle_test/", "site-packages/x/"):
        for i in range(64):
            path = tmp_path / f"{folder}m{i}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {folder}{i}\n" * 200)
    (tmp_path / "m0.py").write_bytes(b"\xff" * 1000)
    (tmp_path / "m1.py").write_text("short = 1\n")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _name: str(tmp_path))
    return tmp_path


def test_held_out_files_are_fixed_for_good() -> None:
    names = ["abc.py", "ast.py", "csv.py", "heapq.py", "json/decoder.py", "os.py", "random.py", "textwrap.py"]
    assert [name for name in names if is_held_out(name)] == ["csv.py"]


def test_one_file_in_eight_is_held_out() -> None:
    share = sum(is_held_out(f"package/module{i}.py") for i in range(4000)) / 4000
    assert share == pytest.approx(1 / 8, abs=0.02)


def test_library_is_split_by_path(library: Path) -> None:
    training, held_out = standard_library(held_out=False), standard_library(held_out=True)
    names = [s.name for s in training + held_out]
    assert len(set(names)) == len(names) == 5 * 64 - 2
    assert not any("site-packages" in name or name in {"m0.py", "m1.py"} for name in names)
    assert [s.name for s in training] == sorted((s.name for s in training), key=lambda n: Path(n))
    assert all(is_held_out(s.name) for s in held_out) and not any(is_held_out(s.name) for s in training)
    assert all(s.text == (library / s.name).read_text() for s in held_out)


@pytest.mark.usefixtures("library")
def test_library_without_its_tests() -> None:
    sources = standard_library(held_out=False, tests=False) + standard_library(held_out=True, tests=False)
    assert {s.name.rpartition("/")[0] for s in sources} == {"", "json"}


def test_missing_library_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(DocumentError, match="without its standard library"):
        standard_library(held_out=True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(x):", [("def f(x):", "f")]),
        (
            "class A(B):  \n    async  def go(self) -> int:\t\n",
            [("class A(B):", "A"), ("async  def go(self) -> int:", "go")],
        ),
        ("\tdef _x1(): return 1", [("def _x1(): return 1", "_x1")]),
        ("define(x)\nclassify = 1\n# def f(x):\nx = 'class A'", []),
    ],
)
def test_definitions_are_found(text: str, found: list[tuple[str, str]]) -> None:
    assert [m.groups() for m in DEFINITION.finditer(text)] == found


def test_outline_keeps_definitions_and_the_line_after() -> None:
    text = "import x\n\nclass A:\n    '''Doc.'''\n    y = 1\n\n    def f(self):  \n        return 1\n    z = 2\n"
    text += "def last(): pass"
    assert outline(Source("a.py", text)) == Source(
        "a.py", "class A:\n    '''Doc.'''\ndef f(self):\n        return 1\ndef last(): pass\n"
    )


def test_excerpt_gives_whole_lines() -> None:
    source = numbered("a.py", 200)
    lines = source.text.splitlines(keepends=True)
    begins = set()
    for seed in range(40):
        text = excerpt(source, 300, random.Random(seed))
        part = text.splitlines(keepends=True)
        at = lines.index(part[0])
        assert part == lines[at : at + len(part)]
        assert 300 <= len(text) <= 300 + max(map(len, lines))
        begins.add(at)
    assert len(begins) > 20


def test_excerpt_of_a_short_file_is_the_file() -> None:
    source = numbered("a.py", 5)
    assert excerpt(source, 10_000, random.Random(0)) == source.text


def test_gather_takes_distinct_files_until_it_has_enough() -> None:
    sources = [numbered(f"{i}.py", 30) for i in range(20)]
    size = len(sources[0].text)
    for seed in range(20):
        parts = gather(sources, 5 * size, random.Random(seed))
        names = [p.name for p in parts]
        assert len(set(names)) == len(names)
        assert abs(sum(len(p.text) for p in parts) - 5 * size) < 250
        assert all(p.text in next(s.text for s in sources if s.name == p.name) for p in parts)
    assert gather(sources, 900, random.Random(1)) == gather(sources, 900, random.Random(1))


def test_words_are_sorted_and_distinct() -> None:
    sources = [Source("a", "Zebra apple apple x1 to HTTPServer"), Source("b", "mango")]
    assert words(sources) == ["Server", "Zebra", "apple", "mango"]
    assert words(sources, limit=2) == ["Server", "Zebra", "apple"]
