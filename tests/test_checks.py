"""Every mistake is planted as a reader would write it, and recognised by its own sentence; right answers pass.

What a wrong answer is told is found by a few words of the sentence, since the sentence is what the check returns.
"""

from __future__ import annotations

import copy
import itertools
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr, ttest_ind, ttest_rel
from torch import Tensor

from dpoviz import EntropyBeta, allocate, beta_table, gain_bound, losses, regularizers, summarize, tabular
from dpoviz.learn import checks
from dpoviz.learn.checks import (
    Mistake,
    Verdict,
    check_allocation,
    check_beta_gradient,
    check_bound,
    check_completion_logps,
    check_dpo_loss,
    check_entropy_beta,
    check_entropy_penalty,
    check_optimal_policy,
    check_reward_difference,
    check_rho_within,
    check_share,
    check_slope,
    check_smoothness_penalty,
    check_tilt,
    check_token_entropy,
)

FORMS = ("inverse", "standard")
ALL = [
    check_completion_logps,
    partial(check_dpo_loss, form="inverse"),
    partial(check_dpo_loss, form="standard"),
    check_beta_gradient,
    check_optimal_policy,
    check_reward_difference,
    check_entropy_penalty,
    check_smoothness_penalty,
    check_slope,
    check_allocation,
    check_bound,
    check_token_entropy,
    check_entropy_beta,
    check_rho_within,
]


def says(verdict: Verdict, words: str) -> None:
    assert verdict.right is False
    assert words in verdict.sentence, verdict.sentence


class TestEveryCheck:
    @pytest.mark.parametrize("check", ALL)
    @pytest.mark.parametrize("nothing", [None, ...])
    def test_an_untouched_exercise_is_not_yet(self, check, nothing):
        assert check(lambda *args: nothing).right is None

    @pytest.mark.parametrize("check", ALL)
    def test_not_implemented_is_not_yet(self, check):
        def stub(*args):
            raise NotImplementedError

        assert check(stub).right is None

    @pytest.mark.parametrize("check", ALL)
    def test_an_exception_becomes_a_sentence(self, check):
        def broken(*args):
            return args[0] + undefined  # noqa: F821

        says(check(broken), "stopped with NameError: name 'undefined' is not defined at `return args[0] + undefined")

    @pytest.mark.parametrize("check", ALL)
    def test_a_wrong_number_of_arguments_becomes_a_sentence(self, check):
        says(check(lambda: 0), "stopped with TypeError")

    @pytest.mark.parametrize("check", ALL)
    def test_words_are_no_numbers(self, check):
        assert check(lambda *args: "0.3").right is False

    def test_the_sentence_is_what_is_shown(self):
        verdict = check_reward_difference(lambda c, r, rc, rr, beta: c - r)
        assert repr(verdict) == f"✗ Not right. {verdict.sentence}"
        assert verdict._repr_markdown_() == f"**✗ Not right.** {verdict.sentence}"

    def test_an_unknown_mistake_shows_the_numbers(self):
        says(check_entropy_penalty(lambda beta, h, alpha: beta.sum() * 0 + 7), "penalty: got 7, expected 0.4047")
        says(check_completion_logps(lambda logps, mask: logps.T), "got shape (4, 3), expected (3,)")
        says(check_completion_logps(lambda logps, mask: logps[:, 0] * torch.nan), "logps[0]: got nan, expected -1.8")


def answers() -> list:
    """(what, numbers) of each list that is searched."""
    by_form = (checks.dpo_loss_answers, checks.dpo_rewards_answers, checks.beta_gradient_answers)
    found = [(f"{numbers.__name__} {form}", numbers(form)) for numbers in by_form for form in FORMS]
    names = ("completion_logps", "optimal_policy", "reward_difference", "entropy_penalty", "smoothness_penalty")
    names += ("slope", "allocation", "bound", "token_entropy", "entropy_beta", "rho_within", "tilt", "share")
    return found + [(name, getattr(checks, f"{name}_answers")()) for name in names]


class TestAnswers:
    @pytest.mark.parametrize(("what", "numbers"), answers())
    def test_no_two_look_alike(self, what, numbers):
        # 1e-3 is 100 times the tolerance within which an answer is recognised
        known = [Mistake("right", numbers.right), *numbers.mistakes]
        for (a, one), (b, other) in itertools.combinations(known, 2):
            assert one.shape != other.shape or (one - other).abs().max() > 1e-3, (a, b)

    def test_by_hand(self):
        # h = 1.5, β = 0.2: −log σ(0.3) = log(1 + e^−0.3) = 0.55436; −log σ(7.5) = 0.00055
        assert checks.dpo_loss_answers("standard").right[0].item() == pytest.approx(0.554355, abs=1e-6)
        assert checks.dpo_loss_answers("inverse").right[0].item() == pytest.approx(0.000553, abs=1e-6)
        # gaps −0.3, 0.48, −0.21, 1.12: mean square (0.09 + 0.2304 + 0.0441 + 1.2544)/4
        assert checks.entropy_penalty_answers().right.item() == pytest.approx(1.6189 / 4, abs=1e-12)

    def test_the_smoothness_answer_by_finite_differences(self):
        (x,), right, _ = checks.smoothness_penalty_answers()
        net, step = checks.BetaWithBatchNorm().eval(), 1e-5
        slopes = [(net(x + step * e) - net(x - step * e)) / (2 * step) for e in torch.eye(3, dtype=x.dtype)]
        numeric = torch.stack(slopes).square().sum(0).mean()
        # central differences are off by step² times a third derivative of size 1
        torch.testing.assert_close(numeric, right, rtol=1e-8, atol=0)


class TestCheckCompletionLogps:
    def test_right(self):
        assert check_completion_logps(lambda logps, mask: (logps * mask).sum(1)).right

    @pytest.mark.parametrize(
        ("fn", "words"),
        [
            (lambda logps, mask: (logps * mask).sum(1) / mask.sum(1), "average over the tokens"),
            (lambda logps, mask: (logps * mask).mean(1), "padded length"),
            (lambda logps, mask: logps.sum(1), "mask is not used"),
            (lambda logps, mask: logps.masked_fill(mask, 0).sum(1), "wrong way round"),
            (lambda logps, mask: (logps * mask).sum(), "sum over the batch as well"),
            (lambda logps, mask: (logps * mask).sum(0), "axis 0"),
            (lambda logps, mask: -(logps * mask).sum(1), "sign is flipped"),
        ],
    )
    def test_names_the_mistake(self, fn, words):
        says(check_completion_logps(fn), words)


def reader_dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: Tensor,
    *,
    scale,
    h=lambda cr, rr: cr - rr,
    loss=lambda s, h: -F.logsigmoid(s * h),
    reward_scale=None,
    reward=lambda s, ratio: (s * ratio).detach(),
):
    """A right solution whose parts can be spoilt one at a time."""
    if beta.ndim != 1:
        raise ValueError("beta")
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    s = scale(beta)
    r = s if reward_scale is None else reward_scale(beta)
    return loss(s, h(chosen_ratio, rejected_ratio)), reward(r, chosen_ratio), reward(r, rejected_ratio)


RIGHT = {"inverse": lambda beta: 1 / beta, "standard": lambda beta: beta}


