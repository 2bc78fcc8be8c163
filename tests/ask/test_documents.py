"""Collecting documents: what is read, under which name, what is left out and what is an error."""

import io
import os
from pathlib import Path

import pytest

from openm3.ask.documents import Collection, Document, Skipped, collect
from openm3.errors import DocumentError

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def put(path: Path, data: str | bytes = "text\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def names(found: Collection) -> list[str]:
    return [document.name for document in found.documents]


def test_a_file(here: Path) -> None:
    put(here / "a.txt", "one\r\ntwo\n")
    assert collect(["a.txt"]) == Collection((Document("a.txt", "one\ntwo\n", "utf-8"),), ())


def test_a_folder_is_read_by_name_and_what_is_no_text_is_listed(here: Path) -> None:
    put(here / "src/b.py")
    put(here / "src/a/z.py")
    put(here / "src/é.txt", "é".encode("cp1252"))
    put(here / "src/logo.png", PNG)
    put(here / "src/none.txt", " \n")
    found = collect(["src"])
    assert names(found) == ["src/a/z.py", "src/b.py", "src/é.txt"]
    assert found.documents[2].encoding == "cp1252"
    assert found.skipped == (Skipped("src/logo.png", "is binary"), Skipped("src/none.txt", "is empty"))


def test_hidden_cache_and_environment_folders_are_not_looked_at(here: Path) -> None:
    kept = put(here / "src/a.py")
    for name in (".git/config", ".hidden", "__pycache__/a.pyc", "node_modules/x.js", "CVS/Root"):
        put(here / "src" / name, PNG)
    put(here / "src/env/pyvenv.cfg")
    put(here / "src/cached/CACHEDIR.TAG")
    assert collect(["src"]) == Collection((Document("src/a.py", kept.read_text(), "utf-8"),), ())
    assert names(collect(["**/*"])) == ["src/a.py", "src/cached/CACHEDIR.TAG", "src/env/pyvenv.cfg"]


def test_hidden_is_read_when_named(here: Path) -> None:
    put(here / ".notes/a.txt")
    put(here / ".env")
    assert names(collect([".notes", ".env"])) == [".notes/a.txt", ".env"]


def test_a_glob(here: Path) -> None:
    for name in ("docs/b.md", "docs/a.md", "docs/deep/c.md", "docs/x.bin"):
        put(here / name, PNG if name.endswith("bin") else "text\n")
    assert names(collect(["docs/*.md"])) == ["docs/a.md", "docs/b.md"]
    assert names(collect(["docs/**/*.md"])) == ["docs/a.md", "docs/b.md", "docs/deep/c.md"]
    found = collect(["docs/*"])
    assert names(found) == ["docs/a.md", "docs/b.md", "docs/deep/c.md"]
    assert found.skipped == (Skipped("docs/x.bin", "is binary"),)


def test_a_file_named_like_a_glob_is_a_file(here: Path) -> None:
    put(here / "a[1].txt")
    assert names(collect(["a[1].txt"])) == ["a[1].txt"]


def test_standard_input_once(here: Path) -> None:
    stream = io.BytesIO(b"piped\n")
    assert collect(["-", "-"], stdin=stream).documents == (Document("standard input", "piped\n", "utf-8"),)


def test_each_file_once_however_named(here: Path) -> None:
    put(here / "src/a.txt")
    (here / "link.txt").symlink_to("src/a.txt")
    paths = ["src/a.txt", "src", "./src/../src/a.txt", str(here / "src/a.txt"), "link.txt", "src/*"]
    assert names(collect(paths)) == ["src/a.txt"]


def test_names_are_relative_where_possible(here: Path) -> None:
    inside, outside = put(here / "in.txt"), put(here.parent / "out.txt", "other\n")
    assert names(collect([str(inside)])) == ["in.txt"]
    assert names(collect([str(outside)])) == [outside.as_posix()]
    assert names(collect(["../out.txt"])) == ["../out.txt"]


@pytest.mark.skipif(os.name != "posix", reason="needs file names of any bytes")
def test_names_are_printable(here: Path) -> None:
    put(here / "src/line\nbreak.txt")
    try:
        put(Path(os.fsdecode(os.fsencode(here) + b"/src/\xff.txt")), "other\n")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    assert names(collect(["src"])) == ["src/line\ufffdbreak.txt", "src/\ufffd.txt"]


def test_links_in_circles_and_to_nothing(here: Path) -> None:
    put(here / "src/a.txt")
    (here / "src/up").symlink_to("..", target_is_directory=True)
    (here / "src/self").symlink_to("self")
    (here / "src/void").symlink_to("nowhere")
    found = collect(["src"])
    assert names(found) == ["src/a.txt"]
    assert found.skipped == (
        Skipped("src/self", "is a link to itself"),
        Skipped("src/void", "is a link to nothing"),
    )


def test_a_link_to_a_folder_is_followed(here: Path) -> None:
    put(here.parent / "elsewhere/a.txt")
    (here / "src").mkdir()
    (here / "src/link").symlink_to(here.parent / "elsewhere", target_is_directory=True)
    assert names(collect(["src"])) == ["src/link/a.txt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_a_folder_is_not_waited_for(here: Path) -> None:
    put(here / "src/a.txt")
    os.mkfifo(here / "src/pipe")
    assert collect(["src"]).skipped == (Skipped("src/pipe", "is not a regular file"),)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.txt", "^gone.txt does not exist: give a file, a folder, a glob, or - for standard input$"),
        ("", "^'' does not exist"),
        ("*.rst", r"^no file matches '\*.rst'$"),
        ("logo.png", "^logo.png is binary$"),
        ("none.txt", "^none.txt is empty$"),
        ("void", "^void is a link to nothing$"),
        ("bare", r"^nothing to read in bare \(no files\)$"),
        ("pictures", r"^nothing to read in pictures \(pictures/a.png: is binary\)$"),
    ],
)
def test_what_cannot_be_read_is_named(here: Path, path: str, message: str) -> None:
    put(here / "logo.png", PNG)
    put(here / "pictures/a.png", PNG)
    put(here / "none.txt", "")
    (here / "bare").mkdir()
    (here / "void").symlink_to("nowhere")
    with pytest.raises(DocumentError, match=message):
        collect([path])


