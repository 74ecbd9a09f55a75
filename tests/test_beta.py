"""The four betas: where they start, what they refuse, and that they come back from disk as they were."""

from __future__ import annotations

import copy
import json
import math
import socket

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from dpoviz.beta import BetaNetwork, ConstantBeta, EntropyBeta, TaskBeta

TASKS = ("math", "code", "dialogue")
BAD_POSITIVES = [0, -0.1, math.inf, math.nan, True, "0.1", None, torch.tensor(0.1)]

beta0s = st.floats(1e-6, 1e6)


def features(n: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def trained_network(**kwargs) -> BetaNetwork:
    """A network whose beta varies with x and whose running statistics are not those it was made with."""
    torch.manual_seed(0)
    net = BetaNetwork(3, **{"beta0": 0.5, "hidden": (8, 4)} | kwargs)
    nn.init.normal_(net.layers[-1].weight)
    net.fit_running_statistics(3 * features(50, seed=2) + 1)
    return net


def every_beta() -> list[tuple[nn.Module, dict]]:
    """Each beta, with something learned where it can learn, and the keywords it reads."""
    by_task = TaskBeta(TASKS, 0.5)
    nn.init.normal_(by_task.log_ratio, generator=torch.Generator().manual_seed(0))
    return [
        (ConstantBeta(0.3), {}),
        (by_task, {"task": ["code", "math", "math", "dialogue", "code", "code"]}),
        (EntropyBeta(0.1, 0.2, 0.4), {"ref_entropy": torch.linspace(1, 6, 6)}),
        (trained_network(), {}),
    ]


class TestBeta:
    """What all four have in common."""

    def test_called_alike(self):
        everything = {"task": [*TASKS, *TASKS], "ref_entropy": torch.linspace(1, 6, 6)}
        for beta, _ in every_beta():
            values = beta(features(), **everything)
            assert values.shape == (6,) and values.dtype == torch.float32
            assert (values > 0).all()

    def test_what_is_learned(self):
        learned = {type(beta): len(list(beta.parameters())) > 0 for beta, _ in every_beta()}
        assert learned == {ConstantBeta: False, TaskBeta: True, EntropyBeta: False, BetaNetwork: True}

    def test_saved_and_loaded(self, tmp_path, monkeypatch):
        def refuse(*args):
            raise AssertionError("went to the network")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        for beta, keywords in every_beta():
            folder = tmp_path / type(beta).__name__
            beta.save_pretrained(folder)
            assert (folder / "model.safetensors").is_file()
            loaded = type(beta).from_pretrained(folder)
            assert not loaded.training
            before, after = beta.state_dict(), loaded.state_dict()
            assert list(before) == list(after)
            assert all(torch.equal(before[name], after[name]) for name in before)
            beta.eval()
            assert torch.equal(loaded(features(), **keywords), beta(features(), **keywords))

    def test_the_configuration_is_saved(self, tmp_path):
        BetaNetwork(3, beta0=0.5, hidden=(8, 4), batch_norm=False).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config == {"in_features": 3, "beta0": 0.5, "hidden": [8, 4], "batch_norm": False}
        assert TaskBeta(TASKS, 0.5)._hub_mixin_config == {"tasks": TASKS, "beta0": 0.5}
        assert EntropyBeta(0.1, 0.2, 0.4)._hub_mixin_config == {
            "alpha": 0.1,
            "beta_min": 0.2,
            "beta_max": 0.4,
        }

    def test_batch_norm_statistics_are_saved(self, tmp_path):
        net = trained_network()
        net.save_pretrained(tmp_path)
        loaded = BetaNetwork.from_pretrained(tmp_path)
        assert torch.equal(loaded.layers[0].running_mean, net.layers[0].running_mean)
        assert (loaded.layers[0].running_mean.abs() > 0.1).all()  # not what a new network has

    def test_a_file_that_lacks_a_weight_is_refused(self, tmp_path):
        trained_network().save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["layers.0.running_mean"]
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(RuntimeError, match=r"layers\.0\.running_mean"):
            BetaNetwork.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.ones(3), r"x: got a torch.float32 tensor of shape \(3,\)"),
            (torch.ones(2, 3, 1), "x: got"),
            (torch.ones(0, 3), "x: got"),
            (torch.ones(6, 3, dtype=torch.int64), r"x: got a torch.int64"),
            (
                torch.ones(6, 3).index_fill(0, torch.tensor([1, 4]), math.nan),
                r"x: not finite in rows \[1, 4\]",
            ),
            (torch.ones(6, 3).index_fill(0, torch.tensor([0]), math.inf), r"x: not finite in rows \[0\]"),
        ],
    )
    def test_refuses_features(self, x, message):
        for beta, keywords in every_beta():
            with pytest.raises(ValueError, match=message):
                beta(x, **keywords)


