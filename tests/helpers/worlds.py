"""A tiny language model and scored pairs of made-up tokens, and a run of the loop on them."""

import copy
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from dpoviz.beta import BetaNetwork
from dpoviz.experiments.config import WorldConfig
from dpoviz.training.batch import ANSWER_ENTROPY, REWARD_MARGIN
from dpoviz.training.config import RULES, TrainConfig
from dpoviz.training.loop import train
from dpoviz.training.methods import build

VOCABULARY, PAD, EOS = 40, 0, 1
TASKS = ("math", "code", "dialogue")
SMALL = {
    "stage1_steps": 4,
    "stage2_steps": 7,
    "batch_size": 6,
    "log_every": 2,
    "probe_every": 3,
    "probe_prompts": 2,
    "max_new_tokens": 5,
    "checkpoint_every": 3,
    "warmup_steps": 2,
    "policy_learning_rate": 1e-3,
}
RULES_AND_FORMS = [(name, form) for name, info in RULES.items() for form in info.forms]


CONFIG = TrainConfig.around(0.1, "inverse", **SMALL)
COMMON = {"stage": 2, "pad_id": PAD, "eos_id": EOS, "progress": False}
TINY_WORLD = WorldConfig(demonstrations=300, hidden_size=8, layers=1, problems=12, samples=4, entropy_samples=2)
REFERENCE_SETTINGS = {"max_length": 16, "max_new_tokens": 4, "entropy_samples": 4, "batch_size": 2, "progress": False}
# prompts and answers of many lengths, in no order, so that sorted batches have to be put back
TEXTS = [
    ("a b c d e", "f g", "h"),
    ("b", "c", "d e f g h i"),
    ("a b c d e", "i", "j k l"),
    ("c d", "e f g h", "i"),
    ("b c d e f g h", "a", "b c"),
]


def small_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def by_hand(model, prompt, answer):
    """log π(answer | prompt), one forward per pair and no batch: independent of the library's scoring."""
    logits = model(torch.tensor([prompt + answer], device=model.device)).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) + i - 1, token] for i, token in enumerate(answer))


def small_pairs(model, n=24, seed=0):
    """n scored pairs of made-up tokens, in three tasks."""
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(2, VOCABULARY, size=rng.integers(low, high)).tolist()

    rows = []
    for i in range(n):
        prompt, chosen, rejected = ids(2, 6), [*ids(1, 5), EOS], [*ids(1, 5), EOS]
        with torch.no_grad():
            reference = [float(by_hand(model, prompt, answer)) for answer in (chosen, rejected)]
        rows.append(
            {
                "prompt": str(i),
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "task": TASKS[i % 3],
                "ref_chosen_logps": reference[0],
                "ref_rejected_logps": reference[1],
                "ref_entropy": float(rng.uniform(0.5, 2)),
                "ref_features": rng.normal(size=5).tolist(),
            }
        )
    return Dataset.from_list(rows)


def with_entropies(pairs):
    """The pairs with entropies of their answers and a reward model's margins, drawn at random."""
    draw = torch.Generator().manual_seed(0)
    for column in ANSWER_ENTROPY:
        ids = pairs[column.replace("ref_", "").replace("entropy", "ids")]
        totals = [len(own) * (0.2 + 3 * torch.rand((), generator=draw).item()) for own in ids]
        pairs = pairs.add_column(column, totals)
    return pairs.add_column(REWARD_MARGIN, (4 * torch.randn(len(pairs), generator=draw)).tolist())


def network(seed=0):
    torch.manual_seed(seed)
    return BetaNetwork(5, beta0=10.0, hidden=(8,))


def start(name, form, pairs, initial_scale=0.2, **more):
    """What gives beta at the start of a small run, by the name of its rule."""
    return build(name, TrainConfig.around(initial_scale, form, **SMALL), pairs, vocabulary=VOCABULARY, **more)


def run(world, config, beta, *, stage=2, start=None, **more):
    """The policy and the history after a stage; `world` is a reference, pairs, and held-out pairs."""
    reference, pairs, held_out = world
    policy = copy.deepcopy(reference if start is None else start)
    result = train(
        policy,
        beta,
        pairs,
        config,
        stage=stage,
        pad_id=PAD,
        eos_id=EOS,
        held_out=held_out,
        reference=reference,
        progress=False,
        **more,
    )
    return policy, result.history


def weights(*modules):
    return torch.cat([tensor.flatten().double().cpu() for m in modules for tensor in m.state_dict().values()])


class Killed(BaseException):
    """The end of a run that no code of the library catches, as that of a killed process."""


def _raise_killed():
    raise Killed


def dies_at(module, step, end=_raise_killed):
    """Let a beta or a rule end its run when it is asked, in training, for the beta of a step (from 0)."""
    asked = iter(range(10**6))

    def until_killed(own, _):
        if own.training and next(asked) == step:
            end()

    module.register_forward_pre_hook(until_killed)
    return module


def adapted(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a deprecated name
        return peft.get_peft_model(copy.deepcopy(model), config)


def text_pairs(rows=TEXTS):
    return Dataset.from_list(
        [{"prompt": p, "chosen": c, "rejected": r, "task": "t", "group": None, "line": i + 1}
         for i, (p, c, r) in enumerate(rows)]
    )  # fmt: skip
