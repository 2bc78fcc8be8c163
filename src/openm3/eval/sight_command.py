"""`openm3 eval sight`: a model put to held-out pictures and videos, and what it saw wrongly as a picture to look at."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from openm3.config import EngineConfig
from openm3.engine.engine import Engine
from openm3.engine.request import SamplingParams
from openm3.errors import ConfigError
from openm3.eval.report import progress, table, tokens, wilson
from openm3.eval.sight import GOALS, ImageNeedle, ImageNeedleMaker, Score, is_right, sight_cases
from openm3.model.model import Model
from openm3.tokens.media import Media
from openm3.tokens.pictures import read_image
from openm3.tokens.video import video_from_frames
from openm3.train.pictures import KINDS, Sight

NEEDLE_GOAL = 0.9
"""The share of pictures amid text that the bundled model is to read right."""

ANSWER_TOKENS = 40
SHEET, COLUMNS, MOST = 230, 5, 40
"""Pixels of a cell of the sheet, cells in a row, and cells at most."""

Asked = tuple[list[int], Sequence[Media]]


def run(args: argparse.Namespace, model: Model) -> int:
    """Ask, print a table, and draw what was seen wrongly. Raises ConfigError for a model that sees nothing."""
    if model.config.vision is None:
        raise ConfigError(f"{model.name} reads text only: it has no vision tower for pictures and videos")
    if unknown := [kind for kind in args.kinds if kind not in KINDS]:
        raise ConfigError(f"there is no kind of picture {unknown[0]!r}: give some of {', '.join(KINDS)}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    scores: list[Score] = []
    with progress() as bar:
        for kind in args.kinds:
            cases = sight_cases(kind, args.count, args.seed)
            task = bar.add_task(kind, total=len(cases))
            scores.append(score_cases(model, kind, cases, lambda task=task: bar.advance(task)))  # type: ignore[misc]
        maker = ImageNeedleMaker(model.tokenizer, args.seed)
        for length in args.lengths if args.needles else ():
            task = bar.add_task(f"in {tokens(length)} of text", total=args.needles)
            needles = (maker.make(length, i, args.needles) for i in range(args.needles))
            scores.append(score_needles(model, length, needles, lambda task=task: bar.advance(task)))  # type: ignore[misc]
    sheet = out / "wrong.png"
    draw_wrong(scores, sheet)
    text = render(scores)
    (out / "sight.md").write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps({"model": model.name, "seed": args.seed, "shares": shares(scores), "wrong": str(sheet)}))
    else:
        print(f"{text}\n\nWhat was seen wrongly: {sheet}")
    return 0


def score_cases(model: Model, kind: str, cases: Sequence[Sight], on_answer: Callable[[], object]) -> Score:
    """Put cases of a kind to a model, many at a time."""
    asked = [_asked(model, case) for case in cases]
    longest = max(len(ids) for ids, _ in asked) + ANSWER_TOKENS
    answers = _answers(model, asked, EngineConfig(cache_tokens=max(1 << 15, 2 * longest)), on_answer)
    wrong = tuple((case, given) for case, given in zip(cases, answers, strict=True) if not is_right(case, given))
    return Score(kind, len(cases), wrong)


def score_needles(model: Model, length: int, needles: Iterable[ImageNeedle], on_answer: Callable[[], object]) -> Score:
    """Put pictures amid text to a model, one after the other."""
    count, wrong = 0, []
    for needle in needles:
        media = [read_image(needle.sight.frames[0])]
        parts = [{"type": "text", "text": needle.before}, {"type": "image"}, {"type": "text", "text": needle.after}]
        ids = model.tokenizer.chat([{"role": "user", "content": parts}], thinking="disabled", media=media)
        config = EngineConfig(cache_tokens=len(ids) + ANSWER_TOKENS)
        (given,) = _answers(model, [(ids, media)], config, on_answer)
        count += 1
        if not is_right(needle.sight, given):
            wrong.append((needle.sight, given))
    return Score(f"number in {tokens(length)} of text", count, tuple(wrong))


def shares(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Right answers by kind, with 95% intervals."""
    rows = []
    for score in scores:
        right = score.count - len(score.wrong)
        low, high = wilson(right, score.count)
        goal = GOALS.get(score.kind, NEEDLE_GOAL if " of text" in score.kind else None)
        row = {"kind": score.kind, "right": right, "asked": score.count, "share": score.share}
        rows.append({**row, "low": low, "high": high, "goal": goal})
    return rows


def render(scores: Sequence[Score]) -> str:
    """A table of right answers, and some wrong ones."""
    rows = []
    for row in shares(scores):
        interval = f"{row['share']:.1%} ({row['low']:.0%} to {row['high']:.0%})"
        goal = "" if row["goal"] is None else f"{row['goal']:.0%}"
        rows.append([row["kind"], f"{row['right']} of {row['asked']}", interval, goal])
    lines = [
        f"- {score.kind}: {sight.question} {given!r} instead of {sight.answer!r}"
        for score in scores
        for sight, given in score.wrong[:3]
    ]
    head = ["picture", "right", "share (95% interval)", "goal"]
    return table(head, rows, "<>>>") + ("\n\nSome wrong answers:\n\n" + "\n".join(lines) if lines else "")


def draw_wrong(scores: Sequence[Score], path: Path) -> None:
    """A sheet of pictures that were answered wrongly, with what was said and what is right; nothing if none was."""
    wrong = [pair for score in scores for pair in score.wrong[:10]][:MOST]
    if not wrong:
        path.unlink(missing_ok=True)
        return
    face = ImageFont.load_default(13)
    sheet = Image.new("RGB", (SHEET * COLUMNS, SHEET * -(-len(wrong) // COLUMNS)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (sight, given) in enumerate(wrong):
        x, y = SHEET * (i % COLUMNS), SHEET * (i // COLUMNS)
        picture = Image.fromarray(sight.frames[0])
        picture.thumbnail((SHEET - 10, SHEET - 62))
        sheet.paste(picture, (x + 5, y + 5))
        lines = (sight.question[:34], f"said: {given.strip()[:28]}", f"right: {sight.answer[:27]}")
        for line, (text, colour) in enumerate(zip(lines, ("black", "#b00000", "#006020"), strict=True)):
            draw.text((x + 5, y + SHEET - 52 + 16 * line), text, colour, face)
    sheet.save(path)


def _asked(model: Model, sight: Sight) -> Asked:
    media = read_image(sight.frames[0]) if sight.seconds is None else video_from_frames(sight.frames, sight.seconds)
    content = [{"type": media.kind}, {"type": "text", "text": sight.question}]
    return model.tokenizer.chat([{"role": "user", "content": content}], thinking="disabled", media=[media]), [media]


def _answers(model: Model, asked: Sequence[Asked], config: EngineConfig, on_answer: Callable[[], object]) -> list[str]:
    """Greedy answers, as many at a time as the engine takes."""
    engine = Engine(model, config)
    numbers = [engine.add(ids, SamplingParams(max_tokens=ANSWER_TOKENS), media=media) for ids, media in asked]
    found: dict[int, str] = {}
    while engine.has_work:
        for number, delta in engine.step().items():
            if delta.completion is not None:
                found[number] = delta.completion.text
                on_answer()
    return [found[number] for number in numbers]
