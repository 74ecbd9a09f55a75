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

from dpoviz.analysis.plots import task_colors
from dpoviz.analysis.tables import EXPECTED_ORDER, POOLED

FIGURES = ("beta_by_task", "entropy_estimators", "training", "beta_gradients")
"""The pictures that have a place in the report; the first one is required where there is a table of beta."""


def reading(summary: pd.DataFrame) -> list[str]:
    """What the numbers say, in sentences: the order of the medians and the rank correlations, form by form.

    Whether the order that the derivation expects came out is judged on the medians as they are printed, to
    three digits.

    Args:
        summary: what `table.summarize` returned.

    Returns:
        For each form a sentence or two on the medians of beta and how surely they keep their order, then one on
        Spearman's rho within each task and pooled, with intervals; at the end, where there are several tasks, the
        caution on the pooled rho.

    Raises:
        ValueError: an empty summary, or missing columns.
    """
    needed = ["form", "task", "beta_median", "rho", "rho_low", "rho_high", "order_share"]
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
    if set(EXPECTED_ORDER) <= set(medians):
        expected = [float(_digits(medians[task])) for task in EXPECTED_ORDER]
        came_out = all(a < b for a, b in pairwise(expected))
        verdict = "came out" if came_out else "did not come out"
        text += f". The order {' < '.join(EXPECTED_ORDER)} that the derivation expects (§5.1.2) {verdict}"
    share = rows["order_share"].iloc[0]
    if not math.isnan(share):
        text += (
            f". Over resampled prompts the medians keep their order in {100 * share:.0f} % of cases; what another "
            "seed, or another rounding of the training, would do is not in that"
        )
    return text + "."


def _correlations(form: str, rows: pd.DataFrame) -> str:
    """Within each task, and pooled."""
    parts = []
    for row in rows.itertuples():
        where = "over all tasks pooled" if row.task == POOLED else f"within {row.task}"
        parts.append(f"{_rho(row.rho, row.rho_low, row.rho_high)} {where}")
    return f"{form} form: Spearman’s ρ of β and H (95 % bootstrap interval) is {', '.join(parts)}."


def reading_of_accuracy(accuracy: pd.DataFrame) -> list[str]:
    """What the held-out accuracies say, a sentence an arm: its difference from the baseline over all tasks.

    Args:
        accuracy: what `table.summarize_accuracy` returned.
    """
    pooled = accuracy[accuracy["task"] == POOLED]
    base = pooled[pooled["difference"].isna()].iloc[0]
    sentences = []
    for row in pooled[pooled["difference"].notna()].itertuples():
        if row.difference_low > 0:
            verdict = "better than"
        elif row.difference_high < 0:
            verdict = "worse than"
        else:
            verdict = "not told apart from"
        sentences.append(
            f"{row.arm}: reward accuracy on {row.n} held-out pairs is {row.accuracy:.3f}, {verdict} the {base.arm} β’s "
            f"{base.accuracy:.3f} at as many steps (difference {_signed3(row.difference)}, 95 % bootstrap interval "
            f"{_signed3(row.difference_low)} to {_signed3(row.difference_high)})."
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
) -> Path:
    """Write one HTML file that needs nothing else: no request to anywhere, no script.

    Args:
        path: where to; folders that do not exist are made.
        table: what `beta_table` returned; None where beta is no function of the prompt.
        history: what `train` returned.
        summary: what `summarize` returned, or None with `table`.
        config: the configuration, nested as it is.
        figures: by name, of `FIGURES`; a section whose picture is not given is left out.
        reading: sentences on what came out, such as those of the function `reading`.
        accuracy: what `summarize_accuracy` returned, or None.
        entropy: what `summarize_estimators` returned, or None.
        answers: a row per arm and prompt, with arm, task, prompt, answer and beta (NaN where there is none), or
            None.

    Returns:
        The path.

    Raises:
        ValueError: a table without the figure "beta_by_task" or a figure without a table, or a figure whose name
            is not in `FIGURES`.
    """
    unknown = [name for name in figures if name not in FIGURES]
    if unknown or (FIGURES[0] in figures) != (table is not None):
        wanted = f"{FIGURES[0]!r} and any" if table is not None else "any"
        raise ValueError(f"figures: got {list(figures)}, expected {wanted} of {list(FIGURES[1:])}")
    sentences = "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in reading) + "</ul>"
    if table is None:
        body = [_QUESTION, "<h2>What came out</h2>", sentences]
    else:
        body = [
            _head(table),
            _picture(figures[FIGURES[0]], "β by task, and β against the entropy of the reference, for each form"),
            _HOW_TO_READ,
            "<h2>What came out</h2>",
            sentences,
            _summary_table(summary),
            _EXPECTATIONS,
        ]
    if accuracy is not None:
        body += ["<h2>Held-out pairs</h2>", _ACCURACY, _accuracy_table(accuracy)]
    if "entropy_estimators" in figures:
        body += ["<h2>The entropy of the reference, by estimator</h2>"]
        body += [_picture(figures["entropy_estimators"], "Entropy at each prompt by estimator and task"), _ESTIMATORS]
        body += [_estimator_table(entropy)] if entropy is not None else []
    if "training" in figures:
        body += ["<h2>Training</h2>", _picture(figures["training"], "Loss, accuracy, margin, KL and β over the steps")]
        body += [_TRAINING, _end_table(history)]
    if "beta_gradients" in figures:
        body += ["<h2>What moves β</h2>", _picture(figures["beta_gradients"], "Each term’s pull on β over the steps")]
        body += [_GRADIENTS]
    if table is not None:
        body += ["<h2>Prompts at the ends</h2>", _ends_table(table)]
    if answers is not None:
        body += ["<h2>Answers before and after</h2>", _ANSWERS, _answers_table(answers)]
    body += [_configuration(config)]
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


