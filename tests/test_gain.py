"""What β(x) gained in a run: the formula against the exact world, the sentences, and allocations at equal KL."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

from dpoviz import tabular
from dpoviz.allocation import gain_bound
from dpoviz.analysis.gain import BEST, BEST_ONE, BY_SLOPE, ONE, SHUFFLED, gain_of_run, reading_of_retilt, relative_gain
from dpoviz.analysis.plots_retilt import figure_retilt
from dpoviz.experiments.retilt_config import RetiltConfig
from dpoviz.experiments.retilt_report import allocations_on, analyse
from dpoviz.lm.retilt import Line, reach
from dpoviz.translation import chinese_font, in_language


class TestFormula:
    def test_is_the_win_rate_at_small_kl_in_the_exact_world(self):
        """½ + ½·√ε·E[h]/√E[h²], of all ordered pairs by their probabilities, against a policy re-tilted to KL ε."""
        draw = torch.Generator().manual_seed(0)
        normal = torch.randn(3, 4, 6, generator=draw, dtype=torch.float64)
        ref_logps, rewards, h = torch.log_softmax(normal[0], 1), normal[1], normal[1] + normal[2]
        ref, wins = ref_logps.exp(), torch.sigmoid(tabular.bradley_terry(rewards))
        utility = (wins * ref[:, None, :]).sum(2)
        pairs = ref[:, :, None] * ref[:, None, :] * wins * 2  # a pair once, chosen first
        gap = h[:, :, None] - h[:, None, :]
        first, second = ((pairs * power).sum() / pairs.sum() for power in (gap, gap**2))
        budget = 1e-6
        tilt = tabular.tilt_to_budget(ref_logps, h, utility, 1.0, budget)
        start = float((ref * utility).sum(1).mean())
        assert start == pytest.approx(0.5)
        predicted = 0.5 * math.sqrt(budget) * float(first / second.sqrt())
        assert tilt.reward - start == pytest.approx(predicted, rel=3e-3)  # of relative order √KL = 1e-3
        assert predicted != pytest.approx(0.5 * math.sqrt(budget) * float(first / gap.abs().mean()), rel=0.1)

    def test_by_hand(self):
        h, other = pd.Series([1.0, 1.0, 2.0, 2.0]), pd.Series([1.0, 1.0, 1.0, 1.0])
        value, low, high = relative_gain(h, other, pd.Series(list("aabb")))
        assert value == pytest.approx(1.5 / math.sqrt(2.5) - 1)
        assert low == pytest.approx(value) and high == pytest.approx(0)  # resamples: aa, bb and ab
        assert relative_gain(3 * h, h, pd.Series(list("aabb"))) == pytest.approx((0, 0, 0), abs=1e-12)

    def test_pairs_of_one_group_are_resampled_together(self):
        rng = np.random.default_rng(0)
        h, other = pd.Series(rng.normal(1, 1, 200)), pd.Series(rng.normal(1, 1, 200))
        widths = []
        for copies in (1, 4):
            again = [pd.concat([column] * copies, ignore_index=True) for column in (h, other)]
            _, low, high = relative_gain(*again, pd.Series(list(range(200)) * copies))
            widths.append(high - low)
        assert widths[1] == pytest.approx(widths[0])  # copies of the same pairs say nothing new

    def test_nothing_to_gain_a_percentage_of(self):
        h = pd.Series([1.0, -1.0, 1.0, -1.2, 0.9, 1.0])
        assert relative_gain(h.abs(), h, pd.Series(range(6))) is None
        assert relative_gain(h, h.abs(), pd.Series(range(6))) is not None


def scores(variants: dict[str, float], pairs: int = 60) -> pd.DataFrame:
    """Held-out pairs of two tasks; a variant's number is the factor of h in the second task."""
    rng = np.random.default_rng(0)
    base = rng.normal([[2.0], [0.1]], 1.0, (2, pairs))
    rows = []
    for (variant, factor), (t, task) in itertools.product(variants.items(), enumerate(("math", "talk"))):
        for i, h in enumerate(base[t]):
            row = {"variant": variant, "task": task, "group": None, "prompt": f"{task} {i // 2}"}
            rows.append({**row, "h": h * (factor if t else 1.0)})
    return pd.DataFrame(rows)


