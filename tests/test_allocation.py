"""Reward per nat from samples: identities by enumeration, estimators by hand, intervals by simulation."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpoviz.allocation import allocate, gain_bound, reward_per_nat, reward_per_nat_of_pairs
from dpoviz.tabular import bradley_terry, optimal_policy, tilt_moments


def scored(slopes, prompts, answers, seed, noise=1.0):
    """h, reward, prompt and task of answers whose reward rises by the task's slope, from a level of each prompt."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(len(slopes), prompts, answers))
    reward = np.array(slopes)[:, None, None] * h + noise * rng.normal(size=h.shape)
    reward += 3 * rng.normal(size=(len(slopes), prompts, 1))
    shape = h.shape
    task = np.broadcast_to(np.arange(len(slopes))[:, None, None], shape).ravel()
    prompt = np.arange(len(slopes) * prompts).repeat(answers)
    return {"h": h.ravel(), "reward": reward.ravel(), "prompt": prompt, "task": [f"task {t}" for t in task]}


def estimate(data, **settings):
    return reward_per_nat(data["h"], data["reward"], prompt=data["prompt"], task=data["task"], **settings)


def a_table(slope, variance=1.0, se=0.0, prompts=1):
    return pd.DataFrame(
        {"task": [f"task {i}" for i in range(len(slope))], "slope": slope, "se": se, "variance": variance,
         "prompts": prompts}
    )  # fmt: skip


class TestRewardPerNat:
    def test_by_hand(self):
        # prompt x: deviations h ∓1, r ∓2; prompt y: h −2, 0, 2 with r 1, 1, 4 → −1, −1, 2
        found = reward_per_nat(
            [0.0, 2.0, -2.0, 0.0, 2.0], [5.0, 9.0, 1.0, 1.0, 4.0], prompt=list("xxyyy"), task=["math"] * 5
        ).set_index("task")
        covariance, variance = (4.0 / 1 + 6.0 / 2) / 2, (2.0 / 1 + 8.0 / 2) / 2
        for row in ("math", "all"):
            assert found.loc[row, "slope"] == pytest.approx(covariance / variance)
            assert found.loc[row, "variance"] == pytest.approx(variance)
            assert found.loc[row, ["prompts", "answers"]].tolist() == [2, 5]

    def test_levels_of_prompts_play_no_part(self):
        data = scored((0.5, 0.1), 20, 4, 0)
        level = np.random.default_rng(1).normal(size=40)[data["prompt"]]
        moved = {**data, "h": data["h"] + 50 * level, "reward": data["reward"] - 9 * level}
        np.testing.assert_allclose(estimate(moved)["slope"], estimate(data)["slope"], rtol=1e-9)
        # the control: regression over all answers would be led astray
        assert np.polyfit(moved["h"], moved["reward"], 1)[0] < 0

    def test_is_the_exact_slope_of_a_tabular_policy(self):
        """All answers, each as often as the reference draws it: the table's Cov/Var; m/(m − 1) in the variance."""
        draw = torch.Generator().manual_seed(0)
        counts = torch.randint(1, 6, (4, 5), generator=draw)
        counts[:, 0] += 30 - counts.sum(1)  # the same number of answers at each prompt
        h, reward = torch.randn(2, 4, 5, generator=draw, dtype=torch.float64)
        moments = tilt_moments((counts.double() / 30).log(), h, reward, 0.0)
        row, answer = (torch.repeat_interleave(t.flatten(), counts.flatten()) for t in
                       torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij"))  # fmt: skip
        found = reward_per_nat(h[row, answer], reward[row, answer], prompt=row, task=(row // 2).tolist())
        for task in (0, 1):
            own = slice(2 * task, 2 * task + 2)
            expected = moments.covariance[own].sum() / moments.variance[own].sum()
            assert found["slope"][task] == pytest.approx(float(expected), rel=1e-12)
            assert found["variance"][task] == pytest.approx(float(moments.variance[own].mean()) * 30 / 29, rel=1e-12)

    @pytest.mark.slow
    def test_interval_covers_and_narrows(self):
        """95 % of 100 worlds of 40 prompts are 95, SD 2.2; the percentile bootstrap falls a bit short."""
        inside = width = 0
        for seed in range(100):
            found = estimate(scored((0.3,), 40, 3, seed), resamples=300).iloc[0]
            inside += found["low"] <= 0.3 <= found["high"]
            width += found["high"] - found["low"]
        assert 87 <= inside <= 100
        wide = estimate(scored((0.3,), 10, 3, 0)).iloc[0]
        assert wide["high"] - wide["low"] > 1.4 * width / 100

    def test_tasks_are_strata_and_prompts_the_unit(self):
        data = scored((0.5, 0.1), 15, 4, 3)
        found = estimate(data)
        assert found["task"].tolist() == ["task 0", "task 1", "all"]
        assert found["prompts"].tolist() == [15, 15, 30] and found["answers"].tolist() == [60, 60, 120]
        # the same answers four times over are no more prompts
        again = {name: np.tile(values, 4) for name, values in data.items()}
        assert estimate(again)["se"][0] == pytest.approx(found["se"][0], rel=0.1)

    def test_is_seeded_and_takes_tensors_and_columns(self):
        data = scored((0.5, 0.1), 8, 3, 4)
        first = estimate(data, seed=1)
        pd.testing.assert_frame_equal(first, estimate(data, seed=1))
        assert not first["low"].equals(estimate(data, seed=2)["low"])
        frame = pd.DataFrame(data)
        other = reward_per_nat(torch.tensor(data["h"], requires_grad=True), frame["reward"], prompt=frame["prompt"],
                               task=frame["task"], seed=1)  # fmt: skip
        pd.testing.assert_frame_equal(first, other)

    def test_one_prompt_has_no_interval(self):
        found = reward_per_nat([0.0, 1.0], [0.0, 2.0], prompt=["x", "x"], task=["math"] * 2)
        assert found["slope"].tolist() == [2.0, 2.0] and found[["se", "low", "high"]].isna().all(axis=None)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"h": [0.0, 1.0, math.nan, 3.0]}, r"h: .*rows \[2\]"),
            ({"reward": [[0.0]] * 4}, r"reward: got shape \(4, 1\)"),
            ({"reward": ["good"] * 4}, r"reward: got list without numbers"),
            ({"h": [0.0, 1.0, 2.0]}, r"h, reward, prompt, task: got \[3, 4, 4, 4\] rows"),
            ({"prompt": ["x", "x", "y", "z"]}, r"prompt: got 1 answer for 'y', 'z' \(2 prompts\)"),
            ({"task": ["m", "c", "m", "m"]}, r"task: got 'x' in several tasks"),
            ({"task": ["all"] * 4}, r"task: got 'all'"),
            ({"task": ["m", "m", None, None]}, r"task: got missing values in rows \[2, 3\]"),
            ({"h": [1.0, 1.0, 0.0, 2.0], "task": ["m", "m", "c", "c"]}, r"h: got no variation in task 'm'"),
            ({"h": [], "reward": [], "prompt": [], "task": []}, r"h: got shape \(0,\)"),
            ({"resamples": 5}, r"resamples: got 5"),
        ],
    )
    def test_bad_input(self, changed, message):
        good = {"h": [0.0, 1.0, 2.0, 3.0], "reward": [0.0, 1.0, 0.0, 1.0], "prompt": list("xxyy"), "task": ["m"] * 4}
        both = {**good, **changed}
        with pytest.raises(ValueError, match=message):
            reward_per_nat(both.pop("h"), both.pop("reward"), **both)


