"""The tiny model and its tokenizer: offline, repeatable, and able to learn."""

import math
import random

import pytest
import torch

from dpoviz import tasks
from dpoviz.models import fit_lm, tiny_lm, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer([prompt + answer for prompt, answer in tasks.corpus(600, seed=0)], vocab_size=400)


class TestTokenizer:
    def test_any_text_comes_back(self, tokenizer):
        for text in ("What is 12 * 3?\n", "  two  spaces, tabs\t", "讲个笑话 🙂", "sum(x for x in xs)[-1]"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_digits_stay_single(self, tokenizer):
        assert len(tokenizer("12345")["input_ids"]) == 5

    def test_end_and_padding_are_not_text(self, tokenizer):
        assert tokenizer.eos_token_id != tokenizer.pad_token_id
        assert {tokenizer.eos_token_id, tokenizer.pad_token_id}.isdisjoint(tokenizer("a b 1 \n")["input_ids"])

    def test_too_small_a_vocabulary(self):
        with pytest.raises(ValueError, match="vocab_size: came 100, expected at least 258"):
            tiny_tokenizer(["a"], vocab_size=100)


class TestTinyLM:
    def test_about_a_million_parameters(self):
        tokenizer = tiny_tokenizer([p + a for p, a in tasks.corpus(6000, seed=0)])
        assert 0.8e6 < sum(p.numel() for p in tiny_lm(tokenizer).parameters()) < 1.2e6

    def test_seeded_and_leaves_the_callers_random_state_alone(self, tokenizer):
        torch.manual_seed(5)
        state = torch.random.get_rng_state()
        models = [tiny_lm(tokenizer, hidden_size=32, layers=1, seed=seed) for seed in (0, 0, 1)]
        assert torch.equal(state, torch.random.get_rng_state())
        a, b, c = (model.lm_head.weight for model in models)
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


class TestFit:
    def test_learns_what_can_be_learned_and_no_more(self, tokenizer):
        # the answer is one of two words, drawn: the best loss is log 2 over two tokens, the word and the end
        rng = random.Random(0)
        rows = [("a or b?\n", rng.choice("ab")) for _ in range(4000)]
        model = tiny_lm(tokenizer, hidden_size=32, layers=1, heads=2)
        losses = fit_lm(model, tokenizer, rows, batch_size=16, learning_rate=1e-2, progress=False)
        assert losses[0] > 2
        # 40 batches of 16 draws: the mean scatters by about 0.01
        assert sum(losses[-40:]) / 40 == pytest.approx(math.log(2) / 2, abs=0.03)
        assert not model.training

    def test_the_prompt_and_the_padding_are_not_trained_on(self, tokenizer):
        # a model that was shown only answers "a" predicts them, while prompt tokens keep their high loss
        rows = [("b c d e f\n", "a"), ("b\n", "a")] * 800
        model = tiny_lm(tokenizer, hidden_size=32, layers=1, heads=2)
        fit_lm(model, tokenizer, rows, batch_size=8, learning_rate=1e-2, progress=False)
        prompt, answer = tokenizer("b c d e f\n")["input_ids"], tokenizer("a")["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        assert logps[len(prompt) - 1, answer[0]] > math.log(0.95)
        in_prompt = [logps[i, token].item() for i, token in enumerate(prompt[1:])]
        assert sum(in_prompt) / len(in_prompt) < math.log(0.05)