@pytest.mark.parametrize("form", FORMS)
class TestCheckDpoLoss:
    def test_right(self, form):
        assert check_dpo_loss(partial(reader_dpo, scale=RIGHT[form]), form=form).right
        assert check_dpo_loss(partial(losses.dpo_loss, form=form), form=form).right

    @pytest.mark.parametrize(
        ("spoilt", "words"),
        [
            ({"h": lambda c, r: r - c}, "Chosen and rejected are swapped"),
            ({"loss": lambda s, h: -F.logsigmoid(h)}, "β is missing from the loss"),
            ({"loss": lambda s, h: F.logsigmoid(s * h)}, "minus sign is missing"),
            ({"loss": lambda s, h: -torch.sigmoid(s * h)}, "logarithm is missing"),
            ({"loss": lambda s, h: -F.logsigmoid(s * h).mean()}, "averaged already"),
            ({"loss": lambda s, h: -F.logsigmoid(s * h).sum()}, "summed already"),
            ({"loss": lambda s, h: -F.logsigmoid(s[:, None] * h)}, "β has become a column"),
            ({"loss": lambda s, h: -F.logsigmoid(s[:, None] * h).mean()}, "You averaged the matrix"),
            ({"loss": lambda s, h: -F.logsigmoid(s * h.detach())}, "carry no gradient to the policy"),
            ({"loss": lambda s, h: -torch.sigmoid(s * h).log()}, "the loss is inf, expected"),
            ({"reward": lambda s, ratio: ratio.detach()}, "rewards are without β"),
            ({"reward": lambda s, ratio: s * ratio}, "carry a gradient"),
            ({"reward": lambda s, ratio: (s * ratio).mean().detach()}, "chosen_rewards: got shape ()"),
            ({"reward_scale": lambda beta: torch.ones_like(beta)}, "rewards are without β"),
        ],
    )
    def test_names_the_mistake(self, form, spoilt, words):
        says(check_dpo_loss(partial(reader_dpo, scale=RIGHT[form], **spoilt), form=form), words)

    def test_the_other_form(self, form):
        other = "standard" if form == "inverse" else "inverse"
        says(
            check_dpo_loss(partial(reader_dpo, scale=RIGHT[other]), form=form),
            f"β and 1/β are swapped: this is the {other}",
        )

    def test_rewards_with_another_beta_than_the_loss(self, form):
        other = RIGHT["standard" if form == "inverse" else "inverse"]
        fn = partial(reader_dpo, scale=RIGHT[form], reward_scale=other)
        says(check_dpo_loss(fn, form=form), "another β than the loss")

    def test_one_beta_for_all(self, form):
        fn = partial(reader_dpo, scale=lambda beta: RIGHT[form](beta.mean()))
        says(check_dpo_loss(fn, form=form), "One β, their mean")
        fn = partial(reader_dpo, scale=RIGHT[form], reward_scale=lambda beta: RIGHT[form](beta.mean()))
        says(check_dpo_loss(fn, form=form), "one β, the mean")

    def test_reference_missing(self, form):
        def fn(c, r, rc, rr, beta):
            s = RIGHT[form](beta)
            return -F.logsigmoid(s * (c - r)), s * (c - rc).detach(), s * (r - rr).detach()

        says(check_dpo_loss(fn, form=form), "The reference is missing")

    def test_rewards_without_reference_or_swapped(self, form):
        def parts(c, r, rc, rr, beta):
            return losses.dpo_loss(c, r, rc, rr, beta, form=form)

        def bare(c, r, rc, rr, beta):
            return parts(c, r, rc, rr, beta).losses, RIGHT[form](beta) * c, RIGHT[form](beta) * r

        def swapped(*args):
            out = parts(*args)
            return out.losses, out.rejected_rewards, out.chosen_rewards

        says(check_dpo_loss(bare, form=form), "rewards lack the reference")
        says(check_dpo_loss(swapped, form=form), "rewards are swapped")

    def test_a_column_that_goes_through(self, form):
        def fn(c, r, rc, rr, beta):
            s = RIGHT[form](beta)
            return -F.logsigmoid(s * ((c - rc) - (r - rr))), (s * (c - rc)).detach(), (s * (r - rr)).detach()

        says(check_dpo_loss(fn, form=form), "as a column (B, 1)")

    def test_losses_alone(self, form):
        says(check_dpo_loss(lambda c, r, rc, rr, beta: c - r, form=form), "Return three things")


def reader_gradient(h, beta, form, *, weight=lambda z: torch.sigmoid(-z), factor=lambda h: h, slope=None, swap=False):
    if swap:
        form = "standard" if form == "inverse" else "inverse"
    s = 1 / beta if form == "inverse" else beta
    inner = (-1 / beta**2 if form == "inverse" else 1) if slope is None else slope(beta, form)
    return -weight(s * h) * factor(h) * inner


class TestCheckBetaGradient:
    def test_right(self):
        assert check_beta_gradient(reader_gradient).right

    def test_right_by_autograd(self):
        def fn(h, beta, form):
            beta = beta.requires_grad_()
            (-F.logsigmoid(losses.scale(beta, form) * h)).sum().backward()
            return beta.grad

        assert check_beta_gradient(fn).right

    @pytest.mark.parametrize(
        ("spoilt", "words"),
        [
            ({"weight": lambda z: -torch.sigmoid(-z)}, "sign is flipped (standard form)"),
            ({"slope": lambda beta, form: 1 / beta**2 if form == "inverse" else 1}, "sign is flipped (inverse form)"),
            ({"weight": torch.sigmoid}, "you have σ(s·h)"),
            ({"factor": lambda h: 1}, "factor h is missing"),
            ({"slope": lambda beta, form: 1}, "chain rule adds"),
            ({"swap": True}, "β and 1/β are swapped"),
        ],
    )
    def test_names_the_mistake(self, spoilt, words):
        says(check_beta_gradient(partial(reader_gradient, **spoilt)), words)


def reader_policy(ref, r, beta):
    return torch.log_softmax(ref + r / beta, 1)


class TestCheckOptimalPolicy:
    def test_right(self):
        assert check_optimal_policy(reader_policy).right

    @pytest.mark.parametrize(
        ("fn", "words"),
        [
            (lambda ref, r, beta: ref + r / beta, "Z is forgotten"),
            (lambda ref, r, beta: ref + r / beta - (ref + r / beta).logsumexp((0, 1)), "One Z for the whole table"),
            (lambda ref, r, beta: torch.log_softmax(ref + r / beta, 0), "axis 0"),
            (lambda ref, r, beta: torch.log_softmax(ref + r * beta, 1), "β and 1/β are swapped"),
            (lambda ref, r, beta: torch.log_softmax(ref + r, 1), "β is missing"),
            (lambda ref, r, beta: torch.log_softmax(r / beta, 1), "The reference is missing"),
            (lambda ref, r, beta: torch.log_softmax((ref + r) / beta, 1), "The reference is divided by β"),
            (lambda ref, r, beta: torch.log_softmax(ref - r / beta, 1), "sign of the reward"),
            (lambda ref, r, beta: torch.softmax(ref + r / beta, 1), "These are probabilities"),
            (
                lambda ref, r, beta: (ref * (r / beta).exp() / (ref * (r / beta).exp()).sum(1, keepdim=True)).log(),
                "used as probabilities",
            ),
            (
                lambda ref, r, beta: ((ref + r / beta).exp() / (ref + r / beta).exp().sum(1, keepdim=True)).log(),
                "exp(r/β) overflows",
            ),
        ],
    )
    def test_names_the_mistake(self, fn, words):
        says(check_optimal_policy(fn), words)


class TestCheckRewardDifference:
    def test_right(self):
        assert check_reward_difference(lambda c, r, rc, rr, beta: beta * ((c - rc) - (r - rr))).right

    @pytest.mark.parametrize(
        ("fn", "words"),
        [
            (lambda c, r, rc, rr, beta: c - r, "what §4.1 prints first"),
            (lambda c, r, rc, rr, beta: beta * (c - r), "β·log π(y_w)/π(y_l)"),
            (lambda c, r, rc, rr, beta: (c - rc) - (r - rr), "β is missing"),
            (lambda c, r, rc, rr, beta: ((c - rc) - (r - rr)) / beta, "β and 1/β are swapped"),
            (lambda c, r, rc, rr, beta: beta * ((r - rr) - (c - rc)), "Chosen and rejected"),
            (lambda c, r, rc, rr, beta: beta * ((c + rc) - (r + rr)), "it is added"),
        ],
    )
    def test_names_the_mistake(self, fn, words):
        says(check_reward_difference(fn), words)


class TestCheckEntropyPenalty:
    def test_right(self):
        assert check_entropy_penalty(lambda b, h, a: (b - a * h.detach()).square().mean()).right
        assert check_entropy_penalty(regularizers.entropy_penalty).right

    @pytest.mark.parametrize(
        ("fn", "words"),
        [
            (lambda b, h, a: (b - a * h).square().sum(), "You sum over the batch"),
            (lambda b, h, a: (b - a * h).square(), "One number per prompt"),
            (lambda b, h, a: (b - a * h).mean().square(), "The mean is squared"),
            (lambda b, h, a: (b - a * h).abs().mean(), "mean absolute gap"),
            (lambda b, h, a: (b - a * h).mean(), "gaps of opposite sign cancel"),
            (lambda b, h, a: (b - h).square().mean(), "α is missing"),
            (lambda b, h, a: (a * b - h).square().mean(), "wrong side"),
            (lambda b, h, a: (b - h / a).square().mean(), "α divides H"),
            (lambda b, h, a: (b - a * h).square().mean().sqrt(), "root of the mean square"),
            (lambda b, h, a: (b[:, None] - a * h).square().mean(), "β has become a column"),
            (lambda b, h, a: (b - a * h).square().mean() / 2, "factor ½"),
            (lambda b, h, a: (b - a * h).square().mean(), "which is frozen: detach it"),
            (lambda b, h, a: (b - a * h).square().mean().detach(), "no gradient to β"),
        ],
    )
    def test_names_the_mistake(self, fn, words):
        says(check_entropy_penalty(fn), words)


