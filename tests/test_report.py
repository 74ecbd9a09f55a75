"""The report, read back as a browser reads it, and the sentences against the numbers they are made of."""

from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dpoviz.analysis.plots import figure_beta_by_task, figure_beta_gradients, figure_training, plot_entropy_estimators
from dpoviz.analysis.report import (
    FAST_NOTE,
    FEW_STEPS,
    FIGURES,
    MIN_PROMPTS,
    reading,
    reading_of_accuracy,
    reading_of_log_ratios,
    tiny_note,
    write_report,
)
from dpoviz.analysis.tables import (
    beta_table,
    read_table,
    summarize,
    summarize_accuracy,
    summarize_estimators,
    write_table,
)
from dpoviz.analysis.text import number

KEPT = (
    "The medians keep the order printed here in 85 % of resamples of the prompts; this does not cover another seed, or "
    "another rounding of the training."
)
NASTY = '</pre><script>alert("1 < 2 & 3")</script>'


def summary(medians: dict[str, float], form: str = "inverse", rho=(0.5, 0.1, 0.75), share=0.846) -> pd.DataFrame:
    """As `summarize` makes it: a row a task, and the pooled one with the opposite rho."""
    rows = [(form, task, 40, median, *rho, share) for task, median in medians.items()]
    rows.append((form, "all", 40 * len(medians), 1.0, -rho[0], -rho[2], -rho[1], share))
    return pd.DataFrame(rows, columns=["form", "task", "n", "beta_median", "rho", "rho_low", "rho_high", "order_share"])


class TestReading:
    @pytest.mark.parametrize(
        ("medians", "order", "verdict"),
        [
            ((1.2, 1.5, 2.0), "math 1.20 < code 1.50 < dialogue 2.00", "came out"),
            ((2.0, 1.5, 12.34), "code 1.50 < math 2.00 < dialogue 12.3", "did not come out"),
            ((0.3, 0.2, 0.1), "dialogue 0.100 < code 0.200 < math 0.300", "did not come out"),
            # the same to the three digits that are printed
            ((1.0001, 1.0002, 2.0), "math 1.00 = code 1.00 < dialogue 2.00", "did not come out"),
            ((0.00012, 150.4, 15000.0), "math 0.000120 < code 150 < dialogue 15000", "came out"),
        ],
    )
    def test_order_of_the_medians(self, medians, order, verdict):
        names = ("math", "code", "dialogue")
        assert reading(summary(dict(zip(names, medians, strict=True))))[0] == (
            f"inverse form: median β is {order}. The order math < code < dialogue that the derivation expects "
            f"(§5.1.2) {verdict}. {KEPT}"
        )

    def test_no_verdict_without_the_three_tasks(self):
        assert reading(summary({"math": 1.0, "poetry": 0.5}))[0] == (
            f"inverse form: median β is poetry 0.500 < math 1.00. {KEPT}"
        )

    def test_a_share_that_is_not_known_is_not_said(self):
        for medians, order in (({"math": 1.0}, "math 1.00"), ({"math": 1.0, "code": 2.0}, "math 1.00 < code 2.00")):
            assert reading(summary(medians, share=float("nan")))[0] == f"inverse form: median β is {order}."

    def test_few_prompts_say_nothing_of_the_order(self):
        medians = {"math": 1.0, "code": 2.0, "dialogue": 3.0}
        few = summary(medians)
        few.loc[few["task"] == "code", "n"] = MIN_PROMPTS - 1
        sentence = reading(few)[0]
        assert sentence == (
            "inverse form: too few prompts to say anything about the order of the tasks: 40 math, 9 code, 40 dialogue; "
            "expected at least 10 per task."
        )
        few.loc[few["task"] == "code", "n"] = MIN_PROMPTS  # the control
        assert reading(few)[0].startswith("inverse form: median β is math 1.00 < code 2.00")

    def test_one_task_has_no_order_to_be_few_for(self):
        assert reading(summary({"math": 1.0}, share=float("nan")).assign(n=3))[0].endswith("median β is math 1.00.")

    def test_rho_within_each_task_and_pooled(self):
        assert reading(summary({"math": 1.0, "code": 2.0}))[1] == (
            "inverse form: Spearman’s ρ of β and H (95 % bootstrap interval) is +0.50 [+0.10, +0.75] within math, "
            "+0.50 [+0.10, +0.75] within code, −0.50 [−0.75, −0.10] over all tasks pooled."
        )

    def test_undefined_rho_is_said(self):
        sentence = reading(summary({"math": 1.0}, rho=(float("nan"),) * 3))[1]
        assert "is undefined within math, undefined over all tasks pooled." in sentence

    def test_both_forms_and_one_caution(self):
        medians = {"math": 1.0, "code": 2.0, "dialogue": 3.0}
        sentences = reading(pd.concat([summary(medians, "standard"), summary(medians, "inverse")]))
        assert [sentence.split(" ")[0] for sentence in sentences] == ["inverse"] * 2 + ["standard"] * 2 + ["The"]
        assert "confounded by task" in sentences[-1]

    def test_one_task_needs_no_caution(self):
        assert not any("confounded" in sentence for sentence in reading(summary({"math": 1.0})))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.drop(columns=["rho", "task"]), r"summary: missing columns \['task', 'rho'\]"),
            (lambda s: s.iloc[:0], "summary: got no rows"),
        ],
    )
    def test_refuses(self, change, message):
        with pytest.raises(ValueError, match=message):
            reading(change(summary({"math": 1.0})))


