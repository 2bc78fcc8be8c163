"""Pictures of numbers, words and short text, and of words to point at."""

from __future__ import annotations

from PIL import Image

from openm3.train.sights.canvas import MIN_CONTRAST, Box, Colour, Painter, contrast, ink_for, luminance_range, paste
from openm3.train.sights.sight import Sight, point_text
from openm3.train.sights.sources import Face, cap_height, font

NUMBER_QUESTIONS = (
    "What number is in the picture?",
    "What number is in the picture?",
    "What number is this?",
    "Which number do you see?",
    "Read the number.",
)
WORD_QUESTIONS = (
    "What does the picture say?",
    "What does the picture say?",
    "What word is in the picture?",
    "What does it say?",
    "Read the word.",
)
TEXT_QUESTIONS = (
    "What does the picture say?",
    "What does the picture say?",
    "What text is in the picture?",
    "What does it say?",
    "Read the text.",
)
WHERE_WORD_QUESTIONS = (
    "Where is the word “{}”?",
    "Where is the word “{}”?",
    "Where does it say “{}”?",
    "Point at “{}”.",
)
NUMBER_SIZES = ((56, 56), (84, 56), (112, 56), (84, 84), (112, 84), (112, 112), (140, 112), (168, 112), (168, 168))
WORD_SIZES = (
    (112, 56),
    (140, 56),
    (168, 56),
    (168, 84),
    (196, 56),
    (224, 56),
    (140, 112),
    (168, 112),
    (196, 112),
    (168, 168),
)
TEXT_SIZES = ((168, 56), (196, 56), (224, 56), (168, 84), (224, 84), (168, 112), (224, 112), (196, 168), (224, 168))
SAME_IN_BOTH_CASES = frozenset("cosuvwxz")


def number(painter: Painter) -> Sight:
    """One to four digits."""
    digits = str(painter.rng.randrange(10 ** painter.rng.choice((1, 2, 3, 3, 4, 4))))
    return _written(painter, digits, "number", NUMBER_SIZES, NUMBER_QUESTIONS, f"The number is {digits}.")


def word(painter: Painter) -> Sight:
    """One word, mostly in lower case."""
    text = cased(painter, random_word(painter))
    return _written(painter, text, "word", WORD_SIZES, WORD_QUESTIONS, f"It says {text}.")


def text(painter: Painter) -> Sight:
    """Two or three words on one line or below each other, at times with a number among them."""
    rng = painter.rng
    words = [random_word(painter, 8) for _ in range(rng.choice((2, 2, 3)))]
    if rng.random() < 0.2:
        words[rng.randrange(len(words))] = str(rng.randrange(1000))
    style = rng.random()
    if style < 0.15:
        words = [w.upper() for w in words]
    elif style < 0.35:
        words = [words[0].capitalize(), *words[1:]]
    line = " ".join(words)
    breaks = rng.random() < 0.5
    drawn = "\n".join(words) if breaks else line
    return _written(
        painter, drawn, "text", TEXT_SIZES[3:] if breaks else TEXT_SIZES, TEXT_QUESTIONS, f"It says {line}."
    )


