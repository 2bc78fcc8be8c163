"""The stream router: the same events however the text is cut, no tag leaked, no text lost."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from openm3.errors import PromptError
from openm3.tokens import (
    THINKING,
    Content,
    Event,
    StreamRouter,
    Thinking,
    ToolArguments,
    ToolCall,
    ToolEnd,
    ToolStart,
    parse_tool_calls,
    render_tool_call,
)

NS = "]<]minimax[>["
OPEN, CLOSE = f"{NS}<tool_call>", f"{NS}</tool_call>"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "mode": {"type": "integer"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "at": {"type": "object", "properties": {"line": {"type": "integer"}, "note": {"type": "string"}}},
                },
            },
        },
    },
    {"name": "stop", "parameters": {"type": "object", "properties": {}}},
]


def block(*calls: str) -> str:
    return f"{OPEN}\n{''.join(calls)}{CLOSE}"


def invoke(name: str, *arguments: str) -> str:
    return f'{NS}<invoke name="{name}">{"".join(arguments)}{NS}</invoke>\n'


def arg(key: str, value: str) -> str:
    return f"{NS}<{key}>{value}{NS}</{key}>"


def joined(events: Iterable[Event]) -> list[Event]:
    """Neighbouring texts of one kind as one event."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Thinking) and isinstance(last, Thinking):
            result[-1] = Thinking(last.text + event.text)
        elif isinstance(event, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + event.text)
        elif isinstance(event, ToolArguments) and isinstance(last, ToolArguments) and event.index == last.index:
            result[-1] = ToolArguments(event.index, last.text + event.text)
        else:
            result.append(event)
    return result


def route(parts: Iterable[str], thinking: str = "adaptive", tools: Any = TOOLS) -> list[Event]:
    router = StreamRouter(tools, thinking)
    events = [event for part in parts for event in router.push(part)]
    return joined(events + router.finish())


def call(index: int, name: str, complete: bool = True, **arguments: Any) -> list[Event]:
    text = json.dumps(arguments, ensure_ascii=False)
    return [ToolStart(index, name), ToolArguments(index, text), ToolEnd(index, arguments, complete)]


PATH = arg("path", 'a "b"\n\\ é😀')
AT = arg("at", "\n" + arg("line", "3") + arg("note", "7") + "\n")
TAGS = arg("tags", arg("item", "1") + arg("item", "true") + " ")
STOP = invoke("stop")
WRITE = block(invoke("write", PATH, arg("mode", "1"), TAGS, AT))
WRITTEN = {"path": 'a "b"\n\\ é😀', "mode": 1, "tags": ["1", "true"], "at": {"line": 3, "note": "7"}}

BARE = f'<tool_call>\n<invoke name="stop"></invoke></tool_call> {STOP}{NS}'
IN_STRING = f"</path> ]<]mini {NS} {NS}<path> {NS}</pat> <invoke>"
IN_VALUE = f'a < b {NS} {NS}< {NS}<p\n> {NS}<> {NS}</y> {NS}<a "b> </x>'

