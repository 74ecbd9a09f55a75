"""Look for what went wrong in a run, in the numbers that it kept: the doctor.

`diagnose` looks for the ten symptoms in `SYMPTOMS`. Each has a function below, whose docstring says which number is
compared with what, and why there. A threshold is an exact relation or a statistical test. All tests of a run are one
family: Holm's correction keeps the chance of any false alarm by chance alone at 5 %. That covers the choice of held-out
prompts and of batches, not another seed of training.

A finding is a reason to look, not a verdict: the advice says where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from dpoviz.analysis.report import MIN_PROMPTS
from dpoviz.analysis.statistics import holm
from dpoviz.analysis.tables import in_order
from dpoviz.analysis.text import fixed, number
from dpoviz.forms import Form
from dpoviz.translation import key, say, translate

Severity = Literal["warning", "note", "not checked"]

LEVEL = 0.05
"""The chance of any false alarm in a run, over all tests together."""


class Finding(NamedTuple):
    """One thing that looks wrong.

    Attributes:
        name: the symptom, one of `SYMPTOMS`.
        task: the task concerned; None for all.
        severity: "warning" (conclusions from the run would be wrong), "note" (usual in some settings), or "not checked"
            (the run lacks the numbers).
        evidence: a sentence with the numbers.
        advice: a sentence on what to try.
    """

    name: str
    task: str | None
    severity: Severity
    evidence: str
    advice: str


class _Suspicion(NamedTuple):
    """A finding that stands if its p-value is small enough; None: it rests on an exact relation, and stands."""

    finding: Finding
    p: float | None = None


class _Lacking(Exception):
    """The run lacks the numbers for a check; the text says which."""


@dataclass(frozen=True)
class _Case:
    """The tables of a run, as `diagnose` gets them."""

    table: pd.DataFrame
    history: pd.DataFrame
    scores: pd.DataFrame
    metadata: Mapping[str, Any]
    config: Mapping[str, Any]
    entropies: pd.DataFrame | None

    @property
    def tasks(self) -> list[str]:
        return in_order([*self.scores["task"], *self.table["task"]])

    def forms(self) -> list[Form]:
        """Return the forms with a beta of the prompt."""
        if self.table.empty:
            raise _Lacking(say("beta is not a function of the prompt alone, so there is no table of it"))
        return list(self.table["form"].unique())

    def line(self, name: str, form: Form) -> float:
        """Return beta0, beta_min, beta_max or alpha of a form."""
        if form not in self.metadata.get(name, {}):
            raise _Lacking(say("run.json has no {name} of the {form} form", name=name, form=say(form)))
        return float(self.metadata[name][form])

    def setting(self, name: str, form: Form) -> float:
        """Return a setting of training in a form."""
        own = self.metadata.get("training", {}).get(form) or self.config.get("training", {})
        if own.get(name) is None:
            raise _Lacking(say("the run kept no {name} of the {form} form", name=name, form=say(form)))
        return float(own[name])

    def last_rows(self, variant: str, fraction: float) -> pd.DataFrame:
        """Return the last fraction of the logged rows of stage 2 of a variant, in order."""
        rows = self.history[(self.history["variant"] == variant) & (self.history["stage"] == 2)].sort_values("step")
        return rows.tail(math.ceil(fraction * len(rows)))


def diagnose(
    *,
    table: pd.DataFrame,
    history: pd.DataFrame,
    scores: pd.DataFrame,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    entropies: pd.DataFrame | None = None,
    remedy: str | None = None,
) -> list[Finding]:
    """Return what looks wrong in a run: warnings first, then notes, then what could not be checked.

    Args:
        table: beta at each held-out prompt (beta.csv); empty if beta is not a function of the prompt.
        history: the histories of all variants (history.csv).
        scores: a row per variant and held-out pair (held_out.csv).
        config: the settings of the run (config.json).
        metadata: the facts of the run (run.json).
        entropies: the reference's entropy by estimator (entropy.csv), or None.
        remedy: the advice on what could not be checked; None: to run again with this version.

    Raises:
        ValueError: a table lacks the columns that every version of the library wrote.
    """
    needed = {"history": {"variant", "form", "stage", "step"}, "scores": {"variant", "form", "task", "prompt", "h"}}
    for name, given in (("history", history), ("scores", scores)):
        if missing := sorted(needed[name] - set(given.columns)):
            raise ValueError(f"{name}: missing columns {missing}, expected those of a run's {name}")
    case = _Case(table, history, scores, metadata, config, entropies)
    again = key("Run again with this version to have it checked, if beta is a function of the prompt.")
    return _examine(_CHECKS, case, remedy or again)


def _examine(checks: Mapping[str, Callable[[Any], Iterator[_Suspicion]]], case: Any, remedy: str) -> list[Finding]:
    """Return the findings that stand, in order; `remedy` is the advice on what could not be checked."""
    suspicions: list[_Suspicion] = []
    for name, check in checks.items():
        try:
            for suspicion in check(case):  # what a check found before it lacked something stays
                suspicions.append(suspicion)
        except _Lacking as lack:
            evidence = say("{text}.", text=_start(str(lack)))
            suspicions.append(_Suspicion(Finding(name, None, "not checked", evidence, translate(remedy))))
    tested = [s.p for s in suspicions if s.p is not None]
    adjusted = iter(holm(tested))
    kept = [s.finding for s in suspicions if s.p is None or next(adjusted) <= LEVEL]
    order = (key("warning"), key("note"), key("not checked"))
    return sorted(kept, key=lambda finding: order.index(finding.severity))


def _start(text: str) -> str:
    return text[:1].upper() + text[1:]


# ------------------------------------------------------------------------------------------ what moves beta


_NEAR = 0.05


def _at_a_bound(case: _Case) -> Iterator[_Suspicion]:
    """After the last step, more than half of a task's prompts have beta at one end of the range, pressed outward.

    Exact: beta is at an end if it lies there, beyond it, or inside by at most 5 % of the width of the range, on the log
    scale. It is pressed outward if the pulls of all terms but the range's, added up, do not point inward on average
    over the last quarter of the logged steps of stage 2. The median of beta that the report prints is then the choice
    of beta_min or beta_max. Where no pulls with their signs were logged (of a beta that does not learn, or by another
    trainer), the place alone counts, and the evidence does not speak of them.
    """
    for form in case.forms():
        low, high = case.line("beta_min", form), case.line("beta_max", form)
        near = (high / low) ** _NEAR
        for task, beta in case.table[case.table["form"] == form].groupby("task")["beta"]:
            pull = _pull_without_the_range(case, form, str(task))  # positive lowers beta
            for name, bound, limit, there, outward in (
                (key("lower"), low, low * near, beta <= low * near, pull is None or pull >= 0),
                (key("upper"), high, high / near, beta >= high / near, pull is None or pull <= 0),
            ):
                if there.mean() > 0.5 and outward:
                    evidence = say(
                        "{form} form: after the last step, {there} of {n} prompts of {task} have β at the {end} end of "
                        "the range, {bound}, beyond it, or inside by at most 5 % of its width on the log scale (as far "
                        "as {limit}){back}: the range decides it.",
                        form=say(form), there=there.sum(), n=len(beta), task=task, end=say(name), bound=number(bound),
                        limit=number(limit),
                        back="" if pull is None else say(", and the other terms together do not pull β back"),
                    )  # fmt: skip
                    advice = say(
                        "Widen the range (scale_min, scale_max), or ask which term pushes β there (the pulls): with "
                        "separable pairs the loss alone pushes without end, and λ3 or fewer steps hold it."
                    )
                    yield _Suspicion(Finding("beta at a bound", str(task), "warning", evidence, advice))


def _pull_without_the_range(case: _Case, form: Form, task: str) -> float | None:
    """Return the mean pull on beta of all terms but the range's, added up, late in stage 2; None if none was logged."""
    rows = case.last_rows(form, 1 / 4)
    names = [f"grad/{term}/{task}" for term in _SWAMPED if term != "range"]
    pulls = rows[[name for name in names if name in rows]].dropna(how="all", axis=1).dropna()
    return None if pulls.empty else float(pulls.sum(axis=1).mean())


