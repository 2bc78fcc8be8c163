"""A conversation's replies equal the model's own, however much of the context was known before."""

from pathlib import Path

import pytest

from openm3.ask.conversation import SPARE_TOKENS, Conversation, Reply, _Writer
from openm3.config import BLOCK
from openm3.errors import PromptError
from openm3.model.model import Model
from openm3.model.witness import Witness
from openm3.tokens import Content, Thinking

TURN = len(["[e~[", "\n", "]~b]", "a", "i", "\n", "</mm:think>"])
"""Tokens between a question and its answer."""

LONG = "The quick brown fox jumps over the lazy dog. " * 12


def ids_of(conversation: Conversation, *texts: str, room: int = 6) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return conversation.encode(messages, thinking="disabled", max_new_tokens=room)


def written(model: Model, ids: list[int], count: int) -> list[int]:
    return list(model.generate(ids, max_new_tokens=count, stop_ids=[model.tokenizer.eos_id]))


def reply(conversation: Conversation, ids: list[int], count: int = 6) -> Reply:
    return conversation.reply(ids, thinking="disabled", max_new_tokens=count)


def test_a_reply_is_what_the_model_generates(model: Model) -> None:
    conversation = Conversation(model)
    ids = ids_of(conversation, LONG)
    said = reply(conversation, ids)
    assert said.text == model.tokenizer.decode(written(model, ids, 6))
    assert (said.stop, said.num_prompt, said.num_read, said.num_written) == ("length", len(ids), len(ids), 6)
    assert said.read_seconds > 0 and said.write_seconds > 0


def test_only_what_is_new_is_read(model: Model) -> None:
    conversation = Conversation(model)
    first, second = ids_of(conversation, LONG + "one?"), ids_of(conversation, LONG + "two or three?")
    reply(conversation, first)
    said = reply(conversation, second)
    assert said.num_read == len("two or three?") + TURN
    assert said.text == model.tokenizer.decode(written(model, second, 6))
    assert reply(conversation, second).num_read == 1
    back = reply(conversation, first)
    assert back.text == model.tokenizer.decode(written(model, first, 6))


def test_a_context_that_outgrows_its_cache_is_moved(model: Model) -> None:
    conversation = Conversation(model)
    reply(conversation, ids_of(conversation, "short"))
    longer = ids_of(conversation, "short" + "er" * SPARE_TOKENS)
    said = reply(conversation, longer)
    assert said.num_read < len(longer)
    assert said.text == model.tokenizer.decode(written(model, longer, 6))