def row_gradients(beta_fn, x, total=torch.sum, create_graph=True):
    x = x.requires_grad_()
    return torch.autograd.grad(total(beta_fn(x)), x, create_graph=create_graph)[0]


def in_evaluation_mode(penalty):
    """What a right solution does around its computation."""

    def fn(net, x):
        net.eval()
        try:
            return penalty(net, x)
        finally:
            net.train()

    return fn


class TestCheckSmoothnessPenalty:
    def test_right(self):
        assert check_smoothness_penalty(
            in_evaluation_mode(lambda net, x: row_gradients(net, x).square().sum(1).mean())
        ).right
        assert check_smoothness_penalty(regularizers.smoothness_penalty).right

    def test_the_batch_sum_in_training_mode(self):
        says(
            check_smoothness_penalty(lambda net, x: row_gradients(net, x).square().sum(1).mean()),
            "sum over the batch in training mode",
        )

    def test_the_row_gradient_in_training_mode(self):
        def fn(net, x):
            jacobian = torch.autograd.functional.jacobian(net, x)
            return jacobian.diagonal(dim1=0, dim2=1).square().sum(0).mean()

        says(check_smoothness_penalty(fn), "row by row, but of a β that depends on the batch")

    @pytest.mark.parametrize(
        ("penalty", "words"),
        [
            (lambda net, x: row_gradients(net, x).norm(dim=1).mean(), "square is missing"),
            (lambda net, x: row_gradients(net, x).square().sum(), "You sum over the batch"),
            (lambda net, x: row_gradients(net, x).square().sum(1), "One number per prompt"),
            (lambda net, x: row_gradients(net, x).square().mean(), "average over the features"),
            (lambda net, x: row_gradients(net, x, torch.mean).square().sum(1).mean(), "gradient of the mean of β"),
            (lambda net, x: row_gradients(lambda x: net(x).log(), x).square().sum(1).mean(), "gradient of log β"),
            (lambda net, x: row_gradients(net, x).mean(0).square().sum(), "squares the mean gradient"),
            (lambda net, x: row_gradients(net, x).square().sum(1).mean() / 2, "factor ½"),
            (lambda net, x: row_gradients(net, x, create_graph=False).square().sum(1).mean(), "create_graph=True"),
        ],
    )
    def test_names_the_mistake(self, penalty, words):
        says(check_smoothness_penalty(in_evaluation_mode(penalty)), words)

    def test_left_in_evaluation_mode(self):
        def fn(net, x):
            return row_gradients(net.eval(), x).square().sum(1).mean()

        says(check_smoothness_penalty(fn), "left in evaluation mode")


# -- right answers written otherwise, and right numbers with something wrong behind them ----------------------


def logistic(z: Tensor) -> Tensor:
    """σ by hand, finite on both sides."""
    e = torch.exp(-z.abs())
    return torch.where(z >= 0, 1 / (1 + e), e / (1 + e))


class TestCompletionLogpsOtherwise:
    @pytest.mark.parametrize(
        "fn",
        [
            lambda logps, mask: torch.einsum("bt,bt->b", logps, mask.to(logps.dtype)),
            lambda logps, mask: torch.einsum("bt,bt->b", logps, mask.float()),  # float32 only
            lambda logps, mask: torch.einsum("bt,bt->b", logps, mask.double()),  # float64 only
            lambda logps, mask: (logps.float() * mask).sum(1),
            lambda logps, mask: logps.masked_fill(~mask, 0.0).sum(-1),
            lambda logps, mask: torch.where(mask, logps, torch.zeros_like(logps)).sum(1),
            lambda logps, mask: torch.where(mask, logps, torch.nan).nansum(1),
            lambda logps, mask: torch.stack([row[m].sum() for row, m in zip(logps, mask, strict=True)]),
            lambda logps, mask: [row[m].sum() for row, m in zip(logps, mask, strict=True)],
            lambda logps, mask: (logps[:, None, :] @ mask.to(logps.dtype)[:, :, None])[:, 0, 0],
            lambda logps, mask: (logps * mask).cumsum(1)[:, -1],
            lambda logps, mask: (logps * mask.int()).sum(dim=1),
        ],
    )
    def test_accepted(self, fn):
        verdict = check_completion_logps(fn)
        assert verdict.right, verdict.sentence

    def test_a_loop_that_fills_a_tensor(self):
        def fn(logps, mask):
            total = torch.zeros(len(logps), dtype=logps.dtype)
            for t in range(logps.shape[1]):
                total += logps[:, t] * mask[:, t]
            return total

        assert check_completion_logps(fn).right

    @pytest.mark.parametrize(
        "fn",
        [
            lambda logps, mask: (logps.numpy() * mask.numpy()).sum(1),
            lambda logps, mask: (logps * mask).sum(1).tolist(),
        ],
    )
    def test_numbers_outside_torch_are_accepted_with_a_remark(self, fn):
        verdict = check_completion_logps(fn)
        assert verdict.right
        assert "only torch carries a gradient" in verdict.sentence

    @pytest.mark.parametrize(
        ("fn", "words"),
        [
            (lambda logps, mask: (logps.detach() * mask).sum(1), "no gradient reaches token_logps"),
            (lambda logps, mask: torch.tensor((logps * mask).sum(1).tolist()), "no gradient reaches token_logps"),
            (
                lambda logps, mask: (logps * mask)[:, :-1].sum(1) + (logps * mask)[:, -1].detach(),
                "∂logps[1]/∂token_logps[1, 3]",
            ),
            (lambda logps, mask: (logps.exp() ** mask).prod(1).log(), "a product of probabilities rounds to 0"),
            (lambda logps, mask: (logps * mask).sum(1, keepdim=True), "logps: got a column (3, 1), expected (3,)"),
            (lambda logps, mask: (logps[:, 1:] * mask[:, :-1]).sum(1), "off by one: it meets the token after its own"),
            (lambda logps, mask: (logps[:, :-1] * mask[:, 1:]).sum(1), "off by one: it meets the token before its own"),
            (lambda logps, mask: (logps * mask.roll(1, dims=1)).sum(1), "off by one: it meets the token after its own"),
            (lambda logps, mask: (logps.exp() * mask).sum(1), "sums of probabilities"),
            (lambda logps, mask: (logps * mask).sum(1).exp(), "return its logarithm"),
            (lambda logps, mask: logps * mask, "You did not sum"),
            (lambda logps, mask: (logps * mask).sum(1).mean(), "average over the batch as well"),
            (lambda logps, mask: (logps * mask).sum(1).bfloat16(), "got torch.bfloat16"),
            (lambda logps, mask: (logps * mask).sum(1).long(), "got torch.int64"),
            (lambda logps, mask: ((logps * mask).bfloat16()).sum(1).double(), "near, but not equal"),
            (lambda logps, mask: logps.mul_(mask).sum(1), "changes its argument 1 in place"),
            (
                lambda logps, mask: logps.mul(mask.logical_not_().logical_not()).sum(1),
                "changes its argument 2 in place",
            ),
        ],
    )
    def test_names_the_mistake(self, fn, words):
        says(check_completion_logps(fn), words)


