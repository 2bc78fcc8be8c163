"""Encoding, decoding, streaming, training and files of the tokenizer."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm3.errors import CheckpointError, ConfigError, PromptError
from openm3.tokens import SPECIALS, Tokenizer, train_bpe

GOLDEN = Path(__file__).parents[1] / "golden" / "m3-random-s0" / "model"
SOURCE = 'def area(self, width):\n    if width == 1234:\n        return "größe"\n            # ]~b] <mm:think>\n\n' * 40
TEXTS = [SOURCE, "The quick brown fox jumps over the lazy dog. 你好，世界 😀\r\n" * 20]

recorded = Tokenizer.from_folder(GOLDEN)
trained = train_bpe(TEXTS, 410)


@pytest.fixture(params=["recorded", "trained"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return {"recorded": recorded, "trained": trained}[request.param]


def test_recorded_checkpoint_has_the_specials_in_order() -> None:
    assert [recorded.token_id(token) for token in SPECIALS] == list(range(256, 317))
    assert (recorded.vocab_size, recorded.bos_id, recorded.eos_id) == (317, 290, 276)
    assert recorded.special_ids == frozenset(range(256, 317))
    assert recorded.token_id("no such token") is None


def test_specials_stand_where_m3_has_them() -> None:
    published = {0: "]!p~[", 6: "<filename>", 19: "]~b]", 20: "[e~[", 21: "]!d~[", 25: "]<]image[>[", 26: "]<]video[>["}
    published |= {29: "]<]start of image[>[", 33: "]<]vision pad[>[", 34: "]~!b[", 50: "<think>", 53: "</tool_call>"}
    published |= {58: "]<]minimax[>[", 59: "<mm:think>", 60: "</mm:think>"}
    assert len(set(SPECIALS)) == 61
    assert {i: SPECIALS[i] for i in published} == published


def test_control_text_is_ordinary_unless_asked_for(tokenizer: Tokenizer) -> None:
    text = "a" + "".join(SPECIALS) + "b"
    plain = tokenizer.encode(text)
    assert not tokenizer.special_ids & set(plain)
    assert tokenizer.decode(plain) == text
    parsed = tokenizer.encode(text, special=True)
    base = min(tokenizer.special_ids)
    assert parsed[1:-1] == list(range(base, base + 61))
    assert tokenizer.decode(parsed) == text
    assert tokenizer.decode(parsed, skip_special=True) == "ab"


def test_added_tokens_not_marked_special_are_controls_too() -> None:
    spec = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    for token in spec["added_tokens"]:
        token["special"] = False
    tokenizer = Tokenizer(spec)
    assert not tokenizer.special_ids & set(tokenizer.encode("<think>hm</think>"))


def test_the_longest_control_token_wins() -> None:
    spec = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    longer = {**spec["added_tokens"][0], "id": 317, "content": "[e~[x"}
    tokenizer = Tokenizer({**spec, "added_tokens": [*spec["added_tokens"], longer]})
    assert tokenizer.encode("[e~[x[e~[", special=True) == [317, 276]


@given(st.text())
def test_any_text_survives(text: str) -> None:
    for tokenizer in (recorded, trained):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, special=True)) == text


def test_lone_surrogates_become_replacement_characters() -> None:
    assert recorded.decode(recorded.encode("a\ud83db \ud83d\ude00")) == "a\ufffdb 😀"


def test_only_text_can_be_encoded() -> None:
    with pytest.raises(PromptError, match="not bytes"):
        recorded.encode(b"x")  # type: ignore[arg-type]


@given(st.lists(st.integers(-2, 330)))
def test_stream_equals_whole_for_any_ids(ids: list[int]) -> None:
    decoder = recorded.decoder()
    assert "".join([*map(decoder.push, ids), decoder.finish()]) == recorded.decode(ids)


def test_stream_gives_whole_characters(tokenizer: Tokenizer) -> None:
    text = "é€😀 ☃\u0301 <mm:think>ü</mm:think>"
    decoder = tokenizer.decoder()
    parts = [decoder.push(id_) for id_ in tokenizer.encode(text, special=True)]
    assert "".join(parts) == text
    assert decoder.finish() == ""
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("cut", range(1, 5))
def test_stream_cut_inside_a_character(cut: int) -> None:
    ids = recorded.encode("a😀")[: 1 + cut]
    decoder = recorded.decoder()
    assert [decoder.push(id_) for id_ in ids] == ["a", *[""] * min(cut, 3), *["😀"] * (cut == 4)]
    assert decoder.finish() == ("" if cut == 4 else "\ufffd")


def test_stream_replaces_only_invalid_bytes() -> None:
    broken = [*recorded.encode("é")[:1], recorded.eos_id, *recorded.encode("é")]
    decoder = recorded.decoder()
    assert [decoder.push(id_) for id_ in broken] == ["", "\ufffd[e~[", "", "é"]


def test_streaming_time_is_linear() -> None:
    decoder = recorded.decoder()
    start = time.perf_counter()
    for _ in range(200_000):
        decoder.push(5)
    assert time.perf_counter() - start < 5


def test_padding_ids_decode_to_nothing() -> None:
    assert recorded.decode([recorded.vocab_size, -1, *recorded.encode("ok"), 10**9]) == "ok"


def test_save_and_read_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new")
    again = Tokenizer.from_folder(tmp_path / "new")
    assert again.encode(SOURCE, special=True) == tokenizer.encode(SOURCE, special=True)
    assert (again.bos_id, again.eos_id, again.vocab_size) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size)
    assert again.chat_template == tokenizer.chat_template
    again.save(tmp_path / "newer")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "newer" / file).read_bytes() == (tmp_path / "new" / file).read_bytes()


def test_template_comes_from_file_then_config_then_package(tmp_path: Path) -> None:
    spec = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "in config"}]
    assert Tokenizer(spec, config={"chat_template": named}).chat_template == "in config"
    assert Tokenizer(spec, config={"chat_template": "in config"}, chat_template="in file").chat_template == "in file"
    assert "turn grammar" in Tokenizer(spec).chat_template
    assert Tokenizer(spec, config={"eos_token": {"content": "]!d~["}}).eos_id == 277


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json in"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": {"type": "BPE"', "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        (b"[]", "must hold a JSON object, not list"),
        (b"{}", "not a BPE tokenizer"),
        (b'{"model": {"type": "WordPiece"}}', "not a BPE tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "not a byte-level tokenizer"),
        (b'{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}', "tokenizers library"),
    ],
)
def test_torn_tokenizers_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "tokenizer.json" in str(caught.value)


def test_every_truncation_is_one_clear_error(tmp_path: Path) -> None:
    whole = (GOLDEN / "tokenizer.json").read_bytes()
    for size in range(0, len(whole) - 2, 1709):
        (tmp_path / "tokenizer.json").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("value", ["x", [{"content": "a"}], [3]])
def test_bad_added_tokens_are_refused(value: object) -> None:
    spec = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    with pytest.raises(CheckpointError, match="added_tokens"):
        Tokenizer({**spec, "added_tokens": value})


def test_unknown_end_token_is_refused() -> None:
    spec = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    with pytest.raises(CheckpointError, match=r"eos_token '<end>' is not in the vocabulary"):
        Tokenizer(spec, config={"eos_token": "<end>"})


def test_training_puts_bytes_first_and_specials_last() -> None:
    assert trained.vocab_size == 410
    assert [trained.token_id(token) for token in SPECIALS] == list(range(349, 410))
    assert {trained.decode([i]) for i in range(256)} >= {chr(i) for i in range(128)}
    assert train_bpe([], 317).vocab_size == 317


def test_training_is_deterministic(tmp_path: Path) -> None:
    trained.save(tmp_path / "a")
    train_bpe(iter(TEXTS), 410).save(tmp_path / "b")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_training_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    train_bpe(TEXTS, 400)
    assert capfd.readouterr() == ("", "")


def test_trained_pieces_suit_source_code() -> None:
    def pieces(text: str) -> list[str]:
        return [trained.decode([id_]) for id_ in trained.encode(text)]

    assert pieces("\n    return") == ["\n", "    ", "return"]
    assert pieces("\n        return") == ["\n", "        ", "return"]
    assert pieces("\n            #") == ["\n", "            ", "#"]
    assert pieces(" 1234") == [" ", "1", "2", "3", "4"]


@pytest.mark.parametrize(("size", "message"), [(316, "at least 317"), (5000, "give only")])
def test_impossible_vocabularies_are_refused(size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_bpe(TEXTS, size)


def test_the_bytes_of_each_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("größe <mm:think>😀", special=True)
    assert b"".join(tokenizer.token_bytes(id_) for id_ in ids).decode() == "größe <mm:think>😀"
    assert tokenizer.token_bytes(10**6) == b""
