"""What pictures are made of: the fonts, photos, clip art and words of this machine. Nothing is downloaded or kept.

On Debian, `docs/sights.md` lists packages that hold enough of each. Everything is split for good by a hash of its name:
about one in eight font designs, photos, pieces of clip art and words is held out and never trained on.
"""

from __future__ import annotations

import importlib.util
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont
from PIL.ImageFont import FreeTypeFont

from openm3.errors import DocumentError
from openm3.train.corpus import is_held_out, standard_library, words

FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "/System/Library/Fonts")
PHOTO_FOLDERS = ("/usr/share/backgrounds", "/usr/share/wallpapers", "/usr/share/doc/opencv-doc/examples")
CLIP_ART_FOLDER = "/usr/share/openclipart/png"
WORD_LIST = "/usr/share/dict/words"
MIN_FAMILIES = 8
MIN_PHOTOS = 4
PHOTO_SIDE = 256
"""Photos are kept with their shorter side this many pixels long."""

_TELLING = "abdefghknqrtABDEFGHKMNQRTW23456789"
"""Characters whose forms differ from each other even when stretched to the same size."""

MAX_MISTAKES = 3
MIN_INK = 0.22
"""How much of the box around a letter is filled on average, at least: hairlines vanish in small writing."""

_UNFIT = re.compile(
    r"text|notes|sudoku|digits|page|license|cards|chess|mask|logo|shape_|screenshot|(left|right)\d|blob|ellipses|pca_|"
    r"te?mpl|ml\.png|pic\d|phantom|/fuzzy/|color\.png|coins|smarties|ColorfulCups",
    re.IGNORECASE,
)
"""Photos full of writing or of plain shapes, which would be mistaken for what was painted on them."""

_DESIGNS = {
    "arimo": "liberation",
    "tinos": "liberation",
    "cousine": "liberation",
    "nimbus": "urw",
    "freesans": "urw",
    "freeserif": "urw",
    "freemono": "urw",
    "tex": "urw",
    "c059": "urw",
    "p052": "urw",
    "z003": "urw",
    "latin": "computer modern",
    "lm": "computer modern",
    "cmu": "computer modern",
    "carlito": "lato",
    "droid": "noto",
    "open": "noto",
    "bitstream": "dejavu",
    **dict.fromkeys(("bookman", "century", "gothic", "palladio", "roman", "schoolbook"), "urw"),
    **dict.fromkeys(("cmb10", "cmr10", "cmss10", "cmtt10"), "computer modern"),
    **dict.fromkeys(("unbatang", "undinaru", "undotum", "ungraphic", "ungungseo"), "un"),
    "gentiumplus": "gentium",
    "monoisome": "monoid",
    "m": "mplus",
    "rasa": "yrsa",
    "stixgeneral": "stix",
}
"""First words of families that are copies of another design, so that both fall on the same side of the split."""


@dataclass(frozen=True)
class Face:
    """One font file: `design` is what the split goes by, `load` gives the font at a size in pixels."""

    design: str
    load: Callable[[int], FreeTypeFont]


@dataclass(frozen=True, eq=False)
class Sources:
    """The held-out or the training part of everything: faces by design, photos, (path, noun) of clip art, words."""

    designs: Sequence[Sequence[Face]]
    photos: Sequence[Path]
    clip_art: Sequence[tuple[Path, str]]
    words: Sequence[str]

    @cached_property
    def nouns(self) -> dict[str, list[tuple[Path, str]]]:
        """The clip art by what it shows."""
        found: dict[str, list[tuple[Path, str]]] = {}
        for path, noun in self.clip_art:
            found.setdefault(noun, []).append((path, noun))
        return found

    def face(self, rng: random.Random) -> Face:
        """Any face, each design as likely as any other."""
        return rng.choice(rng.choice(self.designs))