# name: (thinking mode, text, events)
ANSWERS: dict[str, tuple[str, str, list[Event]]] = {
    "plain": ("adaptive", "Hello <b>world</b>", [Content("Hello <b>world</b>")]),
    "thought": ("adaptive", "<mm:think>Hm.\n</mm:think>\n\nYes.", [Thinking("Hm.\n"), Content("\n\nYes.")]),
    "lone close": ("adaptive", "</mm:think>Yes.", [Content("Yes.")]),
    "space first": ("adaptive", " \n<mm:think>Hm.</mm:think>Yes.", [Thinking("Hm."), Content("Yes.")]),
    "space, no tag": ("adaptive", " \n<mm:", [Content(" \n<mm:")]),
    "late close": ("adaptive", "So </mm:think>yes.", [Content("So yes.")]),
    "second close": ("adaptive", "So </mm:think>yes</mm:think>.", [Content("So yes</mm:think>.")]),
    "late open": ("adaptive", "Say <mm:think> first.", [Content("Say <mm:think> first.")]),
    "tags in the answer": (
        "adaptive",
        "<mm:think>Hm.</mm:think>Write <mm:think>...</mm:think>.",
        [Thinking("Hm."), Content("Write <mm:think>...</mm:think>.")],
    ),
    "enabled": ("enabled", "Hm.</mm:think>Yes.", [Thinking("Hm."), Content("Yes.")]),
    "enabled, nothing thought": ("enabled", "</mm:think>Yes.", [Content("Yes.")]),
    "enabled, tag repeated": ("enabled", "<mm:think>Hm.</mm:think>Yes.", [Thinking("Hm."), Content("Yes.")]),
    "enabled, never closed": ("enabled", " Hm. <mm:think></mm:thi", [Thinking(" Hm. <mm:think></mm:thi")]),
    "enabled, tools in thought": ("enabled", f"Try {WRITE}</mm:think>", [Thinking(f"Try {WRITE}")]),
    "disabled": ("disabled", "Yes.", [Content("Yes.")]),
    "disabled, tag repeated": ("disabled", "</mm:think>Yes.", [Content("Yes.")]),
    "disabled, tag in prose": ("disabled", "Use </mm:think>.", [Content("Use </mm:think>.")]),
    "call": ("adaptive", WRITE, call(0, "write", **WRITTEN)),
    "thought, content, calls": (
        "adaptive",
        "<mm:think>Hm.</mm:think>Now: " + block(invoke("write", arg("path", "")), STOP) + "\nDone.",
        [Thinking("Hm."), Content("Now: "), *call(0, "write", path=""), *call(1, "stop"), Content("\nDone.")],
    ),
    "two blocks": (
        "disabled",
        block(STOP) + " and " + block(invoke("other", arg("n", "1.5"), arg("s", "x"))),
        [*call(0, "stop"), Content(" and "), *call(1, "other", n=1.5, s="x")],
    ),
    "bare tags are prose": ("adaptive", BARE, [Content(BARE)]),
    "look-alikes": (
        "adaptive",
        "</mm:think>a </mm:thin > ]<]mini ]<]minimax[> ]<]minimax[>[<tool_cal ]<]]<]minimax[>[ <mm:thin",
        [Content("a </mm:thin > ]<]mini ]<]minimax[> ]<]minimax[>[<tool_cal ]<]]<]minimax[>[ <mm:thin")],
    ),
    "look-alikes in a string": (
        "adaptive",
        block(invoke("write", arg("path", IN_STRING))),
        call(0, "write", path=IN_STRING),
    ),
    "look-alikes in a value": ("adaptive", block(invoke("other", arg("x", IN_VALUE))), call(0, "other", x=IN_VALUE)),
    "text between calls": (
        "adaptive",
        f"{OPEN}\n{STOP} then \n{NS}<x>{STOP}",
        [*call(0, "stop"), Content(f"\n then \n{NS}<x>"), *call(1, "stop")],
    ),
    "text after the last call": ("adaptive", block(STOP, "so "), [*call(0, "stop"), Content("\nso ")]),
    "empty block": ("adaptive", f"a{OPEN}\n{CLOSE}b", [Content("ab")]),
    "block of prose": (
        "adaptive",
        f"a{OPEN}\nb {CLOSE}c",
        [Content(f"a{OPEN}\nb {CLOSE}c")],
    ),
    "end after block tag": ("adaptive", f"a{OPEN}\n", [Content("a")]),
    "end in invoke": ("adaptive", f"{OPEN}{NS}<invoke na", [Content(f"{OPEN}{NS}<invoke na")]),
    "end in a string": (
        "adaptive",
        f'{OPEN}{NS}<invoke name="write">{NS}<path>a{NS}</pa',
        call(0, "write", complete=False, path=f"a{NS}</pa"),
    ),
    "end in a nested value": (
        "adaptive",
        f'{OPEN}{NS}<invoke name="write">{NS}<at>{NS}<line>4',
        call(0, "write", complete=False, at={"line": 4}),
    ),
    "end in a call": ("adaptive", f'{OPEN}{NS}<invoke name="stop">', call(0, "stop", complete=False)),
    "argument not closed": (
        "adaptive",
        f'{OPEN}{NS}<invoke name="write">{NS}<path>a{NS}</invoke>{CLOSE}b',
        [*call(0, "write", path="a"), Content("b")],
    ),
    "call not closed": (
        "adaptive",
        f'{OPEN}{NS}<invoke name="write">{NS}<mode>1{NS}<invoke name="stop">{CLOSE}b',
        [*call(0, "write", complete=False, mode=1), *call(1, "stop", complete=False), Content("b")],
    ),
    "opening tag left out": (
        "adaptive",
        block(invoke("write", f"Beijing{NS}</path>", arg("mode", "2"))),
        call(0, "write", path="Beijing", mode=2),
    ),
    "inner tag not closed": (
        "adaptive",
        block(invoke("write", arg("at", f"{NS}<line>5"))),
        call(0, "write", at={"line": 5}),
    ),
    "text beside arguments": (
        "adaptive",
        block(invoke("other", "so", arg("a", "x" + arg("b", "1") + "y"))),
        call(0, "other", a={"b": 1, "$text": "xy"}, **{"$text": "so"}),
    ),
    "arguments as JSON": ("adaptive", block(invoke("write", '\n{"mode": 3}')), call(0, "write", mode=3)),
    "argument names of tags": (
        "adaptive",
        block(invoke("other", arg("invoke", "1"), arg("tool_call", arg("invoke", "2")), arg("item", "3"))),
        call(0, "other", invoke=1, tool_call={"invoke": 2}, item=3),
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_in_one_piece(name: str) -> None:
    thinking, text, events = ANSWERS[name]
    assert route([text], thinking) == events


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_cut_anywhere(name: str) -> None:
    thinking, text, events = ANSWERS[name]
    assert route(text, thinking) == events
    for cut in range(len(text) + 1):
        assert route([text[:cut], text[cut:]], thinking) == events


@given(st.data(), st.sampled_from(sorted(ANSWERS)))
def test_answer_cut_into_any_parts(data: st.DataObject, name: str) -> None:
    thinking, text, events = ANSWERS[name]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    assert route([text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)], thinking) == events


FRAGMENTS = [NS, "<tool_call>", "</tool_call>", '<invoke name="write">', "</invoke>", "<mm:think>", "</mm:think>", "\n"]
FRAGMENTS += [
    "<path>",
    "</path>",
    "<at>",
    "</at>",
    "<item>",
    "</item>",
    "<tags>",
    "1",
    "text",
    " ",
    "]<]",
    "<",
    '"',
    "{}",
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=40), st.sampled_from(THINKING))
def test_any_mix_of_tags_routes_the_same_however_cut(fragments: list[str], thinking: str) -> None:
    text = "".join(fragments)
    events = route([text], thinking)
    assert route(text, thinking) == events
    assert route(fragments, thinking) == events
    for event in events:
        if isinstance(event, ToolEnd):
            written = "".join(e.text for e in events if isinstance(e, ToolArguments) and e.index == event.index)
            assert json.loads(written) == event.arguments