class TestReadingOfAccuracy:
    @staticmethod
    def sentence(difference: float, low: float, high: float) -> str:
        row = {"task": "all", "n": 50, "groups": 50, "accuracy_low": 0.5, "accuracy_high": 0.7}
        none = dict.fromkeys(("difference", "difference_low", "difference_high"), float("nan"))
        compared = {"difference": difference, "difference_low": low, "difference_high": high}
        rows = [
            row | {"variant": "inverse", "accuracy": 0.625} | compared,
            row | {"variant": "fixed", "accuracy": 0.6} | none,
        ]
        (found,) = reading_of_accuracy(pd.DataFrame(rows))
        return found

    def test_in_words(self):
        assert self.sentence(0.025, -0.01, 0.0504) == (
            "inverse: reward accuracy on 50 held-out pairs is 0.625, not significantly different from the fixed β’s "
            "0.600 after as many steps (difference +0.025, 95 % bootstrap interval −0.010 to +0.050)."
        )
        assert "0.625, better than the" in self.sentence(0.025, 0.01, 0.05)
        assert "0.625, worse than the" in self.sentence(-0.025, -0.05, -0.01)


class TestReadingOfLogRatios:
    @staticmethod
    def history(**ends: tuple[float, float]) -> pd.DataFrame:
        """Measured twice: at step 0, where nothing has moved, and at step 8; the last row measured nothing."""
        rows = [{"form": "inverse", "step": step} for step in (0, 8, 9)]
        for task, pair in ends.items():
            for answer, value in zip(("chosen", "rejected"), pair, strict=True):
                for row, measured in zip(rows, (0.0, value, float("nan")), strict=True):
                    row[f"held_out_logratio/{answer}/{task}"] = measured
        return pd.DataFrame(rows)

    @pytest.mark.parametrize(
        ("pair", "start", "end"),
        [
            ((0.5, -0.25), "Chosen rises and rejected falls", "a in the inverse form (+0.50 and −0.25)."),
            ((-0.5, -1.5), "Both fall: usual where", "a in the inverse form (−0.50 and −1.50)."),
            ((0.5, 0.25), "Both rise: usual where", "a in the inverse form (+0.50 and +0.25)."),
            ((-0.5, 0.25), "Chosen falls and rejected rises", "(−0.50 and +0.25, in the wrong order)."),
            ((-1.5, -0.5), "Both fall: usual where", "(−1.50 and −0.50, in the wrong order)."),
            ((0.04, -0.04), "Neither answer has moved by 0.05 nats", "(+0.04 and −0.04)."),
        ],
    )
    def test_each_direction(self, pair, start, end):
        (sentence,) = reading_of_log_ratios(self.history(a=pair), ["a"])
        assert sentence.startswith(start) and sentence.endswith(end)

    def test_tasks_and_forms_of_one_direction_share_a_sentence(self):
        history = self.history(a=(1.0, -1.0), b=(2.0, -2.0), c=(-1.0, -2.0))
        found = reading_of_log_ratios(pd.concat([history, history.assign(form="standard")]), ["a", "b", "c", "none"])
        assert len(found) == 2 and found[0].count(" in the ") == 4 and found[1].count(" in the ") == 2

    def test_nothing_measured_nothing_said(self):
        assert reading_of_log_ratios(self.history(), ["a"]) == []


