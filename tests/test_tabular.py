"""The exact world against plain-Python twins and closed forms, and the derivation's sentences as statements."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpoviz.forms import FORMS
from dpoviz.losses import dpo_loss
from dpoviz.regularizers import entropy_penalty, range_penalty
from dpoviz.tabular import (
    bradley_terry,
    dual,
    implicit_reward,
    kl,
    kl_regularized_objective,
    log_partition,
    optimal_policy,
    population_gradient_on_beta,
    population_gradient_on_policy,
    population_loss,
    sample_pairs,
    solve_beta,
)

# float64: sums of at most a few hundred numbers of size up to 1e2
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def world(seed: int, prompts: int = 4, answers: int = 6, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
    """A reference and rewards, (X, Y) each."""
    generator = torch.Generator().manual_seed(seed)
    ref_logps = torch.log_softmax(sharpness * normal(generator, prompts, answers), 1)
    return ref_logps, normal(generator, prompts, answers)


def a_policy(seed: int, like: Tensor) -> Tensor:
    return torch.log_softmax(normal(torch.Generator().manual_seed(1000 + seed), *like.shape), 1)


def entropy(logps: Tensor) -> Tensor:
    return -(logps.exp() * logps).sum(1)


def spread(ref_logps: Tensor, rewards: Tensor) -> Tensor:
    """Standard deviation (X,) of the reward under the reference."""
    probs = ref_logps.exp()
    return (probs * (rewards - (probs * rewards).sum(1, keepdim=True)).square()).sum(1).sqrt()


def adapted(ref_logps: Tensor, preference_rewards: Tensor, beta: Tensor, form: str) -> Tensor:
    """The policy with s·h = the logit of each pair, for Bradley-Terry preferences: h follows from r/s."""
    s = 1 / beta if form == "inverse" else beta
    return torch.log_softmax(ref_logps + preference_rewards / s[:, None], 1)


def minimise(fn: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """A numerical minimiser of `fn` over logits, by a method that knows nothing of its form."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = fn(torch.log_softmax(logits, 1))
        value.backward()
        return value

    optimizer.step(closure)
    return torch.log_softmax(logits.detach(), 1)


seeds = st.integers(0, 10_000)
sharpnesses = st.floats(0.0, 4.0)
betas = st.floats(0.02, 50.0)


class TestOptimalPolicy:
    def test_by_hand(self):
        # odds of 1:3 under the reference, times exp(log 6 / 2)² : 1 = 6, give 2:1
        policy = optimal_policy(f64([[0.25, 0.75]]).log(), f64([[math.log(6), 0.0]]) * 0.5, 0.5)
        torch.testing.assert_close(policy.exp(), f64([[2 / 3, 1 / 3]]), **EXACT)

    @given(seeds, sharpnesses, betas)
    @settings(max_examples=20)
    def test_is_the_printed_formula(self, seed, sharpness, beta):
        ref_logps, rewards = world(seed, 2, 4, sharpness)
        policy = optimal_policy(ref_logps, rewards, f64([beta, 2 * beta]))
        for x, own_beta in enumerate((beta, 2 * beta)):
            shift = max(rewards[x].tolist()) / own_beta  # plain floats overflow where log space does not
            weights = [
                math.exp(lp + r / own_beta - shift)
                for lp, r in zip(ref_logps[x].tolist(), rewards[x].tolist(), strict=True)
            ]
            torch.testing.assert_close(policy[x].exp(), f64(weights) / sum(weights), rtol=1e-10, atol=1e-12)

    def test_is_a_numerical_optimum(self):
        """§3.1 to 1e-8, and the control: the optimum at another beta is elsewhere."""
        ref_logps, rewards = world(1)
        beta = f64([0.3, 0.7, 1.0, 3.0])
        found = minimise(lambda p: kl_regularized_objective(p, ref_logps, rewards, beta), a_policy(1, ref_logps))
        # the optimiser stops at gradients of 1e-13 of a cost with curvatures down to about 1e-3
        torch.testing.assert_close(found.exp(), optimal_policy(ref_logps, rewards, beta).exp(), rtol=0, atol=1e-8)
        assert (found.exp() - optimal_policy(ref_logps, rewards, 1.1 * beta).exp()).abs().max() > 1e-3

    @pytest.mark.parametrize("beta", [1e-300, 1e-6, 1e6, 1e300])
    def test_extreme_betas_stay_in_log_space(self, beta):
        ref_logps, rewards = world(2)
        policy = optimal_policy(ref_logps, 100 * rewards, beta)
        torch.testing.assert_close(policy.logsumexp(1), torch.zeros(4, dtype=torch.float64), **EXACT)

    def test_the_limits(self):
        ref_logps, rewards = world(3)
        rewards[0, 1] = rewards[0, 4] = 5.0  # two best answers: they keep the odds of the reference
        assert torch.equal(optimal_policy(ref_logps, rewards, math.inf).argmax(1), ref_logps.argmax(1))
        torch.testing.assert_close(optimal_policy(ref_logps, rewards, math.inf), ref_logps, **EXACT)
        greedy = optimal_policy(ref_logps, rewards, f64([0.0, 0.0, 0.0, 1.0]))
        odds = greedy[0].exp()
        assert (odds[[0, 2, 3, 5]] == 0).all()
        torch.testing.assert_close(odds[1] / odds[4], (ref_logps[0, 1] - ref_logps[0, 4]).exp(), **EXACT)
        # reached from beta > 0 by the other rows as well, and not where the row has its own beta
        near = optimal_policy(ref_logps, rewards, 1e-4).exp()
        torch.testing.assert_close(greedy[:3].exp(), near[:3], rtol=0, atol=1e-12)
        assert (greedy[3].exp() - near[3]).abs().max() > 0.1

    @given(seeds, betas, st.floats(-50.0, 50.0))
    @settings(max_examples=20)
    def test_a_reward_for_the_prompt_alone_changes_nothing(self, seed, beta, shift):
        ref_logps, rewards = world(seed)
        policy = optimal_policy(ref_logps, rewards, beta)
        moved = optimal_policy(ref_logps, rewards + f64([shift, 0, 1, 2])[:, None], beta)
        # r + 50 loses 1e-14 of r, which beta = 0.02 turns into 4e-13 nats
        torch.testing.assert_close(moved, policy, rtol=1e-11, atol=1e-11)
        per_answer = optimal_policy(ref_logps, rewards + f64([1, 0, 0, 0, 0, 0]), beta)
        assert not torch.allclose(per_answer, policy, rtol=0, atol=1e-3)

    def test_differentiable(self):
        ref_logps, rewards = world(4)
        beta = f64([0.5, 1.0, 2.0, 3.0])
        probs = lambda r, b: optimal_policy(ref_logps, r, b).exp()  # noqa: E731
        assert torch.autograd.gradcheck(probs, (rewards.requires_grad_(), beta.requires_grad_()))

    @pytest.mark.parametrize(
        ("ref", "rewards", "words"),
        [
            (torch.zeros(2, 3), None, r"ref_logps: got a torch\.float32 tensor"),
            ([[0.0]], None, "ref_logps: got list"),
            (f64([[0.5, 0.5], [0.2, 0.2]]).log(), None, r"ref_logps: not normalised in rows \[1\]"),
            (f64([[0.5, 0.5], [1.0, 0.0]]).log(), None, r"ref_logps: not finite in rows \[1\]"),
            (f64([[0.5, 0.5], [math.nan, 1.0]]).log(), None, r"ref_logps: nan in rows \[1\]"),
            (f64([0.5, 0.5]).log(), None, r"ref_logps: got shape \(2,\), expected \(X, Y\)"),
            (torch.zeros((0, 3), dtype=torch.float64), None, r"ref_logps: got shape \(0, 3\)"),
            (f64([[0.5, 0.5]]).log(), f64([[1.0, 2.0, 3.0]]), r"rewards: got shape \(1, 3\), expected \(1, 2\)"),
            (f64([[0.5, 0.5]]).log(), torch.ones(1, 2), r"rewards: got a torch\.float32 tensor"),
            (f64([[0.5, 0.5]]).log(), f64([[1.0, math.inf]]), r"rewards: not finite in rows \[0\]"),
        ],
    )
    def test_refuses_tables_that_are_none(self, ref, rewards, words):
        rewards = ref if rewards is None else rewards
        with pytest.raises(ValueError, match=words):
            optimal_policy(ref, rewards, 1.0)

    @pytest.mark.parametrize(
        ("beta", "words"),
        [
            (-1.0, r"beta: got \[-1\.0, -1\.0\]"),
            (math.nan, "beta: got"),
            ("1", "beta: got '1'"),
            (True, "beta: got True"),
            (None, "beta: got None"),
            (f64([[1.0], [1.0]]), r"beta: got shape \(2, 1\), expected \(2,\)"),
            (f64(1.0), r"beta: got shape \(\)"),
            (torch.ones(2), r"beta: got a torch\.float32"),
            (f64([1.0, -2.0]), r"beta: got \[-2\.0\] in rows \[1\]"),
        ],
    )
    def test_refuses_what_is_no_beta(self, beta, words):
        ref_logps, rewards = world(0, 2)
        with pytest.raises(ValueError, match=words):
            optimal_policy(ref_logps, rewards, beta)
        with pytest.raises(ValueError, match=words):
            population_loss(ref_logps, ref_logps, bradley_terry(rewards), beta, "inverse")


