"""Files that users give: read within limits, and told apart by their first bytes, never by a name."""

from __future__ import annotations

import os
from dataclasses import dataclass

from openm3.errors import PromptError

PICTURES = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
"""Formats of pictures that are read."""

VIDEOS = ("MP4", "MOV", "Matroska", "AVI")
"""Formats of videos that are read; WebM is Matroska."""

_STILLS_IN_MP4 = (b"heic", b"heix", b"hevc", b"heif", b"mif1", b"msf1", b"avif", b"avis")
_MAGIC = (
    ("JPEG", b"\xff\xd8\xff"),
    ("PNG", b"\x89PNG\r\n\x1a\n"),
    ("GIF", b"GIF8"),
    ("BMP", b"BM"),
    ("Matroska", b"\x1a\x45\xdf\xa3"),
    ("TIFF", b"II*\0"),
    ("TIFF", b"MM\0*"),
    ("a PDF", b"%PDF"),
    ("PostScript", b"%!PS"),
    ("an archive", b"PK\x03\x04"),
    ("an archive", b"\x1f\x8b"),
    ("a font", b"\0\1\0\0\0"),
    ("a font", b"OTTO"),
    ("a font", b"wOF"),
    ("a playlist", b"#EXTM3U"),
)


@dataclass(frozen=True)
class MediaLimits:
    """What is refused by its size or header, before any of it is decoded."""

    image_bytes: int = 30 * 2**20
    image_pixels: int = 8_192 * 8_192
    """Of a picture as it is stored; the frames of an animation may have 10 times as many together."""
    video_bytes: int = 512 * 2**20
    frame_pixels: int = 8_192 * 4_320
    video_frames: int = 1_000_000
    """Of the whole file; how many the model sees is an option."""
    video_seconds: float = 6 * 3_600


def read_source(source: str | os.PathLike[str] | bytes, max_bytes: int) -> bytes:
    """The bytes of a file, or these bytes. Raises PromptError if it cannot be read, is empty or larger."""
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str | os.PathLike):
        try:
            with open(source, "rb") as file:
                data = file.read(max_bytes + 1)
        except (OSError, ValueError) as error:
            raise PromptError(f"cannot read {os.fspath(source)!r}: {error}") from None
    else:
        raise PromptError(f"pictures and videos come as a path or bytes, not as {type(source).__name__}")
    if not data:
        raise PromptError("the file is empty")
    if len(data) > max_bytes:
        raise PromptError(f"the file is larger than {max_bytes:,} bytes")
    return data


def format_of(data: bytes) -> str | None:
    """The name of a file's format, of PICTURES, VIDEOS or what else is often sent by mistake; None if unknown."""
    if data[:4] == b"RIFF":
        return {b"WEBP": "WEBP", b"AVI ": "AVI"}.get(data[8:12])
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        return "HEIC or AVIF" if brand in _STILLS_IN_MP4 else "MOV" if brand == b"qt  " else "MP4"
    if data[4:8] in (b"moov", b"mdat", b"free", b"wide", b"skip"):
        return "MOV"
    for name, magic in _MAGIC:
        if data.startswith(magic):
            return name
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return "SVG"
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "HTML"
    return "text" if head and all(byte >= 32 or byte in b"\t\r\n" for byte in head) else None


def refusal(data: bytes, wanted: str, formats: tuple[str, ...]) -> PromptError:
    """The error for a file that is not one of `formats`; `wanted` says what was expected, as in "a picture"."""
    found = format_of(data)
    other = "a picture" if found in PICTURES else "a video" if found in VIDEOS else None
    what = f"{other} ({found})" if other else found or "of an unknown format"
    return PromptError(f"the file is {what}, not {wanted}: expected {', '.join(formats[:-1])} or {formats[-1]}")
