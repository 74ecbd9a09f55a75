"""Make, summarise, write and read tables with a row per prompt, pair or estimator.

Tensors are converted here: everything drawn or reported afterwards is a `pandas.DataFrame`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet
from scipy import stats

from dpoviz.analysis.statistics import bootstrap, order_share, percentile_interval
from dpoviz.forms import Form, scale

COLUMNS = ("form", "seed", "task", "prompt", "beta", "scale", "ref_entropy", "ref_entropy_se")

EXPECTED_ORDER = ("math", "code", "dialogue")
"""The tasks in the order of beta that the derivation expects (§5.1.2), smallest beta first."""

POOLED = "all"
"""The task of summary rows over all tasks; no task may have this name."""

TEXT_COLUMNS = ("form", "task", "prompt", "answer", "variant", "group", "estimator", "rule", "unit", "half", "arm")
"""The text columns in the files of a run; all other columns hold numbers or booleans."""

OPTIONAL_TEXT = ("group",)
"""The text columns whose values may be missing (None), which differs from the empty text."""


class TensorLike(Protocol):
    """A tensor, recognised by its method, since this module does not import torch."""

    def detach(self) -> TensorLike: ...


Numbers: TypeAlias = TensorLike | Sequence[float] | np.ndarray | pd.Series


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
    """Return a table of beta and the reference's entropy at each held-out prompt, for one form and one seed.

    Args:
        form: "inverse" or "standard", for every row.
        seed: the seed of the run, for every row.
        task: (N,) the task of each prompt.
        prompt: (N,) the prompts, each once per task.
        beta: (N,) beta at each prompt, positive.
        ref_entropy: (N,) H(π_ref(·|x)) in nats per token, at least 0.
        ref_entropy_se: (N,) standard error of the entropy, in nats per token; 0 if it is exact.

    Returns:
        N rows with the columns `COLUMNS`; `scale` is the factor of h in the loss: 1/β (inverse) or β (standard).
        Numbers are stored as float64.

    Raises:
        ValueError: no rows, lengths that differ, a number that is not finite, a beta that is not positive, a negative
            entropy or standard error, a repeated prompt in a task, a task called "all", or an unknown form.
    """
    task, prompt = list(task), list(prompt)
    if not prompt:
        raise ValueError("prompt: got no rows, expected at least one")
    if len(task) != len(prompt):
        raise ValueError(f"task: got {len(task)} rows, expected {len(prompt)}, one per prompt")
    _require_no_pooled(task)
    beta = _numbers("beta", beta, len(prompt))
    _require_rows("beta", beta > 0, "not positive", "numbers above 0")
    columns: dict[str, Any] = {"form": form, "seed": seed, "task": task, "prompt": prompt}
    columns |= {"beta": beta, "scale": [scale(float(value), form) for value in beta]}
    for name, values in (("ref_entropy", ref_entropy), ("ref_entropy_se", ref_entropy_se)):
        columns[name] = _numbers(name, values, len(prompt))
        _require_rows(name, columns[name] >= 0, "negative", "at least 0")
    table = pd.DataFrame(columns)
    _require_once(table)
    return table


def _mean_of_rows(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return values[rows].mean(axis=1)


def _numbers(name: str, values: Numbers, n: int) -> np.ndarray:
    """Return finite values as a float64 array (n,); raise ValueError if they are not."""
    given: Any = values
    if hasattr(given, "detach"):  # a tensor, perhaps with a gradient, on another device, or in bfloat16
        given = given.detach().cpu().double().numpy()
    found = np.array(given, dtype=np.float64)
    if found.shape != (n,):
        raise ValueError(f"{name}: got shape {found.shape}, expected ({n},), one number per prompt")
    _require_rows(name, np.isfinite(found), "not finite", "finite numbers")
    return found


def _require_rows(name: str, holds: np.ndarray, got: str, expected: str) -> None:
    if not holds.all():
        raise ValueError(f"{name}: {got} in rows {np.flatnonzero(~holds).tolist()}, expected {expected}")


def _require_columns(name: str, table: pd.DataFrame, columns: Iterable[str]) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{name}: missing columns {missing}, expected {list(columns)}")
    if table.empty:
        raise ValueError(f"{name}: got no rows, expected at least one")


def _require_resamples(n_boot: int) -> None:
    if n_boot < 100:
        raise ValueError(f"n_boot: got {n_boot}, expected at least 100: fewer do not show a tail of 2.5 %")


def _require_no_pooled(tasks: Iterable[str]) -> None:
    if POOLED in set(tasks):
        raise ValueError(f"task: got {POOLED!r}, expected another name: it stands for all tasks together")


def _require_once(table: pd.DataFrame) -> None:
    twice = table[table.duplicated(["form", "seed", "task", "prompt"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(
            f"prompt: {len(twice)} rows repeat a prompt of their task, form and seed, the first is "
            f"{first['prompt']!r} in {first['task']!r}; expected one row per prompt: drop the others"
        )


def in_order(tasks: Iterable[str]) -> list[str]:
    """Return the distinct tasks: those of `EXPECTED_ORDER` first, then the others by name."""
    tasks = set(tasks)
    return [task for task in EXPECTED_ORDER if task in tasks] + sorted(tasks - set(EXPECTED_ORDER))


def summarize(table: pd.DataFrame, *, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Return medians and quartiles of beta and its Spearman correlation with entropy, by form and task.

    The interval of rho is a 95 % percentile bootstrap over prompts. The rows of one prompt from several seeds are
    resampled together, because they are not independent. All other statistics are over rows.

    Args:
        table: the table of `beta_table`, or several of them concatenated.
        n_boot: number of bootstrap resamples, at least 100.
        seed: seed of the bootstrap.

    Returns:
        A row per form and task, and one per form over all tasks (`task` "all"): form, task, n (prompts),
        beta_median, beta_q1, beta_q3, scale_median, ref_entropy_mean (nats per token), rho, rho_low,
        rho_high, order_share. Forms are in the order "inverse", "standard"; tasks as in `in_order`, "all" last. rho and
        its interval are NaN if beta or the entropy is constant, or if there are fewer than three prompts; prompts whose
        entropy is unknown (NaN) do not count for it, nor for ref_entropy_mean. order_share,
        the same in all rows of a form, is the fraction of resamples of each task's prompts in which the medians of beta
        keep the order of beta_median (a tie counts as a change). It reflects the choice of prompts only, not variation
        between training runs; it is NaN if there is only one task, or a task with one prompt.

    Raises:
        ValueError: an empty table, missing columns, a prompt repeated within a form, seed and task, a task called
            "all", or n_boot below 100.
    """
    _require_columns("table", table, COLUMNS)
    _require_resamples(n_boot)
    _require_no_pooled(table["task"])
    _require_once(table)
    rows = []
    for form, of_form in table.groupby("form"):  # sorted: inverse before standard
        groups = {task: of_form[of_form["task"] == task] for task in in_order(of_form["task"])}
        share = _medians_order_share(list(groups.values()), n_boot, seed)
        for task, group in (groups | {POOLED: of_form}).items():
            rows.append({"form": form, "task": task} | _summary(group, n_boot, seed) | {"order_share": share})
    return pd.DataFrame(rows)


