"""Re-tilting in the exact world: derivatives, the best allocation, its bound, finite data and the path of training.

The theorems are the assertions; each has a control that fails. The limits are tested as
well: the slope condition is exact under the best policy only, the bound is of leading order in KL, the least point of
the U takes the fall of c with κ, and which way the sign turns with training depends on the number of labels.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from dpoviz.allocation import gain_bound
from dpoviz.losses import dpo_loss
from dpoviz.tabular import (
    Task,
    TaskWorld,
    best_tilt,
    bradley_terry,
    descend,
    first_order_beta,
    fit_logits,
    kl,
    optimal_policy,
    sample_tasks,
    sample_wins,
    tilt_moments,
    tilt_to_budget,
    tilted_policy,
)

EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64: sums of at most a few hundred numbers of size up to 1e2


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tables(seed: int, prompts: int = 3, answers: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """A reference, a direction and rewards that go with it in part."""
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(3, prompts, answers, generator=draw, dtype=torch.float64)
    return torch.log_softmax(normal[0], 1), normal[1], normal[2] + 0.7 * normal[1]


def of_groups(values: Tensor, groups: Tensor) -> Tensor:
    """Means over the prompts of each group."""
    count = int(groups.max()) + 1
    return torch.zeros(count, dtype=torch.float64).index_add_(0, groups, values) / groups.bincount()


def slopes(ref_logps: Tensor, h: Tensor, rewards: Tensor, groups: Tensor, a: float | Tensor = 0.0) -> pd.DataFrame:
    """The exact table of `reward_per_nat`: no noise."""
    found = tilt_moments(ref_logps, h, rewards, a)
    variance = of_groups(found.variance, groups)
    slope = of_groups(found.covariance, groups) / variance
    return pd.DataFrame(
        {"task": range(len(slope)), "slope": slope, "se": 0.0, "variance": variance, "prompts": groups.bincount()}
    )


def gain(ref_logps: Tensor, h: Tensor, rewards: Tensor, budget: float, a: Tensor) -> float:
    """What an allocation earns more than one factor for all at equal KL, of what that earns over the reference."""
    start = float((ref_logps.exp() * rewards).sum(1).mean())
    one = tilt_to_budget(ref_logps, h, rewards, 1.0, budget).reward - start
    return (tilt_to_budget(ref_logps, h, rewards, a, budget).reward - start) / one - 1


seeds, factors = st.integers(0, 10_000), st.floats(-3.0, 3.0)


class TestTiltedPolicy:
    def test_by_hand(self):
        # odds of 1:3 under the reference, times exp(2·log 3) : 1 = 9, give 3:1
        policy = tilted_policy(f64([[0.25, 0.75]]).log(), f64([[math.log(3), 0.0]]), 2.0)
        torch.testing.assert_close(policy.exp(), f64([[0.75, 0.25]]), **EXACT)

    @given(seeds, st.floats(0.1, 3.0))
    @settings(max_examples=20)
    def test_ends_and_optimal_policy(self, seed, a):
        ref_logps, _, rewards = tables(seed)
        policy = torch.log_softmax(rewards.flip(1), 1)
        h = policy - ref_logps
        torch.testing.assert_close(tilted_policy(ref_logps, h, 1.0), policy, **EXACT)
        torch.testing.assert_close(tilted_policy(ref_logps, h, 0.0), ref_logps, **EXACT)
        torch.testing.assert_close(tilted_policy(ref_logps, rewards, a), optimal_policy(ref_logps, rewards, 1 / a))
        shifted = h + f64([[3.0], [-1.0], [0.0]])
        torch.testing.assert_close(tilted_policy(ref_logps, shifted, a), tilted_policy(ref_logps, h, a), **EXACT)

    def test_own_factor_per_prompt(self):
        ref_logps, h, _ = tables(0)
        together = tilted_policy(ref_logps, h, f64([0.0, -1.0, 2.0]))
        for row, a in enumerate((0.0, -1.0, 2.0)):
            torch.testing.assert_close(together[row], tilted_policy(ref_logps, h, a)[row], **EXACT)
        assert (together[1] - together[2]).abs().max() > 0.1

    @pytest.mark.parametrize(
        ("a", "message"),
        [(math.nan, "a: got nan"), (True, "a: got True"), ("1", "a: got '1'"), (f64([1.0, 2.0]), r"a: .*shape \(2,\)")],
    )
    def test_bad_factors(self, a, message):
        with pytest.raises(ValueError, match=message):
            tilted_policy(*tables(0)[:2], a)

    def test_bad_tables(self):
        ref_logps, h, rewards = tables(0)
        with pytest.raises(ValueError, match=r"h: .*shape"):
            tilted_policy(ref_logps, h[:2], 1.0)
        with pytest.raises(ValueError, match="h: not finite in rows"):
            tilt_moments(ref_logps, h / 0.0, rewards, 1.0)


class TestDerivatives:
    @given(seeds, factors)
    @settings(max_examples=30)
    def test_moments_are_those_of_an_enumeration(self, seed, a):
        ref_logps, h, rewards = tables(seed)
        found = tilt_moments(ref_logps, h, rewards, a)
        for x in range(len(h)):
            weights = [math.exp(lp + a * v) for lp, v in zip(ref_logps[x].tolist(), h[x].tolist(), strict=True)]
            p = [w / math.fsum(weights) for w in weights]

            def mean(values, p=p):
                return math.fsum(w * v for w, v in zip(p, values, strict=True))

            r, v = rewards[x].tolist(), h[x].tolist()
            covariance = mean([(s - mean(r)) * (t - mean(v)) for s, t in zip(r, v, strict=True)])
            variance = mean([(t - mean(v)) ** 2 for t in v])
            distance = mean([math.log(w) - lp for w, lp in zip(p, ref_logps[x].tolist(), strict=True)])
            assert found.reward[x].item() == pytest.approx(mean(r), abs=1e-12)
            assert found.covariance[x].item() == pytest.approx(covariance, abs=1e-12)
            assert found.variance[x].item() == pytest.approx(variance, abs=1e-12)
            assert found.kl[x].item() == pytest.approx(distance, abs=1e-12)
            assert found.slope[x].item() == pytest.approx(covariance / variance, rel=1e-9)

    @given(seeds, factors)
    @settings(max_examples=30)
    def test_are_the_finite_differences(self, seed, a):
        ref_logps, h, rewards = tables(seed)
        step = 1e-5
        up, down = (tilt_moments(ref_logps, h, rewards, a + sign * step) for sign in (1, -1))
        here = tilt_moments(ref_logps, h, rewards, a)
        # central differences: truncation step²·κ₄ ~ 1e-9 for h of size 3, rounding 1e-16/1e-5
        close = {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close((up.reward - down.reward) / (2 * step), here.covariance, **close)
        torch.testing.assert_close((up.kl - down.kl) / (2 * step), a * here.variance, **close)

    def test_how_the_slope_changes(self):
        """b_a = b_0 + a·(κ(r,h,h) − b_0·κ(h,h,h))/Var(h): the slope is not one number."""
        ref_logps, h, rewards = tables(1)
        p = ref_logps.exp()
        dh, dr = (t - (p * t).sum(1, keepdim=True) for t in (h, rewards))
        here = tilt_moments(ref_logps, h, rewards, 0.0)
        predicted = ((p * dr * dh**2).sum(1) - here.slope * (p * dh**3).sum(1)) / here.variance
        up, down = (tilt_moments(ref_logps, h, rewards, sign * 1e-4).slope for sign in (1, -1))
        torch.testing.assert_close((up - down) / 2e-4, predicted, rtol=1e-5, atol=1e-7)
        assert predicted.abs().max() > 0.05

    def test_kl_keeps_its_digits_near_the_reference(self):
        ref_logps, h, rewards = tables(2)
        a = 1e-7
        found = tilt_moments(ref_logps, h, rewards, a)
        torch.testing.assert_close(found.kl, a**2 * found.variance / 2, rtol=1e-5, atol=0)


class TestTheBestAllocation:
    def test_its_slope_over_its_factor_is_one_price(self):
        ref_logps, h, rewards = tables(3, prompts=12)
        best = best_tilt(ref_logps, h, rewards, 0.3)
        moved = best.a > 1e-6
        assert moved.sum() > 6
        prices = (tilt_moments(ref_logps, h, rewards, best.a).slope / best.a)[moved]
        torch.testing.assert_close(prices, prices.mean().expand_as(prices), rtol=1e-3, atol=0)  # SLSQP's tolerance
        # with moments under the reference it is not exact at this distance
        near = (tilt_moments(ref_logps, h, rewards, 0.0).slope / best.a)[moved]
        assert (near / near.mean() - 1).abs().max() > 0.05

    def test_no_allocation_on_a_grid_is_better(self):
        ref_logps, h, rewards = tables(4, prompts=6)
        groups = torch.tensor([0, 0, 1, 1, 2, 2])
        best = best_tilt(ref_logps, h, rewards, 0.2, groups=groups)
        assert best.kl <= 0.2 * (1 + 1e-6)
        highest = -math.inf
        for angles in itertools.product(np.linspace(0, math.pi / 2, 13), repeat=2):
            direction = f64([math.cos(angles[0]), math.sin(angles[0]) * math.cos(angles[1]),
                             math.sin(angles[0]) * math.sin(angles[1])]).clamp(min=0)  # fmt: skip
            highest = max(highest, tilt_to_budget(ref_logps, h, rewards, direction[groups], 0.2).reward)
        assert best.reward >= highest - 1e-9
        # the grid comes close: steps of 0.13 rad cost some thousandths
        assert best.reward < highest + 5e-3

    def test_the_reward_itself_needs_no_beta_of_x(self):
        """§1: where the policy has the true reward, one price is best, and `optimal_policy` has it."""
        ref_logps, _, rewards = tables(5, prompts=8)
        best = best_tilt(ref_logps, rewards, rewards, 0.5)
        torch.testing.assert_close(best.a, best.a.mean().expand_as(best.a), rtol=1e-3, atol=0)
        torch.testing.assert_close(first_order_beta(ref_logps, rewards, rewards, 0.4), f64([0.4] * 8), **EXACT)

    def test_first_order_beta_against_direct_minimisation(self):
        """Per prompt, β* = λ·Var/Cov to an error that halves when the price doubles; KL* = Cov²/(2λ²Var) likewise."""
        ref_logps, logits, rewards = tables(6, prompts=8)
        moments = tilt_moments(ref_logps, logits, rewards, 0.0)
        rising = moments.slope > 0.1
        errors, distances = [], []
        for price in (20.0, 40.0):
            found = []
            for x in rising.nonzero().flatten():
                row = slice(x, x + 1)

                def cost(a, row=row, price=price):
                    here = tilt_moments(ref_logps[row], logits[row], rewards[row], float(a))
                    return float(price * here.kl - here.reward)

                expected = float(moments.slope[x] / price)
                found.append(minimize_scalar(cost, bounds=(0, 3 * expected), method="bounded",
                                             options={"xatol": 1e-7 * expected}).x)  # fmt: skip
            best = 1 / f64(found)
            formula = first_order_beta(ref_logps, logits, rewards, price)[rising]
            errors.append((formula / best - 1).abs().max().item())
            reached = tilt_moments(ref_logps[rising], logits[rising], rewards[rising], f64(found)).kl
            near = (moments.covariance**2 / (2 * price**2 * moments.variance))[rising]
            distances.append((reached / near - 1).abs().max().item())
        assert errors[0] < 0.1 and distances[0] < 0.2
        assert errors[1] == pytest.approx(errors[0] / 2, rel=0.15)
        assert distances[1] == pytest.approx(distances[0] / 2, rel=0.25)

    def test_a_direction_against_the_reward_stays(self):
        ref_logps, h, _ = tables(7, prompts=2)
        rewards = torch.stack([h[0], -h[1]])
        best = best_tilt(ref_logps, h, rewards, 0.1)
        assert best.a[0] > 0.1 and best.a[1] == pytest.approx(0, abs=1e-9)
        beta = first_order_beta(ref_logps, h, rewards, 1.0)
        assert beta[0].item() == pytest.approx(1.0) and beta[1] == math.inf

    def test_going_back_and_forth_between_slope_and_factor_reaches_the_oracle(self):
        """a ← √(a·b_a), scaled to the budget: no optimiser, and the same reward. The reference's slope falls short."""
        world, logits = fitted_cells()
        start = slopes(world.ref_logps, logits, world.rewards, world.task)["slope"].clip(lower=0)
        direction = f64(start.tolist())
        near = gain(world.ref_logps, logits, world.rewards, 0.3, direction[world.task])
        for _ in range(12):
            a = tilt_to_budget(world.ref_logps, logits, world.rewards, direction[world.task], 0.3).a
            slope = slopes(world.ref_logps, logits, world.rewards, world.task, a)["slope"].clip(lower=0).tolist()
            direction = (of_groups(a, world.task) * f64(slope)).sqrt()
        best = best_tilt(world.ref_logps, logits, world.rewards, 0.3, groups=world.task)
        reached = gain(world.ref_logps, logits, world.rewards, 0.3, direction[world.task])
        oracle = gain(world.ref_logps, logits, world.rewards, 0.3, best.a)
        assert reached == pytest.approx(oracle, abs=2e-3)
        assert near < oracle - 0.02

    @pytest.mark.parametrize(
        ("settings_", "message"),
        [
            ({"budget": 0.0}, "budget: got 0.0"),
            ({"budget": 50.0}, "budget: got 50.0 nats, expected less than"),
            ({"budget": math.inf}, "budget: got inf"),
            ({"groups": torch.tensor([0, 2, 2])}, "groups: got the numbers"),
            ({"groups": torch.tensor([0, 1])}, "groups: got"),
            ({"groups": f64([0, 1, 1])}, "groups: got"),
        ],
    )
    def test_bad_input(self, settings_, message):
        with pytest.raises(ValueError, match=message):
            best_tilt(*tables(0), **{"budget": 0.1, **settings_})

    @pytest.mark.parametrize("direction", [f64([1.0, -0.1, 1.0]), 0.0])
    def test_bad_direction(self, direction):
        with pytest.raises(ValueError, match="direction: got"):
            tilt_to_budget(*tables(0), direction, 0.1)

    @given(seeds, st.floats(0.001, 0.5))
    @settings(max_examples=15)
    def test_tilt_to_budget_spends_it_along_the_direction(self, seed, budget):
        ref_logps, h, rewards = tables(seed)
        weights = f64([0.5, 0.3, 0.2])
        direction = f64([1.0, 2.0, 0.0])
        found = tilt_to_budget(ref_logps, h, rewards, direction, budget, prompt_probs=weights)
        policy = tilted_policy(ref_logps, h, found.a)
        assert float(weights @ kl(policy, ref_logps)) == pytest.approx(budget, rel=1e-9)
        assert found.reward == pytest.approx(float(weights @ (policy.exp() * rewards).sum(1)), rel=1e-12)
        torch.testing.assert_close(found.a / found.a[0], direction, **EXACT)