_SAME = 0.01


def _constant(case: _Case) -> Iterator[_Suspicion]:
    """Beta's coefficient of variation over all held-out prompts is below 1 %.

    Exact: what the right beta(x) earns at a given small KL is at most √(1 + CV²) times what the best constant earns
    (`dpoviz.allocation.gain_bound`). At a CV of 1 % that is a gain of 1 in 20,000, for which no held-out set is large
    enough: telling two accuracies apart that differ by 5·10⁻⁵ takes more than 10⁸ pairs.
    """
    if case.config.get("rule") == "constant":
        return  # as it was asked to be
    for form in case.forms():
        beta = case.table.loc[case.table["form"] == form, "beta"]
        cv = float(beta.std(ddof=0) / beta.mean())
        if len(beta) > 1 and cv < _SAME:
            evidence = say(
                "{form} form: β varies by {cv} % (coefficient of variation) over {n} held-out prompts, around {mean}: "
                "it is one constant, worth at most {gain} % more reward than the best one.",
                form=say(form), cv=number(100 * cv), n=len(beta), mean=number(beta.mean()), gain=number(50 * cv * cv),
            )  # fmt: skip
            advice = say(
                "Raise beta_learning_rate or stage2_steps, or lower lambda_smoothness and lambda_consistency, whose "
                "pull flattens β(x)."
            )
            yield _Suspicion(Finding("beta constant", None, "warning", evidence, advice))


