"""The DPO loss and the total objective against closed forms, a plain-Python twin and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dpoviz.beta import BetaNetwork, ConstantBeta
from dpoviz.forms import scale
from dpoviz.losses import Logps, dpo_loss, gradients_on_beta, log_ratio_difference, total_loss
from dpoviz.regularizers import (
    Regularization,
    entropy_penalty,
    range_penalty,
    smoothness_penalty,
    task_consistency_penalty,
)

FORMS = ("inverse", "standard")
NAMES = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")

# float64: a few operations on numbers up to 1e3 that may cancel
EXACT = {"rtol": 1e-11, "atol": 1e-11}

logp = st.floats(-50.0, 0.0)
beta_value = st.floats(0.05, 20.0)
pair = st.tuples(logp, logp, logp, logp, beta_value)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Four pairs, two ranked rightly and two wrongly (h = 2, −1.5, 0.7, −3), each with its own beta."""
    logps = [
        rows(-3.0, -5.0, -2.0, -9.0),
        rows(-6.0, -4.0, -2.5, -7.5),
        rows(-4.0, -4.5, -2.2, -7.0),
        rows(-5.0, -5.0, -2.0, -8.5),
    ]
    return logps, rows(0.5, 1.0, 2.0, 4.0)


def from_h(h: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities with this h exactly, none above 0, the reference flat."""
    zero = torch.zeros_like(h)
    return [h.clamp(max=0), (-h).clamp(max=0), zero, zero]


def twin(h: float, beta: float, form: str) -> tuple[float, float, float]:
    """Loss, its derivative in policy_chosen_logps and in beta, in plain Python floats."""
    s, ds = (1 / beta, -1 / beta**2) if form == "inverse" else (beta, 1.0)
    tail = math.exp(-abs(s * h))
    loss = max(-s * h, 0.0) + math.log1p(tail)
    wrong = (tail if h > 0 else 1.0) / (1 + tail)  # sigmoid(−s·h)
    return loss, -s * wrong, -wrong * h * ds


class TestScale:
    def test_the_two_readings(self):
        assert scale(0.1, "inverse") == 10.0 and scale(0.1, "standard") == 0.1
        assert torch.equal(scale(rows(0.5, 4.0), "inverse"), rows(2.0, 0.25))
        assert torch.equal(scale(rows(0.5, 4.0), "standard"), rows(0.5, 4.0))

    @pytest.mark.parametrize("form", ["Inverse", "", None, True])
    def test_refuses_another_form(self, form):
        with pytest.raises(ValueError, match="form: got"):
            scale(0.1, form)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        "beta",
        [
            0,
            -0.1,
            math.inf,
            math.nan,
            True,
            "0.1",
            None,
            [0.1],
            torch.tensor(0.1),
            torch.full((2, 1), 0.1),
            torch.tensor([1, 2]),
            torch.tensor([0.1, 0.0]),
            torch.tensor([0.1, -1.0]),
            torch.tensor([0.1, math.nan]),
            torch.tensor([0.1, math.inf]),
        ],
    )
    def test_refuses_anything_but_positive_numbers(self, beta, form):
        with pytest.raises(ValueError, match="beta: "):
            scale(beta, form)


class TestLogRatioDifference:
    def test_by_hand(self):
        logps, _ = batch()
        torch.testing.assert_close(log_ratio_difference(*logps), rows(2.0, -1.5, 0.7, -3.0), **EXACT)

    @given(st.lists(pair, min_size=1, max_size=5), st.floats(-20.0, 20.0))
    def test_what_the_answers_share_cancels(self, pairs, log_z):
        """log Z(x) of §4.1 is such a thing: one number for both answers of a prompt."""
        pc, pr, rc, rr, _ = rows(*[v for p in pairs for v in p]).view(-1, 5).unbind(1)
        h = log_ratio_difference(pc, pr, rc, rr)
        torch.testing.assert_close(log_ratio_difference(pc + log_z, pr + log_z, rc, rr), h, **EXACT)
        # the control: what only one answer has does not cancel
        torch.testing.assert_close(log_ratio_difference(pc + log_z, pr, rc, rr), h + log_z, **EXACT)

    def test_the_reference_carries_no_gradient(self):
        logps = [values.requires_grad_() for values in batch()[0]]
        log_ratio_difference(*logps).sum().backward()
        assert logps[0].grad is not None and logps[1].grad is not None
        assert logps[2].grad is None and logps[3].grad is None

    @pytest.mark.parametrize("position", range(4))
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_names_the_argument_and_rows_that_are_not_finite(self, position, value):
        logps, _ = batch()
        logps[position][1] = logps[position][3] = value
        with pytest.raises(ValueError, match=rf"{NAMES[position]}: not finite in rows \[1, 3\]"):
            log_ratio_difference(*logps)

    @pytest.mark.parametrize("position", range(1, 4))
    @pytest.mark.parametrize("shape", [(4, 1), (1,), (3,), ()])
    def test_refuses_another_shape(self, position, shape):
        logps, _ = batch()
        logps[position] = torch.zeros(shape, dtype=torch.float64)
        with pytest.raises(ValueError, match=f"{NAMES[position]}: got shape"):
            log_ratio_difference(*logps)

    def test_refuses_columns_and_integers(self):
        with pytest.raises(ValueError, match="policy_chosen_logps: got shape"):
            log_ratio_difference(*[torch.zeros(4, 1)] * 4)
        with pytest.raises(ValueError, match=r"policy_chosen_logps: got a torch\.int64"):
            log_ratio_difference(*[torch.zeros(4, dtype=torch.int64)] * 4)


class TestDPOLoss:
    @pytest.mark.parametrize(
        ("form", "beta", "odds"),
        [("standard", 0.5, 3.0), ("inverse", 2.0, 3.0), ("standard", 2.0, 81.0), ("inverse", 0.5, 81.0)],
    )
    def test_by_hand(self, form, beta, odds):
        # the policy has the odds 3:1 where the reference has 1:3, so h = 2 log 3 and σ(sh) = odds/(odds + 1)
        logps = [rows(math.log(p)) for p in (0.75, 0.25, 0.25, 0.75)]
        out = dpo_loss(*logps, beta, form=form)
        torch.testing.assert_close(out.losses, rows(math.log((odds + 1) / odds)), **EXACT)
        torch.testing.assert_close(out.margins, rows(math.log(odds)), **EXACT)
        torch.testing.assert_close(out.chosen_rewards, rows(math.log(odds) / 2), **EXACT)
        torch.testing.assert_close(out.rejected_rewards, rows(-math.log(odds) / 2), **EXACT)
        # the control: chosen and rejected swapped
        swapped = dpo_loss(logps[1], logps[0], logps[3], logps[2], beta, form=form)
        torch.testing.assert_close(swapped.losses, rows(math.log(odds + 1)), **EXACT)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("beta", [1e-6, 0.1, 10, 1e6])
    def test_log_2_where_the_policy_is_the_reference(self, form, beta):
        logps, _ = batch()
        out = dpo_loss(*logps[:2], *logps[:2], beta, form=form)
        torch.testing.assert_close(out.losses, torch.full_like(out.losses, math.log(2)), **EXACT)
        assert (out.margins == 0).all()

    @given(st.lists(pair, min_size=1, max_size=6), st.sampled_from(FORMS))
    def test_equals_the_twin(self, pairs, form):
        *logps, beta = rows(*[v for p in pairs for v in p]).view(-1, 5).unbind(1)
        pc, pr, beta = (values.clone().requires_grad_() for values in (logps[0], logps[1], beta))
        losses = dpo_loss(pc, pr, *logps[2:], beta, form=form).losses
        on_pc, on_pr, on_beta = torch.autograd.grad(losses.sum(), (pc, pr, beta))
        expected = [twin((a - c) - (b - d), value, form) for a, b, c, d, value in pairs]
        # s·h reaches 2000 and its rounding 4e-13, which the exponential turns into a relative error of that
        # size, on derivatives of up to h·s' = 4e4
        close = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(losses.detach(), rows(*[e[0] for e in expected]), **close)
        torch.testing.assert_close(on_pc, rows(*[e[1] for e in expected]), **close)
        torch.testing.assert_close(on_pr, rows(*[-e[1] for e in expected]), **close)
        torch.testing.assert_close(on_beta, rows(*[e[2] for e in expected]), **close)

    @pytest.mark.parametrize("form", FORMS)
    def test_gradient_of_rafailov_et_al(self, form):
        """−s σ(r̂_l − r̂_w) on the chosen log-probability and its opposite on the rejected one (their §4)."""
        logps, beta = batch()
        pc, pr = logps[0].requires_grad_(), logps[1].requires_grad_()
        out = dpo_loss(*logps, beta, form=form)
        out.losses.sum().backward()
        expected = -scale(beta, form) * torch.sigmoid(out.rejected_rewards - out.chosen_rewards)
        torch.testing.assert_close(pc.grad, expected, **EXACT)
        torch.testing.assert_close(pr.grad, -expected, **EXACT)

    @pytest.mark.parametrize("form", FORMS)
    def test_gradients_equal_finite_differences(self, form):
        logps, beta = batch()
        inputs = [logps[0].requires_grad_(), logps[1].requires_grad_(), beta.requires_grad_()]

        def loss(pc, pr, b):
            return dpo_loss(pc, pr, logps[2], logps[3], b, form=form).losses

        assert torch.autograd.gradcheck(loss, inputs)

    def test_the_reference_gets_no_gradient(self):
        logps, beta = batch()
        for values in (*logps, beta):
            values.requires_grad_()
        dpo_loss(*logps, beta, form="inverse").losses.sum().backward()
        assert all(values.grad is not None for values in (logps[0], logps[1], beta))
        assert logps[2].grad is None and logps[3].grad is None

    @given(st.lists(pair, min_size=1, max_size=6))
    def test_standard_with_beta_is_inverse_with_one_over_beta(self, pairs):
        *logps, beta = rows(*[v for p in pairs for v in p]).view(-1, 5).unbind(1)
        standard, inverse = (
            dpo_loss(*logps, beta, form="standard"),
            dpo_loss(*logps, 1 / beta, form="inverse"),
        )
        for a, b in zip(standard, inverse, strict=True):
            torch.testing.assert_close(a, b, **EXACT)

    def test_the_forms_differ(self):
        """The control of the identity above: the same beta in both forms is two losses, but for beta = 1."""
        logps, beta = batch()
        different = dpo_loss(*logps, beta, form="standard").losses != dpo_loss(*logps, beta, form="inverse").losses
        assert different.tolist() == [True, False, True, True]

    @given(st.lists(pair, min_size=1, max_size=6), st.sampled_from(FORMS))
    def test_rewards_carry_the_beta_of_their_own_prompt(self, pairs, form):
        *logps, beta = rows(*[v for p in pairs for v in p]).view(-1, 5).unbind(1)
        out = dpo_loss(*logps, beta, form=form)
        torch.testing.assert_close(-F.logsigmoid(out.margins), out.losses, **EXACT)

    @pytest.mark.parametrize("form", FORMS)
    def test_rewards_with_another_beta_do_not_give_the_loss(self, form):
        """The control: the trap of rewards reported without beta, or with the mean beta."""
        logps, beta = batch()
        out = dpo_loss(*logps, beta, form=form)
        for wrong in (1.0, beta.mean().item()):
            margins = dpo_loss(*logps, wrong, form=form).margins
            assert not torch.allclose(-F.logsigmoid(margins), out.losses, atol=1e-2)

    def test_rewards_are_detached(self):
        logps, beta = batch()
        out = dpo_loss(*[values.requires_grad_() for values in logps], beta.requires_grad_(), form="inverse")
        assert out.losses.requires_grad
        assert not (out.chosen_rewards.requires_grad or out.rejected_rewards.requires_grad)
        assert not out.margins.requires_grad

    @pytest.mark.parametrize("form", FORMS)
    def test_a_number_is_the_same_beta_for_all(self, form):
        logps, _ = batch()
        for a, b in zip(dpo_loss(*logps, 0.3, form=form), dpo_loss(*logps, rows(*[0.3] * 4), form=form), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("form", FORMS)
    def test_pairs_do_not_touch_each_other(self, form):
        logps, beta = batch()
        together = dpo_loss(*logps, beta, form=form)
        for i in range(4):
            alone = dpo_loss(*[values[i : i + 1] for values in logps], beta[i : i + 1], form=form)
            assert all(torch.equal(a, t[i : i + 1]) for a, t in zip(alone, together, strict=True))

    @pytest.mark.parametrize("form", FORMS)
    def test_finite_and_right_in_float32_over_the_whole_range(self, form):
        sizes = [0.0, 1e-3, 1.0, 30.0, 1e3, 1e4]
        grid = [(h, 10.0**k) for size in sizes for h in (size, -size) for k in range(-6, 7)]
        h, beta = torch.tensor(grid, dtype=torch.float32).unbind(1)
        pc, pr, rc, rr = from_h(h)
        pc, pr, beta = pc.requires_grad_(), pr.requires_grad_(), beta.clone().requires_grad_()
        out = dpo_loss(pc, pr, rc, rr, beta, form=form)
        out.losses.sum().backward()
        for values in (*out, out.margins, pc.grad, pr.grad, beta.grad):
            assert torch.isfinite(values).all()
        expected = torch.tensor(
            [twin(a.item(), b.item(), form) for a, b in zip(h, beta, strict=True)], dtype=torch.float64
        )
        # s·h has a relative error of 2^-23; where its exponential is a float32 at all it is below 88: 1e-5.
        # Below 1e-20 the exponential itself underflows (1e-38, times up to 1e16 for h/beta²).
        close = {"rtol": 2e-5, "atol": 1e-20}
        for got, column in ((out.losses, 0), (pc.grad, 1), (beta.grad, 2)):
            torch.testing.assert_close(got.detach().double(), expected[:, column], **close)
        assert torch.equal(pr.grad, -pc.grad)

    def test_the_naive_loss_fails_over_that_range(self):
        """The control of the test above: log of a sigmoid overflows at the first wrongly ranked pair."""
        h = torch.tensor([-1e4])
        assert torch.isinf(-torch.log(torch.sigmoid(h)))
        assert dpo_loss(*from_h(h), 1.0, form="standard").losses.item() == 1e4

    @pytest.mark.parametrize("form", FORMS)
    def test_refuses_a_column_of_betas(self, form):
        logps, beta = batch()
        with pytest.raises(ValueError, match=r"beta: got shape \(4, 1\)"):
            dpo_loss(*logps, beta[:, None], form=form)
        # what it would have been: a plausible number that is not the loss
        naive = -F.logsigmoid(scale(beta, form)[:, None] * log_ratio_difference(*logps))
        assert naive.shape == (4, 4)
        true = dpo_loss(*logps, beta, form=form).losses.mean()
        assert 0.2 < naive.mean() / true < 5 and abs(naive.mean() - true) > 0.01

    @pytest.mark.parametrize("shape", [(1,), (3,), (1, 4), (4, 4)])
    def test_refuses_betas_of_another_batch(self, shape):
        with pytest.raises(ValueError, match="beta: got shape"):
            dpo_loss(*batch()[0], torch.ones(shape, dtype=torch.float64), form="standard")

    def test_the_form_has_no_default(self):
        with pytest.raises(TypeError, match="form"):
            dpo_loss(*batch()[0], 0.1)


WEIGHTS = ("range", "smoothness", "consistency", "entropy")
ON = {"range": 0.7, "smoothness": 0.3, "consistency": 0.2, "entropy": 0.4}
ENTROPY, ALPHA, RANGE, TASK = rows(3.0, 2.0, 1.0, 5.0), 0.5, (0.8, 3.0), ["math", "code", "math", "code"]


def features() -> torch.Tensor:
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trained_network() -> BetaNetwork:
    torch.manual_seed(0)
    net = BetaNetwork(3, beta0=1.0, hidden=(8,)).double()
    torch.nn.init.normal_(net.layers[-1].weight)
    return net


def objective(beta: torch.Tensor, form: str = "inverse", *, weight=None, alpha=ALPHA, **changes):
    """`total_loss` of the batch; changes are weights of the penalties, or inputs."""
    weights = Regularization(*RANGE, alpha, **{name: changes.pop(name) for name in WEIGHTS if name in changes})
    inputs = {"ref_entropy": ENTROPY, "task": TASK} | changes
    return total_loss(Logps(*batch()[0]), beta, form=form, regularization=weights, weight=weight, **inputs)


class TestTotalLoss:
    @pytest.mark.parametrize("form", FORMS)
    def test_is_the_sum_of_its_weighted_terms(self, form):
        net, x = trained_network().eval(), features()
        beta = net(x)
        out = objective(beta, form, beta_fn=net, x=x, **ON)
        expected = {
            "dpo": dpo_loss(*batch()[0], beta, form=form).losses.mean(),
            "range": 0.7 * range_penalty(beta, *RANGE),
            "smoothness": 0.3 * smoothness_penalty(net, x),
            "consistency": 0.2 * task_consistency_penalty(beta, TASK),
            "entropy": 0.4 * entropy_penalty(beta, ENTROPY, ALPHA),
        }
        assert list(out.terms) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(out.terms[name], value, **EXACT)
            assert value > 0
        torch.testing.assert_close(out.total, sum(expected.values()), **EXACT)
        torch.testing.assert_close(out.dpo.losses.mean(), out.terms["dpo"], **EXACT)

    def test_by_hand(self):
        # inverse, s·h = 4, −1.5, 0.35, −0.75; beta 0.5, 1, 2, 4; range 0.8 to 3; αH = 1.5, 1, 0.5, 2.5
        out = objective(batch()[1], range=1, consistency=1, entropy=1)
        dpo = sum(math.log1p(math.exp(-z)) for z in (4, -1.5, 0.35, -0.75)) / 4
        # tasks: math 0.5, 2 about 1.25; code 1, 4 about 2.5
        hand = {"dpo": dpo, "range": 1.3 / 4, "consistency": 2 * (0.75**2 + 1.5**2) / 4, "entropy": 5.5 / 4}
        assert {name: term.item() for name, term in out.terms.items()} == pytest.approx(hand, abs=1e-12)

    @pytest.mark.parametrize("name", WEIGHTS)
    def test_each_weight_multiplies_its_own_term(self, name):
        net, x = trained_network().eval(), features()
        one, three = (objective(net(x), beta_fn=net, x=x, **{name: w}) for w in (1.0, 3.0))
        assert set(one.terms) == {"dpo", name}  # a term that is off is not there
        torch.testing.assert_close(three.terms[name], 3 * one.terms[name], **EXACT)
        torch.testing.assert_close(three.terms["dpo"], one.terms["dpo"], **EXACT)
        assert one.terms[name] > 0

    def test_a_term_without_weight_is_not_computed(self):
        def explode(x):
            raise AssertionError("computed")

        logps, beta = batch()
        for weights in (None, Regularization(*RANGE)):
            out = total_loss(Logps(*logps), beta, form="inverse", regularization=weights, beta_fn=explode, x=features())
            assert torch.equal(out.total, out.terms["dpo"])
        with pytest.raises(AssertionError, match="computed"):
            objective(beta, beta_fn=explode, x=features(), smoothness=1)

    @pytest.mark.parametrize(
        ("weight", "missing"),
        [("smoothness", "beta_fn"), ("smoothness", "x"), ("consistency", "task"), ("entropy", "ref_entropy")],
    )
    def test_refuses_a_weight_whose_inputs_are_missing(self, weight, missing):
        inputs = {"beta_fn": ConstantBeta(1.0), "x": features(), weight: 0.1}
        objective(batch()[1], **inputs)  # complete
        with pytest.raises(ValueError, match=f"{missing}: got None.*{weight}"):
            objective(batch()[1], **inputs | {missing: None})

    def test_refuses_an_entropy_term_without_alpha(self):
        with pytest.raises(ValueError, match="alpha: got None"):
            objective(batch()[1], alpha=None, entropy=0.1)
        objective(batch()[1], alpha=None)

    def test_pairs_may_weigh_differently(self):
        # inverse, s·h = 4, −1.5, 0.35, −0.75
        weight = rows(1.0, 0.0, 2.0, 0.5)
        out = objective(batch()[1], weight=weight)
        each = [math.log1p(math.exp(-z)) for z in (4, -1.5, 0.35, -0.75)]
        assert out.terms["dpo"].item() == pytest.approx((each[0] + 2 * each[2] + 0.5 * each[3]) / 3.5, abs=1e-12)
        logps, beta = batch()
        logps[0].requires_grad_()
        total_loss(Logps(*logps), beta, weight=weight, form="inverse", regularization=None).total.backward()
        assert logps[0].grad[1] == 0 and (logps[0].grad[[0, 2, 3]] != 0).all()

    @pytest.mark.parametrize("weight", [rows(0, 0, 0, 0), rows(1, -1, 1, 1), rows(1, 1, 1), rows(1, 1, 1, math.nan)])
    def test_refuses_weights_of_pairs_that_make_no_mean(self, weight):
        with pytest.raises(ValueError, match="weight: "):
            objective(batch()[1], weight=weight)

    @pytest.mark.parametrize("weight", WEIGHTS)
    @pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
    def test_refuses_weights_that_are_none(self, weight, value):
        with pytest.raises(ValueError, match=f"{weight}: got"):
            objective(batch()[1], **{weight: value})

    def test_refuses_features_of_another_batch(self):
        with pytest.raises(ValueError, match="x: got 3 rows, expected 4"):
            objective(batch()[1], beta_fn=ConstantBeta(1.0), x=features()[:3], smoothness=1)

    @pytest.mark.parametrize("beta", [0.1, torch.ones(4, 1)])
    def test_refuses_anything_but_one_beta_per_pair(self, beta):
        with pytest.raises(ValueError, match="beta: got"):
            objective(beta)

    def test_trains_the_network_and_nothing_that_is_frozen(self):
        net, x = trained_network(), features().requires_grad_()
        logps = [values.requires_grad_() for values in batch()[0]]
        entropy = ENTROPY.clone().requires_grad_()
        beta = net(x.detach())
        out = total_loss(
            Logps(*logps),
            beta,
            form="inverse",
            regularization=Regularization(*RANGE, ALPHA, **ON),
            ref_entropy=entropy,
            beta_fn=net,
            x=x,
            task=TASK,
        )
        out.total.backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        assert logps[0].grad is not None and logps[1].grad is not None
        assert all(frozen.grad is None for frozen in (logps[2], logps[3], entropy, x))


class TestGradientsOnBeta:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        ("term", "weight"),
        [
            ("dpo", {}),
            ("range", {"range": 0.7}),
            ("consistency", {"consistency": 0.2}),
            ("entropy", {"entropy": 0.4}),
        ],
    )
    def test_equals_finite_differences(self, term, weight, form):
        beta, step = batch()[1].requires_grad_(), 1e-5
        pull = gradients_on_beta(objective(beta, form, **weight), beta)[term]
        for i in range(4):
            shift = torch.zeros(4, dtype=torch.float64).index_fill(0, torch.tensor(i), step)
            above, below = (objective(beta.detach() + sign * shift, form, **weight) for sign in (1, -1))
            difference = 4 * (above.terms[term] - below.terms[term]) / (2 * step)
            # central differences: step² = 1e-10 times a third derivative of up to 100, rounding 1e-16 / 1e-5
            assert pull[i].item() == pytest.approx(difference.item(), abs=1e-7)
        assert pull.abs().max() > 0.1

    def test_gradient_penalty_is_the_pull_on_log_beta_with_its_shape_held(self):
        # beta = exp(w·x) has the shape ∇log beta = w everywhere; a shift of log beta scales beta and ∇beta
        w, x, step, weight = rows(0.3, -0.2, 0.5), features(), 1e-6, 0.3
        beta = torch.exp(x @ w).requires_grad_()
        out = objective(beta, beta_fn=lambda x: torch.exp(x @ w), x=x, smoothness=weight)
        pull = gradients_on_beta(out, beta)["smoothness"]
        for i, value in enumerate(beta.tolist()):
            penalty = [weight * b**2 * w.dot(w).item() for b in (value + step, value - step)]
            difference = (penalty[0] - penalty[1]) / (2 * step)
            # a parabola: central differences are exact but for rounding, 1e-16 / 1e-6
            assert pull[i].item() == pytest.approx(difference, abs=1e-8)
        assert (pull > 0.01).all()  # less beta is a flatter beta

    @pytest.mark.parametrize("form", FORMS)
    def test_the_sum_is_the_gradient_of_the_total(self, form):
        """Without the gradient penalty, which has a pull by definition only."""
        beta = batch()[1].requires_grad_()
        out = objective(beta, form, **ON | {"smoothness": 0.0})
        pulls = gradients_on_beta(out, beta)
        (total,) = torch.autograd.grad(out.total, beta)
        torch.testing.assert_close(sum(pulls.values()), 4 * total, **EXACT)

    def test_gradient_penalty_and_task_consistency_pull_apart(self):
        net, x = trained_network().eval(), features()
        beta = net(x)
        both = gradients_on_beta(objective(beta, beta_fn=net, x=x, smoothness=0.3, consistency=0.2), beta)
        for name, weight in (("smoothness", 0.3), ("consistency", 0.2)):
            alone = gradients_on_beta(objective(beta, beta_fn=net, x=x, **{name: weight}), beta)
            torch.testing.assert_close(both[name], alone[name], **EXACT)

    def test_does_not_shrink_with_the_batch(self):
        logps, beta = batch()
        settings = {"form": "inverse", "regularization": Regularization(*RANGE, ALPHA, range=0.7, entropy=0.4)}
        beta.requires_grad_()
        once = gradients_on_beta(total_loss(Logps(*logps), beta, ref_entropy=ENTROPY, **settings), beta)
        beta = beta.detach().repeat(3).requires_grad_()
        more = Logps(*[values.repeat(3) for values in logps])
        out = total_loss(more, beta, ref_entropy=ENTROPY.repeat(3), **settings)
        for name, pull in gradients_on_beta(out, beta).items():
            torch.testing.assert_close(pull, once[name].repeat(3), **EXACT)

    def test_the_loss_pulls_beta_opposite_ways_in_the_two_forms(self):
        """Pairs ranked rightly push s up: beta up in the standard form, down in the inverse one."""
        beta = batch()[1].requires_grad_()
        ranked_rightly = rows(1, -1, 1, -1)  # the signs of h
        for form, direction in (("standard", 1), ("inverse", -1)):
            pull = gradients_on_beta(objective(beta, form), beta)["dpo"]
            assert torch.equal((-pull).sign(), direction * ranked_rightly)

    def test_keys_shapes_and_a_backward_pass_afterwards(self):
        net, x = trained_network(), features()
        beta = net(x)
        out = objective(beta, beta_fn=net, x=x, **ON)
        pulls = gradients_on_beta(out, beta)
        assert list(pulls) == list(out.terms)
        assert all(pull.shape == (4,) and not pull.requires_grad for pull in pulls.values())
        assert all(parameter.grad is None for parameter in net.parameters())
        out.total.backward()

    def test_refuses_another_beta(self):
        beta = batch()[1].requires_grad_()
        out = objective(beta)
        with pytest.raises(ValueError, match="beta: not a part of out"):
            gradients_on_beta(out, beta.detach().requires_grad_())
        with pytest.raises(ValueError, match="beta: requires no gradient"):
            gradients_on_beta(out, beta.detach())