class TestSection:
    def test_beside_a_baseline(self):
        given = scores({"standard": 0.3, "fixed": 1.0})
        found = gain_of_run(given, None, baseline="fixed")
        assert found.slopes["task"].tolist() == ["math", "talk", "all"] * 2
        own = found.slopes[(found.slopes["variant"] == "fixed") & (found.slopes["task"] == "talk")].iloc[0]
        h = given[(given["variant"] == "fixed") & (given["task"] == "talk")]["h"]
        assert own["slope"] == pytest.approx(h.mean() / (h**2).mean() / 2) and own["prompts"] == 30
        bound = gain_bound(found.slopes[found.slopes["variant"] == "fixed"])
        wide = {name: rows["h"].to_numpy() for name, rows in given.groupby("variant")}
        ends = [h.mean() / math.sqrt((h**2).mean()) for h in (wide["standard"], wide["fixed"])]
        sentence = found.sentences[0]
        assert f"more than {100 * bound.bound:.1f} %" in sentence
        assert f"{100 * (ends[0] / ends[1] - 1):+.1f} %".replace("-", "−") in sentence and "standard β(x)" in sentence
        assert ends[0] > ends[1]  # less of the task with the smaller slope is better

    def test_without_a_baseline_it_lies_between_two_ends(self):
        given = scores({"standard": 1.0})
        prompts = given.drop_duplicates("prompt")
        table = prompts[["task", "prompt"]].assign(form="standard", scale=np.where(prompts["task"] == "math", 1.0, 2.0))
        found = gain_of_run(given, table, baseline=None)
        s = np.where(given["task"] == "math", 1.0, 2.0)
        h = given["h"].to_numpy()
        size = lambda x: x.mean() / math.sqrt((x**2).mean())  # noqa: E731
        for other in (s * h, h / s):
            assert f"{100 * (size(h) / size(other) - 1):+.1f} %".replace("-", "−") in found.sentences[0]
        assert gain_of_run(given, None, baseline=None).sentences[0].endswith(").")

    def test_a_baseline_that_gains_nothing(self):
        given = scores({"standard": 1.0, "fixed": 1.0})
        given.loc[given["variant"] == "fixed", "h"] *= np.tile([1.0, -1.0], 60)
        found = gain_of_run(given, None, baseline="fixed")
        assert "does not gain significantly" in found.sentences[1]

    def test_too_little_to_say_anything(self):
        given = scores({"fixed": 1.0})
        assert gain_of_run(given[given["prompt"] == "math 0"], None, baseline="fixed") is None
        assert gain_of_run(given.assign(h=0.0), None, baseline="fixed") is None


class TestReach:
    def test_against_a_fine_grid(self):
        rng = np.random.default_rng(1)
        a = np.array([0.0, 0.5, 1.0, 2.0])
        lines = [Line(a, rng.normal(size=4), np.array([0, 0.1, 0.5, 2.0]) * k) for k in (1, 3)]
        for direction, cap, budget in (((1.0, 1.0), False, 0.7), ((1.0, 0.2), True, 1.4), ((0.0, 1.0), True, 0.3)):
            multiple, reward, kl = reach(lines, direction, budget, weights=(1.0, 2.0), cap=cap)
            grid = np.linspace(0, 12, 120_001)
            at = [np.minimum(grid * own, 2.0) for own in direction]
            spent = (np.interp(at[0], a, lines[0].kl) + 2 * np.interp(at[1], a, lines[1].kl)) / 3
            i = int(np.argmax(spent >= budget))
            assert multiple == pytest.approx(grid[i], abs=2e-4) and kl == pytest.approx(budget)
            earned = (np.interp(at[0], a, lines[0].reward) + 2 * np.interp(at[1], a, lines[1].reward)) / 3
            assert reward == pytest.approx(earned[i], abs=1e-3)