class TestLogPartition:
    @given(seeds, sharpnesses, betas)
    @settings(max_examples=20)
    def test_normalises_the_optimal_policy(self, seed, sharpness, beta):
        ref_logps, rewards = world(seed, 3, 5, sharpness)
        log_z = log_partition(ref_logps, rewards, beta)
        unnormalised = ref_logps + rewards / beta
        # r/beta is at most about 200: rounding of 1e-13
        torch.testing.assert_close(unnormalised - log_z[:, None], optimal_policy(ref_logps, rewards, beta), **EXACT)

    def test_by_hand(self):
        log_z = log_partition(f64([[0.25, 0.75]]).log(), f64([[math.log(4), 0.0]]), 0.5)
        torch.testing.assert_close(log_z, f64([math.log(0.25 * 16 + 0.75)]), **EXACT)

    def test_keeps_its_precision_at_large_beta(self):
        """β·log Z = E[r] + Var[r]/2β + …; the control loses it, as log Z is then 1e-12."""
        ref_logps, rewards = world(5)
        beta = 1e12
        expected = (ref_logps.exp() * rewards).sum(1)
        torch.testing.assert_close(beta * log_partition(ref_logps, rewards, beta), expected, rtol=0, atol=1e-11)
        naive = beta * torch.logsumexp(ref_logps + rewards / beta, 1)
        assert (naive - expected).abs().max() > 1e-6

    def test_a_rare_answer_that_earns_most(self):
        """At small beta the sum is 1e-30, which 1 − (1 − 1e-30) would not show."""
        ref_logps = torch.log_softmax(f64([[-30 * math.log(10), 0.0]]), 1)
        log_z = log_partition(ref_logps, f64([[1.0, 0.0]]), 0.01)
        torch.testing.assert_close(log_z, f64([100 - 30 * math.log(10)]), **EXACT)

    @pytest.mark.parametrize("beta", [0.0, math.inf, -1.0])
    def test_refuses_the_limits(self, beta):
        with pytest.raises(ValueError, match="beta: got"):
            log_partition(*world(0), beta)


class TestKL:
    def test_by_hand(self):
        value = kl(f64([[0.5, 0.5], [1.0, 0.0]]).log(), f64([[0.25, 0.75], [0.1, 0.9]]).log())
        expected = f64([0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(10)])
        torch.testing.assert_close(value, expected, **EXACT)

    @given(seeds, sharpnesses)
    @settings(max_examples=20)
    def test_is_zero_at_the_reference_and_positive_elsewhere(self, seed, sharpness):
        ref_logps, _ = world(seed, sharpness=sharpness)
        assert torch.equal(kl(ref_logps, ref_logps), torch.zeros(4, dtype=torch.float64))
        assert (kl(a_policy(seed, ref_logps), ref_logps) > 0).all()

    def test_a_probability_of_zero_has_no_nan_in_its_gradient(self):
        ref_logps, _ = world(6, 1, 3)
        logits = f64([[0.0, 1.0, -math.inf]]).requires_grad_()
        kl(torch.log_softmax(logits, 1), ref_logps).sum().backward()
        assert torch.isfinite(logits.grad).all() and logits.grad[0, 0] != 0

    def test_refuses_what_is_no_policy(self):
        ref_logps, _ = world(0, 2, 3)
        with pytest.raises(ValueError, match=r"policy_logps: not normalised in rows \[0, 1\]"):
            kl(ref_logps + 1e-6, ref_logps)
        with pytest.raises(ValueError, match=r"policy_logps: not normalised in rows \[0, 1\]"):
            kl(torch.full_like(ref_logps, -math.inf), ref_logps)
        with pytest.raises(ValueError, match=r"policy_logps: got shape \(1, 3\), expected \(2, 3\)"):
            kl(ref_logps[:1], ref_logps)
        with pytest.raises(ValueError, match=r"ref_logps: not finite in rows \[0\]"):
            kl(f64([[0.5, 0.5]]).log(), f64([[1.0, 0.0]]).log())


class TestKLRegularizedObjective:
    """§3.2: what is printed as the DPO loss."""

    def test_by_hand_with_weights(self):
        ref_logps = f64([[0.5, 0.5], [0.5, 0.5]]).log()
        policy = f64([[1.0, 0.0], [0.5, 0.5]]).log()
        rewards = f64([[3.0, 1.0], [4.0, 0.0]])
        value = kl_regularized_objective(policy, ref_logps, rewards, f64([2.0, 7.0]), prompt_probs=f64([0.25, 0.75]))
        torch.testing.assert_close(value, f64(0.25 * (-3 + 2 * math.log(2)) + 0.75 * -2), **EXACT)

    @given(seeds, sharpnesses, betas)
    @settings(max_examples=20)
    def test_every_policy_pays_its_distance_from_the_optimal_one(self, seed, sharpness, beta):
        """The cost is −E[β·log Z] + E[β·KL(π‖π*)]: π* minimises it, and nothing else does."""
        ref_logps, rewards = world(seed, sharpness=sharpness)
        best, policy = optimal_policy(ref_logps, rewards, beta), a_policy(seed, ref_logps)
        cost = kl_regularized_objective(policy, ref_logps, rewards, beta)
        least = -(beta * log_partition(ref_logps, rewards, beta)).mean()
        # sums of a few terms up to beta times 10 nats
        torch.testing.assert_close(kl_regularized_objective(best, ref_logps, rewards, beta), least, **EXACT)
        torch.testing.assert_close(cost - least, beta * kl(policy, best).mean(), **EXACT)
        assert cost > least

    def test_its_gradient_vanishes_at_the_optimal_policy(self):
        """§3.1's variation: no step that keeps the probabilities summing to 1 changes the cost at first order."""
        ref_logps, rewards = world(7)
        for policy, vanishes in ((optimal_policy(ref_logps, rewards, 0.6), True), (ref_logps, False)):
            logits = policy.clone().requires_grad_()
            kl_regularized_objective(torch.log_softmax(logits, 1), ref_logps, rewards, 0.6).backward()
            assert (logits.grad.abs().max() < 1e-14) == vanishes

    @pytest.mark.parametrize(
        ("probs", "words"),
        [
            (f64([0.5, 0.4]), r"prompt_probs: got \[0\.5, 0\.4\], expected probabilities"),
            (f64([1.5, -0.5]), "prompt_probs: got"),
            (f64([1.0]), r"prompt_probs: got shape \(1,\), expected \(2,\)"),
            (torch.tensor([0.5, 0.5]), r"prompt_probs: got a torch\.float32"),
        ],
    )
    def test_refuses_weights_that_are_no_distribution(self, probs, words):
        ref_logps, rewards = world(0, 2)
        with pytest.raises(ValueError, match=words):
            kl_regularized_objective(ref_logps, ref_logps, rewards, 1.0, prompt_probs=probs)


