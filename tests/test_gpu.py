"""The numbers of each device and precision against a float64 twin on the CPU, and what a step waits for."""

import traceback

import pytest
import torch
from helpers.worlds import SMALL, adapted, network, run, small_model, small_pairs, weights
from torch.utils._python_dispatch import TorchDispatchMode

from dpoviz.beta import ConstantBeta
from dpoviz.lm.sampling import sampling
from dpoviz.lm.scoring import lay_out_ahead, score_answers
from dpoviz.losses import Logps, total_loss
from dpoviz.regularizers import Regularization
from dpoviz.training.config import TrainConfig
from dpoviz.validation import trusted_values

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 4], [3, 4, 5]]
ANSWERS = [[[5, 6, 2], [7, 2]], [[8, 2], [9, 4, 5, 2]], [[3, 2], [4, 4, 2]]]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Error over the size of a quantity: float32 keeps 7 digits and bfloat16 two or three. On a CPU the worst, that of the
gradient, is 6e-7 and 0.014; a GPU adds in another order, so that a few times as much is allowed."""


@pytest.fixture
def twins(make_model):
    """dtype, device -> a model, and a float64 model on the CPU with the same weights."""

    def make(dtype, device):
        model, twin = make_model(dtype=torch.float32, initializer_range=0.2), make_model(initializer_range=0.2)
        for name, parameter in model.named_parameters():  # not the rotary frequencies, which stay float32
            parameter.data = parameter.data.to(dtype)
            twin.get_parameter(name).data = parameter.data.double()
        return model.to(device), twin

    return make


def error(found, expected):
    return ((found.detach().double().cpu() - expected.detach()).norm() / expected.detach().norm()).item()


def scored(model):
    own = score_answers(model, PROMPTS, ANSWERS, pad_id=0, entropy=True, features=True, shared_prefix=True)
    model.zero_grad()
    torch.nn.functional.logsigmoid(own.logps[:, 0] - own.logps[:, 1]).sum().backward()
    return own, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_numbers_are_those_of_a_float64_twin(twins, dtype, device):
    model, twin = twins(dtype, device)
    (found, gradient), (expected, right) = scored(model), scored(twin)
    errors = {name: error(getattr(found, name), getattr(expected, name))
              for name in ("logps", "entropy_sums", "first_entropies", "features")}  # fmt: skip
    errors["gradient"] = error(gradient, right)
    assert max(errors.values()) < TOLERANCE[dtype], errors
    assert found.logps.device.type == device and found.logps.dtype == torch.float32
    other = twins(dtype, device)[1]
    other.lm_head.weight.data *= 1.5  # the control: another model is farther away
    assert error(found.logps, scored(other)[0].logps) > 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_both_references_of_a_lora_policy_agree(device):
    reference = small_model().to(device)
    policy = adapted(reference)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    prompts, answers = [[5, 6, 7], [8, 9]], [[[3, 1], [4, 5, 1]], [[6, 1], [7, 1]]]
    with torch.no_grad():
        copied = score_answers(reference, prompts, answers, pad_id=0).logps
        with policy.disable_adapter():
            own = score_answers(policy, prompts, answers, pad_id=0).logps
        assert torch.allclose(own, copied, atol=1e-5)
        assert not torch.allclose(score_answers(policy, prompts, answers, pad_id=0).logps, copied, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_laid_out_ahead_are_those_of_the_call(twins, device):
    model, _ = twins(torch.float32, device)
    ahead = lay_out_ahead(model, PROMPTS, ANSWERS, 0)
    ahead = ahead.pinned() if device == "cuda" else ahead
    with torch.no_grad():
        found, expected = (
            score_answers(model, PROMPTS, ANSWERS, pad_id=0, laid_out=rows).logps for rows in (ahead, None)
        )
    assert torch.equal(found, expected)


class _Waits(TorchDispatchMode):
    """Counts the operators that return a number, or a tensor of unknown size: for them a CPU waits for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "equal.")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        trial = any(
            frame.filename.endswith("trial.py") for frame in traceback.extract_stack()
        )  # once per model and size
        if not trial and any(name in str(func) for name in self.NAMES):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_a_step_waits_for_its_checks_alone():
    """That log-probabilities and beta are finite, and beta positive; logged steps wait for what they log besides."""
    model = small_model()
    pairs = small_pairs(model)
    counts = []
    for steps in (2, 6):
        settings = {**SMALL, "stage2_steps": steps, "log_every": 100, "probe_every": 0, "checkpoint_every": 100}
        with _Waits() as waits:
            run((model, pairs, None), TrainConfig.around(0.1, "standard", **settings), network())
        counts.append(len(waits.names))
    assert counts[1] - counts[0] == 4 * 3  # of four more steps