@given(st.lists(st.text()), st.sampled_from(THINKING))
def test_any_text_without_tags_is_kept(parts: list[str], thinking: str) -> None:
    text = "".join(parts)
    # Strings of this module are among those that are tried.
    assume("mm:think>" not in text and "]<]minimax[>[" not in text)
    kind = Thinking if thinking == "enabled" else Content
    assert route(parts, thinking, tools=None) == ([kind(text)] if text else [])


def test_nothing_is_held_back_that_cannot_be_a_tag() -> None:
    router = StreamRouter(TOOLS)
    assert router.push("He") == [Content("He")]
    assert router.push("llo <") == [Content("llo ")]
    assert router.push("b> </mm:thin") == [Content("<b> ")]
    assert router.push("g") == [Content("</mm:thing")]
    assert router.push("]<]minimax[>[<tool_ca") == []
    assert router.push("t") == [Content("]<]minimax[>[<tool_cat")]
    assert router.push("]") == []
    assert router.finish() == [Content("]")]
    assert router.finish() == []


def test_strings_stream_as_they_come_and_other_values_when_complete() -> None:
    router = StreamRouter(TOOLS, "disabled")
    assert router.push(f'{OPEN}\n{NS}<invoke name="write">') == [ToolStart(0, "write")]
    assert router.push(f"{NS}<path>") == [ToolArguments(0, '{"path": "')]
    assert router.push('a"\n') == [ToolArguments(0, 'a\\"\\n')]
    assert router.push("é ]<]mini") == [ToolArguments(0, "é ")]
    assert router.push("x") == [ToolArguments(0, "]<]minix")]
    assert router.push(f"{NS}</path>") == [ToolArguments(0, '"')]
    assert router.push(f"{NS}<mode>4") == []
    assert router.push(f"2{NS}</mode>") == [ToolArguments(0, ', "mode": 42')]
    end = ToolEnd(0, {"path": 'a"\né ]<]minix', "mode": 42})
    assert router.push(f"{NS}</invoke>") == [ToolArguments(0, "}"), end]
    assert router.push(f"\n{CLOSE}ok") == [Content("ok")]


