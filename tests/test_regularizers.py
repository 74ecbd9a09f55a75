"""The four penalties against closed forms, row-wise Jacobians and finite differences."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dpoviz.beta import BetaNetwork, ConstantBeta
from dpoviz.regularizers import (
    entropy_penalty,
    range_penalty,
    require_rows,
    smoothness_penalty,
    squared_gradient_norms,
    task_consistency_penalty,
)

# float64 sums of a few numbers of size 1: rounding is below 1e-14, and 1e-12 leaves room for cancellation
EXACT = {"rtol": 1e-12, "atol": 1e-12}

betas = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=8)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def trained_network(batch_norm: bool = True) -> BetaNetwork:
    """A network in float64 whose beta varies with x, as after some training."""
    torch.manual_seed(0)
    net = BetaNetwork(3, beta0=0.5, hidden=(8,), batch_norm=batch_norm).double()
    nn.init.normal_(net.layers[-1].weight)
    return net


def features(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class TestRequireRows:
    def test_takes_one_number_per_row(self):
        require_rows("v", rows(1.0, 2.0), 2)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (0.1, "v: got 0.1"),
            (torch.tensor([1, 2]), "v: got a torch.int64"),
            (torch.ones(2, 1), r"shape \(2, 1\), expected \(2,\); drop the last axis"),
            (torch.ones(3), r"shape \(3,\), expected \(2,\)"),
            (torch.ones(0), "expected"),
            (torch.tensor(1.0), "expected"),
            (torch.tensor([1.0, float("nan")]), r"not finite in rows \[1\]"),
            (torch.tensor([float("-inf"), 1.0]), r"not finite in rows \[0\]"),
        ],
    )
    def test_refuses(self, values, message):
        with pytest.raises(ValueError, match=message):
            require_rows("v", values, 2)

    def test_refuses_no_rows_at_any_batch(self):
        with pytest.raises(ValueError, match="at least 1"):
            require_rows("v", torch.ones(0))


class TestRangePenalty:
    def test_by_hand(self):
        # 0.5 below, inside, 2 above: (0.5 + 0 + 2) / 3
        penalty = range_penalty(rows(0.5, 1.5, 5.0), 1.0, 3.0)
        torch.testing.assert_close(penalty, torch.tensor(2.5 / 3, dtype=torch.float64), **EXACT)

    @given(st.lists(st.floats(0.1, 2.0), min_size=1, max_size=8))
    def test_zero_inside_the_range(self, values):
        assert range_penalty(rows(*values), 0.1, 2.0) == 0

    def test_slope_outside_the_range(self):
        beta = rows(0.5, 1.5, 5.0).requires_grad_()
        range_penalty(beta, 1.0, 3.0).backward()
        torch.testing.assert_close(beta.grad, rows(-1.0, 0.0, 1.0) / 3, **EXACT)

    @pytest.mark.parametrize(
        ("low", "high"),
        [(2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (0.1, float("inf")), (float("nan"), 1.0)],
    )
    def test_refuses_no_range(self, low, high):
        with pytest.raises(ValueError, match="beta_min, beta_max: got"):
            range_penalty(rows(1.0), low, high)

    def test_refuses_a_column(self):
        with pytest.raises(ValueError, match="beta: got shape"):
            range_penalty(torch.ones(4, 1), 0.1, 1.0)


class TestSquaredGradientNorms:
    def test_linear_function(self):
        w = rows(1.0, -2.0, 0.5)
        norms = squared_gradient_norms(lambda x: x @ w + 7, features())
        torch.testing.assert_close(norms, torch.full((6,), 5.25, dtype=torch.float64), **EXACT)

    def test_log_linear_function(self):
        # beta = exp(w·x): the gradient is beta·w
        w, x = rows(0.3, -0.2, 0.5), features()
        norms = squared_gradient_norms(lambda x: torch.exp(x @ w), x)
        torch.testing.assert_close(norms, torch.exp(x @ w) ** 2 * w.dot(w), **EXACT)

    @pytest.mark.parametrize("training", [True, False])
    def test_equals_the_row_wise_jacobian(self, training):
        net, x = trained_network(), features()
        net.fit_running_statistics(features(50))
        norms = squared_gradient_norms(net.train(training), x)
        net.eval()
        one_by_one = [torch.autograd.functional.jacobian(lambda r: net(r[None])[0], row) for row in x]
        torch.testing.assert_close(norms, torch.stack(one_by_one).square().sum(1), **EXACT)
        assert norms.min() > 1e-4  # the comparison is not between zeros

    def test_a_backward_pass_through_the_batch_sum_is_something_else_in_training_mode(self):
        """The trap of §6.3 and the control: with batch statistics the sum mixes the rows' gradients."""
        net, x = trained_network().train(), features()
        jacobian = torch.autograd.functional.jacobian(net, x)  # (B, B, D)
        by_sum = jacobian.sum(0).square().sum(1)
        per_row = jacobian.diagonal(dim1=0, dim2=1).square().sum(0)
        assert not torch.allclose(by_sum, per_row, rtol=0.1)

        net.eval()
        jacobian = torch.autograd.functional.jacobian(net, x)
        by_sum = jacobian.sum(0).square().sum(1)
        per_row = jacobian.diagonal(dim1=0, dim2=1).square().sum(0)
        torch.testing.assert_close(by_sum, per_row, **EXACT)

    def test_leaves_the_module_as_it_was(self):
        net = trained_network().train()
        net.layers[1].eval()  # a mixture of modes
        modes = [module.training for module in net.modules()]
        before = {name: value.clone() for name, value in net.state_dict().items()}
        squared_gradient_norms(net, features())
        assert [module.training for module in net.modules()] == modes
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def test_restores_the_modes_after_an_error(self):
        net = trained_network().train()
        with pytest.raises(ValueError, match="x: got"):
            squared_gradient_norms(net, torch.zeros(2, 5, dtype=torch.float64))
        assert all(module.training for module in net.modules())

    def test_zero_where_beta_does_not_depend_on_x(self):
        free = torch.ones(6, dtype=torch.float64, requires_grad=True)
        for beta_fn in (ConstantBeta(0.3), lambda x: free * 1.0):
            assert torch.equal(squared_gradient_norms(beta_fn, features()), torch.zeros(6, dtype=torch.float64))

    def test_no_gradient_reaches_the_features(self):
        x = features().requires_grad_()
        squared_gradient_norms(trained_network(), x).sum().backward()
        assert x.grad is None

    def test_without_gradients_the_value_is_the_same_and_carries_none(self):
        net, x = trained_network(), features()
        expected = squared_gradient_norms(net, x)
        with torch.no_grad():
            norms = squared_gradient_norms(net, x)
        assert expected.requires_grad and not norms.requires_grad
        torch.testing.assert_close(norms, expected.detach(), **EXACT)

    @pytest.mark.parametrize("x", [torch.ones(3), torch.ones(2, 3, dtype=torch.int64)])
    def test_refuses_features_of_another_kind(self, x):
        with pytest.raises(ValueError, match="x: got"):
            squared_gradient_norms(lambda x: x.sum(1), x)

    def test_refuses_a_function_that_returns_a_column(self):
        with pytest.raises(ValueError, match=r"beta_fn\(x\): got shape \(6, 1\)"):
            squared_gradient_norms(nn.Linear(3, 1).double(), features())