def test_trusted_values_are_not_looked_at_and_shapes_are():
    logps, weight = torch.tensor([1.0, float("nan")]), Regularization(0.1, 1.0, range=1.0)
    beta = torch.tensor([0.5, 0.5])
    with trusted_values():
        found = total_loss(Logps(logps, *[torch.zeros(2)] * 3), beta, form="standard", regularization=weight)
        assert found.total.isnan()
        with pytest.raises(ValueError, match="beta: got shape"):
            total_loss(Logps(*[torch.zeros(2)] * 4), beta[:, None], form="standard", regularization=None)
    with pytest.raises(ValueError, match="policy_chosen_logps: not finite in rows"):
        total_loss(Logps(logps, *[torch.zeros(2)] * 3), beta, form="standard", regularization=weight)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch uses what PyTorch has deprecated
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("attention", ["flex_attention", "eager"])
def test_masks_of_another_attention_are_those_of_the_dense_one(make_model, attention, monkeypatch):
    """FlexAttention's block masks, here without its compiler."""
    from torch.nn.attention import flex_attention as module
    from transformers.integrations import flex_attention as integration

    def uncompiled(*args, training=False, **more):
        return module.flex_attention(*args, **more)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", uncompiled)
    model = make_model(dtype=torch.float32, hidden_size=64)
    with torch.no_grad():
        expected = score_answers(model, PROMPTS, ANSWERS, pad_id=0, shared_prefix=True).logps
        model.set_attn_implementation(attention)
        found = score_answers(model, PROMPTS, ANSWERS, pad_id=0, shared_prefix=True).logps
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler uses what PyTorch has deprecated
class TestOnAGPU:
    def test_flex_attention_has_the_gradients_of_the_dense_masks(self, make_model):
        model = make_model(dtype=torch.float32, hidden_size=64).cuda()
        expected = scored(model)[1]
        model.set_attn_implementation("flex_attention")
        assert error(scored(model)[1], expected.double().cpu()) < 2e-3  # its kernel may round products to TF32

    def test_compiled_and_checkpointed_training_is_plain_training(self):
        model = small_model()
        pairs, policies = small_pairs(model), []
        for more in ({}, {"compile": True}, {"gradient_checkpointing": True, "gradient_accumulation": 2}):
            config = TrainConfig.around(0.1, "standard", **{**SMALL, "stage2_steps": 3}, **more)
            policies.append(run((model, pairs, None), config, ConstantBeta(0.1))[0])
            assert next(policies[-1].parameters()).device.type == "cuda"
        for other in policies[1:]:  # two steps of Adam, of 5e-4 and 1e-3, may differ where a gradient is mere rounding
            off = (weights(other) - weights(policies[0])).abs()
            assert off.max() < 3e-3 and (off > 1e-4).double().mean() < 0.01

    def test_compiled_sampling_from_a_cache_of_fixed_size_is_that_of_a_growing_one(self, make_model):
        model, found = make_model(dtype=torch.float32).cuda(), []
        for static_cache in (False, True):
            ends = {"max_new_tokens": 20, "eos_id": 2, "pad_id": 0, "seed": 0}
            with sampling(model, PROMPTS, 4, **ends, scores=True, static_cache=static_cache) as sampler:
                found.append(sampler.draw(PROMPTS)[1])
        # rounding may change a token that two others nearly tie with, and all that follow it in that answer
        same = (found[0].entropy_sums - found[1].entropy_sums).abs() < 1e-3
        assert same.double().mean() > 0.9
