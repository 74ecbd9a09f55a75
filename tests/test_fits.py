"""What saves memory changes no update: a batch in parts, checkpointed layers, compiled layers."""

import copy

import pandas as pd
import pytest
import torch
from helpers.worlds import COMMON, SMALL, by_hand, network, run, small_model, small_pairs, weights

from dpoviz.beta import ConstantBeta
from dpoviz.experiments import memory_estimate
from dpoviz.experiments.config import RealConfig
from dpoviz.experiments.real import Loaded
from dpoviz.lm.forward import CompiledLayers
from dpoviz.lm.models import add_lora
from dpoviz.rules import BetaDPO
from dpoviz.training.batch import part_rows
from dpoviz.training.config import TrainConfig, TrainSettings
from dpoviz.training.loop import train
from dpoviz.training.state import adamw


@pytest.fixture(scope="module")
def world():
    model = small_model()
    return model, small_pairs(model), small_pairs(model, n=9, seed=1)


@pytest.fixture
def exact(world):
    model = copy.deepcopy(world[0]).double()
    return model, *world[1:]


class TestAccumulation:
    @pytest.mark.slow
    @pytest.mark.parametrize("parts", [2, 4, 6])  # 4 does not divide the batch of 6
    @pytest.mark.parametrize("rule", ["network", "beta-dpo"])
    def test_is_one_batch(self, exact, parts, rule):
        """Batch norm and the moving averages of a rule see the whole batch too, so that the updates are the same."""
        form = "standard"
        found = []
        for count in (1, parts):
            config = TrainConfig.around(0.1, form, **SMALL, gradient_accumulation=count)
            beta = network() if rule == "network" else BetaDPO(0.1, a=0.6, seed=0)
            found.append(run(exact, config, beta))
        (whole, expected), (policy, history) = found
        # seven steps of Adam in float64; its division by the root of small squares lets 1e-15 grow
        torch.testing.assert_close(weights(policy), weights(whole), rtol=0, atol=1e-6)
        pd.testing.assert_frame_equal(history, expected, rtol=1e-6)
        assert not torch.allclose(weights(policy), weights(exact[0]), atol=1e-3)  # the control: it went somewhere

    def test_gradients_of_one_step_are_those_of_one_batch(self, exact):
        # plain gradient descent by hand: no optimizer between the gradients and what is compared
        model, pairs, _ = exact
        rows = pairs.select(range(5))[:]
        policy = copy.deepcopy(model)
        loss = 0
        for i in range(5):
            h = [by_hand(policy, rows["prompt_ids"][i], rows[f"{side}_ids"][i]) - rows[f"ref_{side}_logps"][i]
                 for side in ("chosen", "rejected")]  # fmt: skip
            loss = loss - torch.nn.functional.logsigmoid(0.1 * (h[0] - h[1])) / 5
        loss.backward()
        expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
        norms = []
        for count in (1, 3):
            settings = {**SMALL, "batch_size": 5, "stage1_steps": 1, "log_every": 1, "gradient_accumulation": count}
            config = TrainConfig.around(0.1, "standard", **settings)
            own = train(copy.deepcopy(model), ConstantBeta(0.1), pairs.select(range(5)), config,
                        **{**COMMON, "stage": 1})  # fmt: skip
            norms.append(own.history["grad_norm/policy"][0])
        assert norms == pytest.approx([expected.norm().item()] * 2, rel=1e-6)

    def test_parts_are_as_equal_as_they_can_be(self):
        assert [len(range(7)[part]) for part in part_rows(7, 3)] == [2, 2, 3]
        assert [len(range(2)[part]) for part in part_rows(2, 3)] == [1, 1]

    def test_dropout_is_refused(self):
        with pytest.raises(ValueError, match=r"gradient_accumulation: got 2 with dropout, expected 1"):
            TrainSettings(gradient_accumulation=2, dropout=True)
        with pytest.raises(ValueError, match="gradient_accumulation: got 0, expected"):
            TrainSettings(gradient_accumulation=0)


class TestCheckpointing:
    def test_is_plain_training(self, exact):
        found, kept = [], []
        for on in (False, True):
            config = TrainConfig.around(0.1, "inverse", **{**SMALL, "stage2_steps": 3}, gradient_checkpointing=on)
            tensors = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, own=tensors: own.append(t.numel()) or t, lambda t: t
            ):
                found.append(run(exact, config, network()))
            kept.append(sum(tensors))
        (plain, expected), (policy, history) = found
        torch.testing.assert_close(weights(policy), weights(plain), rtol=0, atol=1e-9)
        pd.testing.assert_frame_equal(history, expected, rtol=1e-9)
        assert not any(layer.gradient_checkpointing for layer in policy.model.layers)  # as it was before
        assert kept[1] != kept[0]  # the control: layers were computed again


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler uses what PyTorch has deprecated
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # and looks there
class TestCompiled:
    def test_is_eager_training(self, world):
        policies = []
        for on in (False, True):
            config = TrainConfig.around(0.1, "standard", **{**SMALL, "stage2_steps": 3}, compile=on)
            policies.append(run(world, config, ConstantBeta(0.1))[0])
        # float32, three steps of Adam
        torch.testing.assert_close(weights(policies[1]), weights(policies[0]), rtol=0, atol=1e-4)

    def test_layers_are_compiled_only_inside(self, world):
        model = copy.deepcopy(world[0])
        with CompiledLayers(model):
            assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
        assert all(layer._compiled_call_impl is None for layer in model.model.layers)


