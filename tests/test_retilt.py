"""Beta after training: next-token distributions and answers by enumeration, caches, adapters, seeds and curves."""

from __future__ import annotations

import math
from collections import Counter

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from dpoviz.data import tasks
from dpoviz.lm import models
from dpoviz.lm.retilt import at_equal_kl, retilt_table, reward_kl_curves, sample_retilted, score_retilted, tilted_logps

EOS, PAD = 2, 0
IDS = {"eos_id": EOS, "pad_id": PAD}
LIMIT = 3


@pytest.fixture(scope="module")
def pair(make_model):
    """A policy and a reference over four tokens, which differ by nats."""
    small = {"vocab": 4, "eos": EOS, "initializer_range": 0.15}
    return make_model("llama", seed=1, **small), make_model("llama", seed=2, **small)


def next_logps(model, prompt):
    with torch.no_grad():
        return model(torch.tensor([prompt]), use_cache=False).logits[0, -1].log_softmax(-1)


def by_token(policy, reference, prompt, a):
    """{answer: probability} under the tilt token by token: a walk of the tree, each step by its definition."""
    found, open_ = {}, {(): 1.0}
    while open_:
        so_far, probability = open_.popitem()
        logps, ref_logps = (next_logps(model, [*prompt, *so_far]) for model in (policy, reference))
        weights = [math.exp((1 - a) * r + a * p) for p, r in zip(logps.tolist(), ref_logps.tolist(), strict=True)]
        for token, weight in enumerate(weights):
            answer = (*so_far, token)
            ended = token == EOS or len(answer) == LIMIT
            (found if ended else open_)[answer] = probability * weight / math.fsum(weights)
    return found


def of_answers(policy, reference, prompt, a, enumerate_answers):
    """{answer: probability} under π_ref^(1−a)·π^a over whole answers."""
    p, r = (enumerate_answers(model, prompt, eos=EOS, limit=LIMIT) for model in (policy, reference))
    weights = {answer: math.exp((1 - a) * math.log(r[answer]) + a * math.log(p[answer])) for answer in p}
    return {answer: weight / math.fsum(weights.values()) for answer, weight in weights.items()}


class TestTiltedLogps:
    def test_ends_are_the_models_and_the_middle_is_by_hand(self):
        logits, ref_logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(tilted_logps(logits, ref_logits, 0.0), ref_logits.log_softmax(-1))
        torch.testing.assert_close(tilted_logps(logits, ref_logits, 1.0), logits.log_softmax(-1))
        # odds 1:3 under the reference, 3:1 under the policy: nine times as much; half way is 1:1
        half = tilted_logps(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 3.0]]).log(), 0.5)
        torch.testing.assert_close(half.exp(), torch.tensor([[0.5, 0.5]]))

    def test_a_factor_per_row(self):
        logits, ref_logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        together = tilted_logps(logits, ref_logits, torch.tensor([0.0, 0.5, 3.0]))
        for row, a in enumerate((0.0, 0.5, 3.0)):
            torch.testing.assert_close(together[row], tilted_logps(logits[row], ref_logits[row], a))

    def test_tokens_that_neither_model_gives(self):
        masked = torch.tensor([[0.0, 1.0, -torch.inf]])
        found = tilted_logps(masked, masked.flip(1).roll(1, 1).masked_fill(masked == -torch.inf, -torch.inf), 0.5)
        assert not found.isnan().any() and found[0, 2] == -torch.inf