@cache
def find_sources(*, held_out: bool) -> Sources:
    """What this machine has. Raises DocumentError if that is too little to make pictures from."""
    designs: dict[str, list[Face]] = {}
    # Packages share files: one of each name.
    files = {path.name: path for path in _files(_font_folders(), (".ttf", ".otf"))}
    for face in _faces(files[name] for name in sorted(files)):
        if is_held_out(f"font {face.design}") == held_out:
            designs.setdefault(face.design, []).append(face)
    legible = readable([designs[d] for d in sorted(designs)])
    photos = [p for p in _photo_files() if is_held_out(f"photo {_scene(p)}") == held_out]
    clips = [(p, noun) for p, noun in _clip_art() if is_held_out(f"clip {p.stem}") == held_out]
    if len(legible) < MIN_FAMILIES or len(photos) < MIN_PHOTOS:
        raise DocumentError(
            f"found {len(legible)} font families and {len(photos)} photos: pictures need {MIN_FAMILIES} and "
            f"{MIN_PHOTOS} at least. docs/sights.md says what to install."
        )
    return Sources(legible, photos, clips, _words(held_out))


def _font_folders() -> list[Path]:
    return [Path(f) for f in FONT_FOLDERS] + _package_folders("matplotlib", "mpl-data/fonts/ttf")


def _package_folders(package: str, inside: str) -> list[Path]:
    """Where an installed package keeps its data; the package itself is not imported."""
    spec = importlib.util.find_spec(package)
    return [Path(folder) / inside for folder in (spec.submodule_search_locations if spec else None) or ()]


