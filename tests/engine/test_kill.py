"""Killed again and again while it writes its cache folder, an engine never gives a wrong answer."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openm3.config import BLOCK, EngineConfig
from openm3.engine.engine import Engine
from openm3.engine.request import SamplingParams
from openm3.model.model import Model, load

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
KILLS = 100


def prompts() -> list[list[int]]:
    generator = random.Random(0)
    roots = [[generator.randrange(300) for _ in range(700)] for _ in range(4)]
    return [generator.choice(roots) + [generator.randrange(300) for _ in range(300)] for _ in range(60)]


def serve(model: Model, folder: Path, asked: list[list[int]]) -> list[list[int]]:
    config = EngineConfig(cache_tokens=40 * BLOCK, step_tokens=400, max_requests=4, cache_dir=folder, check=True)
    with Engine(model, config) as engine:
        return [reply.ids for reply in engine.generate(asked, GREEDY)]


def kill_many(folder: Path) -> None:
    """Fork engines that serve out of one folder, in pairs, and kill each after a moment."""
    model, generator = load(GOLDEN / "model"), random.Random(1)
    for number in range(KILLS // 2):
        children = []
        for first in (0, 1):
            child = os.fork()
            if child == 0:
                serve(model, folder, prompts()[(number + first) % 30 :])
                os._exit(0)
            children.append(child)
        signal.sigtimedwait([signal.SIGUSR1], generator.uniform(0.05, 0.5))
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.e2e
def test_a_hundred_kills_change_no_answer(tmp_path: Path) -> None:
    script = f"import sys; sys.path[:0] = {sys.path!r}; from test_kill import *; kill_many(Path({str(tmp_path)!r}))"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, check=True
    )
    model, asked = load(GOLDEN / "model"), prompts()
    files = list(tmp_path.rglob("*.page"))
    assert len(files) > 50
    replies = serve(model, tmp_path, asked)
    for prompt, ids in zip(asked, replies, strict=True):
        assert ids == list(model.generate(prompt, max_new_tokens=6))
