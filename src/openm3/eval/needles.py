"""What a model finds at length: pass keys, quotes and absence, with its own attention and with a window of it.

Each haystack is read once and asked many questions: after each, the session is rewound to where the prompts part. The
windowed model is the same one with every selection replaced by the newest blocks, on the same questions: what it cannot
answer and the model can, selection found.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from openm3.errors import ConfigError
from openm3.eval.haystack import Counts, Haystack, HaystackMaker, common_prefix
from openm3.model.model import Model
from openm3.model.network import Network
from openm3.model.session import Session
from openm3.tokens.tokenizer import Tokenizer

ATTENTIONS = ("selected", "window")
"""The model's own selection, or its newest `num_selected` blocks alone."""

PER_HAYSTACK = Counts(pass_keys=10, quotes=5, absences=5)
"""Questions asked of one haystack; the shares of the kinds stay the same where fewer are asked."""


@dataclass(frozen=True)
class Result:
    """One question answered. `right`: the whole answer as expected, or for absence that it says so.

    `digits`: the pass key itself was right, whatever stands around it. `depth` and `file` say where the answer stood.
    """

    attention: str
    length: int
    haystack: int
    kind: str
    question: str
    expected: str
    answer: str
    right: bool
    digits: bool
    depth: float | None
    file: str | None