class TestTinyNote:
    @staticmethod
    def history(steps: int) -> pd.DataFrame:
        return pd.DataFrame({"stage": [1, 2, 2], "step": [0, 7, 6 + steps]})

    def test_few_prompts_or_few_steps(self):
        enough = pd.DataFrame({"form": "inverse", "task": "a", "prompt": [str(i) for i in range(MIN_PROMPTS)]})
        few = pd.concat([enough, enough.assign(task="b").iloc[1:]])
        assert tiny_note(enough, self.history(FEW_STEPS)) == [] == tiny_note(None, self.history(FEW_STEPS))
        (note,) = tiny_note(few, self.history(FEW_STEPS))
        assert (
            note
            == "This is a tiny run: 9 b held-out prompts, fewer than 10 per task. Its numbers say little about β(x)."
        )
        (note,) = tiny_note(few, self.history(FEW_STEPS - 1))
        assert "9 b held-out" in note and "about 49 steps of β(x), fewer than 50" in note


@pytest.mark.parametrize(
    ("value", "text", "trimmed"),
    [
        (1.2, "1.20", "1.2"),
        (0.51996, "0.520", "0.52"),
        (150.4, "150", "150"),
        (15004.0, "15000", "15000"),
        (0.00012, "0.000120", "0.00012"),
        (-0.0868, "−0.0868", "−0.0868"),
        (999.6, "1000", "1000"),
        (0.0, "0.00", "0"),
        (float("nan"), "–", "–"),
    ],
)
def test_one_way_to_print_a_number(value, text, trimmed):
    assert (number(value), number(value, trim=True)) == (text, trimmed)


