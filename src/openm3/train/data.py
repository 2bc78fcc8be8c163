"""Training sequences: real text with tasks, in the chat grammar, with rotary positions spread over a wide range."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Queue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from openm3.tokens.media import Media
from openm3.tokens.pictures import read_image
from openm3.tokens.prompt import user_message
from openm3.tokens.tokenizer import SPECIALS, Tokenizer
from openm3.tokens.video import video_from_frames
from openm3.train.corpus import Source, gather, outline
from openm3.train.pictures import WRITING, Sight, SightMaker
from openm3.train.tasks import Question, TaskMaker


@dataclass(frozen=True)
class Sample:
    """One training sequence: ids, rotary positions, and which tokens the model is taught to answer with.

    `glimpses` stand for its placeholders, in order; `seen` says that all its questions are about them. One without ids
    only shows what there is to see.
    """

    ids_T: Tensor
    position_T: Tensor
    answer_T: Tensor
    glimpses: tuple[Glimpse, ...] = ()
    seen: bool = False


@dataclass(frozen=True)
class Glimpse:
    """A picture or video, and what is known of where things are in it.

    Token `place_N` of it shows, with a share of `weight_N`, what the vocabulary's token `name_N` stands for.
    """

    media: Media
    place_N: Tensor
    name_N: Tensor
    weight_N: Tensor


@dataclass(frozen=True)
class Mixture:
    """What a stage of training reads: sequences of `length` tokens, `tokens` of them a step.

    `question_share` of a sequence at most, and `max_questions` turns, are questions and answers. Of the sequences,
    `gap_share` have jumps between rotary positions, up to `max_position`; `echo_share` are made of random records told
    again and again, `crowd_share` are crowded with definitions and pass keys, as a selection from a long text is.
    Of the names asked for that are not there, at least `lookalike_share` are close to names that are.

    Beside these there are `pictured` tokens of sequences in which every question is about another picture or video, and
    `inserted_share` of the sequences of text hold one picture that is asked for among the rest. Of `shown` patches of
    pictures it is only said what is where.
    """

    length: int
    tokens: int
    max_questions: int
    question_share: float = 0.5
    gap_share: float = 0.6
    echo_share: float = 0.0
    crowd_share: float = 0.3
    lookalike_share: float = 0.0
    pictured: int = 0
    inserted_share: float = 0.0
    shown: int = 0
    max_position: int = 1_048_576


TURN_TOKENS = 50
"""About what one question with its answer takes."""

PICTURE_TURN_TOKENS = 30
"""The same where a picture was asked about, beside its own tokens."""

TIME_TOKENS = 14
"""About what the time of two frames takes."""

LEAST_SHARE = 0.3
"""Of a glyph, or of a token's square, that must be in the square to be said to be there."""

SHOWN_KINDS = (WRITING, WRITING, WRITING, WRITING, "count", "colour")
"""Kinds of pictures that are only looked at."""

INSERTED_KINDS = ("number", "number", "number", "word", "colour", "shape")
"""Kinds of pictures that stand somewhere in a text."""


@dataclass(frozen=True)
class Seen:
    """A picture or video with a question about it; of the answer `spelled` is read off it glyph by glyph.

    `depth` is where it stands in a text, 0 the start, 1 the end.
    """

    glimpse: Glimpse
    question: Question
    spelled: str | None
    depth: float

    @property
    def media(self) -> Media:
        return self.glimpse.media