class TestConstantBeta:
    @given(beta0s, st.integers(1, 5))
    def test_the_same_everywhere(self, beta0, n):
        assert torch.equal(ConstantBeta(beta0)(features(n)), torch.full((n,), beta0))

    def test_half_precision_features_do_not_round_it(self):
        # 1e6 is beyond float16
        assert torch.equal(ConstantBeta(1e6)(features().half()), torch.full((6,), 1e6))

    @pytest.mark.parametrize("beta0", BAD_POSITIVES)
    def test_refuses_beta0(self, beta0):
        with pytest.raises(ValueError, match="beta0: got"):
            ConstantBeta(beta0)


class TestTaskBeta:
    @given(beta0s)
    def test_starts_at_beta0_exactly(self, beta0):
        assert torch.equal(TaskBeta(TASKS, beta0)(features(3), task=TASKS), torch.full((3,), beta0))

    def test_one_number_per_task(self):
        beta = TaskBeta(TASKS, 0.5)
        with torch.no_grad():
            beta.log_ratio.copy_(torch.tensor([0.0, math.log(2), math.log(4)]))
        # the bound of ±20 is smooth: at log 4 it takes off log(4)³/(3·400), 0.2 %
        expected = torch.tensor([2.0, 0.5, 1.0, 2.0])
        by_name = beta(features(4), task=["dialogue", "math", "code", "dialogue"])
        torch.testing.assert_close(by_name, expected, rtol=3e-3, atol=0)
        assert by_name[0] == by_name[3]
        assert torch.equal(beta(features(4), task=torch.tensor([2, 0, 1, 2])), by_name)

    def test_each_task_learns_from_its_own_rows(self):
        beta = TaskBeta(TASKS, 0.5)
        beta(features(3), task=["math", "math", "code"]).sum().backward()
        # d beta / d log_ratio is beta itself at the start
        torch.testing.assert_close(beta.log_ratio.grad, torch.tensor([1.0, 0.5, 0.0]))

    @pytest.mark.parametrize("extreme", [1e4, -1e4])
    def test_stays_positive_and_finite(self, extreme):
        beta = TaskBeta(TASKS, 0.5)
        nn.init.constant_(beta.log_ratio, extreme)
        values = beta(features(3), task=TASKS)
        assert (values > 0).all() and torch.isfinite(values).all()

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            (None, "task: got None"),
            ("abc", "task: got 'abc'"),
            (["math"], "task: got 1 entries, expected 3"),
            (
                ["math", "poetry", "code"],
                r"task: got \['poetry'\], expected some of \['math', 'code', 'dialogue'\]",
            ),
            (torch.tensor([0, 1, 3]), r"task: got \[0, 1, 3\], expected 0 to 2"),
            (torch.tensor([0, -1, 2]), "task: got"),
            (torch.tensor([0.0, 1.0, 2.0]), r"task: got torch\.float32"),
            (torch.tensor([[0], [1], [2]]), "task: got"),
        ],
    )
    def test_refuses_tasks_of_a_batch(self, task, message):
        with pytest.raises(ValueError, match=message):
            TaskBeta(TASKS, 0.5)(features(3), task=task)

    @pytest.mark.parametrize("tasks", [[], "math", ["math", "math"], ["math", 1], {"math": 1}])
    def test_refuses_names(self, tasks):
        with pytest.raises(ValueError, match="tasks: got"):
            TaskBeta(tasks, 0.5)

    @pytest.mark.parametrize("beta0", BAD_POSITIVES)
    def test_refuses_beta0(self, beta0):
        with pytest.raises(ValueError, match="beta0: got"):
            TaskBeta(TASKS, beta0)