class Page(HTMLParser):
    """What a browser would find: tags with attributes, text, tables as rows of cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.open, self.text, self.tables = [], [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def of(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def figure(width: float = 1.0) -> Figure:
    made = Figure(figsize=(width, 1))
    made.add_subplot().plot([1, 2])
    return made


def arguments() -> dict:
    beta = [1.0, 2.0, 3.0, 7.0, 0.00125, 6.0]
    table = pd.concat(
        beta_table(
            form=form,
            seed=0,
            task=["math"] * 3 + ["po<b>&try"] * 3,
            prompt=["a", "b", "c", NASTY, f"tiny {'long ' * 60}", "e"],
            beta=beta,
            ref_entropy=[0.1, 0.2, 0.3, 0.6, 0.5, 0.4],
            ref_entropy_se=[0.1] * 6,
        )
        for form in ("standard", "inverse")
    )
    row = {"form": "inverse", "seed": 0, "stage": 1, "held_out_accuracy": 0.5, "kl": 0.0, "kl_se": 0.0}
    history = pd.DataFrame(
        [
            row | {"step": 0, "loss/dpo": 0.7},
            row | {"step": 9, "loss/dpo": 0.6, "kl": 1.25, "kl_se": 0.125, "held_out_accuracy": 0.75},
            row | {"step": 10, "loss/dpo": 0.51234, "kl": None, "kl_se": None, "held_out_accuracy": None},
        ]
    )
    return {
        "table": table,
        "history": history,
        "summary": summarize(table, n_boot=100),
        "config": {"beta0": 0.1, "name": NASTY, "nested": {"out": Path("a")}},
        "figures": {name: figure(1 + i) for i, name in enumerate(FIGURES)},
        "reading": ["median β is 1 < 2 & so on", NASTY],
    }


def written(folder: Path, **changes) -> Page:
    path = write_report(folder / "new" / "report.html", **arguments() | changes)
    assert path == folder / "new" / "report.html"
    return Page(path.read_text(encoding="utf-8"))


class TestWriteReport:
    @pytest.mark.slow
    def test_needs_nothing_from_outside_and_runs_nothing(self, tmp_path):
        page = written(tmp_path)
        assert not page.open
        assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
        assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name == "href"]
        assert all(attrs["src"].startswith("data:image/png;base64,") for attrs in page.of("img"))
        policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.split(";")[0] == "default-src 'none'"
        source = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
        assert not any(word in source for word in ("http:", "https:", "url(", "@import"))

    def test_fits_a_phone(self, tmp_path):
        page = written(tmp_path)
        (viewport,) = [a["content"] for a in page.of("meta") if a.get("name") == "viewport"]
        assert viewport == "width=device-width, initial-scale=1"
        wide = [attrs for attrs in page.of("div") if attrs.get("class") == "wide"]
        assert len(wide) == len(page.tables) == 4

    def test_pictures_are_the_figures_in_order(self, tmp_path):
        images = written(tmp_path).of("img")
        data = [base64.b64decode(attrs["src"].split(",")[1]) for attrs in images]
        assert all(png.startswith(b"\x89PNG\r\n\x1a\n") for png in data)
        # 160 dots an inch; each figure is an inch wider than the one before
        assert [struct.unpack(">I", png[16:20])[0] for png in data] == [160 * n for n in range(1, len(FIGURES) + 1)]
        assert all(attrs["alt"] for attrs in images)

    def test_what_came_in_is_shown_as_it_is(self, tmp_path):
        page = written(tmp_path)
        assert "median β is 1 < 2 & so on" in page.text
        # in the reading, in the table of prompts (once a form), and in the configuration, as JSON
        assert page.text.count(NASTY) == 3
        assert page.text.count(json.dumps(NASTY)) == 1
        assert "Held-out prompts: 3 math, 3 po<b>&try. Forms: inverse and standard. Seeds: 0." in page.text

    def test_summary_is_a_table_in_three_digits(self, tmp_path):
        head, *rows = written(tmp_path).tables[0]
        assert head == ["form", "task", "n", "median β", "quartiles", "median s", "mean H", "Spearman’s ρ of β and H"]
        assert [row[:2] for row in rows] == [
            [form, task] for form in ("inverse", "standard") for task in ("math", "po<b>&try", "all tasks")
        ]
        assert rows[0][2:7] == ["3", "2.00", "1.50 – 2.50", "0.500", "0.200"]
        assert rows[0][7].startswith("+1.00 [")
        assert rows[4][2:4] == ["3", "6.00"]

    def test_last_measurements_pass_over_what_was_not_measured(self, tmp_path):
        head, *rows = written(tmp_path).tables[2]
        assert head == ["form", "seed", "DPO loss, last batch", "held-out accuracy", "KL, nats"]
        assert rows == [["inverse", "0", "0.512", "0.750", "1.25 ± 0.125"]]

    def test_history_without_kl_or_held_out_pairs(self, tmp_path):
        bare = arguments()["history"].drop(columns=["kl", "kl_se", "held_out_accuracy"])
        assert written(tmp_path, history=bare).tables[2] == [
            ["form", "seed", "DPO loss, last batch"],
            ["inverse", "0", "0.512"],
        ]

    def test_prompts_at_the_ends(self, tmp_path):
        head, *rows = written(tmp_path).tables[3]
        assert head == ["form", "task", "smallest β", "largest β"]
        assert rows[0] == ["inverse", "math", "1.00 a", "3.00 c"]
        assert rows[1][2].startswith("0.00125 tiny long") and rows[1][2].endswith("…")
        assert len(rows[1][2]) == len("0.00125 ") + 140
        assert [row[0] for row in rows] == ["inverse"] * 2 + ["standard"] * 2

    def test_several_prompts_at_each_end_the_extreme_ones_first(self, tmp_path):
        table = arguments()["table"]
        table = pd.concat([table, *(table.assign(prompt=table["prompt"] + f" {n}", beta=table["beta"] + n / 8)
                                    for n in range(1, 4))])  # fmt: skip
        rows = written(tmp_path, table=table).tables[3]
        assert rows[1][2:] == ["1.00 a1.12 a 11.25 a 2", "3.38 c 33.25 c 23.12 c 1"]
        (only,) = [row for row in written(tmp_path, table=table.iloc[:1]).tables[3] if row[0] == "standard"]
        assert only[2:] == ["1.00 a", "1.00 a"]

    @pytest.mark.slow
    def test_points_are_named_where_they_are_drawn(self, tmp_path):
        """Each dot of both panels, at the place of its colour in the picture, with its prompt."""
        table = arguments()["table"]
        drawn = figure_beta_by_task(table)
        page = written(tmp_path, table=table, figures={"beta_by_task": drawn})
        (box,) = page.of("svg")
        width, height = (float(number) for number in box["viewbox"].split()[2:])
        assert (width, height) == tuple(drawn.bbox.size)
        circles = page.of("circle")
        assert len(circles) == 2 * len(table) == page.text.count("± 0.100")
        assert (
            page.text.count(NASTY.replace("\n", " ")) >= 4 and "math: β 1.00, s 1.00, H 0.100 ± 0.100\na" in page.text
        )
        (source,) = [attrs["src"] for attrs in page.of("img")]
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB"), dtype=int)
        scale = picture.shape[1] / width
        for circle in circles:
            x, y = (round(float(circle[name]) * scale) for name in ("cx", "cy"))
            around = picture[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3)
            if x > picture.shape[1] / 2:  # on the left the box of the quartiles may lie over a point
                assert np.ptp(around.mean(axis=0)) > 30, circle  # a colour, not the paper or a grey line
            assert around.mean() < 240, circle

    @pytest.mark.slow
    def test_configuration_can_be_read_back(self, tmp_path):
        page = written(tmp_path)
        text = page.text[page.text.index("Configuration") + len("Configuration") :]
        assert json.loads(text) == {"beta0": 0.1, "name": NASTY, "nested": {"out": "a"}}
        assert ("details", {}) in page.tags  # folded

    def test_a_section_without_its_picture_is_left_out(self, tmp_path):
        page = written(tmp_path, figures={"beta_by_task": figure()})
        assert len(page.of("img")) == 1
        assert "What moves β" not in page.text and "Training" not in page.text
        assert "How to read the picture" in page.text

    @pytest.mark.parametrize("names", [(), ("training",), ("beta_by_task", "loss")])
    def test_refuses_other_figures(self, tmp_path, names):
        with pytest.raises(ValueError, match=r"figures: got \[.*\], expected 'beta_by_task' and any of"):
            written(tmp_path, figures={name: figure() for name in names})
        assert not list(tmp_path.iterdir())

    def test_notes_stand_before_everything_else(self, tmp_path):
        text = written(tmp_path, notes=["First <of> all.", "Then this."]).text
        assert text.index("First <of> all.") < text.index("Then this.") < text.index("Direct Preference Optimization")
        assert "--fast" not in text

    def test_sentences_on_the_log_ratios_stand_under_their_picture(self, tmp_path):
        text = written(tmp_path, log_ratios=["Both <fall>."]).text
        assert "Both <fall>." in text[text.index("Chosen and rejected answers") : text.index("What moves β")]

    @pytest.mark.parametrize("fast", [True, False])
    def test_a_fast_run_says_so_at_the_top(self, tmp_path, fast):
        text = written(tmp_path, config={"fast": fast}).text
        assert (FAST_NOTE in text[: text.index("Direct Preference Optimization")]) == fast

    def test_accuracy_estimators_and_answers(self, tmp_path):
        nan = float("nan")
        accuracy = {
            "variant": ["inverse", "fixed"],
            "task": ["math", "all"],
            "n": [9, 9],
            "groups": [4, 4],
            "accuracy": [0.6666, 0.5],
            "accuracy_low": [0.5, 0.4],
            "accuracy_high": [0.75, 0.6],
            "difference": [-0.1666, nan],
            "difference_low": [-0.3, nan],
            "difference_high": [0.1, nan],
        }
        entropy = {"estimator": ["per_token"], "task": ["math"], "n": [3], "mean": [1.25], "se": [0.5]}
        answers = {
            "task": ["math"] * 2,
            "prompt": ["1+1="] * 2,
            "variant": ["reference", "inverse"],
            "answer": ["", NASTY],
            "beta": [nan, 2.0],
        }
        given = {"accuracy": accuracy, "entropy": entropy, "answers": answers}
        page = written(tmp_path, **{name: pd.DataFrame(columns) for name, columns in given.items()})
        tables = {tuple(table[0]): table[1:] for table in page.tables}
        assert tables["run", "task", "pairs (groups)", "reward accuracy", "difference from the fixed β"] == [
            ["inverse", "math", "9 (4)", "0.667 [0.500, 0.750]", "−0.167 [−0.300, +0.100]"],
            ["fixed", "all tasks", "9 (4)", "0.500 [0.400, 0.600]", "–"],
        ]
        assert tables["estimator", "task", "n", "mean ± standard error"] == [["per_token", "math", "3", "1.25 ± 0.500"]]
        assert tables["task", "prompt", "run", "answer"] == [
            ["math", "1+1=", "reference", ""],
            ["", "", "inverse, β = 2.00", NASTY],
        ]

    def test_runs_of_one_form_have_a_row_each(self, tmp_path):
        history = arguments()["history"]
        both = pd.concat([history.assign(variant="inverse"), history.assign(variant="fixed", kl=-0.5, kl_se=0.125)])
        head, *rows = written(tmp_path, history=both).tables[2]
        assert head[:3] == ["run", "form", "seed"]
        assert [(row[0], row[-1]) for row in rows] == [("fixed", "−0.500 ± 0.125"), ("inverse", "1.25 ± 0.125")]

    def test_the_page_without_a_table_of_beta(self, tmp_path):
        page = written(tmp_path, table=None, summary=None, figures={"training": figure()})
        assert "How to read the picture" not in page.text and "What came out" in page.text


ODD = (
    "1", "007", "NA", "None", "nan", "null", "", "True", "=1+1", "@x", "\t", "a\rb", "$x$", "$\\no$", "_x", "%s",
    "讲个笑话", "<b>&", "{{ x }}", "a/b", "all tasks", "x" * 300,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("odd", [ODD[i : i + 4] for i in range(0, len(ODD), 4)], ids=repr)
def test_odd_names_and_texts_reach_the_page(tmp_path, odd):
    """From the numbers to the files, back, and onto the page, with all figures drawn."""
    task = [name for name in odd for _ in range(5)]
    prompt = [text for name in odd for text in (name, name + "?", "p", "q", "r")]
    numbers = [0.5 + i for i in range(len(task))]
    beta = beta_table(
        form="inverse", seed=0, task=task, prompt=prompt, beta=numbers, ref_entropy=numbers, ref_entropy_se=numbers
    )
    entropy = pd.DataFrame({"estimator": "per_token", "task": task, "prompt": prompt, "entropy": numbers})
    group = [name if i % 2 else None for i, name in enumerate(task)]
    pairs = pd.DataFrame({"task": task, "group": group, "prompt": prompt, "h": numbers})
    row = {"form": "inverse", "seed": 0, "loss": 0.5, "loss/dpo": 0.5}
    row |= {f"{column}/{name}": 0.5 for name in odd for column in ("beta", "grad/dpo")}
    tables = {
        "beta": beta,
        "history": pd.DataFrame([row | {"stage": stage, "step": step} for stage, step in ((1, 0), (2, 1), (2, 2))]),
        "entropy": entropy.assign(example=False),
        "held_out": pd.concat([pairs.assign(variant="fixed"), pairs.assign(variant="inverse", h=1.0)]),
        "answers": pd.DataFrame({"variant": "reference", "task": odd, "prompt": odd, "answer": odd, "beta": 1.0}),
    }
    for name, table in tables.items():
        write_table(table, tmp_path / f"{name}.csv")
    tables = {name: read_table(tmp_path / f"{name}.csv") for name in tables}
    summary = summarize(tables["beta"], n_boot=100)
    accuracy = summarize_accuracy(tables["held_out"], baseline="fixed", n_boot=100)
    write_report(
        tmp_path / "report.html",
        table=tables["beta"],
        history=tables["history"],
        summary=summary,
        config={},
        figures={
            "beta_by_task": figure_beta_by_task(tables["beta"]),
            "entropy_estimators": plot_entropy_estimators(tables["entropy"]).figure,
            "training": figure_training(tables["history"]),
            "beta_gradients": figure_beta_gradients(tables["history"]),
        },
        reading=reading(summary) + reading_of_accuracy(accuracy),
        accuracy=accuracy,
        entropy=summarize_estimators(tables["entropy"], n_boot=100),
        answers=tables["answers"],
    )
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    # a file opened as text, like a browser, has newlines for carriage returns
    assert {row[1] for row in page.tables[0][1:]} == {*(name.replace("\r", "\n") for name in odd), "all tasks"}
    answers = [row[3] for row in page.tables[-1][1:]]
    assert answers == [" ".join(name.split()) for name in odd]


@pytest.mark.slow
def test_no_torch_and_no_pyplot():
    code = (
        "import sys, dpoviz.analysis.report, dpoviz.analysis.plots_comparison\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
