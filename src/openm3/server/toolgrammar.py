"""The grammar of tool calls, in llguidance's Lark-like language, out of the tools' JSON schemas.

    block:  NAMESPACE <tool_call> invoke+ NAMESPACE </tool_call>
    invoke: NAMESPACE <invoke name="..."> fields NAMESPACE </invoke>
    field:  NAMESPACE <KEY> value NAMESPACE </KEY>

Whatever a grammar allows, `tokens.toolcalls` reads back as values that the schema allows: known keys only, in any order
and each once, all that are required; numbers, booleans and listed values as such; strings as free text; objects and
arrays as tags, or as JSON text where tags cannot say it (combined schemas, free keys, keys that no tag can hold).
Lengths and patterns of strings that are no JSON text are not held to, nor is what llguidance does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from llguidance import LLMatcher

from openm3.errors import PromptError
from openm3.tokens.chat import INVOKE_NAME, TAG_NAME
from openm3.tokens.router import NAMESPACE
from openm3.tokens.tokenizer import Tokenizer
from openm3.tokens.toolcalls import Schemas, listed

JSON_SPACE = r"( |\n[ \t]{0,32})"
"""White space between the parts of JSON text: a space or an indented line. In any more, weak models get lost."""

_BITS = 60
"""Keys of an object that may come in any order: the rest of a rule's 64 bits."""

_WITHOUT_NAMESPACE = f"~/(?s:.*){re.escape(NAMESPACE)}(?s:.*)/"
_TERMINALS = rf"""
TEXT: /(?s:.*)/ & {_WITHOUT_NAMESPACE}
WORDS: /[^\s{{\[](?s:.*)/ & {_WITHOUT_NAMESPACE}
INTEGER: /-?(0|[1-9][0-9]{{0,17}})/
NUMBER: /-?(0|[1-9][0-9]{{0,17}})(\.[0-9]{{1,17}})?([eE][-+]?[0-9]{{1,2}})?/
"""
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_CONTAINERS = ("object", "array")


def block_grammar(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], *, parallel: bool, answer: str = "") -> str:
    """The grammar of one block of calls, or else of `answer`, an expression, if there is one.

    Raises PromptError for tools that cannot be called.
    """
    lark = _Lark(tokenizer)
    calls = [_invoke(lark, tool) for tool in tools]
    if not calls:
        raise PromptError("a tool is to be called, but there are no tools")
    invoke = lark.rule(" | ".join(calls))
    invokes = f"{invoke}+" if parallel else invoke
    block = lark.rule(f'{lark.tag("tool_call")} "\\n"? {invokes} {lark.tag("/tool_call")}')
    start = f"{block} | {answer}" if answer else block
    return "\n".join(["%llguidance {}", f"start: {start}", *lark.rules, _TERMINALS])


def name_of(tool: object) -> object:
    """The name of a tool in OpenAI's format, whatever it is."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return function.get("name") if isinstance(function, Mapping) else None


def _invoke(lark: _Lark, tool: Mapping[str, Any]) -> str:
    name = name_of(tool)
    if not isinstance(name, str) or not INVOKE_NAME.fullmatch(name) or NAMESPACE in name:
        raise PromptError(f"a tool has the name {name!r}: it must be 1 to 128 characters without <, > and quotes")
    parameters = tool.get("function", tool).get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise PromptError(f"the parameters of the tool {name!r} must be a JSON schema, not {parameters!r}")
    try:
        arguments = _Values(lark, parameters or {}).arguments()
    except PromptError as error:
        raise PromptError(f"the tool {name!r}: {error}") from None
    except RecursionError:
        raise PromptError(f"the parameters of the tool {name!r} are nested too deep") from None
    opening = lark.tag(f'invoke name="{name}"')
    return f'{opening} {arguments} {lark.tag("/invoke")} "\\n"?'


class _Lark:
    """Rules with names of their own, and texts as a model may write them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        namespace = tokenizer.token_id(NAMESPACE)
        if namespace is None:
            raise PromptError(f"this model's tokenizer has no token {NAMESPACE}: it cannot be made to call tools")
        self._namespace = f"<[{namespace}]>"
        self._tokenizer = tokenizer
        self.rules: list[str] = []
        self._count = 0

    def name(self) -> str:
        self._count += 1
        return f"r{self._count}"

    def rule(self, expression: str) -> str:
        """The name of a new rule."""
        name = self.name()
        self.rules.append(f"{name}: {expression}")
        return name

    def text(self, text: str) -> str:
        """Just this text; what there is a control token for may be that token, or be spelled."""
        ids, controls = self._tokenizer.encode(text, special=True), self._tokenizer.special_ids
        parts = []
        for is_control, run in groupby(ids, controls.__contains__):
            for part in ([id_] for id_ in run) if is_control else [list(run)]:
                spelled = json.dumps(self._tokenizer.decode(part), ensure_ascii=False)
                parts.append(f"(<[{part[0]}]> | {spelled})" if is_control else spelled)
        return " ".join(parts) or '""'

    def tag(self, tag: str) -> str:
        return f"{self._namespace} {self.text(f'<{tag}>')}"

    def field(self, key: str, value: str) -> str:
        return f"{self.tag(key)} {value} {self.tag(f'/{key}')}"


