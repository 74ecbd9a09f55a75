"""Format numbers and tables as text, alike on the page, in pictures and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pandas as pd

from dpoviz.analysis.tables import POOLED
from dpoviz.translation import say, translate

if TYPE_CHECKING:
    from dpoviz.analysis.diagnose import Finding

MISSING = "–"
"""The text printed in place of NaN."""


def number(value: float, digits: int = 3, *, trim: bool = False) -> str:
    """Return a number with `digits` significant digits and without an exponent; "–" for NaN.

    Args:
        value: finite, or NaN.
        digits: number of significant digits.
        trim: remove trailing zeros after the decimal point.
    """
    if math.isnan(value):
        return MISSING
    # not numpy's format_float_positional, which drops zeros when it rounds up: 0.51996 becomes 0.52, not 0.520
    text = format(Decimal(f"{value:.{digits - 1}e}"), "f")
    return _minus(text.rstrip("0").rstrip(".") if trim and "." in text else text)


def fixed(value: float, decimals: int = 2, *, sign: bool = False) -> str:
    """Return a number with fixed decimals; `sign` adds a plus sign to positive numbers; "–" for NaN."""
    return MISSING if math.isnan(value) else _minus(f"{value:{'+' if sign else ''}.{decimals}f}")


def interval(value: float, low: float, high: float, decimals: int = 2, *, sign: bool = False) -> str:
    """Return an estimate with its interval, such as "+0.50 [+0.10, +0.75]"; "–" if the estimate is NaN."""
    if math.isnan(value):
        return MISSING
    estimate, below, above = (fixed(x, decimals, sign=sign) for x in (value, low, high))
    return f"{estimate} [{below}, {above}]"


def rho(row: Any) -> str:
    """Return Spearman's rho of a row of `summarize` with its interval, or "undefined"."""
    text = interval(row.rho, row.rho_low, row.rho_high, sign=True)
    return say("undefined") if text == MISSING else text


def short(text: str, most: int) -> str:
    """Return a text on one line, truncated to at most `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def as_text(summary: pd.DataFrame) -> str:
    """Return the table of `summarize` as text, for a terminal."""
    rows = [
        {
            say("form"): translate(row.form),
            say("task"): _task(row.task),
            say("prompts"): row.n,
            say("beta (median)"): number(row.beta_median),
            say("quartiles"): say("{low} to {high}", low=number(row.beta_q1), high=number(row.beta_q3)),
            say("s (median)"): number(row.scale_median),
            say("H, nats/token"): number(row.ref_entropy_mean),
            say("rho(beta, H)"): rho(row),
        }
        for row in summary.itertuples()
    ]
    return _in_columns(pd.DataFrame(rows), index=False)


def entropy_as_text(summary: pd.DataFrame) -> str:
    """Return the table of `summarize_estimators` as text, a row per estimator and a column per task."""
    cells = [f"{number(row.mean)} ± {number(row.se)} (n={row.n})" for row in summary.itertuples()]
    wide = summary.assign(cell=cells).pivot(index="estimator", columns="task", values="cell")
    wide = wide.loc[summary["estimator"].unique(), summary["task"].unique()]
    return _in_columns(wide.rename_axis(index=say("estimator"), columns=say("task")), na_rep=MISSING)


def accuracy_as_text(accuracy: pd.DataFrame) -> str:
    """Return the table of `summarize_accuracy` as text."""
    rows = [
        {
            say("run"): translate(row.variant),
            say("task"): _task(row.task),
            say("pairs"): row.n,
            say("accuracy"): interval(row.accuracy, row.accuracy_low, row.accuracy_high, 3),
            say("difference from fixed"): interval(
                row.difference, row.difference_low, row.difference_high, 3, sign=True
            ),
        }
        for row in accuracy.itertuples()
    ]
    return _in_columns(pd.DataFrame(rows), index=False)


def _task(name: str) -> str:
    return say("all") if name == POOLED else name


def _in_columns(table: pd.DataFrame, **options: Any) -> str:
    """Return a table as text, a Chinese character as wide as two letters, as terminals draw it."""
    with pd.option_context("display.unicode.east_asian_width", True):
        return table.to_string(**options)


def slopes_as_text(slopes: pd.DataFrame) -> str:
    """Return the slopes of a re-tilted run as text, those of all prompts."""
    rows = [
        {
            "run": row.variant,
            "task": row.task,
            "per nat": f"{row.unit} of {'answers' if row.unit == 'reward' else 'pairs'}",
            "slope b": f"{number(row.slope)} [{number(row.low)}, {number(row.high)}]",
            "Var h": number(row.variance),
            "prompts": row.prompts,
        }
        for row in slopes[slopes["half"] == "all"].itertuples()
    ]
    return pd.DataFrame(rows).to_string(index=False)


def allocation_as_text(allocation: pd.DataFrame) -> str:
    """Return the allocations of a re-tilted run as text."""
    rows = [
        {
            "run": row.variant,
            "rule": row.rule,
            "task": row.task,
            "a": number(row.a),
            "KL": number(row.kl),
            "reward": fixed(row.reward, 4),
            "above one a": interval(row.gain, row.gain_low, row.gain_high, 4, sign=True),
        }
        for row in allocation.itertuples()
    ]
    return pd.DataFrame(rows).to_string(index=False)


def findings_as_text(findings: Sequence[Finding]) -> str:
    """Return what looks wrong in a run as text, for a terminal; what was not checked is listed last, by name."""
    lines = []
    for finding in findings:
        if finding.severity != "not checked":
            where = "" if finding.task is None else f" ({finding.task})"
            lines += [
                f"  {translate(finding.severity)}{say(': ')}{translate(finding.name)}{where}",
                f"    {finding.evidence}",
                f"    {finding.advice}",
            ]
    missing = [translate(finding.name) for finding in findings if finding.severity == "not checked"]
    not_checked = [f"  {say('not checked')}{say(': ')}{say(', ').join(missing)}"] if missing else []
    return "\n".join([*(lines or [f"  {say('nothing')}"]), *not_checked])


def _minus(text: str) -> str:
    return text.replace("-", "−")