class TestSmoothnessPenalty:
    def test_is_the_mean_over_rows(self):
        # beta = |x|²: the gradient is 2x, its squared length 4|x|²
        x = features()
        penalty = smoothness_penalty(lambda x: x.square().sum(1), x)
        torch.testing.assert_close(penalty, 4 * x.square().sum() / 6, **EXACT)

    def test_differentiable_in_the_parameters(self):
        net, x, step = trained_network(), features(), 1e-5
        weight = net.layers[1].weight  # an inner layer: the penalty is differentiated a second time through it
        smoothness_penalty(net, x).backward()
        differences = torch.zeros_like(weight)
        with torch.no_grad():
            for i in range(weight.numel()):
                flat = weight.view(-1)
                flat[i] += step
                above = smoothness_penalty(net, x)
                flat[i] -= 2 * step
                below = smoothness_penalty(net, x)
                flat[i] += step
                differences.view(-1)[i] = (above - below) / (2 * step)
        # central differences: the step squared is 1e-10, rounding 1e-16 / 1e-5 = 1e-11
        torch.testing.assert_close(weight.grad, differences, rtol=1e-6, atol=1e-8)
        assert weight.grad.abs().max() > 1e-3


class TestTaskConsistencyPenalty:
    def test_by_hand(self):
        # math 1, 3 about 2; dialogue 10 about itself: (1 + 1 + 0) / 3
        penalty = task_consistency_penalty(rows(1.0, 10.0, 3.0), ["math", "dialogue", "math"])
        torch.testing.assert_close(penalty, torch.tensor(2 / 3, dtype=torch.float64), **EXACT)

    @given(st.lists(st.tuples(st.floats(0.01, 10.0), st.integers(0, 2)), min_size=1, max_size=12))
    def test_is_the_variance_within_tasks(self, pairs):
        beta, task = zip(*pairs, strict=True)
        groups = [[b for b, t in pairs if t == k] for k in set(task)]
        expected = sum(len(g) * statistics.pvariance(g) for g in groups) / len(pairs)
        for names in (torch.tensor(task), ["math code dialogue".split()[t] for t in task]):
            assert task_consistency_penalty(rows(*beta), names).item() == pytest.approx(expected, abs=1e-12)

    def test_tasks_are_free_against_each_other(self):
        beta, task = rows(1.0, 1.5, 4.0, 4.2), torch.tensor([5, 5, 9, 9])
        shift = rows(0.0, 0.0, 7.0, 7.0)  # a whole task moves
        penalty = task_consistency_penalty(beta, task)
        torch.testing.assert_close(task_consistency_penalty(beta + shift, task), penalty, **EXACT)
        # the control: without the tasks it is the plain variance, which forbids the move
        one = torch.zeros(4, dtype=torch.int64)
        assert task_consistency_penalty(beta + shift, one) > 2 * task_consistency_penalty(beta, one)

    def test_gradient_sums_to_zero_in_each_task(self):
        beta = rows(1.0, 2.0, 6.0, 4.0).requires_grad_()
        task_consistency_penalty(beta, ["a", "a", "a", "b"]).backward()
        # 2/B (beta - mean), mean 3 in task a
        torch.testing.assert_close(beta.grad, rows(-1.0, -0.5, 1.5, 0.0), **EXACT)

    @pytest.mark.parametrize(
        "task",
        ["code", ["math"], ["math", "code", "code", 3], torch.zeros(4), torch.zeros(3, dtype=torch.int64)],
    )
    def test_refuses_what_names_no_task_per_row(self, task):
        with pytest.raises(ValueError, match="task: got"):
            task_consistency_penalty(torch.ones(4), task)