class TestDual:
    """§2."""

    @given(seeds, sharpnesses, st.floats(0.0, 3.0))
    @settings(max_examples=20)
    def test_is_convex_with_the_unspent_budget_as_its_slope(self, seed, sharpness, epsilon):
        ref_logps, rewards = world(seed, sharpness=sharpness)
        betas = torch.linspace(0.1, 3.0, 30, dtype=torch.float64)
        values = torch.stack([dual(ref_logps, rewards, float(b), epsilon) for b in betas])
        assert (values.diff().diff() >= -1e-12).all()  # rounding of a difference of numbers of size 1 to 10
        step = 1e-5
        for beta in (0.3, 1.0):
            ends = [dual(ref_logps, rewards, beta + d, epsilon) for d in (-step, step)]
            unspent = epsilon - kl(optimal_policy(ref_logps, rewards, beta), ref_logps).mean()
            # central differences: step² of truncation times a third derivative of up to 1e3, 1e-15/step of rounding
            torch.testing.assert_close((ends[1] - ends[0]) / (2 * step), unspent, rtol=0, atol=1e-6)

    @given(seeds, st.floats(0.01, 3.0))
    @settings(max_examples=20)
    def test_no_policy_within_the_budget_earns_more(self, seed, beta):
        ref_logps, rewards = world(seed)
        policy = a_policy(seed, ref_logps)
        spent, earned = float(kl(policy, ref_logps).mean()), (policy.exp() * rewards).sum(1).mean()
        assert dual(ref_logps, rewards, beta, spent) >= earned - 1e-12

    def test_at_zero_is_the_highest_reward(self):
        ref_logps, rewards = world(8)
        torch.testing.assert_close(dual(ref_logps, rewards, 0.0, 1.0), rewards.amax(1).mean(), **EXACT)

    def test_weighs_prompts_with_their_own_beta_and_budget(self):
        ref_logps, rewards = world(9, 2)
        beta, epsilon, probs = f64([0.5, 2.0]), f64([0.1, 0.7]), f64([0.2, 0.8])
        alone = [dual(ref_logps[i : i + 1], rewards[i : i + 1], float(beta[i]), float(epsilon[i])) for i in (0, 1)]
        together = dual(ref_logps, rewards, beta, epsilon, prompt_probs=probs)
        torch.testing.assert_close(together, 0.2 * alone[0] + 0.8 * alone[1], **EXACT)

    @pytest.mark.parametrize(
        ("beta", "epsilon", "words"), [(math.inf, 0.1, "beta: got"), (1.0, -0.1, "epsilon: got"), (1.0, "a", "eps")]
    )
    def test_refuses(self, beta, epsilon, words):
        with pytest.raises(ValueError, match=words):
            dual(*world(0), beta, epsilon)


def greedy_kl(ref_logps: Tensor, rewards: Tensor) -> Tensor:
    """By hand: minus the log of the reference's probability of the best answers."""
    probs = [
        sum(p for p, r in zip(ps, rs, strict=True) if r == max(rs))
        for ps, rs in zip(ref_logps.exp().tolist(), rewards.tolist(), strict=True)
    ]
    return -f64(probs).log()


class TestSolveBeta:
    """§1 and §2: the constrained problem, solved."""

    @given(seeds, sharpnesses, st.floats(-12.0, -1e-9), st.booleans(), st.floats(-3.0, 3.0))
    @settings(max_examples=30)
    def test_spends_the_budget_and_primal_is_dual(self, seed, sharpness, log_share, ties, log_size):
        """For every ε below the greedy KL: KL = ε and E[r] = g(β*) to 1e-10, and β* > 0 (slackness)."""
        ref_logps, rewards = world(seed, sharpness=sharpness)
        rewards = 10**log_size * (rewards.round() if ties else rewards)
        epsilon = 10**log_share * float(greedy_kl(ref_logps, rewards).mean())
        beta = solve_beta(ref_logps, rewards, epsilon)
        if epsilon == 0:  # rounded rewards can all be equal
            return
        policy = optimal_policy(ref_logps, rewards, beta)
        spent, earned = kl(policy, ref_logps).mean(), (policy.exp() * rewards).sum(1).mean()
        assert beta > 0
        assert abs(float(spent) - epsilon) < 1e-10
        # the reward is known to rounding of its own size
        assert abs(float(dual(ref_logps, rewards, beta, epsilon) - earned)) < 1e-10 * max(1, 10**log_size)

    def test_the_gap_is_open_at_another_multiplier(self):
        ref_logps, rewards = world(10)
        beta = solve_beta(ref_logps, rewards, 0.3)
        assert isinstance(beta, float)
        policy = optimal_policy(ref_logps, rewards, beta)
        earned = (policy.exp() * rewards).sum(1).mean()
        for factor in (0.9, 1.1):
            assert dual(ref_logps, rewards, factor * beta, 0.3) - earned > 1e-4
            assert abs(kl(optimal_policy(ref_logps, rewards, factor * beta), ref_logps).mean() - 0.3) > 1e-2

    def test_kl_falls_as_the_price_rises(self):
        ref_logps, rewards = world(11)
        spent = [float(kl(optimal_policy(ref_logps, rewards, b), ref_logps).mean()) for b in (0.1, 0.3, 1, 3, 10)]
        assert spent == sorted(spent, reverse=True) and len(set(spent)) == 5

    def test_a_budget_of_nothing_has_no_finite_price(self):
        ref_logps, rewards = world(12)
        assert solve_beta(ref_logps, rewards, 0) == math.inf
        assert solve_beta(ref_logps, rewards, 1e-8) < math.inf

    @pytest.mark.parametrize("beyond", [0.0, 1e-9, 5.0])
    def test_a_budget_that_the_greedy_policy_does_not_spend_is_free(self, beyond):
        ref_logps, rewards = world(13)
        greedy = kl(optimal_policy(ref_logps, rewards, 0.0), ref_logps).mean()
        torch.testing.assert_close(greedy, greedy_kl(ref_logps, rewards).mean(), **EXACT)
        # 1e-14: the rounding of the greedy KL, where the budget equals it
        assert solve_beta(ref_logps, rewards, float(greedy) + beyond + 1e-14) == 0
        assert solve_beta(ref_logps, rewards, float(greedy) - 1e-9) > 0

    def test_best_answers_that_tie_are_all_kept(self):
        ref_logps = f64([[0.1, 0.3, 0.6]]).log()
        tied, broken = f64([[2.0, 2.0, 0.0]]), f64([[2.0, 1.9, 0.0]])
        budget = -math.log(0.4) + 1e-9
        assert solve_beta(ref_logps, tied, budget) == 0
        assert solve_beta(ref_logps, tied, budget - 2e-9) > 0
        # the control: once the tie is broken the greedy policy is farther off, and the same budget has a price
        assert solve_beta(ref_logps, broken, budget) > 0
        assert solve_beta(ref_logps, broken, -math.log(0.1) + 1e-9) == 0

    @given(seeds, sharpnesses)
    @settings(max_examples=20)
    def test_the_last_bits_below_the_greedy_kl(self, seed, sharpness):
        """Best answers that nearly tie, and a budget that only the rounding keeps below the greedy KL."""
        ref_logps, rewards = world(seed, sharpness=sharpness)
        rewards[0, 0] = rewards[0, 1] = 4.0
        rewards[1, 0], rewards[1, 1] = 4.0, math.nextafter(4.0, 0.0)
        epsilon = float(greedy_kl(ref_logps, rewards).mean()) * (1 - 1e-15)
        policy = optimal_policy(ref_logps, rewards, solve_beta(ref_logps, rewards, epsilon))
        assert abs(float(kl(policy, ref_logps).mean()) - epsilon) < 1e-10

    @given(seeds, sharpnesses, st.sampled_from([0.0, 1e-30, 0.1, 3.0]))
    @settings(max_examples=20)
    def test_where_all_answers_earn_alike_there_is_nothing_to_buy(self, seed, sharpness, epsilon):
        ref_logps, rewards = world(seed, sharpness=sharpness)
        assert solve_beta(ref_logps, torch.full_like(rewards, 0.1), epsilon) == 0

    def test_a_prompt_with_nothing_to_buy_among_others(self):
        ref_logps, rewards = world(14)
        rewards[0] = 0.1
        assert solve_beta(ref_logps, rewards, 0.1) > 0
        by_prompt = solve_beta(ref_logps, rewards, 0.1, per_prompt=True)
        assert by_prompt[0] == 0 and (by_prompt[1:] > 0).all()

    @given(seeds, st.sampled_from([-100.0, -6.0, -0.3, 6.0, 100.0]), st.floats(-5.0, 5.0))
    @settings(max_examples=10)
    def test_is_in_units_of_the_reward(self, seed, log_size, shift):
        ref_logps, rewards = world(seed, 2, 4)
        beta = solve_beta(ref_logps, rewards, 0.05)
        scaled = solve_beta(ref_logps, 10**log_size * (rewards + shift), 0.05)
        assert scaled == pytest.approx(10**log_size * beta, rel=1e-9)

    def test_a_reference_normalised_only_nearly(self):
        """Within what is taken for normalised, the missing mass is not counted as KL."""
        ref_logps, rewards = world(48)
        assert solve_beta(ref_logps + 5e-10, rewards, 0.5) == pytest.approx(solve_beta(ref_logps, rewards, 0.5), 1e-13)

    def test_weighs_prompts(self):
        ref_logps, rewards = world(15, 2)
        only_first = solve_beta(ref_logps, rewards, 0.2, prompt_probs=f64([1.0, 0.0]))
        assert only_first == pytest.approx(solve_beta(ref_logps[:1], rewards[:1], 0.2), rel=1e-12)
        probs = f64([0.3, 0.7])
        policy = optimal_policy(ref_logps, rewards, solve_beta(ref_logps, rewards, 0.2, prompt_probs=probs))
        assert abs(float((probs * kl(policy, ref_logps)).sum()) - 0.2) < 1e-10
        assert abs(float(kl(policy, ref_logps).mean()) - 0.2) > 1e-3

    @pytest.mark.parametrize("epsilon", [1e-4, 1e-12, 1e-20, 1e-30])
    def test_small_budgets_cost_the_spread_of_the_reward(self, epsilon):
        """β* = σ/√(2ε) + κ₃/(3σ²) + O(√ε), σ² and κ₃ the cumulants of r under π_ref (MATH's point 5b)."""
        ref_logps, rewards = world(16)
        beta = solve_beta(ref_logps, rewards, epsilon, per_prompt=True)
        leading = spread(ref_logps, rewards) / math.sqrt(2 * epsilon)
        # relative: the next term is of the order √ε; 1e-12 for the solver
        torch.testing.assert_close(beta, leading, rtol=3 * math.sqrt(epsilon) + 1e-12, atol=0)
        # the controls: without the 2, and with the spread over all answers alike instead of under the reference
        assert not torch.allclose(beta, math.sqrt(2) * leading, rtol=0.2)
        flat = torch.full_like(ref_logps, -math.log(6))
        assert not torch.allclose(beta, spread(flat, rewards) / math.sqrt(2 * epsilon), rtol=0.2)

    def test_the_next_term_of_a_small_budget(self):
        ref_logps, rewards = world(16)
        centred = rewards - (ref_logps.exp() * rewards).sum(1, keepdim=True)
        sigma, third = spread(ref_logps, rewards), (ref_logps.exp() * centred**3).sum(1)
        epsilon = 1e-8
        rest = solve_beta(ref_logps, rewards, epsilon, per_prompt=True) - sigma / math.sqrt(2 * epsilon)
        # what is left out is of the order √ε = 1e-4
        torch.testing.assert_close(rest, third / (3 * sigma**2), rtol=0, atol=1e-3)
        assert rest.abs().max() > 0.05

    @pytest.mark.parametrize(
        ("epsilon", "options", "words"),
        [
            (-0.1, {}, r"epsilon: got \[-0\.1\]"),
            (math.inf, {}, "epsilon: got"),
            (f64([0.1, 0.2]), {}, "epsilon: got a tensor, expected one number; per_prompt=True"),
            (f64([0.1]), {"per_prompt": True}, r"epsilon: got shape \(1,\), expected \(2,\)"),
            (f64([0.1, -0.2]), {"per_prompt": True}, r"epsilon: got \[-0\.2\] in rows \[1\]"),
            (0.1, {"per_prompt": True, "prompt_probs": f64([0.5, 0.5])}, "prompt_probs: got with per_prompt"),
        ],
    )
    def test_refuses(self, epsilon, options, words):
        with pytest.raises(ValueError, match=words):
            solve_beta(*world(0, 2), epsilon, **options)


