"""Entropies of models small enough to list every answer, and standard errors that mean what they say."""

import logging
import math

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import dpoviz.lm.entropy as module
import dpoviz.lm.sampling as drawing
from dpoviz.lm import cache as journal
from dpoviz.lm import processes
from dpoviz.lm.entropy import _ratio, estimate_entropy
from dpoviz.lm.sampling import _Way as Way
from dpoviz.lm.sampling import sampling

EOS, LIMIT = 0, 3


@pytest.fixture(scope="module")
def model(make_model):
    """Four tokens, of which 0 ends an answer: 40 answers in all, at most three tokens long."""
    return make_model("llama", vocab=4, eos=EOS, seed=3, initializer_range=0.25)


@pytest.fixture(scope="module")
def truth(model, oracle, enumerate_answers):
    """By the list of all answers: their entropy, their entropy per token, and that of the first token."""

    def of(prompt):
        answers = enumerate_answers(model, prompt, eos=EOS, limit=LIMIT)
        assert math.fsum(answers.values()) == pytest.approx(1, abs=1e-12)
        sequence = -math.fsum(p * math.log(p) for p in answers.values())
        length = math.fsum(p * len(answer) for answer, p in answers.items())
        first = oracle(model, prompt, [EOS])[1][0]
        cut = math.fsum(p for answer, p in answers.items() if answer[-1] != EOS)
        return {"sequence": sequence, "per_token": sequence / length, "first_token": first, "truncated": cut}

    return of


def estimate(model, prompts, samples, **changes):
    settings = {"max_new_tokens": LIMIT, "eos_id": EOS, "pad_id": EOS, "seed": 0, **changes}
    return estimate_entropy(model, prompts, samples=samples, **settings)


class TestRatio:
    def test_by_hand(self):
        # (2 + 4 + 3) / (1 + 3 + 2) = 1.5, while the mean of the three ratios would be 1.61; the residuals 0.5, -0.5
        # and 0 have the variance 0.25, and sqrt(0.25 / 3) over the mean length 2 is 0.14434
        value, se = _ratio(torch.tensor([[2.0, 4.0, 3.0]]), torch.tensor([[1.0, 3.0, 2.0]]))
        assert (value.item(), se.item()) == pytest.approx((1.5, 0.14434), abs=1e-5)

    def test_lengths_that_explain_the_sums_leave_no_error(self):
        lengths = torch.tensor([[1.0, 5.0, 2.0]], dtype=torch.float64)
        value, se = _ratio(0.7 * lengths, lengths)
        assert (value.item(), se.item()) == pytest.approx((0.7, 0), abs=1e-12)


SINGLE = 1e-6
"""What generate() rounds of logits of order 1, which it hands on in float32."""

PROMPTS = ([1, 2, 3], [3], [2, 2, 1, 1, 3])


@pytest.fixture(scope="module")
def many(model):
    return estimate(model, PROMPTS, 1200)


@pytest.fixture(scope="module")
def repeats(model):
    """400 independent estimates at one prompt, of 64 answers each."""
    return estimate(model, [[3]] * 400, 64, seed=1, batch_size=100)