_SHARE = 0.05


def _follows_the_entropy(case: _Case) -> Iterator[_Suspicion]:
    """The loss can account for less than 5 % of the variance of beta, and beta goes with αH.

    Exact: at rest, the pulls of loss and entropy term cancel, so that β = αH − pull/(2λ3) at each prompt, inside the
    range. The first term varies over prompts with the variance of αH, the second displaces beta by at most its mean
    square; their shares add up to 1. 5 % is what a correlation of β with αH of √0.95 = 0.975 leaves. Tested: whether
    beta has followed, by Spearman's rank correlation of beta with αH clipped to the range, one-sided, over prompts.
    """
    if case.config.get("rule") == "entropy":
        return  # as it was asked to do
    for form in case.forms():
        rows = case.table[case.table["form"] == form]
        weight, alpha = case.setting("lambda_entropy", form) / case.line("beta0", form) ** 2, case.line("alpha", form)
        if weight == 0 or len(rows) < 3:
            continue
        if rows["ref_entropy"].isna().any():
            raise _Lacking(say("the entropy of the reference is not known at every held-out prompt"))
        target = alpha * rows["ref_entropy"].to_numpy()
        loss = np.mean((_pull_of_the_loss(case, form, rows) / (2 * weight)) ** 2)
        entropy = target.var()
        share = float(loss / (loss + entropy)) if loss + entropy > 0 else 1.0
        if share >= _SHARE:
            continue
        held = np.clip(target, case.line("beta_min", form), case.line("beta_max", form))
        if np.ptp(rows["beta"]) == 0 or np.ptp(held) == 0:
            continue
        followed = stats.spearmanr(rows["beta"], held, alternative="greater")
        evidence = say(
            "{form} form: the entropy term explains β: at rest the loss could account for {share} % of its variance "
            "over {n} prompts, and β goes with αH (Spearman’s ρ = {rho}).",
            form=say(form), share=number(100 * share, 2), n=len(rows), rho=fixed(followed.statistic),
        )  # fmt: skip
        advice = say(
            "Do not read the order of the tasks as learned from the labels: it is that of H. Lower lambda_entropy, and "
            "compare with a run at lambda_entropy = 0."
        )
        yield _Suspicion(Finding("beta follows the entropy", None, "warning", evidence, advice), float(followed.pvalue))


def _pull_of_the_loss(case: _Case, form: Form, rows: pd.DataFrame) -> np.ndarray:
    """Return ∂ℓ/∂β = −σ(−s·h)·h·ds/dβ at each prompt of a form's table, the mean over the prompt's pairs."""
    scores = case.scores[(case.scores["variant"] == form) & (case.scores["form"] == form)]
    pairs = scores[["task", "prompt", "h"]].merge(rows[["task", "prompt", "beta", "scale"]], on=["task", "prompt"])
    if pairs.empty:
        raise _Lacking(say("held_out.csv has no pairs of the {form} form", form=say(form)))
    h, s = pairs["h"].to_numpy(), pairs["scale"].to_numpy()
    slope = np.ones(len(pairs)) if form == "standard" else -1 / pairs["beta"].to_numpy() ** 2
    pairs = pairs.assign(pull=-h * np.exp(-np.logaddexp(0.0, s * h)) * slope)
    means = pairs.groupby(["task", "prompt"])["pull"].mean()
    return means.reindex(pd.MultiIndex.from_frame(rows[["task", "prompt"]])).fillna(0.0).to_numpy()


def _one_term_swamps(case: _Case) -> Iterator[_Suspicion]:
    """One term's pull on beta is larger than all others together, in the second half of stage 2.

    Exact: where beta rests, the pulls add up to 0, so that no term exceeds the sum of the others (the triangle
    inequality). Tested: whether the term, in the direction of its own mean, exceeds the sum of the others' sizes, by a
    one-sided t test over the logged steps, whose batches are other pairs. Noise in a pull counts in both directions
    alike, so the direction is fixed first; the p-value is doubled for that, and multiplied by the number of terms among
    which the largest is taken.
    """
    for form in case.forms():
        rows = case.last_rows(form, 1 / 2)
        if any(name.startswith("pull/") for name in rows) and not any(name.startswith("grad/") for name in rows):
            raise _Lacking(say("a trainer's log has the sizes of the pulls, without their signs"))
        for task in case.tasks:
            names = {f"grad/{term}/{task}": term for term in _SWAMPED}
            pulls = rows[[name for name in names if name in rows]].rename(columns=names)
            pulls = pulls.dropna(how="all", axis=1).dropna()
            if pulls.shape[1] < 2 or pulls.empty:
                continue
            largest = pulls.mean().abs().idxmax()
            signed = pulls[largest] * np.sign(pulls[largest].mean())
            others = pulls.drop(columns=largest).abs().sum(axis=1)
            more, n = int((signed > others).sum()), len(pulls)
            p = min(1.0, 2 * pulls.shape[1] * _t_above(signed - others))
            direction = say("down") if pulls[largest].mean() > 0 else say("up")
            evidence = say(
                "{form} form: in {more} of the last {n} logged steps the {term} term pulled β of {task} {direction} "
                "with more than all others together (mean {mean} against {others}).",
                form=say(form), more=more, n=n, term=say(largest), task=task, direction=direction,
                mean=number(signed.mean()), others=number(others.mean()),
            )  # fmt: skip
            yield _Suspicion(
                Finding("one term swamps the others", task, "note", evidence, translate(_SWAMPED[largest])), p
            )