class TestFittedLogits:
    def test_true_preferences_give_the_reward(self):
        """The population's counts of Bradley-Terry labels: ẑ = κ·r, up to a constant."""
        _, _, rewards = tables(8)
        logits = fit_logits(100 * torch.sigmoid(bradley_terry(2 * rewards)), ridge=1e-9)
        torch.testing.assert_close(logits, 2 * (rewards - rewards.mean(1, keepdim=True)), rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("s", [0.3, 2.0])
    def test_a_converged_policy_is_the_tilt_by_one_over_s(self, s):
        """s·h = ẑ whatever s is, by another optimiser on `dpo_loss` itself."""
        world = sample_tasks([Task(2.0, 1)], prompts=2, answers=4, generator=torch.Generator().manual_seed(0))
        draw = torch.Generator().manual_seed(1)
        wins = 50 * torch.sigmoid(world.preference_logits) + torch.rand(2, 4, 4, generator=draw, dtype=torch.float64)
        logits = world.ref_logps.clone().requires_grad_()
        x, chosen, rejected = wins.nonzero(as_tuple=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0.0,
                                      line_search_fn="strong_wolfe")  # fmt: skip

        def closure():
            optimizer.zero_grad()
            policy = torch.log_softmax(logits, 1)
            rows = (policy[x, chosen], policy[x, rejected], world.ref_logps[x, chosen], world.ref_logps[x, rejected])
            loss = (wins[x, chosen, rejected] * dpo_loss(*rows, s, form="standard").losses).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        fitted = fit_logits(wins, ridge=1e-9)
        expected = tilted_policy(world.ref_logps, fitted, 1 / s)
        torch.testing.assert_close(torch.log_softmax(logits.detach(), 1), expected, rtol=0, atol=1e-6)
        assert (tilted_policy(world.ref_logps, fitted, 1.1 / s) - expected).abs().max() > 1e-2

    def test_separable_pairs_stay_finite_and_unjoined_answers_level(self):
        wins = torch.zeros(1, 4, 4, dtype=torch.float64)
        wins[0, 0, 1] = 5.0  # 2 and 3 were never compared
        logits = fit_logits(wins, ridge=1e-3)
        assert 5 < logits[0, 0] - logits[0, 1] < 20
        torch.testing.assert_close(logits[0, 2:], f64([0.0, 0.0]), **EXACT)
        assert logits[0, 0].item() == pytest.approx(-logits[0, 1].item())

    @pytest.mark.parametrize(
        ("wins", "ridge", "message"),
        [
            (torch.ones(1, 2, 2), 1.0, "wins: "),
            (-torch.ones(1, 2, 2, dtype=torch.float64), 1.0, "wins: got"),
            (torch.ones(2, 3, 4, dtype=torch.float64), 1.0, "wins: got"),
            (torch.ones(1, 2, 2, dtype=torch.float64), 0.0, "ridge: got"),
        ],
    )
    def test_bad_input(self, wins, ridge, message):
        with pytest.raises(ValueError, match=message):
            fit_logits(wins, ridge=ridge)


class TestSampledWorlds:
    def test_counts_and_frequencies(self):
        ref_logps, _, rewards = tables(9, prompts=2, answers=3)
        preferences = bradley_terry(rewards)
        draw = torch.Generator().manual_seed(0)
        wins = sample_wins(ref_logps, preferences, torch.tensor([20_000, 7]), generator=draw)
        assert wins.sum((1, 2)).tolist() == [20_000, 7]
        assert (wins.diagonal(dim1=1, dim2=2) == 0).all()
        both = (ref_logps[0].exp()[:, None] * ref_logps[0].exp()).fill_diagonal_(0)
        expected = 2 * both / both.sum() * torch.sigmoid(preferences[0])
        # four standard errors of a frequency of at most ½ among 20,000
        torch.testing.assert_close(wins[0] / 20_000, expected / expected.sum(), rtol=0, atol=0.015)

    @given(st.floats(0, 0.49), st.floats(0.1, 8.0))
    @settings(max_examples=10)
    def test_flips_mix_the_label_with_its_opposite(self, flips, reliability):
        kinds = [Task(reliability, 1, flips=flips), Task(1.0, 1, spread=3.0, sharpness=0.0)]
        world = sample_tasks(kinds, prompts=3, answers=4, generator=torch.Generator().manual_seed(1))
        p = torch.sigmoid(bradley_terry(reliability * world.rewards[:3]))
        expected = (1 - flips) * p + flips * (1 - p)
        torch.testing.assert_close(torch.sigmoid(world.preference_logits[:3]), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(world.ref_logps[3:].exp(), torch.full((3, 4), 0.25, dtype=torch.float64), **EXACT)
        assert world.task.tolist() == [0, 0, 0, 1, 1, 1]

    @pytest.mark.parametrize(
        ("kinds", "message"),
        [([], "kinds.*: got 0"), ([Task(flips=0.5)], "kinds: got Task"), ([Task(reliability=0.0)], "kinds: got Task"),
         ([Task(pairs=0)], "pairs: got")],
    )  # fmt: skip
    def test_bad_input(self, kinds, message):
        with pytest.raises(ValueError, match=message):
            sample_tasks(kinds, prompts=2, answers=3, generator=torch.Generator())


# -- worlds ---------------------------------------------------------------------------------------------------

RIDGE = 0.01
"""In pairs: labels that separate leave the logits at about log(1/ridge). Training stops somewhere, too."""

CELLS = [
    Task(reliability, pairs, spread, sharpness, flips)
    for reliability, pairs, spread, sharpness, flips in itertools.product(
        (0.5, 1.5, 6.0), (8, 64), (0.5, 1.0), (0.5, 2.0), (0.0, 0.2)
    )
]
"""Reliability × pairs × spread × entropy × flips: 48 cells."""

SHARPNESS, RELIABILITY = (2.5, 1.6, 0.5), (6.0, 2.5, 1.5)
WORLDS = {
    "W1: reliabilities 6/2.5/1.5, 4 pairs": [Task(k, 4, 1, s) for k, s in zip(RELIABILITY, SHARPNESS, strict=True)],
    "W2: the same, 64 pairs": [Task(k, 64, 1, s) for k, s in zip(RELIABILITY, SHARPNESS, strict=True)],
    "W3: 16 pairs, flips 0/.1/.35": [
        Task(k, 16, 1, s, f) for k, s, f in zip(RELIABILITY, SHARPNESS, (0, 0.1, 0.35), strict=True)
    ],
    "W4: 2/8/64 pairs": [Task(2.5, n) for n in (2, 8, 64)],
    "W5: reliabilities .5/2/8, 256 pairs": [Task(k, 256) for k in (0.5, 2, 8)],
    "W6: flips 0/.2/.4": [Task(4, 16, flips=f) for f in (0, 0.2, 0.4)],
    "W7: all alike": [Task(2.5, 16)] * 3,
}


def a_world(kinds: list[Task], seed: int, prompts: int = 40, answers: int = 12) -> tuple[TaskWorld, Tensor]:
    world = sample_tasks(kinds, prompts=prompts, answers=answers, generator=torch.Generator().manual_seed(seed))
    return world, fit_logits(world.wins, ridge=RIDGE)


@lru_cache
def fitted_cells() -> tuple[TaskWorld, Tensor]:
    return a_world(CELLS, 1, prompts=8)


class TestFormulaAgainstOracle:
    @staticmethod
    def correlation(budget: float) -> tuple[float, int]:
        """Log-log, of the oracle's a with the slope under the reference, over the cells in which both are positive."""
        world, logits = fitted_cells()
        slope = slopes(world.ref_logps, logits, world.rewards, world.task)["slope"].to_numpy()
        best = best_tilt(world.ref_logps, logits, world.rewards, budget, groups=world.task)
        a = of_groups(best.a, world.task).numpy()
        both = (a > 0) & (slope > 0)
        return float(np.corrcoef(np.log(a[both]), np.log(slope[both]))[0, 1]), int(both.sum())

    def test_agree_where_the_step_is_small(self):
        r, cells = self.correlation(0.01)
        assert r >= 0.99 and cells >= 40

    def test_part_where_it_is_not(self):
        assert self.correlation(0.5)[0] < 0.97


def oracle_and_bound(kinds: list[Task], seed: int, budget: float) -> tuple[float, float]:
    world, logits = a_world(kinds, seed)
    bound = gain_bound(slopes(world.ref_logps, logits, world.rewards, world.task), resamples=100).plain
    best = best_tilt(world.ref_logps, logits, world.rewards, budget, groups=world.task)
    return gain(world.ref_logps, logits, world.rewards, budget, best.a), bound


class TestBoundAgainstOracle:
    @pytest.mark.parametrize("name", WORLDS)
    def test_is_the_oracles_gain_at_small_kl(self, name):
        for seed in range(3):
            oracle, bound = oracle_and_bound(WORLDS[name], seed, 1e-4)
            assert oracle == pytest.approx(bound, abs=2e-3)  # of relative order √KL = 0.01

    @pytest.mark.parametrize("name", [name for name in WORLDS if not name.startswith("W5")])
    def test_within_one_and_a_half_points_at_a_tenth_of_a_nat(self, name):
        found = np.array([oracle_and_bound(WORLDS[name], seed, 0.1) for seed in range(4)])
        assert abs(found[:, 0].mean() - found[:, 1].mean()) < 0.015
        if name.startswith("W7"):
            assert found.max() < 0.003

    def test_is_of_leading_order_only(self):
        """W5 falls short of it by more than 1.5 points, and W3's oracle goes past it."""
        short, past = (
            np.mean([oracle_and_bound(WORLDS[name], seed, 0.1) for seed in range(4)], axis=0)
            for name in ("W5: reliabilities .5/2/8, 256 pairs", "W3: 16 pairs, flips 0/.1/.35")
        )
        assert short[0] < short[1] - 0.015
        assert past[0] > past[1]

    def test_per_prompt_it_is_larger(self):
        world, logits = a_world(WORLDS["W2: the same, 64 pairs"], 0)
        each = torch.arange(len(world.task))
        by_task, by_prompt = (
            gain_bound(slopes(world.ref_logps, logits, world.rewards, groups), resamples=100).plain
            for groups in (world.task, each)
        )
        best = best_tilt(world.ref_logps, logits, world.rewards, 1e-4, groups=each)
        assert gain(world.ref_logps, logits, world.rewards, 1e-4, best.a) == pytest.approx(by_prompt, abs=5e-3)
        assert by_prompt > 2 * by_task

    def test_a_negative_slope_counts_as_none(self):
        """√(1 + CV²) would allow a factor below 0, which no positive beta gives."""
        ref_logps = torch.full((2, 4), 0.25, dtype=torch.float64).log()
        h = f64([[-1.0, 0.0, 0.0, 1.0]] * 2)
        rewards = f64([[1.0], [-0.5]]) * h
        bound = gain_bound(slopes(ref_logps, h, rewards, torch.arange(2)), resamples=100).plain
        assert bound == pytest.approx(math.sqrt(2) / 0.5 - 1)
        best = best_tilt(ref_logps, h, rewards, 1e-4)
        assert best.a[1] == pytest.approx(0, abs=1e-6)
        assert gain(ref_logps, h, rewards, 1e-4, best.a) == pytest.approx(bound, rel=0.01)
        assert math.sqrt(2 * 1.25) / 0.5 - 1 > 1.1 * bound  # what the formula without b₊ would promise


def curvature(reliability: float, spread: float = 1.0) -> float:
    """c = E[p·(1 − p)] for p = σ(κ·Δr), Δr normal with variance 2τ²."""
    width = math.sqrt(2) * reliability * spread
    density = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi) / (2 + 2 * math.cosh(width * x))  # noqa: E731
    return quad(density, -8, 8)[0]


def finite_data_beta(reliability: float, pairs: int, answers: int, spread: float = 1.0) -> float:
    """β*/λ = κ + (K − 1)/(2ncκτ²)."""
    return reliability + (answers - 1) / (2 * pairs * curvature(reliability, spread) * reliability * spread**2)


def measured_beta(
    reliability: float, pairs: int, answers: int = 12, prompts: int = 100, flips: float = 0.0, spread: float = 1.0
) -> float:
    """β*/λ = Var(ẑ)/Cov(r, ẑ), pooled over the prompts of a flat reference."""
    world, logits = a_world([Task(reliability, pairs, spread, 0.0, flips)], 0, prompts, answers)
    found = tilt_moments(world.ref_logps, logits, world.rewards, 0.0)
    return float(found.variance.mean() / found.covariance.mean())


class TestFiniteData:
    @pytest.mark.parametrize("reliability", [0.25, 1.0, 4.0])
    def test_constants_where_data_are_plenty(self, reliability):
        expected = finite_data_beta(reliability, 256 * 6, 6)
        # 100 prompts of 6 answers sample it to about 2 %; the fit is still biased by about 1/256 per nat
        assert measured_beta(reliability, 256 * 6, 6) == pytest.approx(expected, rel=0.06)
        noise = expected - reliability
        if reliability == 0.25:
            assert noise > 0.04 * expected  # and the second term is part of what is checked
            assert measured_beta(reliability, 16 * 6, 6) == pytest.approx(
                finite_data_beta(reliability, 16 * 6, 6), rel=0.25
            )

    def test_scarce_data_inflate_the_fit_beyond_the_formula(self):
        """Separation: with 4 comparisons per answer the unbiased fit that the formula supposes does not exist."""
        assert measured_beta(1.0, 4 * 6, 6) > 1.5 * finite_data_beta(1.0, 4 * 6, 6)

    def test_u_shape_in_reliability(self):
        by_pairs = {n: [measured_beta(k, n) for k in (0.5, 1.5, 6.0)] for n in (4, 64, 256)}
        few, some, many = by_pairs.values()
        assert few[0] > 2 * few[2] and few == sorted(few, reverse=True)  # the source's order of beta
        assert many[2] > 5 * many[0] and many == sorted(many)  # turned round
        assert measured_beta(0.25, 64) > some[0] < some[2]
        assert measured_beta(1.5, 16, spread=0.5) > 2 * measured_beta(1.5, 16, spread=1.0)

    def test_where_the_u_is_least(self):
        """c falls with κ: least at κ² = (1 − η)(K − 1)/(2ncτ²), η = −∂log c/∂log κ, not at η = 0."""
        for pairs, off in ((16, 1.4), (64, 1.1), (1000, 1.0)):
            lead = 11 / (2 * pairs)
            least = math.exp(
                minimize_scalar(lambda x, n=pairs: finite_data_beta(math.exp(x), n, 12), bounds=(-4, 2),
                                method="bounded", options={"xatol": 1e-8}).x
            )  # fmt: skip

            def fall(k):
                return -(math.log(curvature(k * 1.001)) - math.log(curvature(k / 1.001))) / (2 * math.log(1.001))

            corrected = brentq(lambda k, lead=lead: k * k - lead * (1 - fall(k)) / curvature(k), 1e-2, 20)
            without = brentq(lambda k, lead=lead: k * k - lead / curvature(k), 1e-2, 20)
            assert least == pytest.approx(corrected, rel=1e-4)
            assert without > off * least

    def test_flips_are_not_monotone_unless_data_are_plenty(self):
        flips = (0.0, 0.1, 0.2, 0.3, 0.4)
        few, many = ([measured_beta(6.0, n, flips=f) for f in flips] for n in (64, 256))
        assert few[0] > few[1] > few[2] and few[4] > 1.2 * min(few)
        assert many == sorted(many, reverse=True)


class TestDescend:
    def test_reaches_the_budget_along_the_gradient(self):
        """Against plain gradient descent with far smaller steps, written on its own."""
        world, _ = a_world([Task(2.0, 8)], 0, prompts=3, answers=4)
        s = f64([0.5, 1.0, 2.0])
        found = descend(world.ref_logps, world.wins, s, 0.2)
        assert kl(found, world.ref_logps).mean().item() == pytest.approx(0.2, rel=1e-3)
        logits = world.ref_logps.clone()
        while kl(torch.log_softmax(logits, 1), world.ref_logps).mean() < 0.2:
            logits.requires_grad_()
            margins = s[:, None, None] * (logits - world.ref_logps)[:, :, None]
            margins = margins - margins.mT
            loss = -(world.wins * torch.nn.functional.logsigmoid(margins)).sum((1, 2)).mean()
            (gradient,) = torch.autograd.grad(loss, logits)
            logits = logits.detach() - 5e-3 * gradient
        # Euler steps of at most 0.1 in the margins against 0.01 of the way
        torch.testing.assert_close(found, torch.log_softmax(logits, 1), rtol=0, atol=0.03)

    def test_a_short_way_is_one_gradient(self):
        world, _ = a_world([Task(2.0, 8)], 0, prompts=2, answers=4)
        moved = descend(world.ref_logps, world.wins, f64([1.0, 3.0]), 1e-8) - world.ref_logps
        direction = f64([[1.0], [3.0]]) * (world.wins.sum(2) - world.wins.sum(1))
        moved, direction = (v - v.mean(1, keepdim=True) for v in (moved, direction))
        torch.testing.assert_close(moved / moved.norm(), direction / direction.norm(), rtol=0, atol=1e-3)

    def test_a_budget_beyond_convergence(self):
        world, _ = a_world([Task(1.0, 500)], 0, prompts=1, answers=3)
        with pytest.raises(ValueError, match=r"budget: got 0\.5 nats, expected less than"):
            descend(world.ref_logps, world.wins, 20.0, 0.5, max_steps=300)


def sign_of_reliability(kinds: list[Task], s0: float, seed: int, prompts: int = 24) -> tuple[float, float]:
    """Gain of s ∝ √κ less that of s ∝ 1/√κ, trained until KL 0.3; and the mean |s·h| of the constant."""
    world, _ = a_world(kinds, seed, prompts)
    start = float((world.ref_logps.exp() * world.rewards).sum(1).mean())
    reliability = f64([kind.reliability for kind in kinds])[world.task]
    reliability = reliability / reliability.log().mean().exp()
    shares = world.wins / world.wins.sum((1, 2), keepdim=True)
    earned = []
    for power in (0.0, 0.5, -0.5):
        policy = descend(world.ref_logps, shares, s0 * reliability**power, 0.3)
        earned.append(float((policy.exp() * world.rewards).sum(1).mean()) - start)
        if power == 0:
            h = policy - world.ref_logps
            margin = float((shares * s0 * (h[:, :, None] - h[:, None, :]).abs()).sum() / shares.sum())
    return (earned[1] - earned[2]) / earned[0], margin


FLIPPED = [Task(k, 16, flips=f) for k, f in zip(RELIABILITY, (0, 0.1, 0.35), strict=True)]
CLEAN = [Task(k, 256) for k in RELIABILITY]


class TestTheSignTurnsWithTraining:
    """Which tasks should have the larger s depends on how far the labels are fitted, and on how many there are."""

    def test_with_flipped_labels_from_larger_to_smaller(self):
        early, late = (np.array([sign_of_reliability(FLIPPED, s0, seed) for seed in range(3)]) for s0 in (0.5, 3.0))
        assert early[:, 1].max() < 1 and late[:, 1].min() > 2.5
        assert early[:, 0].mean() > 0.03 and late[:, 0].mean() < -0.02

    def test_with_many_clean_labels_the_other_way(self):
        """After convergence the larger s is right, as β* → λκ says."""
        late = np.array([sign_of_reliability(CLEAN, 3.0, seed, prompts=12) for seed in range(2)])
        assert late[:, 1].min() > 2.5
        assert late[:, 0].mean() > 0.03

    @pytest.mark.slow
    def test_where_it_turns(self):
        """Over ten worlds, the margin at which neither sign is better: between 1 and 3 nats."""
        turns = []
        for seed in range(10):
            found = np.array([sign_of_reliability(FLIPPED, s0, seed) for s0 in (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)])
            after = int(np.argmax(found[:, 0] < 0))
            (y0, x0), (y1, x1) = found[after - 1], found[after]
            turns.append(x0 + (x1 - x0) * y0 / (y0 - y1))
        print(f"turns at {np.mean(turns):.2f} nats, SD {np.std(turns, ddof=1):.2f} over {len(turns)} worlds")
        assert 1 < np.mean(turns) < 3
