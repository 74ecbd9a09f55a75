"""Rewards, KL and calibration against enumeration of all answers and sums in plain Python."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpoviz.analysis.evaluate as module
from dpoviz.analysis.evaluate import MEASURES, calibration, evaluate_policy, reliability, summarize_evaluation
from dpoviz.data.tasks import Problem

EOS, LIMIT, VOCAB = 2, 2, 24
A, B = Problem("math", "a b", ""), Problem("code", "c", "")


def share_of_a(problem, text):
    words = text.split()
    return words.count("a") / LIMIT + (0.5 if problem is B else 0.0)


@pytest.fixture(scope="module")
def models(make_model):
    return (make_model(vocab=VOCAB), make_model(vocab=VOCAB, seed=1))


def evaluated(models, tokenizer, problems, **settings):
    settings = {"samples": 4, "max_new_tokens": LIMIT, "seed": 0, "reward": share_of_a, **settings}
    return evaluate_policy(*models, tokenizer, problems, **settings)


def probabilities(model, tokens):
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].tolist()
    total = math.fsum(math.exp(v) for v in logits)
    return [math.exp(v) / total for v in logits]


def twin(models, prompt, answers):
    """Means over given answers: k1, k3, sum of next-token KLs, and entropies per token."""
    k1s, k3s, steps, entropies, lengths = [], [], [], [], []
    for answer in answers:
        rows = [[probabilities(m, [*prompt, *answer[:t]]) for m in models] for t in range(len(answer))]
        k1 = math.fsum(math.log(p[token] / q[token]) for (p, q), token in zip(rows, answer, strict=True))
        k1s.append(k1)
        k3s.append(math.exp(-k1) - 1 + k1)
        steps.append(math.fsum(a * math.log(a / b) for p, q in rows for a, b in zip(p, q, strict=True)))
        entropies.append(-math.fsum(a * math.log(a) for p, _ in rows for a in p))
        lengths.append(len(answer))
    n = len(answers)
    return {
        "kl_k1": math.fsum(k1s) / n,
        "kl_k3": math.fsum(k3s) / n,
        "kl": math.fsum(steps) / n,
        "entropy": math.fsum(entropies) / sum(lengths),
        "length": sum(lengths) / n,
    }


class TestAgainstTheTwin:
    def test_the_same_answers(self, models, tokenizer, monkeypatch):
        """On the answers that were drawn, to the last digits."""
        drawn = {}
        sample = module.sample_answers

        def watched(model, prompts, k, **settings):
            drawn["prompts"], drawn["found"] = prompts, sample(model, prompts, k, **settings)
            return drawn["found"]

        monkeypatch.setattr(module, "sample_answers", watched)
        table = evaluated(models, tokenizer, [A, B, A], batch_size=2)
        assert table["prompt"].tolist() == ["a b", "c", "a b"] and table["task"].tolist() == ["math", "code", "math"]
        assert len({tuple(map(tuple, own)) for own in drawn["found"].answers}) == 3
        for i, problem in enumerate([A, B, A]):
            answers = drawn["found"].answers[i]
            expected = twin(models, drawn["prompts"][i], answers)
            for name, value in expected.items():
                assert table.loc[i, name] == pytest.approx(value, rel=1e-6), name
            texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
            mean = math.fsum(share_of_a(problem, text) for text in texts) / len(texts)
            assert table.loc[i, "reward"] == pytest.approx(mean)

    def test_unbiased(self, models, tokenizer, enumerate_answers):
        """Against all answers there are, within four standard errors; the per-token one varies least."""
        table = evaluated(models, tokenizer, [A] * 200, samples=10)
        ours, theirs = (enumerate_answers(m, tokenizer("a b")["input_ids"], eos=EOS, limit=LIMIT) for m in models)
        exact = math.fsum(p * math.log(p / theirs[answer]) for answer, p in ours.items())
        reward = math.fsum(
            p * share_of_a(A, tokenizer.decode(list(answer), skip_special_tokens=True)) for answer, p in ours.items()
        )
        for name, value in (("kl", exact), ("kl_k1", exact), ("kl_k3", exact), ("reward", reward)):
            assert abs(table[name].mean() - value) < 4 * table[name].sem(), name
            assert table[name].sem() > 0
        assert table["kl"].var() < min(table["kl_k1"].var(), table["kl_k3"].var())

    def test_of_the_reference_itself_nothing(self, models, tokenizer):
        policy = models[0]
        table = evaluated((policy, copy.deepcopy(policy)), tokenizer, [A, B])
        assert (table[["kl", "kl_k1", "kl_k3"]].abs() < 1e-9).all(axis=None)

    def test_batches_do_not_matter_to_the_numbers_of_one_prompt(self, models, tokenizer):
        # one stream of draws serves all batches, so only what is drawn first is the same
        whole = evaluated(models, tokenizer, [A, A], batch_size=2)
        assert len(whole) == 2 and (whole["length"] <= LIMIT).all()
        again = evaluated(models, tokenizer, [A, A], batch_size=2)
        pd.testing.assert_frame_equal(whole, again)

    def test_refused(self, models, tokenizer):
        with pytest.raises(ValueError, match="problems: got none"):
            evaluated(models, tokenizer, [])


class TestSummary:
    def test_by_hand(self):
        rows = [("math", 0.0), ("math", 1.0), ("code", 2.0), ("code", 2.0), ("code", 5.0)]
        table = pd.DataFrame([{"task": t, **dict.fromkeys(MEASURES, v)} for t, v in rows])
        found = summarize_evaluation(table).set_index("task")
        assert found["n"].to_dict() == {"math": 2, "code": 3, "all": 5}
        assert found.loc["math", ["reward", "reward_se"]].tolist() == pytest.approx([0.5, 0.5])
        assert found.loc["code", ["kl", "kl_se"]].tolist() == pytest.approx([3.0, 1.0])
        # each task counts the same: (0.5 + 3) / 2, and the root of (0.25 + 1) over 2
        assert found.loc["all", ["reward", "reward_se"]].tolist() == pytest.approx([1.75, math.sqrt(1.25) / 2])

    def test_a_single_prompt_has_no_error(self):
        table = pd.DataFrame([{"task": "math", **dict.fromkeys(MEASURES, 0.0)}])
        with pytest.raises(ValueError, match=r"got \{'math': 1\} prompts, expected at least 2"):
            summarize_evaluation(table)


class TestCalibration:
    def test_by_hand(self):
        predicted, truth = [0.05, 0.08, 0.52, 1.0, 0.98], [0.0, 0.2, 0.5, 1.0, 0.6]
        bins = reliability(predicted, truth, bins=10)
        assert bins["bin"].tolist() == [0, 5, 9] and bins["n"].tolist() == [2, 1, 2]
        assert bins["predicted"].tolist() == pytest.approx([0.065, 0.52, 0.99])
        assert bins["truth"].tolist() == pytest.approx([0.1, 0.5, 0.8])
        found = calibration(predicted, truth, bins=10)
        assert found["ece"] == pytest.approx((2 * 0.035 + 0.02 + 2 * 0.19) / 5)
        assert found["brier"] == pytest.approx((0.05**2 + 0.12**2 + 0.02**2 + 0 + 0.38**2) / 5)

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 20))
    def test_what_is_true_is_calibrated(self, values, bins):
        assert calibration(values, values, bins=bins) == pytest.approx({"brier": 0.0, "ece": 0.0}, abs=1e-12)
        assert reliability(values, values, bins=bins)["n"].sum() == len(values)

    @pytest.mark.parametrize(
        ("predicted", "truth", "said"),
        [([0.5], [0.5, 0.5], "got shapes"), ([], [], "got shapes"), ([1.2], [1.0], "predicted: got 1.2"),
         ([0.5], [np.nan], "truth: got nan")],
    )  # fmt: skip
    def test_refused(self, predicted, truth, said):
        with pytest.raises(ValueError, match=said):
            calibration(predicted, truth)
