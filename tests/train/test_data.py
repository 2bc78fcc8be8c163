"""Training sequences: exact lengths, what counts as an answer, rotary positions, and the thread that makes them."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat

import pytest
import torch
from torch import Tensor

from openm3.tokens.tokenizer import SPECIALS, Tokenizer
from openm3.train.corpus import Source, words
from openm3.train.data import Mixture, Prefetcher, Sample, SequenceMaker

MIXTURE = Mixture(length=400, tokens=1300, max_questions=4)


def equal(a: Sample, b: Sample) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids_T", "position_T", "answer_T"))


def spans(flag_T: Tensor) -> list[tuple[int, int]]:
    """Runs of True, as (begin, end)."""
    edge = torch.nn.functional.pad(flag_T.int(), (1, 1)).diff()
    return list(zip((edge == 1).nonzero()[:, 0].tolist(), (edge == -1).nonzero()[:, 0].tolist(), strict=True))


@pytest.mark.parametrize("length", [256, 400, 1024])
@pytest.mark.parametrize("crowd_share", [0.0, 1.0])
def test_sequence_has_the_exact_length(maker: SequenceMaker, length: int, crowd_share: float) -> None:
    mixture = replace(MIXTURE, length=length, crowd_share=crowd_share)
    for _ in range(3):
        sample = maker.make(mixture)
        assert sample.ids_T.shape == sample.position_T.shape == sample.answer_T.shape == (length,)


def test_answers_are_the_assistants_turns(maker: SequenceMaker, tokenizer: Tokenizer) -> None:
    think = tokenizer.token_id("</mm:think>")
    num_answers = 0
    for _ in range(6):
        sample = maker.make(MIXTURE)
        ids = sample.ids_T.tolist()
        begins = [i for i, token in enumerate(ids) if token == think]
        assert spans(sample.answer_T) == [(i, ids.index(tokenizer.eos_id, i) + 1) for i in begins]
        for begin, end in spans(sample.answer_T):
            text = tokenizer.decode(ids[begin:end])
            assert re.fullmatch(r"</mm:think>The (pass key for|line that defines) .+ is .+\[e~\[", text)
        num_answers += len(begins)
    assert num_answers > 6


def test_sequence_is_a_conversation(maker: SequenceMaker, tokenizer: Tokenizer) -> None:
    for _ in range(4):
        text = tokenizer.decode(maker.make(MIXTURE).ids_T.tolist())
        assert text.startswith("]~!b[]~b]user\n") and text.count("]~!b[") == 1
        roles = re.findall(r"\]~b\](\w+)\n", text)
        assert roles == ["user", "ai"] * (len(roles) // 2)
        assert "\nFile: " in text


def test_positions_without_gaps_are_consecutive(maker: SequenceMaker) -> None:
    for _ in range(4):
        position_T = maker.make(replace(MIXTURE, gap_share=0.0, max_position=1000)).position_T
        assert position_T.diff().eq(1).all()
        assert position_T[0] >= 0 and position_T[-1] < 1000


def test_positions_with_gaps_rise_within_the_limit(maker: SequenceMaker) -> None:
    reach = []
    for _ in range(300):
        position_T = maker._positions(64, replace(MIXTURE, gap_share=1.0, max_position=4096))
        assert position_T.diff().ge(1).all() and 1 <= position_T.diff().gt(1).sum() <= 6
        assert position_T[0] >= 0 and position_T[-1] < 4096
        reach.append(int(position_T[-1] - position_T[0]))
    assert min(reach) < 300 and max(reach) > 3000


def test_echo_answers_were_told_before(maker: SequenceMaker, tokenizer: Tokenizer) -> None:
    for _ in range(4):
        sample = maker.echo(MIXTURE)
        ids = sample.ids_T.tolist()
        assert len(ids) == len(sample.answer_T) == len(sample.position_T) == MIXTURE.length
        assert max(ids) < tokenizer.vocab_size - len(SPECIALS)
        told = sample.answer_T.nonzero()[:, 0].tolist()
        assert told and told[0] >= 6
        for t in told:
            assert any(ids[s - 2 : s + 1] == ids[t - 2 : t + 1] for s in range(2, t))


def test_batch_fills_the_step(maker: SequenceMaker) -> None:
    assert [len(s.ids_T) for s in maker.batch(MIXTURE)] == [400] * 3
    assert len(maker.batch(replace(MIXTURE, tokens=1))) == 1
    assert all(s.answer_T.any() for s in maker.batch(replace(MIXTURE, echo_share=1.0)))


def test_same_seed_same_sequences(tokenizer: Tokenizer, sources: list[Source]) -> None:
    mixture = replace(MIXTURE, echo_share=0.3)
    first, second, other = (
        SequenceMaker(tokenizer, sources, words(sources), seed).batch(mixture) for seed in (5, 5, 6)
    )
    assert all(map(equal, first, second))
    assert not any(map(equal, first, other))


def test_prefetcher_gives_every_batch_in_order(maker: SequenceMaker) -> None:
    lengths = [100, 200, 300, 150, 250, 350, 120]
    mixtures = iter([replace(MIXTURE, length=n, tokens=n, echo_share=1.0) for n in lengths])
    assert [len(batch[0].ids_T) for batch in Prefetcher(maker, mixtures)] == lengths


def test_prefetcher_passes_an_exception_on(maker: SequenceMaker) -> None:
    def mixtures() -> Iterator[Mixture]:
        yield replace(MIXTURE, echo_share=1.0)
        raise RuntimeError("no more text")

    feed = iter(Prefetcher(maker, mixtures()))
    assert len(next(feed)) == 3
    with pytest.raises(RuntimeError, match="no more text"):
        next(feed)


def test_prefetcher_stops(maker: SequenceMaker) -> None:
    feed = Prefetcher(maker, repeat(replace(MIXTURE, echo_share=1.0)))
    assert len(next(iter(feed))) == 3
    feed.close()
    feed._thread.join(timeout=60)
    assert not feed._thread.is_alive()
