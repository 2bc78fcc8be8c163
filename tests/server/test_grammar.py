"""Random walks through what grammars allow: whatever a model writes, it parses, and by its schema."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from openm3.config import BLOCK, EngineConfig
from openm3.engine.constraint import Constraint
from openm3.engine.engine import Engine
from openm3.engine.request import SamplingParams
from openm3.errors import PromptError
from openm3.model.model import Model, load
from openm3.server.grammar import json_constraint, reply_constraint, thinking_constraint, tool_constraint
from openm3.tokens import Content, StreamRouter, Thinking, Tokenizer, ToolEnd, ToolStart, parse_tool_calls
from openm3.tokens.router import NAMESPACE

SEARCH = {
    "name": "search-files.v2",
    "parameters": {
        "type": "object",
        "properties": {
            "query": {"type": "string"},
            "limit": {"type": "integer", "minimum": 1, "maximum": 50},
            "kind": {"enum": ["code", "text", 3, None]},
            "exact": {"type": "boolean"},
            "since": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        },
        "required": ["limit", "query"],
    },
}
NESTED = {
    "name": "plan",
    "parameters": {
        "$defs": {
            "Step": {
                "type": "object",
                "properties": {
                    "title": {"type": "string", "enum": ["cut <think>", "fold", "glue"]},
                    "cost": {"type": "number"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/Step"}, "maxItems": 2},
                },
                "required": ["title"],
            },
        },
        "type": "object",
        "properties": {
            "steps": {"type": "array", "items": {"$ref": "#/$defs/Step"}, "minItems": 1, "maxItems": 3},
            "tags": {"type": "array", "items": {"type": "string"}},
            "matrix": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
            "owner": {"anyOf": [{"$ref": "#/$defs/Step"}, {"type": "null"}, {"type": "string"}]},
            "options": {"type": "object", "properties": {"deep": {"type": "boolean"}}},
            "place": {
                "type": "array",
                "prefixItems": [{"type": "integer"}, {"type": "boolean"}],
                "items": False,
                "minItems": 2,
            },
            "shape": {
                "oneOf": [
                    {"type": "object", "properties": {"r": {"type": "integer"}}, "required": ["r"]},
                    {"type": "object", "properties": {"w": {"type": "integer"}}, "required": ["w"]},
                ]
            },
            "labels": {"type": "object", "additionalProperties": {"type": "integer"}},
        },
        "required": ["steps"],
    },
}
UNION = {
    "name": "store",
    "parameters": {
        "type": "object",
        "properties": {
            "value": {"type": ["string", "array"], "items": {"type": "integer"}, "maxItems": 3},
            "score": {"type": ["number", "null"], "minimum": 0},
            "mode": {"const": "fast"},
            "item": {"type": "string"},
        },
        "required": ["value", "score", "mode"],
    },
}
BARE = {"name": "now"}
EMPTY = {"name": "stop", "parameters": {"type": "object", "properties": {}}}
WHOLE = {
    "name": "either",
    "parameters": {
        "oneOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
}
AWKWARD = {
    "name": "odd",
    "parameters": {"type": "object", "properties": {"a <b>": {"type": "boolean"}}, "required": ["a <b>"]},
}
MANY = {
    "name": "many",
    "parameters": {
        "type": "object",
        "properties": {f"p{i}": {"type": "boolean"} for i in range(70)},
        "required": ["p3", "p69"],
    },
}
TOOLS = [SEARCH, NESTED, UNION, BARE, EMPTY, WHOLE, AWKWARD]

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "size": {"type": "number", "minimum": 0, "maximum": 9},
            "tags": {"type": "array", "items": {"enum": ["x", "y", None]}, "minItems": 1, "maxItems": 3},
            "next": {"anyOf": [{"$ref": "#/$defs/pair"}, {"type": "null"}]},
        },
        "required": ["name", "tags"],
        "additionalProperties": False,
        "$defs": {"pair": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}},
    },
    {"type": "array", "items": {"oneOf": [{"const": 1}, {"type": "string", "maxLength": 3}]}, "maxItems": 4},
    {"enum": ["yes", "no"]},
]


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load("m3-tiny")


@pytest.fixture(scope="module")
def tokenizer(tiny: Model) -> Tokenizer:
    return tiny.tokenizer


def valid(schema: Any, value: Any, root: Any) -> bool:
    """JSON schema as far as the tests use it."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return valid(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], value, root)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "number": is_number,
        "integer": is_number and value == int(value),
    }
    if kinds and not any(fits[kind] for kind in kinds):
        return False
    named = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if named is not None and not any(type(one) is type(value) and one == value for one in named):
        return False
    for word in ("anyOf", "oneOf"):
        if word in schema and not any(valid(option, value, root) for option in schema[word]):
            return False
    if is_number and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return False
    if isinstance(value, str) and len(value) > schema.get("maxLength", len(value)):
        return False
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        own = [*first, *[schema.get("items", True)] * max(0, len(value) - len(first))]
        return schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)) and all(
            valid(item, inner, root) for item, inner in zip(own, value, strict=False)
        )
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        return set(schema.get("required", [])) <= set(value) and all(
            valid(known.get(key, more), inner, root) for key, inner in value.items()
        )
    return True


