"""Bytes to text: marks, UTF-8, guesses, and what is no text."""

import codecs
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm3.ask.encoding import NotText, decode

TEXT = "naïve – “quoted” €5, 日本\n"


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (TEXT.encode(), "utf-8"),
        (codecs.BOM_UTF8 + TEXT.encode(), "utf-8"),
        (codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), "utf-16-le"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "utf-16-be"),
        (codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"), "utf-32-le"),
        (codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"), "utf-32-be"),
    ],
)
def test_unicode_is_read_as_it_is(data: bytes, encoding: str) -> None:
    assert decode(data) == (TEXT, encoding)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip))
def test_any_utf8_comes_back(text: str) -> None:
    assert decode(codecs.BOM_UTF8 + text.encode()) == (text, "utf-8")


def test_western_8_bit() -> None:
    assert decode("café “ok” 5 €".encode("cp1252")) == ("café “ok” 5 €", "cp1252")
    assert decode(b"caf\xe9 \x81") == ("café \x81", "latin-1")


def test_a_damaged_character_does_not_spoil_utf8() -> None:
    good = "größe " * 20
    text, encoding = decode(good.encode() + b"\xff")
    assert text == good + "\ufffd"
    assert encoding == "utf-8 (1 invalid byte replaced)"


def test_newlines_become_one_kind() -> None:
    assert decode(b"a\r\nb\rc\nd\r\n") == ("a\nb\nc\nd\n", "utf-8")


@pytest.mark.parametrize("data", [b"", b" \n\t\r\n", codecs.BOM_UTF8, codecs.BOM_UTF16_LE])
def test_empty_is_no_text(data: bytes) -> None:
    with pytest.raises(NotText, match="empty"):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"text and\0zero",
        random.Random(0).randbytes(2000).replace(b"\0", b"\1"),
        codecs.BOM_UTF16_LE + b"odd",
        codecs.BOM_UTF32_LE + b"\xff\xff\xff\xff",
    ],
)
def test_binary_is_no_text(data: bytes) -> None:
    with pytest.raises(NotText, match="binary"):
        decode(data)


def test_terminal_logs_are_text() -> None:
    assert decode(b"\x1b[1mbold\x1b[0m\x0c\n")[1] == "utf-8"
