"""What a reply must look like, as a constraint that the engine draws tokens by: JSON, tool calls, thinking before them.

Grammars are llguidance's rather than xgrammar's. Both are maintained, serve in large engines and give a mask of the
vocabulary for each token. llguidance is one wheel of Rust without dependencies, where xgrammar 0.2 asks for torch,
transformers and triton. It works masks out while the reply is written, so that a new schema costs milliseconds before
the first token, where xgrammar prepares masks when it compiles a grammar. Its language has what M3's calls need:
control tokens in rules, JSON schemas within grammars, complements of regular expressions, fields in any order.

Making a constraint may take some milliseconds the first time a schema is seen: not to be done in an event loop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from openm3.engine.constraint import Constraint
from openm3.errors import PromptError
from openm3.server.toolgrammar import JSON_SPACE, block_grammar, name_of
from openm3.tokens.router import NAMESPACE
from openm3.tokens.tokenizer import Tokenizer

Schema = Mapping[str, Any] | Literal[True]
"""A JSON schema, or True for any JSON object."""

_OPEN, _CLOSE = b"<mm:think>", b"</mm:think>"
_JSON_OPTIONS = {"whitespace_pattern": JSON_SPACE, "coerce_one_of": True}
# What llguidance says of errors is also shown to clients: nobody wants its parser's state there.
_LIMITS = LLParserLimits(verbose_errors=False)


def json_constraint(tokenizer: Tokenizer, schema: Schema) -> Constraint:
    """JSON text that the schema allows, any object if it is True, and nothing beside it.

    Properties come in the schema's order; `oneOf` is taken as `anyOf`. Raises PromptError for a schema that is wrong or
    says what llguidance does not know.
    """
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps({**_checked(schema), "x-guidance": _JSON_OPTIONS}))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"the JSON schema cannot be made a grammar: {error}") from None
    return _Matching(tokenizer, _compiled(tokenizer, grammar, "the JSON schema"))


def tool_constraint(
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]],
    choice: str = "auto",
    parallel: bool = True,
    *,
    schema: Schema | None = None,
) -> Constraint:
    """Calls in M3's grammar, of known tools with arguments that their schemas allow, as `toolgrammar` says.

    `choice` "required", or the name of a tool, is a reply of one block with at least one call. With "auto" the reply is
    free until a block begins, or else JSON by `schema`; "none" keeps blocks from beginning. Without `parallel` there is
    one call at most. `tools` are in OpenAI's format. Raises PromptError for tools that cannot be called, and a choice
    that is not among them.
    """
    if choice == "none":
        return _NoTools(tokenizer)
    if choice not in ("auto", "required"):
        named = [tool for tool in tools if name_of(tool) == choice]
        if not named:
            raise PromptError(f"tool_choice names {choice!r}, which is not among the tools")
        tools = named
    answer = None
    if schema is not None and choice == "auto":
        json_constraint(tokenizer, schema)  # says what is wrong with it
        answer = {**_checked(schema), "x-guidance": _JSON_OPTIONS}
    try:
        written = json.dumps([list(tools), answer])
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"tools may hold JSON values only: {error}") from None
    matcher = _tool_matcher(tokenizer, written, parallel)
    if choice == "auto" and answer is None:
        return _ToolsAtWill(tokenizer, matcher, parallel)
    return _Matching(tokenizer, matcher)


def thinking_constraint(
    tokenizer: Tokenizer, answer: Constraint | None, thinking: str, budget: int | None = None
) -> Constraint | None:
    """Thinking as free text, up to `budget` tokens of it, and then the answer; None if that is any text.

    `thinking` is the mode that the prompt was made with. If there must be an answer, the reply does not end within the
    thinking, and begins with one of the think tags where that is left to the model.
    """
    if thinking == "disabled" or (answer is None and budget is None):
        return answer
    return _Thinking(tokenizer, answer, thinking == "enabled", budget)


def reply_constraint(
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    choice: str = "auto",
    parallel: bool = True,
    schema: Schema | None = None,
    thinking: str = "disabled",
    budget: int | None = None,
) -> Constraint | None:
    """All of the above for one reply; None if it is free. Raises as they do."""
    answer: Constraint | None = None
    if schema is not None and (not tools or choice == "none"):
        answer = json_constraint(tokenizer, schema)
    elif tools or choice not in ("auto", "none"):
        answer = tool_constraint(tokenizer, tools, choice, parallel, schema=schema)
    return thinking_constraint(tokenizer, answer, thinking, budget)


def _checked(schema: object) -> dict[str, Any]:
    if schema is True:
        return {"type": "object"}
    if not isinstance(schema, Mapping):
        raise PromptError(f"a JSON schema must be an object, not {schema!r}")
    return {key: value for key, value in schema.items() if key != "x-guidance"}


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=tokenizer.vocab_size)


@lru_cache(maxsize=64)
def _compiled(tokenizer: Tokenizer, grammar: str, what: str) -> LLMatcher:
    matcher = LLMatcher(_vocabulary(tokenizer), grammar, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        # Without the lines that show a part of the grammar.
        error = [line.strip() for line in matcher.get_error().splitlines() if " | " not in line]
        raise PromptError(f"{what} cannot be made a grammar: {' '.join(error)}")
    return matcher


@lru_cache(maxsize=64)
def _tool_matcher(tokenizer: Tokenizer, written: str, parallel: bool) -> LLMatcher:
    tools, answer = json.loads(written)
    rule = "" if answer is None else f"%json {json.dumps(answer, ensure_ascii=False)}"
    grammar = block_grammar(tokenizer, tools, parallel=parallel, answer=rule)
    return _compiled(tokenizer, grammar, "the tools' parameters")


class _Matching:
    """What a grammar allows; `matcher` is at its beginning, and stays there."""

    def __init__(self, tokenizer: Tokenizer, matcher: LLMatcher) -> None:
        self._vocab_size = tokenizer.vocab_size
        self._matcher = matcher.deep_copy()

    def mask(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed: NDArray[np.bool_] = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        return allowed

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(self._matcher.get_error().strip())


class _ToolsAtWill:
    """Any text, and blocks of calls by a grammar; without `parallel` the reply ends behind one."""

    def __init__(self, tokenizer: Tokenizer, matcher: LLMatcher, parallel: bool) -> None:
        self._tokenizer = tokenizer
        self._begin = tokenizer.token_id(NAMESPACE)
        self._matcher = matcher
        self._parallel = parallel
        self._block: _Matching | None = None
        self.finished = False

    def mask(self) -> NDArray[np.bool_] | None:
        return None if self._block is None else self._block.mask()

    def accept(self, token: int) -> None:
        if self._block is None and token == self._begin:
            self._block = _Matching(self._tokenizer, self._matcher)
        if self._block is not None:
            self._block.accept(token)
            if self._block.finished:
                self._block, self.finished = None, not self._parallel


class _NoTools:
    """Any text without the token that calls begin with."""

    finished = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        begin = tokenizer.token_id(NAMESPACE)
        self._allowed = None if begin is None else _all_but(tokenizer, begin)

    def mask(self) -> NDArray[np.bool_] | None:
        return self._allowed

    def accept(self, token: int) -> None:
        pass


class _Thinking:
    """Where a reply stands: at its start, in its thinking or in its answer, seen as `tokens.router` sees it."""

    def __init__(self, tokenizer: Tokenizer, answer: Constraint | None, is_open: bool, budget: int | None) -> None:
        self._tokenizer = tokenizer
        self._answer = answer
        self._budget = budget
        self._place: Literal["start", "thinking", "answer"] = "thinking" if is_open else "start"
        first = None if answer is None else answer.mask()
        self._obliges = first is not None and not first[tokenizer.eos_id]
        self._open = tokenizer.token_id(_OPEN.decode())
        close = tokenizer.token_id(_CLOSE.decode())
        self._closing = tokenizer.encode(_CLOSE.decode()) if close is None else [close]
        self._closed = 0
        self._count = 0
        self._text = b""
        self._waiting: list[int] = []
        # The text of a control token is thought as any other; the tokens themselves would end the reply, or worse.
        self._thoughts = _all_but(tokenizer, *tokenizer.special_ids - {close}) if self._obliges else None
        self._beyond = _tokens_beyond(tokenizer) if self._obliges else []

    def mask(self) -> NDArray[np.bool_] | None:
        if self._place == "answer":
            return None if self._answer is None else self._answer.mask()
        if self._place == "start":
            return self._at_start()
        if self._budget is not None and self._count >= self._budget:
            return _only(self._tokenizer, self._closing[self._closed])
        if self._thoughts is None:
            return None
        known = next((n for n in range(len(_CLOSE) - 1, 0, -1) if self._text.endswith(_CLOSE[:n])), 0)
        return self._thoughts & ~self._beyond[known] if known else self._thoughts

    def accept(self, token: int) -> None:
        if self._place == "answer":
            if self._answer is not None:
                self._answer.accept(token)
            return
        self._text += self._tokenizer.token_bytes(token)
        if self._place == "start":
            self._waiting.append(token)
            self._leave_start()
        else:
            forced = self._budget is not None and self._count >= self._budget
            self._closed += forced
            self._count += not forced
        if self._place == "thinking" and _CLOSE in self._text:
            self._place = "answer"
        self._text = self._text[1 - len(_CLOSE) :] if self._place == "thinking" else self._text

    @property
    def finished(self) -> bool:
        return self._place == "answer" and self._answer is not None and self._answer.finished

    def _at_start(self) -> NDArray[np.bool_] | None:
        is_over = self._budget == 0
        if self._obliges:
            tags = self._closing[:1] if is_over or self._open is None else [self._open, self._closing[0]]
            return _only(self._tokenizer, *tags)
        return _all_but(self._tokenizer, self._open) if is_over and self._open is not None else None

    def _leave_start(self) -> None:
        """A tag may follow white space; other text begins the answer."""
        text = self._text.lstrip()
        if text.startswith(_OPEN):
            self._place, self._text = "thinking", text[len(_OPEN) :]
        elif text.startswith(_CLOSE):
            self._place = "answer"
        elif not _OPEN.startswith(text) and not _CLOSE.startswith(text):
            self._place = "answer"
            if self._answer is not None:
                for token in self._waiting:
                    self._answer.accept(token)


def _only(tokenizer: Tokenizer, *ids: int) -> NDArray[np.bool_]:
    allowed = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
    allowed[list(ids)] = True
    return allowed


def _all_but(tokenizer: Tokenizer, *ids: int | None) -> NDArray[np.bool_]:
    return ~_only(tokenizer, *(id_ for id_ in ids if id_ is not None))


@lru_cache(maxsize=4)
def _tokens_beyond(tokenizer: Tokenizer) -> list[NDArray[np.bool_]]:
    """Tokens that go on behind the closing tag, where an answer must begin, for each length of it that came before."""
    tokens = [(id_, text) for id_ in range(tokenizer.vocab_size) if b">" in (text := tokenizer.token_bytes(id_))]
    rests = [_CLOSE[known:] for known in range(len(_CLOSE))]
    return [_only(tokenizer, *(i for i, text in tokens if text.startswith(rest) and text != rest)) for rest in rests]
