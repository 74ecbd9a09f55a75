r"""One row per prompt: the contract between numbers and pictures.

Tensors end here. What is drawn or reported afterwards is a `pandas.DataFrame` whose columns are `COLUMNS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from dpoviz.forms import Form, scale

COLUMNS = ("form", "seed", "task", "prompt", "beta", "scale", "ref_entropy", "ref_entropy_se")

EXPECTED_ORDER = ("math", "code", "dialogue")
"""The tasks in the order of beta that the derivation expects (§5.1.2), smallest first."""

POOLED = "all"
"""What `summarize` calls the row over all tasks; no task may have this name."""

Numbers = Tensor | Sequence[float] | np.ndarray | pd.Series


def beta_table(
    *,
    form: Form,
    seed: int,
    task: Sequence[str],
    prompt: Sequence[str],
    beta: Numbers,
    ref_entropy: Numbers,
    ref_entropy_se: Numbers,
) -> pd.DataFrame:
    r"""Beta at each held-out prompt beside the entropy of the reference there, for one form and one seed.

    Args:
        form: "inverse" or "standard", for every row.
        seed: the seed of the run, for every row.
        task: (N,) the task of each prompt.
        prompt: (N,) the prompts, each once in its task.
        beta: (N,) positive.
        ref_entropy: (N,) H(π_ref(·|x)) in nats per token, at least 0.
        ref_entropy_se: (N,) its standard error, in nats per token, 0 where H is exact.

    Returns:
        N rows with the columns `COLUMNS`; `scale` is what multiplies h in the loss (`losses.scale`).
        Numbers are float64 and carry no gradient.

    Raises:
        ValueError: no rows, other lengths than N, not one finite number a row, beta not positive, a negative
            entropy or error, a prompt that is twice in its task, a task called "all", or another form.
    """
    task, prompt = list(task), list(prompt)
    if not prompt:
        raise ValueError("prompt: got no rows, expected at least one")
    if len(task) != len(prompt):
        raise ValueError(f"task: got {len(task)} rows, expected {len(prompt)}, one per prompt")
    _require_no_pooled(task)
    columns = {"form": form, "seed": seed, "task": task, "prompt": prompt}
    beta = _numbers("beta", beta, len(prompt))
    columns |= {"beta": beta.numpy(), "scale": scale(beta, form).numpy()}
    for name, values in (("ref_entropy", ref_entropy), ("ref_entropy_se", ref_entropy_se)):
        values = _numbers(name, values, len(prompt))
        if (values < 0).any():
            raise ValueError(f"{name}: negative in rows {_where(values < 0)}, expected at least 0")
        columns[name] = values.numpy()
    table = pd.DataFrame(columns)
    _require_once(table)
    return table


def _numbers(name: str, values: Numbers, n: int) -> Tensor:
    """Values as a float64 tensor (n,) without gradient, or a ValueError."""
    if not isinstance(values, Tensor):
        values = torch.from_numpy(np.array(values, dtype=np.float64))
    values = values.detach().cpu().double()
    if values.shape != (n,):
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected ({n},), one number per prompt")
    if not values.isfinite().all():
        raise ValueError(f"{name}: not finite in rows {_where(~values.isfinite())}, expected finite numbers")
    return values


def _where(rows: Tensor) -> list[int]:
    return rows.nonzero().flatten().tolist()


def _require_no_pooled(tasks: Sequence[str]) -> None:
    if POOLED in tasks:
        raise ValueError(f"task: got {POOLED!r}, expected another name: it stands for all tasks together")


def _require_once(table: pd.DataFrame) -> None:
    twice = table[table.duplicated(["form", "seed", "task", "prompt"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(
            f"prompt: {len(twice)} rows repeat a prompt of their task, form and seed, the first is "
            f"{first['prompt']!r} in {first['task']!r}; expected one row a prompt: drop the others"
        )


def summarize(table: pd.DataFrame, *, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    r"""Medians, quartiles and Spearman's rank correlation of beta with entropy, by form and task.

    The interval of rho is the percentile bootstrap over prompts, at 95 %. A prompt's rows of several seeds
    are drawn together: they are not independent prompts. All other numbers are over rows.

    Args:
        table: what `beta_table` returned, or several of them concatenated.
        n_boot: resamples of the bootstrap, at least 100.
        seed: of the bootstrap's draws.

    Returns:
        A row per form and task, and one per form over all tasks (`task` "all"): form, task, n (prompts),
        beta_median, beta_q1, beta_q3, scale_median, ref_entropy_mean (nats per token), rho, rho_low,
        rho_high, order_share. Forms come as "inverse", "standard"; tasks in `EXPECTED_ORDER`, others by name,
        "all" last. rho and its interval are NaN where beta or the entropy is constant, or prompts are fewer than
        three. order_share, the same in all rows of a form, is the share of resamples of each task's prompts in which
        the medians of beta keep the order of beta_median, ties not, and says nothing of another training; it is NaN
        with one task, or a task of one prompt.

    Raises:
        ValueError: an empty table, missing columns, a prompt that is twice in its form, seed and task, a task
            called "all", or n_boot below 100.
    """
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise ValueError(f"table: missing columns {missing}, expected those of beta_table")
    if table.empty:
        raise ValueError("table: got no rows, expected at least one")
    if n_boot < 100:
        raise ValueError(f"n_boot: got {n_boot}, expected at least 100: fewer say nothing of a tail of 2.5 %")
    _require_no_pooled(table["task"].tolist())
    _require_once(table)
    rows = []
    for form, of_form in table.groupby("form"):  # sorted: inverse before standard
        known = [task for task in EXPECTED_ORDER if (of_form["task"] == task).any()]
        others = sorted(set(of_form["task"]) - set(known))
        groups = {task: of_form[of_form["task"] == task] for task in [*known, *others]}
        share = _order_share(groups.values(), n_boot, seed)
        for task, group in (groups | {POOLED: of_form}).items():
            rows.append({"form": form, "task": task} | _summary(group, n_boot, seed) | {"order_share": share})
    return pd.DataFrame(rows)


def _order_share(groups: Collection[pd.DataFrame], n_boot: int, seed: int) -> float:
    """In which share of resamples the groups' medians of beta stand in their order again, the lowest first."""
    if len(groups) < 2 or min(group["prompt"].nunique() for group in groups) < 2:
        return np.nan
    rng = np.random.default_rng(seed)
    rising = []
    for group in sorted(groups, key=lambda group: group["beta"].median()):
        beta = group.pivot(index="prompt", columns="seed", values="beta").to_numpy()  # NaN where not in a seed
        rising.append(_resampled(partial(_medians, beta), len(beta), n_boot, rng))
    return float((np.diff(rising, axis=0) > 0).all(axis=0).mean())


