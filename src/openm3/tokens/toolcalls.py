"""The arguments of one tool call: from tagged text to JSON values of the types that the tool's schema names.

`CallBuilder` is fed the tags and texts of one `<invoke>` and gives the arguments back twice: as JSON text that grows
while the model writes, and as a dict at the end. Knows nothing of how tags are found in a stream.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_DEPTH = 64
"""Values nested deeper than this stay text."""

_ORDER = ("null", "boolean", "integer", "number", "object", "array", "string")


@dataclass
class _Open:
    """A tag that is open: what came inside it so far."""

    key: str
    schema: object
    verbatim: bool = False
    text: list[str] = field(default_factory=list)
    children: list[tuple[str, Any]] = field(default_factory=list)


class CallBuilder:
    """Builds the arguments of one call to a tool with the JSON schema `parameters` (None: unknown).

    Each method returns the JSON text that it completed. An argument whose schema says string comes as it is written,
    any other one when its tag closes. An argument that comes twice counts as it came last. Nothing raises: text beside
    tags goes to the key "$text", a closing tag that nothing opened names the text before it, other tags out of place
    are text, and `finish` closes what is open.
    """

    def __init__(self, parameters: Mapping[str, Any] | None) -> None:
        self._schemas = Schemas(parameters or {})
        self._stack = [_Open("", parameters or {})]
        self._arguments: dict[str, Any] = {}
        self._json_opened = False

    @property
    def verbatim_key(self) -> str | None:
        """The name of the open tag if its value is a string, in which only its own closing tag counts; else None."""
        return self._stack[-1].key if self._stack[-1].verbatim else None

    def has_open(self, key: str) -> bool:
        return any(tag.key == key for tag in self._stack[1:])

    def add_text(self, text: str) -> str:
        tag = self._stack[-1]
        tag.text.append(text)
        return _escaped(text) if tag.verbatim and len(self._stack) == 2 else ""

    def open_tag(self, key: str, source: str) -> str:
        """`source` is the tag as it was written."""
        if len(self._stack) > MAX_DEPTH:
            return self.add_text(source)
        schema = self._schemas.child(self._stack[-1].schema, key)
        tag = _Open(key, schema, verbatim=self._schemas.types(schema) == {"string"})
        self._stack.append(tag)
        return self._member(key) + '"' if tag.verbatim and len(self._stack) == 2 else ""

    def close_tag(self, key: str, source: str) -> str:
        if self.has_open(key):
            written = ""
            while self._stack[-1].key != key:
                written += self._close()
            return written + self._close()
        root = self._stack[0]
        if len(self._stack) > 1 or not "".join(root.text).strip():
            return self.add_text(source)
        text, root.text = "".join(root.text), []
        return self.open_tag(key, "") + self.add_text(text) + self._close()

    def finish(self) -> tuple[str, dict[str, Any]]:
        """The last JSON text and all arguments."""
        written = ""
        while len(self._stack) > 1:
            written += self._close()
        rest = "".join(self._stack[0].text)
        if rest.strip():
            whole = None if self._arguments else _literal_or_none(rest)
            for key, value in (whole if isinstance(whole, dict) else {"$text": rest}).items():
                written += self._argument(key, value)
        return written + ("}" if self._json_opened else "{}"), self._arguments

    def _close(self) -> str:
        tag = self._stack.pop()
        value = "".join(tag.text) if tag.verbatim else self._schemas.value(tag.schema, "".join(tag.text), tag.children)
        if len(self._stack) > 1:
            self._stack[-1].children.append((tag.key, value))
            return ""
        if tag.verbatim:
            self._arguments[tag.key] = value
            return '"'
        return self._argument(tag.key, value)

    def _argument(self, key: str, value: Any) -> str:
        self._arguments[key] = value
        return self._member(key) + json.dumps(value, ensure_ascii=False)

    def _member(self, key: str) -> str:
        opening, self._json_opened = (", " if self._json_opened else "{"), True
        return f"{opening}{json.dumps(key, ensure_ascii=False)}: "


class Schemas:
    """What a JSON schema says of a value: the few keywords that decide how its text is read."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root

    def child(self, schema: object, key: str) -> object:
        """The schema of what stands in the tag `key`, {} if nothing is said."""
        found = []
        for option in self.options(schema):
            properties, items = option.get("properties"), option.get("items")
            if isinstance(properties, Mapping) and key in properties:
                found.append(properties[key])
            elif key == "item" and isinstance(items, Mapping):
                found.append(items)
            elif isinstance(option.get("additionalProperties"), Mapping):
                found.append(option["additionalProperties"])
        return {"anyOf": found}

    def types(self, schema: object) -> set[str]:
        """The JSON types that a value may have, empty if nothing is said."""
        found: set[str] = set()
        for option in self.options(schema):
            named = option.get("type")
            if isinstance(named, str):
                found.add(named)
            elif isinstance(named, list):
                found |= {name for name in named if isinstance(name, str)}
            elif "properties" in option:
                found.add("object")
            elif "items" in option:
                found.add("array")
            else:
                found |= {_type_of(value) for value in listed(option)}
        return found

    def value(self, schema: object, text: str, children: list[tuple[str, Any]]) -> Any:
        """The value of a closed tag."""
        types = self.types(schema)
        if not children:
            return self._text_value(schema, types, text)
        if (
            all(key == "item" for key, _ in children)
            and not text.strip()
            and ("array" in types or "object" not in types)
        ):
            return [value for _, value in children]
        repeated: dict[str, list[Any]] = {}
        for key, value in children + ([("$text", text)] if text.strip() else []):
            repeated.setdefault(key, []).append(value)
        return {key: values[0] if len(values) == 1 else values for key, values in repeated.items()}

    def _text_value(self, schema: object, types: set[str], text: str) -> Any:
        if any(text == value for option in self.options(schema) for value in listed(option)):
            return text
        literal = _literal_or_none(text)
        for name in _ORDER:
            if name in types:
                fits, value = _as_type(name, text, literal)
                if fits:
                    return value
        if isinstance(literal, str) or (literal is None and text.strip() != "null"):
            return text
        return literal

    def options(self, schema: object) -> Iterator[Mapping[str, Any]]:
        """The schema and all that it refers to or combines, 256 at most."""
        todo = [schema]
        for _ in range(256):  # references may be circular
            if not todo:
                return
            option = todo.pop(0)
            if isinstance(option, Mapping):
                yield option
                todo += [self._referred(option["$ref"])] if "$ref" in option else []
                for keyword in ("anyOf", "oneOf", "allOf"):
                    todo += option[keyword] if isinstance(option.get(keyword), list) else []

    def _referred(self, reference: object) -> object:
        target: object = self._root
        for part in str(reference).removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, Mapping) else None
        return target


def listed(option: Mapping[str, Any]) -> list[Any]:
    """The values that a schema names, if it names them."""
    values = option.get("enum")
    return values if isinstance(values, list) else [option["const"]] if "const" in option else []


def _type_of(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
    return names.get(type(value), "null")


def _as_type(name: str, text: str, literal: Any) -> tuple[bool, Any]:
    """Whether `text` can be read as the JSON type `name`, and its value then."""
    word = text.strip().lower()
    if name == "string":
        return True, text
    if name == "null":
        return word == "null", None
    if name == "boolean":
        return word in ("true", "false"), word == "true"
    if name in ("object", "array"):
        kind: type = dict if name == "object" else list
        return isinstance(literal, kind) or not word, literal if word else kind()
    is_number = isinstance(literal, int | float) and not isinstance(literal, bool)
    if name == "integer" and isinstance(literal, float):
        return literal.is_integer(), int(literal)
    return is_number, literal


def _literal_or_none(text: str) -> Any:
    """`text` parsed as strict JSON, None if it is none: then also not a number beyond float or nested too deep."""
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _contents(outer)]
    return None if level else value


def _contents(value: object) -> list[Any]:
    return value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no JSON number")
    return value


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
