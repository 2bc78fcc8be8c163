"""A response of OpenAI's protocol as it grows, and the events of a stream that tell of each addition."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

from openm3.engine.request import Usage
from openm3.server.calls import Event, Finished, Started
from openm3.server.errors import RequestError
from openm3.server.extras import extra
from openm3.server.protocol import check_end, seal
from openm3.tokens import Content, Thinking, ToolArguments, ToolEnd, ToolStart

_FAILURES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class Reply:
    """Each event of a call adds to `body`, and gives the stream's events that tell of that.

    `response` is the body before the first event. `origins` are the namespace and the own name behind each
    name that the model calls a function by. With `summarise`, thoughts are told in full as summaries; clients get them
    sealed in any case.
    """

    def __init__(
        self, response: dict[str, Any], origins: Mapping[str, tuple[str | None, str]], *, summarise: bool
    ) -> None:
        self.body = response
        self._origins = origins
        self._summarises = summarise
        self._item: dict[str, Any] | None = None
        self._texts: list[str] = []
        self._num_events = 0

    def add(self, event: Event) -> Iterator[dict[str, Any]]:
        """The stream's events. Raises as `check_end` does."""
        match event:
            case Started():
                yield self._event("created", response=self.body)
                yield self._event("in_progress", response=self.body)
            case Thinking(text):
                yield from self._thought(text)
            case Content(text):
                yield from self._said(text)
            case ToolStart(_, name):
                yield from self._called(name)
            case ToolArguments(_, text):
                self._texts.append(text)
                yield self._of_item("function_call_arguments.delta", delta=text)
            case ToolEnd(_, _, complete):
                yield from self._closed("completed" if complete else "incomplete")
            case Finished():
                check_end(event)
                status = "incomplete" if event.reason in ("length", "timeout") else "completed"
                yield from self._closed(status)
                yield self._ended(status, event)

    def fail(self, error: RequestError) -> dict[str, Any]:
        """The last event of a stream in which something went wrong."""
        code = _FAILURES.get(error.status, "server_error")
        self.body |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return self._event("failed", response=self.body)

    def _thought(self, text: str) -> Iterator[dict[str, Any]]:
        if not self._is_open("reasoning"):
            yield from self._opened({"id": _new("rs"), "type": "reasoning", "summary": []})
            if self._summarises:
                part = {"type": "summary_text", "text": ""}
                yield self._of_item("reasoning_summary_part.added", summary_index=0, part=part)
        self._texts.append(text)
        if self._summarises:
            yield self._of_item("reasoning_summary_text.delta", summary_index=0, delta=text)

    def _said(self, text: str) -> Iterator[dict[str, Any]]:
        if not self._is_open("message"):
            item = {"id": _new("msg"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}
            yield from self._opened(item)
            yield self._of_item("content_part.added", content_index=0, part=_output_text(""))
        self._texts.append(text)
        yield self._of_item("output_text.delta", content_index=0, delta=text, logprobs=[])

    def _called(self, name: str) -> Iterator[dict[str, Any]]:
        namespace, own_name = self._origins.get(name, (None, name))
        item = {
            "id": _new("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": _new("call"),
            "name": own_name,
            "arguments": "",
        }
        yield from self._opened(item | ({"namespace": namespace} if namespace else {}))

    def _is_open(self, kind: str) -> bool:
        return self._item is not None and self._item["type"] == kind

    def _opened(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._closed("completed")
        self._item = item
        self.body["output"].append(item)
        yield self._event("output_item.added", output_index=self._index, item=item)

    def _closed(self, status: str) -> Iterator[dict[str, Any]]:
        """The end of the item that is open, if one is."""
        item, text = self._item, "".join(self._texts)
        if item is None:
            return
        if item["type"] == "reasoning":
            item["encrypted_content"] = seal(text)
            if self._summarises:
                item["summary"] = [{"type": "summary_text", "text": text}]
                yield self._of_item("reasoning_summary_text.done", summary_index=0, text=text)
                yield self._of_item("reasoning_summary_part.done", summary_index=0, part=item["summary"][0])
        elif item["type"] == "message":
            item |= {"status": status, "content": [_output_text(text)]}
            yield self._of_item("output_text.done", content_index=0, text=text, logprobs=[])
            yield self._of_item("content_part.done", content_index=0, part=item["content"][0])
        else:
            item |= {"status": status, "arguments": text}
            yield self._of_item("function_call_arguments.done", name=item["name"], arguments=text)
        yield self._event("output_item.done", output_index=self._index, item=item)
        self._item, self._texts = None, []

    def _ended(self, status: str, finished: Finished) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        usage = _usage(finished.usage, finished.thinking_tokens)
        self.body |= {"status": status, "incomplete_details": cut, "usage": usage, "completed_at": int(time.time())}
        if found := extra(finished):
            self.body["openm3"] = found
        return self._event(status, response=self.body)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": f"response.{kind}", "sequence_number": number, **fields}

    def _of_item(self, kind: str, **fields: Any) -> dict[str, Any]:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=self._index, **fields)

    @property
    def _index(self) -> int:
        return len(self.body["output"]) - 1


def _new(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage, thinking_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": thinking_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