class _Values:
    """The texts of one tool's arguments, by its schema `root`."""

    def __init__(self, lark: _Lark, root: Mapping[str, Any]) -> None:
        self._lark = lark
        self._root = root
        self._schemas = Schemas(root)
        self._known: dict[tuple[int, str], str] = {}

    def arguments(self) -> str:
        """All that stands in an `<invoke>`: fields, or one JSON object."""
        options = [option for option in self._schemas.options(self._root) if _speaks(option)]
        if wrong := self._schemas.types(self._root) - {"object"}:
            raise PromptError(f"its parameters must be an object, not {' or '.join(sorted(wrong))}")
        if not options:
            return '""'
        if len(options) > 1:
            return self._json({**self._root, "type": "object"}, {"object"})
        (option,) = options
        if self._needs_json(option, "object"):
            return self._json({"additionalProperties": False, **option}, {"object"})
        fields = self._fields(option)
        has_any = option.get("additionalProperties", "properties" not in option)
        return f"({fields} | {self._json(option, {'object'})})" if has_any and not _properties(option) else fields

    def _value(self, schema: object) -> str:
        """The rule of a value's text."""
        known = id(schema), ""
        if known not in self._known:
            # Named before it is made: schemas may refer to themselves.
            self._known[known] = name = self._lark.name()
            self._lark.rules.append(f"{name}: {' | '.join(self._texts(schema))}")
        return self._known[known]

    def _texts(self, schema: object) -> list[str]:
        options = [option for option in self._schemas.options(schema) if _speaks(option)]
        types = self._schemas.types(schema)
        texts: dict[str, None] = {}
        containers = []
        for option in options:
            if values := listed(option):
                texts |= dict.fromkeys(self._listed(values, types))
                continue
            for kind in sorted(self._schemas.types(option)):
                if kind in _CONTAINERS:
                    containers.append((option, kind))
                else:
                    texts[self._scalar(option, kind, types)] = None
        # Schemas without a type of their own restrict the others in ways that tags cannot say.
        is_plain = len(containers) == 1 and all(self._schemas.types(option) for option in options)
        if is_plain and not self._needs_json(*containers[0]):
            texts[self._container(*containers[0])] = None
        elif containers:
            texts[self._json(schema, types)] = None
        return list(texts) or ["TEXT"]

    def _listed(self, values: Sequence[Any], types: set[str]) -> list[str]:
        """Values that a schema names, as far as they can be read back."""
        if types == {"string"}:
            values = [value for value in values if isinstance(value, str)]
        texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        return [self._lark.text(text) for text in texts if NAMESPACE not in text]

    def _scalar(self, option: Mapping[str, Any], kind: str, types: set[str]) -> str:
        if kind == "null":
            return '"null"'
        if kind == "boolean":
            return '"true" | "false"'
        if kind in ("integer", "number"):
            bounds = {name: option[name] for name in _BOUNDS if name in option}
            return self._json({"type": kind, **bounds}, {kind}) if bounds else kind.upper()
        # Beside objects and arrays, what begins like one is read as one.
        return "WORDS" if types.intersection(_CONTAINERS) else "TEXT"

    def _container(self, option: Mapping[str, Any], kind: str) -> str:
        known = id(option), kind
        if known not in self._known:
            self._known[known] = name = self._lark.name()
            text = self._items(option) if kind == "array" else self._object(option)
            self._lark.rules.append(f"{name}: {text}")
        return self._known[known]

    def _needs_json(self, option: Mapping[str, Any], kind: str) -> bool:
        """Whether tags cannot say, or the reader of tags cannot know, what the schema of a container says."""
        if kind == "array":
            return "prefixItems" in option or not isinstance(option.get("items", True), Mapping | bool)
        keys = {*_properties(option), *_required(option)}
        return keys == {"item"} or not all(TAG_NAME.fullmatch(key) for key in keys)

    def _items(self, option: Mapping[str, Any]) -> str:
        least, most = (_count(option.get(name)) for name in ("minItems", "maxItems"))
        items = option.get("items", True)
        if most == 0 or items is False:
            return '"[]"'
        item = self._lark.rule(self._lark.field("item", self._value(items)))
        tags = f"{item}{{{max(least or 0, 1)},{'' if most is None else most}}}"
        return tags if least else f'"[]" | {tags}'

    def _object(self, option: Mapping[str, Any]) -> str:
        if not _properties(option):
            return self._json(option, {"object"})
        return self._fields(option) if _required(option) else f'"{{}}" | {self._fields(option)}'

    def _fields(self, option: Mapping[str, Any]) -> str:
        """Fields in any order, each once, the required ones all there."""
        properties, required = _properties(option), _required(option)
        properties |= {key: True for key in required if key not in properties}
        keys = [key for key, schema in properties.items() if schema is not False]
        fields = {key: self._lark.rule(self._lark.field(key, self._value(properties[key]))) for key in keys}
        if not keys:
            return '""'
        if len(keys) > _BITS:
            return self._lark.rule(" ".join(fields[key] if key in required else f"{fields[key]}?" for key in keys))
        keys.sort(key=lambda key: key not in required)
        name = self._lark.name()
        least = sum(key in required for key in keys)
        choices = [f'""{f" %if is_ones([0:{least}])" if least else ""}']
        choices += [f"{fields[key]} {name}::set_bit({i}) %if bit_clear({i})" for i, key in enumerate(keys)]
        self._lark.rules.append(f"{name}::_: " + "\n | ".join(choices))
        return f"{name}::0"

    def _json(self, schema: object, types: set[str]) -> str:
        """A value as JSON text; just of these types where llguidance cannot hold to the schema."""
        definitions = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
        whole = {**definitions, **schema} if isinstance(schema, Mapping) else {}
        for tried in (whole, {"type": sorted(types)}):
            written = json.dumps({**tried, "x-guidance": {"lenient": True, "whitespace_pattern": JSON_SPACE}})
            # Numbers and surrogates that Python reads and JSON has not are a ValueError.
            with suppress(ValueError):
                if not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(written)):
                    return self._lark.rule(f"%json {written}")
        return "TEXT"


def _speaks(option: Mapping[str, Any]) -> bool:
    """Whether a schema says something itself, beside what it refers to or combines."""
    return not option.keys().isdisjoint(("type", "properties", "items", "enum", "const", "required"))


def _properties(option: Mapping[str, Any]) -> dict[str, Any]:
    properties = option.get("properties", {})
    if not isinstance(properties, Mapping):
        raise PromptError(f"properties must be an object of JSON schemas, not {properties!r}")
    return dict(properties)


def _required(option: Mapping[str, Any]) -> list[str]:
    required = option.get("required", [])
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise PromptError(f"required must be a list of names, not {required!r}")
    return list(dict.fromkeys(required))


def _count(value: object) -> int | None:
    """A number of items, if it is one that can be counted to."""
    return value if isinstance(value, int) and 0 <= value < 2**31 else None