_SWAMPED = {
    "dpo": key("β is not at rest, and only the range can stop it: train longer to see where, or raise lambda_entropy."),
    "entropy": key("Lower lambda_entropy: β goes to αH whatever the labels say."),
    "range": key("The start or αH lies outside the range: widen it, or lower lambda_range."),
    "smoothness": key("Lower lambda_smoothness: it flattens β(x) and shrinks it."),
    "consistency": key("Lower lambda_consistency: it makes β the same within each task."),
}


# ---------------------------------------------------------------------------------------------- the policy


_FALL = key(
    "Usual, if small, where the answers are not samples of the reference; suspicious if the chosen one falls "
    "by nats, as probability goes to answers outside the pairs. Read the policy’s answers, and train for fewer "
    "steps, with a lower policy_learning_rate or a larger initial_scale."
)

_MEMORY = key(
    "The policy memorises its pairs: stop earlier, use more pairs, a lower policy_learning_rate, or a smaller "
    "lora_rank; β then reads margins that mean nothing on new prompts."
)

_READ_PAIRS = key(
    "Read ten pairs of the task, of the training and of the held-out ones: are chosen and rejected in the right "
    "columns?"
)


def _both_fall(case: _Case) -> Iterator[_Suspicion]:
    """The log-ratios of chosen and of rejected answers are below 0, and h above 0, on held-out pairs of a task.

    Both log-ratios are exactly 0 before training, so their sign is the direction in which they went. Tested: three
    one-sided t tests over groups of pairs, all of which must hold; the largest p-value counts.
    """
    if not {"chosen", "rejected"} <= set(case.scores):
        raise _Lacking(say("held_out.csv has no log-ratios of chosen and rejected answers"))
    for (variant, task), rows in case.scores.groupby(["variant", "task"]):
        means = _by_group(rows, ["chosen", "rejected", "h"])
        p = max(_t_above(-means["chosen"]), _t_above(-means["rejected"]), _t_above(means["h"]))
        evidence = say(
            "{variant}: on held-out pairs of {task} log π/π_ref fell for both answers, to {chosen} (chosen) and "
            "{rejected} nats (rejected), while the margin h rose to {h} ({n} groups of pairs).",
            variant=say(str(variant)), task=task, n=len(means),
            **{name: number(means[name].mean()) for name in ("chosen", "rejected", "h")},
        )  # fmt: skip
        yield _Suspicion(Finding("both log-ratios fall", str(task), "note", evidence, translate(_FALL)), p)


def _memorised(case: _Case) -> Iterator[_Suspicion]:
    """Less than half of what training gained in accuracy is seen on held-out pairs.

    Before training every h is 0, a tie, and both accuracies are exactly ½. So held out − ½ < ½·(training − ½) says
    that most of the gain is memory of the training pairs. Tested: one-sided z test of that contrast, with the held-out
    standard error over groups of pairs, and the training accuracy over the distinct pairs of the last quarter of the
    logged steps.
    """
    for variant, rows in case.scores.groupby("variant"):
        last = case.last_rows(str(variant), 1 / 4)
        if "accuracy" not in last or last["accuracy"].isna().all():
            raise _Lacking(say("history.csv has no accuracy of the training batches"))
        form = rows["form"].iloc[0]
        batch = case.setting("batch_size", form)
        n = min(len(last) * batch, float(case.metadata.get("training pairs", math.inf)))
        right = _by_group(rows.assign(right=_correct(rows["h"])), ["right"])["right"]
        training = float(last["accuracy"].mean())
        contrast = (right.mean() - 0.5) - (training - 0.5) / 2
        smoothed = (training * n + 0.5) / (n + 1)  # not a standard error of 0 where every pair is ranked correctly
        error = math.hypot(_standard_error(right), 0.5 * math.sqrt(smoothed * (1 - smoothed) / n))
        evidence = say(
            "{variant}: training accuracy is {training} in the last {steps} logged steps, held-out accuracy "
            "{held_out} on {n} groups of pairs: less than half of the gain over ½ carries over.",
            variant=say(str(variant)), training=number(training), steps=len(last), held_out=number(right.mean()),
            n=len(right),
        )  # fmt: skip
        p = float(stats.norm.cdf(contrast / error)) if error > 0 else 1.0
        yield _Suspicion(Finding("training pairs memorised", None, "warning", evidence, translate(_MEMORY)), p)


