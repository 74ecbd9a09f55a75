"""A checkpoint holds what learns, is whole or noticed, and stands beside the one before it."""

import copy

import pytest
import torch
from helpers.worlds import COMMON, CONFIG, PAD, adapted, network, small_model, small_pairs, weights
from safetensors.torch import load_file
from torch import nn

from dpoviz.training.loop import train
from dpoviz.training.state import Scorer


@pytest.fixture(scope="module")
def pairs():
    return small_pairs(small_model())


def tied(model):
    """The model with its head tied to its embedding, as small language models have it."""
    model = copy.deepcopy(model)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


class TestHoldsWhatLearns:
    @pytest.mark.parametrize("tie", [False, True])
    @pytest.mark.parametrize("lora", [False, True])
    def test_each_tensor_that_learns_once_and_nothing_else(self, pairs, tmp_path, tie, lora):
        start = tied(small_model()) if tie else small_model()
        make = (lambda: adapted(start)) if lora else (lambda: copy.deepcopy(start))
        policy = make()
        train(policy, network(), pairs, CONFIG, out=tmp_path, **COMMON)
        saved = load_file(max(tmp_path.glob("checkpoint*/model.safetensors")))
        learned = {f"policy.{name}": p for name, p in policy.named_parameters() if p.requires_grad}
        assert sorted(saved) == sorted(learned)
        assert all("lora" in name for name in saved) == lora
        for name, tensor in saved.items():
            assert torch.equal(tensor, learned[name])
        again = make()
        train(again, network(), pairs, CONFIG, out=tmp_path, **COMMON)  # finds the finished run
        assert torch.equal(weights(again), weights(policy))

    @pytest.mark.parametrize("tie", [False, True])
    def test_also_inside_the_wrapper_of_several_processes(self, tie):
        """It puts its own prefix before all names, where PyTorch looks for what is missing."""
        start = tied(small_model()) if tie else small_model()
        wrapped = [nn.ModuleDict({"module": Scorer(adapted(start), PAD)}) for _ in range(2)]
        state = wrapped[0].state_dict()
        assert all("lora" in name for name in state)
        with torch.no_grad():
            for tensor in state.values():
                tensor.add_(1)
        wrapped[1].load_state_dict(state)  # strict
        assert all(torch.equal(tensor, state[name]) for name, tensor in wrapped[1].state_dict().items())
        with pytest.raises(RuntimeError, match="Missing key"):  # the control: what learns must be there
            wrapped[1].load_state_dict(dict(list(state.items())[1:]))