def walk(
    constraint: Constraint, tokenizer: Tokenizer, seed: int, prefer: Callable[[int], bool] = lambda _: False
) -> list[int]:
    """Any tokens that are allowed, more often those that close something, up to the end."""
    generator = random.Random(seed)
    ids: list[int] = []
    closing = {NAMESPACE.encode(), b'"', b"}", b"]", b"</", b"</mm:think>"}
    while not constraint.finished:
        mask = constraint.mask()
        allowed = np.flatnonzero(mask).tolist() if mask is not None else list(range(tokenizer.vocab_size))
        assert allowed and len(ids) < 5000
        ends = [i for i in allowed if prefer(i) or i == tokenizer.eos_id or tokenizer.token_bytes(i) in closing]
        token = generator.choice(ends if ends and generator.random() < 0.5 else allowed)
        if token == tokenizer.eos_id:
            break
        constraint.accept(token)
        ids.append(token)
    return ids


@pytest.mark.parametrize("schema", SCHEMAS)
def test_json_walks_end_in_what_the_schema_says(schema: dict[str, Any], tokenizer: Tokenizer) -> None:
    seen = set()
    for seed in range(25):
        text = tokenizer.decode(walk(json_constraint(tokenizer, schema), tokenizer, seed))
        assert valid(schema, json.loads(text), schema), text
        seen.add(text)
    assert len(seen) > 1


def test_any_object(tokenizer: Tokenizer) -> None:
    for seed in range(25):
        assert isinstance(json.loads(tokenizer.decode(walk(json_constraint(tokenizer, True), tokenizer, seed))), dict)


@pytest.mark.parametrize("tool", [*TOOLS, MANY], ids=lambda tool: str(tool["name"]))
def test_tool_walks_are_read_back_as_the_schema_says(tool: dict[str, Any], tokenizer: Tokenizer) -> None:
    schema = tool.get("parameters", {})
    seen: set[str] = set()
    for seed in range(40):
        text = tokenizer.decode(walk(tool_constraint(tokenizer, [tool], "required"), tokenizer, seed))
        router = StreamRouter([tool], "disabled")
        events = router.push(text) + router.finish()
        ends = [event for event in events if isinstance(event, ToolEnd)]
        assert ends and all(end.complete for end in ends) and not any(isinstance(e, Content) for e in events), text
        for end in ends:
            assert valid(schema, end.arguments, schema), (end.arguments, text)
            known = schema.get("properties")
            assert set(end.arguments) <= set(known if known is not None else end.arguments)
            seen |= set(end.arguments)
    assert seen >= set(schema.get("properties", {})) or tool is MANY


