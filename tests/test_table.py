"""Tables and summaries against plain Python and scipy's one-pair functions; files against the tables they hold."""

from __future__ import annotations

import ast
import csv
import random
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpoviz.analysis import tables
from dpoviz.analysis.tables import (
    COLUMNS,
    EXPECTED_ORDER,
    beta_table,
    read_table,
    summarize,
    summarize_accuracy,
    summarize_estimators,
    write_table,
)

# sums and quotients of a few dozen numbers of size 1 in float64: rounding stays below 1e-13
EXACT = {"rel": 1e-12, "abs": 1e-12}


def made(beta, entropy, *, form="inverse", seed=0, task="math", prompts=None) -> pd.DataFrame:
    """A table of one task, or of the tasks listed."""
    n = len(beta)
    return beta_table(
        form=form,
        seed=seed,
        task=[task] * n if isinstance(task, str) else task,
        prompt=prompts or [f"p{i}" for i in range(n)],
        beta=beta,
        ref_entropy=entropy,
        ref_entropy_se=[0.1] * n,
    )


def noisy(n: int = 30, seed: int = 0, **kws) -> pd.DataFrame:
    """Beta follows the entropy, with noise."""
    rng = random.Random(seed)
    entropy = [rng.uniform(0.2, 2) for _ in range(n)]
    return made([h + rng.uniform(0.1, 1.5) for h in entropy], entropy, **kws)


def only(table: pd.DataFrame, **kws) -> pd.Series:
    """The summary of a table of one task."""
    summary = summarize(table, **kws)
    assert list(summary["task"]) == [table["task"].iloc[0], "all"]
    return summary.iloc[0]


class TestBetaTable:
    def test_one_row_a_prompt_with_the_columns_of_the_contract(self):
        table = made([0.5, 4.0], [1.0, 2.0], task=["math", "code"], seed=3)
        assert tuple(table.columns) == COLUMNS
        assert COLUMNS == ("form", "seed", "task", "prompt", "beta", "scale", "ref_entropy", "ref_entropy_se")
        assert table.to_dict("records")[1] == {
            "form": "inverse",
            "seed": 3,
            "task": "code",
            "prompt": "p1",
            "beta": 4.0,
            "scale": 0.25,
            "ref_entropy": 2.0,
            "ref_entropy_se": 0.1,
        }

    @pytest.mark.parametrize(("form", "expected"), [("inverse", [2.0, 0.25]), ("standard", [0.5, 4.0])])
    def test_scale_is_what_multiplies_h(self, form, expected):
        assert list(made([0.5, 4.0], [1.0, 1.0], form=form)["scale"]) == expected

    def test_takes_tensors_on_a_graph_arrays_and_series(self):
        beta = torch.tensor([1.0, 2.0], requires_grad=True) * 2
        table = beta_table(
            form="standard",
            seed=0,
            task=pd.Series(["math", "code"], index=[7, 3]),
            prompt=np.array(["a", "b"]),
            beta=beta,
            ref_entropy=pd.Series([1, 2], index=[7, 3]),
            ref_entropy_se=np.array([0.0, 0.5], dtype=np.float32),
        )
        assert list(table["task"]) == ["math", "code"]
        assert list(table["beta"]) == [2.0, 4.0]
        assert list(table["ref_entropy"]) == [1.0, 2.0]
        assert all(table[column].dtype == np.float64 for column in COLUMNS[4:])

    def test_takes_bfloat16(self):
        assert list(made(torch.tensor([0.5, 4.0], dtype=torch.bfloat16), [1.0, 2.0])["beta"]) == [0.5, 4.0]

    def test_same_prompt_in_another_task_is_another_row(self):
        assert len(made([1.0, 1.0], [1.0, 1.0], task=["math", "code"], prompts=["a", "a"])) == 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"form": "direct"}, "form: got 'direct'"),
            ({"beta": [1.0]}, r"beta: got shape \(1,\), expected \(2,\)"),
            ({"beta": torch.ones(2, 1)}, r"beta: got shape \(2, 1\), expected \(2,\)"),
            ({"beta": [1.0, 0.0]}, r"beta: not positive in rows \[1\]"),
            ({"beta": [float("inf"), 1.0]}, r"beta: not finite in rows \[0\]"),
            ({"ref_entropy": [1.0, float("nan")]}, r"ref_entropy: not finite in rows \[1\]"),
            ({"ref_entropy": [1.0, -0.1]}, r"ref_entropy: negative in rows \[1\]"),
            ({"ref_entropy_se": [-1.0, 0.0]}, r"ref_entropy_se: negative in rows \[0\]"),
            ({"ref_entropy_se": 0.1}, r"ref_entropy_se: got shape \(\)"),
            ({"task": ["math"]}, "task: got 1 rows, expected 2"),
            ({"task": ["math", "all"]}, "task: got 'all', expected another name"),
            ({"prompt": ["a", "a"]}, "prompt: 1 rows repeat.*'a' in 'math'"),
            ({"prompt": []}, "prompt: got no rows"),
        ],
    )
    def test_refuses(self, change, message):
        good = {
            "form": "inverse",
            "seed": 0,
            "task": ["math", "math"],
            "prompt": ["a", "b"],
            "beta": [1.0, 2.0],
            "ref_entropy": [1.0, 1.0],
            "ref_entropy_se": [0.1, 0.1],
        }
        assert len(beta_table(**good)) == 2
        with pytest.raises(ValueError, match=message):
            beta_table(**good | change)


