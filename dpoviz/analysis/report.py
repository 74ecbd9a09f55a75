"""Write the report of a run as one HTML file: figures and how to read them, numbers, configuration.

The sentences on the results are computed from the numbers (`reading`, `reading_of_accuracy`). The fixed text, on how to
read the figures and on what the equations imply, is in templates/report.html.j2.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from dpoviz.analysis.plots import points_name
from dpoviz.analysis.style import task_colors
from dpoviz.analysis.tables import EXPECTED_ORDER, POOLED
from dpoviz.analysis.text import fixed, interval, number, rho, short
from dpoviz.translation import FONT_ADVICE, chinese_font, current_language, key, say, translate

if TYPE_CHECKING:
    from dpoviz.analysis.diagnose import Finding

FIGURES = ("beta_by_task", "retilt", "entropy_estimators", "training", "beta_steps", "log_ratios", "beta_gradients")
"""The figures that the report can show; the first is required if there is a table of beta."""

FINDINGS_NOTE = key(
    "A finding is a reason to look, not a verdict. Where it rests on a test, the chance of any false alarm in a run is "
    "about 5 % at most, over all tests together, by the choice of held-out prompts and of batches. Measured in the "
    "small world: in 8 short healthy runs nothing was found; each symptom, planted in 8 runs or tables, was found in 7 "
    "or 8."
)
"""Shown below the findings."""

MIN_PROMPTS = 10
"""The fewest prompts per task for a statement on the order of the tasks.

