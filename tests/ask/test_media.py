"""Questions about pictures and videos: where they stand, what is told of them, and that nothing is read twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from openm3 import cli, read_image, read_video
from openm3.ask import chat, command
from openm3.ask.answer import NO_DOCUMENTS
from openm3.ask.chat import Talk
from openm3.ask.conversation import Conversation
from openm3.ask.media import look
from openm3.errors import PromptError
from openm3.model.model import Model
from tests.tokens.clips import make_clip

QUESTION = "What is it?"
TOKENS = 16


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model) -> Path:
    """The working folder, with two pictures, a clip and a text in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load", lambda path, **_: model)
    monkeypatch.setattr(chat, "load", lambda path, **_: model)
    for colour in ("red", "blue"):
        Image.new("RGB", (112, 112), colour).save(f"{colour}.png")
    (tmp_path / "clip.mp4").write_bytes(make_clip([100 * i for i in range(20)]))
    (tmp_path / "notes.txt").write_text("one fish\n")
    return tmp_path


def own(model: Model, content: object, paths: list[str], count: int = 4) -> str:
    """What the model itself says of a content with these pictures."""
    media = [read_video(path) if path.endswith("mp4") else read_image(path) for path in paths]
    tokenizer = model.tokenizer
    ids = tokenizer.chat([{"role": "user", "content": content}], thinking="disabled", media=media)
    written = model.generate(ids, media=media, max_new_tokens=count, stop_ids=[tokenizer.eos_id])
    return tokenizer.decode(written)


def test_pictures_then_videos_then_documents_then_the_question(
    here: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--video", "clip.mp4", "--file", "notes.txt", "--image", "blue.png", "--image", "red.png"]
    assert cli.main(["ask", QUESTION, "--max-new-tokens", "4", *words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    value = json.loads(out)
    text = {"type": "text", "text": f"File: notes.txt\none fish\n\n{QUESTION}"}
    parts = [{"type": "image"}, {"type": "image"}, {"type": "video"}, text]
    assert value["answer"] == own(model, parts, ["blue.png", "red.png", "clip.mp4"])
    assert value["media"] == [
        {"name": "blue.png", "kind": "image", "size": [112, 112], "tokens": TOKENS},
        {"name": "red.png", "kind": "image", "size": [112, 112], "tokens": TOKENS},
        {
            "name": "clip.mp4",
            "kind": "video",
            "size": [48, 64],
            "tokens": read_video("clip.mp4").num_tokens,
            "seconds": pytest.approx(read_video("clip.mp4").seconds[-1]),  # type: ignore[index]
        },
    ]
    assert value["documents"] == [{"name": "notes.txt", "encoding": "utf-8"}]


def test_people_are_told_what_is_looked_at(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", QUESTION, "--max-new-tokens", "4", "--image", "red.png", "--video", "clip.mp4"]) == 0
    out, err = capsys.readouterr()
    video = read_video("clip.mp4")
    assert err.splitlines() == [
        "red.png: image of 112x112 pixels, 16 tokens",
        f"clip.mp4: video of 64x48 pixels, 4 frames, {video.num_tokens} tokens",
    ]
    assert f"no evidence: {NO_DOCUMENTS}" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to ask about: give --file, --image or --video"),
        (["--image", "gone.png"], "gone.png: cannot read 'gone.png'"),
        (["--image", "notes.txt"], "notes.txt: the file is text, not a picture"),
        (["--video", "red.png"], "red.png: "),
    ],
)
def test_what_cannot_be_looked_at(here: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", QUESTION, *words]) == 2
    assert said in capsys.readouterr().err


def test_what_was_seen_is_not_read_again(here: Path, model: Model) -> None:
    conversation = Conversation(model)
    red, blue = look("red.png", "image").media, look("blue.png", "image").media

    def reply(question: str, *media: object) -> tuple[str, int]:
        content = [*({"type": "image"} for _ in media), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        ids = conversation.encode(messages, thinking="disabled", max_new_tokens=4, media=media)  # type: ignore[arg-type]
        said = conversation.reply(ids, thinking="disabled", max_new_tokens=4, media=media)  # type: ignore[arg-type]
        return said.text, said.num_read

    turn = len(["[e~[", "\n", "]~b]", "a", "i", "\n", "</mm:think>"])
    assert reply("What?", red)[0] == own(model, [{"type": "image"}, {"type": "text", "text": "What?"}], ["red.png"])
    text, num_read = reply("Where?", red)
    assert num_read == len("ere?") + turn
    assert text == own(model, [{"type": "image"}, {"type": "text", "text": "Where?"}], ["red.png"])
    # Another picture has the same placeholders, and nothing else in common.
    text, num_read = reply("Where?", blue)
    assert num_read > TOKENS
    assert text == own(model, [{"type": "image"}, {"type": "text", "text": "Where?"}], ["blue.png"])


def test_pages_on_disk_tell_pictures_apart(here: Path, model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (448, 448), "green").save("green.png")
    Image.new("RGB", (448, 448), "white").save("white.png")
    found = {}
    for name in ("green", "white", "green"):
        words = ["--image", f"{name}.png", "--cache", "cache", "--json", "--max-new-tokens", "4"]
        assert cli.main(["ask", QUESTION, *words]) == 0
        value = json.loads(capsys.readouterr().out)
        parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        assert value["answer"] == own(model, parts, [f"{name}.png"])
        found[name] = value["tokens"]["restored"]
    assert found == {"green": 256, "white": 0}


def test_a_talk_goes_on_about_a_picture(here: Path, model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk(model, "disabled", 4)
    assert talk.take("/image red.png") and talk.take(QUESTION)
    first = own(model, [{"type": "image"}, {"type": "text", "text": QUESTION}], ["red.png"])
    assert talk.messages[-1] == {"role": "assistant", "content": first}
    assert talk.take("/video clip.mp4") and talk.take("And this?")
    assert [part["type"] for part in talk.messages[2]["content"]] == ["video", "text"]
    media = [read_image("red.png"), read_video("clip.mp4")]
    ids = model.tokenizer.chat(talk.messages[:3], thinking="disabled", media=media)
    written = model.generate(ids, media=media, max_new_tokens=4, stop_ids=[model.tokenizer.eos_id])
    assert talk.messages[-1]["content"] == model.tokenizer.decode(written)
    talk.take("/reset")
    talk.take("hello")
    assert talk.messages[0] == {"role": "user", "content": "hello"}
    with pytest.raises(PromptError, match=r"gone.png: cannot read"):
        talk.take("/image gone.png")
    assert "red.png: image of 112x112 pixels, 16 tokens" in capsys.readouterr().err