def test_deep_nesting_and_long_numbers_raise_nothing() -> None:
    deep = "".join(f"{NS}<a>" for _ in range(5000))
    for inner in (deep, "[" * 100_000, '{"a":' * 5000, "9" * 10_000, "1e999", "NaN", '"\\ud800"', '["\\ud800"]'):
        [start, *_, end] = route([block(invoke("f", arg("x", inner)))])
        assert start == ToolStart(0, "f")
        assert isinstance(end, ToolEnd)
        json.dumps(end.arguments, ensure_ascii=False).encode()


def test_streaming_a_long_string_is_linear() -> None:
    router = StreamRouter(TOOLS)
    router.push(f'{OPEN}{NS}<invoke name="write">{NS}<path>')
    events = [event for _ in range(20_000) for event in router.push("word ]")]
    assert sum(len(event.text) for event in events if isinstance(event, ToolArguments)) == 6 * 20_000 - 1


def test_unknown_thinking_mode_is_refused() -> None:
    with pytest.raises(PromptError, match="not 'on'"):
        StreamRouter(thinking="on")


def test_parse_tool_calls() -> None:
    text = "<mm:think>Hm.</mm:think>Both:" + block(invoke("write", PATH), STOP)
    assert parse_tool_calls(text, TOOLS) == [ToolCall("write", {"path": 'a "b"\n\\ é😀'}), ToolCall("stop", {})]
    assert parse_tool_calls("none") == []


KEYS = st.text(st.characters(exclude_characters='<>"\r\n/', exclude_categories=["Cs"]), min_size=1, max_size=8)
STRINGS = st.text().filter(lambda text: NS not in text)


def typed_values() -> st.SearchStrategy[tuple[dict[str, Any], Any]]:
    """Pairs of a schema and a value that it allows."""
    nothing: st.SearchStrategy[tuple[dict[str, Any], Any]] = st.just(({"type": "null"}, None))
    leaves = st.one_of(
        STRINGS.map(lambda value: ({"type": "string"}, value)),
        st.integers().map(lambda value: ({"type": "integer"}, value)),
        st.floats(allow_nan=False, allow_infinity=False).map(lambda value: ({"type": "number"}, value)),
        st.booleans().map(lambda value: ({"type": ["boolean", "null"]}, value)),
        st.sampled_from(["1", 2, "x", True]).map(lambda value: ({"enum": ["1", 2, "x", True]}, value)),
    )

    def containers(
        inner: st.SearchStrategy[tuple[dict[str, Any], Any]],
    ) -> st.SearchStrategy[tuple[dict[str, Any], Any]]:
        objects = st.dictionaries(KEYS, inner, max_size=4).map(
            lambda members: (
                {"type": "object", "properties": {key: schema for key, (schema, _) in members.items()}},
                {key: value for key, (_, value) in members.items()},
            )
        )
        lists = inner.flatmap(
            lambda pair: st.integers(0, 3).map(lambda n: ({"type": "array", "items": pair[0]}, [pair[1]] * n))
        )
        return objects | lists

    return st.recursive(leaves, containers, max_leaves=8) | nothing


@given(st.dictionaries(KEYS, typed_values(), max_size=4))
def test_rendered_calls_parse_back(members: dict[str, tuple[dict[str, Any], Any]]) -> None:
    properties = {key: schema for key, (schema, _) in members.items()}
    arguments = {key: value for key, (_, value) in members.items()}
    tools = [{"name": "f", "parameters": {"type": "object", "properties": properties}}]
    text = render_tool_call("f", arguments)
    expected = {key: value for key, value in arguments.items() if value is not None}
    assert repr(parse_tool_calls(text, tools)) == repr([ToolCall("f", expected)])
    assert route(text, tools=tools) == route([text], tools=tools)