class TestSummarize:
    def test_a_row_per_form_and_task_and_one_over_all(self):
        tasks = ["poetry", "dialogue", "code", "essay", "math", "math"]
        both = [made(range(1, 7), range(6), form=form, task=tasks) for form in ("standard", "inverse")]
        summary = summarize(pd.concat(both))
        order = ["math", "code", "dialogue", "essay", "poetry", "all"]
        assert EXPECTED_ORDER == ("math", "code", "dialogue")
        assert list(summary["task"]) == order * 2
        assert list(summary["form"]) == ["inverse"] * 6 + ["standard"] * 6
        assert list(summary["n"]) == [2, 1, 1, 1, 1, 6] * 2

    def test_medians_quartiles_and_means(self):
        beta, entropy = [0.3, 2.0, 0.7, 5.0], [0.5, 0.1, 0.9, 0.2]
        row = only(made(beta, entropy))
        q1, median, q3 = statistics.quantiles(beta, method="inclusive")
        assert row["beta_q1"] == pytest.approx(q1, **EXACT)
        assert row["beta_median"] == pytest.approx(median, **EXACT)
        assert row["beta_q3"] == pytest.approx(q3, **EXACT)
        assert row["scale_median"] == pytest.approx(statistics.median(1 / b for b in beta), **EXACT)
        assert row["ref_entropy_mean"] == pytest.approx(statistics.fmean(entropy), **EXACT)

    @pytest.mark.parametrize(
        ("code", "math", "share"),
        [
            ([1.0, 2.0], 1.4, 3 / 4),  # two of two: the median is 1, 1.5 or 2 with 1/4, 1/2, 1/4
            ([1.0, 2.0, 3.0], 1.5, 20 / 27),  # three of three: it is 1 in 7 cases of 27, 2 in 13, 3 in 7
            ([1.0, 2.0, 3.0], 2.5, 20 / 27),  # code is the lower one
            ([1.0, 1.0], 2.0, 1.0),
            ([2.0, 2.0], 2.0, 0.0),  # a tie is no order
        ],
    )
    def test_how_surely_the_medians_keep_their_order(self, code, math, share):
        beta = [*code, math, math]
        table = made(beta, [1.0] * len(beta), task=["code"] * len(code) + ["math"] * 2)
        alone = made([1.0, 2.0, 3.0], [1.0] * 3, form="standard", task=["code", "code", "math"])
        got = summarize(pd.concat([table, alone]), n_boot=20_000)
        # 20000 resamples: standard error 0.003, four of these
        assert got["order_share"][:3].tolist() == pytest.approx([share] * 3, abs=0.012)
        assert got["order_share"][3:].isna().all()  # one prompt says nothing

    def test_one_task_has_no_order(self):
        assert summarize(made([1.0, 2.0], [1.0, 1.0]))["order_share"].isna().all()

    def test_three_tasks_are_one_order(self):
        beta = [1.0, 1.1, 2.0, 2.1, 0.1, 10.0]  # dialogue's median is 0.1, 5.05 or 10: above the others with 3/4
        table = made(beta, [1.0] * 6, task=["math", "math", "code", "code", "dialogue", "dialogue"])
        assert summarize(table, n_boot=20_000)["order_share"].unique() == pytest.approx([0.75], abs=0.012)

    @pytest.mark.parametrize(
        ("later", "math", "share"),
        [
            ([9.0, 10.0], 5.2, 3 / 4),  # the medians are 5, 5.5 and 6; apart, 1, 1, 9, 10 could be drawn as well
            ([9.0], 3.0, 3 / 4),  # p1 is in the first seed alone: 5, 2 and 2, against the whole's 2
        ],
    )
    def test_a_prompts_seeds_are_drawn_together(self, later, math, share):
        code = [made(beta, [1.0] * len(beta), seed=seed, task="code") for seed, beta in enumerate([[1.0, 2.0], later])]
        table = pd.concat([*code, made([math, math], [1.0, 1.0])])
        assert summarize(table, n_boot=20_000)["order_share"].unique() == pytest.approx([share], abs=0.012)

    # few distinct values, so that ties are common
    @given(
        st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=3, max_size=12).filter(
            lambda rows: all(len({row[i] for row in rows}) > 1 for i in (0, 1))
        )
    )
    @settings(max_examples=40)
    def test_rho_is_scipys_with_ties(self, rows):
        beta, entropy = zip(*rows, strict=True)
        expected = stats.spearmanr(beta, entropy).statistic
        assert only(made(beta, entropy), n_boot=100)["rho"] == pytest.approx(expected, **EXACT)

    def test_interval_is_scipys_percentile_bootstrap(self):
        table = noisy()
        row = only(table)
        expected = stats.bootstrap(
            (table["beta"], table["ref_entropy"]),
            lambda b, h: stats.spearmanr(b, h).statistic,
            paired=True,
            vectorized=False,
            method="percentile",
            n_resamples=1000,
            rng=1,
        ).confidence_interval
        # the width is about 0.4; its ends scatter by 0.01 (2000 draws) and 0.015 (1000): 4 sd of the difference
        assert row["rho_low"] == pytest.approx(expected.low, abs=0.07)
        assert row["rho_high"] == pytest.approx(expected.high, abs=0.07)
        assert expected.high - expected.low > 0.3

    def test_draws_follow_the_seed(self):
        table = noisy()
        pd.testing.assert_series_equal(only(table), only(table))
        assert only(table)["rho_low"] != only(table, seed=1)["rho_low"]

    def test_rows_of_several_seeds_are_not_more_prompts(self):
        one, four = noisy(), pd.concat([noisy().assign(seed=seed) for seed in range(4)])
        same = ["n", "beta_median", "rho", "rho_low", "rho_high"]  # quartiles interpolate between other rows
        assert list(only(one)[same]) == pytest.approx(list(only(four)[same]), **EXACT)
        # the control: as many prompts as rows, and the interval is about half as wide
        prompts = four["prompt"] + four["seed"].astype(str)
        more = only(four.assign(prompt=prompts, seed=0))
        widths = [row["rho_high"] - row["rho_low"] for row in (only(one), more)]
        assert widths[1] < 0.65 * widths[0]
        assert more["n"] == 4 * only(four)["n"]

    def test_same_prompt_in_another_task_is_another_prompt(self):
        table = made(
            [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], task=["math", "math", "code", "code"], prompts=[*"abab"]
        )
        assert list(summarize(table)["n"]) == [2, 2, 4]

    def test_a_prompt_may_be_missing_in_a_seed(self):
        rows = pd.concat([noisy(), noisy(seed=5).assign(seed=1).iloc[:17]])
        row = only(rows)
        assert row["n"] == 30
        expected = stats.spearmanr(rows["beta"], rows["ref_entropy"]).statistic
        assert row["rho"] == pytest.approx(expected, **EXACT)
        assert row["rho_low"] < row["rho"] < row["rho_high"]

    def test_pooled_can_have_the_other_sign_than_every_task(self):
        beta = [1.3, 1.2, 1.1, 2.3, 2.2, 2.1, 3.3, 3.2, 3.1]
        entropy = [0.1, 0.2, 0.3, 1.1, 1.2, 1.3, 2.1, 2.2, 2.3]
        task = [name for name in ("math", "code", "dialogue") for _ in range(3)]
        rho = summarize(made(beta, entropy, task=task)).set_index("task")["rho"]
        assert list(rho[["math", "code", "dialogue"]]) == pytest.approx([-1, -1, -1], **EXACT)
        assert rho["all"] > 0.5

    @pytest.mark.parametrize(
        ("beta", "entropy"), [([2.0] * 5, range(5)), (range(1, 6), [0.7] * 5), ([1.0, 2.0], [0.0, 1.0])]
    )
    def test_no_rho_without_variation_or_three_prompts(self, beta, entropy):
        row = only(made(beta, entropy))
        assert np.isnan([row["rho"], row["rho_low"], row["rho_high"]]).all()
        assert row["beta_median"] > 0

    def test_resamples_without_rho_leave_an_interval(self):
        # one resample in nine draws one of the three prompts three times
        row = only(made([1.0, 2.0, 3.0], [0.3, 0.1, 0.9]))
        assert (row["rho_low"], row["rho_high"]) == pytest.approx((-1, 1), **EXACT)

    @pytest.mark.parametrize(
        ("change", "kws", "message"),
        [
            (lambda t: t.drop(columns=["scale", "seed"]), {}, r"table: missing columns \['seed', 'scale'\]"),
            (lambda t: t.iloc[:0], {}, "table: got no rows"),
            (lambda t: pd.concat([t, t.iloc[:1]]), {}, "prompt: 1 rows repeat.*'p0'"),
            (lambda t: t.assign(task="all"), {}, "task: got 'all'"),
            (lambda t: t, {"n_boot": 99}, "n_boot: got 99, expected at least 100"),
        ],
    )
    def test_refuses(self, change, kws, message):
        with pytest.raises(ValueError, match=message):
            summarize(change(noisy()), **kws)


