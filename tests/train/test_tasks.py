"""Questions with one right answer: their exact words, and that the documents bear them out."""

import random
import re

import pytest

from openm3.train.corpus import Source
from openm3.train.tasks import (
    KEY_QUESTIONS,
    QUOTE_QUESTIONS,
    Question,
    TaskMaker,
    definitions,
    insert_lines,
    key_line,
    key_question,
    lookalike,
    quote_question,
    random_key,
    random_name,
    similar_name,
)

WORDS = ["Apple", "cherry", "Grape", "lemon", "mango", "olive", "peach", "plum"]


def fake(i: int) -> Source:
    """Names of its own and one that every file has; it calls what nobody defines, and has no last newline."""
    text = f"""import os{i}

class Fruit{i}(Base):
    def __init__(self) -> None:
        self.value = unknown_{i}(1) + prepare(2)

    async def fetch_{i}(self, url: str) -> bytes:
        return await download_{i}(url)

def much_too_long_{i}({", ".join(f"argument_{k}" for k in range(12))}):
    return {i}

def peel_{i}(x): return x"""
    return Source(f"fruit{i}.py", text)


SOURCES = [fake(i) for i in range(12)]


def defined(name: str, text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if re.match(rf"(async +def|def|class) +{re.escape(name)}\b", line)]


def assert_true(question: Question, text: str) -> None:
    """The documents bear the answer out."""
    told = text.count(f"The pass key for {question.subject} is ")
    if question.kind == "pass_key":
        assert told == 1
        assert any(line.endswith(question.answer) for line in text.splitlines())
    elif question.kind == "quote":
        (line,) = defined(question.subject, text)
        assert question.answer == f"The line that defines {question.subject} is {line}"
    elif "pass key" in question.answer:
        assert told == 0
        assert question.answer == f"The pass key for {question.subject} is not there."
    else:
        assert defined(question.subject, text) == []
        assert question.answer == f"The line that defines {question.subject} is not there."


def test_key_question_texts() -> None:
    assert key_line("Ada", "01234") == "The pass key for Ada is 01234."
    assert key_question("Ada", "01234") == Question(
        "pass_key", "What is the pass key for Ada?", "The pass key for Ada is 01234.", "Ada"
    )
    assert key_question("red fox", None, KEY_QUESTIONS[-1]) == Question(
        "absence", "Tell me the pass key for red fox.", "The pass key for red fox is not there.", "red fox"
    )


def test_quote_question_texts() -> None:
    assert quote_question("main", "def main():") == Question(
        "quote", "Quote the line that defines main.", "The line that defines main is def main():", "main"
    )
    assert quote_question("main", None, QUOTE_QUESTIONS[-2]) == Question(
        "absence", "Where is main defined?", "The line that defines main is not there.", "main"
    )
    assert quote_question("A", "class A:", QUOTE_QUESTIONS[-1]).text == "Show me the definition of A."


@pytest.mark.parametrize(
    ("depth", "text"), [(0.0, "KEY\na\nb\nc\nd\n"), (0.5, "a\nb\nKEY\nc\nd\n"), (1.0, "a\nb\nc\nd\nKEY\n")]
)
@pytest.mark.parametrize("end", ["\n", ""])
def test_line_is_inserted_at_its_depth(depth: float, text: str, end: str) -> None:
    assert insert_lines(Source("x", "a\nb\nc\nd" + end), ["KEY"], [depth]) == Source("x", text)


def test_lines_are_inserted_together() -> None:
    document = insert_lines(Source("x", "a\nb\nc\nd\n"), ["2", "1", "3"], [1.0, 0.0, 0.5])
    assert document.text == "1\na\nb\n3\nc\nd\n2\n"
    assert insert_lines(Source("x", ""), ["1"], [0.3]).text == "1\n"
    with pytest.raises(ValueError, match="zip"):
        insert_lines(Source("x", "a\n"), ["1", "2"], [0.0])


