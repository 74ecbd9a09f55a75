"""The doctor: each symptom planted in tables is found, a healthy run is not accused, and a trained run is diagnosed."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.symptoms import PLANTS, SMALL_WORLD, trained_run

from dpoviz.analysis.diagnose import SYMPTOMS, diagnose, reference_ranks
from dpoviz.analysis.tables import beta_table, write_table
from dpoviz.analysis.text import findings_as_text, number
from dpoviz.cli import main
from dpoviz.experiments.small import small_world
from dpoviz.learn.run import load_run
from dpoviz.losses import dpo_loss
from dpoviz.translation import chinese_font, in_language

TASKS = ("math", "code", "dialogue")
FORMS = ("inverse", "standard")
BETA0 = {"inverse": 10.0, "standard": 0.1}
LOW, HIGH = 0.25, 4.0  # ends of the range, over beta0
STEPS, PROMPTS, PAIRS = 24, 20, 2


def healthy(seed=0, *, prompts=PROMPTS):
    """The tables of a run in which nothing is wrong, made by hand: the arguments of `diagnose`."""
    rng = np.random.default_rng(seed)
    task = np.repeat(TASKS, prompts)
    prompt = [f"{t} {i}" for i, t in enumerate(task)]
    n = len(task)
    entropy = rng.lognormal(0, 0.3, n)
    tables, histories, scores = [], [], []
    for form in FORMS:
        beta0 = BETA0[form]
        log_beta = rng.normal(0, 0.3, n) + 0.4 * rng.normal(size=3).repeat(prompts)
        beta = beta0 * np.exp(np.clip(log_beta, -1.2, 1.2))
        columns = {"task": task, "prompt": prompt, "beta": beta, "ref_entropy": entropy}
        tables.append(beta_table(form=form, seed=0, **columns, ref_entropy_se=np.full(n, 0.05)))
        pull = {f"grad/{term}/{t}": rng.normal(m / beta0, 0.5 / beta0, STEPS)
                for term, m in (("dpo", -1), ("entropy", 0.9), ("smoothness", 0.1)) for t in TASKS}  # fmt: skip
        pull |= {f"grad/range/{t}": np.zeros(STEPS) for t in TASKS}
        histories.append(history(form, form, rng).assign(**pull))
        scores.append(pairs(form, form, task, prompt, rng))
    histories.append(history("fixed", "standard", rng))
    scores.append(pairs("fixed", "standard", task, prompt, rng))
    factors = {"beta0": 1, "beta_min": LOW, "beta_max": HIGH, "alpha": 1 / entropy.mean()}
    lines = {name: {form: BETA0[form] * factor for form in FORMS} for name, factor in factors.items()}
    return {
        "table": pd.concat(tables, ignore_index=True),
        "history": pd.concat(histories, ignore_index=True),
        "scores": pd.concat(scores, ignore_index=True),
        "entropies": None,
        "config": {"training": {"lambda_entropy": 0.1, "batch_size": 16}},
        "metadata": lines
        | {"baseline": "fixed", "training pairs": 300, "answers cut": dict.fromkeys(TASKS, 0.01)}
        | {"reference on training pairs": reference_ranks(pairs("", "", task, prompt, rng))},
    }


def history(variant, form, rng):
    """The rows of stage 2: three quarters of the batches ranked correctly, and a KL as the margins have it."""
    accuracy = rng.binomial(16, 0.7, STEPS) / 16
    kl = {"kl": [math.nan] * (STEPS - 1) + [0.6 + 0.2 * rng.normal()], "kl_se": [math.nan] * (STEPS - 1) + [0.2]}
    place = {"variant": variant, "form": form, "seed": 0, "stage": 2, "step": range(STEPS)}
    return pd.DataFrame(place | {"accuracy": accuracy} | kl)


def pairs(variant, form, task, prompt, rng):
    """Held-out pairs: two thirds ranked correctly, the chosen log-ratio as likely to rise as to fall."""
    rows = np.repeat(np.arange(len(task)), PAIRS)
    chosen, rejected = rng.normal(0.3, 1, len(rows)), rng.normal(-0.3, 1, len(rows))
    tokens = rng.integers(5, 20, (2, len(rows)))
    ref = -tokens * rng.uniform(1, 2, (2, len(rows)))
    return pd.DataFrame(
        {
            "variant": variant, "form": form, "task": task[rows], "group": None, "prompt": np.array(prompt)[rows],
            "chosen": chosen, "rejected": rejected, "h": chosen - rejected,
            "ref_chosen": ref[0], "ref_rejected": ref[1], "chosen_tokens": tokens[0], "rejected_tokens": tokens[1],
        }
    )  # fmt: skip


def found(run, name=None):
    """What is found, as (name, task) pairs; of one name only if it is given."""
    return [(f.name, f.task) for f in diagnose(**run) if name in (None, f.name) and f.severity != "not checked"]


def of(frame, **where):
    """The rows of a table in which each column has the given value."""
    return np.logical_and.reduce([frame[column] == value for column, value in where.items()])


def at_the_upper_end(run):
    """Up against the range, whose pull balances those of the other terms."""
    rows = of(run["table"], form="inverse", task="code")
    run["table"].loc[rows, "beta"] = BETA0["inverse"] * HIGH * np.random.default_rng(1).normal(1, 0.01, rows.sum())
    rows = of(run["history"], variant="inverse")
    run["history"].loc[rows, "grad/dpo/code"] -= 1 / BETA0["inverse"]
    run["history"].loc[rows, "grad/range/code"] += 1 / BETA0["inverse"]


def one_constant(run):
    rows = of(run["table"], form="standard")
    run["table"].loc[rows, "beta"] = 0.12 * np.random.default_rng(1).normal(1, 0.005, rows.sum())


def on_alpha_h(run):
    run["metadata"]["training"] = {"inverse": {"lambda_entropy": 10.0, "batch_size": 16}}
    rows = of(run["table"], form="inverse")
    target = run["metadata"]["alpha"]["inverse"] * run["table"].loc[rows, "ref_entropy"]
    run["table"].loc[rows, "beta"] = target * np.random.default_rng(1).lognormal(0, 0.05, rows.sum())


def a_large_pull(run):
    rows = of(run["history"], variant="inverse")
    run["history"].loc[rows, "grad/entropy/dialogue"] = 1.0


def both_down(run):
    rows = of(run["scores"], variant="standard", task="code")
    for column, change in (("chosen", -2.0), ("rejected", -4.0), ("h", 2.0)):
        run["scores"].loc[rows, column] += change


def learned_by_heart(run):
    run["history"].loc[of(run["history"], variant="fixed"), "accuracy"] = 1.0
    rows = of(run["scores"], variant="fixed")
    run["scores"].loc[rows, "h"] = np.random.default_rng(1).normal(0, 1, rows.sum())


def elsewhere(run):
    run["history"].loc[of(run["history"], variant="inverse", step=STEPS - 1), "kl"] = 12.0


def few(run):
    drop = run["table"]["prompt"].isin([f"math {i}" for i in range(PROMPTS - 9)])
    run["table"] = run["table"][~drop]


def cut(run):
    run["metadata"]["answers cut"]["code"] = 0.5


def ranked_the_wrong_way_round(run):
    rows = of(run["scores"], task="math")
    run["scores"].loc[rows, "h"] = -run["scores"].loc[rows, "h"].abs()


def swapped_columns(run):
    """The reference prefers the chosen answers of code, also per token, and the rejected ones of math."""
    for task, worse in (("code", "rejected"), ("math", "chosen")):
        rows = of(run["scores"], task=task)
        run["scores"].loc[rows, f"ref_{worse}"] = -5.0 * run["scores"].loc[rows, f"{worse}_tokens"] - 60
        right = 0 if worse == "chosen" else 40
        run["metadata"]["reference on training pairs"][task] = {"total": (right, 40), "mean": (right, 40)}


def swapped_in_training(run):
    """The reference prefers the chosen answers of code among the held-out pairs, the rejected among the others."""
    rows = of(run["scores"], task="code")
    run["scores"].loc[rows, "ref_rejected"] = -5.0 * run["scores"].loc[rows, "rejected_tokens"] - 60
    run["metadata"]["reference on training pairs"]["code"] = {"total": (3, 40), "mean": (2, 40)}


PLANTED = [
    (at_the_upper_end, "beta at a bound", "code"),
    (one_constant, "beta constant", None),
    (on_alpha_h, "beta follows the entropy", None),
    (a_large_pull, "one term swamps the others", "dialogue"),
    (both_down, "both log-ratios fall", "code"),
    (learned_by_heart, "training pairs memorised", None),
    (elsewhere, "KL beyond the margins", None),
    (few, "few prompts", None),
    (cut, "entropies cut", "code"),
    (ranked_the_wrong_way_round, "labels look flipped", "math"),
    (swapped_columns, "labels look flipped", "math"),
    (swapped_in_training, "labels look flipped", "code"),
]


@pytest.fixture(scope="module", params=[0, 1])
def seed(request):
    """Seeds of the tables made by hand; nothing is found in those of any of them before a symptom is planted."""
    assert found(healthy(request.param)) == []
    return request.param


@pytest.mark.parametrize(("plant", "name", "task"), PLANTED, ids=[plant.__name__ for plant, *_ in PLANTED])
def test_a_planted_symptom_is_found_where_it_is_and_no_other(plant, name, task, seed):
    run = healthy(seed)
    plant(run)
    assert found(run) == [(name, task)]


def test_every_symptom_is_planted():
    assert {name for _, name, _ in PLANTED} == set(SYMPTOMS)


def test_findings_come_in_the_order_of_their_weight_and_read_as_sentences():
    run = healthy()
    for plant in (a_large_pull, few, cut, elsewhere):
        plant(run)
    del run["metadata"]["beta_min"]
    findings = diagnose(**run)
    assert [f.severity for f in findings] == ["warning"] * 2 + ["note"] * 2 + ["not checked"]
    for finding in findings:
        assert finding.evidence.endswith(".") and finding.advice.endswith(".")
    text = findings_as_text(findings)
    assert "warning: entropies cut (code)" in text and text.endswith("not checked: beta at a bound")
    assert findings_as_text([]).strip() == "nothing"


@pytest.mark.slow
@pytest.mark.skipif(chinese_font() is None, reason="no font with Chinese characters")
def test_findings_read_as_chinese_sentences_under_the_same_names():
    lacking = healthy()
    del lacking["metadata"]["beta_min"]
    lacking["scores"] = lacking["scores"].drop(columns=["chosen", "ref_chosen"])
    with in_language("zh"):
        findings = diagnose(**lacking)
        for plant, *_ in PLANTED:
            run = healthy()
            plant(run)
            findings += diagnose(**run)
        lines = findings_as_text(findings).splitlines()
    assert {finding.name for finding in findings} == set(SYMPTOMS)
    for line in [*lines, *(finding.evidence for finding in findings), *(finding.advice for finding in findings)]:
        assert re.search(r"[\u4e00-\u9fff]", line) and not re.search(r"[A-Za-z]+ [a-z]+ [a-z]+", line), line


@pytest.mark.parametrize(
    ("name", "drop", "unchecked"),
    [
        ("scores", ["chosen", "rejected"], ["both log-ratios fall"]),
        ("scores", ["ref_chosen", "ref_rejected"], ["labels look flipped"]),
        ("history", ["kl"], ["KL beyond the margins"]),
        ("history", ["accuracy"], ["training pairs memorised"]),
        ("metadata", ["answers cut"], ["entropies cut"]),
        ("metadata", ["alpha"], ["beta follows the entropy"]),
        ("metadata", ["beta_max"], ["beta at a bound"]),
    ],
)
def test_numbers_that_a_run_lacks_are_named_not_passed_over(name, drop, unchecked):
    run = healthy()
    given = run[name]
    run[name] = {k: v for k, v in given.items() if k not in drop} if name == "metadata" else given.drop(columns=drop)
    missing = [finding.name for finding in diagnose(**run) if finding.severity == "not checked"]
    assert missing == unchecked


def test_a_run_whose_beta_reads_more_than_the_prompt_has_its_policy_looked_at():
    run = healthy()
    learned_by_heart(run)
    run["table"] = run["table"].iloc[:0]
    assert found(run) == [("training pairs memorised", None)]
    missing = {finding.name for finding in diagnose(**run) if finding.severity == "not checked"}
    assert missing == {n for n in SYMPTOMS if n.startswith("beta")} | {"one term swamps the others", "entropies cut"}


@pytest.mark.parametrize(("rule", "plant"), [("constant", one_constant), ("entropy", on_alpha_h)])
def test_what_was_asked_for_is_no_symptom(rule, plant):
    run = healthy()
    plant(run)
    assert found(run)  # the control
    run["config"]["rule"] = rule
    assert found(run) == []


@pytest.mark.parametrize("name", ["history", "scores"])
def test_refuses_tables_of_another_kind(name):
    run = healthy()
    run[name] = run[name].drop(columns="variant")
    with pytest.raises(ValueError, match=rf"{name}: missing columns \['variant'\]"):
        diagnose(**run)


class TestAtABound:
    def test_most_prompts_inside_are_not_accused(self):
        """A short demo: 2 of 12 prompts at the lower end 2.5 or beyond, the median 2.98; before, all were."""
        run = healthy(prompts=12)
        rows = of(run["table"], form="inverse", task="code")
        run["table"].loc[rows, "beta"] = [2.14, 2.33, 2.56, 2.68, 2.72, 2.94, 3.02, 3.04, 3.10, 3.18, 3.33, 3.67]
        run["history"].loc[of(run["history"], variant="inverse"), "grad/dpo/code"] = 0.09  # lowers beta
        assert found(run) == []
        run["table"].loc[rows, "beta"] -= 0.2  # 8 of 12 below 2.87, 5 % of the width of the range from its end
        (finding,) = diagnose(**run)
        assert finding.name == "beta at a bound" and finding.task == "code"
        assert "8 of 12 prompts of code have β at the lower end of the range, 2.50, " in finding.evidence
        assert "(as far as 2.87), and the other terms together do not pull β back: the range" in finding.evidence

    @pytest.mark.slow
    @pytest.mark.parametrize(("end", "outward"), [(LOW, 1), (HIGH, -1)])
    @pytest.mark.parametrize("form", FORMS)
    def test_as_far_as_5_percent_of_the_log_width_and_only_where_pressed_outward(self, form, end, outward):
        """From the end b the distance is 5 % of ln(high/low); a positive pull lowers beta."""
        inside = (1 if end == LOW else -1) * 0.05 * math.log(HIGH / LOW)
        for share, sign, expected in ((0.99, 1, True), (1.01, 1, False), (-9, 1, True), (0.99, -1, False)):
            run = healthy()
            rows = of(run["table"], form=form, task="math")
            spread = np.where(np.arange(rows.sum()) < 11, math.exp(share * inside), 1 / end)  # 11 of 20, others amid
            run["table"].loc[rows, "beta"] = BETA0[form] * end * spread
            run["history"].loc[of(run["history"], variant=form), "grad/dpo/math"] = sign * outward * 3 / BETA0[form]
            assert (("beta at a bound", "math") in found(run)) == expected, (share, sign)

    def test_without_pulls_the_place_counts(self):
        """As of a beta that follows a rule and learns nothing."""
        run = healthy()
        at_the_upper_end(run)
        run["history"] = run["history"].drop(columns=[name for name in run["history"] if name.startswith("grad/")])
        (finding,) = diagnose(**run)
        assert (finding.name, finding.task) == ("beta at a bound", "code") and "pull β back" not in finding.evidence


def test_few_prompts_begin_below_ten():
    run = healthy(prompts=10)
    assert found(run, "few prompts") == []
    run["table"] = run["table"][run["table"]["prompt"] != "code 10"]
    assert found(run, "few prompts") == [("few prompts", None)]


def test_a_cut_entropy_counts_once_its_bias_exceeds_the_error_of_the_mean():
    """A fraction f of the entropy is hidden; the interval of the mean reaches 1.96 standard errors down."""
    run = healthy()
    code = run["table"].drop_duplicates("prompt").query("task == 'code'")["ref_entropy"]
    limit = 1.96 * code.sem() / code.mean()
    for factor, expected in ((0.99, []), (1.01, [("entropies cut", "code")])):
        run["metadata"]["answers cut"]["code"] = factor * limit
        assert found(run) == expected


def test_a_normal_log_ratio_has_the_kl_of_a_quarter_of_the_squared_margins():
    """u = log π/π_ref, normal over the reference's answers; h is the difference of two answers' u."""
    for variance in (0.1, 1.0, 4.0):
        u, width = np.linspace(-60, 60, 200_001, retstep=True)
        mean = -variance / 2  # so that the policy's probabilities add up to 1
        reference = np.exp(-((u - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance) * width
        policy = reference * np.exp(u)
        assert policy.sum() == pytest.approx(1, abs=1e-9)
        kl, squared_margin = (policy * u).sum(), 2 * (reference * (u - mean) ** 2).sum()
        assert kl == pytest.approx(squared_margin / 4, rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_share_of_the_loss_is_that_of_its_gradient(form):
    """At rest β = αH − pull/(2λ3): the share in the evidence, by autograd on the loss itself."""
    run = healthy()
    run["metadata"]["training"] = {f: {"lambda_entropy": 10.0 if f == form else 0.0, "batch_size": 16} for f in FORMS}
    rows = run["table"]["form"] == form
    alpha, beta0 = run["metadata"]["alpha"][form], BETA0[form]
    target = alpha * run["table"].loc[rows, "ref_entropy"]
    run["table"].loc[rows, "beta"] = target
    run["table"].loc[rows, "scale"] = 1 / target if form == "inverse" else target
    own = run["scores"][run["scores"]["variant"] == form]
    beta = own["prompt"].map(run["table"][rows].set_index("prompt")["beta"])
    leaf, h = (torch.tensor(values.to_numpy()) for values in (beta, own["h"]))
    leaf.requires_grad_()
    zero = torch.zeros_like(h)
    dpo_loss(h, zero, zero, zero, leaf, form=form).losses.sum().backward()
    pull = pd.Series(leaf.grad.numpy()).groupby(own["prompt"].to_numpy()).mean()
    loss = ((pull / (2 * 10.0 / beta0**2)) ** 2).mean()
    share = 100 * loss / (loss + target.var(ddof=0))
    (finding,) = diagnose(**run)
    assert f"could account for {number(share, 2)} % of" in finding.evidence


@pytest.mark.slow
def test_the_report_and_the_command_line_say_what_looks_wrong(tmp_path, capsys):
    run = healthy()
    one_constant(run)
    for table, name in (("table", "beta"), ("history", "history"), ("scores", "held_out")):
        write_table(run[table], tmp_path / f"{name}.csv")
    (tmp_path / "run.json").write_text(json.dumps(run["metadata"]))
    (tmp_path / "config.json").write_text(json.dumps(run["config"]))
    assert main(["report", str(tmp_path)]) == 0
    printed, page = capsys.readouterr().out, (tmp_path / "report.html").read_text(encoding="utf-8")
    (finding,) = load_run(tmp_path).diagnose()
    assert finding.name == "beta constant"
    for text in (finding.name, finding.evidence, finding.advice):
        assert text in printed and text in page


@pytest.mark.slow
def test_trained_runs_are_diagnosed():
    """Two symptoms of beta planted in runs of a small world, and a run without them; more in `helpers.symptoms`."""
    world = small_world(SMALL_WORLD, progress=False)
    names = ("healthy", "bound", "constant")
    wanted = {PLANTS[name].finds for name in names}
    for name in names:  # not with seed 0: there all β rest within 1 % of the bound, and are constant, too
        names_found = {finding for finding, _ in found(trained_run(world, name, 1))}
        assert names_found & wanted == {PLANTS[name].finds} - {None}, name
