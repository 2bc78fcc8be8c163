"""The bundled model: small enough, whole, of M3.1-Flash's form, and it finds things."""

import pytest

import openm3
from openm3.ask.answer import Reader
from openm3.ask.documents import Document
from openm3.model.checkpoint import BUNDLED
from openm3.tokens.tokenizer import SPECIALS

FOLDER = BUNDLED["m3-tiny"]


@pytest.fixture(scope="module")
def model() -> openm3.Model:
    return openm3.load("m3-tiny")


def test_weights_are_at_most_20_megabytes() -> None:
    assert sum(file.stat().st_size for file in FOLDER.glob("*.safetensors")) <= 20_000_000


def test_form(model: openm3.Model) -> None:
    c = model.config
    assert set(c.layer_types) == {"sparse"} and set(c.mlp_types) == {"moe"}
    assert (c.num_selected, c.num_local, c.max_positions) == (16, 1, 1_048_576)
    last = range(c.vocab_size - len(SPECIALS), c.vocab_size)
    assert [model.tokenizer.token_id(token) for token in SPECIALS] == list(last)


def test_finds_a_pass_key_and_says_where(model: openm3.Model) -> None:
    lines = [f"value_{i} = compute({i})" for i in range(40)]
    lines[17] = "# The pass key for silver-harbor is 48213."
    reader = Reader(model, [Document("notes.txt", "\n".join(lines) + "\n", "utf-8")])
    answer = reader.answer("What is the pass key for silver-harbor?")
    assert answer.answer == "The pass key for silver-harbor is 48213."
    best = answer.evidence[0]
    assert best.file == "notes.txt" and best.first_line <= 18 <= best.last_line
