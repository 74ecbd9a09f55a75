"""Every architecture that can be built tiny, offline, against plain forwards of each sequence by itself.

The commonest are tried in every run; `pytest -m zoo` tries all. Weights have a wide spread, so that a mistake shows.
"""

import contextlib

import pytest
import torch
from helpers import zoo

from dpoviz.lm import trial
from dpoviz.lm.forward import context_length
from dpoviz.lm.models import add_lora
from dpoviz.lm.sampling import sampling
from dpoviz.lm.scoring import score_answers

EOS, PAD = 2, 0

FAST = [
    "llama", "gpt2", "qwen2", "qwen3", "gemma2-w32", "gemma3-w32", "mistral-window", "phi3-window", "opt",
    "olmo3-w32", "cohere2-w32", "gpt_oss-w32", "mixtral", "llama4-chunk64",
]  # fmt: skip
SLOWER = ["gpt_neo-w32", "mamba"]  # a window by columns, and a state that runs through the row
COMMON = [*FAST, *SLOWER]

every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in COMMON else pytest.mark.zoo) for name in zoo.names()]
)
pytestmark = pytest.mark.filterwarnings("ignore")  # what 200 architectures of transformers warn of is not ours


@pytest.fixture
def model(name):
    try:
        return zoo.build(name)
    except Exception as error:
        if name in COMMON:
            raise
        pytest.skip(f"cannot be built tiny here: {type(error).__name__}: {str(error)[:100]}")


def texts(model):
    """Four prompts with two answers each, from 1 token to as long as the context, in rows with room left over."""
    most = min(context_length(model) or 128, 128)
    shapes = [(3, (8, 1)), (most // 3, (most // 5, most // 3)), (9, (30, 12)), (30, (most // 4, 5))]
    draw = torch.Generator().manual_seed(0)

    def tokens(n):
        return torch.randint(3, zoo.VOCAB, (n,), generator=draw).tolist()

    return [tokens(n) for n, _ in shapes], [[tokens(n) for n in lengths] for _, lengths in shapes]


def plain(model, prompt, answer):
    """(log-probability, entropy sum) of an answer, with gradient: one sequence, nothing else in the batch."""
    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits
    logps = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return logps.gather(1, torch.tensor(answer)[:, None]).sum(), torch.special.entr(logps.exp()).sum()


def plains(model, prompts, answers):
    found = [[torch.stack(plain(model, p, a)) for a in own] for p, own in zip(prompts, answers, strict=True)]
    return torch.stack([torch.stack(own) for own in found])  # (B, K, 2)


def refused(error):
    """Return True where the message says what the model is not."""
    return any(
        part in str(error) for part in ("causal language model", "in no way that was tried", "each way that was")
    )


@contextlib.contextmanager
def or_refused(name):
    """A model that cannot be scored rightly is refused; the common ones are not."""
    try:
        yield
    except ValueError as error:
        if name in COMMON or not refused(error):
            raise
        pytest.skip(f"refused: {error}")


# most compute in float64; some round to float32 on the way, whose sums of some hundred nats carry 1e-4
CLOSE = {"rtol": 0, "atol": 2e-3}


@every
def test_values_entropies_and_gradients(name, model):
    prompts, answers = texts(model)
    with or_refused(name):
        scores = score_answers(model, prompts, answers, pad_id=PAD, entropy=True)
    exact = plains(model, prompts, answers)
    torch.testing.assert_close(scores.logps.double(), exact[..., 0], **CLOSE)
    torch.testing.assert_close(scores.entropy_sums.double(), exact[..., 1], **CLOSE)
    weights = torch.linspace(-1, 1, exact[..., 0].numel()).view(exact.shape[:2])
    own = [p for p in model.parameters() if p.requires_grad]
    grads, expected = (
        torch.autograd.grad((weights * logps).sum(), own, allow_unused=True) for logps in (scores.logps, exact[..., 0])
    )
    size = max(b.norm() for b in expected if b is not None)
    for a, b in zip(grads, expected, strict=True):
        error = 0 if a is None and b is None else ((0 if a is None else a) - (0 if b is None else b)).norm()
        assert error < 1e-3 * size
    if name in COMMON:
        assert trial.lay_out(model, prompts, answers, PAD)[0].shared == (name in FAST)


@every
def test_sampled_answers_carry_the_scores_of_plain_forwards(name, model):
    prompts = [prompt[:40] for prompt in texts(model)[0]]
    settings = {"max_new_tokens": 12, "eos_id": EOS, "pad_id": PAD, "seed": 0}
    with or_refused(name), sampling(model, prompts, 2, **settings, scores=True) as sampler:
        answers, read = sampler.draw(prompts)
    with torch.no_grad():
        exact = plains(model, prompts, answers)
    torch.testing.assert_close(read.logps, exact[..., 0], **CLOSE)
    torch.testing.assert_close(read.entropy_sums, exact[..., 1], **CLOSE)


@every
def test_an_adapter_on_and_off_in_training_mode(name, model):
    """Dropout is switched off by whoever trains; all else that a model does in training mode must not matter."""
    pytest.importorskip("peft", reason="pip install dpoviz[real]")
    prompts, answers = texts(model)
    with or_refused(name), torch.no_grad():
        before = score_answers(model, prompts, answers, pad_id=PAD).logps
    dtype = next(model.parameters()).dtype
    try:
        policy = add_lora(model, rank=2).to(dtype)
    except ValueError as error:
        pytest.skip(f"refused: {error}")
    policy.train()
    draw = torch.Generator().manual_seed(1)
    for key, weight in policy.named_parameters():
        if "lora_B" in key:
            weight.data = torch.randn(weight.shape, generator=draw).to(dtype) * 0.1
    on = score_answers(policy, prompts, answers, pad_id=PAD).logps
    on.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters())
    with torch.no_grad():
        exact = plains(policy.eval(), prompts, answers)[..., 0]
        with policy.disable_adapter():
            off = score_answers(policy, prompts, answers, pad_id=PAD).logps
    if name in COMMON:  # some of the others draw noise in training mode, or have dropout of other kinds
        torch.testing.assert_close(on.detach().double(), exact, **CLOSE)
    torch.testing.assert_close(off, before, **CLOSE)
    assert (exact - before).abs().max() > 0.1


def test_the_control_a_road_that_is_not_tried_is_wrong():
    """The numbers that would come out without a trial."""
    model = zoo.build("gpt_neo-w32")
    prompts, answers = texts(model)
    with torch.no_grad():
        forced = score_answers(model, prompts, answers, pad_id=PAD, shared_prefix=True).logps
        exact = plains(model, prompts, answers)[..., 0]
    assert (forced - exact).abs().max() > 0.1


@pytest.mark.parametrize("name", ["bert", "roberta", "cpmant"])
def test_what_is_no_causal_model_is_refused(name):
    model = zoo.build(name)
    with pytest.raises(
        ValueError, match=r"change with the tokens that come later, .* expected a causal language model"
    ):
        score_answers(model, *texts(model), pad_id=PAD)
