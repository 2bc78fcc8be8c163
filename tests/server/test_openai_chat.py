"""Chats: what a request asks of the service, and what its replies and streams look like."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from openm3.engine.request import Logprob, Timings
from openm3.server.calls import Call, Evidence, Looked, Passage, Progress, Scores
from openm3.tokens import Content, Thinking
from tests.server.fake import ANSWER, FakeService, app_of, called, chunks_of, finished, reply

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}


def post(service: FakeService, **body: Any) -> Any:
    with TestClient(app_of(service)) as client:
        return client.post(PATH, json={"model": "m3-tiny", "messages": [USER]} | body)


def said(script: Any = ANSWER, **body: Any) -> dict[str, Any]:
    """The whole reply."""
    response = post(FakeService(script), **body)
    assert response.status_code == 200, response.text
    whole: dict[str, Any] = response.json()
    return whole


def message(script: Any = ANSWER, **body: Any) -> dict[str, Any]:
    found: dict[str, Any] = said(script, **body)["choices"][0]["message"]
    return found


def streamed(script: Any = ANSWER, **body: Any) -> list[dict[str, Any]]:
    """The chunks of the reply's stream."""
    response = post(FakeService(script), stream=True, **body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return chunks_of(response.text)


def deltas(script: Any = ANSWER, **body: Any) -> list[dict[str, Any]]:
    return [chunk["choices"][0]["delta"] for chunk in streamed(script, **body) if chunk["choices"]]


def asked(**body: Any) -> Call:
    """What the service is asked for by a body."""
    service = FakeService()
    response = post(service, **body)
    assert response.status_code == 200, response.text
    return service.call


def refused(**body: Any) -> dict[str, Any]:
    service = FakeService()
    response = post(service, **body)
    assert response.status_code == 400, response.text
    assert service.num_running == 0
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "bad_request_error"
    assert error["http_code"] == "400"
    return error


def test_a_whole_reply_has_exactly_this_shape() -> None:
    whole = said()
    assert whole.pop("id").startswith("chatcmpl-")
    assert whole.pop("created") > 1_700_000_000
    assert whole == {
        "object": "chat.completion",
        "model": "m3-tiny",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "<think>Let me think.</think>Hello there.",
                    "name": "m3-tiny",
                    "audio_content": "",
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 11,
            "completion_tokens": 9,
            "total_tokens": 20,
            "total_characters": 0,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 4},
        },
        "input_sensitive": False,
        "output_sensitive": False,
        "base_resp": {"status_code": 0, "status_msg": ""},
    }


def test_split_reasoning_stands_beside_the_content() -> None:
    found = message(reasoning_split=True)
    assert found["content"] == "Hello there."
    assert found["reasoning_content"] == "Let me think."
    assert found["reasoning_details"] == [
        {
            "type": "reasoning.text",
            "id": "reasoning-text-1",
            "format": "MiniMax-response-v1",
            "index": 0,
            "text": "Let me think.",
        }
    ]


@pytest.mark.parametrize("split", [False, True])
def test_a_reply_that_did_not_think_shows_no_sign_of_it(split: bool) -> None:
    body = post(FakeService(reply(Content("Hi."))), reasoning_split=split).text
    assert "think" not in body
    assert "reasoning_content" not in body


def test_a_stream_begins_with_the_role_and_ends_with_done() -> None:
    chunks = streamed()
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["model"] for chunk in chunks} == {"m3-tiny"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "<think>Let me"},
        {"content": " think."},
        {"content": "</think>Hello"},
        {"content": " there."},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]
    assert chunks[-1]["base_resp"] == {"status_code": 0, "status_msg": ""}
    assert chunks[-1]["input_sensitive"] is chunks[-1]["output_sensitive"] is False
    assert all("usage" not in chunk for chunk in chunks)


def test_split_reasoning_is_streamed_as_what_is_new() -> None:
    first, second = [delta for delta in deltas(reasoning_split=True) if "reasoning_content" in delta]
    assert (first["reasoning_content"], second["reasoning_content"]) == ("Let me", " think.")
    assert [first["reasoning_details"][0]["text"], second["reasoning_details"][0]["text"]] == ["Let me", " think."]
    assert second["reasoning_details"] == [{"type": "reasoning.text", "index": 0, "text": " think."}]


def test_no_delta_holds_both_content_and_reasoning() -> None:
    assert [
        delta for delta in deltas(reasoning_split=True) if delta.get("content") and "reasoning_content" in delta
    ] == []


def test_thinking_that_the_limit_cuts_off_is_closed() -> None:
    script = reply(Thinking("Well"), last=finished("length"))
    assert message(script)["content"] == "<think>Well</think>"
    assert deltas(script)[1:] == [{"content": "<think>Well"}, {"content": "</think>"}, {}]
    assert said(script)["choices"][0]["finish_reason"] == "length"


