"""Directions of perturbed log-ratios against one forward a token and plain Python sums."""

import copy
import math
import warnings

import pytest
import torch

import dpoviz.lm.scoring as lp
import dpoviz.training.observe as module
from dpoviz.lm import trial
from dpoviz.training.observe import perturbed_directions

PAD, EOS, VOCAB = 0, 2, 30


def some_pairs(n=12, seed=0):
    """n prompts of 1 to 5 tokens, each with two answers of 1 to 5 tokens, the end token included."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(most):
        length = int(torch.randint(most, (), generator=draw))
        return torch.randint(3, VOCAB, (length,), generator=draw).tolist()

    prompts = [[3, *tokens(5)] for _ in range(n)]
    return prompts, [[[*tokens(5), EOS], [*tokens(5), EOS]] for _ in range(n)]


def next_logits(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1].tolist()


def mixed_logp(own, other, token, delta):
    mixed = [(1 + delta) * a - delta * b for a, b in zip(own, other, strict=True)]
    top = max(mixed)
    return mixed[token] - top - math.log(math.fsum(math.exp(v - top) for v in mixed))


@torch.no_grad()
def log_ratios(policy, reference, prompt, pair, deltas):
    """L at each delta by one forward a token, the softmax of (1+delta)·policy - delta·reference by math.fsum."""
    of_answers = []
    for answer in pair:
        starts = [[*prompt, *answer[:j]] for j in range(len(answer))]
        logits = [(next_logits(policy, start), next_logits(reference, start)) for start in starts]
        logps = [[mixed_logp(*both, t, d) for both, t in zip(logits, answer, strict=True)] for d in deltas]
        of_answers.append([math.fsum(row) for row in logps])
    return [chosen - rejected for chosen, rejected in zip(*of_answers, strict=True)]


def twin(policy, reference, prompts, answers, epsilon):
    directions = []
    for prompt, pair in zip(prompts, answers, strict=True):
        nearer, own, farther = log_ratios(policy, reference, prompt, pair, (-epsilon, 0.0, epsilon))
        # no pair is decided by rounding, which is about 1e-13 here
        assert min(abs(own - nearer), abs(farther - own)) > 1e-9
        directions.append(1 if nearer < own < farther else -1 if nearer > own > farther else 0)
    return directions


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def models(make_model, request):
    return make_model(request.param), make_model(request.param, seed=1)


class TestAgainstTheTwin:
    # 0.5 moves logits so far that some log-ratios turn round; 0.01 is the published value
    @pytest.mark.parametrize("epsilon", [0.01, 0.5])
    def test_equal(self, models, epsilon):
        prompts, answers = some_pairs()
        directions = perturbed_directions(*models, prompts, answers, epsilon=epsilon, pad_id=PAD)
        assert directions.tolist() == twin(*models, prompts, answers, epsilon)
        assert set(directions.tolist()) == ({-1, 0, 1} if epsilon == 0.5 else {-1, 1})

    def test_models_that_cannot_share_a_prefix(self, models, monkeypatch):
        prompts, answers = some_pairs()
        shared = perturbed_directions(*models, prompts, answers, epsilon=0.5, pad_id=PAD)
        monkeypatch.setattr(trial, "is_right", lambda model, road, size: not road.shared)

        def forbidden(*args):
            raise AssertionError("a mask that the model cannot take")

        monkeypatch.setattr(trial.PrefixBatch, "related", forbidden)
        apart = perturbed_directions(*models, prompts, answers, epsilon=0.5, pad_id=PAD)
        assert torch.equal(apart, shared)

    def test_chunks(self, models, monkeypatch):
        prompts, answers = some_pairs()
        whole = perturbed_directions(*models, prompts, answers, epsilon=0.5, pad_id=PAD)
        seen = []

        def watched(*models_and_tokens, **settings):
            *rest, score = models_and_tokens
            return lp.score_both(*rest, lambda own, *more: seen.append(len(own)) or score(own, *more), **settings)

        monkeypatch.setattr(module, "score_both", watched)
        monkeypatch.setattr(lp, "_LOGITS_AT_ONCE", 7 * 2 * VOCAB)
        assert torch.equal(perturbed_directions(*models, prompts, answers, epsilon=0.5, pad_id=PAD), whole)
        different = {(tuple(p), tuple(a)) for p, own in zip(prompts, answers, strict=True) for a in own}
        assert max(seen) == 7 and sum(seen) == sum(len(answer) for _, answer in different)


class TestProperties:
    def test_chosen_and_rejected_swapped_turn_the_sign(self, models):
        prompts, answers = some_pairs()
        swapped = [pair[::-1] for pair in answers]
        there = perturbed_directions(*models, prompts, answers, epsilon=0.01, pad_id=PAD)
        back = perturbed_directions(*models, prompts, swapped, epsilon=0.01, pad_id=PAD)
        assert there.any() and torch.equal(back, -there)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_where_the_policy_is_the_reference_nothing_moves(self, make_model, dtype):
        """Exactly: rounding may not decide, as it would between sums of nearly equal numbers."""
        policy = make_model(dtype=dtype)
        prompts, answers = some_pairs()
        same = perturbed_directions(policy, copy.deepcopy(policy), prompts, answers, epsilon=0.01, pad_id=PAD)
        assert not same.any()

    def test_dropout_is_off_and_the_mode_and_the_random_state_stay(self, make_model):
        noisy = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
        reference = make_model("gpt2", seed=1)
        prompts, answers = some_pairs()
        plain = perturbed_directions(noisy, reference, prompts, answers, epsilon=0.01, pad_id=PAD)
        noisy.train()
        before = torch.get_rng_state()
        trained = perturbed_directions(noisy, reference, prompts, answers, epsilon=0.01, pad_id=PAD)
        assert torch.equal(trained, plain) and not trained.requires_grad
        assert noisy.training and torch.equal(torch.get_rng_state(), before)

    def test_an_adapter_and_the_model_under_it(self, make_model):
        peft = pytest.importorskip("peft")
        base = make_model()
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is to go
            policy = peft.get_peft_model(copy.deepcopy(base), settings).double().eval()
        torch.manual_seed(0)
        for name, weight in policy.named_parameters():
            if "lora_B" in name:  # zero at the start: the adapter would do nothing
                torch.nn.init.normal_(weight)
        prompts, answers = some_pairs()
        directions = perturbed_directions(policy, policy, prompts, answers, epsilon=0.01, pad_id=PAD)
        merged = copy.deepcopy(policy).merge_and_unload()
        assert directions.tolist() == twin(merged, base, prompts, answers, 0.01)
        assert {-1, 1} <= set(directions.tolist())


class TestRefused:
    @pytest.mark.parametrize("epsilon", [0, 1, -0.1, math.nan])
    def test_epsilon(self, models, epsilon):
        with pytest.raises(ValueError, match="epsilon: got"):
            perturbed_directions(*models, [[3]], [[[4], [5]]], epsilon=epsilon, pad_id=PAD)

    def test_answers(self, models):
        with pytest.raises(ValueError, match="answers: got 3 to a prompt, expected chosen and rejected"):
            perturbed_directions(*models, [[3]], [[[4], [5], [6]]], epsilon=0.01, pad_id=PAD)
        with pytest.raises(ValueError, match="prompts, answers: got 2 and 1"):
            perturbed_directions(*models, [[3], [3]], [[[4], [5]]], epsilon=0.01, pad_id=PAD)

    def test_reference(self, models, make_model):
        policy, _ = models
        with pytest.raises(ValueError, match="reference: got a vocabulary of 31, expected the policy's 30"):
            perturbed_directions(policy, make_model(vocab=31), [[3]], [[[4], [5]]], epsilon=0.01, pad_id=PAD)
        with pytest.raises(ValueError, match="reference: got the policy itself, without an adapter"):
            perturbed_directions(policy, policy, [[3]], [[[4], [5]]], epsilon=0.01, pad_id=PAD)