def scored(h: dict[str, list[float]], *, task=None, group=None) -> pd.DataFrame:
    """A row per variant and pair; every pair has a prompt of its own."""
    n = len(next(iter(h.values())))
    pairs = {"task": task or ["math"] * n, "group": group or [None] * n, "prompt": [f"p{i}" for i in range(n)]}
    return pd.concat([pd.DataFrame({"variant": variant, **pairs, "h": values}) for variant, values in h.items()])


class TestSummarizeAccuracy:
    def test_by_hand(self):
        out = summarize_accuracy(
            scored(
                {"inverse": [1.0, -2.0, 0.5, 3.0], "fixed": [1.0, -2.0, -0.5, 0.0]},
                task=["code", "math", "math", "math"],
            ),
            baseline="fixed",
        )
        assert list(zip(out["variant"], out["task"], out["n"], strict=True)) == [
            (variant, task, n) for variant in ("inverse", "fixed") for task, n in (("math", 3), ("code", 1), ("all", 4))
        ]
        assert out["accuracy"].tolist() == pytest.approx([2 / 3, 1, 3 / 4, 0.5 / 3, 1, 1.5 / 4], **EXACT)
        assert out["difference"].tolist()[:3] == pytest.approx([1.5 / 3, 0, 1.5 / 4], **EXACT)
        assert out["difference"].isna().tolist() == [False] * 3 + [True] * 3

    @pytest.mark.slow
    def test_intervals_are_those_of_resampled_groups(self):
        """Against a bootstrap that draws whole groups of rows, with pandas and another generator."""
        rng = np.random.default_rng(3)
        group = [f"g{i // 3}" for i in range(90)]
        shared = np.repeat(rng.normal(size=30), 3)  # pairs of a group agree
        data = scored({"a": (shared + 0.2).tolist(), "fixed": shared.tolist()}, group=group)
        out = summarize_accuracy(data, baseline="fixed", n_boot=4000).set_index(["variant", "task"]).loc[("a", "math")]
        rows = (
            data[data["variant"] == "a"]
            .assign(right=lambda d: d["h"] > 0)
            .groupby("group")["right"]
            .agg(["sum", "size"])
        )
        draws = [rows.sample(len(rows), replace=True, random_state=i) for i in range(4000)]
        boot = [draw["sum"].sum() / draw["size"].sum() for draw in draws]
        # two bootstraps of 4000: the quantiles scatter by about 0.005
        low, high = np.quantile(boot, [0.025, 0.975])
        assert (out["accuracy_low"], out["accuracy_high"]) == pytest.approx((low, high), abs=0.015)
        assert out["groups"] == 30
        # the control: pairs drawn by themselves would look surer than they are
        alone = summarize_accuracy(data.assign(group=None), baseline="fixed").set_index(["variant", "task"])
        narrow = alone.loc[("a", "math"), "accuracy_high"] - alone.loc[("a", "math"), "accuracy_low"]
        assert narrow < 0.75 * (high - low)

    def test_the_difference_is_paired(self):
        rng = np.random.default_rng(0)
        h = rng.normal(size=200)
        out = summarize_accuracy(scored({"a": h.tolist(), "fixed": (h * 3).tolist()}), baseline="fixed")
        same = out[(out["variant"] == "a") & (out["task"] == "all")].iloc[0]
        # the variants rank every pair alike: no resample can tell them apart, though each accuracy is uncertain
        assert same[["difference", "difference_low", "difference_high"]].tolist() == [0, 0, 0]
        assert same["accuracy_high"] - same["accuracy_low"] > 0.1

    def test_pairs_of_one_prompt_are_drawn_together_where_there_is_no_group(self):
        data = scored({"fixed": [1.0, 1.0, -1.0, -1.0]})
        data["prompt"] = ["p", "p", "q", "q"]
        assert summarize_accuracy(data, baseline="fixed")["groups"].tolist() == [2, 2]

    def test_refuses(self):
        data = scored({"a": [1.0, 2.0], "fixed": [1.0, -2.0]})
        with pytest.raises(ValueError, match="baseline: got 'none', expected one of"):
            summarize_accuracy(data, baseline="none")
        with pytest.raises(ValueError, match="missing columns \\['h'\\]"):
            summarize_accuracy(data.drop(columns="h"), baseline="fixed")
        with pytest.raises(ValueError, match="have other pairs"):
            summarize_accuracy(data.iloc[:-1], baseline="fixed")
        with pytest.raises(ValueError, match="n_boot: got 10"):
            summarize_accuracy(data, baseline="fixed", n_boot=10)
        with pytest.raises(ValueError, match="all"):
            summarize_accuracy(data.assign(task="all"), baseline="fixed")

    def test_a_group_called_like_a_prompt_is_not_that_prompt(self):
        data = scored({"fixed": [1.0, -1.0]}, group=["p1", None])
        assert summarize_accuracy(data, baseline="fixed")["groups"].tolist() == [2, 2]