def test_usage_stands_in_the_last_chunk_alone_which_has_no_choices() -> None:
    *chunks, last = streamed(stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"] == []
    assert last["usage"] == said()["usage"]


def test_continuous_usage_counts_the_tokens_so_far() -> None:
    script = reply(Progress(2), Content("Hello"), Progress(5), Content(" there."))
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = streamed(script, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [2, 2, 5, 9, 9]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {11}
    service = FakeService()
    post(service, stream=True, stream_options=options)
    assert service.call.progress
    assert not asked(stream_options=options).progress


@pytest.mark.parametrize(("reason", "told"), [("stop", "stop"), ("length", "length"), ("timeout", "length")])
def test_the_reason_for_the_end(reason: str, told: str) -> None:
    script = reply(Content("Hi."), last=finished(reason))
    assert said(script)["choices"][0]["finish_reason"] == told
    assert streamed(script)[-1]["choices"][0]["finish_reason"] == told


TOOL_TURN = reply(
    Thinking("Hm."),
    *called(0, "get_weather", {"city": "Rome", "days": 2}),
    *called(1, "now", {}),
    last=finished("tool_calls"),
)


def test_tool_calls_of_a_whole_reply() -> None:
    whole = said(TOOL_TURN, tools=[TOOL])["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "<think>Hm.</think>"
    first, second = whole["message"]["tool_calls"]
    assert first == {
        "id": first["id"],
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Rome", "days": 2}'},
    }
    assert second["function"] == {"name": "now", "arguments": "{}"}
    assert first["id"].startswith("call_")
    assert first["id"] != second["id"]


def test_a_reply_of_calls_alone_has_no_content() -> None:
    assert message(reply(*called(0, "now", {})), tools=[TOOL])["content"] is None
    assert message(reply())["content"] == ""


def test_the_arguments_of_calls_are_streamed_as_they_come() -> None:
    role, thought, closing, start, *parts = deltas(TOOL_TURN, tools=[TOOL])
    assert role == {"role": "assistant", "content": ""}
    assert (thought, closing) == ({"content": "<think>Hm."}, {"content": "</think>"})
    (call,) = start["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"index": 0, "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    assert parts[0] == {"tool_calls": [{"index": 0, "function": {"arguments": '{"ci'}}]}
    assert parts[1] == {"tool_calls": [{"index": 0, "function": {"arguments": 'ty": "Rome", "days": 2}'}}]}
    assert [part["tool_calls"][0]["index"] for part in parts[2:-1]] == [1, 1]
    assert parts[-1] == {}


def test_log_probabilities_of_all_tokens() -> None:
    scores = [Logprob(104, -0.5, ((104, -0.5), (72, -1.0))), Logprob(0xE2, float("-inf"))]
    script = reply(Scores(scores[:1]), Content("h"), Scores(scores[1:]), last=finished())
    found = said(script, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    likely = [{"token": "h", "logprob": -0.5, "bytes": [104]}, {"token": "H", "logprob": -1.0, "bytes": [72]}]
    assert found == {
        "content": [
            {"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": likely},
            {"token": "\ufffd", "logprob": -9999.0, "bytes": [0xE2], "top_logprobs": []},
        ],
        "refusal": None,
    }
    pieces = [chunk["choices"][0]["logprobs"] for chunk in streamed(script, logprobs=True, top_logprobs=2)]
    assert pieces == [
        None,
        {"content": found["content"][:1], "refusal": None},
        {"content": found["content"][1:], "refusal": None},
    ]


def test_without_tokens_log_probabilities_are_an_empty_list() -> None:
    assert said(reply(), logprobs=True)["choices"][0]["logprobs"] == {"content": [], "refusal": None}


def test_evidence_and_xray_are_extra_fields() -> None:
    found = Evidence([Passage("the secret is 42", 0.75, "notes.txt", (3, 4))], None, 0.5, 6)
    frames = [Looked([7], [[[], [[0, 1], [0]]]]), Looked([8], [[[], [[1], [1]]]])]
    last = finished(evidence=found, timings=Timings(0.5, 2.0, 6.5))
    script = reply(frames[0], Content("4"), frames[1], Content("2"), last=last)
    expected = {
        "evidence": [{"text": "the secret is 42", "share": 0.75, "source": "notes.txt", "lines": [3, 4]}],
        "no_evidence": None,
        "attended_share": 0.5,
        "tokens": {"prompt": 11, "documents": 6, "read": 7, "answer": 9},
        "timings": {
            "queue_seconds": 0.5,
            "read_seconds": 2.0,
            "answer_seconds": 4.0,
            "read_tokens_per_second": 3.5,
            "answer_tokens_per_second": 2.0,
        },
    }
    blocks = [[[], [[0, 1], [0]]], [[], [[1], [1]]]]
    assert message(script, evidence=True, xray=True)["openm3"] == {"ids": [7, 8], "blocks": blocks, **expected}
    told = [delta["openm3"] for delta in deltas(script, evidence=True, xray=True) if "openm3" in delta]
    assert told == [{"ids": [7], "blocks": blocks[:1]}, {"ids": [8], "blocks": blocks[1:]}, expected]
    assert "openm3" not in message()


def test_no_evidence_has_a_reason() -> None:
    nothing = finished(evidence=Evidence([], "it says nothing", None, 0), timings=Timings(0.0, 0.0, 0.0))
    found = message(reply(Content("42"), last=nothing), evidence=True)["openm3"]
    assert (found["evidence"], found["no_evidence"], found["attended_share"]) == ([], "it says nothing", None)
    assert found["timings"]["read_tokens_per_second"] is None


def test_choices_run_side_by_side_with_seeds_of_their_own() -> None:
    service = FakeService()
    whole = post(service, n=3, seed=7).json()
    assert service.most_running == 3
    seeds = [call.params.seed for call in service.calls]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert whole["usage"]["prompt_tokens"] == 11
    assert whole["usage"]["completion_tokens"] == 27
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 4
    post(service := FakeService(), n=2)
    assert [call.params.seed for call in service.calls] == [None, None]


def test_choices_are_streamed_each_with_its_index() -> None:
    *chunks, last = streamed(n=2, stream_options={"include_usage": True})
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"].get("content", "") for one in own) == "<think>Let me think.</think>Hello there."
        assert own[-1]["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == 18


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)])
def test_the_widest_seeds_stay_within_64_bits(seed: int) -> None:
    service = FakeService()
    assert post(service, n=8, seed=seed).status_code == 200
    assert all(-(2**63) <= (call.params.seed or 0) < 2**63 for call in service.calls)


def test_the_defaults_are_those_of_m3() -> None:
    call = asked()
    assert call.params.temperature == 1.0
    assert call.params.top_p == 0.95
    assert call.params.max_tokens == FakeService.max_tokens
    assert call.params.logprobs is None
    assert call.params.stop == ()
    assert (call.thinking, call.thinking_budget, call.schema, call.tool_choice) == ("adaptive", None, None, "auto")
    assert not (call.xray or call.evidence or call.echo)
    assert call.messages == [USER]


def test_what_is_null_stands_for_its_default() -> None:
    fields = ("temperature", "top_p", "max_tokens", "stop", "n", "seed", "tools", "tool_choice", "response_format")
    nulls = dict.fromkeys([*fields, "stream", "stream_options", "thinking", "logprobs", "reasoning_effort", "model"])
    assert asked(**nulls) == asked()


def test_sampling_fields_are_passed_on() -> None:
    params = asked(
        temperature=0, top_p=0.5, top_k=40, min_p=0.1, seed=5, stop=["a", "b"], service_tier="priority",
        repetition_penalty=1.2, presence_penalty=1, frequency_penalty=-1,
        max_completion_tokens=50, min_tokens=3, ignore_eos=True, logprobs=True, top_logprobs=20,
    ).params  # fmt: skip
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 0.5, 40, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, 1.0, -1.0)
    assert (params.seed, params.stop, params.max_tokens, params.min_tokens) == (5, ("a", "b"), 50, 3)
    assert (params.ignore_eos, params.logprobs, params.priority) == (True, 20, 1)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": 512000}, 1000),
        ({"max_completion_tokens": 524288}, 1000),
    ],
)
def test_the_longest_reply(body: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeService, "max_tokens", 1000)
    assert asked(**body).params.max_tokens == expected


