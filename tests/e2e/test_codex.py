"""Codex, as npm installs it, works with a served model: tools run, turns follow, failures are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openm3.server.calls import Call
from openm3.tokens import render_tool_call
from tests.e2e.programs import environment, find, openm3_serve, readme, run
from tests.e2e.scripted import Stage

pytestmark = pytest.mark.e2e


class Codex:
    """The program in a folder of its own, pointed at a server as the README says."""

    def __init__(self, program: Path, folder: Path, address: str, key: str = "none") -> None:
        self.folder = folder / "work"
        self.folder.mkdir(parents=True)
        home = folder / "codex"
        home.mkdir()
        (home / "config.toml").write_text(readme("toml", "model_providers", address))
        self._program = program
        self._environment = environment(folder / "home", CODEX_HOME=str(home), OPENM3_API_KEY=key)

    def ask(self, *words: str) -> tuple[int, list[dict[str, Any]]]:
        """The exit code, and all that it prints."""
        flags = ("--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
        done = run([self._program, "exec", *flags, *words], self.folder, self._environment)
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def program() -> Path:
    return find("OPENM3_E2E_NPM", "build/e2e/node_modules/.bin") / "codex"


@pytest.fixture
def codex(program: Path, tmp_path: Path, scripted: str) -> Codex:
    return Codex(program, tmp_path, scripted)


def last_result(call: Call) -> str:
    """What the last call gave, without what Codex says of it."""
    assert call.messages is not None and call.messages[-1]["role"] == "tool"
    text: str = call.messages[-1]["content"]
    return text.partition("Output:\n")[2]


def items(printed: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Completed items of a kind."""
    found = [event["item"] for event in printed if event["type"] == "item.completed"]
    return [item for item in found if item["type"] == kind]


def test_a_turn_with_a_tool(stage: Stage, codex: Codex) -> None:
    command = "echo 'echo \"heron: $((4700 + 11))\"' > heron.sh && sh heron.sh"
    stage.play(
        "<mm:think>A script, then a run.</mm:think>I write it and run it."
        + render_tool_call("exec_command", {"cmd": command, "yield_time_ms": 10_000}),
        lambda call: f"It printed {last_result(call)}",
    )
    code, printed = codex.ask("--output-last-message", "last.txt", "Write a script and run it.")
    assert code == 0
    assert (codex.folder / "heron.sh").read_text() == 'echo "heron: $((4700 + 11))"\n'
    assert (codex.folder / "last.txt").read_text().strip() == "It printed heron: 4711"

    assert [item["text"] for item in items(printed, "reasoning")] == ["A script, then a run."]
    said = [item["text"].strip() for item in items(printed, "agent_message")]
    assert said == ["I write it and run it.", "It printed heron: 4711"]
    (run_once,) = items(printed, "command_execution")
    assert (run_once["aggregated_output"], run_once["exit_code"]) == ("heron: 4711\n", 0)
    prompts = [line["prompt_tokens"] for line in stage.requests if "prompt_tokens" in line]
    written = [line["completion_tokens"] for line in stage.requests if "completion_tokens" in line]
    usage = printed[-1]["usage"]
    assert printed[-1]["type"] == "turn.completed"
    assert (usage["input_tokens"], usage["output_tokens"]) == (sum(prompts), sum(written))
    # The second request reads no more than what is new, and what is left of a block.
    assert usage["cached_input_tokens"] > prompts[0] - 128

    first, second = stage.calls
    assert first.messages is not None and second.messages is not None
    names = [tool["function"]["name"] for tool in first.tools]
    assert {"exec_command", "write_stdin", "multi_agent_v1__spawn_agent"} <= set(names)
    assert [message["role"] for message in first.messages] == ["system", "system", "user", "user"]
    assert first.messages[-1]["content"] == "Write a script and run it."
    assert list(second.messages[:4]) == list(first.messages)
    turn, answer = second.messages[4:]
    assert (turn["role"], turn["content"]) == ("assistant", "I write it and run it.")
    assert turn["reasoning_content"] == "A script, then a run."
    (call,) = turn["tool_calls"]
    assert call["function"]["name"] == "exec_command"
    assert json.loads(call["function"]["arguments"]) == {"cmd": command, "yield_time_ms": 10_000}
    assert (answer["role"], answer["tool_call_id"]) == ("tool", call["id"])


def test_a_second_turn_and_a_call_that_fails(stage: Stage, codex: Codex) -> None:
    stage.play("My name is Heron.")
    code, printed = codex.ask("Who are you?")
    assert (code, items(printed, "agent_message")[-1]["text"]) == (0, "My name is Heron.")
    stage.play(
        render_tool_call("exec_command", {"cmd": "echo no such heron >&2; exit 3"}),
        lambda call: f"So: {last_result(call)}",
    )
    code, printed = codex.ask("resume", "--last", "And now fail.")
    assert (code, items(printed, "agent_message")[-1]["text"].strip()) == (0, "So: no such heron")
    assert items(printed, "command_execution")[0]["exit_code"] == 3
    messages = stage.calls[1].messages
    assert messages is not None
    said = [(message["role"], message["content"]) for message in messages if message["role"] in ("user", "assistant")]
    assert said[-3:] == [("user", "Who are you?"), ("assistant", "My name is Heron."), ("user", "And now fail.")]


def test_a_reply_in_a_given_form(stage: Stage, codex: Codex) -> None:
    schema = {
        "type": "object",
        "properties": {"bird": {"type": "string"}, "number": {"type": "integer"}},
        "required": ["bird", "number"],
        "additionalProperties": False,
    }
    (codex.folder / "schema.json").write_text(json.dumps(schema))
    stage.play('</mm:think>{"bird": "heron", "number": 4711}')
    code, printed = codex.ask("--output-schema", "schema.json", "Which bird?")
    assert code == 0
    assert json.loads(items(printed, "agent_message")[-1]["text"]) == {"bird": "heron", "number": 4711}
    assert stage.calls[0].schema == schema


def test_a_prompt_that_is_too_long_and_a_key_that_is_wrong(program: Path, tmp_path: Path) -> None:
    """The program knows the first by its code, and says what it was told of the second."""
    with openm3_serve(tmp_path / "server", "--cache-tokens", "4096", OPENM3_API_KEYS="right") as address:
        for key, expected in (("right", "context window"), ("wrong", "401")):
            code, printed = Codex(program, tmp_path / key, address, key).ask("Hello.")
            assert (code, printed[-1]["type"]) == (1, "turn.failed")
            assert expected in printed[-1]["error"]["message"]