def test_every_tool_and_several_calls_in_any_order(tokenizer: Tokenizer) -> None:
    names: list[str] = []
    longest = 0
    for seed in range(40):
        calls = parse_tool_calls(tokenizer.decode(walk(tool_constraint(tokenizer, TOOLS, "required"), tokenizer, seed)))
        names += [call.name for call in calls]
        longest = max(longest, len(calls))
    assert set(names) == {tool["name"] for tool in TOOLS} and longest > 1
    for seed in range(10):
        ids = walk(tool_constraint(tokenizer, TOOLS, "now", parallel=False), tokenizer, seed)
        assert [call.name for call in parse_tool_calls(tokenizer.decode(ids))] == ["now"]


def follow(constraint: Constraint, ids: list[int]) -> int:
    """How many of some tokens are allowed, one after the other."""
    for count, token in enumerate(ids):
        mask = constraint.mask()
        if constraint.finished or (mask is not None and not mask[token]):
            return count
        constraint.accept(token)
    return len(ids)


def call_text(name: str, fields: str) -> str:
    n = NAMESPACE
    return f'{n}<tool_call>\n{n}<invoke name="{name}">{fields}{n}</invoke>\n{n}</tool_call>'


def field(key: str, value: str) -> str:
    return f"{NAMESPACE}<{key}>{value}{NAMESPACE}</{key}>"


def test_what_a_model_writes_is_allowed_in_any_order_and_tokens(tokenizer: Tokenizer) -> None:
    text = call_text("search-files.v2", field("query", "größe\n <x>") + field("limit", "12") + field("exact", "true"))
    namespace = tokenizer.encode(NAMESPACE, special=True)
    spelled = [
        i
        for k, part in enumerate(text.split(NAMESPACE))
        for i in ([] if k == 0 else namespace) + tokenizer.encode(part)
    ]
    for ids in (tokenizer.encode(text, special=True), spelled):
        assert tokenizer.decode(ids) == text
        constraint = tool_constraint(tokenizer, TOOLS, "search-files.v2")
        assert follow(constraint, ids) == len(ids) and constraint.finished
    assert tokenizer.encode(text, special=True) != spelled


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        (field("limit", "12"), f"{NAMESPACE}</invoke>"),  # query is missing
        (field("limit", "0"), "0"),
        (field("limit", "51"), "1"),
        (field("limit", "many"), "many"),
        (field("colour", "red"), "colour"),
        (field("limit", "1") + field("limit", "2"), "limit>2"),
        (field("kind", "prose"), "prose"),
        (field("exact", "maybe"), "maybe"),
    ],
)
def test_what_no_schema_allows_is_refused(fields: str, where: str, tokenizer: Tokenizer) -> None:
    text = call_text("search-files.v2", fields)
    ids = tokenizer.encode(text, special=True)
    count = follow(tool_constraint(tokenizer, TOOLS, "required"), ids)
    at = len(tokenizer.decode(ids[:count]))
    assert text.index(where) - 1 <= at < text.index(where) + len(where) + len(NAMESPACE) + 3


def test_the_namespace_cannot_be_spelled_in_a_string(tokenizer: Tokenizer) -> None:
    """The reader of calls would take it for the end of the string."""
    head = tokenizer.encode(call_text("search-files.v2", field("query", "|")).split("|")[0], special=True)
    fake = tokenizer.encode(f"a {NAMESPACE}</query>")
    assert len(head) < follow(tool_constraint(tokenizer, TOOLS, "required"), head + fake) < len(head + fake)