class TestOneBudgetForEachPrompt:
    """The derivation's β(x) as the multiplier of a KL constraint at each prompt."""

    def test_solves_each_prompt_by_itself(self):
        ref_logps, rewards = world(17)
        epsilon = f64([0.05, 0.3, 0.0, 50.0])
        beta = solve_beta(ref_logps, rewards, epsilon, per_prompt=True)
        assert beta[2] == math.inf and beta[3] == 0
        for i in range(4):
            alone = solve_beta(ref_logps[i : i + 1], rewards[i : i + 1], float(epsilon[i]))
            assert float(beta[i]) == alone
        spent = kl(optimal_policy(ref_logps, rewards, beta), ref_logps)
        torch.testing.assert_close(spent[:3], epsilon[:3], rtol=0, atol=1e-10)
        torch.testing.assert_close(spent[3], greedy_kl(ref_logps, rewards)[3], **EXACT)

    def test_primal_is_dual_with_a_multiplier_for_each_prompt(self):
        ref_logps, rewards = world(18)
        epsilon, probs = f64([0.05, 0.3, 0.1, 0.2]), f64([0.1, 0.2, 0.3, 0.4])
        beta = solve_beta(ref_logps, rewards, epsilon, per_prompt=True)
        earned = (probs * (optimal_policy(ref_logps, rewards, beta).exp() * rewards).sum(1)).sum()
        bound = dual(ref_logps, rewards, beta, epsilon, prompt_probs=probs)
        torch.testing.assert_close(bound, earned, rtol=0, atol=1e-10)
        mean_beta = torch.full_like(beta, float(beta.mean()))
        assert dual(ref_logps, rewards, mean_beta, epsilon, prompt_probs=probs) - earned > 1e-3

    def test_is_another_policy_than_one_budget_for_all(self):
        ref_logps, rewards = world(19)
        rewards = rewards * f64([0.3, 1.0, 2.0, 4.0])[:, None]
        each = solve_beta(ref_logps, rewards, 0.2, per_prompt=True)
        shared = solve_beta(ref_logps, rewards, 0.2)
        policies = [optimal_policy(ref_logps, rewards, beta) for beta in (each, shared)]
        spent = [kl(policy, ref_logps) for policy in policies]
        for amounts in spent:
            assert abs(float(amounts.mean()) - 0.2) < 1e-10
        torch.testing.assert_close(spent[0], torch.full_like(spent[0], 0.2), rtol=0, atol=1e-10)
        # one price for all spends the budget where the reward is spread most
        assert spent[1][0] < 0.02 and spent[1][3] > 0.3
        assert (policies[0].exp() - policies[1].exp()).abs().max() > 0.1
        # and, being free to do so, earns more
        earned = [float((policy.exp() * rewards).sum(1).mean()) for policy in policies]
        assert earned[1] > earned[0] + 0.05

    def test_is_the_same_where_prompts_are_alike(self):
        ref_logps, rewards = (table.expand(4, -1).contiguous() for table in world(20, 1))
        each = solve_beta(ref_logps, rewards, 0.2, per_prompt=True)
        torch.testing.assert_close(each, torch.full_like(each, solve_beta(ref_logps, rewards, 0.2)), **EXACT)

    def test_follows_the_spread_of_the_reward_and_not_the_entropy(self):
        """Point 5b on 100 prompts whose references differ in sharpness, and rewards in size, independently."""
        generator = torch.Generator().manual_seed(21)
        sharpness = 1.5 * torch.rand((100, 1), generator=generator, dtype=torch.float64)
        size = torch.exp(normal(generator, 100, 1))
        ref_logps = torch.log_softmax(sharpness * normal(generator, 100, 12), 1)
        rewards = size * normal(generator, 100, 12)
        beta = solve_beta(ref_logps, rewards, 0.05, per_prompt=True)
        with_spread, with_entropy = (
            float(torch.corrcoef(torch.stack([beta.log(), other.log()]))[0, 1])
            for other in (spread(ref_logps, rewards), entropy(ref_logps))
        )
        # sampling error of a correlation of 0 over 100 prompts: 0.1
        assert with_spread > 0.98 and abs(with_entropy) < 0.3