def _medians_order_share(groups: Sequence[pd.DataFrame], n_boot: int, seed: int) -> float:
    """Return the fraction of resamples in which the groups' medians of beta keep their order."""
    if len(groups) < 2 or min(group["prompt"].nunique() for group in groups) < 2:
        return np.nan
    rng = np.random.default_rng(seed)
    medians = []
    for group in sorted(groups, key=lambda group: group["beta"].median()):
        beta = group.pivot(index="prompt", columns="seed", values="beta").to_numpy()  # NaN if a seed lacks the prompt

        def median(prompts: np.ndarray, beta: np.ndarray = beta) -> np.ndarray:
            return np.nanmedian(beta[prompts].reshape(len(prompts), -1), axis=1)

        medians.append(bootstrap(median, len(beta), resamples=n_boot, rng=rng))
    return order_share(medians)


def _summary(group: pd.DataFrame, n_boot: int, seed: int) -> dict[str, float]:
    q1, median, q3 = group["beta"].quantile([0.25, 0.5, 0.75])
    # (prompts, seeds), NaN if a seed lacks the prompt
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


def _rank_correlation(beta: np.ndarray, entropy: np.ndarray, n_boot: int, seed: int) -> tuple[float, float, float]:
    """Return Spearman's rho of two arrays (prompts, seeds), and its interval over resampled prompts."""

    def rho(prompts: np.ndarray) -> np.ndarray:
        resampled = (values[prompts].reshape(len(prompts), -1) for values in (beta, entropy))
        return _spearman(*resampled)

    known = ~np.isnan(entropy).all(axis=1)
    beta, entropy = beta[known], entropy[known]
    n = len(beta)
    if n < 3:
        return np.nan, np.nan, np.nan
    estimate = float(rho(np.arange(n)[None])[0])
    if np.isnan(estimate):
        return np.nan, np.nan, np.nan
    resampled = bootstrap(rho, n, resamples=n_boot, rng=np.random.default_rng(seed))
    return estimate, *percentile_interval(resampled)


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Spearman's rho along the last axis, ignoring NaN; NaN where one side is constant.

    `scipy.stats.spearmanr` takes one pair of samples per call, which is too slow for thousands of resamples.
    """
    a, b = (stats.rankdata(values, axis=-1, nan_policy="omit") for values in (a, b))
    a, b = (ranks - np.nanmean(ranks, axis=-1, keepdims=True) for ranks in (a, b))
    norm = np.sqrt(np.nansum(a * a, axis=-1) * np.nansum(b * b, axis=-1))
    varies = norm > 0
    return np.where(varies, np.nansum(a * b, axis=-1) / np.where(varies, norm, 1), np.nan)


def summarize_accuracy(scores: pd.DataFrame, *, baseline: str, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Return the reward accuracy on held-out pairs by variant and task, and its difference from the baseline's.

    The accuracy is the fraction of pairs with h > 0; |h| ≤ 1e-4 is a tie, which counts one half. Intervals are 95 %
    percentile bootstraps over groups of pairs: pairs of one `group`, or of one prompt if that is None, are resampled
    together. All variants use the same resamples, so that differences are paired.

    Args:
        scores: a row per variant and pair: variant, task, group, prompt, h (nats). Every variant has the same
            pairs, in the same order.
        baseline: the variant that the others are compared with.
        n_boot: number of bootstrap resamples, at least 100.
        seed: seed of the bootstrap.

    Returns:
        A row per variant and task, and one per variant over all tasks (`task` "all"): variant, task, n (pairs), groups,
        accuracy, accuracy_low, accuracy_high, difference, difference_low, difference_high; the last three are NaN
        for the baseline.

    Raises:
        ValueError: missing columns, no rows of the baseline, variants with different pairs, a task called "all", or
            n_boot below 100.
    """
    _require_columns("scores", scores, ("variant", "task", "group", "prompt", "h"))
    variants = {variant: rows.reset_index(drop=True) for variant, rows in scores.groupby("variant", sort=False)}
    if baseline not in variants:
        raise ValueError(f"baseline: got {baseline!r}, expected one of {list(variants)}")
    _require_resamples(n_boot)
    base = variants[baseline]
    for variant, rows in variants.items():
        if not rows[["task", "prompt"]].equals(base[["task", "prompt"]]):
            raise ValueError(
                f"scores: {variant!r} and {baseline!r} have other pairs, expected the same in the same order"
            )
    _require_no_pooled(base["task"])
    correct = pd.DataFrame({variant: _correct(rows["h"].to_numpy()) for variant, rows in variants.items()})
    grouped = base["group"].notna()
    clusters = pd.DataFrame({"grouped": grouped, "name": base["group"].where(grouped, base["prompt"])})
    rows = []
    for task in [*in_order(base["task"]), POOLED]:
        chosen = (base["task"] == task) | (task == POOLED)
        rows += _accuracies(correct[chosen], clusters[chosen], baseline, task, n_boot, seed)
    order = {variant: i for i, variant in enumerate(variants)}
    return pd.DataFrame(rows).sort_values(
        "variant", key=lambda variant: variant.map(order), kind="stable", ignore_index=True
    )