class TestSummarizeEstimators:
    @staticmethod
    def table(estimator="per_token", **groups):
        rows = [(estimator, task, value) for task, values in groups.items() for value in values]
        return pd.DataFrame(rows, columns=["estimator", "task", "entropy"])

    def test_by_hand(self):
        table = pd.concat(
            [
                self.table(math=[1.0, 2.0, 3.0], code=[10.0, 12.0]),
                self.table("sequence", math=[90.0, 110.0, 100.0], code=[40.0, 60.0]),
            ]
        )
        got = summarize_estimators(table)
        assert got["estimator"].tolist() == ["per_token"] * 2 + ["sequence"] * 2
        assert got["task"].tolist() == ["math", "code"] * 2
        assert got["n"].tolist() == [3, 2, 3, 2]
        assert got["mean"].tolist() == [2, 11, 100, 50]
        # sd 1 over sqrt(3); sd sqrt(2) over sqrt(2); sd 10 over sqrt(3); sd sqrt(200) over sqrt(2)
        assert got["se"].tolist() == pytest.approx([3**-0.5, 1, 10 * 3**-0.5, 10])
        assert got["order"].tolist() == ["math < code"] * 2 + ["code < math"] * 2
        assert got["order_share"].tolist() == [1] * 4  # no resample mixes ranges that do not overlap

    def test_the_share_is_the_probability_of_the_order(self):
        # the bootstrap's mean of two is 0, 1/2 or 1 with 1/4, 1/2, 1/4, against 0.4 that does not vary
        got = summarize_estimators(self.table(code=[0.0, 1.0], math=[0.4, 0.4]), n_boot=20_000)
        assert got["order"].unique() == ["math < code"]
        # 20000 resamples: standard error 0.003, four of these
        assert got["order_share"].tolist() == pytest.approx([0.75] * 2, abs=0.012)

    def test_ties_are_no_order(self):
        assert summarize_estimators(self.table(code=[1.0, 1.0], math=[1.0, 1.0]))["order_share"].tolist() == [0, 0]

    def test_three_tasks_are_one_order(self):
        table = self.table(math=[1.0, 1.1], code=[2.0, 2.1], dialogue=[0.0, 10.0])
        got = summarize_estimators(table, n_boot=20_000)
        assert got["order"].unique() == ["math < code < dialogue"]
        # dialogue's resampled mean is 0, 5 or 10: above the others with probability 3/4
        assert got["order_share"].tolist() == pytest.approx([0.75] * 3, abs=0.012)

    def test_one_prompt_has_no_standard_error_and_one_task_no_order(self):
        got = summarize_estimators(self.table(math=[1.0]))
        assert np.isnan(got["se"][0])
        assert (got["order"][0], got["order_share"][0]) == ("math", 1)

    def test_repeatable(self):
        draw = np.random.default_rng(0)
        table = self.table(math=draw.normal(size=20), code=draw.normal(size=20))
        a, b, other = (summarize_estimators(table, seed=seed) for seed in (0, 0, 1))
        assert a.equals(b)
        assert not a.equals(other)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.drop(columns="task"), r"missing columns \['task'\]"),
            (lambda t: t.iloc[:0], "got no rows"),
            (lambda t: t.assign(entropy=float("nan")), r"entropy: not finite in rows \[0\]"),
        ],
    )
    def test_refused(self, change, message):
        with pytest.raises(ValueError, match=message):
            summarize_estimators(change(self.table(math=[1.0])))