class TestImplicitReward:
    """§4.1."""

    @given(seeds, sharpnesses, betas)
    @settings(max_examples=20)
    def test_reads_back_the_reward_of_the_optimal_policy(self, seed, sharpness, beta):
        ref_logps, rewards = world(seed, sharpness=sharpness)
        own = beta * f64([1.0, 1.5, 2.0, 0.7])
        read = implicit_reward(optimal_policy(ref_logps, rewards, own), ref_logps, own)
        log_z = log_partition(ref_logps, rewards, own)
        # log-probabilities of size up to 4/0.014 = 300, times beta up to 100
        torch.testing.assert_close(read + (own * log_z)[:, None], rewards, rtol=0, atol=1e-11)
        # log Z cancels in differences within a prompt, and not between prompts
        torch.testing.assert_close(bradley_terry(read), bradley_terry(rewards), rtol=0, atol=2e-11)
        assert (read[0] - read[1] - (rewards[0] - rewards[1])).abs().max() > 1e-6

    def test_the_two_equalities_as_printed(self):
        """r_w − r_l is not log π*(y_w)/π*(y_l); that log-ratio is what the second equality says."""
        ref_logps, rewards = world(22)
        beta = 0.5
        policy = optimal_policy(ref_logps, rewards, beta)
        reward_difference, log_odds, ref_log_odds = map(bradley_terry, (rewards, policy, ref_logps))
        torch.testing.assert_close(log_odds, ref_log_odds + reward_difference / beta, **EXACT)
        wrong_by = log_odds - reward_difference
        torch.testing.assert_close(wrong_by, ref_log_odds + (1 / beta - 1) * reward_difference, **EXACT)
        assert wrong_by.abs().max() > 1
        # what holds in its place, from §3.1
        torch.testing.assert_close(reward_difference, beta * (log_odds - ref_log_odds), **EXACT)
        # and the inverse of it, which §4.2 has, does not follow
        assert (reward_difference - (log_odds - ref_log_odds) / beta).abs().max() > 1

    def test_the_first_equality_holds_by_chance(self):
        """At β = 1 and a uniform reference, where nothing tells the right formula from the wrong one."""
        _, rewards = world(22)
        flat = torch.full_like(rewards, -math.log(6))
        log_odds = bradley_terry(optimal_policy(flat, rewards, 1.0))
        torch.testing.assert_close(log_odds, bradley_terry(rewards), **EXACT)

    def test_a_beta_that_saw_the_answer_would_not_cancel_log_z(self):
        """π_ref·exp(r/β(x, y))/Z(x) solved for r leaves (β_w − β_l)·log Z in the difference."""
        ref_logps, rewards = world(23, 1, 3)
        rewards = rewards.abs() + 1
        for beta, cancels in ((f64([[0.5, 0.5, 0.5]]), True), (f64([[0.5, 1.0, 2.0]]), False)):
            unnormalised = ref_logps + rewards / beta
            log_z = unnormalised.logsumexp(1, keepdim=True)
            read = beta * (unnormalised - log_z - ref_logps)
            left = bradley_terry(rewards) - bradley_terry(read)
            torch.testing.assert_close(left, bradley_terry(beta) * log_z[:, :, None], **EXACT)
            assert (left.abs().max() < 1e-12) == cancels

    def test_refuses_a_policy_without_support(self):
        with pytest.raises(ValueError, match=r"policy_logps: not finite in rows \[0\]"):
            implicit_reward(f64([[1.0, 0.0]]).log(), f64([[0.5, 0.5]]).log(), 1.0)


class TestBradleyTerry:
    def test_by_hand(self):
        probabilities = torch.sigmoid(bradley_terry(f64([[math.log(3), 0.0]])))
        torch.testing.assert_close(probabilities, f64([[[0.5, 0.75], [0.25, 0.5]]]), **EXACT)

    @given(seeds, st.floats(-20.0, 20.0))
    @settings(max_examples=20)
    def test_a_reward_for_the_prompt_alone_changes_nothing(self, seed, shift):
        _, rewards = world(seed)
        logits = bradley_terry(rewards)
        assert torch.equal(logits, -logits.mT)
        moved = rewards + f64([shift, 0, 1, 2])[:, None]
        torch.testing.assert_close(bradley_terry(moved), logits, rtol=0, atol=1e-13)  # rounding of r + 20

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"rewards: got shape \(2,\)"):
            bradley_terry(f64([1.0, 2.0]))
        with pytest.raises(ValueError, match=r"rewards: not finite in rows \[1\]"):
            bradley_terry(f64([[1.0], [math.inf]]))


def softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def loss_twin(policy: Tensor, ref: Tensor, logits: Tensor, beta: list[float], form: str, weights: list[float]) -> float:
    """The population loss by loops over plain floats."""
    total = 0.0
    for x, d in enumerate(weights):
        s = 1 / beta[x] if form == "inverse" else beta[x]
        theta, base, table = policy[x].tolist(), ref[x].tolist(), logits[x].tolist()
        probs = [math.exp(v) for v in base]
        different = 1 - sum(p * p for p in probs)
        for i in range(len(probs)):
            for j in range(len(probs)):
                if i != j:
                    h = (theta[i] - base[i]) - (theta[j] - base[j])
                    p = 1 / (1 + math.exp(-table[i][j]))
                    term = p * softplus(-s * h) + (1 - p) * softplus(s * h)
                    total += d * probs[i] * probs[j] / different * term
    return total


@pytest.mark.parametrize("form", FORMS)
class TestPopulationLoss:
    """§4.2 and §5, both forms."""

    @given(seeds, sharpnesses, st.floats(0.1, 10.0))
    @settings(max_examples=20)
    def test_equals_its_twin(self, form, seed, sharpness, beta):
        ref_logps, rewards = world(seed, 2, 4, sharpness)
        policy, logits = a_policy(seed, ref_logps), bradley_terry(2 * rewards)
        own, weights = [beta, 0.5 * beta], [0.3, 0.7]
        value = population_loss(policy, ref_logps, logits, f64(own), form, prompt_probs=f64(weights))
        assert float(value) == pytest.approx(loss_twin(policy, ref_logps, logits, own, form, weights), rel=1e-11)
        uniform = population_loss(policy, ref_logps, logits, beta, form)
        twin = loss_twin(policy, ref_logps, logits, [beta, beta], form, [0.5, 0.5])
        assert float(uniform) == pytest.approx(twin, rel=1e-11)

    def test_is_the_expectation_of_the_losses_of_pairs(self, form):
        """The same formula as `losses.dpo_loss`, over all pairs of two answers, each labelled either way."""
        ref_logps, rewards = world(24, 3, 4)
        policy, logits, beta = a_policy(24, ref_logps), bradley_terry(rewards), f64([0.3, 1.0, 4.0])
        total = f64(0.0)
        for i in range(4):
            for j in range(4):
                if i == j:
                    continue
                drawn = (ref_logps[:, i] + ref_logps[:, j]).exp() / (1 - ref_logps.exp().square().sum(1))
                tables = (policy[:, i], policy[:, j], ref_logps[:, i], ref_logps[:, j])
                swapped = (policy[:, j], policy[:, i], ref_logps[:, j], ref_logps[:, i])
                p = torch.sigmoid(logits[:, i, j])
                right, wrong = (dpo_loss(*pair, beta, form=form).losses for pair in (tables, swapped))
                total = total + (drawn * (p * right + (1 - p) * wrong)).mean()
        torch.testing.assert_close(population_loss(policy, ref_logps, logits, beta, form), total, **EXACT)
        other = {"inverse": "standard", "standard": "inverse"}[form]
        assert abs(population_loss(policy, ref_logps, logits, beta, other) - total) > 1e-2

    def test_is_log_two_at_the_reference(self, form):
        ref_logps, rewards = world(25)
        value = population_loss(ref_logps, ref_logps, bradley_terry(rewards), 0.3, form)
        torch.testing.assert_close(value, f64(math.log(2)), **EXACT)

    def test_a_reward_for_the_prompt_alone_changes_nothing(self, form):
        ref_logps, rewards = world(26)
        policy = a_policy(26, ref_logps)
        shift, per_answer = f64([3.0, -1, 0, 2])[:, None], f64([3.0, -1, 0, 2, 1, 0])
        plain, moved, other = (
            population_loss(policy, ref_logps, bradley_terry(r), 0.5, form)
            for r in (rewards, rewards + shift, rewards + per_answer)
        )
        torch.testing.assert_close(moved, plain, **EXACT)
        assert abs(other - plain) > 1e-2

    def test_stays_finite_far_out(self, form):
        ref_logps = torch.log_softmax(f64([[0.0, 3000.0, -2000.0]]), 1)
        policy = torch.log_softmax(f64([[5000.0, 0.0, 100.0]]), 1)
        logits = bradley_terry(f64([[500.0, -500.0, 0.0]]))
        for beta in (1e-6, 1e6):
            parts = [
                fn(policy, ref_logps, logits, beta, form)
                for fn in (population_loss, population_gradient_on_policy, population_gradient_on_beta)
            ]
            assert all(torch.isfinite(part).all() for part in parts)

    def test_gradients_reach_policy_and_beta_alone(self, form):
        ref_logps, rewards = world(27)
        tables = [a_policy(27, ref_logps), ref_logps, f64([1.0, 2.0, 3.0, 4.0])]
        policy, ref, beta = (table.clone().requires_grad_() for table in tables)
        population_loss(policy, ref, bradley_terry(rewards), beta, form).backward()
        assert policy.grad is not None and beta.grad is not None and ref.grad is None

    def test_refuses(self, form):
        ref_logps, rewards = world(0, 2, 3)
        logits = bradley_terry(rewards)
        crooked = logits.clone()
        crooked[1, 0, 2] += 0.1
        single = torch.zeros((2, 1), dtype=torch.float64)
        for arguments, words in (
            ((ref_logps, ref_logps, crooked, 1.0, form), r"preference_logits: not antisymmetric in rows \[1\]"),
            ((ref_logps, ref_logps, logits[:, :2], 1.0, form), r"preference_logits: got shape \(2, 2, 3\)"),
            ((ref_logps, ref_logps, logits * math.inf, 1.0, form), "preference_logits: nan"),
            ((ref_logps, ref_logps, logits.float(), 1.0, form), r"preference_logits: got a torch\.float32"),
            ((single, single, single[:, :, None], 1.0, form), "ref_logps: got 1 answer per prompt"),
            ((ref_logps + 1, ref_logps, logits, 1.0, form), r"policy_logps: not normalised in rows \[0, 1\]"),
            ((ref_logps, ref_logps + 1, logits, 1.0, form), r"ref_logps: not normalised in rows \[0, 1\]"),
            ((ref_logps[:1], ref_logps, logits, 1.0, form), r"policy_logps: got shape \(1, 3\)"),
            ((ref_logps, ref_logps, logits, 0.0, form), "beta: got"),
            ((ref_logps, ref_logps, logits, math.inf, form), "beta: got"),
            ((ref_logps, ref_logps, logits, 1.0, form.upper()), "form: got"),
        ):
            for fn in (population_loss, population_gradient_on_policy, population_gradient_on_beta):
                with pytest.raises(ValueError, match=words):
                    fn(*arguments)