def _accuracies(
    correct: pd.DataFrame, clusters: pd.DataFrame, baseline: str, task: str, n_boot: int, seed: int
) -> list[dict[str, object]]:
    """Return the rows of one task, one per variant; `correct` has a column per variant and a row per pair."""
    number = clusters.groupby(["grouped", "name"], sort=False).ngroup().to_numpy()
    pairs = np.bincount(number)  # (groups,)
    sums = np.stack(
        [np.bincount(number, weights=values) for _, values in correct.items()], axis=1
    )  # (groups, variants)

    def accuracy(groups: np.ndarray) -> np.ndarray:
        return sums[groups].sum(axis=1) / pairs[groups].sum(axis=1)[:, None]

    resampled = bootstrap(accuracy, len(pairs), resamples=n_boot, rng=np.random.default_rng(seed))
    resampled = pd.DataFrame(resampled, columns=correct.columns)
    rows = []
    for variant in correct:
        row = {"variant": variant, "task": task, "n": len(correct), "groups": len(pairs)}
        row |= _with_interval("accuracy", correct[variant].mean(), resampled[variant])
        if variant == baseline:
            row |= dict.fromkeys(("difference", "difference_low", "difference_high"), np.nan)
        else:
            difference = (correct[variant] - correct[baseline]).mean()
            row |= _with_interval("difference", difference, resampled[variant] - resampled[baseline])
        rows.append(row)
    return rows