STABLE = {
    "logsigmoid": lambda s, h: -F.logsigmoid(s * h),
    "softplus": lambda s, h: F.softplus(-s * h),
    "logaddexp": lambda s, h: torch.logaddexp(torch.zeros_like(h), -s * h),
    "logsumexp": lambda s, h: torch.logsumexp(torch.stack([torch.zeros_like(h), -s * h]), 0),
    "log_softmax": lambda s, h: -torch.log_softmax(torch.stack([s * h, torch.zeros_like(h)], 1), 1)[:, 0],
    "cross_entropy": lambda s, h: F.cross_entropy(
        torch.stack([s * h, torch.zeros_like(h)], 1), torch.zeros(len(h), dtype=torch.long), reduction="none"
    ),
    "bce": lambda s, h: F.binary_cross_entropy_with_logits(s * h, torch.ones_like(h), reduction="none"),
    "log1p, maximum": lambda s, h: torch.maximum(-s * h, torch.zeros_like(h)) + torch.log1p(torch.exp(-(s * h).abs())),
    "log1p, double where": lambda s, h: torch.where(
        s * h > 0,
        torch.log1p(torch.exp(-torch.where(s * h > 0, s * h, 0.0))),
        -s * h + torch.log1p(torch.exp(torch.where(s * h > 0, 0.0, s * h))),
    ),
    "loop": lambda s, h: torch.stack([F.softplus(-a * b) for a, b in zip(s, h, strict=True)]),
    "vmap": lambda s, h: torch.vmap(lambda a, b: -F.logsigmoid(a * b))(s, h),
    "in place on its own": lambda s, h: F.softplus((s * h).neg_()),
    "float32": lambda s, h: -F.logsigmoid((s * h).float()),
}
KINKED = {
    "relu": lambda s, h: F.relu(-s * h) + torch.log1p(torch.exp(-(s * h).abs())),
    "clamp": lambda s, h: torch.clamp(-s * h, min=0) + torch.log1p(torch.exp(-(s * h).abs())),
}
UNSTABLE = {
    "log σ": lambda s, h: -torch.log(torch.sigmoid(s * h)),
    "log1p exp": lambda s, h: torch.log1p(torch.exp(-s * h)),
    "log of a softmax": lambda s, h: -torch.softmax(torch.stack([s * h, torch.zeros_like(h)], 1), 1)[:, 0].log(),
    "log of 1 − σ": lambda s, h: -torch.log(1 - torch.sigmoid(-s * h)),
    "log of a division": lambda s, h: torch.log((torch.exp(s * h) + 1) / torch.exp(s * h)),
    "soft_margin_loss": lambda s, h: F.soft_margin_loss(s * h, torch.ones_like(h), reduction="none"),
}
CAPPED = {
    "σ + 1e-8": lambda s, h: -torch.log(torch.sigmoid(s * h) + 1e-8),
    "clamp σ, 1e-8": lambda s, h: -torch.log(torch.sigmoid(s * h).clamp(min=1e-8)),
    "clamp σ, 1e-38": lambda s, h: -torch.log(torch.sigmoid(s * h).clamp(min=1e-38)),
    "clamp the logit": lambda s, h: F.softplus((-s * h).clamp(-50, 50)),
    "bce of σ": lambda s, h: F.binary_cross_entropy(torch.sigmoid(s * h), torch.ones_like(h), reduction="none"),
    "nan_to_num": lambda s, h: torch.nan_to_num(-torch.log(torch.sigmoid(s * h)), posinf=100.0),
}
WRONG_SLOPE = {
    "where": lambda s, h: torch.where(s * h < -20, -s * h, -torch.log(torch.sigmoid(s * h))),
    "detached far branch": lambda s, h: torch.where(
        s * h < -20, (-s * h).detach(), F.softplus(-(s * h).clamp(min=-20))
    ),
}


def named(variants: dict) -> dict:
    return {"argvalues": list(variants.values()), "ids": list(variants)}


@pytest.mark.parametrize("form", FORMS)
class TestDpoLossOtherwise:
    @pytest.mark.parametrize("loss", **named(STABLE))
    def test_accepted(self, form, loss):
        verdict = check_dpo_loss(partial(reader_dpo, scale=RIGHT[form], loss=loss), form=form)
        assert verdict.right, verdict.sentence
        assert "remark" not in verdict.sentence

    @pytest.mark.parametrize("loss", **named(KINKED))
    def test_accepted_with_a_remark_on_its_kink(self, form, loss):
        # at step 0 every h is exactly 0: relu and |·| have slope 0 there, clamp has slope 1
        verdict = check_dpo_loss(partial(reader_dpo, scale=RIGHT[form], loss=loss), form=form)
        assert verdict.right, verdict.sentence
        assert "at h = 0 exactly, where training starts" in verdict.sentence

    @pytest.mark.parametrize("loss", **named(UNSTABLE))
    def test_not_finite(self, form, loss):
        verdict = check_dpo_loss(partial(reader_dpo, scale=RIGHT[form], loss=loss), form=form)
        says(verdict, "σ rounds to 0 and its logarithm is −∞, or exp overflows")

    @pytest.mark.parametrize("loss", **named(CAPPED))
    def test_capped(self, form, loss):
        verdict = check_dpo_loss(partial(reader_dpo, scale=RIGHT[form], loss=loss), form=form)
        says(verdict, "an ε added to σ, or a clamp, caps the loss")

    @pytest.mark.parametrize("loss", **named(WRONG_SLOPE))
    def test_a_branch_with_a_wrong_slope(self, form, loss):
        verdict = check_dpo_loss(partial(reader_dpo, scale=RIGHT[form], loss=loss), form=form)
        says(verdict, "the gradient with respect to policy_chosen_logps is")

    def test_a_list_another_grouping_and_detached_references(self, form):
        def fn(c, r, rc, rr, beta):
            if beta.ndim != 1:
                raise ValueError("beta")
            s = RIGHT[form](beta)
            z = s * c - s * r - s * rc.detach() + s * rr.detach()
            with torch.no_grad():
                rewards = [s * (c - rc), s * (r - rr)]
            return [F.softplus(-z), *rewards]

        assert check_dpo_loss(fn, form=form).right

    @pytest.mark.parametrize(
        ("spoilt", "words"),
        [
            ({"loss": lambda s, h: F.softplus(-s.detach() * h)}, "No gradient reaches β"),
            ({"h": lambda c, r: c.detach() - r}, "No gradient reaches policy_chosen_logps"),
            ({"h": lambda c, r: c - r.detach()}, "No gradient reaches policy_rejected_logps"),
            ({"h": lambda c, r: c - r.data}, "No gradient reaches policy_rejected_logps"),
            ({"loss": lambda s, h: F.softplus(-s * h).detach()}, "carry no gradient to the policy"),
            ({"loss": lambda s, h: torch.tensor(F.softplus(-s * h).tolist())}, "carry no gradient to the policy"),
            ({"h": lambda c, r: 2 * c - c.detach() - r}, "their gradient is not: ∂losses["),
            ({"h": lambda c, r: 2 * (c - r).detach() - (c - r)}, "wrong sign"),
            ({"loss": lambda s, h: F.softplus(-(2 * s.detach() - s) * h)}, "respect to beta has the wrong sign"),
            (
                {"loss": lambda s, h: F.softplus(-(s - s.mean() + s.mean().detach()) * h)},
                "their gradient is not: ∂losses[",
            ),
            (
                {"loss": lambda s, h: F.softplus(-s * h.abs() * (h / h.abs()).detach())},
                "At h = 0, where training starts: the loss is nan",
            ),
            ({"loss": lambda s, h: (h - 1 / (2 * s)).square()}, "IPO"),
            ({"loss": lambda s, h: F.relu(1 - s * h)}, "hinge"),
            ({"loss": lambda s, h: 0.9 * F.softplus(-s * h) + 0.1 * F.softplus(s * h)}, "labels are smoothed"),
            ({"loss": lambda s, h: -s * h}, "log σ is missing"),
            ({"loss": lambda s, h: torch.sigmoid(-s * h)}, "the weight of the pair"),
            ({"loss": lambda s, h: F.softplus(-s[0] * h)}, "One β, the first"),
            ({"loss": lambda s, h: F.softplus(-s * h)[:, None]}, "losses: got a column (4, 1), expected (4,)"),
            ({"loss": lambda s, h: F.softplus(-s * h).bfloat16()}, "losses: got torch.bfloat16"),
            ({"loss": lambda s, h: F.softplus(-s * h).bfloat16().double()}, "near, but not equal"),
            ({"reward": lambda s, ratio: -(s * ratio).detach()}, "rewards have the wrong sign"),
        ],
    )
    def test_names_the_mistake(self, form, spoilt, words):
        says(check_dpo_loss(partial(reader_dpo, scale=RIGHT[form], **spoilt), form=form), words)

    def test_beta_detached_before_s(self, form):
        fn = partial(reader_dpo, scale=lambda beta: RIGHT[form](beta.detach()))
        says(check_dpo_loss(fn, form=form), "No gradient reaches β")

    def test_beta_clamped(self, form):
        # within the moderate numbers, and outside at β = 1/16 and 16
        fn = partial(reader_dpo, scale=lambda beta: RIGHT[form](beta.clamp(0.1, 10)))
        verdict = check_dpo_loss(fn, form=form)
        says(verdict, f"at h = 30, β = {'16' if form == 'inverse' else '0.0625'} the loss is")
        says(verdict, "h or β is clamped")

    def test_a_changed_argument(self, form):
        def fn(c, r, rc, rr, beta):
            c -= rc
            return reader_dpo(c, r, 0.0, rr, beta, scale=RIGHT[form])

        says(check_dpo_loss(fn, form=form), "changes its argument 1 in place")

    def test_a_column_that_is_squeezed(self, form):
        def fn(c, r, rc, rr, beta):
            return reader_dpo(c, r, rc, rr, beta.reshape(-1), scale=RIGHT[form])

        says(check_dpo_loss(fn, form=form), "silently repaired; the exercise asks you to refuse it")

    def test_the_gradient_at_zero(self, form):
        def fn(c, r, rc, rr, beta):
            h = (c - rc) - (r - rr)
            nothing = 0 * h.abs().sqrt()  # slope 0·∞ at 0
            out = reader_dpo(c, r, rc, rr, beta, scale=RIGHT[form])
            return out[0] + nothing, *out[1:]

        says(check_dpo_loss(fn, form=form), "At h = 0, where training starts, the gradient is not finite")