class TestByEnumeration:
    @pytest.mark.parametrize("a", [0.0, 0.4, 1.0, 2.0])
    def test_scores_are_the_tilt_token_by_token(self, pair, a):
        expected = by_token(*pair, [1, 3], a)
        answers = [[list(answer) for answer in expected]]
        scores = score_retilted(*pair, [[1, 3]], answers, a, pad_id=PAD)[0]
        torch.testing.assert_close(scores[:, 0].exp(), torch.tensor([*expected.values()], dtype=torch.float64))
        if a in (0.0, 1.0):
            torch.testing.assert_close(scores[:, 0], scores[:, 2 if a == 0 else 1], rtol=0, atol=1e-12)

    def test_by_answer_it_is_another_policy_but_at_the_ends(self, pair, enumerate_answers):
        apart = {}
        for a in (0.0, 0.5, 1.0, 2.0):
            token, answer = by_token(*pair, [1, 3], a), of_answers(*pair, [1, 3], a, enumerate_answers)
            apart[a] = sum(abs(token[y] - answer[y]) for y in token) / 2
        assert max(apart[0.0], apart[1.0]) < 1e-12
        assert min(apart[0.5], apart[2.0]) > 1e-3

    def test_the_ratio_of_the_two_is_the_product_of_the_steps(self, pair, enumerate_answers):
        """π̂_a(y) = π_ref^(1−a)·π^a / Π_t Z_t(y_<t)."""
        a, prompt = 0.5, [1, 3]
        token, answer = by_token(*pair, prompt, a), of_answers(*pair, prompt, a, enumerate_answers)
        constants = []
        for y in token:
            log_z = 0.0
            for t in range(len(y)):
                logps, ref_logps = (next_logps(model, [*prompt, *y[:t]]) for model in pair)
                log_z += float(((1 - a) * ref_logps + a * logps).logsumexp(-1))
            constants.append(math.log(token[y]) + log_z - math.log(answer[y]))
        assert constants == pytest.approx([constants[0]] * len(constants), abs=1e-9)

    @pytest.mark.slow
    def test_samples_follow_it_with_a_factor_per_prompt(self, pair):
        """20,000 answers in all: each frequency within five standard errors, and far from another factor's."""
        prompts, factors, k = [[1, 3], [3], [1, 3, 3, 1], [1, 3]], [0.0, 0.5, 1.0, 2.0], 5000
        drawn = sample_retilted(*pair, prompts, k, a=factors, max_new_tokens=LIMIT, seed=0, batch_size=2, **IDS)
        for i, (prompt, a) in enumerate(zip(prompts, factors, strict=True)):
            expected = by_token(*pair, prompt, a)
            seen = Counter(map(tuple, drawn.answers[i]))
            assert set(seen) <= set(expected)
            for answer, p in expected.items():
                assert abs(seen[answer] / k - p) < 5 * math.sqrt(p * (1 - p) / k) + 1e-3
        other = by_token(*pair, prompts[3], 1.0)
        seen = Counter(map(tuple, drawn.answers[3]))
        assert sum(abs(seen[y] / k - p) for y, p in other.items()) / 2 > 0.05

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])  # rotary positions hide a shift, learned ones do not
    def test_numbers_of_each_token_are_those_of_separate_passes(self, make_model, kind):
        """Left padding, caches and rows that leave the batch change nothing; Llama's angles are float32."""
        pair = [make_model(kind, seed=seed, vocab=4, eos=EOS, initializer_range=0.15) for seed in (1, 2)]
        prompts, factors = [[1, 3], [3], [1, 3, 3, 1]], [0.3, 1.0, 2.0]
        drawn = sample_retilted(*pair, prompts, 20, a=factors, max_new_tokens=8, seed=1, **IDS)
        lengths = {len(answer) for own in drawn.answers for answer in own}
        assert len(lengths) > 3
        for i, (prompt, a) in enumerate(zip(prompts, factors, strict=True)):
            for j, answer in list(enumerate(drawn.answers[i]))[:6]:
                for t, token in enumerate(answer):
                    logps, ref_logps = (next_logps(model, [*prompt, *answer[:t]]) for model in pair)
                    tilted = tilted_logps(logps, ref_logps, a)
                    got = (drawn.logps, drawn.policy_logps, drawn.ref_logps)
                    for values, expected in zip(got, (tilted, logps, ref_logps), strict=True):
                        assert values[i][j][t] == pytest.approx(expected[token].item(), abs=1e-7)
                    distance = float((tilted.exp() * (tilted - ref_logps)).sum())
                    assert drawn.step_kls[i][j][t] == pytest.approx(distance, abs=1e-7)

    def test_step_kls_estimate_the_kl_of_answers(self, pair):
        drawn = sample_retilted(*pair, [[1, 3]], 4000, a=1.5, max_new_tokens=LIMIT, seed=2, **IDS)
        tilted, ref = by_token(*pair, [1, 3], 1.5), by_token(*pair, [1, 3], 0.0)
        exact = sum(p * math.log(p / ref[y]) for y, p in tilted.items())
        steps = torch.tensor([sum(own) for own in drawn.step_kls[0]])
        ratios = torch.tensor([sum(p) - sum(r) for p, r in zip(drawn.logps[0], drawn.ref_logps[0], strict=True)])
        for estimate in (steps, ratios):
            assert abs(estimate.mean() - exact) < 4 * estimate.std() / math.sqrt(4000)
        assert steps.std() < ratios.std()