@pytest.mark.parametrize("form", FORMS)
class TestPopulationGradientOnPolicy:
    @given(seeds, sharpnesses, st.floats(0.1, 10.0))
    @settings(max_examples=20)
    def test_is_that_of_autograd(self, form, seed, sharpness, beta):
        ref_logps, rewards = world(seed, sharpness=sharpness)
        logits, probs = a_policy(seed, ref_logps).requires_grad_(), f64([0.1, 0.2, 0.3, 0.4])
        policy, preferences = torch.log_softmax(logits, 1), bradley_terry(rewards)
        population_loss(policy, ref_logps, preferences, beta, form, prompt_probs=probs).backward()
        closed = population_gradient_on_policy(policy, ref_logps, preferences, beta, form, prompt_probs=probs)
        torch.testing.assert_close(closed, logits.grad, **EXACT)
        assert not closed.requires_grad
        torch.testing.assert_close(closed.sum(1), torch.zeros(4, dtype=torch.float64), **EXACT)

    def test_weighs_pairs_by_how_wrongly_they_are_ranked(self, form):
        """Rafailov et al., §4: −s·σ(r̂_l − r̂_w), written out for two answers, one of which always wins."""
        beta, margin = 2.0, 40.0  # σ(40) is 1 to 1e-17
        s = 1 / beta if form == "inverse" else beta
        ref_logps = f64([[0.5, 0.5]]).log()
        for h in (-1.5, 0.0, 1.5):
            policy = torch.log_softmax(f64([[h, 0.0]]), 1)
            closed = population_gradient_on_policy(policy, ref_logps, bradley_terry(f64([[margin, 0]])), beta, form)
            weight = 1 / (1 + math.exp(s * h))
            torch.testing.assert_close(closed, f64([[-s * weight, s * weight]]), **EXACT)


@pytest.mark.parametrize("form", FORMS)
class TestPopulationGradientOnBeta:
    @given(seeds, sharpnesses, st.floats(0.1, 10.0))
    @settings(max_examples=20)
    def test_is_that_of_autograd(self, form, seed, sharpness, beta):
        ref_logps, rewards = world(seed, sharpness=sharpness)
        policy, probs, preferences = a_policy(seed, ref_logps), f64([0.1, 0.2, 0.3, 0.4]), bradley_terry(rewards)
        own = (beta * f64([1.0, 2.0, 3.0, 4.0])).requires_grad_()
        population_loss(policy, ref_logps, preferences, own, form, prompt_probs=probs).backward()
        closed = population_gradient_on_beta(policy, ref_logps, preferences, own, form, prompt_probs=probs)
        # 1/beta² is up to 100
        torch.testing.assert_close(closed, own.grad, rtol=1e-10, atol=1e-11)
        assert not closed.requires_grad

    def test_one_beta_has_the_sum_of_them(self, form):
        ref_logps, rewards = world(28)
        policy, preferences, step = a_policy(28, ref_logps), bradley_terry(rewards), 1e-5
        ends = [population_loss(policy, ref_logps, preferences, 0.7 + d, form) for d in (-step, step)]
        closed = population_gradient_on_beta(policy, ref_logps, preferences, 0.7, form).sum()
        # central differences: truncation of the order step², rounding of 1e-16/step
        torch.testing.assert_close(closed, (ends[1] - ends[0]) / (2 * step), rtol=0, atol=1e-8)
        assert abs(closed) > 1e-3

    def test_is_how_much_too_sure_the_policy_is(self, form):
        """E[(σ(sh) − p)·h]·s′, by loops over plain floats."""
        ref_logps, rewards = world(29, 1, 4)
        policy, preferences, beta = a_policy(29, ref_logps), bradley_terry(rewards), 0.6
        s, ds = (1 / beta, -1 / beta**2) if form == "inverse" else (beta, 1.0)
        base, theta, table = ref_logps[0].tolist(), policy[0].tolist(), preferences[0].tolist()
        different = 1 - sum(math.exp(2 * v) for v in base)
        total = 0.0
        for i in range(4):
            for j in range(4):
                if i != j:
                    h = (theta[i] - base[i]) - (theta[j] - base[j])
                    too_sure = 1 / (1 + math.exp(-s * h)) - 1 / (1 + math.exp(-table[i][j]))
                    total += math.exp(base[i] + base[j]) / different * too_sure * h
        closed = population_gradient_on_beta(policy, ref_logps, preferences, beta, form)
        torch.testing.assert_close(closed, f64([ds * total]), **EXACT)


class TestSamplePairs:
    def test_has_the_frequencies_it_should(self):
        ref_logps, rewards = world(30, 2, 3)
        preferences, probs, count = bradley_terry(rewards), f64([0.3, 0.7]), 40_000
        generator = torch.Generator().manual_seed(0)
        pairs = sample_pairs(ref_logps, preferences, count, generator=generator, prompt_probs=probs)
        for x in range(2):
            p = ref_logps[x].exp().tolist()
            different = 1 - sum(v * v for v in p)
            for i in range(3):
                for j in range(3):
                    wins = 1 / (1 + math.exp(-float(preferences[x, i, j])))
                    expected = 0.0 if i == j else float(probs[x]) * 2 * p[i] * p[j] / different * wins
                    met = (pairs.prompt == x) & (pairs.chosen == i) & (pairs.rejected == j)
                    error = math.sqrt(expected * (1 - expected) / count)
                    assert abs(float(met.double().mean()) - expected) <= 4 * error  # 18 checks, at a fixed seed

    @pytest.mark.parametrize("form", FORMS)
    def test_has_the_population_loss_as_its_mean(self, form):
        ref_logps, rewards = world(31)
        policy, preferences, beta = a_policy(31, ref_logps), bradley_terry(3 * rewards), f64([0.5, 1.0, 2.0, 3.0])
        x, w, l = sample_pairs(ref_logps, preferences, 40_000, generator=torch.Generator().manual_seed(1))  # noqa: E741
        tables = (policy[x, w], policy[x, l], ref_logps[x, w], ref_logps[x, l])
        losses = dpo_loss(*tables, beta[x], form=form).losses
        error = losses.std() / math.sqrt(len(losses))
        expected = population_loss(policy, ref_logps, preferences, beta, form)
        assert abs(losses.mean() - expected) < 4 * error
        # the control: labels the other way round are not within the error
        flipped = dpo_loss(tables[1], tables[0], tables[3], tables[2], beta[x], form=form).losses
        assert abs(flipped.mean() - expected) > 10 * error

    def test_repeats_itself(self):
        ref_logps, rewards = world(32)
        draws = [
            sample_pairs(ref_logps, bradley_terry(rewards), 50, generator=torch.Generator().manual_seed(seed))
            for seed in (7, 7, 8)
        ]
        assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
        assert not torch.equal(draws[0].chosen, draws[2].chosen)

    @pytest.mark.parametrize("count", [0, -1, 2.0, True])
    def test_refuses_a_count_that_is_none(self, count):
        ref_logps, rewards = world(0)
        with pytest.raises(ValueError, match="count: got"):
            sample_pairs(ref_logps, bradley_terry(rewards), count, generator=torch.Generator())

    def test_refuses_what_the_loss_refuses(self):
        ref_logps, rewards = world(0)
        with pytest.raises(ValueError, match="preference_logits: not antisymmetric"):
            sample_pairs(ref_logps, bradley_terry(rewards).abs(), 5, generator=torch.Generator())


