"""The picture of a needle evaluation: share of right answers by depth and length, a panel a task and attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from openm3.errors import ConfigError
from openm3.eval.needles import Result
from openm3.eval.report import tokens

DEPTHS = 10
"""Rows of the picture, each a tenth of the haystack."""

_TITLES = {
    "pass_key": "Pass keys",
    "quote": "Quotes",
    "selected": "selected blocks",
    "window": "newest blocks only",
}


def require_matplotlib() -> None:
    """Raise ConfigError unless pictures can be drawn, before hours are spent on what they would show."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("drawing the heat map needs matplotlib: pip install 'openm3[eval]'")


def by_depth(results: Sequence[Result], kind: str, attention: str, length: int) -> list[tuple[int, int]]:
    """(right, asked) in each tenth of the haystack, from its start to its end."""
    buckets = [(0, 0)] * DEPTHS
    for r in results:
        if (r.kind, r.attention, r.length) == (kind, attention, length) and r.depth is not None:
            i = min(DEPTHS - 1, int(r.depth * DEPTHS))
            buckets[i] = (buckets[i][0] + r.right, buckets[i][1] + 1)
    return buckets


def draw(results: Sequence[Result], path: Path) -> None:
    """Write the heat map to `path` as PNG."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({r.length for r in results})
    attentions = [a for a in ("selected", "window") if any(r.attention == a for r in results)]
    kinds = [k for k in ("pass_key", "quote") if any(r.kind == k for r in results)]
    size = (1.4 + len(attentions) * (1.2 + 1.0 * len(lengths)), 0.9 + 3.6 * len(kinds))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(kinds), len(attentions), squeeze=False, sharey=True)
    for row, kind in enumerate(kinds):
        for column, attention in enumerate(attentions):
            cells = [by_depth(results, kind, attention, length) for length in lengths]
            panel = axes[row][column]
            shares = [[c[d][0] / c[d][1] if c[d][1] else float("nan") for c in cells] for d in range(DEPTHS)]
            image = panel.imshow(shares, cmap="RdYlBu", vmin=0, vmax=1, aspect="auto")
            for x, cell in enumerate(cells):
                for y, (right, count) in enumerate(cell):
                    extreme = count > 0 and abs(right / count - 0.5) > 0.35
                    ink = {"color": "white" if extreme else "black", "fontsize": 8}
                    panel.text(x, y, f"{right}/{count}" if count else "–", ha="center", va="center", fontdict=ink)
            panel.hlines([y + 0.5 for y in range(DEPTHS - 1)], -0.5, len(lengths) - 0.5, color="white", linewidth=0.8)
            panel.vlines([x + 0.5 for x in range(len(lengths) - 1)], -0.5, DEPTHS - 0.5, color="white", linewidth=0.8)
            panel.set_title(f"{_TITLES[kind]}, {_TITLES[attention]}", fontsize=9)
            panel.set_xticks(range(len(lengths)), [tokens(length) for length in lengths])
            edges = range(0, DEPTHS + 1, 2)
            panel.set_yticks([e - 0.5 for e in edges], [f"{e * 100 // DEPTHS}%" for e in edges])
            panel.set_xlabel("tokens of the haystack" if row + 1 == len(kinds) else "")
            panel.set_ylabel("" if column else "depth of the answer")
    figure.colorbar(image, ax=axes, label="right answers", format=lambda value, _: f"{value:.0%}", shrink=0.8)
    figure.savefig(path)
