"""Pages on disk are whole or not there: torn, foreign, too many, written while killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openm3.engine.store import PageStore
from openm3.errors import ConfigError

SIZE = 5000


def key(number: int) -> bytes:
    return number.to_bytes(2, "big") * 16


def body(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def load(pages: PageStore, number: int | bytes, size: int = SIZE) -> bytes | None:
    found = pages.load(key(number) if isinstance(number, int) else number, size)
    return None if found is None else bytes(found)


def store(folder: Path, most_bytes: int = 1 << 30) -> PageStore:
    return PageStore(folder, "model", most_bytes=most_bytes)


def test_pages_come_back(tmp_path: Path) -> None:
    first = store(tmp_path)
    for number in range(5):
        first.save(key(number), [body(number)[:100], body(number)[100:]])
    first.flush()
    second = store(tmp_path)
    for number in range(5):
        assert second.has(key(number)) and load(second, number) == body(number)
    assert load(second, 9) is None and not second.has(key(9))
    assert (first.written, second.restored, second.damaged) == (5, 5, 0)
    assert not PageStore(tmp_path, "another model", most_bytes=1).has(key(0))
    first.close()


@pytest.mark.parametrize("where", [0, 10, 45, 60, -1])
def test_damage_is_found_and_deleted(where: int, tmp_path: Path) -> None:
    pages = store(tmp_path)
    pages.save(key(1), [body(1)])
    pages.close()
    (path,) = tmp_path.rglob("*.page")
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    assert load(pages, 1) is None
    assert pages.damaged == 1 and not path.exists()
    pages.save(key(1), [body(1)])
    pages.close()
    assert load(pages, 1) == body(1)


@pytest.mark.parametrize("length", [0, 20, 52, 3000])
def test_torn_files_are_found(length: int, tmp_path: Path) -> None:
    pages = store(tmp_path)
    pages.save(key(1), [body(1)])
    pages.close()
    (path,) = tmp_path.rglob("*.page")
    path.write_bytes(path.read_bytes()[:length])
    assert load(pages, 1) is None and not path.exists()


def test_a_page_under_another_name_is_not_taken_for_it(tmp_path: Path) -> None:
    pages = store(tmp_path)
    pages.save(key(257), [body(1)])
    pages.close()
    (path,) = tmp_path.rglob("*.page")
    path.rename(path.with_name((key(256 + 1)[:1] + key(7)[1:]).hex() + ".page"))
    assert load(pages, key(257)[:1] + key(7)[1:]) is None
    assert pages.damaged == 1


def test_the_longest_untouched_pages_go_first(tmp_path: Path) -> None:
    pages = store(tmp_path, most_bytes=10 * (SIZE + 100))
    for number in range(9):
        pages.save(key(number), [body(number)])
    pages.flush()
    for number, path in ((number, pages._path(key(number))) for number in range(9)):
        os.utime(path, (1000 + number, 1000 + number))
    assert load(pages, 0) is not None
    for number in range(9, 12):
        pages.save(key(number), [body(number)])
    pages.close()
    kept = [number for number in range(12) if pages.has(key(number))]
    assert kept[0] == 0 and kept[-3:] == [9, 10, 11] and 1 not in kept and 8 in kept
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.page")) <= pages.most_bytes


def test_no_room_at_all_keeps_nothing(tmp_path: Path) -> None:
    for most in (0, 100):
        pages = store(tmp_path, most_bytes=most)
        pages.save(key(1), [body(1)])
        pages.close()
        assert not pages.has(key(1))


def test_folders_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to the cache folder .*file"):
        store(tmp_path / "file")


WRITER = """
import sys
sys.path[:0] = sys.argv[2:]
from tests_store import body, key, store
pages = store(sys.argv[1])
print("ready", flush=True)
for number in range(60_000):
    pages.save(key(number), [body(number)])
"""


def test_a_killed_writer_leaves_whole_pages(tmp_path: Path) -> None:
    """Killed in the middle of its writes, again and again, beside another one: what is found is right."""
    (tmp_path / "tests_store.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    generator, folder = random.Random(0), tmp_path / "pages"
    for _ in range(3):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(folder), str(tmp_path), *sys.path], stdout=subprocess.PIPE
            )
            for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(generator.uniform(0.02, 0.15))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            assert writer.stdout is not None
            writer.stdout.close()
    pages = store(folder)
    found = [number for number in range(60_000) if pages.has(key(number))]
    assert len(found) > 20
    for number in found:
        assert load(pages, number) == body(number)
    assert pages.damaged == 0


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_pages_of_another_size_are_damage(size: int, tmp_path: Path) -> None:
    pages = store(tmp_path)
    pages.save(key(1), [body(1)])
    pages.close()
    assert load(pages, 1, size) is None and pages.damaged == 1
