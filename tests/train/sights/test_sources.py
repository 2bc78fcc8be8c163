"""Sources are split for good, and faces that cannot be read are left out."""

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageFont

from openm3.errors import DocumentError
from openm3.train.corpus import Source
from openm3.train.sights import sources
from openm3.train.sights.sources import Face, Sources, find_sources, photo, readable


class Shifted:
    """A font in which most letters look like the next one of the alphabet."""

    def __init__(self, size: int) -> None:
        self.font = ImageFont.load_default(size)

    def getmask2(self, text: str, mode: str) -> object:
        return self.font.getmask2("".join(chr(min(ord(c) + 1, 0x10FFFF)) for c in text), mode=mode)


def without_glyphs(size: int) -> ImageFont.FreeTypeFont:
    raise OSError("broken")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with one font, twenty photos, forty pieces of clip art and a word list."""
    file = ImageFont.load_default(20).path
    assert isinstance(file, BytesIO)
    (tmp_path / "fonts").mkdir()
    (tmp_path / "fonts" / "one.ttf").write_bytes(file.getvalue())
    (tmp_path / "fonts" / "broken.ttf").write_bytes(b"no font")
    for folder in ("photos", "art"):
        (tmp_path / folder).mkdir()
    for i in range(20):
        Image.effect_noise((200, 160), 60).save(tmp_path / "photos" / f"{chr(97 + i)}photo.png")
    Image.effect_noise((200, 160), 60).save(tmp_path / "photos" / "a_page.png")
    Image.new("L", (200, 160)).save(tmp_path / "photos" / "small.png")
    for i in range(40):
        Image.new("RGBA", (10, 10), "red").save(tmp_path / "art" / f"apple_{i}.png")
    for name in ("apple_pie", "wheelbarrow", "telephone_by_ann"):
        Image.new("RGBA", (10, 10), "red").save(tmp_path / "art" / f"{name}.png")
    letters = "abcdefghijklmnopqrst"
    (tmp_path / "words").write_text(
        "\n".join(["I", "it's", "Ann", "x", "a" * 13] + [f"wo{a}{b}" for a in letters for b in letters])
    )
    monkeypatch.setattr(sources, "FONT_FOLDERS", (str(tmp_path / "fonts"),))
    monkeypatch.setattr(sources, "PHOTO_FOLDERS", (str(tmp_path / "photos"),))
    monkeypatch.setattr(sources, "_package_folders", lambda package, inside: [])
    monkeypatch.setattr(sources, "CLIP_ART_FOLDER", str(tmp_path / "art"))
    monkeypatch.setattr(sources, "WORD_LIST", str(tmp_path / "words"))
    return tmp_path


def both_sides(monkeypatch: pytest.MonkeyPatch) -> tuple[Sources, Sources]:
    monkeypatch.setattr(sources, "MIN_FAMILIES", 0)
    monkeypatch.setattr(sources, "MIN_PHOTOS", 0)
    return find_sources.__wrapped__(held_out=False), find_sources.__wrapped__(held_out=True)


def test_the_two_sides_share_nothing_and_miss_nothing(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, held_out = both_sides(monkeypatch)
    designs = [{f.design for faces in side.designs for f in faces} for side in (training, held_out)]
    assert sum(map(len, designs)) == 1 and not designs[0] & designs[1]
    for attribute, total in (("photos", 20), ("clip_art", 41), ("words", 400)):
        one, other = set(getattr(training, attribute)), set(getattr(held_out, attribute))
        assert not one & other
        assert len(one) + len(other) == total
        assert 0 < len(other) < total / 3
    assert "wheelbarrow" not in str(training.clip_art) + str(held_out.clip_art)
    assert {noun for side in (training, held_out) for noun in side.nouns} == {"apple", "phone"}
    assert all(2 <= len(w) <= 12 and w.islower() for w in (*training.words, *held_out.words))


def test_views_of_one_thing_stay_together() -> None:
    side = {sources._scene(Path(f"/photos/{name}")) for name in ("aloeL.jpg", "aloeR.jpg", "aloe.png")}
    assert side == {"aloe"}
    assert sources._scene(Path("/w/Altai/contents/images/1080x1920.png")) == "alta"


def test_copies_of_a_design_stay_together(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"Arimo": "liberation", "Liberation Sans": "liberation", "NanumMyeongjo": "nanum", "Hack": "hack"}
    for family, design in names.items():
        face = type("Font", (), {"getname": lambda self, family=family: (family, "Regular")})()
        monkeypatch.setattr(ImageFont, "truetype", lambda path, size, face=face: face)
        assert [f.design for f in sources._faces([Path("a.ttf")])] == [design]


def test_too_little_is_an_error_that_says_what_to_do(machine: Path) -> None:
    with pytest.raises(DocumentError, match=r"found [01] font families and \d+ photos.*docs/sights.md"):
        find_sources.__wrapped__(held_out=False)


def test_without_a_word_list_the_standard_library_has_words(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = [Source("a.py", "import Many, wonderful names from_this x\n")]
    monkeypatch.setattr(sources, "WORD_LIST", str(machine / "none"))
    monkeypatch.setattr(sources, "standard_library", lambda *, held_out, tests: library)
    training, held_out = both_sides(monkeypatch)
    assert sorted([*training.words, *held_out.words]) == ["from", "import", "many", "names", "this", "wonderful"]


def test_faces_whose_letters_are_taken_for_others_are_left_out() -> None:
    good = [[Face(name, ImageFont.load_default)] for name in "abc"]
    shifted, broken = Face("shifted", Shifted), Face("broken", without_glyphs)  # type: ignore[arg-type]
    assert readable([*good, [shifted], [broken]]) == good
    assert readable([[good[0][0], shifted], *good[1:]]) == good
    assert readable([]) == readable([[broken]]) == []


def test_photos_have_one_size_and_three_channels(machine: Path, tmp_path: Path) -> None:
    for mode, size in (("L", (300, 900)), ("RGBA", (80, 50)), ("P", (100, 100))):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, size).save(path)
        found = photo(path)
        assert found.mode == "RGB" and min(found.size) == sources.PHOTO_SIDE
        assert found.width / found.height == pytest.approx(size[0] / size[1], rel=0.01)


def test_a_face_is_drawn_by_design(drawing_sources: Sources, painter) -> None:  # type: ignore[no-untyped-def]
    assert drawing_sources.face(painter.rng).design == "built-in"