def test_definitions_are_unique_and_short() -> None:
    assert definitions([fake(1), fake(2)]) == {
        "Fruit1": "class Fruit1(Base):",
        "fetch_1": "async def fetch_1(self, url: str) -> bytes:",
        "peel_1": "def peel_1(x): return x",
        "Fruit2": "class Fruit2(Base):",
        "fetch_2": "async def fetch_2(self, url: str) -> bytes:",
        "peel_2": "def peel_2(x): return x",
    }
    assert set(definitions([fake(1)], max_chars=30)) == {"Fruit1", "__init__", "peel_1"}


def test_similar_name_always_differs() -> None:
    rng = random.Random(0)
    for few in (WORDS, ["plum"]):
        for _ in range(500):
            name = random_name(few, rng)
            assert similar_name(name, few, rng) != name


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("ReadTimeout", r"[A-Z][a-z]+Timeout|Read[A-Z][a-z]+"),
        ("open_file", r"[a-z]+_file|open_[a-z]+"),
        ("SSLTest", r"[A-Z]+Test|SSL[A-Z][a-z]+"),
        ("_refs", r"_[a-z]+"),
        ("red fox", r"[a-z]+ fox|red [a-z]+"),
    ],
)
def test_a_lookalike_differs_in_one_part_and_keeps_its_case(name: str, pattern: str) -> None:
    rng = random.Random(3)
    found = {lookalike(name, WORDS, rng) for _ in range(40)}
    assert len(found) > 5 and name not in found
    assert all(re.fullmatch(pattern, other) for other in found), found


def test_near_misses_are_close_to_what_is_there_and_not_there() -> None:
    called, keyed = set(), 0
    for seed in range(40):
        maker = TaskMaker(SOURCES, WORDS, random.Random(seed))
        documents, questions = maker.make(SOURCES[:3], 10, lookalikes=1.0)
        text = "\n".join(d.text for d in documents)
        names = re.findall(r"The pass key for (.*) is ", text)
        for question in (q for q in questions if q.kind == "absence"):
            assert_true(question, text)
            if f" {question.subject}(" in text:
                called.add(question.subject)
            elif "pass key" in question.text and names:
                parts = set(re.split(r"[-_ ]|(?<=[a-z])(?=[A-Z])", question.subject))
                # A name of one part has all of it exchanged.
                keyed += len(parts) == 1 or any(parts & set(re.split(r"[-_ ]|(?<=[a-z])(?=[A-Z])", n)) for n in names)
    assert len(called) > 4 and called <= {
        "prepare",
        *(f"{verb}_{i}" for verb in ("unknown", "download") for i in range(3)),
    }
    assert keyed > 30


def test_random_key_has_digits_only() -> None:
    assert re.fullmatch(r"\d{6}", random_key(random.Random(0), 6))
    assert random_key(random.Random(0)) == random_key(random.Random(0))


def test_every_answer_is_true() -> None:
    kinds = []
    for seed in range(50):
        rng = random.Random(seed)
        tasks = TaskMaker(SOURCES, WORDS, rng)
        before = rng.sample(SOURCES, 3)
        documents, questions = tasks.make(before, 6, num_decoys=3)
        text = "\n".join(d.text for d in documents)
        assert len(questions) == 6
        for question in questions:
            assert question.subject in question.text
            assert_true(question, text)
        for old, new in zip(before, documents, strict=True):
            assert new.name == old.name
            kept = [line for line in new.text.splitlines() if "The pass key for " not in line]
            assert kept == old.text.splitlines()
        kinds += [q.kind for q in questions]
    share = {kind: kinds.count(kind) / len(kinds) for kind in set(kinds)}
    assert share == pytest.approx({"pass_key": 0.42, "quote": 0.3, "absence": 0.28}, abs=0.08)


def test_documents_without_definitions_ask_for_what_is_absent() -> None:
    tasks = TaskMaker(SOURCES, WORDS, random.Random(0))
    _, questions = tasks.make([Source("x.txt", "one\ntwo\n")], 40)
    assert {q.kind for q in questions} == {"pass_key", "absence"}


def test_same_seed_same_tasks() -> None:
    first, second = (TaskMaker(SOURCES, WORDS, random.Random(3)).make(SOURCES[:2], 5) for _ in range(2))
    assert first == second