def _files(folders: Iterable[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """Files of all folders and the folders in them, sorted by path."""
    return sorted(p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())


def _faces(paths: Iterable[Path]) -> Iterator[Face]:
    for path in paths:
        try:
            family = ImageFont.truetype(path, 20).getname()[0] or path.stem
        except OSError:
            continue
        first = re.split(r"[^a-z0-9]", family.lower().strip())[0]
        design = "nanum" if first.startswith("nanum") else _DESIGNS.get(first, first)
        yield Face(design, partial(_load, str(path)))


def _load(path: str, size: int) -> FreeTypeFont:
    return ImageFont.truetype(path, size)


@lru_cache(maxsize=1024)
def font(face: Face, size: int) -> FreeTypeFont:
    """The face at a size in pixels, kept for the next time."""
    return face.load(size)


@cache
def cap_height(face: Face) -> float:
    """Height of a capital H as a share of the font's size."""
    box = font(face, 100).getbbox("H")
    return max(1.0, box[3] - box[1]) / 100


def _glyphs(face: Face) -> NDArray[np.float32] | None:
    """Every one of `_TELLING`, stretched to 16x16 pixels of 0..1; None if the font lacks one."""
    try:
        masks = [font(face, 32).getmask2(c, mode="L")[0] for c in (*_TELLING, "\U0010fffe")]
    except OSError:
        return None
    if any(m.size[0] == 0 or m.size[1] == 0 for m in masks[:-1]):
        return None
    missing = bytes(masks.pop())
    if any(bytes(m) == missing for m in masks):
        return None
    images = [Image.frombytes("L", m.size, bytes(m)).resize((16, 16), Image.Resampling.BILINEAR) for m in masks]
    return np.stack([np.asarray(image, np.float32).ravel() / 255 for image in images])


def readable(designs: Sequence[Sequence[Face]]) -> list[list[Face]]:
    """The faces whose letters a reader who knows typical ones takes for what they are; designs without any go.

    A letter is taken for the one whose typical form, the median over all designs, is nearest. That leaves out symbols,
    other scripts, black letter, small capitals in place of lower case, and whatever else is drawn for fun.
    """
    glyphs = [[(f, g) for f in faces if (g := _glyphs(f)) is not None] for faces in designs]
    known = [found for found in glyphs if found]
    if not known:
        return []
    typical = np.median([found[0][1] for found in known], axis=0)
    wanted = np.arange(len(_TELLING))

    def is_readable(glyph: NDArray[np.float32]) -> bool:
        distance = ((glyph[:, None] - typical[None]) ** 2).sum(-1)
        mistakes = int((distance.argmin(1) != wanted).sum())
        return mistakes <= MAX_MISTAKES and float(glyph.mean()) >= MIN_INK

    kept = [[face for face, glyph in found if is_readable(glyph)] for found in known]
    return [faces for faces in kept if faces]


def _photo_files() -> list[Path]:
    folders = [Path(f) for f in PHOTO_FOLDERS] + _package_folders("skimage", "data")
    paths = _files(folders, (".jpg", ".jpeg", ".png", ".webp"))
    fit = [p for p in paths if p.stat().st_size > 20_000 and not _UNFIT.search(str(p))]
    # Of a wallpaper, which comes in many sizes, the first one.
    return list({p.parents[2] if p.parents[1].name == "contents" else p: p for p in reversed(fit)}.values())[::-1]


def _scene(path: Path) -> str:
    """What a photo shows, as its name tells: views of one thing fall on one side of the split."""
    named = path.parents[2] if path.parents[1].name == "contents" else path
    return named.stem[:4].lower()


@cache
def photo(path: Path) -> Image.Image:
    """A photo as RGB, its shorter side PHOTO_SIDE pixels long."""
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image.draft("RGB", (PHOTO_SIDE * 2, PHOTO_SIDE * 2))
        rgb = image.convert("RGB")
    scale = PHOTO_SIDE / min(rgb.size)
    size = (max(PHOTO_SIDE, round(rgb.width * scale)), max(PHOTO_SIDE, round(rgb.height * scale)))
    return rgb.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _clip_art() -> list[tuple[Path, str]]:
    """Clip art whose file name begins with a noun of a plain list; large files take too long to open."""
    found = []
    for path in {p.name: p for p in _files([Path(CLIP_ART_FOLDER)], (".png",))}.values():
        parts = re.split(r"[^a-z]+", path.stem.lower())
        noun = next((_SAME_THING.get(p, p) for p in parts[:2] if _SAME_THING.get(p, p) in NOUNS), None)
        if noun and not _OTHER_THING.search(str(path)) and path.stat().st_size < 200_000:
            found.append((path, noun))
    return found


def _words(held_out: bool) -> list[str]:
    """Words of 2 to 12 letters in lower case: of the word list, or where there is none of the standard library."""
    if Path(WORD_LIST).exists():
        listed = Path(WORD_LIST).read_text(encoding="utf-8").split()
    else:
        listed = [w.lower() for w in words(standard_library(held_out=held_out, tests=False))]
    known = {w for w in listed if re.fullmatch(r"[a-z]{2,12}", w)}
    return sorted(w for w in known if is_held_out(f"word {w}") == held_out)


_NOUN_LIST = """
    airplane ambulance anchor ant apple axe ball balloon banana barrel bear bed bee bell bicycle bird boat book boot
    bottle bow box bread bridge broom bug bus butterfly cake calculator camera candle candy car carrot castle cat
    chair cheese cherry church clock cloud clown coin cow crab crown cup deer dice dog dolphin door dragon duck
    eagle egg elephant envelope eye fire fish flower fork fox frog ghost globe goat guitar hamburger hammer hand hat
    heart helicopter horse hourglass house key keyboard kite knife ladder lamp laptop leaf lemon lightbulb lion
    lizard lock magnet microscope monkey moon mountain mouse mushroom octopus orange owl panda pear pen pencil
    penguin phone piano pig pineapple pizza pumpkin rabbit rainbow robot rocket rose saw scissors screwdriver shark
    sheep shield ship shirt shoe skull snail snake snowman sock spider spoon squirrel star strawberry sun sword
    teapot telescope tent tiger tomato tooth tractor train tree truck trumpet turtle umbrella violin whale wrench
    zebra
"""
NOUNS = frozenset(_NOUN_LIST.split())
"""What clip art is said to show."""

_SAME_THING = {"telephone": "phone", "bulb": "lightbulb", "bike": "bicycle", "sailboat": "boat", "ship": "boat"}
_OTHER_THING = re.compile(r"/icons/|/flags/|(hot|pie|juice|extinguisher|slice|aiga|rpg|sign)[^/]*$")
"""Files that a noun of the list names without being a picture of it."""