def _kl_beyond_margins(case: _Case) -> Iterator[_Suspicion]:
    """The sampled KL exceeds E[h²]/4, the KL that belongs to the margins of the held-out pairs.

    With u = log π/π_ref and π_a ∝ π_ref·exp(a·u), ∂KL(π_a‖π_ref)/∂a = a·Var_{π_a}(u), so that KL = Var(u)/2 where the
    variance does not change along the way: exactly for u that are normal over the reference's answers, else to second
    order. h is the difference of two u; of two answers sampled from the reference, E[h²] = 2·Var(u). Answers that
    were made otherwise differ more, and raise the limit. Tested: one-sided z test of the difference, with the standard
    errors of the KL over prompts and of E[h²]/4 over groups of pairs.
    """
    if not {"kl", "kl_se"} <= set(case.history):
        raise _Lacking(say("history.csv has no sampled KL: the run had probe_prompts = 0"))
    for variant, rows in case.scores.groupby("variant"):
        measured = case.last_rows(str(variant), 1).dropna(subset=["kl", "kl_se"])
        if measured.empty:
            continue
        kl, error = (float(measured[name].iloc[-1]) for name in ("kl", "kl_se"))
        explained = _by_group(rows.assign(explained=rows["h"] ** 2 / 4), ["explained"])["explained"]
        own = _standard_error(explained)
        evidence = say(
            "{variant}: KL(π‖π_ref) is {kl} ± {error} nats on sampled answers; the margins of the {n} held-out pairs "
            "explain E[h²]/4 = {explained} ± {own}.",
            variant=say(str(variant)), kl=number(kl), error=number(error), n=len(rows),
            explained=number(explained.mean()), own=number(own),
        )  # fmt: skip
        advice = say(
            "The policy moved in directions that the pairs do not measure: read its answers (length, repetition), and "
            "lower policy_learning_rate."
        )
        p = float(stats.norm.sf((kl - explained.mean()) / math.hypot(error, own))) if error > 0 else 1.0
        yield _Suspicion(Finding("KL beyond the margins", None, "warning", evidence, advice), p)


# ------------------------------------------------------------------------------------------------ the data


def _few_prompts(case: _Case) -> Iterator[_Suspicion]:
    """A task has fewer than `MIN_PROMPTS` held-out prompts: its median has no 95 % interval inside the extremes."""
    prompts = case.table if len(case.table) else case.scores
    counts = prompts.drop_duplicates(["task", "prompt"])["task"].value_counts()
    few = [task for task in in_order(counts.index) if counts[task] < MIN_PROMPTS]
    if len(counts) > 1 and few:
        listed = say(", ").join(say("{n} of {task}", n=counts[task], task=task) for task in few)
        evidence = say(
            "Too few held-out prompts to order the tasks: {listed}; expected at least {least} per task.",
            listed=listed, least=MIN_PROMPTS,
        )  # fmt: skip
        advice = say("Add pairs of other prompts to these tasks, or raise held_out, before comparing their β.")
        yield _Suspicion(Finding("few prompts", None, "note", evidence, advice))


def _cut_entropies(case: _Case) -> Iterator[_Suspicion]:
    """So many sampled answers hit the length limit that the bias exceeds the error of the task's mean entropy.

    Exact for answers that end at a constant rate: if a fraction f of them is cut, a fraction f of all tokens, and of
    the entropy of the whole answer, is missing. A bias beyond 1.96 standard errors leaves a 95 % interval with a
    coverage below 50 %. The error is that of the mean over the task's prompts: of the estimator `sequence` if the run
    compared estimators, else of the entropies in the table.
    """
    cut = case.metadata.get("answers cut")
    if cut is None:
        raise _Lacking(say("run.json does not say how many sampled answers hit the length limit"))
    if case.entropies is not None:
        known = case.entropies[~case.entropies["example"] & (case.entropies["estimator"] == "sequence")]
    else:
        known = case.table.drop_duplicates(["task", "prompt"]).rename(columns={"ref_entropy": "entropy"})
    if known.empty:
        raise _Lacking(say("the run kept no entropies of the reference"))
    for task, values in known.groupby("task")["entropy"]:
        fraction, mean = float(cut.get(task, 0.0)), float(values.mean())
        error = _standard_error(values) / mean if mean > 0 else 0.0
        if fraction > 1.96 * error and fraction > 0:
            evidence = say(
                "{cut} % of the answers sampled for the entropy of {task} hit the length limit; that hides about as "
                "large a part of the entropy, whose standard error is {error} % over {n} prompts.",
                cut=number(100 * fraction), task=task, error=number(100 * error), n=len(values),
            )  # fmt: skip
            advice = say(
                "Raise max_new_tokens until few answers are cut, or read H as that of the answers’ first tokens."
            )
            yield _Suspicion(Finding("entropies cut", str(task), "warning", evidence, advice))


