"""Packets: nothing lost, nothing mixed, few that are tiny or huge."""

from __future__ import annotations

import random
from itertools import groupby

from openm3.server.packets import LEAST, MOST, Packets
from openm3.tokens import Content, Event, Thinking, ToolArguments, ToolEnd, ToolStart


def test_the_first_comes_at_once_and_the_others_wait_for_five_characters() -> None:
    packets = Packets()
    said = [list(packets.push([Content(text)])) for text in ("a", "bc", "de", "f", "g", "hijk")]
    assert said == [[Content("a")], [], [], [Content("bcdef")], [], [Content("ghijk")]]


def test_a_change_of_kind_sends_what_is_held() -> None:
    packets = Packets()
    first = list(packets.push([Thinking("I see"), Thinking("!"), Content("a")]))
    assert first == [Thinking("I see!")]
    assert list(packets.push([Content("b")])) == []
    start, end = ToolStart(0, "f"), ToolEnd(0, {})
    assert list(packets.push([start, ToolArguments(0, "{")])) == [Content("ab"), start]
    assert list(packets.push([ToolArguments(0, "}"), end])) == [ToolArguments(0, "{}"), end]
    assert list(packets.push([ToolArguments(1, "{")])) == []
    assert list(packets.push([ToolArguments(2, "}")])) == [ToolArguments(1, "{")]
    assert list(packets.flush()) == [ToolArguments(2, "}")]
    assert list(packets.flush()) == []


def test_without_hold_everything_goes() -> None:
    packets = Packets()
    assert list(packets.push([Content("abc")], hold=False)) == [Content("abc")]
    assert list(packets.push([Content("d")], hold=False)) == [Content("d")]


def test_long_text_is_cut_evenly() -> None:
    sizes = [len(event.text) for event in Packets().push([Content("x" * 1001)]) if isinstance(event, Content)]
    assert sum(sizes) == 1001 and max(sizes) <= MOST and min(sizes) >= 100


def test_any_stream_keeps_its_text_and_its_packets_their_size() -> None:
    chance = random.Random(0)
    packets, told, sent = Packets(), [], []
    for _ in range(3000):
        kind = chance.choice([Thinking, Content]) if chance.random() < 0.02 else Content
        event = kind("".join(chance.choices("abc ", k=chance.choice([0, 1, 2, 3, 4, 5, 12, 450]))))
        told.append(event)
        sent += packets.push([event] if event.text else [])
    sent += packets.flush()

    def joined(events: list[Event]) -> list[tuple[type, str]]:
        texts = [event for event in events if isinstance(event, Content | Thinking) and event.text]
        return [(kind, "".join(event.text for event in group)) for kind, group in groupby(texts, type)]  # type: ignore[misc]

    assert joined(sent) == joined(list(told))
    sizes = [len(event.text) for event in sent if isinstance(event, Content | Thinking)]
    assert max(sizes) <= MOST
    assert sum(size >= LEAST for size in sizes) >= 0.95 * len(sizes)