# -- what is true of beta -------------------------------------------------------------------------------------


class TestTheOptimumOfEachForm:
    """s·h* = logit(p): h* = logit(p)/β in the standard form, β·logit(p) in the inverse one."""

    @pytest.mark.parametrize("form", FORMS)
    def test_a_free_policy_ends_there(self, form):
        ref_logps, rewards = world(40, 3, 5)
        preferences, beta = bradley_terry(rewards), f64([0.5, 1.0, 2.5])
        found = minimise(lambda p: population_loss(p, ref_logps, preferences, beta, form), a_policy(40, ref_logps))
        h = bradley_terry(found - ref_logps)
        by_beta = {"standard": 1 / beta, "inverse": beta}
        # the optimiser stops at gradients of 1e-13, curvatures are 1e-4 and more
        torch.testing.assert_close(h, by_beta[form][:, None, None] * preferences, rtol=0, atol=1e-7)
        other = by_beta["inverse" if form == "standard" else "standard"]
        assert (h - other[:, None, None] * preferences).abs().max() > 1

    def test_only_the_standard_form_finds_the_optimal_policy(self):
        """With labels from the reward of §1 at β, the inverse form ends at the optimal policy of 1/β."""
        ref_logps, rewards = world(41)
        for beta in (0.5, 2.0):
            ends = {form: adapted(ref_logps, rewards, torch.full((4,), beta).double(), form) for form in FORMS}
            for form in FORMS:
                at_rest = population_gradient_on_policy(ends[form], ref_logps, bradley_terry(rewards), beta, form)
                assert at_rest.abs().max() < 1e-15
            best = optimal_policy(ref_logps, rewards, beta)
            torch.testing.assert_close(ends["standard"], best, **EXACT)
            torch.testing.assert_close(ends["inverse"], optimal_policy(ref_logps, rewards, 1 / beta), **EXACT)
            assert (ends["inverse"].exp() - best.exp()).abs().max() > 0.05

    def test_a_larger_beta_stays_nearer_in_one_form_and_goes_farther_in_the_other(self):
        ref_logps, rewards = world(42)
        distance = {
            form: [
                float(kl(adapted(ref_logps, rewards, torch.full((4,), b).double(), form), ref_logps).mean())
                for b in (0.2, 0.5, 1.0, 2.0, 5.0)
            ]
            for form in FORMS
        }
        assert distance["standard"] == sorted(distance["standard"], reverse=True)
        assert distance["inverse"] == sorted(distance["inverse"])
        assert distance["standard"][2] == pytest.approx(distance["inverse"][2], rel=1e-12)  # they cross at beta = 1

    def test_preferences_that_go_in_a_circle_are_met_by_no_policy(self):
        """What "s·h* = logit(p) for every pair" needs: here by symmetry the best policy is the reference."""
        circle = f64([[[0.0, 2.0, -2.0], [-2.0, 0.0, 2.0], [2.0, -2.0, 0.0]]])
        flat = torch.full((1, 3), -math.log(3), dtype=torch.float64)
        for form in FORMS:
            assert population_gradient_on_policy(flat, flat, circle, 0.5, form).abs().max() < 1e-16
            found = minimise(lambda p, form=form: population_loss(p, flat, circle, 0.5, form), f64([[0.5, 0.0, -0.3]]))
            torch.testing.assert_close(found, flat, rtol=0, atol=1e-7)


class TestWhatTheLossTeachesBeta:
    """∂ℓ/∂s = −σ(−s·h)·h."""

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("h", [-2.0, -0.1, 0.1, 2.0])
    def test_a_pair_ranked_rightly_raises_s_and_one_ranked_wrongly_lowers_it(self, form, h):
        ref_logps, certain = f64([[0.3, 0.7]]).log(), bradley_terry(f64([[40.0, 0.0]]))
        policy = torch.log_softmax(ref_logps + f64([[h, 0.0]]), 1)
        beta = f64([0.5])
        gradient = float(population_gradient_on_beta(policy, ref_logps, certain, beta, form))
        s_rises = gradient < 0 if form == "standard" else gradient > 0  # descent; 1/beta rises as beta falls
        assert s_rises == (h > 0)

    def test_reliable_labels_raise_s_and_noisy_ones_lower_it(self):
        """One policy, halfway trained: h is the true reward; the labels are k times as sure."""
        ref_logps, rewards = world(43, 1, 12)
        policy = torch.log_softmax(ref_logps + rewards, 1)
        pulls = {
            form: [
                float(population_gradient_on_beta(policy, ref_logps, bradley_terry(k * rewards), 1.0, form))
                for k in (0.0, 0.3, 1.0, 2.0, 4.0)  # σ(s·h) is as sure as the labels at k = 1
            ]
            for form in FORMS
        }
        assert pulls["standard"] == sorted(pulls["standard"], reverse=True)
        assert pulls["inverse"] == sorted(pulls["inverse"])
        for form, sign in (("standard", 1), ("inverse", -1)):
            noisy, too_sure, even, reliable, very = (sign * pull for pull in pulls[form])
            assert noisy > too_sure > 1e-3 and abs(even) < 1e-15 and -1e-3 > reliable > very

    @pytest.mark.parametrize("form", FORMS)
    def test_a_fixed_policy_has_the_temperature_of_the_labels(self, form):
        """Point 5a: a policy that cannot adapt to the pairs at hand has one best s, here k/c exactly."""
        ref_logps, rewards = world(44)
        reliability, c = f64([0.3, 1.0, 2.0, 4.0]), 0.8
        policy = torch.log_softmax(ref_logps + c * rewards, 1)
        preferences = bradley_terry(reliability[:, None] * rewards)
        s = reliability / c
        beta = s if form == "standard" else 1 / s
        assert population_gradient_on_beta(policy, ref_logps, preferences, beta, form).abs().max() < 1e-15
        best = population_loss(policy, ref_logps, preferences, beta, form)
        for factor in (0.8, 1.25):
            assert population_loss(policy, ref_logps, preferences, factor * beta, form) > best + 1e-4


class TestBetaIsNotIdentified:
    BETAS = (f64([0.3, 0.3, 0.3, 0.3]), f64([0.1, 0.5, 2.0, 9.0]), f64([7.0, 1.0, 0.4, 0.2]))

    @pytest.mark.parametrize("form", FORMS)
    def test_any_beta_has_the_same_loss_at_its_adapted_policy(self, form):
        ref_logps, rewards = world(45)
        preferences = bradley_terry(rewards)
        policies = [adapted(ref_logps, rewards, beta, form) for beta in self.BETAS]
        losses = [
            float(population_loss(policy, ref_logps, preferences, beta, form))
            for policy, beta in zip(policies, self.BETAS, strict=True)
        ]
        assert max(losses) - min(losses) < 1e-8
        for policy, beta in zip(policies, self.BETAS, strict=True):
            assert population_gradient_on_beta(policy, ref_logps, preferences, beta, form).abs().max() < 1e-13
        # the controls: the policies differ, and with the policy of another beta the loss and its slope differ
        assert kl(policies[0], policies[1]).max() > 0.1
        crossed = population_loss(policies[0], ref_logps, preferences, self.BETAS[1], form)
        assert crossed > losses[0] + 1e-2
        slope = population_gradient_on_beta(policies[0], ref_logps, preferences, self.BETAS[1], form)
        assert slope.abs().max() > 1e-3

    @pytest.mark.parametrize("form", FORMS)
    def test_also_where_no_policy_meets_the_preferences(self, form):
        """It needs a policy free to adapt, not preferences that follow a reward."""
        ref_logps, rewards = world(46, 3, 4)
        noise = normal(torch.Generator().manual_seed(46), 3, 4, 4)
        preferences = bradley_terry(rewards) + noise - noise.mT
        losses, slopes = [], []
        for beta in (f64([0.5, 1.0, 2.0]), f64([2.0, 0.7, 0.6])):
            found = minimise(
                lambda p, beta=beta: population_loss(p, ref_logps, preferences, beta, form), a_policy(46, ref_logps)
            )
            losses.append(float(population_loss(found, ref_logps, preferences, beta, form)))
            slopes.append(population_gradient_on_beta(found, ref_logps, preferences, beta, form).abs().max())
        assert abs(losses[0] - losses[1]) < 1e-8
        assert max(slopes) < 1e-8  # the optimiser leaves gradients of about 1e-12 on the policy
        reached = bradley_terry(found - ref_logps) * (beta if form == "standard" else 1 / beta)[:, None, None]
        assert (reached - preferences).abs().max() > 0.1


