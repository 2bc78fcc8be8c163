"""Bare prompts: batches, echoes, and log-probabilities as evaluation harnesses read them."""

import math
from operator import itemgetter
from typing import Any

import pytest
from starlette.testclient import TestClient

from openm3.engine.request import Logprob
from openm3.server.calls import Call, PromptScores, Scores, Started
from openm3.server.several import AT_ONCE
from openm3.tokens import Content
from tests.server.fake import FakeService, Step, app_of, chunks_of, finished, reply

PATH = "/v1/completions"
NAN = float("nan")


def post(service: FakeService, **body: Any) -> Any:
    with TestClient(app_of(service)) as client:
        return client.post(PATH, json={"model": "m3-tiny", "prompt": "Say hi"} | body)


def said(script: Any, **body: Any) -> dict[str, Any]:
    """The whole reply."""
    response = post(FakeService(script), **body)
    assert response.status_code == 200, response.text
    whole: dict[str, Any] = response.json()
    return whole


def streamed(script: Any, **body: Any) -> list[dict[str, Any]]:
    response = post(FakeService(script), stream=True, **body)
    assert response.status_code == 200, response.text
    return chunks_of(response.text)


def asked(**body: Any) -> list[Call]:
    service = FakeService(reply(Content("hi")))
    assert post(service, **body).status_code == 200
    return service.calls


def echoing(call: Call) -> list[Step]:
    """Log-probabilities for a prompt of bytes and one token more, as the service tells them."""
    ids = list(call.prompt.encode()) if isinstance(call.prompt, str) else list(call.prompt or ())
    scores = [Logprob(token, -place / 4, ((token, -place / 4), (33, -9.0))) for place, token in enumerate(ids)]
    scores[0] = Logprob(ids[0], NAN)
    prompt = [PromptScores(scores)] if call.echo else []
    return reply(*prompt, Scores([Logprob(33, -0.125, ((33, -0.125),))]), Content("!"), last=finished("length", 1))


def test_a_whole_reply_has_exactly_this_shape() -> None:
    whole = said(reply(Content("hi"), Content(" there")))
    assert whole.pop("id").startswith("cmpl-")
    assert whole.pop("created") > 1_700_000_000
    assert whole == {
        "object": "text_completion",
        "model": "m3-tiny",
        "choices": [{"index": 0, "text": "hi there", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 11,
            "completion_tokens": 9,
            "total_tokens": 20,
            "total_characters": 0,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_a_stream_ends_with_its_usage_and_done() -> None:
    chunks = streamed(reply(Content("hi"), Content(" there")), stream_options={"include_usage": True})
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": " there", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}],
        [],
    ]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["usage"] is None for chunk in chunks] == [True, True, True, False]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_a_prompt_is_text_or_tokens_alone_or_in_a_batch(prompt: object, prompts: list[object]) -> None:
    assert [call.prompt for call in asked(prompt=prompt)] == prompts


def test_the_choices_of_a_batch_are_numbered_prompt_by_prompt() -> None:
    def script(call: Call) -> list[Step]:
        assert isinstance(call.prompt, str)
        # The later a prompt, the sooner it is answered.
        return reply(0.01 / len(call.prompt), Content(call.prompt.upper()))

    whole = said(script, prompt=["a", "bb"], n=2)
    assert [(choice["index"], choice["text"]) for choice in whole["choices"]] == [
        (0, "A"),
        (1, "A"),
        (2, "BB"),
        (3, "BB"),
    ]
    assert whole["usage"]["prompt_tokens"] == 22
    assert whole["usage"]["completion_tokens"] == 36
    texts = {
        chunk["choices"][0]["index"]: chunk["choices"][0]["text"]
        for chunk in streamed(script, prompt=["a", "bb"])[::-1]
    }
    assert texts == {0: "A", 1: "BB"}


def test_a_long_batch_runs_some_prompts_at_a_time() -> None:
    service = FakeService(reply(Content("hi")))
    whole = post(service, prompt=["a"] * 50).json()
    assert len(whole["choices"]) == 50
    assert service.most_running == AT_ONCE
    service = FakeService(reply(Content("hi")))
    chunks = chunks_of(post(service, prompt=["a"] * 50, stream=True).text)
    assert sum(chunk["choices"][0]["finish_reason"] == "stop" for chunk in chunks) == 50


def test_defaults() -> None:
    (call,) = asked()
    assert (call.params.max_tokens, call.params.temperature, call.params.top_p) == (16, 1.0, 1.0)
    assert not call.echo
    assert call.messages is None


def test_echo_puts_the_prompt_before_the_text() -> None:
    script = reply(Content("hi"))
    assert said(script, echo=True)["choices"][0]["text"] == "Say hihi"
    assert said(script, echo=True, prompt=[97, 0xC3, 0xBC, 300])["choices"][0]["text"] == "aühi"
    assert [chunk["choices"][0]["text"] for chunk in streamed(script, echo=True)] == ["Say hi", "hi", ""]
    assert not asked(echo=True)[0].echo


def test_echo_alone_writes_nothing() -> None:
    whole = said(echoing, echo=True, max_tokens=0, prompt="abc", logprobs=0)
    (choice,) = whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.5]
    assert whole["usage"]["completion_tokens"] == 0
    assert whole["usage"]["total_tokens"] == 11
    assert asked(echo=True, max_tokens=0)[0].params.max_tokens == 1