@pytest.mark.parametrize(("stop", "expected"), [("END", ("END",)), ([], ()), (["a"], ("a",))])
def test_stop_texts(stop: object, expected: tuple[str, ...]) -> None:
    assert asked(stop=stop).params.stop == expected


@pytest.mark.parametrize(
    ("body", "mode"),
    [
        ({"thinking": {"type": "disabled"}}, "disabled"),
        ({"thinking": {"type": "adaptive"}}, "adaptive"),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "enabled"),
        ({"reasoning": "disabled"}, "disabled"),
        ({"reasoning": "adaptive"}, "adaptive"),
        ({"reasoning": {"enabled": False}}, "disabled"),
        ({"reasoning": {"enabled": True}}, "enabled"),
        ({"reasoning": {"effort": "none"}}, "disabled"),
        ({"reasoning_effort": "none"}, "disabled"),
        ({"reasoning_effort": "high"}, "adaptive"),
        ({"chat_template_kwargs": {"thinking_mode": "disabled"}}, "disabled"),
        ({"chat_template_kwargs": {"enable_thinking": False, "other": 1}}, "disabled"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "enabled"),
        ({"thinking": {"type": "adaptive"}, "reasoning_effort": "none"}, "adaptive"),
        ({"chat_template_kwargs": {}, "reasoning": {}, "reasoning_effort": "none"}, "disabled"),
    ],
)
def test_ways_to_say_whether_to_think(body: dict[str, Any], mode: str) -> None:
    assert asked(**body).thinking == mode


def test_the_thinking_budget() -> None:
    assert asked(thinking={"type": "enabled", "budget_tokens": 100}).thinking_budget == 100