def by_autograd(h, beta, form):
    beta = beta.clone().requires_grad_()
    return torch.autograd.grad(F.softplus(-losses.scale(beta, form) * h).sum(), beta)[0]


def by_vmap(h, beta, form):
    return torch.vmap(torch.func.grad(lambda b, h: F.softplus(-(1 / b if form == "inverse" else b) * h)))(beta, h)


class TestBetaGradientOtherwise:
    @pytest.mark.parametrize(
        "fn",
        [
            partial(reader_gradient, weight=lambda z: 1 / (1 + torch.exp(z))),
            partial(reader_gradient, weight=lambda z: 1 - torch.sigmoid(z)),
            partial(reader_gradient, weight=lambda z: F.logsigmoid(-z).exp()),
            partial(reader_gradient, weight=lambda z: (1 - torch.tanh(z / 2)) / 2),
            partial(reader_gradient, weight=lambda z: torch.softmax(torch.stack([-z, 0 * z]), 0)[0]),
            partial(reader_gradient, weight=lambda z: logistic(-z)),
            partial(reader_gradient, slope=lambda beta, form: -beta.pow(-2) if form == "inverse" else beta / beta),
            by_autograd,
            by_vmap,
            lambda h, beta, form: torch.func.jacrev(lambda b: F.softplus(-(1 / b if form == "inverse" else b) * h))(
                beta
            ).diagonal(),
            lambda h, beta, form: list(reader_gradient(h, beta, form)),
            lambda h, beta, form: reader_gradient(h, beta, form).numpy(),
            lambda h, beta, form: reader_gradient(h.float(), beta.float(), form),
        ],
    )
    def test_accepted(self, fn):
        verdict = check_beta_gradient(fn)
        assert verdict.right, verdict.sentence

    @pytest.mark.parametrize(
        ("spoilt", "words"),
        [
            (
                {"weight": lambda z: torch.exp(-z) / (1 + torch.exp(-z))},
                "the gradient is nan, expected 30: exp overflows",
            ),
            ({"weight": lambda z: torch.exp(-z) / torch.exp(-z).add(1)}, "exp overflows"),
            ({"weight": lambda z: torch.sigmoid((-z).clamp(max=3)) if len(z) > 4 else torch.sigmoid(-z)}, "expected"),
            ({"slope": lambda beta, form: -1 / beta if form == "inverse" else 1}, "ds/dβ = −1/β² in the inverse form"),
            ({"slope": lambda beta, form: beta if form == "standard" else -1 / beta**2}, "This is ∂ℓ/∂log β"),
            ({"factor": lambda h: h / 4}, "You divide by the batch"),
            ({"weight": lambda z: 1}, "weight σ(−s·h) is missing"),
        ],
    )
    def test_names_the_mistake(self, spoilt, words):
        says(check_beta_gradient(partial(reader_gradient, **spoilt)), words)

    @pytest.mark.parametrize(
        ("fn", "words"),
        [
            (lambda h, b, form: F.softplus(-losses.scale(b, form) * h), "This is the loss"),
            (lambda h, b, form: -torch.sigmoid(-losses.scale(b, form) * h) * losses.scale(b, form), "This is ∂ℓ/∂h"),
            (lambda h, b, form: by_autograd(h, b, form).sum(), "You sum over the batch"),
            (lambda h, b, form: by_autograd(h, b, form).mean(), "You average over the batch"),
            (lambda h, b, form: by_autograd(h, b, form)[:, None], "got a column (4, 1)"),
            (lambda h, b, form: by_autograd(h, b.reciprocal_().reciprocal(), form), "changes its argument 2 in place"),
            (lambda h, b, form: by_autograd(h, b, form)[:4], "got shape (4,) for 18 pairs"),
        ],
    )
    def test_names_the_mistake_of_a_whole(self, fn, words):
        says(check_beta_gradient(fn), words)

    def test_autograd_through_an_unstable_loss(self):
        def fn(h, beta, form):
            beta = beta.clone().requires_grad_()
            loss = -torch.log(torch.sigmoid(losses.scale(beta, form) * h))
            return torch.autograd.grad(loss.sum(), beta)[0]

        says(check_beta_gradient(fn), "the gradient is nan")


class TestOptimalPolicyOtherwise:
    @pytest.mark.parametrize(
        "fn",
        [
            lambda ref, r, beta: ref + r / beta - torch.logsumexp(ref + r / beta, 1, keepdim=True),
            lambda ref, r, beta: torch.distributions.Categorical(logits=ref + r / beta).logits,
            lambda ref, r, beta: F.log_softmax(torch.add(ref, r, alpha=1 / beta), dim=-1),
            lambda ref, r, beta: torch.stack([torch.log_softmax(a + b / beta, 0) for a, b in zip(ref, r, strict=True)]),
            lambda ref, r, beta: [torch.log_softmax(a + b / beta, 0) for a, b in zip(ref, r, strict=True)],
            lambda ref, r, beta: torch.log_softmax(ref.detach() + r / beta, 1),
            lambda ref, r, beta: torch.log_softmax(ref + r / beta, 1).detach(),
            lambda ref, r, beta: torch.log_softmax(ref + r / beta, 1).numpy(),
            lambda ref, r, beta: torch.from_numpy(torch.log_softmax(ref + r / beta, 1).numpy()),
            lambda ref, r, beta: torch.log_softmax((ref + r / beta).float(), 1),
        ],
    )
    def test_accepted(self, fn):
        verdict = check_optimal_policy(fn)
        assert verdict.right, verdict.sentence

    def test_accepted_with_the_maximum_subtracted(self):
        def fn(ref, r, beta):
            z = ref + r / beta
            z = z - z.max(1, keepdim=True).values
            return z - z.exp().sum(1, keepdim=True).log()

        assert check_optimal_policy(fn).right

    @pytest.mark.parametrize(
        ("fn", "words"),
        [
            (lambda ref, r, beta: torch.softmax(ref + r / beta, 1).log(), "a small probability rounds to 0"),
            (
                lambda ref, r, beta: ref + r / beta - (ref + r / beta).exp().sum(1, keepdim=True).log(),
                "exp(r/β) overflows",
            ),
            (lambda ref, r, beta: (torch.softmax(ref + r / beta, 1) + 1e-12).log(), "an ε or a clamp"),
            (lambda ref, r, beta: torch.softmax(ref + r / beta, 1).clamp(min=1e-30).log(), "an ε or a clamp"),
            (
                lambda ref, r, beta: ref + r / beta - (r / beta).logsumexp(1, keepdim=True),
                "Z is the sum of exp(r/β) alone",
            ),
            (
                lambda ref, r, beta: reader_policy(ref, r, beta) + torch.tensor(3.0).log(),
                "Z is a mean over the answers",
            ),
            (lambda ref, r, beta: F.one_hot((ref + r / beta).argmax(1), 3), "greedy policy"),
            (lambda ref, r, beta: torch.log_softmax(ref + (2 * r.detach() - r) / beta, 1), "wrong sign"),
            (
                lambda ref, r, beta: torch.log_softmax(ref + (2 * r - r.detach()) / beta, 1),
                "their gradient is not: ∂log π*[",
            ),
            (lambda ref, r, beta: reader_policy(ref.add_(r / beta), 0 * r, beta), "changes its argument 1 in place"),
        ],
    )
    def test_names_the_mistake(self, fn, words):
        says(check_optimal_policy(fn), words)