class TestEstimateEntropy:
    @pytest.mark.parametrize("name", ["sequence", "monte_carlo", "per_token"])
    def test_agrees_with_the_list_of_all_answers(self, many, truth, name):
        exact = [truth(prompt)["sequence" if name == "monte_carlo" else name] for prompt in PROMPTS]
        value, se = getattr(many, name)
        for i in range(3):
            assert 0 < se[i] < 0.1  # tight enough to mean something
            assert abs(value[i].item() - exact[i]) < 4 * se[i].item()  # 1 in 16000 by chance, and seeded
        # the control: the three prompts differ by more than that, so an order mixed up would be seen
        assert max(exact) - min(exact) > 8 * se.max()

    def test_first_token_is_exact(self, many, truth):
        exact = [truth(prompt)["first_token"] for prompt in PROMPTS]
        assert many.first_token.value.tolist() == pytest.approx(exact, abs=SINGLE)
        assert many.first_token.se.tolist() == [0, 0, 0]

    def test_the_share_of_cut_answers(self, many, truth):
        for share, prompt in zip(many.truncated.tolist(), PROMPTS, strict=True):
            exact = truth(prompt)["truncated"]
            assert 0.05 < exact < 0.95
            assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / 1200)
        assert many.samples == 1200

    def test_less_than_the_whole_entropy_where_answers_are_cut(self, model, enumerate_answers):
        def exact(limit):
            return -math.fsum(p * math.log(p) for p in enumerate_answers(model, [3], eos=EOS, limit=limit).values())

        assert exact(1) < exact(3) < exact(5)

    def test_sequence_and_monte_carlo_have_one_mean(self, many):
        a, b = many.sequence, many.monte_carlo
        # on the same answers, which only brings the two closer than if they were independent
        assert ((a.value - b.value).abs() < 4 * (a.se.square() + b.se.square()).sqrt()).all()
        assert not torch.equal(a.value, b.value)

    @pytest.mark.parametrize("name", ["sequence", "monte_carlo", "per_token"])
    def test_standard_errors_are_calibrated(self, repeats, truth, name):
        exact = truth([3])["sequence" if name == "monte_carlo" else name]
        value, se = getattr(repeats, name)
        z = (value - exact) / se
        # 400 repeats: the standard deviation of z scatters by 1 / sqrt(800) = 0.035 and its mean by 0.05, the
        # bounds are four of these; an error that forgot sqrt(K) gives 0.125, n for n - 1 is below the resolution
        assert 0.86 < z.std().item() < 1.14
        assert abs(z.mean().item()) < 0.2

    def test_variances_of_the_two_that_have_one_mean(self, model, enumerate_answers, repeats, oracle):
        """By the list of all answers: sequence sums expectations where monte_carlo sums draws."""
        answers = enumerate_answers(model, [3], eos=EOS, limit=LIMIT)
        sums = {answer: math.fsum(oracle(model, [3], answer)[1]) for answer in answers}
        exact = {}
        for name, value in (
            ("sequence", lambda answer, p: sums[answer]),
            ("monte_carlo", lambda answer, p: -math.log(p)),
        ):
            mean = math.fsum(p * value(answer, p) for answer, p in answers.items())
            exact[name] = math.fsum(p * (value(answer, p) - mean) ** 2 for answer, p in answers.items())
            # the variance of 400 estimates of 64 answers: relative error sqrt(2 / 400) = 0.07, four of these
            assert getattr(repeats, name).value.var().item() * 64 == pytest.approx(exact[name], rel=0.28)
        # nowhere is an order promised: here the two differ, by more than the tolerance above
        assert abs(math.log(exact["sequence"] / exact["monte_carlo"])) > 0.3

    def test_uniform(self, make_model):
        model = make_model("llama", vocab=5, eos=EOS)
        with torch.no_grad():
            model.get_output_embeddings().weight.zero_()
        got = estimate(model, [[1, 2], [3]], 40)
        for name in ("first_token", "per_token"):
            assert getattr(got, name).value.tolist() == pytest.approx([math.log(5)] * 2, abs=SINGLE)
            assert getattr(got, name).se.tolist() == pytest.approx([0, 0], abs=SINGLE)
        # each of 5^3 leaves has -log p = length * log 5, so here the two estimates are one and the same
        assert got.sequence.value.tolist() == pytest.approx(got.monte_carlo.value.tolist(), abs=SINGLE)
        lengths = got.sequence.value / math.log(5)
        assert ((1 < lengths) & (lengths < 3)).all()

    def test_deterministic(self, make_model):
        model = make_model("llama", vocab=5, eos=EOS)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1e4)
        got = estimate(model, [[1, 2], [3]], 4)
        for name in ("first_token", "per_token", "sequence", "monte_carlo"):
            assert getattr(got, name).value.tolist() == pytest.approx([0, 0], abs=1e-12)
            assert getattr(got, name).se.tolist() == pytest.approx([0, 0], abs=1e-12)

    def test_prompts_keep_their_order_over_batches(self, model, truth):
        prompts = [[1, 2, 3], [3], [2, 1], [1, 1, 2, 2, 3, 3], [2]]
        got = estimate(model, prompts, 2, batch_size=2)
        exact = [truth(prompt)["first_token"] for prompt in prompts]
        assert got.first_token.value.tolist() == pytest.approx(exact, abs=SINGLE)
        assert len({round(value, 6) for value in exact}) == 5

    def test_repeatable_and_the_seed_matters(self, model):
        first, again, other = (estimate(model, [[1, 2]], 10, seed=seed).sequence.value for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_mode_stays_and_dropout_does_not_act(self, make_model, training):
        model = make_model("gpt2", vocab=4, eos=EOS)  # dropout 0.1
        expected = estimate(model, [[1, 2]], 10).sequence.value
        assert torch.equal(estimate(model.train(training), [[1, 2]], 10).sequence.value, expected)
        assert model.training is training

    def test_carries_no_gradient(self, model):
        assert not estimate(model, [[1, 2]], 2).per_token.value.requires_grad

    @pytest.mark.parametrize("samples", [1, 0])
    def test_too_few_samples(self, model, samples):
        with pytest.raises(ValueError, match=f"samples: got {samples}, expected at least 2"):
            estimate(model, [[1, 2]], samples)


class Killed(BaseException):
    """Not an Exception, as a signal is not."""


class TestKeep:
    PROMPTS = ([1, 2, 3], [3], [2, 1], [1, 1, 2, 2, 3, 3], [2], [3, 3, 1, 2], [1])

    @pytest.fixture
    def draws(self, monkeypatch):
        """The prompts of each batch that is drawn; raises after `draws.limit` of them."""

        class Draws(list):
            limit = 99

        seen, draw = Draws(), module._draw

        def spy(prompts, *args):
            if len(seen) == seen.limit:
                raise Killed
            seen.append([list(prompt) for prompt in prompts])
            return draw(prompts, *args)

        monkeypatch.setattr(module, "_draw", spy)
        return seen

    @pytest.fixture
    def run(self, model, tmp_path):
        return lambda prompts=self.PROMPTS, keep=tmp_path, **changes: estimate(
            model, prompts, 5, **{"batch_size": 2, "keep": keep, **changes}
        )

    @staticmethod
    def same(a, b):
        pairs = zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
        return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)

    def test_changes_nothing(self, run, draws):
        whole = run(keep=None)
        assert self.same(run(), whole)
        assert len(draws) == 8
        assert self.same(run(), whole)  # read
        assert len(draws) == 8

    @pytest.mark.parametrize("done", [0, 1, 2, 3])
    def test_a_killed_run_goes_on_and_ends_bit_by_bit_as_if_it_had_not_been(self, run, draws, done):
        whole = run(keep=None)
        batches = list(draws)
        assert [len(batch) for batch in batches] == [2, 2, 2, 1]
        draws.clear()
        draws.limit = done
        with pytest.raises(Killed):
            run()
        draws.limit = 99
        torch.rand(3)  # another process has another random state
        assert self.same(run(), whole)
        assert draws == batches  # each batch once

    def test_another_run_over_some_of_the_prompts_in_between_changes_nothing(self, run, draws):
        whole = run(keep=None)
        draws.clear()
        draws.limit = 2
        with pytest.raises(Killed):
            run()
        draws.limit = 99
        run([[3], [2, 1], [1]])
        run([*self.PROMPTS, [2, 2], [3, 2]])
        assert self.same(run(), whole)

    def test_a_batch_is_decided_by_the_seed_and_its_prompts(self, run, draws):
        """Alone or after others; and two batches of the same prompts are not the same draws."""
        together = run([[1, 2], [2, 1], [3, 1, 2], [1, 3, 2]], keep=None)
        assert [sorted(batch) for batch in draws] == [[[1, 2], [2, 1]], [[1, 3, 2], [3, 1, 2]]]
        alone = run([[3, 1, 2], [1, 3, 2]], keep=None)
        assert together.monte_carlo.value[2:].tolist() == alone.monte_carlo.value.tolist()
        several = run([[1, 2]] * 6, keep=None).monte_carlo.value.tolist()
        assert len(set(several)) == 6

    @pytest.mark.parametrize("number", [0, 1, 3])
    def test_a_damaged_batch_is_drawn_again_with_the_same_draws(self, run, draws, tmp_path, number, caplog):
        whole = run()
        batch = draws[number]
        draws.clear()
        file = sorted(tmp_path.glob("entropy-*/*.npz"), key=lambda path: path.stat().st_mtime_ns)[number]
        file.write_bytes(file.read_bytes()[:-40])
        with caplog.at_level(logging.WARNING):
            assert self.same(run(), whole)
        assert draws == [batch]
        assert f"{file} cannot be read" in caplog.text

    def test_a_prompt_that_stands_twice_is_drawn_twice(self, run):
        kept = run([[1, 2], [1, 2]])
        assert self.same(kept, run([[1, 2], [1, 2]], keep=None))
        assert kept.sequence.value[0] != kept.sequence.value[1]

    @pytest.mark.parametrize("change", [{"seed": 1}, {"max_new_tokens": 2}, {"batch_size": 3}, {"pad_id": 1}])
    def test_another_setting_draws_anew(self, run, draws, change):
        run()
        draws.clear()
        assert self.same(run(**change), run(keep=None, **change))
        assert sum(len(batch) for batch in draws) == 14

    def test_another_model_and_another_code_draw_anew(self, run, make_model, tmp_path, draws, monkeypatch):
        run()
        draws.clear()
        other = make_model("llama", vocab=4, eos=EOS, seed=4, initializer_range=0.25)
        estimate(other, self.PROMPTS, 5, batch_size=2, keep=tmp_path)
        assert len(draws) == 4
        monkeypatch.setattr(journal, "code_digest", lambda name: "another")
        run()
        assert len(draws) == 8

    def test_one_bar_counts_prompts_read_or_drawn(self, run, capsys, draws, monkeypatch):
        monkeypatch.setattr(processes, "watched", lambda: True)
        draws.limit = 2
        with pytest.raises(Killed):
            run()
        draws.limit = 99
        capsys.readouterr()
        run(progress=True)
        shown = capsys.readouterr().err
        assert "entropy of the reference: 100%" in shown
        assert "7/7" in shown
        assert "prompt/s" in shown
        assert "sampling" not in shown