class TestEntropyBeta:
    def test_by_hand(self):
        entropy = torch.tensor([0.0, 1.0, 3.0, 100.0])
        values = EntropyBeta(0.5, 0.2, 2.0)(features(4), ref_entropy=entropy)
        assert torch.equal(values, torch.tensor([0.2, 0.5, 1.5, 2.0]))

    def test_no_gradient_reaches_the_entropy(self):
        entropy = torch.ones(6, requires_grad=True)
        assert not EntropyBeta(0.5, 0.2, 2.0)(features(), ref_entropy=entropy).requires_grad

    @pytest.mark.parametrize(
        ("entropy", "message"),
        [
            (None, "ref_entropy: got None"),
            (torch.ones(5), r"ref_entropy: got shape \(5,\)"),
            (torch.ones(6, 1), r"ref_entropy: got shape \(6, 1\)"),
            (torch.tensor([1, 2, math.nan, 4, 5, math.inf]), r"ref_entropy: not finite in rows \[2, 5\]"),
        ],
    )
    def test_refuses_entropies(self, entropy, message):
        with pytest.raises(ValueError, match=message):
            EntropyBeta(0.5, 0.2, 2.0)(features(), ref_entropy=entropy)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"alpha": 0}, "alpha: got 0"),
            ({"beta_min": -1.0}, "beta_min: got"),
            ({"beta_max": math.inf}, "beta_max: got"),
            ({"beta_min": 2.0}, "beta_min, beta_max: got 2.0, 2.0"),
        ],
    )
    def test_refuses_settings(self, changed, message):
        with pytest.raises(ValueError, match=message):
            EntropyBeta(**{"alpha": 0.5, "beta_min": 0.2, "beta_max": 2.0} | changed)


class TestBetaNetwork:
    @given(
        beta0s,
        st.integers(1, 6),
        st.sampled_from([(), (4,), (8, 4)]),
        st.booleans(),
        st.booleans(),
        st.floats(1e-3, 1e6),
    )
    @settings(max_examples=50)
    def test_starts_at_beta0_exactly(self, beta0, n, hidden, batch_norm, training, size):
        net = BetaNetwork(3, beta0=beta0, hidden=hidden, batch_norm=batch_norm).train(training)
        assert torch.equal(net(size * features(n)), torch.full((n,), beta0))

    def test_does_not_stay_there(self):
        """The control: exactly beta0 is where it starts, not all that it can do."""
        assert trained_network()(features()).std() > 0.1

    @pytest.mark.parametrize("batch_norm", [True, False])
    def test_can_leave_the_start(self, batch_norm):
        torch.manual_seed(0)
        net = BetaNetwork(3, beta0=0.5, batch_norm=batch_norm)
        target = torch.linspace(0.2, 0.8, 6)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        losses = []
        for _ in range(2):
            loss = (net(features()) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == 1:
                assert net.layers[-1].weight.grad.abs().max() > 1e-4
        assert losses[1] < losses[0]

    @given(st.integers(0, 1000), st.floats(1e-3, 1e6), st.floats(0.1, 1e3), beta0s, st.booleans(), st.booleans())
    @settings(max_examples=50)
    def test_stays_positive_and_finite(self, seed, size, weight, beta0, batch_norm, training):
        torch.manual_seed(seed)
        net = BetaNetwork(3, beta0=beta0, hidden=(8, 4), batch_norm=batch_norm).train(training)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=weight)
        values = net(size * features(seed=seed))
        # the inverse form's derivative in beta needs 1/beta² as well
        for needed in (values, 1 / values**2):
            assert (needed > 0).all() and torch.isfinite(needed).all()

    def test_the_bound_is_smooth_and_no_bound_near_beta0(self):
        net = BetaNetwork(3, beta0=0.5).double().eval()
        x = features(1).double()
        for f in (-1.0, 1.0):
            nn.init.constant_(net.layers[-1].bias, f)
            # 20·tanh(f/20) = f − f³/1200 + …: 0.08 % at f = 1
            assert net(x).item() == pytest.approx(0.5 * math.exp(f), rel=1e-3)
        nn.init.constant_(net.layers[-1].bias, 1e30)
        assert net(x).item() == pytest.approx(0.5 * math.exp(20), rel=1e-12)

    def test_the_gradient_in_x_has_no_jumps(self):
        """What the gradient penalty differentiates: between neighbours it changes in proportion to their distance."""

        def largest_jump(net: BetaNetwork, points: int) -> float:
            line = torch.linspace(-3, 3, points, dtype=torch.float64)[:, None] * features(1).double() + 1
            line.requires_grad_()
            (gradient,) = torch.autograd.grad(net(line).sum(), line)
            return gradient.diff(dim=0).norm(dim=1).max().item()

        net = trained_network().double().eval()
        assert 0.4 < largest_jump(net, 2001) / largest_jump(net, 1001) < 0.6
        # the control: with kinks the largest jump stays, however close the neighbours
        for i, layer in enumerate(net.layers):
            if isinstance(layer, nn.SiLU):
                net.layers[i] = nn.ReLU()
        assert largest_jump(net, 2001) / largest_jump(net, 1001) > 0.9

    def test_one_row_in_training_mode_takes_the_running_statistics(self):
        net = trained_network().train()
        statistics = {name: value.clone() for name, value in net.named_buffers()}
        in_training = net(features(1))
        in_training.sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        assert all(torch.equal(value, statistics[name]) for name, value in net.named_buffers())
        assert torch.equal(in_training, net.eval()(features(1)))

    def test_plain_batch_norm_refuses_one_row(self):
        """The control of the test above."""
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            nn.BatchNorm1d(3)(features(1))

    def test_rows_are_independent_in_evaluation_mode_only(self):
        # float64: a matrix product may add up in another order for another number of rows
        net, x = trained_network().double(), features().double()
        other = x.clone()
        other[1:] += 1
        net.eval()
        torch.testing.assert_close(net(x)[0], net(other)[0], rtol=1e-12, atol=0)
        net.train()
        assert not torch.allclose(net(x)[0], net(other)[0], rtol=0.01)

    def test_takes_features_in_half_precision(self):
        net = trained_network().eval()
        x = features().bfloat16()
        assert torch.equal(net(x), net(x.float()))

    @pytest.mark.parametrize("shape", [(6, 2), (6, 4), (6,)])
    def test_refuses_another_width(self, shape):
        with pytest.raises(ValueError, match=r"x: got .*, expected floating \(B, 3\)"):
            trained_network()(torch.ones(shape))

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"in_features": 0}, "in_features: got 0"),
            ({"in_features": 2.5}, "in_features: got 2.5"),
            ({"hidden": (8, -1)}, "hidden: got -1"),
        ],
    )
    def test_refuses_widths(self, changed, message):
        with pytest.raises(ValueError, match=message):
            BetaNetwork(**{"in_features": 3, "beta0": 0.5} | changed)

    @pytest.mark.parametrize("beta0", BAD_POSITIVES)
    def test_refuses_beta0(self, beta0):
        with pytest.raises(ValueError, match="beta0: got"):
            BetaNetwork(3, beta0=beta0)