class TestRewardDifferenceOtherwise:
    @pytest.mark.parametrize(
        "fn",
        [
            lambda c, r, rc, rr, beta: beta * (c - r) - beta * (rc - rr),
            lambda c, r, rc, rr, beta: beta * (c - rc.detach()) - beta * (r - rr.detach()),
            lambda c, r, rc, rr, beta: (beta * ((c - rc) - (r - rr))).detach(),
            lambda c, r, rc, rr, beta: beta * torch.log((c - rc).exp() / (r - rr).exp()),
            lambda c, r, rc, rr, beta: (beta * ((c - rc) - (r - rr))).tolist(),
            lambda c, r, rc, rr, beta: beta * ((c - rc) - (r - rr)).numpy(),
            lambda c, r, rc, rr, beta: torch.logit(torch.sigmoid(beta * ((c - rc) - (r - rr)))),
        ],
    )
    def test_accepted(self, fn):
        verdict = check_reward_difference(fn)
        assert verdict.right, verdict.sentence

    @pytest.mark.parametrize(
        ("fn", "words"),
        [
            (lambda c, r, rc, rr, beta: beta * ((c.detach() - rc) - (r - rr)), "one side of h is detached"),
            (lambda c, r, rc, rr, beta: beta * ((c - rc) - (r - rr).detach()), "one side of h is detached"),
            (lambda c, r, rc, rr, beta: beta * ((c - rr) - (r - rc)), "two references are swapped"),
            (lambda c, r, rc, rr, beta: beta * (c - rc), "the chosen answer alone"),
            (lambda c, r, rc, rr, beta: beta * (r - rr), "the rejected answer alone"),
            (lambda c, r, rc, rr, beta: (beta * ((c - rc) - (r - rr))).exp(), "This is exp(β·h)"),
            (lambda c, r, rc, rr, beta: (beta * ((c - rc) - (r - rr))).sigmoid(), "Bradley–Terry"),
            (lambda c, r, rc, rr, beta: beta * (c.sub_(rc) - (r - rr)), "changes its argument 1 in place"),
        ],
    )
    def test_names_the_mistake(self, fn, words):
        says(check_reward_difference(fn), words)


class TestEntropyPenaltyOtherwise:
    @pytest.mark.parametrize(
        "fn",
        [
            lambda b, h, a: F.mse_loss(b, a * h.detach()),
            lambda b, h, a: ((b - a * h.data) ** 2).mean(),
            lambda b, h, a: (b - a * h.detach()).pow(2).sum() / len(b),
            lambda b, h, a: (b - a * h.detach()).norm() ** 2 / len(b),
            lambda b, h, a: (b - a * h.detach()) @ (b - a * h.detach()) / len(b),
            lambda b, h, a: (b.square() - 2 * a * b * h.detach() + (a * h.detach()).square()).mean(),
            lambda b, h, a: (b - a * h.detach()).abs().square().mean(),
            lambda b, h, a: sum((x - a * y.item()) ** 2 for x, y in zip(b, h, strict=True)) / len(b),
            lambda b, h, a: (b - a * h.detach()).float().square().mean(),
            lambda b, h, a: torch.var(b - a * h.detach(), correction=0) + (b - a * h.detach()).mean() ** 2,
        ],
    )
    def test_accepted(self, fn):
        verdict = check_entropy_penalty(fn)
        assert verdict.right, verdict.sentence

    @pytest.mark.parametrize(
        ("fn", "words"),
        [
            (lambda b, h, a: F.mse_loss(b.detach(), a * h), "no gradient to β"),
            (lambda b, h, a: F.mse_loss(b.detach(), a * h.detach()), "no gradient to β"),
            (lambda b, h, a: ((b - a * h.detach()) * (b - a * h).detach()).mean(), "∂penalty/∂beta["),
            (lambda b, h, a: 2 * F.mse_loss(b, a * h.data).detach() - F.mse_loss(b, a * h.data), "wrong sign"),
            (lambda b, h, a: (b - a * h.detach()).square().sqrt().square().mean(), "∂penalty/∂beta[0] is nan"),
            (lambda b, h, a: (b - a * h.detach()).square().mean().sqrt() ** 2, "∂penalty/∂beta[0] is nan"),
            (lambda b, h, a: (1 / b - a * h.detach()).square().mean(), "This is 1/β"),
            (lambda b, h, a: (b.log() - (a * h.detach()).log()).square().mean(), "distance of logarithms"),
            (lambda b, h, a: (b / (a * h.detach()) - 1).square().mean(), "relative distance"),
            (lambda b, h, a: -F.mse_loss(b, a * h.detach()), "a penalty is positive"),
            (lambda b, h, a: (b + a * h.detach()).square().mean(), "H is added"),
            (lambda b, h, a: F.mse_loss(b, a * h.detach()).reshape(1), "penalty: got a column (1,), expected ()"),
            (lambda b, h, a: F.mse_loss(b, h.mul_(a).detach()), "changes its argument 2 in place"),
            (lambda b, h, a: F.mse_loss(b, a * h.detach()).item(), "no gradient to β"),
        ],
    )
    def test_names_the_mistake(self, fn, words):
        says(check_entropy_penalty(fn), words)


def squared(gradient: Tensor) -> Tensor:
    return gradient.square().sum(1).mean()


def finite_differences(net, x, step=1e-5):
    slopes = [(net(x + step * e) - net(x - step * e)) / (2 * step) for e in torch.eye(x.shape[1], dtype=x.dtype)]
    return torch.stack(slopes, 1)


class TestSmoothnessPenaltyOtherwise:
    def test_the_gradient_by_finite_differences(self):
        (x,) = checks.smoothness_penalty_answers().args
        gradient = checks.smoothness_gradient(x)
        step = 1e-6
        for d in range(3):
            values = []
            for sign in (1, -1):
                net = checks.BetaWithBatchNorm().eval()
                net.weight.data[d] += sign * step
                values.append(squared(row_gradients(net, x)).item())
            # rounding 1e-16/step and step² times a third derivative of size 10
            assert (values[0] - values[1]) / (2 * step) == pytest.approx(gradient[d].item(), rel=1e-7)

    @pytest.mark.parametrize(
        "penalty",
        [
            lambda net, x: (
                torch.autograd.grad(net(x.requires_grad_()).sum(), x, create_graph=True)[0].pow(2).sum(1).mean()
            ),
            lambda net, x: row_gradients(net, x).norm(dim=1).square().mean(),
            lambda net, x: row_gradients(net, x).square().sum() / len(x),
            lambda net, x: torch.einsum("bd,bd->", *[row_gradients(net, x)] * 2) / len(x),
            lambda net, x: squared(finite_differences(net, x)),
            lambda net, x: squared(torch.stack([row_gradients(net, row[None].detach())[0] for row in x])),
            lambda net, x: squared(torch.autograd.functional.jacobian(net, x, create_graph=True).diagonal(0, 0, 1).T),
            lambda net, x: squared(torch.func.grad(lambda x: net(x).sum())(x)),
            lambda net, x: squared(torch.vmap(torch.func.grad(lambda row: net(row[None])[0]))(x)),
            lambda net, x: squared(
                torch.func.grad(lambda x: torch.func.functional_call(net, dict(net.named_parameters()), (x,)).sum())(x)
            ),
        ],
    )
    def test_accepted(self, penalty):
        verdict = check_smoothness_penalty(in_evaluation_mode(penalty))
        assert verdict.right, verdict.sentence

    def test_accepted_on_a_copy_that_shares_the_parameters(self):
        def fn(net, x):
            twin = copy.deepcopy(net).eval()
            shared = dict(net.named_parameters())
            return squared(torch.func.grad(lambda x: torch.func.functional_call(twin, shared, (x,)).sum())(x))

        assert check_smoothness_penalty(fn).right

    @pytest.mark.parametrize(
        ("fn", "words"),
        [
            (lambda net, x: squared(row_gradients(copy.deepcopy(net).eval(), x)), "never reaches the parameters"),
            (
                in_evaluation_mode(
                    lambda net, x: squared(
                        row_gradients(
                            lambda x: torch.func.functional_call(
                                net, {n: p.detach().requires_grad_() for n, p in net.named_parameters()}, (x,)
                            ),
                            x,
                        )
                    )
                ),
                "never reaches the parameters",
            ),
            (
                in_evaluation_mode(
                    lambda net, x: squared(net(x)[:, None].detach() * row_gradients(lambda x: net(x).log(), x))
                ),
                "their gradient is not: ∂penalty/∂weight[",
            ),
            (
                in_evaluation_mode(lambda net, x: row_gradients(net, x).square().sum(1).sqrt().square().mean()),
                "the same for all prompts",
            ),
            (in_evaluation_mode(lambda net, x: row_gradients(net, x).abs().sum(1).mean()), "sums absolute values"),
            (in_evaluation_mode(lambda net, x: row_gradients(net, x).norm()), "norm over the whole batch"),
            (in_evaluation_mode(lambda net, x: -squared(row_gradients(net, x))), "a penalty is positive"),
            (
                in_evaluation_mode(
                    lambda net, x: torch.autograd.grad(net(x).sum(), net.weight, create_graph=True)[0].square().sum()
                ),
                "gradient with respect to the parameters",
            ),
            (
                lambda net, x: (net(x), in_evaluation_mode(lambda n, x: squared(row_gradients(n, x)))(net, x))[1],
                "called in training mode before the penalty is taken",
            ),
            (
                lambda net, x: (in_evaluation_mode(lambda n, x: squared(row_gradients(n, x)))(net, x), net(x))[0],
                "`norm.running_mean` is not what it was",
            ),
            (in_evaluation_mode(lambda net, x: squared(row_gradients(net, x)).reshape(1)), "got a column (1,)"),
        ],
    )
    def test_names_the_mistake(self, fn, words):
        says(check_smoothness_penalty(fn), words)

    @pytest.mark.filterwarnings("ignore:Using backward():UserWarning")
    def test_backward_fills_the_gradients_of_the_parameters(self):
        def penalty(net, x):
            x = x.requires_grad_()
            net(x).sum().backward(create_graph=True)
            return squared(x.grad)

        says(check_smoothness_penalty(in_evaluation_mode(penalty)), "fills `.grad` of the parameters")

    def test_a_changed_weight(self):
        def penalty(net, x):
            value = squared(row_gradients(net, x))
            net.weight.data.mul_(0.5)
            return value

        says(check_smoothness_penalty(in_evaluation_mode(penalty)), "`weight` is not what it was")


