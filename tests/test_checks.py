"""Every mistake is planted as a reader would write it, and recognised by its own sentence."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpoviz import losses, regularizers
from dpoviz.learn import checks
from dpoviz.learn.checks import (
    Verdict,
    check_beta_gradient,
    check_completion_logps,
    check_dpo_loss,
    check_entropy_penalty,
    check_optimal_policy,
    check_reward_difference,
    check_smoothness_penalty,
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
        says(check_entropy_penalty(lambda beta, h, alpha: beta.sum() * 0 + 7), "penalty came 7, expected 0.4047")
        says(check_completion_logps(lambda logps, mask: logps), "came shape (3, 4), expected (3,)")
        says(check_completion_logps(lambda logps, mask: logps[:, 0] * torch.nan), "logps[0] came nan, expected -1.8")


def answers() -> list:
    """(what, the right answer, the known mistakes) of each list that is searched."""
    found = []
    for form in FORMS:
        _, right, wrong = checks.dpo_loss_answers(form)
        found += [(f"{part} {form}", right[part], wrong[part]) for part in right]
        _, right, wrong = checks.beta_gradient_answers()
        found.append((f"beta gradient {form}", right[form], wrong[form]))
    for name in ("completion_logps", "optimal_policy", "reward_difference", "entropy_penalty", "smoothness_penalty"):
        found.append((name, *getattr(checks, f"{name}_answers")()[1:]))
    return found


class TestAnswers:
    @pytest.mark.parametrize(("what", "right", "mistakes"), answers())
    def test_no_two_look_alike(self, what, right, mistakes):
        # 1e-3 is 100 times the tolerance within which an answer is recognised
        known = {"right": right} | mistakes
        for (a, one), (b, other) in itertools.combinations(known.items(), 2):
            assert one.shape != other.shape or (one - other).abs().max() > 1e-3, (a, b)

    def test_by_hand(self):
        # h = 1.5, β = 0.2: −log σ(0.3) = log(1 + e^−0.3) = 0.55436; −log σ(7.5) = 0.00055
        assert checks.dpo_loss_answers("standard")[1]["losses"][0].item() == pytest.approx(0.554355, abs=1e-6)
        assert checks.dpo_loss_answers("inverse")[1]["losses"][0].item() == pytest.approx(0.000553, abs=1e-6)
        # gaps −0.3, 0.48, −0.21, 1.12: mean square (0.09 + 0.2304 + 0.0441 + 1.2544)/4
        assert checks.entropy_penalty_answers()[1].item() == pytest.approx(1.6189 / 4, abs=1e-12)

    def test_the_smoothness_answer_by_finite_differences(self):
        x, right, _ = checks.smoothness_penalty_answers()
        net, step = checks._Bumpy().eval(), 1e-5
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
            (lambda logps, mask: -(logps * mask).sum(1), "sign is turned"),
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
            ({"loss": lambda s, h: -torch.sigmoid(s * h).log()}, "at h = ±2000"),
            ({"reward": lambda s, ratio: ratio.detach()}, "rewards are without β"),
            ({"reward": lambda s, ratio: s * ratio}, "carry a gradient"),
            ({"reward": lambda s, ratio: (s * ratio).mean().detach()}, "rewards: came shape ()"),
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
            ({"weight": lambda z: -torch.sigmoid(-z)}, "sign is turned (standard form)"),
            ({"slope": lambda beta, form: 1 / beta**2 if form == "inverse" else 1}, "sign is turned (inverse form)"),
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
            (lambda c, r, rc, rr, beta: beta * ((c + rc) - (r + rr)), "reference is added"),
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
