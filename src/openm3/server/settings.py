"""How a server serves: address, keys, limits. Frozen and checked; nothing else here reads files or the environment.

| environment variable | what it is |
|---|---|
| `OPENM3_API_KEYS` | keys that clients may use, apart by commas or white space; those of `--api-key-file` are added |
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from openm3.errors import ConfigError

KEYS_VARIABLE = "OPENM3_API_KEYS"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Everything that is decided before a server starts. Raises ConfigError for what is impossible or unsafe.

    With `api_keys` every request needs one of them, but those to /health, /ready and the page's own files. Without,
    only an address of this machine alone is served, unless `allow_unauthenticated`. Pages of `cors_origins` may call
    from browsers. A request's headers may have `max_header_bytes` and its body `max_body_bytes`, an uploaded file
    `max_file_bytes`, all files together `max_files_bytes`; they are kept for `file_seconds` in `files_dir`, or a
    folder that ends with the server. `max_concurrent` requests run at a time. A body has `body_seconds` and as long
    again as it takes at 10 KB a second. A reply ends after `reply_seconds`, if any, and has at most `max_tokens`.
    Media come from web addresses only with `allow_media_urls`. `media_workers` processes decode them, each with
    `media_memory_bytes` of address space and `media_seconds` for a picture or video; `max_media_waiting` requests may
    wait for that, and what was decoded last is kept, up to `media_cache_bytes`.
    `names` are what the model is called, its folder's name if there are none. A server that is told to stop gives its
    replies `grace` seconds.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_unauthenticated: bool = False
    cors_origins: tuple[str, ...] = ()
    max_header_bytes: int = 32 << 10
    max_body_bytes: int = 64 << 20
    max_concurrent: int = 256
    max_tokens: int = 524_288
    body_seconds: float = 30.0
    reply_seconds: float | None = None
    grace: float = 30.0
    files_dir: Path | None = None
    max_file_bytes: int = 512 << 20
    max_files_bytes: int = 8 << 30
    file_seconds: float = 7 * 24 * 3600.0
    allow_media_urls: bool = False
    media_workers: int = 1
    media_memory_bytes: int = 4 << 30
    media_seconds: float = 120.0
    max_media_waiting: int = 64
    media_cache_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        bad = []
        if not 0 <= self.port < 65536:
            bad.append(f"port must be between 0 and 65535, not {self.port}")
        for name in (
            *("max_header_bytes", "max_body_bytes", "max_concurrent", "max_tokens", "body_seconds"),
            *("media_workers", "media_memory_bytes", "media_seconds", "max_media_waiting"),
        ):
            if not getattr(self, name) > 0:
                bad.append(f"{name} must be more than 0, not {getattr(self, name)}")
        if self.grace < 0:
            bad.append(f"grace must be at least 0 seconds, not {self.grace}")
        if not (self.api_keys or self.allow_unauthenticated or is_loopback(self.host)):
            bad.append(
                f"{self.host!r} can be reached from other machines: give keys with --api-key-file or "
                f"{KEYS_VARIABLE}, or say --allow-unauthenticated"
            )
        if bad:
            raise ConfigError("impossible server settings: " + "; ".join(bad))


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: str | Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of a file, one a line, `#` for comments, and of the environment. Raises ConfigError; shows no key."""
    keys = list(_split(environment.get(KEYS_VARIABLE, "").replace(",", "\n")))
    if path is not None:
        try:
            found = list(_split(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the key file {path} cannot be read: {type(error).__name__}") from None
        if not found:
            raise ConfigError(f"the key file {path} holds no key: write one a line")
        keys += found
    return tuple(dict.fromkeys(keys))


def _split(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield from line.partition("#")[0].split()