def test_auto_leaves_text_free_until_a_block_begins(tokenizer: Tokenizer) -> None:
    prose = tokenizer.encode("Let me see. <tool_call> {")
    call = tokenizer.encode(call_text("now", ""), special=True)
    constraint = tool_constraint(tokenizer, TOOLS)
    for _ in range(2):
        assert constraint.mask() is None and follow(constraint, prose + call) == len(prose + call)
        assert constraint.mask() is None and not constraint.finished
    assert follow(constraint, call[:1] + prose) == 1
    one = tool_constraint(tokenizer, TOOLS, parallel=False)
    assert follow(one, prose + call) == len(prose + call) and one.finished
    nothing = tool_constraint(tokenizer, TOOLS, "none")
    assert follow(nothing, prose + call) == len(prose) and not nothing.finished


def test_auto_with_a_schema_is_either(tokenizer: Tokenizer) -> None:
    for text, allowed in (('{"a": 5}', True), (call_text("now", ""), True), ("Let me", False), ('{"b', False)):
        constraint = reply_constraint(tokenizer, tools=TOOLS, schema=SCHEMAS[0])
        assert constraint is not None
        ids = tokenizer.encode(text, special=True)
        assert (follow(constraint, ids) == len(ids) and constraint.finished) is allowed


@pytest.mark.parametrize("mode", ["enabled", "adaptive"])
def test_thinking_is_free_and_then_comes_the_answer(mode: str, tokenizer: Tokenizer) -> None:
    close = tokenizer.token_id("</mm:think>")
    thoughts = set()
    for seed in range(30):
        constraint = reply_constraint(tokenizer, schema=SCHEMAS[0], thinking=mode)
        assert constraint is not None
        text = tokenizer.decode(walk(constraint, tokenizer, seed, lambda i: i == close))
        router = StreamRouter(thinking=mode)
        events = router.push(text) + router.finish()
        assert valid(SCHEMAS[0], json.loads("".join(e.text for e in events if isinstance(e, Content))), None), text
        thoughts.add("".join(e.text for e in events if isinstance(e, Thinking)))
    assert len(thoughts) > 5


def test_a_spelled_closing_tag_ends_the_thinking_where_its_last_token_ends(tokenizer: Tokenizer) -> None:
    constraint = reply_constraint(tokenizer, schema=SCHEMAS[0], thinking="enabled")
    assert constraint is not None
    ids = tokenizer.encode("so </mm:thin < </mm:think")
    assert follow(constraint, ids) == len(ids)
    mask = constraint.mask()
    assert mask is not None and mask[tokenizer.encode(">")[0]]
    beyond = [i for i in np.flatnonzero(~mask).tolist() if tokenizer.token_bytes(i).startswith(b">")]
    assert beyond and b">" not in {tokenizer.token_bytes(i) for i in beyond}
    rest = tokenizer.encode(">") + tokenizer.encode('{"a": 1}')
    assert follow(constraint, rest) == len(rest) and constraint.finished


@pytest.mark.parametrize(("mode", "budget"), [("enabled", 0), ("enabled", 5), ("adaptive", 0), ("adaptive", 5)])
def test_a_budget_closes_the_thinking(mode: str, budget: int, tokenizer: Tokenizer) -> None:
    opening, close = (tokenizer.token_id(tag) for tag in ("<mm:think>", "</mm:think>"))
    assert opening is not None and close is not None
    word = tokenizer.encode("a")
    for answer in (None, json_constraint(tokenizer, SCHEMAS[3])):
        constraint = thinking_constraint(tokenizer, answer, mode, budget)
        assert constraint is not None
        if mode == "adaptive":
            if budget == 0:
                assert follow(constraint, [opening]) == 0
                assert follow(constraint, [close]) == 1
            else:
                assert follow(constraint, [opening]) == 1
        if mode == "enabled" or budget:
            assert follow(constraint, word * 9) == budget
            mask = constraint.mask()
            assert mask is not None and np.flatnonzero(mask).tolist() == [close]
            constraint.accept(close)
        if answer is None:
            assert constraint.mask() is None and not constraint.finished
        else:
            assert follow(constraint, tokenizer.encode('"yes"')) == len(tokenizer.encode('"yes"'))
            assert constraint.finished


