"""Values of tool arguments: text read by the tool's schema."""

from typing import Any

import pytest

from openm3.tokens.toolcalls import CallBuilder

STRING, INTEGER, NUMBER, BOOLEAN = ({"type": name} for name in ("string", "integer", "number", "boolean"))


def read(text: str, schema: Any, **definitions: Any) -> Any:
    """The value of an argument `x` with this schema and text."""
    builder = CallBuilder({"properties": {"x": schema}, "$defs": definitions})
    builder.open_tag("x", "")
    builder.add_text(text)
    builder.close_tag("x", "")
    return builder.finish()[1]["x"]


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (STRING, "1", "1"),
        (STRING, "null", "null"),
        (STRING, " true\n", " true\n"),
        (STRING, '{"a": 1}', '{"a": 1}'),
        (INTEGER, "1", 1),
        (INTEGER, " -7 ", -7),
        (INTEGER, "2.0", 2),
        (INTEGER, "2.5", 2.5),
        (INTEGER, "seven", "seven"),
        (INTEGER, "true", True),
        (NUMBER, "1", 1),
        (NUMBER, "1e3", 1000.0),
        (NUMBER, "1e999", "1e999"),
        (BOOLEAN, "true", True),
        (BOOLEAN, "False", False),
        (BOOLEAN, "yes", "yes"),
        (BOOLEAN, "1", 1),
        ({"type": "null"}, "null", None),
        ({"type": "object"}, '{"a": [1, null]}', {"a": [1, None]}),
        ({"type": "object"}, "", {}),
        ({"type": "object"}, "[1]", [1]),
        ({"type": "array"}, "[1]", [1]),
        ({"type": "array"}, " ", []),
        ({"type": "array"}, "a, b", "a, b"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "integer"]}, "1", 1),
        ({"type": ["string", "integer"]}, "1x", "1x"),
        ({"anyOf": [{"type": "null"}, STRING]}, "null", None),
        ({"anyOf": [{"type": "null"}, STRING]}, "x", "x"),
        ({"oneOf": [INTEGER, BOOLEAN]}, "true", True),
        ({"allOf": [STRING]}, "1", "1"),
        ({"enum": ["1", 2]}, "1", "1"),
        ({"enum": ["1", 2]}, "2", 2),
        ({"enum": ["a", "b"]}, "1", "1"),
        ({"const": "1"}, "1", "1"),
        ({"const": 1}, "1", 1),
        ({"$ref": "#/$defs/Name"}, "1", "1"),
        ({"$ref": "#/$defs/Loop"}, "1", 1),
        ({"$ref": "#/$defs/Missing"}, "1", 1),
        ({"$ref": 3}, "1", 1),
        ({}, "1", 1),
        ({}, "null", None),
        ({}, "true", True),
        ({}, "[1, 2]", [1, 2]),
        ({}, '"quoted"', '"quoted"'),
        ({}, "True", "True"),
        ({}, "NaN", "NaN"),
        ({}, "", ""),
        (True, "1", 1),
        ({"type": "text"}, "1", 1),
        ({"type": 3}, "1", 1),
        ({"enum": 3}, "1", 1),
    ],
)
def test_text_is_read_by_the_schema(schema: Any, text: str, value: object) -> None:
    result = read(text, schema, Name=STRING, Loop={"anyOf": [{"$ref": "#/$defs/Loop"}]})
    assert result == value
    assert type(result) is type(value)


def build(parameters: Any, *tags: str) -> dict[str, Any]:
    """Arguments from tags written as <a>, </a>, other strings being text."""
    builder = CallBuilder(parameters)
    for tag in tags:
        if tag.startswith("</"):
            builder.close_tag(tag[2:-1], tag)
        elif tag.startswith("<"):
            builder.open_tag(tag[1:-1], tag)
        else:
            builder.add_text(tag)
    return builder.finish()[1]


NESTED = ("<a>", "<item>", "<n>", "1", "</n>", "</item>", "<item>", "<n>", "2", "</n>", "</item>", "</a>")


def test_types_reach_into_objects_and_arrays() -> None:
    assert build(None, *NESTED) == {"a": [{"n": 1}, {"n": 2}]}
    names = {"type": "array", "items": {"properties": {"n": STRING}}}
    assert build({"properties": {"a": names}}, *NESTED) == {"a": [{"n": "1"}, {"n": "2"}]}
    maps = {"additionalProperties": {"additionalProperties": STRING}}
    assert build(maps, "<a>", "<n>", "1", "</n>", "</a>") == {"a": {"n": "1"}}


def test_item_is_an_ordinary_name_where_the_schema_says_object() -> None:
    tags = ("<a>", "<item>", "1", "</item>", "</a>")
    assert build(None, *tags) == {"a": [1]}
    assert build({"properties": {"a": {"type": "object"}}}, *tags) == {"a": {"item": 1}}
    assert build({"properties": {"a": {"type": ["object", "array"]}}}, *tags) == {"a": [1]}


def test_one_of_several_shapes() -> None:
    shapes = {"anyOf": [{"type": "array", "items": STRING}, {"properties": {"n": STRING}}, {"type": "null"}]}
    parameters = {"properties": {"a": shapes}}
    assert build(parameters, "<a>", "<item>", "1", "</item>", "</a>") == {"a": ["1"]}
    assert build(parameters, "<a>", "<n>", "1", "</n>", "</a>") == {"a": {"n": "1"}}
    assert build(parameters, "<a>", "null", "</a>") == {"a": None}


def test_repeated_names_inside_a_value_are_all_kept() -> None:
    assert build(None, "<a>", "<n>", "1", "</n>", "<n>", "2", "</n>", "</a>") == {"a": {"n": [1, 2]}}


def test_a_repeated_argument_counts_as_it_came_last() -> None:
    assert build(None, "<a>", "1", "</a>", "<a>", "2", "</a>") == {"a": 2}


def test_closing_an_outer_tag_closes_the_inner_ones() -> None:
    assert build(None, "<a>", "<b>", "<c>", "1", "</a>", "<d>", "2") == {"a": {"b": {"c": 1}}, "d": 2}


def test_deeply_nested_json_stays_text() -> None:
    text = "[" * 60 + "]" * 60
    assert str(read(text, {"type": "array"})) == text
    for depth in (65, 500):
        text = "[" * depth + "]" * depth
        assert read(text, {"type": "array"}) == text


def test_nesting_beyond_the_limit_stays_text() -> None:
    value = build(None, *["<a>"] * 100)["a"]
    depth = 0
    while isinstance(value, dict):
        value, depth = value["a"], depth + 1
    assert (depth, value) == (63, "<a>" * 36)