class TestSampling:
    def test_is_seeded_and_leaves_the_callers_state_and_modes(self, pair):
        settings = {"a": 0.5, "max_new_tokens": 6, **IDS}
        pair[0].train()
        before = torch.get_rng_state()
        first = sample_retilted(*pair, [[1], [3]], 8, seed=3, **settings)
        assert torch.equal(before, torch.get_rng_state()) and pair[0].training and not pair[1].training
        pair[0].eval()
        assert sample_retilted(*pair, [[1], [3]], 8, seed=3, **settings) == first
        assert sample_retilted(*pair, [[1], [3]], 8, seed=4, **settings) != first
        ended = [[answer[-1] == EOS for answer in own] for own in first.answers]
        assert first.truncated == [own.count(False) for own in ended]
        assert all(EOS not in answer[:-1] for own in first.answers for answer in own)

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks by a name that is to go
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_an_adapter_stands_for_both_models(self, make_model, kind):
        base = make_model(kind, seed=5, dtype=torch.float32)
        target = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if kind == "gpt2" else {}
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **target)
        policy = get_peft_model(base, config).eval()
        reference = make_model(kind, seed=5, dtype=torch.float32)
        settings = {"a": [0.0, 0.7, 1.6], "max_new_tokens": 5, "seed": 0, **IDS}
        prompts = [[4, 5, 6], [7], [8, 9]]
        alone = sample_retilted(policy, policy, prompts, 4, **settings)
        apart = sample_retilted(policy, reference, prompts, 4, **settings)
        assert alone.answers == apart.answers
        for one, other in zip(alone.logps[1], apart.logps[1], strict=True):
            assert one == pytest.approx(other, abs=1e-4)
        policy_sums, ref_sums = ([sum(map(sum, own)) for own in part] for part in (alone.policy_logps, alone.ref_logps))
        assert abs(policy_sums[1] - ref_sums[1]) > 0.1  # the adapter is on for one and off for the other

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"k": 0}, "k: got 0"),
            ({"max_new_tokens": True}, "max_new_tokens: got True"),
            ({"prompts": [[1], []]}, "prompts: got"),
            ({"a": math.nan}, "a: got nan"),
            ({"a": [0.5]}, r"a: got \[0\.5\], expected .* 2 prompts"),
            ({"max_new_tokens": 64}, "max_new_tokens: got 64, but a prompt has 2 tokens and the context 64"),
        ],
    )
    def test_bad_input(self, pair, changed, message):
        good = {"prompts": [[1], [1, 3]], "k": 2, "a": 1.0, "max_new_tokens": 4}
        both = {**good, **changed}
        with pytest.raises(ValueError, match=message):
            sample_retilted(*pair, both.pop("prompts"), both.pop("k"), seed=0, **IDS, **both)

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks by a name that is to go
    def test_models_that_do_not_go_together(self, pair, make_model):
        settings = {"a": 1.0, "max_new_tokens": 2, "seed": 0, **IDS}
        with pytest.raises(ValueError, match="reference: got the policy itself"):
            sample_retilted(pair[0], pair[0], [[1]], 1, **settings)
        with pytest.raises(ValueError, match="reference: got a vocabulary of 30, expected the policy's"):
            sample_retilted(pair[0], make_model("llama"), [[1]], 1, **settings)
        tuned = get_peft_model(make_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        with pytest.raises(ValueError, match="policy: got a prompt-tuning adapter"):
            sample_retilted(tuned, tuned, [[1]], 1, **settings)


@pytest.fixture(scope="module")
def sweep():
    problems = [problem for task in tasks.TASKS for problem in tasks.sample_problems(task, 3, 0)]
    tokenizer = models.tiny_tokenizer([problem.prompt for problem in problems], 300)
    policy, reference = (
        models.tiny_lm(tokenizer, hidden_size=16, layers=2, heads=2, max_length=64, seed=seed).eval() for seed in (0, 1)
    )
    return retilt_table(policy, reference, tokenizer, problems, (0.0, 1.0, 3.0), samples=4, max_new_tokens=6, seed=0,
                        reward=lambda problem, text: float(len(text)))  # fmt: skip


class TestCurves:
    def test_a_row_per_answer(self, sweep):
        assert len(sweep) == 3 * 9 * 4 and sweep.groupby(["a", "prompt"]).size().eq(4).all()
        at_start = sweep[sweep["a"] == 0]
        assert at_start["kl"].abs().max() < 1e-6 and (sweep[sweep["a"] == 3]["kl"] > 0).all()
        assert sweep["length"].between(1, 6).all() and (sweep.loc[sweep["truncated"], "length"] == 6).all()

    def test_means_by_task(self, sweep):
        curves = reward_kl_curves(sweep)
        assert curves["task"].tolist() == [task for task in tasks.TASKS for _ in range(3)]
        assert curves["a"].tolist() == [0.0, 1.0, 3.0] * 3 and (curves["n"] == 3).all()
        own = sweep[(sweep["task"] == "code") & (sweep["a"] == 3.0)]
        row = curves[(curves["task"] == "code") & (curves["a"] == 3.0)].iloc[0]
        means = own.groupby("prompt")["reward"].mean()
        assert row["reward"] == pytest.approx(means.mean()) and row["reward_se"] == pytest.approx(means.sem())

    CURVES = pd.DataFrame(
        {"task": ["m"] * 3 + ["d"] * 3, "a": [0.0, 1.0, 2.0] * 2, "kl": [0.0, 0.2, 0.8, 0.0, 0.1, 0.4],
         "reward": [0.0, -0.1, -0.3, 0.5, 0.7, 0.8]}
    )  # fmt: skip

    def test_equal_kl_by_hand(self):
        one = at_equal_kl(self.CURVES, {"m": 1.0, "d": 1.0}, 0.15)
        assert one.multiple == pytest.approx(1.0) and one.reward == pytest.approx(0.3)
        routed = at_equal_kl(self.CURVES, {"m": 0.0, "d": 1.0}, 0.15)
        assert routed.kl == pytest.approx(0.15) and routed.a["d"] == pytest.approx(1 + 2 / 3)
        assert routed.reward == pytest.approx((0.0 + 0.7 + 0.1 * 2 / 3) / 2)

    @pytest.mark.parametrize(
        ("direction", "budget", "message"),
        [
            ({"m": 1.0}, 0.1, "direction: got tasks"),
            ({"m": -1.0, "d": 1.0}, 0.1, "direction: got {"),
            ({"m": 0.0, "d": 0.0}, 0.1, "direction: got {"),
            ({"m": 1.0, "d": 1.0}, 5.0, "budget: got 5.0 nats, expected at most 0.6"),
        ],
    )
    def test_bad_input(self, direction, budget, message):
        with pytest.raises(ValueError, match=message):
            at_equal_kl(self.CURVES, direction, budget)
        with pytest.raises(ValueError, match="curves: got no factor 0"):
            at_equal_kl(self.CURVES[self.CURVES["a"] > 0], {"m": 1.0, "d": 1.0}, 0.1)

    def test_bad_sweeps(self):
        with pytest.raises(ValueError, match="problems: got none"):
            retilt_table(None, None, None, [], [0.0], samples=1, max_new_tokens=1, seed=0)
        with pytest.raises(ValueError, match="a: got"):
            retilt_table(None, None, None, [None], [0.0, 0.0], samples=1, max_new_tokens=1, seed=0)
