"""Questions answered: the same as the model alone, read once, with evidence that holds what the files hold."""

import pytest

from openm3.ask.answer import Reader, ask
from openm3.ask.documents import Document
from openm3.errors import PromptError
from openm3.model.model import Model
from openm3.tokens import Content
from openm3.tokens.prompt import user_message
from openm3.tokens.tokenizer import Tokenizer

LINES = [f"line {i} says {i * i}" for i in range(1, 60)]
DOCUMENTS = (
    Document("notes/a.txt", "\n".join(LINES) + "\n", "utf-8"),
    Document("b.txt", "é, the last word\n", "cp1252"),
)


def expected(model: Model, question: str, count: int) -> str:
    content = user_message([(d.name, d.text) for d in DOCUMENTS], question)
    ids = model.tokenizer.chat([{"role": "user", "content": content}], thinking="disabled")
    return model.tokenizer.decode(model.generate(ids, max_new_tokens=count, stop_ids=[model.tokenizer.eos_id]))


def test_an_answer_is_the_models_own(model: Model) -> None:
    parts: list[str] = []
    answer = ask(model, DOCUMENTS, "Which?", max_new_tokens=5, on_text=lambda part: parts.append(part.text))
    assert answer.answer == "".join(parts) == expected(model, "Which?", 5)
    assert (answer.thinking, answer.stop, answer.no_evidence) == ("", "length", None)
    text = sum(len(d.text.encode()) for d in DOCUMENTS)
    assert answer.tokens["documents"] == text
    assert answer.tokens["answer"] == 5
    assert answer.tokens["read"] == answer.tokens["prompt"] > text
    assert answer.attended_share is not None and 0 < answer.attended_share <= 1
    assert all(value is not None and value > 0 for value in answer.timings.values())


def test_evidence_quotes_the_files(model: Model) -> None:
    answer = ask(model, DOCUMENTS, "Which?", max_new_tokens=5)
    assert 1 <= len(answer.evidence) <= 3
    texts = {d.name: d.text.split("\n") for d in DOCUMENTS}
    for found in answer.evidence:
        assert found.text == "\n".join(texts[found.file][found.first_line - 1 : found.last_line])
    shares = [found.share for found in answer.evidence]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1 + 1e-9


def test_documents_are_read_once(model: Model) -> None:
    reader = Reader(model, DOCUMENTS)
    first = reader.answer("Which?", max_new_tokens=5)
    second = reader.answer("What else?", max_new_tokens=5)
    assert second.answer == expected(model, "What else?", 5)
    assert second.tokens["read"] < 20 < first.tokens["read"]
    again = reader.answer("Which?", max_new_tokens=5)
    assert again.answer == first.answer
    assert [(e.file, e.first_line) for e in again.evidence] == [(e.file, e.first_line) for e in first.evidence]


def test_one_token(model: Model) -> None:
    answer = ask(model, DOCUMENTS, "Which?", max_new_tokens=1)
    assert answer.tokens["answer"] == 1
    assert answer.timings["answer_tokens_per_second"] is None
    assert answer.evidence


def test_an_interrupted_answer_has_evidence(model: Model) -> None:
    def stop(part: Content) -> None:
        raise KeyboardInterrupt

    answer = ask(model, DOCUMENTS, "Which?", max_new_tokens=5, on_text=stop)
    assert answer.stop == "interrupted"
    assert answer.answer
    assert answer.evidence


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question(model: Model, question: str) -> None:
    with pytest.raises(PromptError, match="the question is empty"):
        ask(model, DOCUMENTS, question)


def test_no_evidence_has_a_reason(model: Model) -> None:
    t = model.tokenizer
    template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    loud = Model(model.network, Tokenizer(t._spec, config=t._config, chat_template=template), "loud")
    answer = ask(loud, DOCUMENTS, "Which?", max_new_tokens=2)
    assert answer.evidence == ()
    assert answer.no_evidence == (
        "the model's chat template or tokenizer changes the documents, so their lines cannot be told"
    )
    assert answer.tokens["documents"] == 0