# names and texts that a reader of CSV takes for numbers, for missing values, for formulas, or for the end of a row
ODD = (
    "1", "007", "1e5", "1_000", "-1", "+1", "inf", "NA", "N/A", "None", "nan", "NaN", "null", "", "True", "false",
    "=1+1", "@sum", "\t=1", "\r=1", "\n", "'", "'=1", "''x", "＝1", '"', ",", "a\rb", "a\r\nb", "a\0b", "\ufeffx",
    " x ", "2026-01-01", "$x$", "_x", "讲个笑话", "<b>&", "{{ x }}", "#x", "\\N",
)  # fmt: skip


def odd_table() -> pd.DataFrame:
    n = len(ODD)
    group = pd.Series([None if i % 3 else text for i, text in enumerate(ODD)], dtype=object)
    text = {
        name: ODD[i:] + ODD[:i] for i, name in enumerate(("task", "prompt", "answer", "variant", "form", "estimator"))
    }
    numbers = {
        "seed": range(n),
        "beta": np.random.default_rng(0).normal(size=n) * 1e-7,
        "example": [True, False] * (n // 2),
    }
    kl = [np.nan, 0.1 + 0.2, np.inf, 5e-324, *[1.0] * (n - 4)]
    return pd.DataFrame({**text, "group": group, **numbers, "kl": kl, f"beta/{ODD[0]}": 2.5})


class TestFiles:
    def test_text_and_numbers_survive_whatever_they_look_like(self, tmp_path):
        table = odd_table()
        write_table(table, tmp_path / "t.csv")
        back = read_table(tmp_path / "t.csv")
        assert list(back.columns) == list(table.columns)
        for name in table:
            got, expected = back[name].tolist(), table[name].tolist()
            assert all(a == b or (a != a and b != b) for a, b in zip(got, expected, strict=True)), name
        assert back["group"].isna().sum() == len([i for i in range(len(ODD)) if i % 3])
        assert all(text is None for text in back["group"][back["group"].isna()])
        assert back["example"].dtype == bool and back["seed"].dtype == np.int64 and back["kl"].dtype == np.float64
        # the control: pandas' guesses lose most of them
        guessed = pd.read_csv(tmp_path / "t.csv")["task"].tolist()
        assert sum(a != b for a, b in zip(guessed, ODD, strict=True)) > 10

    def test_no_cell_is_a_formula_for_a_spreadsheet(self, tmp_path):
        write_table(odd_table(), tmp_path / "t.csv")
        with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        cells = [row[name] for row in rows for name in ("task", "prompt", "answer", "group")]
        assert not [cell for cell in cells if cell.startswith(tuple("=+-@\t\r\n"))]
        assert "'=1+1" in cells and "''=1" in cells

    @pytest.mark.slow
    @given(
        st.lists(
            st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False)),
            min_size=1,
            max_size=5,
        )
    )
    def test_any_text_and_any_number(self, tmp_path_factory, rows):
        path = tmp_path_factory.mktemp("t") / "t.csv"
        table = pd.DataFrame(rows, columns=["prompt", "beta"])
        write_table(table, path)
        back = read_table(path)
        assert list(back.itertuples(index=False, name=None)) == rows

    def test_a_column_with_its_name_of_version_0_1(self, tmp_path):
        (tmp_path / "t.csv").write_text('"arm","h"\n"inverse",0.5\n', encoding="utf-8")
        assert read_table(tmp_path / "t.csv").to_dict("records") == [{"variant": "inverse", "h": 0.5}]

    def test_a_column_of_one_empty_text(self, tmp_path):
        write_table(pd.DataFrame({"prompt": ["", "x", ""]}), tmp_path / "t.csv")
        assert read_table(tmp_path / "t.csv")["prompt"].tolist() == ["", "x", ""]

    def test_no_rows(self, tmp_path):
        write_table(pd.DataFrame({"prompt": [], "beta": []}), tmp_path / "t.csv")
        back = read_table(tmp_path / "t.csv")
        assert list(back.columns) == ["prompt", "beta"] and back.empty

    def test_a_file_from_before_the_apostrophes(self, tmp_path):
        (tmp_path / "t.csv").write_text("task,prompt,answer,beta\nmath,'tis,,0.5\n", encoding="utf-8")
        assert read_table(tmp_path / "t.csv").to_dict("records") == [
            {"task": "math", "prompt": "'tis", "answer": "", "beta": 0.5}
        ]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"note": ["a", "b"]}, "column 'note' holds text, expected numbers"),
            ({"task": ["math", None]}, r"column 'task' has no text in rows \[1\]"),
        ],
    )
    def test_refuses_to_write_what_would_not_come_back(self, tmp_path, change, message):
        with pytest.raises(ValueError, match=message):
            write_table(pd.DataFrame({"task": ["math", "code"], "beta": [1.0, 2.0]} | change), tmp_path / "t.csv")
        assert not list(tmp_path.iterdir())

    def test_refuses_to_read_text_as_numbers(self, tmp_path):
        (tmp_path / "t.csv").write_text("task,beta\nmath,much\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"t\.csv: column 'beta' holds text .*'much'"):
            read_table(tmp_path / "t.csv")

    def test_summaries_of_odd_names_are_the_same_after_reading(self, tmp_path):
        names = [*ODD[:16], "=1+1"]
        parts = [noisy(4, seed=i, task=name) for i, name in enumerate(names)]
        table = pd.concat(parts, ignore_index=True)
        write_table(table, tmp_path / "t.csv")
        pd.testing.assert_frame_equal(
            summarize(read_table(tmp_path / "t.csv"), n_boot=100), summarize(table, n_boot=100), check_dtype=False
        )


def test_no_torch():
    tree = ast.parse(Path(tables.__file__).read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert not [module for module in imported if module.split(".")[0] == "torch"]
