"""The common style of all figures: colours, axes, ticks, legends, and fonts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dpoviz.analysis.text import number, short

TASK_COLORS = {"math": "#0A52C8", "code": "#B5880F", "dialogue": "#C4105C"}
"""The colour of each known task in all figures, in the order of axes and legends."""

_FURTHER_COLORS = ("#2E8B57", "#8C564B", "#17808F", "#6F7F00", "#6B6B6B")

TERM_COLORS = {
    "dpo": "#1D2F5F",
    "range": "#5B9A8B",
    "smoothness": "#9A53C5",
    "consistency": "#EE7733",
    "entropy": "#7A1A0C",
}
"""The colour of each term of the total loss, in the order of legends."""

ANSWER_COLORS = {"chosen": "#1D6F9E", "rejected": "#C2571A"}
"""The colour of the chosen and of the rejected answers."""

GREY, INK = "#5A5A5A", "#222222"
"""The colours of lines and texts that belong to neither a task nor a term."""


def task_colors(tasks: Iterable[str]) -> dict[str, str]:
    """Return the colour of each task, in the order of axes and legends.

    Args:
        tasks: names of tasks, possibly repeated.

    Returns:
        The tasks of `TASK_COLORS` with their colours, then the others, sorted by name, with colours from a fixed cycle
        of five.
    """
    tasks = set(tasks)
    others = sorted(tasks - set(TASK_COLORS))
    known = {task: color for task, color in TASK_COLORS.items() if task in tasks}
    return known | {task: _FURTHER_COLORS[i % len(_FURTHER_COLORS)] for i, task in enumerate(others)}


def require_columns(table: pd.DataFrame, columns: list[str], name: str) -> None:
    """Raise ValueError if a table lacks one of the columns or has no rows."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{name}: missing columns {missing}, expected {columns}")
    if table.empty:
        raise ValueError(f"{name}: got no rows, expected at least one")


def open_axes(ax: Axes | None) -> Axes:
    """Return the given Axes, or those of a new Figure, without the top and right spines."""
    ax = Figure(figsize=(6, 4), layout="constrained").add_subplot() if ax is None else ax
    ax.spines[["top", "right"]].set_visible(False)
    return ax


class _PlainLogLocator(LogLocator):
    """A locator of at least three round numbers: 1, 2 and 5 of each decade, and more on a short axis."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        low, high = sorted((vmin, vmax))
        if high < 5 * low:
            return MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(vmin, vmax)
        self.set_params(subs=(1, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5))
        return super().tick_values(vmin, vmax)


def plain_ticks(axis: Axis) -> None:
    """Label a log axis with plain decimals."""
    axis.set_major_locator(_PlainLogLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 4, trim=True)))
    axis.set_minor_locator(NullLocator())


def legend_above(ax: Axes, ncols: int) -> None:
    """Put the legend above the Axes, where it hides nothing; no legend if nothing has a label."""
    if not ax.get_legend_handles_labels()[1]:
        return
    tight = {"handlelength": 1.5, "handletextpad": 0.4, "columnspacing": 1.0, "borderaxespad": 0.3}
    legend = ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols, frameon=False, fontsize="small", **tight)
    use_known_letters(legend.get_texts())


_CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC",
    "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS", "Droid Sans Fallback",
    "Noto Sans CJK JP", "Noto Sans CJK TC", "Noto Sans CJK HK", "Noto Sans CJK KR",
)  # fmt: skip
"""Fonts to try first; of a file with several, some versions of matplotlib see only the first, the Japanese one."""

FONT_ADVICE = "install Noto Sans CJK (on Debian and Ubuntu: apt install fonts-noto-cjk)"


def printable(text: str) -> tuple[dict[str, Any], str]:
    """Return font properties and text to draw; characters that no installed font has are replaced by boxes.

    matplotlib would also draw a box for such a character, but with a warning.
    """
    missing = _unknown(text)
    if not missing:
        return {}, text
    name, found = _font_with(missing, frozenset(font.name for font in fontManager.ttflist))
    shown = "".join("□" if letter in missing - found else letter for letter in text)
    return {} if name is None else {"fontfamily": ["sans-serif", name]}, shown


def without_font(texts: Iterable[str]) -> str:
    """Return the characters of some texts that no installed font has, each once."""
    there = frozenset(font.name for font in fontManager.ttflist)
    lost = [sorted(missing - _font_with(missing, there)[1]) for missing in map(_unknown, texts) if missing]
    return "".join(dict.fromkeys(letter for letters in lost for letter in letters))


def _unknown(text: str) -> frozenset[str]:
    """Return the characters that the figures' own font lacks."""
    own = get_font(findfont(FontProperties()))
    return frozenset(letter for letter in text if letter != "\n" and not own.get_char_index(ord(letter)))


@lru_cache(maxsize=4096)
def _font_with(letters: frozenset[str], there: frozenset[str]) -> tuple[str | None, frozenset[str]]:
    """Return the first of the installed fonts with the most of some characters, and those that it has."""
    best: tuple[str | None, frozenset[str]] = (None, frozenset())
    others = sorted(name for name in there - set(_CHINESE_FONTS) if "Emoji" not in name)  # pictures cannot be drawn
    for name in (*(name for name in _CHINESE_FONTS if name in there), *others):
        font = get_font(findfont(FontProperties(family=name)))
        found = frozenset(letter for letter in letters if font.get_char_index(ord(letter)))
        if len(found) > len(best[1]):
            best = (name, found)
        if found == letters:
            break
    return best


def use_known_letters(texts: Iterable[Text]) -> None:
    """Set a font that has the characters of each text, or replace them by boxes."""
    for text in texts:
        font, shown = printable(text.get_text())
        text.set(text=shown, **font)


def task_label(task: str) -> str:
    """Return the label of a task in a figure: its name as one short line.

    Dollar signs are escaped, so that they start no formula. A leading underscore gets a space before it, because
    matplotlib leaves labels that begin with one out of the legend.
    """
    label = short(task, 24).replace("$", r"\$") or "(no name)"
    return f" {label}" if label.startswith("_") else label