def test_thinking_as_the_router_sees_it(tokenizer: Tokenizer) -> None:
    opening, close = (tokenizer.encode(tag, special=True) for tag in ("<mm:think>", "</mm:think>"))
    call = tokenizer.encode(call_text("now", ""), special=True)
    space, words = tokenizer.encode(" \n"), tokenizer.encode("some words")
    for begin in (opening + words + call[:3] + words + close, space + close, words, space + words, []):
        constraint = reply_constraint(tokenizer, tools=TOOLS, thinking="adaptive", parallel=False)
        assert constraint is not None
        assert follow(constraint, begin + call) == len(begin + call) and constraint.finished
    needed = reply_constraint(tokenizer, tools=TOOLS, choice="required", thinking="adaptive")
    assert needed is not None and follow(needed, call) == 0
    assert follow(needed, opening + words + [tokenizer.eos_id]) == len(opening + words)
    assert follow(needed, close + call) == len(close + call)


def test_nothing_asked_is_no_constraint(tokenizer: Tokenizer) -> None:
    assert reply_constraint(tokenizer) is None
    assert reply_constraint(tokenizer, thinking="adaptive") is None
    assert reply_constraint(tokenizer, thinking="disabled", budget=4) is None
    assert thinking_constraint(tokenizer, None, "enabled") is None


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "the JSON schema cannot be made a grammar: Invalid type: strin"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "#/$defs/gone"}, "'/\\$defs/gone' does not exist"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum \\(5\\) is greater than maximum \\(3\\)"),
        (
            {"type": "string", "pattern": "(?=a)b"},
            "look-around, including look-ahead and look-behind, is not supported",
        ),
        (nested(200), "the JSON schema cannot be made a grammar: recursion limit exceeded"),
        (nested(5000), "the JSON schema cannot be made a grammar: maximum recursion depth exceeded"),
        ({"type": "integer", "minimum": 10**400}, "number out of range"),
        ("object", "a JSON schema must be an object, not 'object'"),
        ({"type": "object", "properties": 3}, "properties must be an object"),
    ],
)
def test_bad_schemas_are_refused_with_a_reason(schema: Any, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=message):
        json_constraint(tokenizer, schema)


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], "required", "there are no tools"),
        (TOOLS, "nonesuch", "tool_choice names 'nonesuch', which is not among the tools"),
        ([{"name": "a<b"}], "auto", "a tool has the name 'a<b'"),
        ([{"function": {"parameters": {}}}], "auto", "a tool has the name None"),
        (["tool"], "auto", "a tool has the name None"),
        ([{"name": "t", "parameters": []}], "auto", "the parameters of the tool 't' must be a JSON schema"),
        ([{"name": "t", "parameters": {"type": "array"}}], "auto", "the tool 't': its parameters must be an object"),
        ([{"name": "t", "parameters": {"properties": 3}}], "auto", "the tool 't': properties must be an object"),
        ([{"name": "t", "parameters": {"properties": {}, "required": 3}}], "auto", "required must be a list of names"),
        ([{"name": "t", "parameters": nested(200)}], "auto", "the parameters of the tool 't' are nested too deep"),
        ([{"name": "t", "parameters": nested(5000)}], "auto", "tools may hold JSON values only: maximum recursion"),
        ([{"name": "t", "parameters": {1, 2}}], "auto", "tools may hold JSON values only"),
    ],
)
def test_bad_tools_are_refused_with_a_reason(tools: Any, choice: str, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=message):
        tool_constraint(tokenizer, tools, choice)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        {"type": "string", "pattern": "(?=a)b", "format": "what"},
        {"$ref": "#/$defs/gone"},
        {"type": "object", "properties": {"a": {"not": {}}, "b": False}, "patternProperties": 3},
        {"type": "array", "items": [{"type": "integer"}]},
        {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"required": ["a"]}]},
        {"type": "integer", "minimum": 9, "maximum": 3},
        {"enum": []},
        {"type": "integer", "minimum": 10**400},
        {"type": "number", "maximum": float("nan")},
        {"type": "array", "minItems": 10**30, "maxItems": 3},
        {"enum": [NAMESPACE]},
        {},
        True,
        3,
    ],
)
def test_a_tool_may_have_a_schema_that_nobody_knows(schema: Any, tokenizer: Tokenizer) -> None:
    tool = {"name": "t", "parameters": {"type": "object", "properties": {"x": schema}, "required": ["x"]}}
    for seed in range(5):
        text = tokenizer.decode(walk(tool_constraint(tokenizer, [tool], "required"), tokenizer, seed))
        calls = parse_tool_calls(text, [tool])
        assert calls and all(call.name == "t" and set(call.arguments) == {"x"} for call in calls), text


