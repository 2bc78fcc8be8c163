"""Training sequences: real text with tasks, in the chat grammar, with rotary positions spread over a wide range."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Queue
from threading import Event, Thread

import torch
from torch import Tensor

from openm3.tokens.prompt import user_message
from openm3.tokens.tokenizer import SPECIALS, Tokenizer
from openm3.train.corpus import Source, gather, outline
from openm3.train.tasks import Question, TaskMaker


@dataclass(frozen=True)
class Sample:
    """One training sequence: ids, rotary positions, and which tokens the model is taught to answer with."""

    ids_T: Tensor
    position_T: Tensor
    answer_T: Tensor


@dataclass(frozen=True)
class Mixture:
    """What a stage of training reads: sequences of `length` tokens, `tokens` of them a step.

    `question_share` of a sequence at most, and `max_questions` turns, are questions and answers. Of the sequences,
    `gap_share` have jumps between rotary positions, up to `max_position`; `echo_share` are made of random records told
    again and again, `crowd_share` are crowded with definitions and pass keys, as a selection from a long text is.
    Of the names asked for that are not there, at least `lookalike_share` are close to names that are.
    """

    length: int
    tokens: int
    max_questions: int
    question_share: float = 0.5
    gap_share: float = 0.6
    echo_share: float = 0.0
    crowd_share: float = 0.3
    lookalike_share: float = 0.0
    max_position: int = 1_048_576


TURN_TOKENS = 50
"""About what one question with its answer takes."""


class SequenceMaker:
    """Endless training sequences, all randomness from one seed."""

    def __init__(self, tokenizer: Tokenizer, sources: Sequence[Source], words: Sequence[str], seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.sources = sources
        self.outlines = [o for o in map(outline, sources) if len(o.text) > 200]
        self.tasks = TaskMaker(sources, words, self.rng)
        sample = "".join(s.text[:2000] for s in self.rng.sample(list(sources), min(50, len(sources))))
        self.chars_per_token = len(sample) / len(tokenizer.encode(sample))
        think = tokenizer.token_id("</mm:think>")
        assert think is not None
        self.think_id, self.end_id = think, tokenizer.eos_id

    def make(self, mixture: Mixture) -> Sample:
        """One sequence of `mixture.length` tokens."""
        rng = self.rng
        most = max(1, min(mixture.max_questions, int(mixture.length * mixture.question_share / TURN_TOKENS)))
        num_questions = rng.randint(max(1, most // 2), most)
        room = mixture.length - num_questions * TURN_TOKENS - 24
        crowded = rng.random() < mixture.crowd_share
        num_chars = max(120, int(room * self.chars_per_token * rng.uniform(0.5, 0.9)))
        documents = gather(self.outlines if crowded else self.sources, num_chars, rng)
        documents, questions = self.tasks.make(
            documents, num_questions, room // 100 if crowded else 2, mixture.lookalike_share
        )
        ids = self.encode(documents, questions)
        while len(ids) > mixture.length and len(questions) > 1:
            questions = questions[:-1]
            ids = self.encode(documents, questions)
        if len(ids) > mixture.length:
            return self.make(mixture)
        ids = self._fill(ids, mixture.length)
        position_T = self._positions(len(ids), mixture)
        return Sample(torch.tensor(ids), position_T, self._answers(ids))

    def _fill(self, ids: list[int], length: int) -> list[int]:
        """Bring a conversation to the exact length: more text at its start, after the head of the first turn."""
        missing = length - len(ids)
        filler: list[int] = []
        while len(filler) < missing:
            filler += self.tokenizer.encode(gather(self.sources, missing * 8, self.rng)[0].text)
        head = len(self.tokenizer.encode("]~!b[]~b]user\n", special=True))
        return ids[:head] + filler[len(filler) - missing :] + ids[head:]

    def encode(self, documents: Sequence[Source], questions: Sequence[Question]) -> list[int]:
        """The conversation: documents and first question, its answer, then the other questions, a turn each."""
        messages = []
        for i, question in enumerate(questions):
            text = question.text if i else user_message([(d.name, d.text) for d in documents], question.text)
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": question.answer})
        return self.tokenizer.chat(messages, add_generation_prompt=False)

    def batch(self, mixture: Mixture) -> list[Sample]:
        """Sequences for one step, about `mixture.tokens` in all."""
        return [
            self.echo(mixture) if self.rng.random() < mixture.echo_share else self.make(mixture)
            for _ in range(max(1, mixture.tokens // mixture.length))
        ]

    def echo(self, mixture: Mixture) -> Sample:
        """Random records (a few tokens of name, a few of value), told in random order until the sequence is full.

        Every record told again counts as an answer after its first two tokens: the plainest form of looking things up.
        """
        rng = self.rng
        ordinary = range(self.tokenizer.vocab_size - len(SPECIALS))
        records = [rng.choices(ordinary, k=rng.randint(4, 12)) for _ in range(rng.randint(2, mixture.length // 24))]
        ids: list[int] = []
        flags: list[bool] = []
        told = [False] * len(records)
        while len(ids) < mixture.length:
            i = rng.randrange(len(records))
            ids += records[i]
            flags += [told[i] and k >= 2 for k in range(len(records[i]))]
            told[i] = True
        position_T = self._positions(mixture.length, mixture)
        return Sample(torch.tensor(ids[: mixture.length]), position_T, torch.tensor(flags[: mixture.length]))

    def _answers(self, ids: list[int]) -> Tensor:
        """True on the tokens of the assistant's turns, from the end of thinking to the end of the turn inclusive."""
        flags, inside = [], False
        for token in ids:
            inside = inside or token == self.think_id
            flags.append(inside)
            inside = inside and token != self.end_id
        return torch.tensor(flags)

    def _positions(self, length: int, mixture: Mixture) -> Tensor:
        """Consecutive positions from a random start, or chunks with log-uniform jumps between them."""
        rng = self.rng
        step = torch.ones(length, dtype=torch.long)
        limit = mixture.max_position - length
        if rng.random() < mixture.gap_share:
            cuts = rng.sample(range(1, length), rng.randint(1, 6))
            total = math.exp(rng.uniform(math.log(128), math.log(limit)))
            shares = [rng.random() for _ in cuts]
            for cut, share in zip(cuts, shares, strict=True):
                step[cut] += int(total * share / sum(shares))
        position_T = step.cumsum(0) - 1
        return position_T + rng.randrange(mixture.max_position - int(position_T[-1]))


class Prefetcher:
    """Batches made by a thread while the model trains on the one before."""

    def __init__(self, maker: SequenceMaker, mixtures: Iterator[Mixture]) -> None:
        self._queue: Queue[list[Sample] | BaseException | None] = Queue(maxsize=4)
        self._stop = Event()
        self._thread = Thread(target=self._fill, args=(maker, mixtures), daemon=True)
        self._thread.start()

    def _fill(self, maker: SequenceMaker, mixtures: Iterator[Mixture]) -> None:
        try:
            for mixture in mixtures:
                if self._stop.is_set():
                    return
                self._queue.put(maker.batch(mixture))
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def __iter__(self) -> Iterator[list[Sample]]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop making batches."""
        self._stop.set()
        while not self._queue.empty():
            self._queue.get_nowait()