class TestEstimate:
    """The parts against what PyTorch says, and a run that would not fit."""

    @pytest.fixture
    def loaded(self, world):
        return Loaded(world[0], None, *world[1:])

    def config(self, **more):
        lora_rank = more.pop("lora_rank", 0)
        return RealConfig(lora_rank=lora_rank, training=TrainSettings(batch_size=6, warmup_steps=1, **more))

    @pytest.mark.parametrize("rank", [0, 2])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_what_is_kept_is_what_a_larger_batch_keeps(self, loaded, rank, checkpointing):
        model = copy.deepcopy(loaded.model).cpu()
        rows = loaded.train.select(range(12))
        answers = [list(own) for own in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
        with memory_estimate._as_trained(model, rank):
            _, constant, per_token, per_square = memory_estimate.kept(model, checkpointing=checkpointing)
            _, count, width, measured = memory_estimate._kept_bytes(
                model, rows["prompt_ids"][:], answers, checkpointing
            )
        assert count > 1 and per_token > 0
        expected = constant + per_token * count * width + per_square * count * width**2
        assert expected == pytest.approx(measured, rel=0.02)
        assert all(p.requires_grad for p in model.parameters())  # as it was
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in loaded.model.named_parameters()]

    def test_masks_grow_with_the_square_of_a_row(self, loaded):
        """Each layer of attention keeps its mask, as numbers; layers that are computed again keep none."""
        for checkpointing, layers in ((False, 2), (True, 0)):
            found = memory_estimate.kept(copy.deepcopy(loaded.model).cpu(), checkpointing=checkpointing)
            assert found[-1] == pytest.approx(layers * 4, abs=0.05)

    def test_weights_and_moments_are_those_of_a_run(self, loaded):
        needed = memory_estimate.estimate_memory(self.config(), loaded)
        own = sum(p.numel() * 4 for p in loaded.model.parameters())
        optimizer = adamw(copy.deepcopy(loaded.model), 1e-3)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moments = sum(t.numel() * 4 for state in optimizer.state.values() for t in state.values() if t.ndim)
        assert (needed.weights, needed.training) == (2 * own, moments + 2 * own)  # with gradients and the start

    def test_adapters_are_counted(self, loaded):
        policy = add_lora(copy.deepcopy(loaded.model), rank=3)
        adapters = sum(p.numel() * 4 for p in policy.parameters() if p.requires_grad)
        frozen = sum(p.numel() * 4 for p in policy.parameters() if not p.requires_grad)
        needed = memory_estimate.estimate_memory(self.config(lora_rank=3), loaded)
        assert (needed.weights, needed.training) == (frozen + adapters, 4 * adapters)

    def test_with_checkpointing_one_layer_is_there_at_a_time(self, loaded):
        """Of two layers: half of what is kept without it, besides the inputs of both and the masks."""
        rows = loaded.train.select(range(6))
        loaded = loaded._replace(model=copy.deepcopy(loaded.model).cpu(), train=rows)  # one batch
        answers = [list(own) for own in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
        sizes = {}
        for on in (False, True):
            _, count, width, sizes[on] = memory_estimate._kept_bytes(loaded.model, rows["prompt_ids"][:], answers, on)
        found = memory_estimate.estimate_memory(self.config(gradient_checkpointing=True), loaded).activations
        masks = count * width**2 * (1 + 4)
        assert found - masks == pytest.approx(sizes[True] + sizes[False] / 2, rel=0.02)

    def test_each_advice_saves(self, loaded):
        whole = memory_estimate.estimate_memory(self.config(), loaded).activations
        assert memory_estimate.estimate_memory(self.config(gradient_accumulation=3), loaded).activations < whole / 2
        assert memory_estimate.estimate_memory(self.config(gradient_checkpointing=True), loaded).activations < whole

    def test_what_does_not_fit_is_refused_with_what_to_change(self, loaded, monkeypatch):
        needed = memory_estimate.require_memory(self.config(), loaded)
        monkeypatch.setattr(memory_estimate, "available", lambda device: needed.total)
        assert memory_estimate.require_memory(self.config(), loaded) == needed
        monkeypatch.setattr(memory_estimate, "available", lambda device: needed.total - 1)
        with pytest.raises(ValueError, match=r"memory: got an estimated .* expected at most .*") as refused:
            memory_estimate.require_memory(self.config(), loaded)
        for option in ("--gradient-accumulation 4", "--gradient-checkpointing", "--max-length"):
            assert option in str(refused.value)
