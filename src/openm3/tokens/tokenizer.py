"""Text to ids and back: byte-level BPE with control tokens kept apart.

The `tokenizers` library does the merging; this module adds what a server needs around it. Control tokens (`]~b]`,
`<mm:think>`, ...) are never recognised in ordinary text unless asked for, and decoding works on bytes, so that a stream
never splits a character. Knows nothing of tensors, images or HTTP.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from openm3.errors import CheckpointError, ConfigError, PromptError
from openm3.tokens import chat
from openm3.tokens.media import Media, expand

SPECIALS: tuple[str, ...] = (
    *("]!p~[", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<reponame>", "<filename>", "<gh_stars>"),
    *("<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>"),
    *("<jupyter_output>", "<empty_output>", "<commit_before>", "<commit_msg>", "<commit_after>", "]~b]", "[e~["),
    *("]!d~[", "<function_call>", "<code_interpreter>", "]<]speech[>[", "]<]image[>[", "]<]video[>["),
    *("]<]start of speech[>[", "]<]end of speech[>[", "]<]start of image[>[", "]<]end of image[>["),
    *("]<]start of video[>[", "]<]end of video[>[", "]<]vision pad[>[", "]~!b[", "<jupyter_error>", "<add_file>"),
    *("<delete_file>", "<rename_file>", "<edit_file>", "<commit_message>", "<empty_source_file>", "<repo_struct>"),
    *("<code_context>", "<file_content>", "<source_files>", "<pr_start>", "<review_comment>", "<filepath>"),
    *("<file_sep>", "<think>", "</think>", "<tool_call>", "</tool_call>", "]<]frame[>[", "]<]start of frame[>["),
    *("]<]end of frame[>[", "<|content_altered_placeholder|>", "]<]minimax[>[", "<mm:think>", "</mm:think>"),
)
"""M3's control tokens in the order of their ids (200000 onwards in M3, the last 61 ids of a trained vocabulary)."""

_CONFIG = {
    "bos_token": "]~!b[",
    "eos_token": "[e~[",
    "pad_token": "]!p~[",
    "unk_token": "]!d~[",
    "padding_side": "left",
    "tokenizer_class": "PreTrainedTokenizerFast",
}

