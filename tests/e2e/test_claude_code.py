"""Claude Code, as npm installs it, works with a served model: tools run, turns follow, failures are told."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from openm3.server.calls import Call
from openm3.tokens import render_tool_call
from tests.e2e.programs import environment, find, openm3_serve, readme, run
from tests.e2e.scripted import Stage

pytestmark = pytest.mark.e2e

STREAM = ("--output-format", "stream-json", "--include-partial-messages", "--verbose")
BASH = ("--tools", "Bash")
"""Without all other tools the prompt is an eighth as long."""


class Claude:
    """The program in a folder of its own, pointed at a server as the README says."""

    def __init__(self, program: Path, folder: Path, address: str, **keys: str) -> None:
        self.folder = folder / "work"
        self.folder.mkdir(parents=True)
        self._program = program
        self.environment = environment(
            folder / "home",
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
            IS_SANDBOX="1",  # Nobody else who is root may skip its permissions.
            **(dict(re.findall(r"(\w+)=(\S+)", readme("bash", "claude", address))) | keys),
        )

    def command(self, prompt: str, *flags: str) -> list[str]:
        return [str(self._program), "-p", prompt, "--dangerously-skip-permissions", *flags]

    def ask(self, prompt: str, *flags: str) -> tuple[int, list[dict[str, Any]]]:
        """The exit code, and all that it prints; the last one is the result."""
        done = run(self.command(prompt, *STREAM, *flags), self.folder, self.environment)
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def program() -> Path:
    return find("OPENM3_E2E_NPM", "build/e2e/node_modules/.bin") / "claude"


@pytest.fixture
def claude(program: Path, tmp_path: Path, scripted: str) -> Claude:
    return Claude(program, tmp_path, scripted)


def last_results(call: Call) -> list[str]:
    """What the calls of the last turn gave."""
    assert call.messages is not None
    results: list[str] = []
    for message in call.messages:
        results = [*results, message["content"]] if message["role"] == "tool" else []
    return results


def deltas(events: list[dict[str, Any]], kind: str) -> str:
    """All that came in pieces of a kind."""
    found = [event["event"].get("delta", {}) for event in events if event["type"] == "stream_event"]
    return "".join(delta[kind] for delta in found if kind in delta)


def test_a_turn_with_tools(stage: Stage, claude: Claude) -> None:
    script = str(claude.folder / "heron.sh")
    write = {"file_path": script, "content": 'echo "heron: $((4700 + 11))" \'<&">\'\n'}
    shell = {"command": "sh heron.sh", "description": "Run the script"}
    stage.play(
        "<mm:think>A script, then a run.</mm:think>I write it and run it."
        + render_tool_call("Write", write)
        + render_tool_call("Bash", shell),
        lambda call: f"It printed {last_results(call)[-1]}",
    )
    code, printed = claude.ask("Write a script and run it.")
    assert code == 0
    assert Path(script).read_text() == write["content"]

    result = printed[-1]
    assert (result["subtype"], result["is_error"], result["num_turns"]) == ("success", False, 3)
    assert result["result"] == 'It printed heron: 4711 <&">'
    assert deltas(printed, "thinking") == "A script, then a run."
    assert deltas(printed, "text") == "I write it and run it." + result["result"]
    assert deltas(printed, "partial_json") == json.dumps(write) + json.dumps(shell)
    tokens = [line["completion_tokens"] for line in stage.requests if "completion_tokens" in line]
    assert result["usage"]["output_tokens"] == sum(tokens)

    first, second = stage.calls
    assert first.messages is not None and second.messages is not None
    assert {"Bash", "Edit", "Read", "Write"} <= {tool["function"]["name"] for tool in first.tools}
    assert [message["role"] for message in first.messages] == ["system", "user", "system"]
    assert "Write a script and run it." in first.messages[1]["content"]
    assert list(second.messages[:3]) == list(first.messages)
    said, *answers = second.messages[3:]
    assert (said["role"], said["content"]) == ("assistant", "I write it and run it.")
    assert said["reasoning_content"] == "A script, then a run."
    assert [call["function"] for call in said["tool_calls"]] == [
        {"name": "Write", "arguments": write},
        {"name": "Bash", "arguments": shell},
    ]
    assert [(answer["role"], answer["tool_call_id"]) for answer in answers] == [
        ("tool", call["id"]) for call in said["tool_calls"]
    ]
    prompts = [line["prompt_tokens"] for line in stage.requests if "prompt_tokens" in line]
    assert result["usage"]["input_tokens"] + result["usage"]["cache_read_input_tokens"] == sum(prompts)
    # The second request reads no more than what is new, and what is left of a block.
    assert result["usage"]["input_tokens"] < prompts[0] + (prompts[1] - prompts[0]) + 128


def test_a_second_turn_and_a_call_that_fails(stage: Stage, claude: Claude) -> None:
    stage.play("My name is Heron.")
    code, printed = claude.ask("Who are you?", *BASH)
    assert (code, printed[-1]["result"]) == (0, "My name is Heron.")
    stage.play(
        render_tool_call("Bash", {"command": "echo no such heron >&2; exit 3", "description": "Fail"}),
        lambda call: f"So: {last_results(call)[0]}",
    )
    code, printed = claude.ask("And now fail.", "--continue", *BASH)
    assert (code, printed[-1]["result"]) == (0, "So: Error: Exit code 3\nno such heron")
    messages = stage.calls[1].messages
    assert messages is not None
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"] == "My name is Heron."
    assert "And now fail." in messages[3]["content"]


def test_an_agent_of_the_agent(stage: Stage, claude: Claude) -> None:
    """It asks for a smaller model of Anthropic's, unless it is told which that is."""
    task = {"description": "Look", "prompt": "Look for the heron.", "subagent_type": "Explore"}
    stage.play(render_tool_call("Agent", task), "The heron is 4711.", lambda call: f"It says: {last_results(call)[0]}")
    code, printed = claude.ask("Where is the heron?", "--tools", "Agent,Bash")
    assert code == 0
    assert printed[-1]["result"].startswith("It says: The heron is 4711.")
    read = stage.calls[1].messages
    assert read is not None and "Look for the heron." in read[1]["content"]


