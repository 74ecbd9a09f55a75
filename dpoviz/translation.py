"""The language of figures, sliders, exercises, reports and printed lines.

A sentence is written in English where it is used, and is the key of its translation in translations/<language>.json. A
sentence without a translation stays English.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from warnings import warn

LANGUAGES = ("en", "zh")
"""The languages: English and Chinese."""

CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC",
    "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS", "Droid Sans Fallback",
    "Noto Sans CJK JP", "Noto Sans CJK TC", "Noto Sans CJK HK", "Noto Sans CJK KR",
)  # fmt: skip
"""Fonts to try first; of a file with several, some versions of matplotlib see only the first, the Japanese one."""

FONT_ADVICE = "install Noto Sans CJK (on Debian and Ubuntu: apt install fonts-noto-cjk)"

_now = "en"


def language(name: str) -> None:
    """Set the language of figures, sliders, exercises, reports and printed lines made from now on.

    In Chinese, matplotlib draws the characters that its default font lacks in the first installed font of
    `CHINESE_FONTS`. If none is installed, a warning names one to install, and figures stay English.

    Args:
        name: "en" or "zh".

    Raises:
        ValueError: another language.
    """
    global _now
    if name not in LANGUAGES:
        raise ValueError(f"language: got {name!r}, expected one of {LANGUAGES}")
    _now = name
    if name == "zh":
        import matplotlib

        font = chinese_font()
        matplotlib.rcParams["font.family"] = ["sans-serif", font] if font else ["sans-serif"]
        if font is None:
            warn(f"figures stay English: no installed font has Chinese characters; {FONT_ADVICE}", stacklevel=2)


def current_language() -> str:
    """Return the language that `language` has set, "en" at the start."""
    return _now


@contextmanager
def in_language(name: str) -> Iterator[None]:
    """Set a language within a with statement; then return to the language, and fonts, before."""
    before, family = _now, None
    if name == "zh":
        import matplotlib

        family = list(matplotlib.rcParams["font.family"])
    try:
        language(name)
        yield
    finally:
        globals()["_now"] = before
        if family is not None:
            matplotlib.rcParams["font.family"] = family


def key(sentence: str) -> str:
    """Return a sentence as it is, and mark it as the key of a translation that is looked up later."""
    return sentence


def translate(sentence: str) -> str:
    """Return the translation of a sentence, or the sentence itself if it has none."""
    return catalogue(_now).get(sentence, sentence)


def say(sentence: str, **values: object) -> str:
    """Return a sentence in the current language, its {name} fields filled with `values`."""
    found = translate(sentence)
    return found.format(**values) if values else found


def label(text: str, **values: object) -> str:
    """Return a text for a figure in the current language; in English where no font has its characters."""
    if _now == "zh" and chinese_font() is None:
        return text.format(**values) if values else text
    return say(text, **values)


@cache
def catalogue(name: str) -> Mapping[str, str]:
    """Return the translations into a language, by English sentence; none for English."""
    if name == "en":
        return {}
    return json.loads((files("dpoviz") / "translations" / f"{name}.json").read_text(encoding="utf-8"))


def chinese_font() -> str | None:
    """Return the name of the first installed font of `CHINESE_FONTS`, or None."""
    from matplotlib.font_manager import fontManager

    there = {font.name for font in fontManager.ttflist}
    return next((name for name in CHINESE_FONTS if name in there), None)