def _look_flipped(case: _Case) -> Iterator[_Suspicion]:
    """In one task, the policy or the reference ranks held-out pairs the wrong way round.

    Three signs. The policy ranks the held-out pairs of the task wrongly more often than not, after training. The
    reference ranks the training pairs otherwise than the held-out ones, though both are a random split of the same. Or
    it gives the rejected answers of this task more probability, unlike in the other tasks. Length moves a sum of
    log-probabilities one way and their mean per token the other, so both must agree. Tested, over groups of pairs: sign
    test, Fisher's exact test, and for the comparison with the other tasks a Mann-Whitney test; all parts of a statement
    must hold, and the largest p-value counts.

    Labels that are flipped alike in all pairs of a task, training and held-out, are a preference like any other: only
    the reference speaks against them, and only where it has a preference of its own.
    """
    right = case.scores.assign(right=_correct(case.scores["h"]))
    for task, rows in right.groupby("task"):
        wrong = 0.5 - _by_group(rows, ["right"])["right"]
        share = (wrong > 0).sum(), (wrong != 0).sum()
        evidence = say(
            "After training, {wrong} of {n} groups of held-out pairs of {task} are ranked the wrong way round more "
            "often than not, over all variants.",
            wrong=share[0], n=share[1], task=task,
        )  # fmt: skip
        yield _Suspicion(
            Finding("labels look flipped", str(task), "warning", evidence, translate(_READ_PAIRS)), _sign_test(wrong)
        )
    if "ref_chosen" not in case.scores:
        raise _Lacking(
            say("held_out.csv has no log-probabilities of the reference; the policy’s ranking was looked at")
        )
    first = case.scores[case.scores["variant"] == case.scores["variant"].iloc[0]]
    groups = _preferences(first)
    for task, p in _other_in_training(case, groups):
        evidence = say(
            "The reference ranks the training pairs of {task} otherwise than the held-out ones: it gives the chosen "
            "answer more probability in {training} and in {held_out} of the groups of pairs, also per token.",
            task=task, training=_share(case.metadata[_TRAINING][task]["total"]),
            held_out=_share(_counts(groups[task]["total"])),
        )  # fmt: skip
        yield _Suspicion(Finding("labels look flipped", task, "warning", evidence, translate(_READ_PAIRS)), p)
    for task, own in groups.items():
        if len(groups) < 2:
            continue
        others = pd.concat([of_task for name, of_task in groups.items() if name != task])
        p = max(max(_sign_test(-own[name]), _lower(own[name], others[name])) for name in own)
        shares = [_share((int((part["total"] < 0).sum()), len(part))) for part in (own, others)]
        evidence = say(
            "The reference gives the rejected answer more probability in {own} groups of held-out pairs of {task}, "
            "also per token, against {others} in the other tasks.",
            own=shares[0], task=task, others=shares[1],
        )  # fmt: skip
        yield _Suspicion(Finding("labels look flipped", task, "note", evidence, translate(_READ_PAIRS)), p)


_TRAINING = "reference on training pairs"


def reference_ranks(pairs: pd.DataFrame) -> dict[str, dict[str, tuple[int, int]]]:
    """Return in how many groups of pairs the reference gives the chosen answer more probability, by task.

    Args:
        pairs: a row per pair: task, group, prompt, ref_chosen, ref_rejected (nats), chosen_tokens, rejected_tokens.

    Returns:
        For each task, "total" (log-probability of the whole answer) and "mean" (per token), each with the number of
        groups that favour the chosen answer and of those that favour either.
    """
    return {task: {name: _counts(own[name]) for name in own} for task, own in _preferences(pairs).items()}


