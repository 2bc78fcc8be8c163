"""Media from the web: public addresses alone, checked at each step, within limits."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from openm3.errors import PromptError
from openm3.server.media.fetch import Fetcher, is_public

Handler = Callable[[str, dict[str, str], asyncio.StreamWriter], Awaitable[None]]


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


class Site:
    """A server on this machine: what each path answers, what was asked, and names that all lead here."""

    def __init__(self, answers: dict[str, bytes | Handler]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.looked_up: list[str] = []
        self.port = 0

    async def resolve(self, host: str, port: int) -> list[str]:
        self.looked_up.append(host)
        return {"inner.example": ["10.0.0.1"], "mixed.example": ["127.0.0.1", "10.0.0.1"], "gone.example": []}.get(
            host, ["127.0.0.1"]
        )

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            path = head[0].split(" ")[1]
            headers = dict(line.split(": ", 1) for line in head[1:] if line)
            self.asked.append((path, headers))
            answer = self.answers[path]
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(path, headers, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def get(
    answers: dict[str, Any],
    url: str = "http://host.example:{port}/a",
    *,
    most: int = 1000,
    seconds: float = 5.0,
    allows: Callable[[str], bool] = lambda address: address == "127.0.0.1",
    server_tls: ssl.SSLContext | None = None,
    **options: Any,
) -> tuple[bytes, Site]:
    """What a fetcher gets from a site whose address is allowed for once."""

    async def whole() -> tuple[bytes, Site]:
        site = Site(answers)
        server = await asyncio.start_server(site.handle, "127.0.0.1", 0, ssl=server_tls)
        site.port = server.sockets[0].getsockname()[1]
        fetcher = Fetcher(seconds, resolve=site.resolve, allows=allows, **options)
        try:
            return await fetcher.get(url.format(port=site.port), most), site
        finally:
            server.close()
            await asyncio.sleep(0)

    return asyncio.run(whole())


def test_a_file_is_fetched_with_nothing_but_a_request() -> None:
    data, site = get({"/a?x=1": ok(b"picture")}, "http://host.example:{port}/a?x=1#part")
    assert data == b"picture"
    ((path, headers),) = site.asked
    assert path == "/a?x=1"
    assert {name.lower() for name in headers} == {"host", "user-agent", "accept", "connection"}
    assert headers["Host"].startswith("host.example:")
    assert site.looked_up == ["host.example"]


def test_bodies_in_pieces_and_to_the_end() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npict\r\n3\r\nure\r\n0\r\n\r\n"
    assert get({"/a": chunked})[0] == b"picture"
    assert get({"/a": b"HTTP/1.0 200 OK\r\n\r\npicture"})[0] == b"picture"


def test_redirects_are_followed_three_times_and_checked_each_time() -> None:
    answers = {f"/{name}": redirect(f"/{name + 1}") for name in range(9)}
    data, site = get({**answers, "/3": ok(b"picture")}, "http://host.example:{port}/0")
    assert data == b"picture"
    assert len(site.looked_up) == 4
    with pytest.raises(PromptError, match="redirects more than 3 times"):
        get(answers, "http://host.example:{port}/0")
    with pytest.raises(PromptError, match=r"'inner.example' is not at a public address"):
        get({"/a": redirect("http://inner.example/secret")})
    with pytest.raises(PromptError, match="must come from an address of http"):
        get({"/a": redirect("file:///etc/passwd")})


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://inner.example/a", "'inner.example' is not at a public address"),
        ("http://mixed.example/a", "'mixed.example' is not at a public address"),
        ("http://gone.example/a", "'gone.example' is not known"),
        ("http://user:word@host.example/a", "may not hold a name or password"),
        ("http:///a", "must come from an address"),
        ("http://host.example:99999/a", "must come from an address"),
        ("http://[::1/a", "must come from an address"),
        ("ftp://host.example/a", "must come from an address"),
    ],
)
def test_addresses_that_are_refused(url: str, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        get({}, url)


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])

    async def changing(host: str, port: int) -> list[str]:
        return next(answers)

    async def whole() -> bytes:
        site = Site({"/a": ok(b"picture")})
        server = await asyncio.start_server(site.handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        fetcher = Fetcher(resolve=changing, allows=lambda address: address == "127.0.0.1")
        try:
            return await fetcher.get(f"http://host.example:{port}/a", 100)
        finally:
            server.close()

    assert asyncio.run(whole()) == b"picture"
    # Looked up once.
    assert next(answers) == ["10.0.0.1"]


def test_by_itself_it_never_goes_to_this_machine_or_its_networks() -> None:
    fetcher = Fetcher()
    for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "10.1.2.3", "169.254.169.254", "0.0.0.0"):
        with pytest.raises(PromptError, match="is not at a public address"):
            asyncio.run(fetcher.get(f"http://{host}:1/a", 100))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:db8::1",
        "2001:0:7f00:1::",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700:4700::1111", "::ffff:1.1.1.1"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)
    ipaddress.ip_address(address)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (ok(b"x" * 1001), "larger than 1,000 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 200_000, "larger than 1,000 bytes"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "answers with status 404"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "answers with status 302"),
        (ok(b"x", "Content-Encoding: gzip"), "gives it compressed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", "broke the connection off"),
        (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 400_000 + b"\r\n\r\n", "does not speak HTTP"),
        (b"", "broke the connection off"),
    ],
)
def test_answers_that_are_no_files(answer: bytes, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        get({"/a": answer})


def test_time_is_limited_even_if_bytes_drip() -> None:
    async def drip(path: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        for _ in range(100):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    with pytest.raises(PromptError, match=r"did not give it within 0.3 s"):
        get({"/a": drip}, seconds=0.3)


def test_nobody_there() -> None:
    with pytest.raises(PromptError, match=r"host.example cannot be reached"):
        get({}, "http://host.example:1/a")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=host.example"
    names = ["-addext", "subjectAltName=DNS:host.example"]
    try:
        made = subprocess.run(
            [*command.split(), *names, "-keyout", str(path), "-out", str(path) + ".crt"], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("no openssl here to make a certificate")
    assert made.returncode == 0, made.stderr
    path.write_bytes(path.read_bytes() + Path(str(path) + ".crt").read_bytes())
    return path


def test_certificates_are_verified(certificate: Path) -> None:
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=certificate)
    url = "https://host.example:{port}/a"
    data, site = get({"/a": ok(b"picture")}, url, server_tls=ours, context=trusting)
    assert data == b"picture" and len(site.asked) == 1
    with pytest.raises(PromptError, match=r"certificate of host.example is not valid"):
        get({"/a": ok(b"picture")}, url, server_tls=ours)
    with pytest.raises(PromptError, match=r"certificate of other.example is not valid"):
        get({"/a": ok(b"picture")}, url.replace("host.", "other."), server_tls=ours, context=trusting)
