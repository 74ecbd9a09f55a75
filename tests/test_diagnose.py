"""The doctor: each symptom planted in tables is found, a healthy run is not accused, and a trained run is diagnosed."""

import math

import numpy as np
import pandas as pd
import pytest

from dpoviz.analysis.diagnose import LEVEL, SYMPTOMS, diagnose
from dpoviz.analysis.tables import beta_table
from dpoviz.analysis.text import findings_as_text

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
    tables, betas, histories, scores = [], [], [], []
    for form in FORMS:
        beta0 = BETA0[form]
        log_beta = rng.normal(0, 0.3, n) + 0.4 * rng.normal(size=3).repeat(prompts)
        beta = beta0 * np.exp(np.clip(log_beta, -1.2, 1.2))
        columns = {"task": task, "prompt": prompt, "beta": beta, "ref_entropy": entropy}
        tables.append(beta_table(form=form, seed=0, **columns, ref_entropy_se=np.full(n, 0.05)))
        for step in range(STEPS):
            path = beta0 * (beta / beta0) ** min(1.0, (step + 1) / 12)
            betas.append(pd.DataFrame({"form": form, "step": step, "task": task, "prompt": prompt, "beta": path}))
        pull = {f"grad/{term}/{t}": rng.normal(m / beta0, 0.5 / beta0, STEPS)
                for term, m in (("dpo", -1), ("entropy", 0.9), ("smoothness", 0.1)) for t in TASKS}  # fmt: skip
        pull |= {f"grad/range/{t}": np.zeros(STEPS) for t in TASKS}
        histories.append(history(form, form, rng).assign(**pull))
        scores.append(pairs(form, form, task, prompt, rng))
    histories.append(history("fixed", "standard", rng))
    scores.append(pairs("fixed", "standard", task, prompt, rng))
    lines = {name: {form: BETA0[form] * factor for form in FORMS}
             for name, factor in (("beta0", 1), ("beta_min", LOW), ("beta_max", HIGH), ("alpha", 1 / entropy.mean()))}  # fmt: skip
    return {
        "table": pd.concat(tables, ignore_index=True),
        "history": pd.concat(histories, ignore_index=True),
        "scores": pd.concat(scores, ignore_index=True),
        "betas": pd.concat(betas, ignore_index=True),
        "entropies": None,
        "config": {"training": {"lambda_entropy": 0.1, "batch_size": 16}},
        "metadata": lines | {"baseline": "fixed", "training pairs": 300, "answers cut": dict.fromkeys(TASKS, 0.01)},
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
    for name in ("table", "betas"):
        frame = run[name]
        rows = of(frame, form="inverse", task="code") & (frame.get("step", pd.Series(STEPS, frame.index)) > 10)
        frame.loc[rows, "beta"] = BETA0["inverse"] * HIGH * np.random.default_rng(1).normal(1, 0.01, rows.sum())


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
]


@pytest.mark.parametrize(("plant", "name", "task"), PLANTED, ids=[plant.__name__ for plant, *_ in PLANTED])
@pytest.mark.parametrize("seed", range(8))
def test_a_planted_symptom_is_found_where_it_is_and_no_other(plant, name, task, seed):
    run = healthy(seed)
    assert found(run) == []  # the control
    plant(run)
    assert found(run) == [(name, task)]


def test_every_symptom_is_planted():
    assert {name for _, name, _ in PLANTED} == set(SYMPTOMS)