The exact 95 % interval of the median of 10 values runs from the 2nd smallest to the 9th; of 8 or fewer values, from the
smallest to the largest; of 5 or fewer, there is none.
"""

FAST_NOTE = key(
    "This is a --fast run: a small model, trained for few steps on few pairs, to see that everything works. Its "
    "numbers say little. Run it again without --fast before drawing conclusions."
)
"""Shown at the top of the page of a --fast run."""


FEW_STEPS = 50
"""Steps of stage 2 below which a page says that its run is tiny: at the default learning rate, which moves each weight
of beta by at most 0.003 per step, beta has hardly left its start."""

ENDS = 3
"""The most prompts that are shown at each end of beta, per form and task."""


def tiny_note(table: pd.DataFrame | None, history: pd.DataFrame) -> list[str]:
    """Return a sentence for the top of the page of a tiny run; none for another.

    A run is tiny with fewer than `MIN_PROMPTS` held-out prompts of some task, or `FEW_STEPS` steps of stage 2.
    """
    found = []
    if table is not None:
        counts = table.drop_duplicates(["task", "prompt"])["task"].value_counts()
        few = say(", ").join(f"{n} {task}" for task, n in counts.items() if n < MIN_PROMPTS)
        if few:
            found.append(say("{few} held-out prompts, fewer than {least} per task", few=few, least=MIN_PROMPTS))
    trained = history[history["stage"] == 2]
    if len(trained):
        steps = int(trained["step"].max() - trained["step"].min()) + 1
        if steps < FEW_STEPS:
            found.append(say("about {steps} steps of β(x), fewer than {least}", steps=steps, least=FEW_STEPS))
    if not found:
        return []
    return [say("This is a tiny run: {found}. Its numbers say little about β(x).", found=say("; ").join(found))]


def reading(summary: pd.DataFrame) -> list[str]:
    """Return the results in sentences: the order of the medians and the rank correlations, form by form.

    Whether the expected order of the derivation holds is judged on the medians as printed, to three digits. If one of
    several tasks has fewer than `MIN_PROMPTS` prompts, nothing is said about their order.

    Args:
        summary: the table of `summarize`.

    Returns:
        For each form, a sentence or two on the medians of beta and the stability of their order, and one on Spearman's
        rho within each task and pooled, with intervals; last, if there are several tasks, a caution about the pooled
        rho.

    Raises:
        ValueError: an empty summary, or missing columns.
    """
    needed = ["form", "task", "n", "beta_median", "rho", "rho_low", "rho_high", "order_share"]
    missing = [column for column in needed if column not in summary.columns]
    if missing:
        raise ValueError(f"summary: missing columns {missing}, expected those of summarize")
    if summary.empty:
        raise ValueError("summary: got no rows, expected at least one")
    sentences = []
    for form, rows in summary.groupby("form"):
        sentences += [_order(form, rows[rows["task"] != POOLED]), _correlations(form, rows)]
    if (summary["task"] != POOLED).groupby(summary["form"]).sum().max() > 1:
        sentences.append(
            say(
                "The pooled ρ is confounded by task: it mixes differences between tasks with differences between "
                "prompts of one task, and can be large while β and H are unrelated within every task, or have the "
                "other sign. Read it beside the ρ within each task, never alone."
            )
        )
    return sentences


def _order(form: str, rows: pd.DataFrame) -> str:
    counts = dict(zip(rows["task"], rows["n"], strict=True))
    if len(counts) > 1 and min(counts.values()) < MIN_PROMPTS:
        prompts = say(", ").join(f"{n} {task}" for task, n in counts.items())
        return say(
            "{form} form: too few prompts to say anything about the order of the tasks: {prompts}; expected at least "
            "{least} per task.",
            form=say(form),
            prompts=prompts,
            least=MIN_PROMPTS,
        )
    medians = dict(zip(rows["task"], rows["beta_median"], strict=True))
    ranked = sorted(medians, key=medians.__getitem__)
    order = f"{ranked[0]} {number(medians[ranked[0]])}"
    for before, task in pairwise(ranked):
        sign = "<" if number(medians[before]) != number(medians[task]) else "="
        order += f" {sign} {task} {number(medians[task])}"
    sentences = [say("{form} form: median β is {order}.", form=say(form), order=order)]
    if set(EXPECTED_ORDER) <= set(medians):
        expected = [float(number(medians[task])) for task in EXPECTED_ORDER]
        if all(a < b for a, b in pairwise(expected)):
            verdict = say("The order {order} that the derivation expects (§5.1.2) came out.", order=_EXPECTED)
        else:
            verdict = say("The order {order} that the derivation expects (§5.1.2) did not come out.", order=_EXPECTED)
        sentences.append(verdict)
    share = rows["order_share"].iloc[0]
    if not math.isnan(share):
        sentences.append(
            say(
                "The medians keep the order printed here in {share:.0f} % of resamples of the prompts; this does not "
                "cover another seed, or another rounding of the training.",
                share=100 * share,
            )
        )
    return " ".join(sentences)


_EXPECTED = " < ".join(EXPECTED_ORDER)


def _correlations(form: str, rows: pd.DataFrame) -> str:
    """Return the sentence on rho, within each task and pooled."""
    parts = []
    for row in rows.itertuples():
        value = rho(row)
        if row.task == POOLED:
            parts.append(say("{value} over all tasks pooled", value=value))
        else:
            parts.append(say("{value} within {task}", value=value, task=row.task))
    return say(
        "{form} form: Spearman’s ρ of β and H (95 % bootstrap interval) is {parts}.",
        form=say(form),
        parts=say(", ").join(parts),
    )


STILL = 0.05
"""A mean log-ratio that stayed within this many nats of 0 has hardly moved."""

_STILL = key("Neither answer has moved by 0.05 nats")
_VERDICTS = {
    ("rise", "fall"): key("Chosen rises and rejected falls, so that the margin comes from both, as one would hope"),
    ("fall", "fall"): key(
        "Both fall: usual where the two answers share most of their words, since the loss sees only their difference; "
        "suspicious where they are unlike, because the probability then goes to answers that are in no pair, so read "
        "the answers below and look at the KL"
    ),
    ("rise", "rise"): key(
        "Both rise: usual where the pairs are unlike what the reference writes, so that training on either answer "
        "makes both likelier; suspicious where rejected rises as fast as chosen, because then nothing tells them apart"
    ),
    ("fall", "rise"): key(
        "Chosen falls and rejected rises, against the labels: usual only by chance, among few pairs; suspicious "
        "otherwise, so look for flipped labels or too large a learning rate"
    ),
}


def reading_of_log_ratios(history: pd.DataFrame, tasks: Sequence[str]) -> list[str]:
    """Return sentences on where the log-ratios of chosen and rejected answers went, one per direction.

    They are read at the last measurement on held-out pairs.

    Args:
        history: the history of `train`, with the columns held_out_logratio/<answer>/<task>.
        tasks: the tasks.
    """
    groups: dict[str, list[str]] = {}
    for form, rows in history.sort_values("step").groupby("form"):
        for task in tasks:
            columns = [f"held_out_logratio/{answer}/{task}" for answer in ("chosen", "rejected")]
            if not set(columns) <= set(rows) or rows[columns].isna().all(axis=None):
                continue
            chosen, rejected = (float(rows[column].dropna().iloc[-1]) for column in columns)
            wrong = say(", in the wrong order") if chosen < rejected else ""
            text = say(
                "{task} in the {form} form ({chosen} and {rejected}{wrong})",
                task=task,
                form=say(form),
                chosen=fixed(chosen, sign=True),
                rejected=fixed(rejected, sign=True),
                wrong=wrong,
            )
            groups.setdefault(_direction(chosen, rejected), []).append(text)
    return [say("{text}.", text=say(verdict) + say(". ") + say(", ").join(named)) for verdict, named in groups.items()]


def _direction(chosen: float, rejected: float) -> str:
    """Return what it means that the mean log-ratios have these signs."""
    if max(abs(chosen), abs(rejected)) < STILL:
        return _STILL
    first, second = ("rise" if value > 0 else "fall" for value in (chosen, rejected))
    return _VERDICTS[first, second]


def reading_of_accuracy(accuracy: pd.DataFrame) -> list[str]:
    """Return a sentence per variant on its held-out accuracy over all tasks, compared with the baseline's.

    Args:
        accuracy: the table of `summarize_accuracy`.
    """
    pooled = accuracy[accuracy["task"] == POOLED]
    base = pooled[pooled["difference"].isna()].iloc[0]
    sentences = []
    for row in pooled[pooled["difference"].notna()].itertuples():
        if row.difference_low > 0:
            verdict = say("better than")
        elif row.difference_high < 0:
            verdict = say("worse than")
        else:
            verdict = say("not significantly different from")
        sentences.append(
            say(
                "{variant}: reward accuracy on {n} held-out pairs is {accuracy}, {verdict} the {baseline} β’s {other} "
                "after as many steps (difference {difference}, 95 % bootstrap interval {low} to {high}).",
                variant=say(row.variant),
                n=row.n,
                accuracy=fixed(row.accuracy, 3),
                verdict=verdict,
                baseline=say(base.variant),
                other=fixed(base.accuracy, 3),
                difference=fixed(row.difference, 3, sign=True),
                low=fixed(row.difference_low, 3, sign=True),
                high=fixed(row.difference_high, 3, sign=True),
            )
        )
    return sentences


def write_report(
    path: Path | str,
    *,
    table: pd.DataFrame | None,
    history: pd.DataFrame,
    summary: pd.DataFrame | None,
    config: Mapping[str, object],
    figures: Mapping[str, Figure],
    reading: Iterable[str],
    accuracy: pd.DataFrame | None = None,
    entropy: pd.DataFrame | None = None,
    answers: pd.DataFrame | None = None,
    slopes: pd.DataFrame | None = None,
    findings: Sequence[Finding] | None = None,
    log_ratios: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> Path:
    """Write a self-contained HTML file, without scripts or external files.

    Args:
        path: of the file; missing folders are created.
        table: the table of `beta_table`; None if beta is not a function of the prompt.
        history: the history of `train`.
        summary: the table of `summarize`; None if `table` is None.
        config: the configuration, possibly nested. If its "fast" is True, the page begins with `FAST_NOTE`.
        figures: figures by their name in `FIGURES`; a section without its figure is left out.
        reading: sentences on the results, such as those of the function `reading`.
        accuracy: the table of `summarize_accuracy`, or None.
        entropy: the table of `summarize_estimators`, or None.
        answers: a row per variant and prompt, with variant, task, prompt, answer and beta (NaN if there is
            none); or None.
        slopes: the slopes of `gain_of_run`, or None.
        findings: what looks wrong in the run (`diagnose`), possibly nothing; None if it was not looked for.
        log_ratios: sentences on the figure "log_ratios" (`reading_of_log_ratios`).
        notes: sentences for the top of the page.

    Returns:
        The path.

    Raises:
        ValueError: a table without the figure "beta_by_task", that figure without a table, or an unknown figure.
    """
    unknown = [name for name in figures if name not in FIGURES]
    if unknown or (FIGURES[0] in figures) != (table is not None):
        wanted = f"{FIGURES[0]!r} and any" if table is not None else "any"
        raise ValueError(f"figures: got {list(figures)}, expected {wanted} of {list(FIGURES[1:])}")
    parts = [part for part in (table, summary, accuracy, entropy, answers, slopes) if part is not None]
    page = _environment().get_template("report.html.j2")
    html = page.render(
        notes=[say(FAST_NOTE)] * (config.get("fast") is True) + _font_note() + list(notes),
        language="zh-CN" if current_language() == "zh" else "en",
        reading=list(reading),
        figures={name: _png(figure) for name, figure in figures.items()},
        points=None if table is None else _points(figures[FIGURES[0]], table),
        log_ratios=list(log_ratios),
        colors=task_colors({task for part in parts for task in part["task"]} - {POOLED}),
        pooled=POOLED,
        facts=None if table is None else _facts(table),
        summary=None if summary is None else list(summary.itertuples()),
        accuracy=None if accuracy is None else list(accuracy.itertuples()),
        entropy=None if entropy is None else list(entropy.itertuples()),
        slopes=None if slopes is None else list(slopes.itertuples()),
        last=_last_measurements(history),
        ends=None if table is None else _ends(table),
        answers=None if answers is None else _answers(answers),
        findings=None if findings is None else list(findings),
        findings_note=say(FINDINGS_NOTE),
        config=json.dumps(config, indent=2, ensure_ascii=False, default=str),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _environment() -> Environment:
    """Return the environment of the templates: every value is escaped, and a missing name is an error."""
    environment = Environment(
        loader=PackageLoader("dpoviz.analysis"),
        autoescape=True,
        extensions=["jinja2.ext.i18n"],
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["ext.i18n.trimmed"] = True  # a key is one line, however the template is laid out
    # no sentence of the template depends on a number, so that there is one plural
    environment.install_gettext_callables(translate, lambda one, many, n: translate(many))  # type: ignore[attr-defined]
    environment.filters |= {"number": number, "fixed": fixed, "rho": rho, "short": short, "say": translate}
    environment.globals |= {"interval": interval}
    return environment


def _font_note() -> list[str]:
    """Return a hint if the figures had to stay English."""
    if current_language() == "zh" and chinese_font() is None:
        return [
            say("The figures are in English: no installed font has Chinese characters; {advice}.", advice=FONT_ADVICE)
        ]
    return []


def _png(figure: Figure) -> str:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=160)
    return base64.b64encode(png.getvalue()).decode()


class _Points(NamedTuple):
    """The points of a figure that has been drawn, for a page to name on hover.

    Attributes:
        width: of the figure, in the unit of the places.
        height: likewise.
        named: place of each point from the left and from the top, and its text.
    """

    width: float
    height: float
    named: list[tuple[float, float, str]]


def _points(figure: Figure, table: pd.DataFrame) -> _Points:
    """Return the points of a drawn figure with a text for each: its numbers and its prompt."""
    groups = {points_name(*key): rows for key, rows in table.groupby(["form", "task"], sort=False)}
    width, height = figure.bbox.width, figure.bbox.height
    named = []
    for collection in (own for ax in figure.axes for own in ax.collections):
        rows = groups.get(str(collection.get_gid()))
        if rows is None:
            continue
        places = collection.get_offset_transform().transform(collection.get_offsets())
        for (x, y), row in zip(places, rows.itertuples(), strict=True):
            if math.isfinite(x):  # an entropy that is not known has no place
                entropy = f", H {number(row.ref_entropy)} ± {number(row.ref_entropy_se)}"
                numbers = f"β {number(row.beta)}, s {number(row.scale)}{entropy * math.isfinite(row.ref_entropy)}"
                text = f"{row.task}: {numbers}\n{short(row.prompt, 160)}"
                named.append((round(float(x), 1), round(float(height - y), 1), text))
    return _Points(width, height, named)


def _facts(table: pd.DataFrame) -> dict[str, object]:
    """Return the number of prompts of each task, and the forms and seeds."""
    counts = table.drop_duplicates(["task", "prompt"])["task"].value_counts()
    return {
        "prompts": {task: int(counts[task]) for task in task_colors(counts.index)},
        "forms": sorted(table["form"].unique()),
        "seeds": sorted(table["seed"].unique()),
    }


def _last_measurements(history: pd.DataFrame) -> dict[str, object]:
    """Return the names of the measures and the last value of each in every run; KL with its standard error."""
    names = {
        "loss/dpo": say("DPO loss, last batch"),
        "held_out_accuracy": say("held-out accuracy"),
        "kl": say("KL, nats"),
    }
    names = {column: name for column, name in names.items() if column in history}
    keys = [column for column in ("variant", "form", "seed") if column in history]
    rows = []
    for names_of_run, run in history.sort_values("step").groupby(keys, sort=True):
        cells = [number(run[column].dropna().iloc[-1]) if run[column].notna().any() else "–" for column in names]
        if "kl" in names and "kl_se" in run and run["kl"].notna().any():
            cells[-1] += f" ± {number(run.dropna(subset='kl')['kl_se'].iloc[-1])}"
        rows.append(([str(part) for part in names_of_run], cells))
    by = [say({"variant": "run"}.get(column, column)) for column in keys]
    return {"by": by, "measures": list(names.values()), "runs": rows}


def _ends(table: pd.DataFrame) -> list[tuple[str, str, list, list]]:
    """Return, for each form and task, the rows with the smallest and with the largest betas, the extreme ones first.

    At most `ENDS` at each end, and no row at both, unless there is only one.
    """
    found = []
    for form in sorted(table["form"].unique()):
        for task in task_colors(table["task"]):
            group = table[(table["form"] == form) & (table["task"] == task)].sort_values("beta", kind="stable")
            rows = list(group.itertuples())
            if rows:
                shown = max(1, min(ENDS, len(rows) // 2))
                found.append((form, task, rows[:shown], rows[: -shown - 1 : -1]))
    return found


def _answers(answers: pd.DataFrame) -> list[tuple[str, str, list]]:
    """Return, for each prompt, the rows of its answers."""
    groups = answers.groupby(["task", "prompt"], sort=False)
    return [(task, prompt, list(group.itertuples())) for (task, prompt), group in groups]