def _medians(values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    return np.nanmedian(values[drawn].reshape(len(drawn), -1), axis=1)


def _resampled(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, n_boot: int, rng: np.random.Generator
) -> np.ndarray:
    """A statistic of n_boot resamples of n rows; it takes their numbers, (resamples, n): a hundred, for memory."""
    sizes = [min(100, n_boot - done) for done in range(0, n_boot, 100)]
    return np.concatenate([statistic(rng.integers(n, size=(size, n))) for size in sizes])


def _summary(group: pd.DataFrame, n_boot: int, seed: int) -> dict[str, float]:
    q1, median, q3 = group["beta"].quantile([0.25, 0.5, 0.75])
    # (prompts, seeds), NaN where a prompt is not in a seed
    wide = group.pivot(index=["task", "prompt"], columns="seed", values=["beta", "ref_entropy"])
    rho, low, high = _rank_correlation(wide["beta"].to_numpy(), wide["ref_entropy"].to_numpy(), n_boot, seed)
    return {
        "n": len(wide),
        "beta_median": median,
        "beta_q1": q1,
        "beta_q3": q3,
        "scale_median": group["scale"].median(),
        "ref_entropy_mean": group["ref_entropy"].mean(),
        "rho": rho,
        "rho_low": low,
        "rho_high": high,
    }


def summarize_accuracy(scores: pd.DataFrame, *, baseline: str, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    r"""Reward accuracy on held-out pairs by arm and task, and its difference from one arm's.

    The accuracy is the share of pairs with h > 0; a tie, :math:`|h| \le 10^{-4}`, counts a half. Intervals are
    percentile bootstraps at 95 % over groups of pairs: pairs of one `group`, or where that is None of one prompt,
    are drawn together, and the same draw serves all arms, so that the difference is paired.

    Args:
        scores: a row per arm and pair: arm, task, group, prompt, h (nats). Every arm has the same pairs, in the
            same order.
        baseline: the arm that the others are compared with.
        n_boot: resamples of the bootstrap, at least 100.
        seed: of the bootstrap's draws.

    Returns:
        A row per arm and task, and one per arm over all tasks (`task` "all"): arm, task, n (pairs), groups,
        accuracy, accuracy_low, accuracy_high, difference, difference_low, difference_high; the last three are NaN
        for the baseline.

    Raises:
        ValueError: missing columns, no rows of the baseline, arms with other pairs, a task called "all", or n_boot
            below 100.
    """
    needed = ["arm", "task", "group", "prompt", "h"]
    missing = [column for column in needed if column not in scores.columns]
    if missing:
        raise ValueError(f"scores: missing columns {missing}, expected {needed}")
    arms = {arm: rows.reset_index(drop=True) for arm, rows in scores.groupby("arm", sort=False)}
    if baseline not in arms:
        raise ValueError(f"baseline: got {baseline!r}, expected one of {list(arms)}")
    if n_boot < 100:
        raise ValueError(f"n_boot: got {n_boot}, expected at least 100: fewer say nothing of a tail of 2.5 %")
    base = arms[baseline]
    for arm, rows in arms.items():
        if not rows[["task", "prompt"]].equals(base[["task", "prompt"]]):
            raise ValueError(f"scores: {arm!r} and {baseline!r} have other pairs, expected the same in the same order")
    _require_no_pooled(base["task"].tolist())
    right = {arm: _right(rows["h"].to_numpy()) for arm, rows in arms.items()}
    cluster = base["group"].where(base["group"].notna(), "prompt: " + base["prompt"].astype(str))
    known = [task for task in EXPECTED_ORDER if (base["task"] == task).any()]
    found = []
    for task in [*known, *sorted(set(base["task"]) - set(known)), POOLED]:
        rows = np.full(len(base), True) if task == POOLED else (base["task"] == task).to_numpy()
        code, names = pd.factorize(cluster[rows])
        # (groups,) pairs of each group, and a matrix of how often each resample draws each group
        count = np.bincount(code)
        drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_boot)
        sums = {arm: np.bincount(code, weights=values[rows]) for arm, values in right.items()}
        boot = {arm: drawn @ total / (drawn @ count) for arm, total in sums.items()}
        for arm in arms:
            row = {"arm": arm, "task": task, "n": int(rows.sum()), "groups": len(names)}
            row |= _interval("accuracy", right[arm][rows].mean(), boot[arm])
            if arm == baseline:
                row |= _interval("difference", np.nan, np.full(1, np.nan))
            else:
                difference = (right[arm] - right[baseline])[rows].mean()
                row |= _interval("difference", difference, boot[arm] - boot[baseline])
            found.append(row)
    order = {arm: i for i, arm in enumerate(arms)}
    return pd.DataFrame(found).sort_values("arm", key=lambda arm: arm.map(order), kind="stable", ignore_index=True)


def _right(h: np.ndarray) -> np.ndarray:
    return (np.sign(h) * (np.abs(h) > 1e-4) + 1) / 2


def _interval(name: str, value: float, boot: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(boot, [0.025, 0.975])
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _rank_correlation(beta: np.ndarray, entropy: np.ndarray, n_boot: int, seed: int) -> tuple[float, float, float]:
    """Spearman's rho of two arrays (prompts, seeds), and its interval from resampled prompts."""

    def rho(prompts: np.ndarray) -> np.ndarray:
        drawn = (values[prompts].reshape(*prompts.shape[:-1], -1) for values in (beta, entropy))
        return _spearman(*drawn)

    n = len(beta)
    estimate = float(rho(np.arange(n)))
    if n < 3 or np.isnan(estimate):
        return np.nan, np.nan, np.nan
    boot = _resampled(rho, n, n_boot, np.random.default_rng(seed))
    # not scipy.stats.bootstrap: a resample of one prompt again and again has no rho, and one such makes its
    # interval NaN; the others still say how far rho scatters
    low, high = np.nanquantile(boot, [0.025, 0.975])
    return estimate, float(low), float(high)


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rho along the last axis, leaving NaN out; NaN where one side is constant.

    `scipy.stats.spearmanr` takes one pair of samples a call, too slow for thousands of resamples.
    """
    a, b = (stats.rankdata(values, axis=-1, nan_policy="omit") for values in (a, b))
    a, b = (ranks - np.nanmean(ranks, axis=-1, keepdims=True) for ranks in (a, b))
    norm = np.sqrt(np.nansum(a * a, axis=-1) * np.nansum(b * b, axis=-1))
    varies = norm > 0
    return np.where(varies, np.nansum(a * b, axis=-1) / np.where(varies, norm, 1), np.nan)