SLOPE, VARIANCE = {"math": 0.1, "talk": 0.4}, {"math": 2.0, "talk": 1.0}
FACTORS = np.linspace(0, 4, 33)


def sweep_rows(noise: float = 0.0, prompts: int = 12) -> pd.DataFrame:
    """Reward b·v·a and KL v·a²/2 of two tasks: what re-tilting gives to leading order."""
    rng = np.random.default_rng(2)
    rows = []
    for task, i, a, _ in itertools.product(SLOPE, range(prompts), FACTORS, range(3)):
        v = VARIANCE[task]
        h = rng.normal(0, math.sqrt(v))
        reward = SLOPE[task] * (v * a if a else h) + noise * rng.normal()
        place = {"task": task, "prompt": f"{task} {i}", "group": f"{task} {i // 2}"}
        half = ("choose", "evaluate")[i // 2 % 2]
        rows.append(
            {"variant": "standard", "a": a, **place, "half": half, "reward": reward, "h": h, "kl": v * a * a / 2}
        )
    return pd.DataFrame(rows)


class TestAllocations:
    def test_in_proportion_to_the_slopes_gains_the_bound(self):
        rows = sweep_rows()
        start = rows["a"] == 0
        rows.loc[start, "reward"] = 0.0
        slopes = pd.DataFrame({"task": list(SLOPE), "slope": SLOPE.values(), "variance": VARIANCE.values(), "se": 0.0,
                               "prompts": 1})  # fmt: skip
        first, second = (rows[rows["half"] == half] for half in ("choose", "evaluate"))
        found = allocations_on(second, slopes, first, kl=0.5, resamples=20)
        pooled = found[found["task"] == "all"].set_index("rule")
        relative = pooled["gain"] / pooled.loc[ONE, "earned"]
        # the curves are interpolated between factors an eighth apart
        assert relative[BY_SLOPE] == pytest.approx(gain_bound(slopes).plain, abs=5e-3)
        assert relative[SHUFFLED] < -0.1
        assert (pooled.loc[[ONE, BY_SLOPE, SHUFFLED], "kl"] - 0.5).abs().max() < 1e-9
        # the best of the curves lies on the grid of factors, at a little less KL
        assert 0.4 < pooled.loc[BEST, "kl"] <= 0.5 and relative[BEST] == pytest.approx(relative[BY_SLOPE], abs=0.06)
        assert pooled.loc[BEST_ONE, "gain"] <= 0 and relative[BEST] > relative[BEST_ONE]
        a = found[(found["rule"] == BY_SLOPE) & (found["task"] != "all")].set_index("task")["a"]
        assert a["talk"] / a["math"] == pytest.approx(4)
        assert pooled.loc[BY_SLOPE, "gain_low"] == pytest.approx(pooled.loc[BY_SLOPE, "gain"])  # no noise

    def test_the_default_budget_is_the_policys_own(self):
        rows = sweep_rows(0.1)
        slopes = pd.DataFrame({"task": list(SLOPE), "slope": [-1.0, 0.0]})
        first, second = (rows[rows["half"] == half] for half in ("choose", "evaluate"))
        found = allocations_on(second, slopes, first, kl=None, resamples=20)
        assert found["rule"].unique().tolist() == [ONE, BEST_ONE, BEST]
        assert found.loc[found["rule"] == ONE, "a"].to_numpy() == pytest.approx(1)
        alone = allocations_on(rows[rows["group"].str.endswith(" 1")], slopes, first, kl=None, resamples=20)
        assert alone["earned_low"].isna().all()  # one group of prompts per task has no spread
        with pytest.raises(ValueError, match="budget: got 99 nats"):
            allocations_on(rows, slopes, first, kl=99)

    @pytest.mark.parametrize("scored", [True, False])
    def test_tables_sentences_and_picture(self, scored):
        rows = sweep_rows(0.1)
        pairs = rows[rows["a"] == 0][["variant", "task", "prompt"]].assign(group=None, h=1.0)
        pairs["h"] += np.random.default_rng(0).normal(size=len(pairs))
        found = analyse(rows, pairs, RetiltConfig(kl=0.5), scored=scored)
        units = found.slopes.groupby(["unit", "half"]).size().to_dict()
        both = {("win rate", "all"): 3, ("win rate", "choose"): 3}
        assert units == both | ({("reward", "all"): 3, ("reward", "choose"): 3} if scored else {})
        assert found.sentences == reading_of_retilt(found.slopes, found.allocation)
        assert ("reward per nat" if scored else "win rate per nat") in found.sentences[0]
        left, right = figure_retilt(found.curves, found.allocation, found.slopes).axes
        assert {line.get_label() for line in left.lines} >= {"a = 1", "by slope"}
        assert [label.get_text() for label in right.get_yticklabels()] == [
            BY_SLOPE, SHUFFLED, BEST_ONE, BEST
        ]  # fmt: skip

    @pytest.mark.slow
    @pytest.mark.skipif(chinese_font() is None, reason="no font with Chinese characters")
    def test_sentences_and_picture_are_chinese_in_chinese(self):
        rows = sweep_rows(0.1)
        pairs = rows[rows["a"] == 0][["variant", "task", "prompt", "h"]].assign(group=None)
        given = scores({"standard": 0.3, "fixed": 1.0})
        table = given.drop_duplicates("prompt")[["task", "prompt"]].assign(form="standard", scale=1.0)
        nothing = given.assign(h=given["h"] * np.tile([1.0, -1.0], len(given) // 2))
        found = analyse(rows, pairs, RetiltConfig(kl=0.5), scored=True)
        with in_language("zh"):
            said = reading_of_retilt(found.slopes, found.allocation)
            said += [line for own, baseline in itertools.product((given, nothing), ("fixed", None))
                     for line in gain_of_run(own, table, baseline=baseline).sentences]  # fmt: skip
            figure = figure_retilt(found.curves, found.allocation, found.slopes)
            shown = [text.get_text() for text in figure.findobj(Text)]
        for text in said:
            assert re.search(r"[\u4e00-\u9fff]", text)
        for text in [*said, *shown]:
            assert not re.search(r"[A-Za-z]+ [a-z]+ [a-z]+", text.replace("dpoviz retilt", ""))
        assert {"按斜率", "打乱"} <= set(shown)

    def test_where_a_curve_bends_the_best_of_the_curves_is_not_that_of_the_slopes(self):
        """Math earns most at once and loses later: its slope is the largest, its best factor small."""
        rows = sweep_rows()
        rows["reward"] = np.where(rows["task"] == "math", rows["a"] - rows["a"] ** 2, 0.4 * rows["a"])
        slopes = pd.DataFrame({"task": list(SLOPE), "slope": [0.5, 0.4]})
        first, second = (rows[rows["half"] == half] for half in ("choose", "evaluate"))
        found = allocations_on(second, slopes, first, kl=2.0, resamples=20)
        gains = found[found["task"] == "all"].set_index("rule")["gain"]
        assert gains[BEST] > 0 > gains[BY_SLOPE] and gains[BEST] > gains[BEST_ONE]
        assert found[(found["rule"] == BEST) & (found["task"] == "math")]["a"].item() <= 0.5


class TestConfig:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [({"a": (0.5, 0.5)}, "a: got"), ({"a": (-1.0,)}, "a: got"), ({"a": (math.inf,)}, "a: got"),
         ({"reward": "judge"}, "reward: got 'judge'"), ({"samples": 1}, "samples: got 1"),
         ({"prompts": 1}, "prompts: got 1"), ({"kl": 0.0}, "kl: got 0.0")],
    )  # fmt: skip
    def test_bad_settings(self, changed, message):
        with pytest.raises(ValueError, match=message):
            RetiltConfig(**changed)

    def test_the_reference_and_the_policy_are_always_in_the_sweep(self):
        assert RetiltConfig(a=(2.0,)).factors == (0.0, 1.0, 2.0)
