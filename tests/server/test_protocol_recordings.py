"""Requests in the shape in which coding agents send them: all their fields, and a whole turn with a call of a tool."""

from __future__ import annotations

from typing import Any

from starlette.testclient import TestClient

from openm3.server.protocol import unseal
from openm3.tokens import Content, Thinking
from tests.server.fake import app_of, called, events_of, saying

EPHEMERAL = {"type": "ephemeral"}
BETAS = "claude-code-20250219,oauth-2025-04-20,interleaved-thinking-2025-05-14,context-management-2025-06-27"
BASH = {
    "name": "Bash",
    "description": "Executes a command.",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"command": {"type": "string"}, "timeout": {"type": "number"}},
        "required": ["command"],
        "additionalProperties": False,
    },
}


def claude_code(*turns: dict[str, Any]) -> dict[str, Any]:
    """Claude Code 2.1's request."""
    return {
        "model": "m3-tiny",
        "max_tokens": 32000,
        "stream": True,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.abc; cc_entrypoint=cli; cch=0;"},
            {"type": "text", "text": "You are a coding agent.", "cache_control": EPHEMERAL},
            {"type": "text", "text": "# Tone\nBe concise.", "cache_control": EPHEMERAL},
        ],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>Today is Saturday.</system-reminder>"},
                    {"type": "text", "text": "List the files.", "cache_control": EPHEMERAL},
                ],
            },
            {"role": "system", "content": "Skills: none."},
            *turns,
        ],
        "tools": [{**BASH, "name": f"Tool{i}"} for i in range(23)] + [BASH],
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "medium"},
        "metadata": {"user_id": '{"device_id":"0","session_id":"1"}'},
    }


def test_a_turn_of_claude_code() -> None:
    service = saying(Thinking("ls it."), Content("I'll look."), *called(0, "Bash", {"command": "ls"}))
    client = TestClient(app_of(service), headers={"anthropic-beta": BETAS})
    events = [data for _, data in events_of(client.post("/v1/messages?beta=true", json=claude_code()).text)]
    assert events[-1] == {"type": "message_stop"}
    call = service.calls[0]
    assert (len(call.tools), call.thinking, call.params.max_tokens) == (24, "adaptive", 32000)
    assert call.messages == [
        {"role": "system", "content": "You are a coding agent.\n# Tone\nBe concise."},
        {"role": "user", "content": "<system-reminder>Today is Saturday.</system-reminder>\nList the files."},
        {"role": "system", "content": "Skills: none."},
    ]
    blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    signature = next(e["delta"]["signature"] for e in events if e.get("delta", {}).get("type") == "signature_delta")
    turns = [
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "ls it.", "signature": signature},
                {"type": "text", "text": "I'll look."},
                {**blocks[2], "input": {"command": "ls"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": blocks[2]["id"],
                    "content": "README.md",
                    "is_error": False,
                    "cache_control": EPHEMERAL,
                }
            ],
        },
    ]
    assert client.post("/v1/messages?beta=true", json=claude_code(*turns)).status_code == 200
    again = service.calls[1].messages or ()
    assert again[:3] == call.messages, "the next turn reads on from the same prompt"
    assert [message["role"] for message in again[3:]] == ["assistant", "tool"]
    assert again[3]["reasoning_content"] == "ls it."
    probe = {"model": "m3-tiny", "messages": [{"role": "user", "content": "foo"}], "tools": [BASH]}
    assert client.post("/v1/messages/count_tokens?beta=true", json=probe).json() == {"input_tokens": 11}


def codex(*items: dict[str, Any]) -> dict[str, Any]:
    """Codex 0.169's request."""

    def message(role: str, text: str) -> dict[str, Any]:
        return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}

    command = {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]}
    return {
        "model": "m3-tiny",
        "input": [
            message("developer", "<permissions instructions>read only</permissions instructions>"),
            message("developer", "<skills_instructions>none</skills_instructions>"),
            message("user", "# AGENTS.md instructions"),
            message("user", "List the files."),
            *items,
        ],
        "tools": [
            {
                "type": "function",
                "name": "exec_command",
                "description": "Runs a command.",
                "strict": False,
                "parameters": command,
            },
            {
                "type": "namespace",
                "name": "multi_agent",
                "description": "Agents.",
                "tools": [
                    {
                        "type": "function",
                        "name": "spawn",
                        "description": "Spawn one.",
                        "strict": False,
                        "parameters": {"type": "object", "properties": {}},
                        "defer_loading": False,
                    }
                ],
            },
            {"type": "web_search", "external_web_access": False},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto", "context": "all_turns"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199-abcd",
        "client_metadata": {"x-codex-installation-id": "0"},
        "text": {"verbosity": "low"},
    }


def test_a_turn_of_codex() -> None:
    service = saying(
        Thinking("ls it."), *called(0, "exec_command", {"cmd": "ls"}), *called(1, "multi_agent__spawn", {})
    )
    client = TestClient(app_of(service), headers={"originator": "codex_exec"})
    events = [data for _, data in events_of(client.post("/v1/responses", json=codex()).text)]
    assert events[-1]["type"] == "response.completed"
    call = service.calls[0]
    assert [tool["function"]["name"] for tool in call.tools] == ["exec_command", "multi_agent__spawn"]
    assert [message["role"] for message in call.messages or ()] == ["system", "system", "user", "user"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert unseal(done[0]["encrypted_content"]) == done[0]["summary"][0]["text"] == "ls it."
    assert (done[2]["namespace"], done[2]["name"]) == ("multi_agent", "spawn")
    outputs = [{"type": "function_call_output", "call_id": item["call_id"], "output": "ok"} for item in done[1:]]
    sent_back = [{key: value for key, value in item.items() if key not in ("id", "status")} for item in done]
    assert client.post("/v1/responses", json=codex(*sent_back, *outputs)).status_code == 200
    again = service.calls[1].messages or ()
    assert again[:4] == call.messages, "the next turn reads on from the same prompt"
    assert [message["role"] for message in again[4:]] == ["assistant", "tool", "tool"]
    assert again[4]["reasoning_content"] == "ls it."
    names = [one["function"]["name"] for one in again[4]["tool_calls"]]
    assert names == ["exec_command", "multi_agent__spawn"]