class TestTheEntropyTermAlone:
    """At adapted policies the loss is flat in β, and the other terms decide."""

    @staticmethod
    @lru_cache
    def rest(lambda_range: float, lambda_entropy: float, form: str) -> tuple[Tensor, Tensor]:
        """β at rest, trained by descent with the policy adapted at every step, and αH."""
        ref_logps = torch.log_softmax(f64([[8.0], [2.5], [1.5], [0.3]]) * world(47)[0], 1)
        _, rewards = world(47)
        target = 0.1 * entropy(ref_logps)
        beta = torch.full((4,), 0.15, dtype=torch.float64, requires_grad=True)
        for step in range(400):
            policy = adapted(ref_logps, rewards, beta.detach(), form)
            total = population_loss(policy, ref_logps, bradley_terry(rewards), beta, form)
            total = total + lambda_entropy * entropy_penalty(beta, entropy(ref_logps), 0.1)
            total = total + lambda_range * range_penalty(beta, 0.1, 0.2)
            (gradient,) = torch.autograd.grad(total, beta)
            # times the 4 prompts; falling steps settle the kink of the range term
            beta = (beta - 4 * 0.4 / (1 + step) ** 0.75 * gradient).detach().requires_grad_()
        return beta.detach(), target

    @pytest.mark.parametrize("form", FORMS)
    def test_beta_is_alpha_times_the_entropy_within_the_range(self, form):
        beta, target = self.rest(0.5, 1.0, form)
        # one prompt below the range, one above, two inside
        assert target[0] < 0.1 < min(target[1:3]) and max(target[1:3]) < 0.2
        # the last steps across the kink are 0.4·0.5/400^0.75 = 0.0022
        torch.testing.assert_close(beta, target.clamp(0.1, 0.2), rtol=0, atol=3e-3)

    def test_the_clip_is_hard_only_while_the_range_outweighs_the_entropy(self):
        """λ1 ≥ 2·λ3·overshoot; a weaker range leaves β = αH ± λ1/(2·λ3) outside."""
        beta, target = self.rest(0.01, 1.0, "inverse")
        torch.testing.assert_close(beta[0], target[0] + 0.005, rtol=0, atol=1e-6)
        assert beta[0] < 0.1 - 1e-3

    @pytest.mark.parametrize("form", FORMS)
    def test_the_entropy_term_points_opposite_ways(self, form):
        """Point 4: β → αH weighs uncertain prompts less in the inverse form and more in the standard one."""
        beta, target = self.rest(0.5, 1.0, form)
        scale = beta if form == "standard" else 1 / beta
        by_entropy = target.argsort()
        assert (scale[by_entropy].diff() > 0).all() if form == "standard" else (scale[by_entropy].diff() < 0).all()


def three_tasks(count: int, sharpness: tuple, reliability: tuple) -> tuple[Tensor, Tensor]:
    """`count` worlds of math, code and dialogue, 8 prompts and 12 answers each, and what their labels follow."""
    refs, preferred = [], []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        for a, k in zip(sharpness, reliability, strict=True):
            refs.append(torch.log_softmax(a * normal(generator, 8, 12), 1))
            preferred.append(k * normal(generator, 8, 12))
    return torch.cat(refs), torch.cat(preferred)


SHARPNESS, RELIABILITY = (2.5, 1.6, 0.5), (1.4, 0.7, 0.3)  # entropies of about 1.2, 1.8 and 2.4 nats
ALIKE_SHARPNESS, ALIKE_RELIABILITY = (1.6, 1.6, 1.6), (1.0, 1.0, 1.0)


class Trained(NamedTuple):
    """Of two worlds: means (2, 3) of math, code and dialogue, and the loss above the least one."""

    beta: Tensor
    kl: Tensor
    target: Tensor  # α times the entropy
    excess: float


@lru_cache
def train_together(
    form: str, lambda_entropy: float, sharpness: tuple = SHARPNESS, reliability: tuple = RELIABILITY
) -> Trained:
    """Policy and β(x), both free, by Adam on loss + range + entropy."""
    ref_logps, preferred = three_tasks(2, sharpness, reliability)
    logits = ref_logps.clone().requires_grad_()
    log_beta = torch.full((len(ref_logps),), math.log(0.3), dtype=torch.float64, requires_grad=True)
    preferences, ref_entropy = bradley_terry(preferred), entropy(ref_logps)
    optimizer = torch.optim.Adam([logits, log_beta], lr=0.05)
    for _ in range(600):
        beta = log_beta.exp()
        loss = population_loss(torch.log_softmax(logits, 1), ref_logps, preferences, beta, form)
        loss = loss + range_penalty(beta, 0.05, 5.0) + lambda_entropy * entropy_penalty(beta, ref_entropy, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy, beta = torch.log_softmax(logits.detach(), 1), log_beta.exp().detach()
    reached, least = (
        population_loss(p, ref_logps, preferences, beta, form)
        for p in (policy, adapted(ref_logps, preferred, beta, form))
    )
    means = [v.view(-1, 3, 8).mean(2) for v in (beta, kl(policy, ref_logps), 0.1 * ref_entropy)]
    return Trained(*means, float(reached - least))


def rises(values: Tensor, factor: float = 1.0) -> bool:
    """Whether math < code < dialogue in every world, each by this factor."""
    return bool((values[:, 1:] > factor * values[:, :-1]).all())


class TestPolicyAndBetaTrainedTogether:
    """The table of four runs: labels of reliability math > code > dialogue, entropy the other way round."""

    @pytest.mark.slow
    def test_the_forms_order_beta_oppositely(self):
        standard, inverse = train_together("standard", 0.0), train_together("inverse", 0.0)
        assert rises(standard.beta.flip(1), 1.2)
        assert rises(inverse.beta, 1.1)
        assert max(standard.excess, inverse.excess) < 1e-6

    def test_the_order_comes_from_the_reliability_of_the_labels(self):
        """The control: with equally reliable tasks the order is gone, though the entropies differ as before."""
        alike = train_together("standard", 0.0, reliability=ALIKE_RELIABILITY)
        assert rises(alike.target, 1.2)
        assert not rises(alike.beta.flip(1), 1.0)

    @pytest.mark.slow
    def test_the_entropy_term_gives_both_forms_the_order_of_the_entropies(self):
        for form in FORMS:
            run = train_together(form, 1.0)
            assert rises(run.beta, 1.05)
            # math is not yet at rest in the standard form, where its policy has farthest to go
            torch.testing.assert_close(run.beta[:, 1:], run.target[:, 1:], rtol=0.05, atol=0)

    def test_that_order_comes_from_the_entropies(self):
        alike = train_together("inverse", 1.0, sharpness=ALIKE_SHARPNESS)
        torch.testing.assert_close(alike.beta, alike.target, rtol=0.05, atol=0)
        assert not rises(alike.beta)

    def test_far_apart_betas_cost_the_loss_nearly_nothing(self):
        plain, with_entropy = train_together("standard", 0.0), train_together("standard", 1.0)
        assert (plain.beta[:, 0] > 5 * with_entropy.beta[:, 0]).all()
        # the least loss does not depend on beta, so the excesses can be compared
        assert abs(plain.excess - with_entropy.excess) < 1e-3

    def test_a_small_beta_is_far_in_the_standard_form_and_near_in_the_inverse_one(self):
        far, near = (train_together(form, 1.0).kl for form in ("standard", "inverse"))
        assert (far > 50 * near).all()
