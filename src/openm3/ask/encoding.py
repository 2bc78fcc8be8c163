"""Bytes to text when nobody says in which encoding: byte order marks, then UTF-8, then the Western 8-bit guess.

Without a mark, bytes that are no UTF-8 can be any of dozens of encodings; they are read as Windows-1252 (Latin-1 where
that has no character), and the name of the encoding that is returned says so. Knows no files.
"""

from __future__ import annotations

import codecs
import re

# UTF-32 before UTF-16, whose mark begins it.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

# What text does not hold; tab, newlines, form feed, backspace and escape (terminal logs) it may.
_CONTROL = re.compile(rb"[\x00-\x07\x0b\x0e-\x1a\x1c-\x1f\x7f]")
MAX_CONTROL_SHARE = 0.02
MIN_GOOD_PER_BAD = 10
"""Valid characters beyond ASCII for each invalid byte that make damaged UTF-8 likelier than another encoding."""


class NotText(ValueError):
    """The bytes are no text: binary, or nothing but white space."""


def decode(data: bytes) -> tuple[str, str]:
    """The text, newlines as `\\n`, and the name of the encoding. Raises NotText."""
    text, encoding = _decoded(data)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise NotText("empty")
    return text, encoding


def _decoded(data: bytes) -> tuple[str, str]:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(encoding), encoding
            except UnicodeDecodeError:
                raise NotText(f"binary, or {encoding} that is damaged") from None
    if b"\0" in data or len(_CONTROL.findall(data)) > MAX_CONTROL_SHARE * len(data):
        raise NotText("binary")
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        return _not_utf8(data)


def _not_utf8(data: bytes) -> tuple[str, str]:
    text = data.decode("utf-8", "replace")
    num_bad = text.count("\ufffd")
    num_good = sum(char > "\x7f" for char in text) - num_bad
    if num_good >= MIN_GOOD_PER_BAD * num_bad:
        return text, f"utf-8 ({num_bad} invalid {'byte' if num_bad == 1 else 'sequences'} replaced)"
    try:
        return data.decode("cp1252"), "cp1252"
    except UnicodeDecodeError:
        return data.decode("latin-1"), "latin-1"