class TestKLEstimate:
    def right(self, policy, ref):
        ratio = policy - ref
        return ratio.mean(), ratio.std() / len(ratio) ** 0.5

    def test_right_answers(self):
        assert checks.check_kl_estimate(self.right).right
        assert checks.check_kl_estimate(
            lambda p, r: [(p - r).mean().item(), torch.var(p - r).div(5).sqrt().item()]
        ).right
        assert checks.check_kl_estimate(lambda p, r: ((p - r).float().mean(), self.right(p, r)[1])).right

    def test_the_answer_by_hand(self):
        """Log-ratios 0.5, −0.5, 1.4, 0.1, 1.2: mean 0.54; squares of the gaps sum to 2.452, over 4 and over 5."""
        assert checks.kl_estimate_answers().right.tolist() == pytest.approx([0.54, (2.452 / 4 / 5) ** 0.5], abs=1e-12)

    def test_each_mistake_is_named_and_no_two_agree(self):
        _, right, mistakes = checks.kl_estimate_answers()
        values = [right, *(mistake.value for mistake in mistakes)]
        assert all(not torch.allclose(a, b, rtol=1e-3) for i, a in enumerate(values) for b in values[:i])
        for mistake in mistakes:
            verdict = checks.check_kl_estimate(lambda p, r, value=mistake.value: tuple(value))
            assert (verdict.right, verdict.sentence) == (False, mistake.sentence)

    def test_other_shapes(self):
        assert checks.check_kl_estimate(lambda p, r: ...).right is None
        assert "two things" in checks.check_kl_estimate(lambda p, r: (p - r).mean()).sentence


class TestRewardPerNat:
    """The three exercises of notebook 08."""

    @staticmethod
    def slope(ref_logps, h, rewards):
        p = ref_logps.exp()
        h = h - (p * h).sum(1, keepdim=True)
        return (p * h * rewards).sum(1) / (p * h * h).sum(1)

    @staticmethod
    def factors(slopes, variances, budget):
        b = torch.relu(slopes)
        return b / ((variances * b**2).mean() / (2 * budget)) ** 0.5

    @staticmethod
    def bound(slopes, variances):
        return (slopes.square() @ variances * variances.sum()) ** 0.5 / (slopes @ variances) - 1

    def test_right_answers(self):
        assert check_slope(self.slope).right
        assert check_slope(lambda ref, h, r: [tabular.tilt_moments(*(t[i : i + 1] for t in (ref, h, r)), 0.0).slope[0]
                                              for i in range(len(h))]).right  # fmt: skip
        assert check_allocation(self.factors).right
        assert check_bound(self.bound).right

    def test_right_answers_are_the_librarys(self):
        args, right, _ = checks.allocation_answers()
        table = {"task": range(3), "slope": args[0], "variance": args[1], "prompts": 1, "se": 0.0}
        assert allocate(pd.DataFrame(table), kl=args[2])["a"].to_numpy() == pytest.approx(right.numpy())
        (slopes, variances), right, _ = checks.bound_answers()
        table = pd.DataFrame({**table, "slope": slopes, "variance": variances})
        assert gain_bound(table, resamples=100).plain == pytest.approx(right.item())

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            (lambda ref, *x: torch.stack([torch.cov(torch.stack(p))[0, 1] / p[0].var() for p in zip(*x, strict=True)]),
             "weighed equally"),
            (lambda ref, h, r: (ref.exp() * h * r).sum(1) / (ref.exp() * h * h).sum(1), "means are not subtracted"),
            (lambda ref, h, r: TestRewardPerNat.slope(ref, r, h), "slope of h on the reward"),
            (lambda ref, h, r: 1 / TestRewardPerNat.slope(ref, h, r), "Upside down"),
            (lambda ref, h, r: TestRewardPerNat.slope(ref, h, r).mean(), "got shape ()"),
        ],
    )  # fmt: skip
    def test_wrong_slopes(self, wrong, words):
        says(check_slope(wrong), words)

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            (lambda b, v, kl: b / ((v * b**2).mean() / (2 * kl)).sqrt(), "negative slope counts as 0"),
            (lambda b, v, kl: (2 * kl / v).sqrt(), "every task the same KL"),
            (lambda b, v, kl: (2 * kl / v.mean()).sqrt().expand(3), "factors are equal"),
            (lambda b, v, kl: TestRewardPerNat.factors(b, v, kl / 2), "the ½ is missing"),
            (lambda b, v, kl: TestRewardPerNat.factors(b, v, kl / 3), "mean over tasks"),
            (lambda b, v, kl: torch.relu(b), "direction b alone"),
            (lambda b, v, kl: TestRewardPerNat.factors(b, v, 0.3), "at a quarter of the budget"),
        ],
    )
    def test_wrong_factors(self, wrong, words):
        says(check_allocation(wrong), words)

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            (lambda b, v: TestRewardPerNat.bound(b, v) + 1, "1 is not subtracted"),
            (lambda b, v: (TestRewardPerNat.bound(b, v) + 1) ** 2 - 1, "This is CV²"),
            (lambda b, v: TestRewardPerNat.bound(b, torch.ones(3, dtype=b.dtype)), "weigh equally"),
            (lambda b, v: TestRewardPerNat.bound(b, v**2), "The weights are Var(h)²"),
            (lambda b, v: 1 - 1 / (TestRewardPerNat.bound(b, v) + 1), "Upside down"),
        ],
    )
    def test_wrong_bounds(self, wrong, words):
        says(check_bound(wrong), words)


class TestComparison:
    """The two exercises of notebook 06."""

    @staticmethod
    def tilt(h, rewards, a):
        weights = torch.exp(a * h)
        p = weights / weights.sum(1, keepdim=True)
        return (p * rewards).sum(1).mean(), (p * torch.log(h.shape[1] * p)).sum(1).mean()

    @staticmethod
    def share(contender, constant, oracle):
        above = contender - constant
        return above.mean() / (oracle - constant).mean(), above.mean() / above.std() * len(above) ** 0.5

    def test_right_answers(self):
        assert check_tilt(self.tilt).right
        assert check_share(self.share).right

    def test_right_answers_are_the_librarys(self):
        (h, rewards, a), right, _ = checks.tilt_answers()
        moments = tabular.tilt_moments(torch.log_softmax(torch.zeros_like(h), 1), h, rewards, a)
        assert [moments.reward.mean().item(), moments.kl.mean().item()] == pytest.approx(right.tolist())
        (contender, constant, _), right, _ = checks.share_answers()
        assert ttest_rel(contender, constant).statistic == pytest.approx(right[1].item())

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            (lambda h, r, a: TestComparison.tilt(h, r, 1), "The factor a is missing"),
            (lambda h, r, a: [2 * x for x in TestComparison.tilt(h, r, a)], "this is the sum"),
            (lambda h, r, a: TestComparison.tilt(h, r, a)[0], "Return two things"),
            (lambda h, r, a: (TestComparison.tilt(h, r, a)[0], (torch.softmax(a * h, 1) * a * h).sum(1).mean()),
             "log Z is not subtracted"),
        ],
    )  # fmt: skip
    def test_wrong_tilts(self, wrong, words):
        says(check_tilt(wrong), words)

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            (
                lambda c, k, o: (((c - k) / (o - k)).mean(), TestComparison.share(c, k, o)[1]),
                "mean of the worlds' shares",
            ),
            (lambda c, k, o: TestComparison.share(k + k - c, k, o), "The sign is flipped"),
            (lambda c, k, o: (TestComparison.share(c, k, o)[0], ttest_ind(c, k).statistic), "t is not paired"),
            (lambda c, k, o: TestComparison.share(c, k, o)[0], "Return two things: the share"),
        ],
    )
    def test_wrong_shares(self, wrong, words):
        says(check_share(wrong), words)