@dataclass(frozen=True)
class Plan:
    """What to ask: `pass_keys` of them at each length, half as many quotes and absences, with each attention."""

    lengths: tuple[int, ...]
    pass_keys: tuple[int, ...]
    attentions: tuple[str, ...] = ATTENTIONS
    seed: int = 0

    def readings(self) -> Iterator[tuple[int, int, Counts, str]]:
        """Every (length, haystack, counts, attention), the attentions of one haystack together."""
        for length, total in zip(self.lengths, self.pass_keys, strict=True):
            for index, first in enumerate(range(0, total, PER_HAYSTACK.pass_keys)):
                keys = min(PER_HAYSTACK.pass_keys, total - first)
                half = -(-keys * PER_HAYSTACK.quotes // PER_HAYSTACK.pass_keys)
                for attention in self.attentions:
                    yield length, index, Counts(keys, half, half), attention


class Reader:
    """A model in front of prompts that begin alike: the beginning is read once."""

    def __init__(self, network: Network, capacity: int) -> None:
        self._session = Session(network, capacity)
        self._ids: list[int] = []

    def answer(
        self, ids: list[int], *, limit: int, stop_id: int, on_progress: Callable[[int], None] | None = None
    ) -> list[int]:
        """Greedy tokens after a prompt, at most `limit`, before `stop_id`; `on_progress` gets the tokens read."""
        # The last token is always read again: its logits are not kept.
        kept = min(common_prefix(self._ids, ids), len(ids) - 1)
        self._session.rewind(kept)
        self._ids = ids[:kept]
        report = None if on_progress is None else lambda done: on_progress(kept + done)
        logit_V = self._session.read(ids[kept:], on_progress=report)
        self._ids = ids
        answer: list[int] = []
        for token in self._session.decode(logit_V, limit):
            if token == stop_id:
                break
            answer.append(token)
        return answer


def limit_to_window(network: Network) -> Network:
    """The same network, sharing its weights, where every token attends to its newest `num_selected` blocks.

    Raises ConfigError for a network with dense attention layers, which have no selection to replace.
    """
    config = network.config
    if "full" in config.layer_types:
        raise ConfigError("attention cannot be limited to a window: the model has dense attention layers")
    shared: dict[int, object] = {id(x): x for x in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, {**shared, id(config): replace(config, num_local=config.num_selected)})


def ask(model: Model, plan: Plan, store: Store, *, on_progress: Callable[[int], None] | None = None) -> list[Result]:
    """Ask everything that `store` lacks and return all results of the plan, in its order.

    `on_progress` gets the tokens read since its last call. Interrupted, every finished haystack is in the store.
    Raises ConfigError for lengths beyond the model's limit, DocumentError for those that no haystack can have.
    """
    if max(plan.lengths) > model.config.max_positions:
        limit = model.config.max_positions
        raise ConfigError(f"{max(plan.lengths)} tokens exceed the model's limit of {limit}")
    maker = HaystackMaker(model.tokenizer, plan.seed)
    networks = {name: limit_to_window(model.network) if name == "window" else model.network for name in plan.attentions}
    results: list[Result] = []
    for length, index, counts, attention in plan.readings():
        found = store.find(attention, length, index, counts)
        if found is None:
            haystack = maker.make(length, index, counts)
            found = _ask_haystack(networks[attention], model.tokenizer, haystack, on_progress)
            found = [replace(r, attention=attention, length=length, haystack=index) for r in found]
            store.add(found)
        elif on_progress is not None:
            on_progress(length)
        results += found
    return results


def _ask_haystack(
    network: Network, tokenizer: Tokenizer, haystack: Haystack, on_progress: Callable[[int], None] | None
) -> list[Result]:
    prompts = [haystack.prompt(tokenizer, asked.question.text) for asked in haystack.asked]
    limits = [len(tokenizer.encode(asked.question.answer)) + 8 for asked in haystack.asked]
    reader = Reader(network, max(map(len, prompts)) + max(limits))
    read = 0

    def report(done: int) -> None:
        nonlocal read
        if on_progress is not None and done > read:
            on_progress(done - read)
            read = done

    results = []
    for asked, ids, limit in zip(haystack.asked, prompts, limits, strict=True):
        question = asked.question
        answer = tokenizer.decode(reader.answer(ids, limit=limit, stop_id=tokenizer.eos_id, on_progress=report))
        right, digits = score(question.kind, question.answer, answer)
        place = (question.kind, question.text, question.answer, answer, right, digits, asked.depth, asked.file)
        results.append(Result("", 0, 0, *place))
    return results


def score(kind: str, expected: str, answer: str) -> tuple[bool, bool]:
    """Whether an answer is right, and whether its pass key is (False for other kinds)."""
    if kind == "absence":
        return "is not there." in answer, False
    key = expected.rpartition(" ")[2]
    return answer == expected, kind == "pass_key" and answer.rpartition(" ")[2] == key


class Store:
    """Results on disk, one JSON file rewritten whole after each haystack: what a run goes on from."""

    def __init__(self, folder: Path, model: Model, seed: int) -> None:
        """Open `folder`, making it if needed. Raises ConfigError if it holds results of another model or seed."""
        self.path = folder / "results.json"
        self._settings = {"weights": fingerprint(model.network), "seed": seed}
        self._results: list[Result] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            values = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else None
            if values is not None:
                self._results = [Result(**result) for result in values["results"]]
                settings = values["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path} does not hold results that can be gone on from: {error!r}") from None
        if values is not None and settings != self._settings:
            raise ConfigError(f"{self.path} holds results of another model or seed: give another --out")

    def find(self, attention: str, length: int, haystack: int, counts: Counts) -> list[Result] | None:
        """The results of one reading, None if it was not done with as many pass keys."""
        key = (attention, length, haystack)
        found = [r for r in self._results if (r.attention, r.length, r.haystack) == key]
        return found if sum(r.kind == "pass_key" for r in found) == counts.pass_keys else None

    def add(self, results: Sequence[Result]) -> None:
        """Keep the results of one reading, in place of older ones of it."""
        keys = {(r.attention, r.length, r.haystack) for r in results}
        self._results = [r for r in self._results if (r.attention, r.length, r.haystack) not in keys] + list(results)
        values: dict[str, Any] = {"settings": self._settings, "results": [asdict(r) for r in self._results]}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def fingerprint(network: Network) -> str:
    """A short digest of the weights: of the norms, which any training changes and are quick to read, and of dtypes."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if "norm" in name:
            digest.update(value.float().numpy().tobytes())
        if value.dtype != torch.float32:
            digest.update(f"{name} {value.dtype}".encode())
    return digest.hexdigest()[:16]