def _correct(h: np.ndarray) -> np.ndarray:
    """Return 1 where a pair is ranked correctly, 0 where not, and ½ for a tie."""
    return (np.sign(h) * (np.abs(h) > 1e-4) + 1) / 2


def _with_interval(name: str, estimate: float, resampled: pd.Series) -> dict[str, float]:
    low, high = percentile_interval(resampled.to_numpy())
    return {name: estimate, f"{name}_low": low, f"{name}_high": high}


def summarize_estimators(table: pd.DataFrame, *, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Return the mean entropy by estimator and task, and the order of the tasks with its uncertainty.

    Args:
        table: a row per estimator and prompt: estimator, task, entropy (in the estimator's unit).
        n_boot: number of bootstrap resamples of the prompts, separately by task, at least 100.
        seed: seed of the bootstrap.

    Returns:
        A row per estimator and task, in order of first appearance: estimator, task, n (prompts), mean, se (standard
        error over prompts; NaN for one prompt), order (the tasks by increasing mean, such as "math < code"),
        order_share (the fraction of resamples of the prompts that keep this order).

    Raises:
        ValueError: missing columns, no rows, an entropy that is not finite, or n_boot below 100.
    """
    _require_columns("table", table, ("estimator", "task", "entropy"))
    _require_rows("entropy", np.isfinite(table["entropy"].to_numpy()), "not finite", "finite numbers")
    _require_resamples(n_boot)
    rng = np.random.default_rng(seed)
    rows = []
    for estimator, of_estimator in table.groupby("estimator", sort=False):
        groups = {task: group.to_numpy() for task, group in of_estimator.groupby("task", sort=False)["entropy"]}
        resampled = {}
        for task, values in groups.items():
            resampled[task] = bootstrap(partial(_mean_of_rows, values), len(values), resamples=n_boot, rng=rng)
        order = sorted(groups, key=lambda task: groups[task].mean())
        shared = {"order": " < ".join(order), "order_share": order_share([resampled[task] for task in order])}
        for task, values in groups.items():
            se = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
            row = {"estimator": estimator, "task": task, "n": len(values), "mean": values.mean(), "se": se}
            rows.append(row | shared)
    return pd.DataFrame(rows)


_FORMULA = "=+-@\t\r\n＝＋－＠"
"""Characters that start a formula in a spreadsheet, or that it skips before one, in half and full width."""


def write_table(table: pd.DataFrame, path: Path | str) -> None:
    """Write a table as CSV that `read_table` reads back exactly.

    Text is quoted. A text that a spreadsheet would read as a formula gets a leading apostrophe, which spreadsheets
    hide and `read_table` removes; so do texts that begin with an apostrophe, and the empty text. An empty cell is a
    missing value. Numbers are written with all digits needed to read them back exactly.

    Args:
        table: a table with text only in `TEXT_COLUMNS`, and missing text only in `OPTIONAL_TEXT`.
        path: of the file.

    Raises:
        ValueError: there is text in another column, or text is missing.
    """
    written = {}
    for name, values in table.items():
        if name not in TEXT_COLUMNS:
            plain = pd.api.types.is_numeric_dtype(values) or values.map(lambda v: isinstance(v, (bool, np.bool_))).all()
            if not plain:
                raise ValueError(f"table: column {name!r} holds text, expected numbers; add it to TEXT_COLUMNS")
            written[name] = values
            continue
        missing = values.isna()
        if missing.any() and name not in OPTIONAL_TEXT:
            rows = np.flatnonzero(missing.to_numpy()).tolist()
            raise ValueError(f"table: column {name!r} has no text in rows {rows}, expected text in every row")
        written[name] = ["" if none else _guarded(str(v)) for v, none in zip(values, missing, strict=True)]
    # quote all text: the csv module leaves a lone carriage return unquoted, which would end the row
    quoting = {"quoting": csv.QUOTE_NONNUMERIC, "lineterminator": "\n"}
    pd.DataFrame(written, columns=table.columns).to_csv(path, index=False, encoding="utf-8", **quoting)


def write_parquet(out: Path, **tables: pd.DataFrame) -> None:
    """Write tables into the folder, each as <name>.parquet; equal tables give equal files.

    A column of arrays is written as lists.
    """
    for name, table in tables.items():
        if not table.empty:
            written = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
            parquet.write_table(written, out / f"{name}.parquet")


_RENAMED = {"arm": "variant"}
"""Columns of tables that versions before 0.2 wrote, with today's names."""


def read_table(path: Path | str) -> pd.DataFrame:
    """Return a table that `write_table` wrote; text stays text, whatever it looks like.

    Columns of `TEXT_COLUMNS` hold str, or None for a missing value. All other columns hold integers, booleans, or
    floating-point numbers, with NaN for a missing value.

    Raises:
        ValueError: a column outside `TEXT_COLUMNS` holds text.
    """
    # names are read as a row of values: in a header, pandas would rename empty and repeated names
    cells = pd.read_csv(path, header=None, dtype=str, na_filter=False, skip_blank_lines=False, encoding="utf-8")
    names = [_RENAMED.get(name, name) for name in cells.iloc[0]]
    cells = cells.iloc[1:].reset_index(drop=True)
    columns = {}
    for i, name in enumerate(names):
        if name in TEXT_COLUMNS:
            optional = name in OPTIONAL_TEXT
            texts = [None if optional and cell == "" else _unguarded(cell) for cell in cells[i]]
            columns[name] = pd.Series(texts, dtype=object if None in texts else None)
        else:
            columns[name] = _read_numbers(name, cells[i], path)
    return pd.DataFrame(columns, columns=names)


def _guarded(text: str) -> str:
    return text if text and text[0] not in _FORMULA + "'" else "'" + text


def _unguarded(cell: str) -> str:
    """Remove the apostrophe that `_guarded` added; keep one that an older file has as text."""
    return cell[1:] if re.match(rf"'([{re.escape(_FORMULA)}']|\Z)", cell) else cell


def _read_numbers(name: str, cells: pd.Series, path: Path | str) -> pd.Series:
    cells = cells.astype(object)
    if len(cells) and cells.isin(["True", "False"]).all():
        return cells == "True"
    if len(cells) and cells.str.fullmatch(r"-?[0-9]{1,18}").all():
        return cells.astype(np.int64)
    try:
        # float(), because pandas' own parser rounds the last digit differently
        return cells.map(lambda cell: float(cell) if cell else np.nan).astype(np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: column {name!r} holds text ({error}), expected numbers") from None
