"""Simple screens: a window with a title, fields, boxes to tick and buttons."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

from openm3.train.sights.canvas import Box, Painter
from openm3.train.sights.sight import Sight, point_text
from openm3.train.sights.sources import Face, font
from openm3.train.sights.text import random_word

SCREEN_SIZES = ((140, 140), (168, 140), (168, 168), (196, 140), (196, 168), (224, 168))
_BUTTON_WORDS = """
    OK Cancel Save Open Close Delete Next Back Yes No Help Search Login Exit Send Print Edit Add Copy Paste Undo Start
    Stop Play Pause Reset Apply Retry Skip Done Quit Share Home Menu Sign Buy Pay Book Find Sort New More Less Up Down
"""
_FIELD_WORDS = "Name City Email Phone Street Date User Price Size Code Country Age Number State Color Year Note"
_OPTION_WORDS = "Sound Music Wifi Dark Light Backup Sync Alarm Video Mail News Grid Radio Cloud Photo Lock"
BUTTONS, FIELDS, OPTIONS = _BUTTON_WORDS.split(), _FIELD_WORDS.split(), _OPTION_WORDS.split()


@dataclass(frozen=True)
class _Theme:
    page: str
    ink: str
    bar: str
    bar_ink: str
    field: str
    edge: str
    button: str
    button_ink: str


_THEMES = (
    _Theme("#f0f0f0", "#000000", "#2850a0", "#ffffff", "#ffffff", "#828282", "#dcdcdc", "#000000"),
    _Theme("#ffffff", "#1e1e1e", "#ebebeb", "#1e1e1e", "#f8f8f8", "#a0a0a0", "#1e6edc", "#ffffff"),
    _Theme("#24262c", "#e6e6e6", "#141418", "#e6e6e6", "#363840", "#6e7078", "#4c505c", "#ffffff"),
    _Theme("#faf6ec", "#32281e", "#784628", "#ffffff", "#fffffa", "#aa9678", "#b84a20", "#ffffff"),
    _Theme("#e1eee4", "#0a2814", "#1e6e46", "#ffffff", "#ffffff", "#78a082", "#1a7646", "#ffffff"),
    _Theme("#c0c0c0", "#000000", "#000080", "#ffffff", "#ffffff", "#5a5a5a", "#c0c0c0", "#000000"),
)


class _Screen:
    """What has been drawn, top to bottom: names and boxes of buttons, fields with values, options with ticks."""

    def __init__(self, painter: Painter) -> None:
        self.painter = painter
        rng = painter.rng
        self.width, self.height = rng.choice(SCREEN_SIZES)
        self.theme = rng.choice(_THEMES)
        self.image = Image.new("RGB", (self.width, self.height), self.theme.page)
        self.draw = ImageDraw.Draw(self.image)
        self.face, self.size = self._legible()
        self.row = round(self.size * 1.7)
        self.title = ""
        self.buttons: dict[str, Box] = {}
        self.fields: dict[str, tuple[str, Box]] = {}
        self.options: dict[str, tuple[bool, Box]] = {}
        y = 0
        if rng.random() < 0.7:
            y = self._bar()
        bottom = self._buttons(y)
        while y + self.row + 5 < bottom:
            y = self._field(y + 4) if rng.random() < 0.65 else self._option(y + 4)

    def _legible(self) -> tuple[Face, int]:
        rng = self.painter.rng
        while True:
            face = self.painter.sources.face(rng)
            size = self.painter.fitting("Country", face, 62, 24, 8, 12)
            if size is not None:
                return face, size

    def text(self, text: str, x: float, y: float, colour: str, anchor: str) -> Box:
        chosen = font(self.face, self.size)
        self.draw.text((x, y), text, font=chosen, fill=colour, anchor=anchor)
        left, top, right, bottom = self.draw.textbbox((x, y), text, font=chosen, anchor=anchor)
        return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)

    def _bar(self) -> int:
        self.title = random_word(self.painter, 8).capitalize()
        self.draw.rectangle((0, 0, self.width, self.row), fill=self.theme.bar)
        self.text(self.title, 5, self.row / 2, self.theme.bar_ink, "lm")
        return self.row

    def _buttons(self, top: int) -> int:
        """A row of buttons at the bottom, or several rows from further up; returns where the first begins."""
        rng = self.painter.rng
        chosen = font(self.face, self.size)
        y = self.height - self.row - 5
        if rng.random() < 0.25:
            y = rng.randint(top + 4, self.height - 3 * self.row - 5) if self.height - 3 * self.row > top + 10 else y
        rows = (self.height - 4 - y) // (self.row + 5)
        first = y
        for _ in range(max(1, rows)):
            x = rng.randint(4, 30)
            for name in rng.sample([b for b in BUTTONS if b not in self.buttons], 4):
                width = round(chosen.getlength(name)) + rng.randint(10, 20)
                if x + width + 4 > self.width:
                    break
                box = (x, y, x + width, y + self.row)
                self.draw.rounded_rectangle(box, rng.choice((0, 3, 6)), fill=self.theme.button, outline=self.theme.edge)
                self.text(name, x + width / 2, y + self.row / 2, self.theme.button_ink, "mm")
                self.buttons[name] = (x, y, x + width + 1, y + self.row + 1)
                x += width + rng.randint(5, 14)
            y += self.row + 5
        return first

    def _field(self, y: int) -> int:
        rng = self.painter.rng
        left = [f for f in FIELDS if f not in self.fields]
        if not left:
            return self.height
        name = rng.choice(left)
        value = random_word(self.painter, 7) if rng.random() < 0.65 else str(rng.randrange(1000))
        chosen = font(self.face, self.size)
        x = 5 + round(chosen.getlength("Country")) + 6
        value = value if chosen.getlength(value) < self.width - x - 12 else str(rng.randrange(100))
        self.text(name, 5, y + self.row / 2, self.theme.ink, "lm")
        box = (x, y, self.width - 6, y + self.row)
        self.draw.rectangle(box, fill=self.theme.field, outline=self.theme.edge)
        self.text(value, x + 4, y + self.row / 2, self.theme.ink, "lm")
        self.fields[name] = (value, box)
        return y + self.row

    def _option(self, y: int) -> int:
        rng = self.painter.rng
        left = [o for o in OPTIONS if o not in self.options]
        if not left:
            return self.height
        name, ticked, side = rng.choice(left), rng.random() < 0.5, self.size
        top = y + (self.row - side) // 2
        box = (6, top, 6 + side, top + side)
        self.draw.rectangle(box, fill=self.theme.field, outline=self.theme.edge)
        if ticked:
            tick = [(8, top + side * 0.5), (6 + side * 0.4, top + side - 3), (4 + side, top + 2)]
            self.draw.line(tick, fill=self.theme.ink, width=2)
        self.text(name, 11 + side, y + self.row / 2, self.theme.ink, "lm")
        self.options[name] = (ticked, box)
        return y + self.row


def screen(painter: Painter) -> Sight:
    """A screen and a question about one of its things."""
    rng = painter.rng
    screen = _Screen(painter)
    while not screen.buttons:
        screen = _Screen(painter)
    point: str | None = None
    asks = ["where", "where", "says"] + ["field"] * 2 * bool(screen.fields) + ["option"] * bool(screen.options)
    asks += ["title"] * bool(screen.title)
    what = rng.choice(asks)
    name, box = rng.choice(list(screen.buttons.items()))
    spelled: str | None
    if what == "where":
        question = rng.choice(
            ("Where is the {} button?", "Where is the {} button?", "Where do I click to {}?", "Point at {}.")
        )
        question = question.format(name)
        spelled = point_text(box, screen.width, screen.height)
        answer = f"At ({spelled})."
    elif what == "says":
        point = point_text(box, screen.width, screen.height)
        question = rng.choice(("What does the button at ({}) say?", "Which button is at ({})?")).format(point)
        spelled, answer = name, f"It says {name}."
    elif what == "field":
        name, (spelled, box) = rng.choice(list(screen.fields.items()))
        question = rng.choice(("What is in the {} field?", "What does the {} field say?", "What is the {}?")).format(
            name
        )
        answer = f"It says {spelled}."
    elif what == "option":
        name, (ticked, box) = rng.choice(list(screen.options.items()))
        question = rng.choice(("Is {} ticked?", "Is {} checked?", "Is the {} box ticked?")).format(name)
        spelled, answer = None, "Yes." if ticked else "No."
    else:
        question = rng.choice(
            ("What is the title of the window?", "What is the title?", "What does the title bar say?")
        )
        spelled, answer, box = screen.title, f"It says {screen.title}.", (0, 0, screen.width, screen.row + 1)
    return Sight([painter.worn(screen.image, 8)], None, question, answer, spelled, "screen", box)