# How text is cut before merging, in order: the indentation of a line, words (optionally with the one character before
# them, split at camelCase), single digits, punctuation with the newlines after it, blank lines, other space.
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PRE_TOKEN = "|".join(
    (
        r"(?<=[\r\n])[ \t]+(?=\S)",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class StreamDecoder:
    """Decodes ids one at a time: all that `push` and `finish` return is what `Tokenizer.decode` returns for all ids.

    A character whose bytes come in several tokens is returned with its last one.
    """

    def __init__(self, table: Mapping[int, bytes]) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this id completes, often the whole token, sometimes nothing yet."""
        return self._utf8.decode(self._table.get(token, b""))

    def finish(self) -> str:
        """The rest: U+FFFD if the ids ended inside a character, else nothing. The decoder can then be used afresh."""
        return self._utf8.decode(b"", final=True)


class Tokenizer:
    """A byte-level BPE tokenizer with M3's control tokens and chat grammar.

    `spec` is a parsed `tokenizer.json`, `config` a parsed `tokenizer_config.json` (only its begin and end tokens and
    chat template are used), `chat_template` Jinja text that wins over that of `config`; without either, openm3's own.
    Raises CheckpointError when these are not a byte-level BPE tokenizer with a begin and an end token.
    """

    def __init__(
        self, spec: Mapping[str, Any], *, config: Mapping[str, Any] | None = None, chat_template: str | None = None
    ) -> None:
        self._spec = dict(spec)
        self._config = dict(_CONFIG if config is None else config)
        self._plain = _plain_tokenizer(self._spec)
        self._controls = _control_ids(self._spec)
        self._control = re.compile("|".join(map(re.escape, sorted(self._controls, key=len, reverse=True))) or r"(?!)")
        self._bytes = {id_: _token_bytes(token) for token, id_ in self._plain.get_vocab().items()}
        self._bytes |= {id_: token.encode() for token, id_ in self._controls.items()}
        self.vocab_size: int = max(self._bytes) + 1
        self.special_ids: frozenset[int] = frozenset(self._controls.values())
        self.bos_id: int = self._named_control("bos_token")
        self.eos_id: int = self._named_control("eos_token")
        self.chat_template: str = chat_template or _config_template(self._config) or chat.TEMPLATE

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json` and, where there, `tokenizer_config.json` and `chat_template.jinja`.

        Raises CheckpointError when `tokenizer.json` is missing or one of them is torn or foreign.
        """
        folder = Path(path)
        spec = _read_json(folder / "tokenizer.json")
        if spec is None:
            raise CheckpointError(f"no tokenizer.json in {folder}: a checkpoint folder must hold one")
        config = _read_json(folder / "tokenizer_config.json")
        try:
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except FileNotFoundError:
            template = None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{folder / 'chat_template.jinja'} is not readable text: {error}") from None
        try:
            return cls(spec, config=config, chat_template=template)
        except CheckpointError as error:
            raise CheckpointError(f"{folder / 'tokenizer.json'}: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, making the folder if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in (("tokenizer.json", self._spec), ("tokenizer_config.json", self._config)):
            (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    def encode(self, text: str, *, special: bool = False, media: Sequence[Media] = ()) -> list[int]:
        """Ids of `text`. The text of control tokens is ordinary text, unless `special` asks for their ids.

        With `media`, which needs `special`, each `]<]image[>[` and `]<]video[>[` stands for the next of them. Lone
        surrogates, which no UTF-8 text can hold, become U+FFFD. Raises PromptError when the media do not fit the text.
        """
        if not special:
            if media:
                raise PromptError("media need special=True: in ordinary text nothing stands for them")
            return self._encode_plain(text)
        pieces: list[tuple[str, bool]] = []
        end = 0
        for match in self._control.finditer(text):
            pieces += [(text[end : match.start()], False), (match.group(), True)]
            end = match.end()
        pieces.append((text[end:], False))
        return self._ids(expand(pieces, media) if media else pieces)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`, U+FFFD for bytes that are no UTF-8. Ids without a token (vocabulary padding) give nothing."""
        skipped = self.special_ids if skip_special else frozenset[int]()
        return b"".join(self._bytes.get(id_, b"") for id_ in ids if id_ not in skipped).decode("utf-8", "replace")

    def decoder(self) -> StreamDecoder:
        """A fresh incremental decoder."""
        return StreamDecoder(self._bytes)

    def token_id(self, token: str) -> int | None:
        """The id of a control token, or of an ordinary one in its byte-level spelling; None if there is none."""
        id_: int | None = self._controls.get(token, self._plain.token_to_id(token))
        return id_

    def token_bytes(self, id_: int) -> bytes:
        """What a token stands for, often part of a character; nothing for an id without a token."""
        return self._bytes.get(id_, b"")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: str = "adaptive",
        add_generation_prompt: bool = True,
        media: Sequence[Media] = (),
    ) -> list[int]:
        """Ids of a conversation in OpenAI's format, ready for the model to answer.

        `thinking` is "enabled", "disabled" or "adaptive" (the model decides). Only the template's own control tokens
        become control ids; their text in a message, name, tool or result stays text. `media` are the pictures and
        videos of the content parts of type `image`, `image_url`, `video` and `video_url`, in the order of the
        messages. Raises PromptError for messages that are not a conversation or do not fit their media, and when the
        checkpoint's template fails.
        """
        pieces = chat.render(
            messages,
            template=self.chat_template,
            controls=self._control,
            tools=tools,
            thinking=thinking,
            add_generation_prompt=add_generation_prompt,
            variables={"bos_token": self.decode([self.bos_id]), "eos_token": self.decode([self.eos_id])},
            media=media,
        )
        return self._ids(pieces)

    def _ids(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of (text, whether it is one control token). Neighbouring ordinary texts are encoded as one."""
        ids: list[int] = []
        for is_control, group in groupby(pieces, key=lambda piece: piece[1]):
            texts = [text for text, _ in group]
            if not is_control:
                ids += self._encode_plain("".join(texts))
                continue
            if missing := {text for text in texts if text not in self._controls}:
                raise PromptError(f"this tokenizer has no token {min(missing)}: the model takes no such media")
            ids += [self._controls[text] for text in texts]
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise PromptError(f"only text can be encoded, not {type(text).__name__}")
        try:
            # A batch of one: unlike `encode` it lets Python's other threads run meanwhile, and keeps no offsets.
            return list(self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        except (TypeError, UnicodeEncodeError):
            whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            return list(self._plain.encode_batch_fast([whole], add_special_tokens=False)[0].ids)

    def _named_control(self, name: str) -> int:
        value = self._config.get(name, _CONFIG[name])
        token = value.get("content") if isinstance(value, Mapping) else value
        id_ = self.token_id(token) if isinstance(token, str) else None
        if id_ is None:
            raise CheckpointError(f"the {name} {token!r} is not in the vocabulary")
        return id_


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer of exactly `vocab_size` ids: 256 bytes, merges, and the 61 SPECIALS last.

    Digits stand alone, indentation is kept apart from newlines and words, and the text of control tokens in `texts` is
    ordinary text. The same texts give the same tokenizer. Raises ConfigError when `vocab_size` is below 317 or the
    texts are too few for so many merges.
    """
    num_plain = vocab_size - len(SPECIALS)
    if num_plain < 256:
        raise ConfigError(f"vocab_size must be at least {256 + len(SPECIALS)} (bytes and specials), not {vocab_size}")
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PRE_TOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=num_plain, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    found = learner.get_vocab_size()
    if found != num_plain:
        raise ConfigError(f"the texts give only {found + len(SPECIALS)} tokens, fewer than the {vocab_size} asked for")
    spec = json.loads(learner.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [{"id": num_plain + i, "content": token, **flags} for i, token in enumerate(SPECIALS)]
    return Tokenizer(spec)


def _plain_tokenizer(spec: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer without its control tokens: all that it makes of text is text."""
    model = spec.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        raise CheckpointError("not a BPE tokenizer: expected a `model` of type BPE")
    if '"ByteLevel"' not in json.dumps(spec.get("decoder")):
        raise CheckpointError("not a byte-level tokenizer: its decoder must be ByteLevel")
    bare = {**spec, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(bare))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"not a tokenizer that the tokenizers library can read: {error}") from None


def _control_ids(spec: Mapping[str, Any]) -> dict[str, int]:
    """Every added token, also those not marked special: none may be written by a user."""
    try:
        return {str(token["content"]): int(token["id"]) for token in spec.get("added_tokens", [])}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError("expected `added_tokens` to be a list of objects with `id` and `content`") from None


def _byte_of_char() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE = _byte_of_char()


def _token_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE[char] for char in token)
    except KeyError:  # an entry outside the byte alphabet stands for its own text
        return token.encode()


def _config_template(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # named templates
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object at `path`, None if there is no such file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
