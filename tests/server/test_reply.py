"""Deltas to events: stop strings, finish reasons, thinking tokens, calls nobody asked for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from openm3.engine.request import Completion, Delta, FinishReason, Logprob, SamplingParams, Timings, Usage
from openm3.model.model import Model
from openm3.server.calls import Call, Event, Finished, Looked, Progress, PromptScores, Scores
from openm3.server.reply import ReplyEvents
from openm3.tokens import Content, Thinking, ToolArguments, ToolEnd, ToolStart

MESSAGES = ({"role": "user", "content": "Hi"},)
TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {}}},)
NS = "]<]minimax[>["
CALL = f'{NS}<tool_call>\n{NS}<invoke name="f">{NS}<x>1{NS}</x>{NS}</invoke>\n{NS}</tool_call>'
TWO = CALL.replace(f"\n{NS}</tool_call>", f'\n{NS}<invoke name="f">{NS}</invoke>\n{NS}</tool_call>')


def ending(model: Model, text: str, reason: FinishReason = "stop", *, cut: str = "") -> list[Delta]:
    """A reply as an engine tells it, a token a delta; `cut` is the stop string behind it."""
    tokenizer = model.tokenizer
    ids = tokenizer.encode(text + cut, special=True)
    decoder = tokenizer.decoder()
    texts = [decoder.push(i) for i in ids]
    deltas = [Delta([i], part) for i, part in zip(ids, texts, strict=True)]
    if cut:
        deltas = [*deltas[:-1], Delta(deltas[-1].ids, "")]
        assert "".join(delta.text for delta in deltas) == text, "the stop string must be one token"
    completion = Completion(ids, text, reason, Usage(3, 0, len(ids) + 1), Timings(0, 0, 0))
    return [*deltas, Delta([], "", reason, completion)]


def told(model: Model, call: Call, deltas: list[Delta]) -> list[Event]:
    events = ReplyEvents(call, model.tokenizer)
    return [event for delta in deltas for event in events.take(delta)]


def text_of(events: list[Event], kind: type) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))  # type: ignore[attr-defined]


def last(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def test_a_bare_prompt_has_content_alone(model: Model) -> None:
    text = f"<mm:think>a</mm:think>b{CALL}"
    events = told(model, Call(prompt="x"), ending(model, text))
    assert text_of(events, Content) == text
    assert last(events) == Finished("stop", Usage(3, 0, len(model.tokenizer.encode(text, special=True)) + 1))


@pytest.mark.parametrize("thinking", ["adaptive", "enabled"])
def test_thinking_and_its_tokens_are_told_apart(model: Model, thinking: Any) -> None:
    text = ("<mm:think>" if thinking == "adaptive" else "") + "I think so.</mm:think>It is."
    events = told(model, Call(messages=MESSAGES, thinking=thinking), ending(model, text))
    assert text_of(events, Thinking) == "I think so." and text_of(events, Content) == "It is."
    ids = model.tokenizer.encode(text, special=True)
    end = model.tokenizer.token_id("</mm:think>")
    assert end is not None and last(events).thinking_tokens == ids.index(end) + 1


def test_thinking_counts_the_same_in_one_delta(model: Model) -> None:
    *deltas, end = ending(model, "<mm:think>I think so.</mm:think>It is.")
    one = Delta([i for delta in deltas for i in delta.ids], "".join(delta.text for delta in deltas))
    apart, together = (last(told(model, Call(messages=MESSAGES), [*d, end])) for d in (deltas, [one]))
    assert apart == together and apart.thinking_tokens > 3


@pytest.mark.parametrize(("text", "count"), [("Yes.", 0), ("</mm:think>Yes.", 0), ("<mm:think>", 0)])
def test_who_thinks_nothing_has_no_thinking_tokens(model: Model, text: str, count: int) -> None:
    assert last(told(model, Call(messages=MESSAGES), ending(model, text))).thinking_tokens == count


def test_a_whole_call_is_the_reason(model: Model) -> None:
    events = told(model, Call(messages=MESSAGES, tools=TOOLS), ending(model, f"Well.{CALL}"))
    assert ToolStart(0, "f") in events and ToolEnd(0, {"x": 1}) in events
    assert text_of(events, ToolArguments) == '{"x": 1}' and text_of(events, Content) == "Well."
    assert last(events).reason == "tool_calls"


def test_a_torn_call_is_not(model: Model) -> None:
    torn = CALL[: CALL.index(f"{NS}</invoke>")]
    events = told(model, Call(messages=MESSAGES, tools=TOOLS), ending(model, torn))
    assert any(isinstance(event, ToolEnd) and not event.complete for event in events)
    assert last(events).reason == "stop"
    assert last(told(model, Call(messages=MESSAGES, tools=TOOLS), ending(model, CALL, "length"))).reason == "length"


@pytest.mark.parametrize("options", [{"tools": TOOLS, "tool_choice": "none"}, {}])
def test_calls_that_were_not_offered_are_left_out(model: Model, options: dict[str, Any]) -> None:
    events = told(model, Call(messages=MESSAGES, **options), ending(model, f"Well.{CALL}"))
    assert {type(event) for event in events} == {Content, Finished}
    assert last(events).reason == "stop" and text_of(events, Content) == "Well."


def test_without_parallel_calls_the_first_one_counts(model: Model) -> None:
    both = told(model, Call(messages=MESSAGES, tools=TOOLS), ending(model, TWO))
    assert [event.index for event in both if isinstance(event, ToolEnd)] == [0, 1]
    one = told(model, Call(messages=MESSAGES, tools=TOOLS, parallel_tool_calls=False), ending(model, TWO))
    assert [event.index for event in one if isinstance(event, ToolEnd)] == [0]
    assert last(one).reason == "tool_calls"


def test_the_stop_string_is_told(model: Model) -> None:
    call = Call(prompt="x", params=SamplingParams(stop=["\n\n", "def", "de"]))
    deltas = ending(model, "a b", cut="\n")
    assert last(told(model, Call(prompt="x", params=SamplingParams(stop=["\n"])), deltas)).stop == "\n"
    assert last(told(model, call, ending(model, "a b"))).stop is None
    assert last(told(model, call, ending(model, "a b", "length"))).stop is None


def test_scores_blocks_and_progress_come_before_their_text(model: Model) -> None:
    call = Call(messages=MESSAGES, params=SamplingParams(logprobs=0), xray=True, progress=True)
    blocks = np.array([[[0, 2, -1], [1, -1, -1]], [[-1, -1, -1], [-1, -1, -1]]], np.int32)
    prompt = [Logprob(1, math.nan)]
    deltas = [
        Delta([65], "a", logprobs=[Logprob(65, -0.5)], blocks=[blocks], prompt_logprobs=prompt),
        Delta([66], "b", logprobs=[Logprob(66, -1.0)], blocks=[blocks]),
    ]
    events = told(model, call, deltas)
    looks = Looked([65], [[[[0, 2], [1]], [[], []]]])
    assert events[:5] == [PromptScores(prompt), Progress(1), Scores([Logprob(65, -0.5)]), looks, Content("a")]
    assert events[5:] == [Progress(2), Scores([Logprob(66, -1.0)]), Looked([66], looks.blocks), Content("b")]
