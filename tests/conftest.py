"""What the tests of the language-model modules share: tiny models and a tokenizer made offline, and a slow oracle."""

import math
import os
from collections import Counter

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores, and so do the processes that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

# an example that takes long on a busy machine is no fault
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_configure(config):
    """Let xdist begin the files in the order below, not by their number of tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    """Leave out the zoo unless -m names it, and put the files with the most slow tests first.

    A long file that begins last would keep one process waiting.
    """
    if "zoo" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("zoo")])
        items[:] = [item for item in items if not item.get_closest_marker("zoo")]
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def _make_model(kind="llama", *, dtype=torch.float64, vocab=30, attention="sdpa", seed=0, eos=2, **config):
    # wide weights, so that what a token attends to moves the log-probabilities by whole nats
    shared = {
        "vocab_size": vocab,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": 0,
        "attn_implementation": attention,
    }
    torch.manual_seed(seed)
    if kind == "llama":
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        settings = {**small, "num_key_value_heads": 2, "max_position_embeddings": 64, **shared, **config}
        model = LlamaForCausalLM(LlamaConfig(**settings))
    else:
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**{**small, **shared, **config}))
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        _normalize_in_float64(model)
    return model


def _normalize_in_float64(model):
    """Llama's own norm rounds to float32 whatever it is given, which would hide errors below 1e-7."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LlamaRMSNorm):
                setattr(parent, name, nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=torch.float64))


def _log_softmax(logits):
    top = max(logits)
    log_z = top + math.log(math.fsum(math.exp(v - top) for v in logits))
    return [v - log_z for v in logits]


@torch.no_grad()
def _oracle(model, prompt, answer):
    """Each token's log-probability and next-token entropy: one forward a token, no mask, plain Python sums."""
    logps, entropies = [], []
    for j, token in enumerate(answer):
        logits = model(torch.tensor([[*prompt, *answer[:j]]]), use_cache=False).logits[0, -1].tolist()
        row = _log_softmax(logits)
        logps.append(row[token])
        entropies.append(-math.fsum(math.exp(v) * v for v in row))
    return logps, entropies


@torch.no_grad()
def _enumerate_answers(model, prompt, *, eos, limit):
    """{answer: probability} of all answers that end with `eos` or are cut at `limit` tokens, by a walk of the tree."""
    found, open_ = {}, {(): 1.0}
    while open_:
        so_far, probability = open_.popitem()
        logits = model(torch.tensor([[*prompt, *so_far]]), use_cache=False).logits[0, -1].tolist()
        for token, logp in enumerate(_log_softmax(logits)):
            answer = (*so_far, token)
            ended = token == eos or len(answer) == limit
            (found if ended else open_)[answer] = probability * math.exp(logp)
    return found


@pytest.fixture(scope="session")
def make_model():
    """(kind, dtype, vocab, attention, seed, eos, **config) -> a random tiny model in evaluation mode."""
    return _make_model


@pytest.fixture(scope="session")
def oracle():
    return _oracle


@pytest.fixture(scope="session")
def enumerate_answers():
    return _enumerate_answers


WORDS = "a b c d e f g h i j k l m n o p q r s t".split()


@pytest.fixture
def tokenizer():
    """A letter is a token; <pad> 0, <bos> 1 (put before a prompt by no one), <eos> 2, <unk> 3."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex("."), "isolated")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