class SequenceMaker:
    """Endless training sequences, all randomness from one seed."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sources: Sequence[Source],
        words: Sequence[str],
        seed: int,
        sights: SightMaker | None = None,
    ) -> None:
        self.seed = seed
        self.sights = sights
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
        seen = None
        if self.sights is not None and rng.random() < mixture.inserted_share:
            seen = self.look(self.sights.make(rng.choice(INSERTED_KINDS)))
            questions = [seen.question, *questions]
            rng.shuffle(questions)
        ids = self.encode(documents, questions, seen)
        while len(ids) > mixture.length and len(questions) > 1:
            questions = _without_last(questions, seen)
            ids = self.encode(documents, questions, seen)
        if len(ids) > mixture.length:
            return self.make(mixture)
        ids = self._fill(ids, mixture.length)
        position_T = self._positions(len(ids), mixture)
        return Sample(torch.tensor(ids), position_T, self._answers(ids), () if seen is None else (seen.glimpse,))

    def _fill(self, ids: list[int], length: int) -> list[int]:
        """Bring a conversation to the exact length: more text at its start, after the head of the first turn."""
        missing = length - len(ids)
        filler: list[int] = []
        while len(filler) < missing:
            filler += self.tokenizer.encode(gather(self.sources, missing * 8, self.rng)[0].text)
        head = len(self.tokenizer.encode("]~!b[]~b]user\n", special=True))
        return ids[:head] + filler[len(filler) - missing :] + ids[head:]

    def encode(self, documents: Sequence[Source], questions: Sequence[Question], seen: Seen | None = None) -> list[int]:
        """The conversation: documents and first question, its answer, then the other questions, a turn each.

        A picture stands at a line's end somewhere in the documents.
        """
        messages: list[dict[str, Any]] = []
        for i, question in enumerate(questions):
            content: Any = question.text
            if i == 0:
                content = user_message([(d.name, d.text) for d in documents], question.text)
                if seen is not None:
                    ends = [place.end() for place in re.finditer("\n", content)]
                    cut = ends[int(seen.depth * len(ends))] if ends else 0
                    content = [_text(content[:cut]), {"type": seen.media.kind}, _text(content[cut:])]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": question.answer})
        media = () if seen is None else (seen.media,)
        ids = self.tokenizer.chat(messages, add_generation_prompt=False, media=media)
        return ids if seen is None else self._spelled(ids, {questions.index(seen.question): seen.spelled})

    def look(self, sight: Sight) -> Seen:
        """A sight as the model takes it, with its question."""
        is_video = sight.seconds is not None
        media = video_from_frames(sight.frames, sight.seconds) if is_video else read_image(sight.frames[0])
        question = Question(sight.kind, sight.question, sight.answer, sight.kind)
        return Seen(self._labelled(media, sight), question, sight.spelled, self.rng.random())

    def _labelled(self, media: Media, sight: Sight) -> Glimpse:
        """What each token of a picture shows: glyphs and names by the tokens that stand for them in text."""
        height, width = sight.frames[0].shape[:2]
        _, h, w = media.grids[0]
        labels = []
        for name, (left, top, right, bottom) in sight.shown:
            token = self.tokenizer.encode(name if len(name) == 1 else f" {name}")[0]
            # In squares of 2x2 patches, a token each.
            x0, x1, y0, y1 = left * w / 2 / width, right * w / 2 / width, top * h / 2 / height, bottom * h / 2 / height
            whole = min(1.0, (x1 - x0) * (y1 - y0))
            for y in range(int(y0), min(h // 2, math.ceil(y1))):
                for x in range(int(x0), min(w // 2, math.ceil(x1))):
                    share = (min(x1, x + 1) - max(x0, x)) * (min(y1, y + 1) - max(y0, y)) / max(whole, 1e-6)
                    if share > LEAST_SHARE:
                        labels.append((y * (w // 2) + x, token, share))
        places, names, weights = zip(*labels, strict=True) if labels else ((), (), ())
        return Glimpse(
            media,
            torch.tensor(places, dtype=torch.long),
            torch.tensor(names, dtype=torch.long),
            torch.tensor(weights, dtype=torch.float32),
        )

    def shown(self, mixture: Mixture) -> list[Sample]:
        """Pictures of about `mixture.shown` patches in all, of which it is said what is where."""
        glimpses: list[Glimpse] = []
        left = 0 if self.sights is None else mixture.shown
        while left > 0:
            assert self.sights is not None
            glimpses.append(self.look(self.sights.make(self.rng.choice(SHOWN_KINDS))).glimpse)
            left -= len(glimpses[-1].media.patch_IC)
        nothing = torch.zeros(0, dtype=torch.long)
        return [Sample(nothing, nothing, nothing.bool(), tuple(glimpses))] if glimpses else []

    def pictured(self, mixture: Mixture) -> Sample:
        """A sequence of `mixture.length` tokens in which every turn brings a picture or a video and asks about it."""
        assert self.sights is not None
        turns: list[Seen] = []
        length = 0
        while True:
            seen = self.look(self.sights.make())
            tokens = seen.media.num_tokens + len(seen.media.seconds or ()) * TIME_TOKENS + PICTURE_TURN_TOKENS
            if turns and length + tokens > mixture.length:
                break
            if length + tokens <= mixture.length:
                turns.append(seen)
                length += tokens
        messages: list[dict[str, Any]] = []
        for seen in turns:
            parts = [{"type": seen.media.kind}, _text(seen.question.text)]
            messages.append({"role": "user", "content": parts if self.rng.random() < 0.7 else parts[::-1]})
            messages.append({"role": "assistant", "content": seen.question.answer})
        while turns:
            media = tuple(seen.media for seen in turns)
            ids = self.tokenizer.chat(messages[: 2 * len(turns)], add_generation_prompt=False, media=media)
            ids = self._spelled(ids, {i: seen.spelled for i, seen in enumerate(turns)})
            if len(ids) <= mixture.length:
                ids = self._fill(ids, mixture.length)
                position_T = self._positions(len(ids), mixture)
                glimpses = tuple(seen.glimpse for seen in turns)
                return Sample(torch.tensor(ids), position_T, self._answers(ids), glimpses, seen=True)
            turns.pop()
        return self.pictured(mixture)

    def _spelled(self, ids: list[int], spelled: Mapping[int, str | None]) -> list[int]:
        """The conversation with parts of some answers, by their number, in tokens of one character each.

        What is read from a picture is read glyph by glyph: so taught, a tenth of the pictures is enough.
        """
        found: list[int] = []
        number, begin = -1, None
        for token in ids:
            if token == self.end_id and begin is not None:
                part = spelled.get(number)
                if part:
                    text = self.tokenizer.decode(found[begin:])
                    before, _, after = text.partition(part)
                    space = " " if before.endswith(" ") else ""
                    pieces = [before.removesuffix(" "), space + part[0], *part[1:], after]
                    found[begin:] = [token for piece in pieces if piece for token in self.tokenizer.encode(piece)]
                begin = None
            found.append(token)
            if token == self.think_id:
                number, begin = number + 1, len(found)
        return found

    def batch(self, mixture: Mixture) -> list[Sample]:
        """Sequences for one step, about `mixture.tokens` of text in all, and `mixture.pictured` with pictures."""
        texts = [
            self.echo(mixture) if self.rng.random() < mixture.echo_share else self.make(mixture)
            for _ in range(max(1, mixture.tokens // mixture.length))
        ]
        count = 0 if self.sights is None else mixture.pictured // mixture.length
        return texts + [self.pictured(mixture) for _ in range(count)] + self.shown(mixture)

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


def _without_last(questions: Sequence[Question], seen: Seen | None) -> list[Question]:
    """All but the last question that is not about the picture."""
    last = max(i for i, question in enumerate(questions) if seen is None or question is not seen.question)
    return [*questions[:last], *questions[last + 1 :]]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


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