def test_the_end_token_ends(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(model)
    ids = ids_of(conversation, LONG)
    tokens = written(model, ids, 6)
    end = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(conversation, "_end_ids", {tokens[end]})
    said = reply(conversation, ids)
    assert (said.text, said.stop, said.num_written) == (model.tokenizer.decode(tokens[:end]), "end", end + 1)


def test_progress_counts_the_new_tokens(model: Model) -> None:
    conversation = Conversation(model)
    seen: list[tuple[int, int]] = []
    for text in ("x" * 1500, "x" * 1500 + "y"):
        ids = ids_of(conversation, text)
        conversation.reply(
            ids, thinking="disabled", max_new_tokens=1, on_progress=lambda done, total: seen.append((done, total))
        )
    total = len(ids) - 1
    assert seen == [
        (0, total),
        (1024, total),
        (total - 1, total),
        (total, total),
        (0, TURN + 1),
        (TURN, TURN + 1),
        (TURN + 1, TURN + 1),
    ]


def test_interrupted_while_reading_goes_on_from_there(model: Model) -> None:
    conversation = Conversation(model)
    ids = ids_of(conversation, "x" * 3000)

    def stop(done: int, total: int) -> None:
        if done == 2048:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.reply(ids, thinking="disabled", max_new_tokens=4, on_progress=stop)
    said = reply(conversation, ids, 4)
    assert said.num_read == len(ids) - 2048
    assert said.text == model.tokenizer.decode(written(model, ids, 4))


def test_interrupted_while_writing_keeps_what_came(model: Model) -> None:
    conversation = Conversation(model)
    ids = ids_of(conversation, LONG)
    parts: list[str] = []

    def stop(part: Thinking | Content) -> None:
        parts.append(part.text)
        if len(parts) == 2:
            raise KeyboardInterrupt

    said = conversation.reply(ids, thinking="disabled", max_new_tokens=6, on_text=stop)
    assert said.stop == "interrupted"
    assert said.text == "".join(parts)
    assert said.num_written < 6
    assert reply(conversation, ids).text == model.tokenizer.decode(written(model, ids, 6))


@pytest.mark.parametrize(("mode", "watched"), [("disabled", 4), ("enabled", 0)])
def test_the_witness_sees_the_answer_only(model: Model, mode: str, watched: int) -> None:
    conversation = Conversation(model)
    ids = conversation.encode([{"role": "user", "content": LONG}], thinking=mode, max_new_tokens=4)
    witness = Witness(len(ids) + 4)
    said = conversation.reply(ids, thinking=mode, max_new_tokens=4, witness=witness)
    assert bool(said.thinking) == (mode == "enabled")
    assert len(witness.shares) == watched * model.config.num_layers


def test_the_witness_wakes_when_thinking_ends(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(model)
    ids = conversation.encode([{"role": "user", "content": LONG}], thinking="enabled", max_new_tokens=4)
    second = written(model, ids, 4)[1]
    monkeypatch.setattr(conversation, "_think_end", second)
    witness = Witness(len(ids) + 4)
    conversation.reply(ids, thinking="enabled", max_new_tokens=4, witness=witness)
    assert len(witness.shares) == 2 * model.config.num_layers


def test_the_witness_sees_all_of_an_answer_without_thinking(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where thinking is left to the model, and random weights write at once; not where it is cut in its thoughts."""
    conversation = Conversation(model)
    ids = conversation.encode([{"role": "user", "content": LONG}], thinking="adaptive", max_new_tokens=4)
    witness = Witness(len(ids) + 4)
    said = conversation.reply(ids, thinking="adaptive", max_new_tokens=4, witness=witness)
    assert (said.thinking, said.text) == ("", model.tokenizer.decode(written(model, ids, 4)))
    assert len(witness.shares) == 4 * model.config.num_layers
    monkeypatch.setattr(_Writer, "push", lambda writer, token: setattr(writer, "thinking", "Hm."))
    monkeypatch.setattr(_Writer, "finish", lambda writer: None)
    conversation.reply(ids, thinking="adaptive", max_new_tokens=4, witness=witness)
    assert witness.shares == []
    assert float(witness.mass_S.sum()) == 0


def test_too_long_is_refused_before_reading(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(model)
    limit = model.config.max_positions
    with pytest.raises(PromptError, match=f"tokens and {limit} to generate exceed the model's limit of {limit}"):
        ids_of(conversation, "short", room=limit)
    monkeypatch.setattr("openm3.ask.memory.free_bytes", lambda: 1000)
    with pytest.raises(PromptError, match=r"but only 0.0 GiB is free"):
        ids_of(conversation, "short")


def test_a_folder_keeps_what_was_read(model: Model, tmp_path: Path) -> None:
    first, second = Conversation(model, tmp_path), Conversation(model, tmp_path)
    ids, later = ids_of(first, LONG + "one?"), ids_of(first, LONG + "two or three?")
    cold = reply(first, ids)
    first.close()
    warm = reply(second, later)
    whole = len(LONG) // BLOCK * BLOCK
    assert (cold.num_read, cold.num_restored) == (len(ids), 0)
    assert (warm.num_restored, warm.num_read) == (whole, len(later) - whole)
    assert warm.text == model.tokenizer.decode(written(model, later, 6))


def test_an_interruption_loses_no_page(model: Model, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2048:
            raise KeyboardInterrupt

    first = Conversation(model, tmp_path)
    ids = ids_of(first, "x" * 3000)
    with pytest.raises(KeyboardInterrupt):
        first.reply(ids, thinking="disabled", max_new_tokens=4, on_progress=stop)
    first.close()
    said = reply(Conversation(model, tmp_path), ids, 4)
    assert said.num_restored == 2048
    assert said.text == model.tokenizer.decode(written(model, ids, 4))
