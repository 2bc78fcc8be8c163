"""Stop strings are found across tokens, and nothing of them is ever shown."""

from __future__ import annotations

import random

import pytest

from openm3.engine.text import ReplyText
from openm3.tokens.tokenizer import StreamDecoder


def reply(parts: list[bytes], stop: tuple[str, ...]) -> tuple[list[str], ReplyText]:
    found = ReplyText(StreamDecoder(dict(enumerate(parts))), stop)
    shown = []
    for i in range(len(parts)):
        shown.append(found.push(i))
        if found.stopped:
            return shown, found
    return [*shown, found.finish()], found


def test_without_stop_strings_each_character_is_shown_with_its_last_byte() -> None:
    shown, found = reply([b"a", "\u00e9".encode()[:1], "\u00e9".encode()[1:], b"\xe2\x82"], ())
    assert shown == ["a", "", "\u00e9", "", "\ufffd"]
    assert found.text == "a\u00e9\ufffd" and not found.stopped


@pytest.mark.parametrize(
    ("parts", "stop", "shown"),
    [
        ([b"one", b" END", b" two"], (" END",), ["one", ""]),
        ([b"one", b" E", b"N", b"D two"], (" END",), ["one", "", "", ""]),
        ([b"one", b" E", b"N", b"E"], (" END",), ["one", "", "", " ENE", ""]),
        ([b"one", b" E"], (" END",), ["one", "", " E"]),
        ([b"ab", b"c", b"d"], ("bcd", "bc"), ["a", ""]),
        ([b"abc"], ("abc", "b"), ["a"]),
        ([b"abc"], ("abc", "bc"), [""]),
        ([b"xaay"], ("aa", "ay"), ["x"]),
        ([b"a", b"a", b"b"], ("aab",), ["", "", ""]),
        ([b"a", b"a", b"a", b"b"], ("aab",), ["", "", "a", ""]),
    ],
)
def test_what_may_end_a_reply_is_held_back(parts: list[bytes], stop: tuple[str, ...], shown: list[str]) -> None:
    assert reply(parts, stop)[0] == shown


def test_any_cut_into_tokens_gives_the_same_text() -> None:
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choice("ab\u20ac ") for _ in range(30))
        stop = tuple("".join(generator.choice("ab\u20ac ") for _ in range(generator.randrange(1, 5))) for _ in range(2))
        data, parts = text.encode(), []
        while data:
            count = generator.randrange(1, 6)
            parts.append(data[:count])
            data = data[count:]
        shown, found = reply(parts, stop)
        _, first = min(((at + len(s), at) for s in stop if (at := text.find(s)) >= 0), default=(0, None))
        assert "".join(shown) == found.text == text[:first]
        assert found.stopped == (first is not None)