class TestEntropyPenalty:
    def test_by_hand(self):
        # (1 − 0.5·4)² and (3 − 0.5·2)²: (1 + 4) / 2
        penalty = entropy_penalty(rows(1.0, 3.0), rows(4.0, 2.0), 0.5)
        torch.testing.assert_close(penalty, torch.tensor(2.5, dtype=torch.float64), **EXACT)

    @given(betas, st.floats(0.01, 10.0))
    def test_zero_on_the_line_and_positive_off_it(self, values, alpha):
        entropy = rows(*values)
        assert entropy_penalty(alpha * entropy, entropy, alpha) == 0
        # off by 1 in every row: the mean square is 1, but for rounding at size 100
        assert entropy_penalty(alpha * entropy + 1, entropy, alpha).item() == pytest.approx(1, abs=1e-9)

    def test_gradient_reaches_beta_alone(self):
        beta, entropy = rows(1.0, 3.0).requires_grad_(), rows(4.0, 2.0).requires_grad_()
        entropy_penalty(beta, entropy, 0.5).backward()
        torch.testing.assert_close(beta.grad, rows(-1.0, 2.0), **EXACT)
        assert entropy.grad is None

    @pytest.mark.parametrize("alpha", [0, -1.0, float("inf"), float("nan"), torch.tensor(0.5)])
    def test_refuses_alpha(self, alpha):
        with pytest.raises(ValueError, match="alpha: got"):
            entropy_penalty(rows(1.0), rows(1.0), alpha)

    def test_refuses_entropies_of_another_batch(self):
        with pytest.raises(ValueError, match="ref_entropy: got"):
            entropy_penalty(rows(1.0, 2.0), rows(1.0), 0.5)