def test_one_grammar_serves_many_replies(tokenizer: Tokenizer) -> None:
    first, second = (tool_constraint(tokenizer, TOOLS, "now") for _ in range(2))
    ids = tokenizer.encode(call_text("now", ""), special=True)
    assert follow(first, ids) == len(ids) and first.finished and not second.finished
    assert follow(second, ids) == len(ids)


GRADE = {
    "name": "grade",
    "parameters": {
        "type": "object",
        "properties": {key: SEARCH["parameters"]["properties"][key] for key in ("limit", "kind", "exact")},  # type: ignore[index]
        "required": ["limit", "exact"],
    },
}


def test_m3_tiny_writes_what_it_is_held_to(tiny: Model) -> None:
    """Greedy and sampled, side by side with a free reply, which is the model's own."""
    engine = Engine(tiny, EngineConfig(cache_tokens=60 * BLOCK, max_requests=16, check=True))
    chat = [{"role": "user", "content": "Find the word parse in all files."}]
    # Without numbers, whose digits m3-tiny may go on with for ever.
    schema = {**SCHEMAS[1], "properties": {**SCHEMAS[1]["properties"], "size": False}}
    asks: dict[str, dict[str, Any]] = {
        "json": {"schema": schema},
        "tool": {"tools": [GRADE], "choice": "required", "parallel": False},
    }
    asked: dict[int, tuple[str, str]] = {}
    for mode in ("disabled", "adaptive", "enabled"):
        ids = tiny.tokenizer.chat(chat, tools=[GRADE], thinking=mode)
        for what, asks_for in asks.items():
            for temperature in (0.0, 1.0):
                params = SamplingParams(max_tokens=300, temperature=temperature, seed=3)
                constraint = reply_constraint(tiny.tokenizer, thinking=mode, budget=20, **asks_for)
                asked[engine.add(ids, params, constraint=constraint)] = mode, what
    free = tiny.tokenizer.encode("def main():")
    number = engine.add(free, SamplingParams(max_tokens=40, ignore_eos=True))
    done = {}
    while engine.has_work:
        done |= {n: delta.completion for n, delta in engine.step().items() if delta.completion is not None}
    assert done.pop(number).ids == list(tiny.generate(free, max_new_tokens=40))
    assert {completion.finish_reason for completion in done.values()} == {"stop"}
    for n, completion in done.items():
        mode, what = asked[n]
        router = StreamRouter([GRADE], mode)
        events = router.push(completion.text) + router.finish()
        content = "".join(event.text for event in events if isinstance(event, Content))
        if what == "json":
            assert valid(SCHEMAS[1], json.loads(content), SCHEMAS[1])
        else:
            (end,) = (event for event in events if isinstance(event, ToolEnd))
            assert end.complete and valid(GRADE["parameters"], end.arguments, None) and content == ""
            assert [event.name for event in events if isinstance(event, ToolStart)] == ["grade"]