def test_log_probabilities_in_their_older_shape() -> None:
    tokens = [
        Logprob(104, -0.5, ((104, -0.5), (72, -1.5))),
        Logprob(0xC3, -0.25, ((65, -0.125),)),
        Logprob(0xBC, -math.inf),
    ]
    script = reply(Scores(tokens[:1]), Content("h"), Scores(tokens[1:]), Content("ü"))
    expected = {
        "tokens": ["h", "bytes:\\xc3", "bytes:\\xbc"],
        "token_logprobs": [-0.5, -0.25, -9999.0],
        "top_logprobs": [{"h": -0.5, "H": -1.5}, {"A": -0.125, "bytes:\\xc3": -0.25}, {"bytes:\\xbc": -9999.0}],
        "text_offset": [0, 1, 1],
    }
    assert said(script, logprobs=2)["choices"][0]["logprobs"] == expected
    first, second, last = [chunk["choices"][0]["logprobs"] for chunk in streamed(script, logprobs=2)]
    assert last is None
    assert {key: first[key] + second[key] for key in expected} == expected
    assert asked(logprobs=2)[0].params.logprobs == 2


def test_an_echo_has_the_log_probabilities_of_the_prompt_too() -> None:
    (choice,) = said(echoing, echo=True, logprobs=1, max_tokens=1, prompt="abc")["choices"]
    assert choice["text"] == "abc!"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c", "!"],
        "token_logprobs": [None, -0.25, -0.5, -0.125],
        "top_logprobs": [None, {"b": -0.25, "!": -9.0}, {"c": -0.5, "!": -9.0}, {"!": -0.125}],
        "text_offset": [0, 1, 2, 3],
    }
    pieces = [chunk["choices"][0] for chunk in streamed(echoing, echo=True, logprobs=1, max_tokens=1, prompt="abc")]
    assert [piece["text"] for piece in pieces] == ["abc", "!", ""]
    assert pieces[0]["logprobs"]["text_offset"] + pieces[1]["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_lm_eval_reads_log_likelihoods() -> None:
    """Its request, and its reading of the reply: all but the context's tokens and the last, which was written."""
    contexts, body = [2, 1], {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    service = FakeService(echoing)
    whole = post(service, prompt=[[97, 98, 99, 100], [97, 98]], **body).json()
    found = []
    for choice, context in zip(sorted(whole["choices"], key=itemgetter("index")), contexts, strict=True):
        own = choice["logprobs"]["token_logprobs"][context:-1]
        top = choice["logprobs"]["top_logprobs"][context:-1]
        found.append((sum(own), all(one == max(likely.values()) for one, likely in zip(own, top, strict=True))))
    assert found == [(-1.25, True), (-0.25, True)]
    assert all(call.echo and call.params.temperature == 0 and call.params.logprobs == 1 for call in service.calls)
    # An end token, too, must leave an entry to cut off.
    assert all(call.params.ignore_eos for call in service.calls)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "the end"}, "suffix"),
        ({"echo": "yes"}, "echo"),
        ({"model": "gpt-9"}, "model"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(body: dict[str, Any], named: str) -> None:
    service = FakeService()
    response = post(service, **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == named
    assert service.calls == []


def test_the_prompt_must_be_given() -> None:
    with TestClient(app_of(FakeService())) as client:
        response = client.post(PATH, json={})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


def test_harmless_older_fields_are_let_pass() -> None:
    assert asked(best_of=1, suffix="", user="me", stop=[], logit_bias=None) == asked()


def test_half_a_surrogate_pair_is_echoed_as_the_model_reads_it() -> None:
    with TestClient(app_of(FakeService(reply(Content("!"))))) as client:
        body = rb'{"prompt": "a\ud83db", "echo": true}'
        response = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert response.json()["choices"][0]["text"] == "a\ufffdb!"


def test_a_failure_in_a_batch() -> None:
    def script(call: Call) -> list[Step]:
        return [Started(1), Content("x"), ValueError("hidden")] if call.prompt == "bad" else reply(Content("ok"))

    service = FakeService(script)
    response = post(service, prompt=["good", "bad"], stream=True)
    assert chunks_of(response.text)[-1]["error"]["http_code"] == "500"
    assert "hidden" not in response.text
    assert service.num_running == 0
