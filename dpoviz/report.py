r"""One HTML file that holds a run: the pictures, how to read them, the numbers, the configuration.

Sentences on what came out are computed from the numbers (`reading`); the fixed text is on how to read and on
what follows from the equations.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from html import escape
from itertools import pairwise
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dpoviz.plots import task_colors
from dpoviz.table import EXPECTED_ORDER, POOLED

FIGURES = ("beta_by_task", "training", "beta_gradients")
"""The pictures that have a place in the report; the first one is required."""


def reading(summary: pd.DataFrame) -> list[str]:
    """What the numbers say, in sentences: the order of the medians and the rank correlations, form by form.

    Whether the order that the derivation expects came out is judged on the medians as they are printed, to
    three digits.

    Args:
        summary: what `table.summarize` returned.

    Returns:
        For each form a sentence or two on the medians of beta, then one on Spearman's rho within each task
        and pooled, with intervals; at the end, where there are several tasks, the caution on the pooled rho.

    Raises:
        ValueError: an empty summary, or missing columns.
    """
    needed = ["form", "task", "beta_median", "rho", "rho_low", "rho_high"]
    missing = [column for column in needed if column not in summary.columns]
    if missing:
        raise ValueError(f"summary: missing columns {missing}, expected those of summarize")
    if summary.empty:
        raise ValueError("summary: came no rows, expected at least one")
    sentences = []
    for form, rows in summary.groupby("form"):
        sentences += [_order(form, rows[rows["task"] != POOLED]), _correlations(form, rows)]
    if (summary["task"] != POOLED).groupby(summary["form"]).sum().max() > 1:
        sentences.append(
            "The pooled ρ is confounded by task: it mixes differences between tasks with differences between prompts "
            "of one task, and can be large while β and H are unrelated within every task, or have the other sign. "
            "Read it beside the ρ within each task, never alone."
        )
    return sentences


def _order(form: str, rows: pd.DataFrame) -> str:
    medians = dict(zip(rows["task"], rows["beta_median"], strict=True))
    ranked = sorted(medians, key=medians.get)
    text = f"{form} form: median β is {ranked[0]} {_digits(medians[ranked[0]])}"
    for before, task in pairwise(ranked):
        sign = "<" if _digits(medians[before]) != _digits(medians[task]) else "="
        text += f" {sign} {task} {_digits(medians[task])}"
    if not set(EXPECTED_ORDER) <= set(medians):
        return text + "."
    expected = [float(_digits(medians[task])) for task in EXPECTED_ORDER]
    came_out = all(a < b for a, b in pairwise(expected))
    verdict = "came out" if came_out else "did not come out"
    return f"{text}. The order {' < '.join(EXPECTED_ORDER)} that the derivation expects (§5.1.2) {verdict}."


def _correlations(form: str, rows: pd.DataFrame) -> str:
    """Within each task, and pooled."""
    parts = []
    for row in rows.itertuples():
        where = "over all tasks pooled" if row.task == POOLED else f"within {row.task}"
        parts.append(f"{_rho(row.rho, row.rho_low, row.rho_high)} {where}")
    return f"{form} form: Spearman’s ρ of β and H (95 % bootstrap interval) is {', '.join(parts)}."


def write_report(
    path: Path | str,
    *,
    table: pd.DataFrame,
    history: pd.DataFrame,
    summary: pd.DataFrame,
    config: Mapping[str, object],
    figures: Mapping[str, Figure],
    reading: Iterable[str],
) -> Path:
    """Write one HTML file that needs nothing else: no request to anywhere, no script.

    Args:
        path: where to; folders that do not exist are made.
        table: what `beta_table` returned.
        history: what `train` returned.
        summary: what `summarize` returned.
        config: the configuration, nested as it is.
        figures: by name, of `FIGURES`; a section whose picture is not given is left out.
        reading: sentences on what came out, such as those of the function `reading`.

    Returns:
        The path.

    Raises:
        ValueError: the figure "beta_by_task" is missing, or one has a name that is not in `FIGURES`.
    """
    unknown = [name for name in figures if name not in FIGURES]
    if unknown or FIGURES[0] not in figures:
        raise ValueError(f"figures: came {list(figures)}, expected {FIGURES[0]!r} and any of {list(FIGURES[1:])}")
    body = [
        _head(table),
        _picture(figures[FIGURES[0]], "β by task, and β against the entropy of the reference, for each form"),
        _HOW_TO_READ,
        "<h2>What came out</h2>",
        "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in reading) + "</ul>",
        _summary_table(summary),
        _EXPECTATIONS,
    ]
    if "training" in figures:
        body += ["<h2>Training</h2>", _picture(figures["training"], "Loss, accuracy, margin, KL and β over the steps")]
        body += [_TRAINING, _end_table(history)]
    if "beta_gradients" in figures:
        body += ["<h2>What moves β</h2>", _picture(figures["beta_gradients"], "Each term’s pull on β over the steps")]
        body += [_GRADIENTS]
    body += ["<h2>Prompts at the ends</h2>", _ends_table(table), _configuration(config)]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_PAGE.replace("{body}", "\n".join(body)), encoding="utf-8")
    return path


def _digits(value: float) -> str:
    """Three digits, never an exponent; a dash for NaN."""
    if math.isnan(value):
        return "–"
    return format(Decimal(f"{value:.2e}"), "f")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _rho(rho: float, low: float, high: float) -> str:
    return "undefined" if math.isnan(rho) else f"{_signed(rho)} [{_signed(low)}, {_signed(high)}]"


def _picture(figure: Figure, alt: str) -> str:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=160)
    data = base64.b64encode(png.getvalue()).decode()
    return f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}">{_HINT}</figure>'


def _html_table(head: list[str], rows: list[list[str]], *, numbers_from: int) -> str:
    """A table of ready HTML cells; columns from `numbers_from` on are set as numbers."""

    def line(cells: list[str], tag: str) -> str:
        kinds = (' class="number"' if i >= numbers_from else "" for i in range(len(cells)))
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{line(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _task_cell(task: str, colors: Mapping[str, str]) -> str:
    if task == POOLED:
        return "all tasks"
    return f'<span class="task"><span class="dot" style="background:{colors[task]}"></span>{escape(task)}</span>'


def _head(table: pd.DataFrame) -> str:
    forms = " and ".join(sorted(table["form"].unique()))
    counts = table.drop_duplicates(["task", "prompt"])["task"].value_counts()
    prompts = ", ".join(f"{counts[task]} {escape(task)}" for task in task_colors(counts.index))
    seeds = ", ".join(str(seed) for seed in sorted(table["seed"].unique()))
    return _QUESTION + (
        f'<p class="facts">Held-out prompts: {prompts}. Forms: {escape(forms)}. Seeds: {escape(seeds)}.</p>'
    )


def _summary_table(summary: pd.DataFrame) -> str:
    colors = task_colors(set(summary["task"]) - {POOLED})
    rows = [
        [
            escape(row.form),
            _task_cell(row.task, colors),
            str(row.n),
            _digits(row.beta_median),
            f"{_digits(row.beta_q1)} – {_digits(row.beta_q3)}",
            _digits(row.scale_median),
            _digits(row.ref_entropy_mean),
            _rho(row.rho, row.rho_low, row.rho_high),
        ]
        for row in summary.itertuples()
    ]
    head = ["form", "task", "n", "median β", "quartiles", "median s", "mean H", "Spearman’s ρ of β and H"]
    return _html_table(head, rows, numbers_from=2) + _TABLE_NOTE


def _end_table(history: pd.DataFrame) -> str:
    """The last measurement of each run."""
    names = {"loss/dpo": "DPO loss, last batch", "held_out_accuracy": "held-out accuracy", "kl": "KL, nats"}
    names = {column: name for column, name in names.items() if column in history}
    last = history.sort_values("step").groupby(["form", "seed"])[list(names)].last()  # NaN passed over
    errors = history.dropna(subset="kl").groupby(["form", "seed"])["kl_se"].last() if "kl" in names else {}
    rows = []
    for (form, seed), row in last.iterrows():
        cells = [escape(form), str(seed)] + [_digits(row[column]) for column in names]
        if (form, seed) in errors:
            cells[-1] += f" ± {_digits(errors[form, seed])}"
        rows.append(cells)
    return _html_table(["form", "seed", *names.values()], rows, numbers_from=2)


def _ends_table(table: pd.DataFrame) -> str:
    """In each form and task, the prompt with the smallest and with the largest beta."""
    colors = task_colors(table["task"])
    rows = []
    for form in sorted(table["form"].unique()):
        for task in colors:
            group = table[(table["form"] == form) & (table["task"] == task)].sort_values("beta", kind="stable")
            if len(group):
                ends = [_prompt(group.iloc[0]), _prompt(group.iloc[-1])]
                rows.append([escape(form), _task_cell(task, colors), *ends])
    return _html_table(["form", "task", "smallest β", "largest β"], rows, numbers_from=4)


def _prompt(row: pd.Series) -> str:
    text = " ".join(row["prompt"].split())
    text = text if len(text) <= 140 else text[:139] + "…"
    return f"{_digits(row['beta'])} <q>{escape(text)}</q>"


def _configuration(config: Mapping[str, object]) -> str:
    text = json.dumps(config, indent=2, ensure_ascii=False, default=str)
    return f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>"


_HINT = '<figcaption class="hint">Wider than this screen: scroll it sideways.</figcaption>'

_QUESTION = """<h1>β(x) by task, against the entropy of the reference</h1>
<p class="lede">Direct Preference Optimization trains a policy on pairs of answers, and one number, β, says how much a
preference weighs. Here β is a function of the prompt and is trained with the policy. How large does it become for
each kind of task, and does it follow the entropy of the reference model?</p>
"""

_HOW_TO_READ = """<h2>How to read the picture</h2>
<p>Each row is one reading of β. The loss of a pair is −log σ(s·h), where h is how much more the policy prefers the
chosen to the rejected answer than the reference does, in nats. In the <b>inverse</b> form
s&nbsp;=&nbsp;1/β(x); in the <b>standard</b> form s&nbsp;=&nbsp;β(x). The same number means opposite things in the
two, so their axes differ.</p>
<ul>
<li><b>Left:</b> every point is one held-out prompt. The box spans the quartiles, the thick line is the median. Both
axes are logarithmic; where the right one is drawn, it shows the scale s that belongs to each β.</li>
<li><b>Right:</b> the same prompts against H, the entropy of the reference’s next token, averaged along answers
sampled from it. Horizontal bars are one standard error of H. The curve is αH clipped to the range: where β would be
if the entropy term and the range alone decided.</li>
<li><b>Lines:</b> β<sub>0</sub> is the fixed value that training started from; β<sub>min</sub> and β<sub>max</sub>
are the ends of the range, outside which a penalty pulls back.</li>
</ul>
"""

_TABLE_NOTE = """<p class="note">n counts prompts; quartiles are the first and the third; s is what multiplies h in the
loss; H is in nats per token; ρ is Spearman’s rank correlation with its 95 % bootstrap interval over prompts.</p>
"""

_EXPECTATIONS = """<h2>What the equations say</h2>
<p>Three statements that hold whatever the data are. They pull in different directions in the two forms.</p>
<div class="wide"><table class="text">
<thead><tr><th></th><th>inverse: s = 1/β</th><th>standard: s = β</th></tr></thead>
<tbody>
<tr><th>At the optimum of a policy that is free to fit preference probability p, s·h*&nbsp;=&nbsp;logit&nbsp;p</th>
<td>h* = β·logit p: a larger β lets the policy go <b>farther</b> from the reference</td>
<td>h* = logit(p)/β: a larger β keeps the policy <b>nearer</b> to the reference</td></tr>
<tr><th>∂ℓ/∂s&nbsp;=&nbsp;−σ(−s·h)·h: gradient descent on the loss raises s where a pair is ranked rightly
(h&nbsp;&gt;&nbsp;0), and lowers it where it is ranked wrongly</th>
<td>pairs ranked rightly <b>lower</b> β, pairs ranked wrongly raise it</td>
<td>pairs ranked rightly <b>raise</b> β, pairs ranked wrongly lower it</td></tr>
<tr><th>The entropy term pulls β towards αH</th>
<td>s goes to 1/(αH): uncertain prompts weigh <b>less</b></td>
<td>s goes to αH: uncertain prompts weigh <b>more</b></td></tr>
</tbody></table></div>
<p>Learning s alone is calibrating a temperature: s grows where labels are reliable. So where unreliable labels and high
entropy go together, the loss and the entropy term pull β the same way in the inverse form, and against each other in
the standard form.</p>
"""

_TRAINING = """<p>Left of the dotted line β is fixed at β<sub>0</sub>; right of it β(x) learns together with the policy.
Reward accuracy is the share of pairs with h &gt; 0. The KL of the policy to the reference is estimated on answers
sampled from the policy; the band is one standard error.</p>
"""

_GRADIENTS = """<p>The total loss is a sum of four terms, and so is its gradient on β. Each line is one term’s part,
averaged over the prompts of a task in the batch; the dashed line is their sum. Gradient descent moves β against it:
above zero a term <b>lowers</b> β, below zero it <b>raises</b> β. The axis is linear, so that the parts can be
added up by eye. The smoothness term depends on how β varies from prompt to prompt, not on its value at one; its part
is the derivative when β is scaled and its relative variation is held.</p>
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>β(x) by task</title>
<style>
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 60rem; color: #1c1f24; background: #fff;
  font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.25rem); line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em;
  text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.75rem 0 .75rem; }