class TestStaticCache:
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_answers_and_entropies_are_those_of_the_growing_cache(self, make_model, kind):
        own = make_model(kind, dtype=torch.float32, seed=3, initializer_range=0.25)
        found = []
        for static_cache in (False, True):
            settings = {"max_new_tokens": 20, "eos_id": EOS, "pad_id": EOS, "seed": 0, "scores": True}
            with sampling(own, PROMPTS, 4, **settings, static_cache=static_cache) as sampler:
                found.append(sampler.draw(PROMPTS))
        (answers, scores), (expected, right) = found
        assert answers == expected and len({len(a) for some in answers for a in some}) > 1
        for name in ("logps", "entropy_sums", "first_entropies"):
            torch.testing.assert_close(getattr(scores, name), getattr(right, name), rtol=1e-5, atol=1e-5)
        assert ways(own) == {Way.SHARED: Way.SHARED, Way.STATIC: Way.STATIC}

    def test_where_layers_have_windows_the_cache_grows(self):
        torch.manual_seed(0)
        small = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        own = MistralForCausalLM(MistralConfig(**small, **heads, sliding_window=8, pad_token_id=0)).eval()
        assert estimate(own, PROMPTS, 2, static_cache=True).samples == 2
        assert ways(own) == {Way.STATIC: Way.SHARED}


def ways(model):
    return {first: way for first, (_, way) in drawing._TRIED[model].items()}