class TestCalibrate:
    """In evaluation mode the network then is what it is in training mode on all prompts at once."""

    @pytest.mark.parametrize("training", [True, False])
    def test_evaluation_equals_training_on_all_prompts(self, training):
        net, x = trained_network().double(), features(40, seed=3).double() * 2 - 1
        in_training = copy.deepcopy(net).train()(x)
        assert not torch.allclose(copy.deepcopy(net).eval()(x), in_training, rtol=0.05)  # the control
        net.train(training).fit_running_statistics(x)
        assert net.training == training
        # float64, two ways of the same sums; batch norm divides by deviations of size 0.1 and more
        torch.testing.assert_close(net.eval()(x), in_training, rtol=1e-9, atol=0)

    def test_statistics_are_those_of_the_features(self):
        net, x = trained_network().double(), features(40, seed=3).double()
        net.fit_running_statistics(x)
        mean = x.sum(0) / 40
        torch.testing.assert_close(net.layers[0].running_mean, mean)
        torch.testing.assert_close(net.layers[0].running_var, (x - mean).square().sum(0) / 40)

    def test_weights_and_the_start_stay(self):
        net = BetaNetwork(3, beta0=0.3)
        before = [parameter.clone() for parameter in net.parameters()]
        net.fit_running_statistics(features(40))
        assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
        assert torch.equal(net.eval()(features()), torch.full((6,), 0.3))

    def test_nothing_to_do_without_batch_norm(self):
        net = BetaNetwork(3, beta0=0.3, batch_norm=False)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        net.fit_running_statistics(features(40))
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def test_refuses_what_has_no_statistics(self):
        net = trained_network()
        with pytest.raises(ValueError, match="x: got 1 row, expected at least 2"):
            net.fit_running_statistics(features(1))
        with pytest.raises(ValueError, match=r"expected floating \(B, 3\)"):
            net.fit_running_statistics(torch.ones(4, 2))
        with pytest.raises(ValueError, match="x: not finite"):
            net.fit_running_statistics(torch.full((4, 3), math.nan))