p, ul { margin: .75rem 0; max-width: 44rem; }
ul { padding-left: 1.2rem; }
li { margin: .4rem 0; }
.lede { font-size: 1.15em; color: #3c434d; }
.facts, .note { color: #5a626d; font-size: .9em; }
figure { margin: 1.5rem 0; overflow-x: auto; }
img { display: block; width: 100%; min-width: 38rem; height: auto; }
.wide { overflow-x: auto; margin: 1.25rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9em; line-height: 1.45;
  font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid #e3e6ea; }
th:first-child, td:first-child { padding-left: 0; }
thead th { border-bottom: 2px solid #1c1f24; font-weight: 600; }
tbody th { font-weight: 400; color: #3c434d; }
.number { text-align: right; white-space: nowrap; }
.wide table { min-width: 36rem; }
.task { white-space: nowrap; }
.hint { display: none; color: #5a626d; font-size: .85em; position: sticky; left: 0; }
@media (max-width: 40rem) { .hint { display: block; } }
sub { line-height: 0; }
.text th, .text td { width: 33%; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
q { color: #3c434d; overflow-wrap: anywhere; }
details { margin-top: 2.75rem; border-top: 1px solid #e3e6ea; padding-top: 1rem; }
summary { cursor: pointer; font-weight: 600; font-size: 1.1rem; }
pre { overflow-x: auto; background: #f5f6f8; padding: 1rem; border-radius: 6px; font-size: .8rem; line-height: 1.5; }
</style>
</head>
<body>
{body}
</body>
</html>
"""