def _preferences(pairs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return, by task, how much more the reference prefers the chosen answer, in total and per token, by group."""
    total = pairs["ref_chosen"] - pairs["ref_rejected"]
    mean = pairs["ref_chosen"] / pairs["chosen_tokens"] - pairs["ref_rejected"] / pairs["rejected_tokens"]
    preferred = pairs.assign(total=total, mean=mean)
    return {str(task): _by_group(rows, ["total", "mean"]) for task, rows in preferred.groupby("task")}


def _counts(values: pd.Series) -> tuple[int, int]:
    return int((values > 0).sum()), int((values != 0).sum())


def _share(counts: tuple[int, int]) -> str:
    return say("{part} of {whole}", part=counts[0], whole=counts[1])


def _other_in_training(case: _Case, groups: Mapping[str, pd.DataFrame]) -> Iterator[tuple[str, float]]:
    """Yield each task with the p-value for the reference ranking its training pairs as it does the held-out ones."""
    for task, ranks in case.metadata.get(_TRAINING, {}).items():
        if task in groups:
            tables = [[_split(ranks[name]), _split(_counts(groups[task][name]))] for name in ("total", "mean")]
            yield task, max(float(stats.fisher_exact(table).pvalue) for table in tables)


def _split(counts: tuple[int, int]) -> list[int]:
    return [counts[0], counts[1] - counts[0]]


# ------------------------------------------------------------------------------------------------ the tests


def _by_group(rows: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Return the means over the pairs of each group, or of each prompt where a pair has no group."""
    group = rows["group"] if "group" in rows else pd.Series(None, index=rows.index, dtype=object)
    keys = [group.notna().rename("grouped"), group.where(group.notna(), rows["prompt"]).rename("cluster")]
    return rows.groupby(keys, sort=False)[columns].mean()


def _correct(h: pd.Series) -> np.ndarray:
    """Return 1 where a pair is ranked correctly, 0 where not, ½ for a tie of at most 1e-4."""
    return (np.sign(h) * (h.abs() > 1e-4) + 1).to_numpy() / 2


def _standard_error(values: pd.Series) -> float:
    """Return the standard error of the mean; 0 for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _t_above(values: pd.Series | np.ndarray) -> float:
    """Return the p-value of a one-sided t test for a mean above 0; 1 where it is undefined."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        return 1.0
    return float(stats.ttest_1samp(values, 0.0, alternative="greater").pvalue)


def _sign_test(values: pd.Series) -> float:
    """Return the p-value of a one-sided sign test for values above 0; ties are left out."""
    above, n = int((values > 0).sum()), int((values != 0).sum())
    return float(stats.binom.sf(above - 1, n, 0.5)) if n else 1.0


def _lower(values: pd.Series, others: pd.Series) -> float:
    """Return the p-value of a one-sided Mann-Whitney test for the signs of `values` below those of `others`."""
    return float(stats.mannwhitneyu(np.sign(values), np.sign(others), alternative="less", method="asymptotic").pvalue)


_CHECKS: dict[str, Callable[[_Case], Iterator[_Suspicion]]] = {
    key("beta at a bound"): _at_a_bound,
    key("beta constant"): _constant,
    key("beta follows the entropy"): _follows_the_entropy,
    key("one term swamps the others"): _one_term_swamps,
    key("both log-ratios fall"): _both_fall,
    key("training pairs memorised"): _memorised,
    key("KL beyond the margins"): _kl_beyond_margins,
    key("few prompts"): _few_prompts,
    key("entropies cut"): _cut_entropies,
    key("labels look flipped"): _look_flipped,
}

SYMPTOMS = tuple(_CHECKS)
"""The names of what `diagnose` looks for."""


# ------------------------------------------------------------------------------------- a log of batches alone


def diagnose_log(history: pd.DataFrame, *, row_pairs: int = 1, has_reference: bool = True) -> list[Finding]:
    """Return what looks wrong in the log of a trainer, which has means over batches and no row per pair.

    Args:
        history: a row per logged step: step, and what the log has of accuracy, logratio/<answer>/<task> (nats) or
            rewards/<answer>, held_out_accuracy, eval_rewards/margins, eval_runtime and eval_samples_per_second.
        row_pairs: the pairs of a logged row, at least.
        has_reference: whether rewards are β·log π/π_ref; False: β·log π, as in SimPO and ORPO.

    Returns:
        As `diagnose`. Only the log-ratios and the accuracies are looked at; all other symptoms are "not checked".
    """
    return _examine(
        {name: _LOG_CHECKS.get(name, _not_in_a_log) for name in SYMPTOMS},
        _Log(history.sort_values("step"), row_pairs, has_reference),
        key("Train with `dpoviz train`, which keeps what this check needs."),
    )


@dataclass(frozen=True)
class _Log:
    history: pd.DataFrame
    row_pairs: int
    has_reference: bool

    def last(self, column: str, fraction: float) -> pd.Series:
        """Return the last fraction of the logged values of a column, in order; none if the log lacks it."""
        values = self.history[column].dropna() if column in self.history else pd.Series(dtype=float)
        return values.tail(math.ceil(fraction * len(values)))

    def held_out(self) -> tuple[float, float, int]:
        """Return the last accuracy and mean margin on held-out pairs, and how many these are."""
        needed = ["held_out_accuracy", "eval_rewards/margins", "eval_runtime", "eval_samples_per_second"]
        if not set(needed) <= set(self.history) or self.history[needed].dropna().empty:
            raise _Lacking(say("the log has no accuracy on held-out pairs (one eval_dataset, and eval_strategy)"))
        accuracy, margin, seconds, speed = self.history[needed].dropna().iloc[-1]
        return float(accuracy), float(margin), max(1, round(seconds * speed))


def _not_in_a_log(_log: _Log) -> Iterator[_Suspicion]:
    """Raise: the check reads single prompts or pairs, or signed pulls."""
    raise _Lacking(say("a trainer's log has means over batches, this check reads single prompts or pairs"))


def _both_fall_in_log(log: _Log) -> Iterator[_Suspicion]:
    """As `_both_fall`, on training batches: the t tests are over the last half of the logged rows.

    Rewards stand in for log-ratios where the log has no β: their signs are the same.
    """
    if not log.has_reference:
        raise _Lacking(say("the log's rewards are β·log π, without a reference, so it has no log-ratios"))
    tasks = [name.split("/", 2)[2] for name in log.history if name.startswith("logratio/chosen/")]
    names = {task: (f"logratio/chosen/{task}", f"logratio/rejected/{task}") for task in tasks}
    unit = say("log π/π_ref fell for both answers (means in nats)")
    if not names:
        names = {"all": ("rewards/chosen", "rewards/rejected")}
        unit = say("β·log π/π_ref fell for both answers (means)")
    if not any(set(pair) <= set(log.history) for pair in names.values()):
        raise _Lacking(say("the log has neither log-ratios nor rewards of chosen and rejected answers"))
    for task, pair in names.items():
        chosen, rejected = (log.last(name, 1 / 2) for name in pair)
        h = chosen - rejected
        p = max(_t_above(-chosen), _t_above(-rejected), _t_above(h))
        evidence = say(
            "In the last {n} logged rows of training {fell}, to {chosen} (chosen) and {rejected} (rejected), while "
            "their difference rose to {h}; task: {task}.",
            n=len(h), fell=unit, chosen=number(chosen.mean()), rejected=number(rejected.mean()), h=number(h.mean()),
            task=task,
        )  # fmt: skip
        yield _Suspicion(Finding("both log-ratios fall", task, "note", evidence, translate(_FALL)), p)


def _memorised_in_log(log: _Log) -> Iterator[_Suspicion]:
    """As `_memorised`, of the log's accuracies; pairs count as independent, because the log does not group them.

    TRL counts a tie as wrong. A policy that has not moved has only ties, hence nothing is said unless the training
    accuracy is above ½. The training pairs counted are at most those of an epoch.
    """
    accuracy, _, pairs = log.held_out()
    last = log.last("accuracy", 1 / 4)
    if last.empty:
        raise _Lacking(say("the log has no accuracy of the training batches"))
    training, n = float(last.mean()), float(len(last) * log.row_pairs)
    if training <= 0.5:
        return
    if "epoch" in log.history:
        n = min(n, len(log.last("accuracy", 1)) * log.row_pairs / float(log.history["epoch"].max()))
    contrast = (accuracy - 0.5) - (training - 0.5) / 2
    errors = [math.sqrt(q * (1 - q) / k) for q, k in ((_smoothed(accuracy, pairs), pairs), (_smoothed(training, n), n))]
    evidence = say(
        "Training accuracy is {training} in the last {n} logged rows, held-out accuracy {accuracy} on {pairs} pairs: "
        "less than half of the gain over ½ carries over.",
        training=number(training), n=len(last), accuracy=number(accuracy), pairs=pairs,
    )  # fmt: skip
    p = float(stats.norm.cdf(contrast / math.hypot(errors[0], errors[1] / 2)))
    yield _Suspicion(Finding("training pairs memorised", None, "warning", evidence, translate(_MEMORY)), p)


def _smoothed(fraction: float, n: float) -> float:
    """Return a fraction of n that is never 0 or 1, for its standard error."""
    return (fraction * n + 0.5) / (n + 1)


def _look_flipped_in_log(log: _Log) -> Iterator[_Suspicion]:
    """As the first sign of `_look_flipped`: held-out pairs are ranked the wrong way round more often than not.

    A binomial test. TRL counts a tie as wrong, so that the mean margin must be below 0 as well.
    """
    accuracy, margin, pairs = log.held_out()
    if margin < 0:
        right = round(accuracy * pairs)
        evidence = say(
            "After training, {wrong} of {pairs} held-out pairs are ranked the wrong way round, with a mean margin of "
            "{margin}.",
            wrong=pairs - right, pairs=pairs, margin=number(margin),
        )  # fmt: skip
        p = float(stats.binom.cdf(right, pairs, 0.5))
        yield _Suspicion(Finding("labels look flipped", None, "warning", evidence, translate(_READ_PAIRS)), p)
    raise _Lacking(say("a log does not show tasks or the reference's ranking; the held-out accuracy was looked at"))


_LOG_CHECKS: dict[str, Callable[[_Log], Iterator[_Suspicion]]] = {
    "both log-ratios fall": _both_fall_in_log,
    "training pairs memorised": _memorised_in_log,
    "labels look flipped": _look_flipped_in_log,
}
