"""Haystacks have their exact length, hold what is asked for, and lack what is absent."""

from __future__ import annotations

import re

import pytest

from openm3.errors import DocumentError
from openm3.eval.haystack import Counts, Haystack, HaystackMaker, common_prefix
from openm3.model.model import Model
from openm3.tokens.prompt import user_message
from openm3.train.corpus import Source

COUNTS = Counts(pass_keys=3, quotes=2, absences=4)


@pytest.fixture(scope="module")
def maker(model: Model, sources: list[Source]) -> HaystackMaker:
    return HaystackMaker(model.tokenizer, 0, sources)


def of_kind(haystack: Haystack, kind: str) -> list[tuple[str, str, float | None, str | None]]:
    return [(a.question.subject, a.question.answer, a.depth, a.file) for a in haystack.asked if a.question.kind == kind]


@pytest.mark.parametrize("length", [1024, 1025, 3000, 20_000])
def test_prompts_part_after_exactly_length_tokens(maker: HaystackMaker, model: Model, length: int) -> None:
    for index in range(4):
        haystack = maker.make(length, index, COUNTS)
        first, *others = (haystack.prompt(model.tokenizer, a.question.text) for a in haystack.asked)
        assert min(common_prefix(first, other) for other in others) == length
        question, _, end = model.tokenizer.decode(first[length:]).partition("[e~[\n")
        assert (question, end) == (haystack.asked[0].question.text, "]~b]ai\n</mm:think>")


def test_same_seed_same_haystack(maker: HaystackMaker, model: Model, sources: list[Source]) -> None:
    again = HaystackMaker(model.tokenizer, 0, sources)
    other = HaystackMaker(model.tokenizer, 1, sources)
    assert maker.make(2000, 3, COUNTS) == again.make(2000, 3, COUNTS)
    assert (
        len(
            {
                h.documents
                for h in (maker.make(2000, 3, COUNTS), maker.make(2000, 4, COUNTS), other.make(2000, 3, COUNTS))
            }
        )
        == 3
    )


def test_what_is_asked_for_stands_where_it_is_said_to(maker: HaystackMaker) -> None:
    haystack = maker.make(4000, 0, COUNTS)
    text = "".join(body for _, body in haystack.documents)
    files = dict(haystack.documents)
    for subject, answer, depth, file in of_kind(haystack, "pass_key"):
        assert re.fullmatch(r"The pass key for .+ is \d{5}\.", answer)
        assert text.count(f"pass key for {subject} is") == 1
        assert file is not None and f"# {answer}\n" in files[file]
        assert depth == text.index(answer) / len(text)
    for subject, answer, depth, file in of_kind(haystack, "quote"):
        line = answer.removeprefix(f"The line that defines {subject} is ")
        assert file is not None and re.search(rf"^\s*{re.escape(line)}\s*$", files[file], re.MULTILINE)
        assert depth == text.index(line) / len(text)
    assert [len(of_kind(haystack, kind)) for kind in ("pass_key", "quote", "absence")] == [3, 2, 4]


def test_what_is_absent_is_not_there(maker: HaystackMaker) -> None:
    for index in range(10):
        haystack = maker.make(2000, index, COUNTS)
        text = "".join(body for _, body in haystack.documents)
        absent = of_kind(haystack, "absence")
        assert [answer.split()[1] for _, answer, _, _ in absent] == ["line", "pass"] * 2
        for subject, answer, depth, file in absent:
            assert answer.endswith(f"{subject} is not there.") and depth is None and file is None
            assert f"pass key for {subject} is" not in text
            assert not re.search(rf"(def|class) +{re.escape(subject)}\b", text)


def test_depths_spread_over_the_whole_haystack(maker: HaystackMaker) -> None:
    depths = [d for i in range(30) for _, _, d, _ in of_kind(maker.make(2000, i, COUNTS), "pass_key") if d is not None]
    assert len(depths) == 90
    assert min(depths) < 0.05 and max(depths) > 0.93
    assert abs(sum(depths) / 90 - 0.5) < 0.1


def test_conversation_marks_its_answers(maker: HaystackMaker, model: Model) -> None:
    haystack = maker.make(1500, 0, COUNTS)
    ids, positions = haystack.conversation(model.tokenizer)
    answered = model.tokenizer.decode([ids[p + 1] for p in positions])
    assert answered.split("[e~[")[:-1] == [a.question.answer for a in haystack.asked]
    assert user_message(haystack.documents, haystack.asked[0].question.text) in model.tokenizer.decode(ids)


def test_lengths_that_cannot_be_made(maker: HaystackMaker, model: Model, sources: list[Source]) -> None:
    with pytest.raises(DocumentError, match="at least 512 tokens, not 511"):
        maker.make(511, 0, COUNTS)
    with pytest.raises(DocumentError, match=r"hold only \d+ tokens: not enough for 50000"):
        HaystackMaker(model.tokenizer, 0, sources[:2]).make(50_000, 0, COUNTS)


def test_common_prefix() -> None:
    assert [common_prefix(*pair) for pair in (([], [1]), ([1, 2], [1, 2, 3]), ([1, 2], [1, 3]), ([2], [1]))] == [
        0,
        2,
        1,
        0,
    ]