class TestCheckTokenEntropy:
    @pytest.mark.parametrize(
        "fn",
        [
            lambda e, m: (e * m).sum() / m.sum(),
            lambda e, m: e[m].mean(),
            lambda e, m: torch.where(m, e, 0.0).sum().div(m.sum()).item(),
            lambda e, m: sum(x[k].sum() for x, k in zip(e, m, strict=True)) / m.sum(),
            lambda e, m: e.masked_fill(~m, torch.nan).float().nanmean(),
        ],
    )
    def test_right(self, fn):
        assert check_token_entropy(fn).right

    def test_by_hand(self):
        assert checks.token_entropy_answers().right.item() == pytest.approx((3.8 + 1.8 + 2.1) / 9, abs=1e-12)

    @pytest.mark.parametrize(
        ("fn", "words"),
        [
            (lambda e, m: ((e * m).sum(1) / m.sum(1)).mean(), "averaged first"),
            (lambda e, m: (e * m).mean(), "padding is counted"),
            (lambda e, m: e.mean(), "mask is not used"),
            (lambda e, m: e[~m].mean(), "wrong way round"),
            (lambda e, m: (e * m).sum(1).mean(), "nats per answer"),
            (lambda e, m: (e * m).sum(), "sum over all answers"),
            (lambda e, m: e[:, 0].mean(), "first token"),
            (lambda e, m: (e * m).sum(1) / m.sum(1), "One number per answer"),
            (lambda e, m: (e * m).sum() / e.shape[1], "longest answer"),
            (lambda e, m: -e[m].mean(), "not negative"),
            (lambda e, m: e[m].mean() / torch.tensor(2.0).log(), "bits"),
            (lambda e, m: e.mul_(m).sum() / m.sum(), "in place"),
            (lambda e, m: e[m].mean() + 1, "none of the usual mistakes"),
        ],
    )
    def test_wrong(self, fn, words):
        says(check_token_entropy(fn), words)


class TestCheckEntropyBeta:
    @pytest.mark.parametrize(
        "fn",
        [
            lambda h, b, low, high: (b / h.mean() * h).clamp(low, high),
            lambda h, b, low, high: torch.clip(h * len(h) * b / h.sum(), low, high),
            lambda h, b, low, high: torch.minimum(
                torch.maximum(b * h / h.mean(), torch.tensor(low)), torch.tensor(high)
            ),
            lambda h, b, low, high: [min(max(float(b / h.mean() * x), low), high) for x in h],
            lambda h, b, low, high: (b / h.numpy().mean() * h.numpy()).clip(low, high),
        ],
    )
    def test_right(self, fn):
        assert check_entropy_beta(fn).right

    def test_the_library_agrees(self):
        (entropy, beta0, low, high), right, _ = checks.entropy_beta_answers()
        rule = EntropyBeta(beta0 / entropy.mean().item(), low, high)
        torch.testing.assert_close(rule(torch.zeros(5, 1), ref_entropy=entropy).double(), right, rtol=1e-6, atol=0)

    @pytest.mark.parametrize(
        ("fn", "words"),
        [
            (lambda h, b, low, high: b * h / h.mean(), "range is missing"),
            (lambda h, b, low, high: (b * h / h.mean()).clamp(max=high), "lower end"),
            (lambda h, b, low, high: (b * h / h.mean()).clamp(min=low), "upper end"),
            (lambda h, b, low, high: (h / h.mean()).clamp(low, high), "β₀ is missing"),
            (lambda h, b, low, high: (b * h).clamp(low, high), "α is β₀ here"),
            (lambda h, b, low, high: h.clamp(low, high), "H itself"),
            (lambda h, b, low, high: (b * (1 / h).mean() * h).clamp(low, high), "not the mean of β₀/H"),
            (lambda h, b, low, high: (b * h / h.median()).clamp(low, high), "median"),
            (lambda h, b, low, high: (b * h / h.sum()).clamp(low, high), "its sum"),
            (lambda h, b, low, high: (b * h / h.max()).clamp(low, high), "largest value"),
            (lambda h, b, low, high: (b * h.mean() / h).clamp(low, high), "Upside down"),
            (lambda h, b, low, high: torch.full_like(h, b), "H is not used"),
            (lambda h, b, low, high: (c := (b * h / h.mean()).clamp(low, high)) / c.mean() * b, "scaled once more"),
            (lambda h, b, low, high: b * (c := h.clamp(low, high)) / c.mean(), "H is clipped"),
            (lambda h, b, low, high: torch.tensor([0.1, 0.125, 0.2, 0.35, 0.5]) + 0.04 * (h[0] > 0.1), "in bits"),
        ],
    )
    def test_wrong(self, fn, words):
        says(check_entropy_beta(fn), words)


class TestCheckRhoWithin:
    @staticmethod
    def ranks(rows):
        return rows[["beta", "ref_entropy"]].rank()

    @pytest.mark.parametrize(
        "fn",
        [
            lambda t: {n: g["beta"].corr(g["ref_entropy"], method="spearman") for n, g in t.groupby("task")},
            lambda t: {n: spearmanr(g["beta"], g["ref_entropy"]).statistic for n, g in t.groupby("task")},
            lambda t: t.groupby("task")[["beta", "ref_entropy"]].apply(lambda g: g.rank().corr().iloc[0, 1]),
            lambda t: pd.DataFrame(
                {"rho": {n: TestCheckRhoWithin.ranks(g).corr().iloc[0, 1] for n, g in t.groupby("task", sort=False)}}
            ),
        ],
    )
    def test_right(self, fn):
        assert check_rho_within(fn).right

    def test_the_library_agrees(self):
        (table,), right, _ = checks.rho_within_answers()
        rows = beta_table(form="standard", seed=0, ref_entropy_se=[0.0] * 15, prompt=map(str, range(15)), **table)
        found = summarize(rows).set_index("task")["rho"]
        np.testing.assert_allclose(found[["math", "code", "dialogue"]], right, atol=1e-12)

    @pytest.mark.parametrize(
        ("each", "words"),
        [
            (lambda t, g: t["beta"].corr(t["ref_entropy"], method="spearman"), "pooled"),
            (lambda t, g: g["beta"].corr(g["ref_entropy"]), "Pearson's r: "),
            (lambda t, g: g["beta"].corr(g["ref_entropy"], method="kendall"), "Kendall"),
            (lambda t, g: TestCheckRhoWithin.ranks(t).loc[g.index].corr().iloc[0, 1], "before the split"),
            (lambda t, g: g[["beta", "ref_entropy"]].rank(method="first").corr().iloc[0, 1], "Equal entropies"),
            (lambda t, g: np.log(g["beta"]).corr(np.log(g["ref_entropy"])), "logarithms"),
            (lambda t, g: (1 / g["beta"]).corr(g["ref_entropy"], method="spearman"), "sign is flipped"),
            (lambda t, g: g["beta"].corr(g["ref_entropy"], method="spearman") ** 2, "ρ²"),
            (lambda t, g: g["beta"].mean(), "none of the usual mistakes"),
            (lambda t, g: g["beta"], "got Series, expected a tensor of numbers"),
        ],
    )  # fmt: skip
    def test_wrong(self, each, words):
        says(check_rho_within(lambda t: {n: each(t, g) for n, g in t.groupby("task", sort=False)}), words)

    def test_another_kind_of_answer(self):
        says(check_rho_within(lambda t: 0.3), "got float, expected a dict or a Series")
        says(check_rho_within(lambda t: {"math": 0.8}), "expected one number for each of ['math', 'code', 'dialogue']")