def where_word(painter: Painter) -> Sight:
    """Two to five words in different places, one of which to point at."""
    rng = painter.rng
    width, height = rng.choice(((140, 112), (168, 112), (168, 168), (196, 140), (196, 196)))
    image = painter.background(width, height)
    boxes: dict[str, Box] = {}
    shown: list[tuple[str, Box]] = []
    for _ in range(rng.choice((2, 3, 3, 4, 5))):
        text = cased(painter, random_word(painter, 8))
        face = painter.sources.face(rng)
        size = painter.fitting(text, face, width - 8, height // 3, 9, 22)
        if size is None or any(text.lower() in b.lower() or b.lower() in text.lower() for b in boxes):
            continue
        mask = painter.letters(text, face, size)
        place = free_place(painter, (width, height), mask.size, list(boxes.values()), 4)
        if place is not None:
            boxes[text] = paste(
                image, mask, ink(painter, image, (*place, place[0] + mask.width, place[1] + mask.height)), place
            )
            shown += glyphs(text, face, boxes[text])
    if not boxes:
        return where_word(painter)
    asked = rng.choice(list(boxes))
    point = point_text(boxes[asked], width, height)
    question = rng.choice(WHERE_WORD_QUESTIONS).format(asked)
    pixels = painter.worn(image, 9)
    return Sight([pixels], None, question, f"At ({point}).", point, "where", boxes[asked], shown=tuple(shown))


def writing(painter: Painter) -> Sight:
    """Words and numbers all over a picture, in many faces and sizes, which nobody asks for: what glyphs look like."""
    rng = painter.rng
    width, height = rng.choice(((112, 112), (140, 112), (168, 112), (140, 140), (168, 140), (168, 168)))
    image = painter.background(width, height)
    boxes: list[Box] = []
    shown: list[tuple[str, Box]] = []
    misses = 0
    while misses < 4:
        text = str(rng.randrange(10000)) if rng.random() < 0.25 else cased(painter, random_word(painter, 9))
        face = painter.sources.face(rng)
        size = painter.fitting(text, face, width - 4, height // 2, 9, 40)
        place = None
        if size is not None:
            mask = painter.letters(text, face, size, painter.degrees())
            place = free_place(painter, (width, height), mask.size, boxes, 2)
        if size is None or place is None:
            misses += 1
            continue
        box = (*place, place[0] + mask.width, place[1] + mask.height)
        boxes.append(paste(image, mask, ink(painter, image, box), place))
        shown += glyphs(text, face, boxes[-1])
    return Sight([painter.worn(image, 9)], None, "", "", None, "writing", shown=tuple(shown))


def ink(painter: Painter, image: Image.Image, box: Box) -> Colour:
    """A colour that stands out from the part of the image that it is painted on."""
    darkest, lightest = luminance_range(image, box)
    # Small writing and restless backgrounds ask for more.
    hard = box[3] - box[1] < 22 or contrast(darkest, lightest) > 1.3
    return ink_for(darkest, lightest, painter.rng, MIN_CONTRAST * 1.5 if hard else MIN_CONTRAST)


def free_place(
    painter: Painter, area: tuple[int, int], size: tuple[int, int], taken: list[Box], gap: int
) -> tuple[int, int] | None:
    """Where something of that size fits, `gap` pixels away from everything else; None if no place is found."""
    for _ in range(30):
        if size[0] + 2 > area[0] or size[1] + 2 > area[1]:
            return None
        x = painter.rng.randint(1, area[0] - size[0] - 1)
        y = painter.rng.randint(1, area[1] - size[1] - 1)
        if all(
            x >= b[2] + gap or x + size[0] + gap <= b[0] or y >= b[3] + gap or y + size[1] + gap <= b[1] for b in taken
        ):
            return x, y
    return None


def random_word(painter: Painter, longest: int = 12) -> str:
    """A word of the sources in lower case whose case can be seen from its letters."""
    while True:
        chosen = painter.rng.choice(painter.sources.words)
        if len(chosen) <= longest and not set(chosen) <= SAME_IN_BOTH_CASES:
            return chosen


def cased(painter: Painter, text: str) -> str:
    """Mostly as it is, else capitalised or in upper case."""
    chance = painter.rng.random()
    return text if chance < 0.65 else text.capitalize() if chance < 0.85 else text.upper()


def _written(
    painter: Painter,
    drawn: str,
    kind: str,
    sizes: tuple[tuple[int, int], ...],
    questions: tuple[str, ...],
    answer: str,
) -> Sight:
    """The text somewhere in a picture of about one of the sizes, in a face and size with which it fits."""
    rng = painter.rng
    while True:
        width, height = rng.choice(sizes)
        if rng.random() < 0.15:
            width, height = width + rng.randint(-13, 13), height + rng.randint(0, 20)
        elif rng.random() < 0.05:
            width, height = 3 * width // 2, 3 * height // 2
        face = painter.sources.face(rng)
        degrees = painter.degrees()
        size = painter.fitting(drawn, face, width - 6, height - 6, 10, 64)
        if size is None:
            continue
        mask = painter.letters(drawn, face, size, degrees)
        if mask.width + 4 <= width and mask.height + 4 <= height:
            break
    image = painter.background(width, height)
    x, y = rng.randint(2, width - mask.width - 2), rng.randint(2, height - mask.height - 2)
    box = (x, y, x + mask.width, y + mask.height)
    paste(image, mask, ink(painter, image, box), (x, y))
    spelled = " ".join(drawn.split())
    finest = size * cap_height(face)
    pixels, shown = painter.worn(image, finest), glyphs(drawn, face, box)
    return Sight([pixels], None, rng.choice(questions), answer, spelled, kind, box, shown=shown)


def glyphs(drawn: str, face: Face, box: Box) -> tuple[tuple[str, Box], ...]:
    """About where each character of writing that fills a box is, if it is not turned: in lines of equal height."""
    lines = drawn.split("\n")
    ruler = font(face, 40)
    widest = max(1.0, *(ruler.getlength(line) for line in lines))
    left, top, right, bottom = box
    found = []
    for row, line in enumerate(lines):
        ends = [left + (right - left) * ruler.getlength(line[:i]) / widest for i in range(len(line) + 1)]
        y0, y1 = (round(top + (bottom - top) * edge / len(lines)) for edge in (row, row + 1))
        spans = zip(line, ends, ends[1:], strict=False)
        found += [(c, (round(x0), y0, round(x1), y1)) for c, x0, x1 in spans if not c.isspace()]
    return tuple(found)