class TestOfPairs:
    @given(st.integers(0, 10_000), st.floats(0.1, 4.0))
    @settings(max_examples=20)
    def test_is_the_slope_of_the_win_rate(self, seed, reliability):
        """½·E[h]/E[h²] = Cov(u, h)/Var(h), u the win rate, over all pairs of draws: by enumeration."""
        draw = torch.Generator().manual_seed(seed)
        ref_logps = torch.log_softmax(torch.randn(1, 5, generator=draw, dtype=torch.float64), 1)
        h, rewards = torch.randn(2, 1, 5, generator=draw, dtype=torch.float64)
        wins = torch.sigmoid(bradley_terry(reliability * rewards))[0]
        p = ref_logps[0].exp()
        utility = (wins @ p)[None]
        expected = float(tilt_moments(ref_logps, h, utility, 0.0).slope)
        chosen = 2 * p[:, None] * p * wins  # of (chosen, rejected), each unordered pair once, a tie half each way
        difference = h[0][:, None] - h[0]
        first, second = float((chosen * difference).sum()), float((chosen * difference**2).sum())
        assert 0.5 * first / second == pytest.approx(expected, rel=1e-9, abs=1e-12)

    def test_is_that_ratio(self):
        h = [1.0, -0.5, 2.0, 0.25, -1.0]
        found = reward_per_nat_of_pairs(h, task=["a", "a", "a", "b", "b"])
        mean, square = np.mean(h), np.mean(np.square(h))
        assert found["slope"][2] == pytest.approx(0.5 * mean / square)
        assert found["slope"][0] == pytest.approx(0.5 * np.mean(h[:3]) / np.mean(np.square(h[:3])))
        assert found["variance"][2] == pytest.approx(square / 2)
        assert found["prompts"].tolist() == [3, 2, 5] and found["answers"].tolist() == [6, 4, 10]

    def test_sampled_pairs_of_a_tabular_world(self):
        """60,000 pairs of independent answers: within four standard errors of the exact slope, and not of twice it."""
        draw = torch.Generator().manual_seed(5)
        ref_logps = torch.log_softmax(torch.randn(1, 6, generator=draw, dtype=torch.float64), 1)
        rewards = torch.randn(1, 6, generator=draw, dtype=torch.float64)
        h = optimal_policy(ref_logps, rewards, 1.0) - ref_logps
        preferences = torch.sigmoid(bradley_terry(2 * rewards))[0]
        exact = float(tilt_moments(ref_logps, h, (preferences @ ref_logps[0].exp())[None], 0.0).slope)
        y, other = torch.multinomial(ref_logps[0].exp(), 120_000, replacement=True, generator=draw).view(2, -1)
        won = torch.rand(60_000, generator=draw, dtype=torch.float64) < preferences[y, other]
        found = reward_per_nat_of_pairs((h[0, y] - h[0, other]) * (2.0 * won - 1), task=["m"] * 60_000, resamples=100)
        assert abs(found["slope"][0] - exact) < 4 * found["se"][0] < 0.2 * exact

    def test_pairs_of_a_prompt_belong_together(self):
        h = np.random.default_rng(0).normal(0.3, 1.0, size=40)
        alone = reward_per_nat_of_pairs(np.tile(h, 5), task=["m"] * 200)
        together = reward_per_nat_of_pairs(np.tile(h, 5), task=["m"] * 200, prompt=np.tile(np.arange(40), 5))
        assert together["slope"][0] == pytest.approx(alone["slope"][0])
        assert together["se"][0] > 1.8 * alone["se"][0]  # √5, the bootstrap's own noise aside
        with pytest.raises(ValueError, match="task: got 1 in several tasks"):
            reward_per_nat_of_pairs([1.0, 2.0], task=["a", "b"], prompt=[1, 1])


