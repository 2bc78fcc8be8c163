"""Settings that may be, and where keys come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openm3.errors import ConfigError
from openm3.server.settings import ServerSettings, is_loopback, read_keys


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"port": 65536}, "port must be between 0 and 65535, not 65536"),
        ({"port": -1}, "port must be"),
        ({"max_body_bytes": 0}, "max_body_bytes must be more than 0, not 0"),
        ({"max_concurrent": -2}, "max_concurrent must be"),
        ({"grace": -1.0}, "grace must be at least 0"),
        ({"host": "0.0.0.0"}, "'0.0.0.0' can be reached from other machines: give keys"),
        ({"host": "::"}, "can be reached"),
        ({"host": ""}, "can be reached"),
        ({"host": "example.org"}, "can be reached"),
    ],
)
def test_what_is_impossible_or_unsafe_is_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        ServerSettings(**values)


def test_a_public_address_needs_keys_or_a_word() -> None:
    assert ServerSettings(host="0.0.0.0", api_keys=("k",)).host == "0.0.0.0"
    assert ServerSettings(host="0.0.0.0", allow_unauthenticated=True).api_keys == ()


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(ServerSettings(api_keys=("secret",)))


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_keys_come_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("# team\none  # Ada\n\n  two\none\n")
    assert read_keys(file, {"OPENM3_API_KEYS": "three, two\nfour"}) == ("three", "two", "four", "one")
    assert read_keys(None, {}) == ()


def test_a_key_file_without_keys_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    with pytest.raises(ConfigError, match=r"keys.txt cannot be read: FileNotFoundError"):
        read_keys(file, {})
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(file, {"OPENM3_API_KEYS": "x"})
    file.write_bytes(b"secret\xff")
    with pytest.raises(ConfigError, match="cannot be read: UnicodeDecodeError") as caught:
        read_keys(file, {})
    assert "secret" not in str(caught.value)