def test_going_away_ends_the_request(stage: Stage, claude: Claude, scripted: str) -> None:
    stage.play("heron " * 20_000)
    process = subprocess.Popen(
        claude.command("Go on.", *STREAM, *BASH),
        cwd=claude.folder,
        env=claude.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert any("text_delta" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    end = time.monotonic() + 20
    while "num_requests_running 0.0" not in (told := httpx.get(f"{scripted}/metrics").text):
        assert time.monotonic() < end, told
        time.sleep(0.1)
    assert 0 < next(line["completion_tokens"] for line in stage.requests if "completion_tokens" in line) < 20_000


def test_a_prompt_that_is_too_long_and_a_key_that_is_wrong(program: Path, tmp_path: Path) -> None:
    """The program knows both by their words, and does not try again."""
    with openm3_serve(tmp_path / "server", "--cache-tokens", "8192", OPENM3_API_KEYS="right") as address:
        bearer = Claude(program, tmp_path / "bearer", address, ANTHROPIC_AUTH_TOKEN="right")
        code, printed = bearer.ask("Hello.")
        assert (code, printed[-1]["terminal_reason"]) == (1, "prompt_too_long")
        assert "limit 8192" in printed[-1]["result"]
        wrong = Claude(program, tmp_path / "wrong", address, ANTHROPIC_API_KEY="wrong", ANTHROPIC_AUTH_TOKEN="")
        code, printed = wrong.ask("Hello.")
        assert (code, printed[-1]["api_error_status"]) == (1, 401)
        assert printed[-1]["result"].startswith("Invalid API key")
        assert not [event for event in printed if event.get("subtype") == "api_retry"]