class TestGainBound:
    @given(st.lists(st.tuples(st.floats(0.05, 2.0), st.floats(0.1, 5.0)), min_size=2, max_size=5))
    @settings(max_examples=30)
    def test_is_the_formula(self, rows):
        b, v = np.array(rows).T
        mean = (v * b).sum() / v.sum()
        cv2 = (v * (b - mean) ** 2).sum() / v.sum() / mean**2
        assert gain_bound(a_table(b, v), resamples=100).plain == pytest.approx(math.sqrt(1 + cv2) - 1, abs=1e-12)

    def test_known_slopes_have_no_interval(self):
        found = gain_bound(a_table([0.5, 0.3, 0.1]))
        exact = math.sqrt(3 * (0.25 + 0.09 + 0.01)) / 0.9 - 1
        assert [*found] == pytest.approx([exact] * 4, rel=0.02)  # the sizes that are tried are 1/40 apart

    def test_weights(self):
        table = a_table([0.5, 0.1], prompts=[30, 10])
        assert gain_bound(table).plain == pytest.approx(math.sqrt(4 * (3 * 0.25 + 0.01)) / 1.6 - 1)
        assert gain_bound(table, weight={"task 0": 1, "task 1": 1}).plain == pytest.approx(math.sqrt(0.52) / 0.6 - 1)

    def test_no_task_with_a_gain_and_no_gain_on_the_whole(self):
        assert gain_bound(a_table([-0.1, -0.2])).plain == 0
        assert gain_bound(a_table([0.1, -0.3])).plain == math.inf
        found = gain_bound(a_table([0.1, -0.3], se=0.1))
        assert [*found] == [math.inf, 0.0, math.inf, math.inf] and "one constant gains next to nothing" in str(found)
        assert "could gain more than 13.9 %" in str(gain_bound(a_table([0.5, 0.3, 0.1])))

    @pytest.mark.slow
    @pytest.mark.parametrize(("slopes", "exact"), [((0.3, 0.3, 0.3), 0.0), ((0.5, 0.3, 0.1), 0.1386)])
    def test_interval_covers(self, slopes, exact):
        """Of 60 worlds; the plain formula would call it 3 % where all tasks are alike."""
        found = [gain_bound(estimate(scored(slopes, 30, 4, seed), resamples=200), resamples=500) for seed in range(60)]
        inside = sum(own.low - 1e-9 <= exact <= own.high for own in found)
        assert inside >= 51  # 57 expected, SD 1.7; the bootstrap falls a bit short
        middle, plain = (np.median([getattr(own, name) for own in found]) for name in ("bound", "plain"))
        assert abs(middle - exact) < 0.025
        if exact == 0:
            assert plain > 0.02 and np.mean([own.low < 1e-9 for own in found]) > 0.9
        else:
            assert np.mean([own.low > 0 for own in found]) > 0.3

    @pytest.mark.parametrize(
        ("table", "settings_", "message"),
        [
            (a_table([0.1]).drop(columns="slope"), {}, "table: got no column slope"),
            (pd.concat([a_table([0.1])] * 2), {}, "table: got tasks"),
            (a_table([math.nan, 0.1]), {}, "table: got slopes"),
            (a_table([0.2, 0.1], variance=[1.0, 0.0]), {}, "table: got slopes or variances"),
            (a_table([0.2, 0.1], se=[0.1, math.nan]), {}, "table: got no standard error for 'task 1'"),
            (a_table([0.2, 0.1]), {"weight": {"math": 1.0}}, r"weight: got tasks \['math'\]"),
            (a_table([0.2, 0.1]), {"weight": {"task 0": 0.0, "task 1": 0.0}}, "weight: got"),
        ],
    )
    def test_bad_input(self, table, settings_, message):
        with pytest.raises(ValueError, match=message):
            gain_bound(table, **settings_)


