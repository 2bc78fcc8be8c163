"""NVIDIA's load generator counts tokens by itself, with the model's tokenizer: its counts are the server's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openm3.model.model import Model
from tests.e2e.programs import environment, find, run
from tests.e2e.questions import NAMES, SOURCE
from tests.e2e.scripted import Stage

pytestmark = pytest.mark.e2e

MAX_TOKENS = 24
PROMPTS = [f"{SOURCE.read_text()}\n\nclass {name}" for name in NAMES]
ROUNDS = 2


def profile(folder: Path, address: str, *flags: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The run's summary, and the numbers of each request."""
    program = find("OPENM3_E2E_AIPERF", "build/e2e/aiperf/bin/aiperf")
    prompts, out = folder / "prompts.jsonl", folder / "out"
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    command: list[str | Path] = [program, "profile", "--model", "m3-tiny", "--url", address, "--streaming"]
    command += ["--tokenizer", SOURCE.parent / "assets" / "m3-tiny", "--custom-dataset-type", "single_turn"]
    command += ["--input-file", prompts, "--request-count", str(ROUNDS * len(PROMPTS)), "--concurrency", "3"]
    command += ["--extra-inputs", "temperature:0", "--extra-inputs", f"max_tokens:{MAX_TOKENS}"]
    command += ["--extra-inputs", "ignore_eos:true", "--ui", "none", "--artifact-dir", out, *flags]
    done = run(command, folder, environment(folder / "home"))
    assert done.returncode == 0
    lines = [json.loads(line) for line in (out / "profile_export.jsonl").read_text().splitlines()]
    numbers = [{name: metric["value"] for name, metric in line["metrics"].items()} for line in lines]
    return json.loads((out / "profile_export_aiperf.json").read_text()), numbers


def check(summary: dict[str, Any], numbers: list[dict[str, Any]], prompts: list[int], template: int = 0) -> None:
    """Both count the same in each request, but for the chat template's tokens, and it is what was to be counted."""
    assert summary["request_count"]["avg"] == len(numbers) == ROUNDS * len(PROMPTS)
    assert summary["error_summary"] == []
    assert summary["usage_discrepancy_count"]["avg"] == 0
    for one in numbers:
        assert one["usage_prompt_tokens"] == one["input_sequence_length"] + template
        assert one["usage_completion_tokens"] == one["output_sequence_length"] == MAX_TOKENS
    assert sorted(one["input_sequence_length"] for one in numbers) == sorted(ROUNDS * prompts)


def test_completions(served: str, model: Model, tmp_path: Path) -> None:
    encode = model.tokenizer.encode
    for prompt in PROMPTS:  # Who counts the tokens of a text counts those that are usual for it.
        ids = list(model.generate(encode(prompt), max_new_tokens=MAX_TOKENS))
        assert encode(model.tokenizer.decode(ids)) == ids
    summary, numbers = profile(tmp_path, served, "--endpoint-type", "completions")
    check(summary, numbers, [len(encode(prompt)) for prompt in PROMPTS])
    # What another request has read before is not read again.
    assert summary["total_usage_prompt_cache_read_tokens"]["avg"] > 0


def test_chats(stage: Stage, scripted: str, model: Model, tmp_path: Path) -> None:
    stage.author = lambda call: SOURCE.read_text()
    summary, numbers = profile(tmp_path, scripted, "--endpoint-type", "chat")
    template = model.tokenizer.chat([{"role": "user", "content": ""}])
    check(summary, numbers, [len(model.tokenizer.encode(prompt)) for prompt in PROMPTS], len(template))