@pytest.mark.parametrize(("data", "message"), [(b"", "standard input is empty"), (PNG, "standard input is binary")])
def test_standard_input_must_be_text(data: bytes, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        collect(["-"], stdin=io.BytesIO(data))


def test_closed_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(DocumentError, match="standard input is closed"):
        collect(["-"])


def test_unreadable_files(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(here / "src/a.txt")
    put(here / "src/secret.txt")
    real = open

    def guarded(path: str, mode: str) -> io.BufferedReader:
        if path.endswith("secret.txt"):
            raise PermissionError(13, "Permission denied")
        return real(path, mode)

    monkeypatch.setattr("builtins.open", guarded)
    assert collect(["src"]).skipped == (Skipped("src/secret.txt", "cannot be read: permission denied"),)
    with pytest.raises(DocumentError, match=r"^src/secret.txt cannot be read: permission denied$"):
        collect(["src/secret.txt"])


def test_the_size_limit(here: Path) -> None:
    put(here / "src/a.txt", "a" * 60)
    put(here / "src/big.txt", "b" * 101)
    found = collect(["src"], max_bytes=100)
    assert names(found) == ["src/a.txt"]
    assert found.skipped == (Skipped("src/big.txt", "is larger than 100 bytes, the most that is read"),)
    with pytest.raises(DocumentError, match=r"^src/big.txt is larger than 100 bytes"):
        collect(["src/big.txt"], max_bytes=100)
    put(here / "src/c.txt", "c" * 60)
    with pytest.raises(DocumentError, match=r"^the files up to src/c.txt exceed 100 bytes"):
        collect(["src"], max_bytes=100)