class TestAllocate:
    TABLE = a_table([0.4, 0.2, -0.1], variance=[1.0, 2.0, 1.0])

    def test_price(self):
        found = allocate(self.TABLE, price=0.1)
        assert found["a"].tolist() == pytest.approx([4.0, 2.0, 0.0])
        assert found["kl"].tolist() == pytest.approx([8.0, 4.0, 0.0])

    def test_budget_is_met_and_nothing_else_is_better(self):
        found = allocate(self.TABLE, kl=0.05)
        assert found["kl"].mean() == pytest.approx(0.05)
        cov = self.TABLE["slope"] * self.TABLE["variance"]
        best = (found["a"] * cov).sum()
        rng = np.random.default_rng(0)
        for _ in range(200):
            a = np.abs(found["a"] + 0.1 * rng.normal(size=3))
            a *= math.sqrt(0.15 / (a**2 * self.TABLE["variance"] / 2).sum())
            assert (a * cov).sum() <= best + 1e-12
        one = math.sqrt(0.15 / (self.TABLE["variance"] / 2).sum())
        assert best / (one * cov).sum() - 1 == pytest.approx(gain_bound(self.TABLE).plain)

    def test_beta_to_train_with(self):
        """s goes to s/a: π_ref·exp(ẑ/s) goes a times as far."""
        standard = allocate(self.TABLE, price=0.1, beta=0.2, form="standard")
        inverse = allocate(self.TABLE, price=0.1, beta=5.0, form="inverse")
        assert standard["beta"].tolist() == pytest.approx([0.05, 0.1, math.inf])
        assert inverse["beta"].tolist() == pytest.approx([20.0, 10.0, 0.0])
        assert "beta" not in allocate(self.TABLE, price=0.1)

    def test_shrinking(self):
        alike = a_table([0.5, 0.3, 0.1], se=0.3)
        assert allocate(alike, price=1.0, shrink=True)["slope"].tolist() == pytest.approx([0.3] * 3)
        apart = a_table([0.5, 0.3, 0.1], se=0.001)
        assert allocate(apart, price=1.0, shrink=True)["slope"].tolist() == pytest.approx([0.5, 0.3, 0.1], rel=1e-3)
        between = allocate(a_table([0.5, 0.3, 0.1], se=0.1), price=1.0, shrink=True)["slope"]
        assert 0.3 < between[0] < 0.5 and 0.1 < between[2] < 0.3

    def test_the_pooled_row_is_left_out(self):
        table = estimate(scored((0.5, 0.1), 10, 3, 0))
        assert allocate(table, kl=0.1)["task"].tolist() == ["task 0", "task 1"]

    @pytest.mark.parametrize(
        ("settings_", "message"),
        [
            ({}, "kl, price: got None and None"),
            ({"kl": 0.1, "price": 1.0}, "kl, price: got 0.1 and 1.0"),
            ({"kl": 0.0}, "kl: got 0.0"),
            ({"price": math.inf}, "price: got inf"),
            ({"price": True}, "price: got True"),
            ({"kl": 0.1, "beta": 0.1}, "beta, form: got 0.1 and None"),
            ({"kl": 0.1, "beta": -0.1, "form": "standard"}, "beta: "),
            ({"kl": 0.1, "beta": 0.1, "form": "other"}, "form: "),
        ],
    )
    def test_bad_input(self, settings_, message):
        with pytest.raises(ValueError, match=message):
            allocate(self.TABLE, **settings_)

    def test_a_budget_with_nowhere_to_go(self):
        with pytest.raises(ValueError, match="table: got slopes"):
            allocate(a_table([-0.1, -0.2]), kl=0.1)
        assert allocate(a_table([-0.1, -0.2]), price=1.0)["a"].tolist() == [0.0, 0.0]
