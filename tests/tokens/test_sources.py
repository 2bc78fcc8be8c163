"""Formats are told by content, files read within limits."""

from pathlib import Path

import pytest

from openm3.errors import PromptError
from openm3.tokens.sources import PICTURES, VIDEOS, format_of, read_source, refusal


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"GIF89a", "GIF"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WEBP"),
        (b"RIFF\0\0\0\0AVI LIST", "AVI"),
        (b"RIFF\0\0\0\0WAVEfmt ", None),
        (b"BM....", "BMP"),
        (b"\0\0\0\x20ftypisom", "MP4"),
        (b"\0\0\0\x14ftypqt  ", "MOV"),
        (b"\0\0\0\x08wide\0\0", "MOV"),
        (b"\0\0\0\x18ftypheic", "HEIC or AVIF"),
        (b"\0\0\0\x18ftypavif", "HEIC or AVIF"),
        (b"\x1a\x45\xdf\xa3", "Matroska"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg xmlns=""/>', "SVG"),
        (b"  \n<!DOCTYPE HTML><title>", "HTML"),
        (b"%PDF-1.7", "a PDF"),
        (b"PK\x03\x04", "an archive"),
        (b"wOF2", "a font"),
        (b"#EXTM3U\nhttp://example.org/a.ts", "a playlist"),
        (b"just words\n", "text"),
        (b"\0\0", None),
    ],
)
def test_formats_are_told_by_content(data: bytes, name: str | None) -> None:
    assert format_of(data) == name


def test_a_refusal_says_what_came_and_what_is_expected() -> None:
    expected = "the file is HTML, not a picture: expected JPEG, PNG, GIF, WEBP or BMP"
    assert str(refusal(b"<html>", "a picture", PICTURES)) == expected
    assert str(refusal(b"GIF89a", "a video", VIDEOS)).startswith(
        "the file is a picture (GIF), not a video: expected MP4"
    )
    assert "a video (AVI), not a picture" in str(refusal(b"RIFF\0\0\0\0AVI ", "a picture", PICTURES))
    assert "of an unknown format" in str(refusal(b"\0", "a picture", PICTURES))


def test_sources_are_paths_or_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    for source in (file, str(file), b"12345", bytearray(b"12345"), memoryview(b"12345")):
        assert read_source(source, 5) == b"12345"
        with pytest.raises(PromptError, match="larger than 4 bytes"):
            read_source(source, 4)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("/no/such/file", "cannot read '/no/such/file': .*No such file"),
        ("a\0b", "cannot read"),
        (".", "cannot read"),
        (b"", "empty"),
        (5, "as a path or bytes, not as int"),
    ],
)
def test_unreadable_sources(source: bytes, word: str) -> None:
    with pytest.raises(PromptError, match=word):
        read_source(source, 100)