def _accuracy_table(accuracy: pd.DataFrame) -> str:
    colors = task_colors(set(accuracy["task"]) - {POOLED})
    rows = [
        [
            escape(row.arm),
            _task_cell(row.task, colors),
            f"{row.n} ({row.groups})",
            f"{row.accuracy:.3f} [{row.accuracy_low:.3f}, {row.accuracy_high:.3f}]",
            "–"
            if math.isnan(row.difference)
            else f"{_signed3(row.difference)} [{_signed3(row.difference_low)}, {_signed3(row.difference_high)}]",
        ]
        for row in accuracy.itertuples()
    ]
    head = ["run", "task", "pairs (groups)", "reward accuracy", "difference from the fixed β"]
    return _html_table(head, rows, numbers_from=2)


def _signed3(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _estimator_table(entropy: pd.DataFrame) -> str:
    colors = task_colors(set(entropy["task"]))
    rows = [
        [escape(row.estimator), _task_cell(row.task, colors), str(row.n), f"{_digits(row.mean)} ± {_digits(row.se)}"]
        for row in entropy.itertuples()
    ]
    return _html_table(["estimator", "task", "n", "mean ± standard error"], rows, numbers_from=2)


def _answers_table(answers: pd.DataFrame) -> str:
    """For each prompt the arms' answers under each other."""
    colors = task_colors(answers["task"])
    rows = []
    for (task, prompt), group in answers.groupby(["task", "prompt"], sort=False):
        first = [_task_cell(task, colors), f"<q>{escape(_short(prompt, 240))}</q>"]
        for row in group.itertuples():
            beta = "" if math.isnan(row.beta) else f", β = {_digits(row.beta)}"
            rows.append([*first, escape(row.arm) + beta, f"<q>{escape(_short(row.answer, 400))}</q>"])
            first = ["", ""]
    return _html_table(["task", "prompt", "run", "answer"], rows, numbers_from=5)


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


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
    return f"{_digits(row['beta'])} <q>{escape(_short(row['prompt'], 140))}</q>"


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

_ACCURACY = """<p>Reward accuracy: the share of held-out pairs that the policy ranks rightly against the reference,
h&nbsp;&gt;&nbsp;0. Each run trained for as many steps on the same pairs; <b>fixed</b> kept β<sub>0</sub> all along.
Intervals are 95&nbsp;% bootstraps over groups of pairs (pairs that share a prompt or a problem); those of the
difference are paired.</p>
"""

_ESTIMATORS = """<p><b>first_token</b> is the exact entropy of the first token; <b>per_token</b> averages the exact
next-token entropies along answers sampled from the reference, and is the H that β(x) is compared with above;
<b>sequence</b> sums them along each answer; <b>monte_carlo</b> is −log π<sub>ref</sub> of the sampled answers;
<b>teacher_forced</b> averages along the data’s chosen answer, and may not feed β(x), because it sees the answer.
Dots are prompts; bars are means with one standard error over prompts.</p>
"""

_ANSWERS = """<p>One sampled answer a prompt and run, cut at the length limit; <b>reference</b> is the model before
training.</p>
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
