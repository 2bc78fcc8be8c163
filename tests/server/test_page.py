"""The page's files: types, caching, the policy that keeps all else out, and nothing beside them."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from openm3.server import page
from tests.server.fake_page import FakeService, make_app

FOLDER = Path(page.__file__).parent
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix in {".html", ".js", ".css", ".svg"})


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(make_app(FakeService())) as client:
        yield client


def where(path: Path) -> str:
    return "/" if path.name == "index.html" else f"/page/{path.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_served_as_they_are(client: TestClient, path: Path) -> None:
    found = client.get(where(path))
    assert found.status_code == 200 and found.content == path.read_bytes()
    kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    assert found.headers["content-type"] == f"{kinds[path.suffix]}; charset=utf-8"
    assert found.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in found.headers["content-security-policy"]
    assert "unsafe" not in found.headers["content-security-policy"]


def test_a_known_file_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/page/app.js")
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    assert re.fullmatch(r'"[0-9a-f]{32}"', tag)
    for known in (tag, f'"other", W/{tag}', "*"):
        again = client.get("/page/app.js", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/page/app.js", headers={"If-None-Match": '"other"'}).status_code == 200


def test_head_has_no_body(client: TestClient) -> None:
    found = client.head("/")
    assert (found.status_code, found.content) == (200, b"")
    assert int(found.headers["content-length"]) == (FOLDER / "index.html").stat().st_size


@pytest.mark.parametrize(
    "name", ["__init__.py", "../calls.py", "%2e%2e/calls.py", "..%2fcalls.py", "index.html", "app.js/", "", "none.js"]
)
def test_there_is_nothing_beside_the_files(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}", follow_redirects=False).status_code in (307, 404)
    assert client.get(f"/page/{name}").content != (FOLDER.parent / "calls.py").read_bytes()


def test_the_routes_are_no_part_of_the_api(client: TestClient) -> None:
    assert {path for path in client.get("/openapi.json").json()["paths"] if not path.startswith(("/v1/", "/tok"))} == {
        "/xray/block",
        "/xray/context",
    }


def test_files_name_each_other_and_nobody_else() -> None:
    named = set()
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"""(?:src|href|url\(|from|import\()\s*[=(]?\s*["']?(?:https?:)?//""", text) == []
        assert " style=" not in text and "innerHTML" not in text and " onclick=" not in text
        named |= {name.rpartition("/")[2] for name in re.findall(r"""["'](?:\./|/page/)([\w.]+)["']""", text)}
    assert named == {path.name for path in FILES} - {"index.html"}
    html = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script(?![^>]* src=)|<style|javascript:", html) == []


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < 100_000
    assert max(len(path.read_text().splitlines()) for path in FILES) <= 450
    assert max(len(line) for path in FILES for line in path.read_text().splitlines()) <= 120
