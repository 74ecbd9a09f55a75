"""Shared-prefix scores against one forward a token, and samples against the tree of all answers."""

import itertools
import logging
import math
import random
import warnings
from dataclasses import fields
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.profiler import ProfilerActivity, profile
from transformers import MistralConfig, MistralForCausalLM

import dpoviz.lm.scoring as lp
from dpoviz.lm import packing, trial
from dpoviz.lm.packing import PrefixBatch, by_length, prefix_batch
from dpoviz.lm.sampling import sample_answers, sampling
from dpoviz.lm.scoring import context_length, evaluating, score_answers, supports_shared_prefix

VOCAB, PAD, EOS = 30, 0, 2
# float64 and sums of at most 60 terms of order 10: the rounding is about 1e-13, the bound leaves a thousandfold
EXACT = {"rtol": 0, "atol": 1e-10}


def _log_softmax(logits):
    log_z = max(logits) + math.log(math.fsum(math.exp(v - max(logits)) for v in logits))
    return [v - log_z for v in logits]


def tokens(length, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=draw).tolist()


def ragged(k, seed=0):
    """Four prompts of 1 to 7 tokens with k answers of 1 to 8 tokens, the end token included."""
    prompts = [tokens(n, seed + n) for n in (3, 1, 7, 4)]
    lengths = [[(3 * i + 5 * j) % 8 for j in range(k)] for i in range(4)]
    return prompts, [[[*tokens(n, 99 * i + j + seed), EOS] for j, n in enumerate(row)] for i, row in enumerate(lengths)]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(make_model, kind):
    return make_model(kind)


@pytest.fixture(scope="module")
def llama(make_model):
    return make_model("llama")


def partitions(items):
    """All ways to part a list."""
    if not items:
        yield []
        return
    first, *rest = items
    for parts in partitions(rest):
        yield [[first], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [first, *part], *parts[i + 1 :]]


def seen_by_each(batch):
    """(R, T, T) what each token of a packed batch may see: what is related to it, and not behind it."""
    rows, length = batch.segments.shape
    row, query, key = torch.arange(rows)[:, None, None], torch.arange(length)[:, None], torch.arange(length)
    return batch.related(row, query, key) & (batch.position_ids[row, key] <= batch.position_ids[row, query])


def everything(self, row, query, key):
    """What a model would see without the shared-prefix mask: every token, of earlier positions."""
    return torch.ones_like(row + query + key, dtype=torch.bool)


class TestPrefixBatch:
    def test_the_layout_of_one_row_by_hand(self):
        batch = prefix_batch([[5, 6]], [[[7, 8, 2], [9, 2]]], pad_id=0)
        # the end tokens are predicted, not fed
        assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
        assert batch.targets.tolist() == [7, 8, 2, 9, 2]
        assert batch.predictors.tolist() == [1, 2, 3, 1, 4]
        assert batch.owners.tolist() == [0, 0, 0, 1, 1]

    def test_who_sees_whom(self):
        batch = prefix_batch([[5, 6], [5]], [[[7, 8, 2], [9, 2]], [[2], [2]]], pad_id=0, packed=False)
        seen = seen_by_each(batch)
        assert seen[0].int().tolist() == [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 0, 0, 1],
        ]
        assert seen[1, 0].tolist() == [True, False, False, False, False]
        assert seen[1].any(dim=1).all()  # padding sees something, or its softmax is NaN
        assert not seen[1, :1, 1:].any()

    def test_moves_as_one(self):
        batch = prefix_batch([[5, 6]], [[[7, 2], [9, 2]]], pad_id=0).to("meta")
        assert {getattr(batch, name).device.type for name in ("input_ids", "segments", "predictors", "owners")} == {
            "meta"
        }
        assert {getattr(batch, field.name).device.type for field in fields(batch)} == {"meta"}

    def test_short_prompts_fill_up_a_row(self, monkeypatch):
        prompts, answers = [[3], [5, 6, 7], [4]], [[[8, 2], [9, 2]], [[7, 8, 2], [9, 2]], [[2], [1, 2]]]
        monkeypatch.setattr(packing, "_ATTENTION", 10)  # 2 rows of 6 cost 12 * 16, one of 11 costs 11 * 21
        batch = prefix_batch(prompts, answers, pad_id=0)
        assert batch.input_ids.tolist() == [[5, 6, 7, 7, 8, 9], [3, 8, 9, 4, 1, 0]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 1, 0, 1, 0]]
        assert batch.targets.tolist() == [7, 8, 2, 9, 2, 8, 2, 9, 2, 2, 1, 2]
        assert batch.predictors.tolist() == [2, 3, 4, 2, 5, 6, 7, 6, 8, 9, 9, 10]
        assert batch.owners.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5]
        assert batch.answers.tolist() == [[2, 3], [0, 1], [4, 5]]
        assert batch.prompt_tokens.tolist() == [0, 1, 2, 6, 9]
        assert batch.prompt_owners.tolist() == [0, 0, 0, 1, 2]
        assert batch.prompts.tolist() == [1, 0, 2]
        seen = seen_by_each(batch)[1]
        assert seen.int().tolist() == [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0],
            [0, 0, 0, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ]
        # the control: by itself, each has its own row
        apart = prefix_batch(prompts, answers, pad_id=0, packed=False)
        assert apart.input_ids.tolist() == [[3, 8, 9, 0, 0, 0], [5, 6, 7, 7, 8, 9], [4, 1, 0, 0, 0, 0]]

    def test_fewer_rows_where_padding_would_cost_more_than_attention(self, monkeypatch):
        prompts, answers = [[3], [5, 6, 7], [4]], [[[8, 2], [9, 2]], [[7, 8, 2], [9, 2]], [[2], [1, 2]]]
        batch = prefix_batch(prompts, answers, pad_id=0)
        assert batch.input_ids.tolist() == [[5, 6, 7, 7, 8, 9, 3, 8, 9, 4, 1]]
        assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 8]]

    def test_costs_little_more_than_the_best_of_all_layouts(self, monkeypatch):
        draw = random.Random(0)
        some = [[draw.randint(1, 300) for _ in range(draw.randint(2, 6))] for _ in range(60)]

        def cost(rows, width):
            return rows * width * (packing._ATTENTION + width)

        def over_the_best():
            found = []
            for lengths in some:
                batch = prefix_batch([[i] * n for i, n in enumerate(lengths)], [[[2]]] * len(lengths), 0)
                best = min(cost(len(parts), max(map(sum, parts))) for parts in partitions(lengths))
                found.append(cost(*batch.input_ids.shape) / best)
            assert min(found) >= 1
            return sum(found) / len(found)

        assert over_the_best() < 1.02
        monkeypatch.setattr(packing, "_FEWER", 0)
        assert over_the_best() > 1.05  # the control: rows as long as the longest prompt

    def test_what_pairs_share_stands_once(self):
        prompts, answers = [[5, 6], [5, 6]], [[[7, 2], [8, 2]], [[9, 2], [7, 2]]]
        batch = prefix_batch(prompts, answers, pad_id=0)
        assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 2, 2]]
        assert batch.targets.tolist() == [7, 2, 8, 2, 9, 2]
        assert batch.answers.tolist() == [[0, 1], [2, 0]]
        assert batch.prompts.tolist() == [0, 0]

    def test_answers_of_one_prompt_are_spread_where_one_row_would_be_dear(self, monkeypatch):
        prompts, answers = [[5]] * 2, [[[7] * 9, [8] * 9], [[9] * 9, [7] * 9]]
        assert prefix_batch(prompts, answers, pad_id=0).input_ids.shape == (1, 25)
        monkeypatch.setattr(packing, "_ATTENTION", 0)  # the cost is then rows * T²
        batch = prefix_batch(prompts, answers, pad_id=0)
        assert batch.input_ids.tolist() == [[5, *[7] * 8, *[8] * 8], [5, *[9] * 8, *[0] * 8]]
        assert batch.answers.tolist() == [[0, 1], [2, 0]]
        assert batch.prompts.tolist() == [0, 0]

    @pytest.mark.parametrize(
        ("prompts", "answers", "message"),
        [
            ([], [], "prompts, answers: got 0 and 0"),
            ([[3]], [[[4]], [[4]]], "prompts, answers: got 1 and 2"),
            ([[3], [3]], [[[4]], [[4], [5]]], r"answers: got \[1, 2\] per prompt, expected the same number"),
            ([[3]], [[]], r"answers: got \[0\] per prompt"),
            ([[3], []], [[[4]], [[4]]], r"prompts: empty in rows \[1\]"),
            ([[3], [3]], [[[4]], [[]]], r"answers: empty in rows \[1\]"),
        ],
    )
    @pytest.mark.parametrize("shared", [True, False])
    def test_refused(self, llama, prompts, answers, message, shared):
        with pytest.raises(ValueError, match=message):
            score_answers(llama, prompts, answers, pad_id=PAD, shared_prefix=shared)


class TestScoreAnswers:
    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_equals_one_forward_a_token(self, model, oracle, k, shared):
        prompts, answers = ragged(k)
        scores = score_answers(model, prompts, answers, pad_id=PAD, entropy=True, features=True, shared_prefix=shared)
        for i, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
            for j, answer in enumerate(own):
                logps, entropies = oracle(model, prompt, answer)
                assert scores.logps[i, j].item() == pytest.approx(math.fsum(logps), abs=1e-10)
                assert scores.entropy_sums[i, j].item() == pytest.approx(math.fsum(entropies), abs=1e-10)
                assert scores.lengths[i, j] == len(answer)
            assert scores.first_entropies[i].item() == pytest.approx(entropies[0], abs=1e-10)
            hidden = model.base_model(torch.tensor([prompt])).last_hidden_state[0]
            # features are float32: 6e-8 relative, on numbers of order 1 to 10
            torch.testing.assert_close(scores.features[i], hidden.mean(dim=0).float(), rtol=1e-6, atol=1e-6)
        assert not scores.features.requires_grad

    @pytest.mark.slow
    @settings(max_examples=40)
    @given(data=st.data())
    def test_equals_separate_sequences_of_any_lengths(self, llama, data):
        k = data.draw(st.integers(1, 4))
        token = st.integers(0, data.draw(st.sampled_from([1, VOCAB - 1])))  # of two tokens, so that some are equal
        prompts = data.draw(st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=6))
        answer = st.lists(token, min_size=1, max_size=9)
        answers = [data.draw(st.lists(answer, min_size=k, max_size=k)) for _ in prompts]
        attention = data.draw(st.sampled_from([0, packing._ATTENTION]))
        with torch.no_grad(), mock.patch.object(packing, "_ATTENTION", attention):
            a, b = (
                score_answers(llama, prompts, answers, pad_id=PAD, entropy=True, features=True, shared_prefix=shared)
                for shared in (True, False)
            )
        for name in ("logps", "lengths", "entropy_sums", "first_entropies"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), **EXACT)
        torch.testing.assert_close(a.features, b.features, rtol=1e-6, atol=1e-6)

    def test_gradients_of_all_parameters(self, model):
        prompts, answers = ragged(3)
        prompts.append(prompts[2])  # with answers that it has, and others
        answers.append([answers[2][1], *answers[1][:2]])
        weights = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        grads = []
        for shared in (True, False):
            logps = score_answers(model, prompts, answers, pad_id=PAD, shared_prefix=shared).logps
            grads.append(torch.autograd.grad((weights * logps).sum(), list(model.parameters())))
        for (name, _), a, b in zip(model.named_parameters(), *grads, strict=True):
            assert b.abs().max() > 0, name
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_in_float32(self, make_model, kind, attention):
        model = make_model(kind, dtype=torch.float32, attention=attention)
        prompts, answers = ragged(2)
        with torch.no_grad():
            a, b = (score_answers(model, prompts, answers, pad_id=PAD, shared_prefix=s).logps for s in (True, False))
        # logits of order 10 carry 1e-6 each from sums in another order; an answer sums up to 8 of them
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)

    def test_eager_attention(self, make_model, kind):
        model = make_model(kind, attention="eager")
        prompts, answers = ragged(2)
        with torch.no_grad():
            a, b = (score_answers(model, prompts, answers, pad_id=PAD, shared_prefix=s).logps for s in (True, False))
        # Llama's eager softmax rounds to float32 whatever it is given
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if kind == "llama" else 1e-10)

    def test_an_answer_does_not_see_its_rival(self, model, monkeypatch):
        prompt, rejected = tokens(4, 1), [*tokens(5, 2), EOS]

        def rejected_beside(chosen):
            with torch.no_grad():
                scores = score_answers(
                    model, [prompt], [[chosen, rejected]], pad_id=PAD, features=True, shared_prefix=True
                )
            return scores.logps[0, 1].item(), scores.features

        same_length, longer = [*tokens(3, 7), EOS], [*tokens(8, 9), EOS]
        first, features = rejected_beside([*tokens(3, 5), EOS])
        for chosen in (same_length, longer):
            again, features_again = rejected_beside(chosen)
            assert again == pytest.approx(first, abs=1e-12)
            torch.testing.assert_close(features_again, features, rtol=0, atol=1e-6)
        assert torch.equal(rejected_beside(same_length)[1], features)
        # the control: with the mask that models use by default it does see it
        monkeypatch.setattr(PrefixBatch, "related", everything)
        seen = [rejected_beside(chosen)[0] for chosen in (same_length, longer)]
        assert abs(seen[0] - seen[1]) > 0.1

    def test_a_row_of_one_prompt_may_be_longer_than_the_context(self, model):
        prompts, answers = [tokens(20, 1)] * 6, [[tokens(9, 2 * i), tokens(9, 2 * i + 1)] for i in range(2, 8)]
        assert prefix_batch(prompts, answers, PAD).input_ids.shape == (1, 20 + 12 * 8)
        assert context_length(model) == 64
        with torch.no_grad():
            a, b = (score_answers(model, prompts, answers, pad_id=PAD, shared_prefix=s).logps for s in (True, False))
        torch.testing.assert_close(a, b, **EXACT)

    @pytest.mark.parametrize("shared", [True, False])
    def test_padding_does_not_matter(self, model, shared):
        prompts, answers = ragged(2)
        with torch.no_grad():
            together, other = (
                score_answers(model, prompts, answers, pad_id=pad, entropy=True, shared_prefix=shared)
                for pad in (PAD, 17)
            )
            alone = [
                score_answers(model, [p], [a], pad_id=PAD, entropy=True, shared_prefix=shared)
                for p, a in zip(prompts, answers, strict=True)
            ]
        for name in ("logps", "entropy_sums", "first_entropies"):
            torch.testing.assert_close(getattr(together, name), getattr(other, name), **EXACT)
            one_by_one = torch.cat([getattr(scores, name) for scores in alone])
            torch.testing.assert_close(getattr(together, name), one_by_one, **EXACT)

    @pytest.mark.parametrize("shared", [True, False])
    def test_chunks_change_nothing(self, model, monkeypatch, shared):
        prompts, answers = ragged(2)

        def run():
            scores = score_answers(model, prompts, answers, pad_id=PAD, entropy=True, shared_prefix=shared)
            grads = torch.autograd.grad((scores.logps * scores.entropy_sums).sum(), list(model.parameters()))
            return [scores.logps, scores.entropy_sums, *grads]

        whole = run()
        monkeypatch.setattr(lp, "_LOGITS_AT_ONCE", 3 * VOCAB)
        for a, b in zip(whole, run(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    def test_logits_only_where_an_answer_is_predicted_and_a_chunk_at_a_time(self, model, monkeypatch):
        prompts, answers = ragged(2)
        count = sum(len(answer) for own in answers for answer in own)
        rows, packed = [], len(prefix_batch(prompts, answers, PAD).input_ids)
        hook = model.get_output_embeddings().register_forward_hook(lambda *args: rows.append(args[2].shape[:-1]))
        try:
            with torch.no_grad():
                score_answers(model, prompts, answers, pad_id=PAD, shared_prefix=True)
                # one of each row comes with the body; all others by the head alone
                assert rows == [(packed, 1), (1, count)]
                monkeypatch.setattr(lp, "_LOGITS_AT_ONCE", 3 * VOCAB)
                score_answers(model, prompts, answers, pad_id=PAD, shared_prefix=True)
        finally:
            hook.remove()
        assert sum(n for _, n in rows[3:]) == count
        assert max(n for _, n in rows[3:]) == 3

    def test_gradient_only_where_it_is_on(self, llama):
        prompts, answers = ragged(2)
        assert score_answers(llama, prompts, answers, pad_id=PAD).logps.requires_grad
        with torch.no_grad():
            assert not score_answers(llama, prompts, answers, pad_id=PAD).logps.requires_grad


class TestHalfPrecision:
    @pytest.mark.parametrize("shared", [True, False])
    def test_softmax_and_sums_are_float32(self, make_model, shared):
        model = make_model("llama", dtype=torch.bfloat16)
        prompt, answer = tokens(4, 1), [*tokens(40, 2), EOS]
        with torch.no_grad():
            got = score_answers(model, [prompt], [[answer]], pad_id=PAD, entropy=True, shared_prefix=shared)
            # an answer's last token is not fed in by one route and fed in by the other: the same shapes, so the
            # same bfloat16 logits
            ids = torch.tensor([[*prompt, *(answer[:-1] if shared else answer)]])
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 :][: len(answer)]
        rows = [_log_softmax(row.tolist()) for row in logits]  # float64, in plain Python
        logp = math.fsum(row[token] for row, token in zip(rows, answer, strict=True))
        entropy = -math.fsum(math.exp(v) * v for row in rows for v in row)
        assert got.logps.dtype == got.entropy_sums.dtype == torch.float32
        # 41 terms of order 10 with roundings of 5e-7, in sums of order 200 with roundings of 8e-6
        assert got.logps.item() == pytest.approx(logp, abs=2e-4)
        assert got.entropy_sums.item() == pytest.approx(entropy, abs=2e-4)
        # the control: in bfloat16 they are off by more
        coarse = logits.log_softmax(dim=-1)
        assert abs(coarse.gather(-1, torch.tensor(answer)[:, None]).sum().item() - logp) > 0.01
        assert abs(-(coarse.exp() * coarse).sum().item() - entropy) > 0.01

    def test_features_are_float32(self, make_model):
        model = make_model("llama", dtype=torch.bfloat16)
        scores = score_answers(model, [tokens(4, 1)], [[[3, EOS]]], pad_id=PAD, features=True)
        assert scores.features.dtype == torch.float32


def peak_memory(run):
    """The most bytes that PyTorch had allocated at once while `run` ran, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


WIDTH = 2


@pytest.fixture(scope="module", params=[49_152, 151_936])
def wide(request, make_model):
    small = {"hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    small |= {"num_key_value_heads": 1, "max_position_embeddings": 512, "tie_word_embeddings": False}
    return make_model("llama", vocab=request.param, dtype=torch.float32, **small)


class TestMemory:
    CHUNK = 2**19  # numbers; smaller than the library's own, so that the test is quick

    def peak(self, model, *, entropy, backward):
        prompts, answers = (
            [tokens(5, 1), tokens(3, 2)],
            [[tokens(15, 3), tokens(20, 4)], [tokens(10, 5), tokens(16, 6)]],
        )

        def run():
            scores = score_answers(model, prompts, answers, pad_id=PAD, entropy=entropy, shared_prefix=True)
            if backward:
                (scores.logps.sum() + (scores.entropy_sums.sum() if entropy else 0)).backward()

        model.zero_grad()
        with torch.set_grad_enabled(backward):
            return peak_memory(run), sum(len(answer) for own in answers for answer in own)

    @pytest.mark.parametrize(
        ("entropy", "backward", "chunks"), [(False, False, 2), (True, False, 4), (False, True, 3), (True, True, 5)]
    )
    def test_the_peak_does_not_grow_with_the_vocabulary(self, wide, monkeypatch, entropy, backward, chunks):
        vocabulary = wide.config.vocab_size
        # gradients of the embedding and of the head, each beside what is added to it
        weights = 4 * (4 * vocabulary * WIDTH) if backward else 0
        rest = 2**18  # hidden states and attention of 69 tokens, of width 2: some KiB
        bound = chunks * 4 * self.CHUNK + weights + rest
        monkeypatch.setattr(lp, "_LOGITS_AT_ONCE", self.CHUNK)
        peak, n = self.peak(wide, entropy=entropy, backward=backward)
        assert peak < bound
        assert peak > 4 * self.CHUNK  # the measure sees the logits
        # the control: at once, they are all there
        monkeypatch.setattr(lp, "_LOGITS_AT_ONCE", n * vocabulary)
        peak, _ = self.peak(wide, entropy=entropy, backward=backward)
        assert peak > bound
        assert peak > chunks * 4 * n * vocabulary * 0.9


def wrapped(model, settings):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is to go
        return peft.get_peft_model(model, settings).eval()


@pytest.fixture
def adapted(make_model):
    """A model with a LoRA that does something, and its twin into whose weights that is merged."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")

    def build():
        torch.manual_seed(5)
        model = wrapped(make_model("llama"), settings)
        draw = torch.Generator().manual_seed(6)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data = 0.2 * torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
        return model.double()

    return build(), build().merge_and_unload()


class TestAdapters:
    def test_scores_are_those_of_the_merged_model(self, adapted, llama):
        model, merged = adapted
        prompts, answers = ragged(2)
        with torch.no_grad():
            got, exact, plain = (
                score_answers(m, prompts, answers, pad_id=PAD, entropy=True, shared_prefix=shared)
                for m, shared in ((model, True), (merged, False), (llama, False))
            )
            for name in ("logps", "entropy_sums"):
                torch.testing.assert_close(getattr(got, name), getattr(exact, name), **EXACT)
            with model.disable_adapter():
                off = score_answers(model, prompts, answers, pad_id=PAD)
            torch.testing.assert_close(off.logps, plain.logps, **EXACT)
        assert (exact.logps - plain.logps).abs().max() > 1  # the control: the adapter does something
        again = score_answers(model, prompts, answers, pad_id=PAD)
        torch.testing.assert_close(again.logps, exact.logps, **EXACT)

    def test_the_gradient_reaches_the_adapter_alone(self, adapted):
        model, _ = adapted
        prompts, answers = ragged(2)
        score_answers(model, prompts, answers, pad_id=PAD, shared_prefix=True).logps.sum().backward()
        moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
        assert moved == {name for name, _ in model.named_parameters() if "lora_" in name}

    def test_support_is_asked_once_for_a_model_and_its_adapter(self, adapted, monkeypatch):
        model, _ = adapted
        calls, own = [], trial._difference
        monkeypatch.setattr(trial, "_difference", lambda *args: calls.append(1) or own(*args))
        assert supports_shared_prefix(model)
        assert supports_shared_prefix(model.get_base_model())
        with model.disable_adapter():
            assert supports_shared_prefix(model)
        assert calls == [1]

    def test_samples_are_those_of_the_merged_model(self, adapted, llama):
        model, merged = adapted
        settings = {"max_new_tokens": 6, "eos_id": EOS, "pad_id": PAD, "seed": 0}
        drawn, exact, plain = (sample_answers(m, [[3, 4], [5]], 8, **settings) for m in (model, merged, llama))
        assert drawn == exact != plain
        with model.disable_adapter():
            assert sample_answers(model, [[3, 4], [5]], 8, **settings) == plain

    def test_prompt_tuning_is_refused(self, make_model):
        peft = pytest.importorskip("peft")
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = wrapped(make_model("llama", dtype=torch.float32), settings)
        with pytest.raises(ValueError, match=r"model: got a prompt-tuning adapter, .* expected one such as LoRA"):
            score_answers(model, [[3]], [[[4]]], pad_id=PAD)


def deaf(model, argument):
    """The same model with a body that does not hear `argument`, as a foreign architecture might not."""
    heard = model.base_model.forward

    def forward(*args, **kwargs):
        kwargs.pop(argument, None)
        if argument == "attention_mask":  # it makes a mask of its own; padding on the right needs none
            rows, length = (args[0] if args else kwargs["input_ids"]).shape
            kwargs[argument] = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, length, length)
        return heard(*args, **kwargs)

    model.base_model.forward = forward
    return model


class TestEvaluating:
    @pytest.mark.parametrize("training", [True, False])
    def test_the_mode_comes_back_whatever_happens(self, llama, training):
        try:
            llama.train(training)
            with pytest.raises(KeyboardInterrupt), evaluating(llama):
                assert not llama.training
                raise KeyboardInterrupt
            assert llama.training is training
        finally:
            llama.eval()


class TestSupportsSharedPrefix:
    @pytest.mark.parametrize("training", [True, False])
    def test_yes_and_the_mode_stays(self, make_model, kind, training, caplog):
        model = make_model(kind, dtype=torch.float32).train(training)
        assert supports_shared_prefix(model)
        assert model.training is training
        assert not caplog.records

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("argument", ["attention_mask", "position_ids"])
    def test_no_for_a_model_that_does_not_listen_which_is_still_scored_right(
        self, make_model, oracle, kind, argument, training, caplog
    ):
        model = deaf(make_model(kind), argument).train(training)
        assert not supports_shared_prefix(model)
        assert model.training is training
        said = [record.getMessage() for record in caplog.records if record.name == trial.__name__]
        assert len(said) == 1
        assert "cannot take shared-prefix batches" in said[0]
        model.eval()
        prompts, answers = ragged(2)
        with torch.no_grad():
            right = score_answers(model, prompts, answers, pad_id=PAD).logps
            wrong = score_answers(model, prompts, answers, pad_id=PAD, shared_prefix=True).logps
        exact = torch.tensor(
            [[sum(oracle(model, p, a)[0]) for a in own] for p, own in zip(prompts, answers, strict=True)],
            dtype=torch.float64,
        )
        torch.testing.assert_close(right, exact, **EXACT)
        assert (wrong - exact).abs().max() > 0.1  # the control: the trial was right to refuse
        assert len([record for record in caplog.records if record.name == trial.__name__]) == 1  # said once

    def test_no_for_a_freshly_made_model_whose_numbers_differ_little(self, make_model):
        model = make_model("llama", dtype=torch.float32, initializer_range=0.02)
        assert not supports_shared_prefix(deaf(model, "attention_mask"))

    def test_no_for_a_model_that_raises(self, make_model):
        model = make_model("llama").train()

        heard = model.base_model.forward

        def forward(*args, position_ids=None, **kwargs):
            if position_ids is not None:
                raise NotImplementedError("no positions here")
            return heard(*args, **kwargs)

        model.base_model.forward = forward
        assert not supports_shared_prefix(model)
        assert model.training

    def test_asked_once_and_again_for_longer_rows(self, make_model, monkeypatch):
        model, tried, own = make_model("llama"), [], trial._difference
        monkeypatch.setattr(
            trial, "_difference", lambda model, road, size: tried.append(size) or own(model, road, size)
        )
        for longest in (5, 20, 32, 33, 60):
            assert supports_shared_prefix(model, longest)
        assert [size.longest for size in tried] == [32, 64]
        assert supports_shared_prefix(make_model("llama", seed=1))
        assert len(tried) == 3

    def test_not_farther_than_the_context(self, make_model, kind):
        model = make_model(kind)
        assert supports_shared_prefix(model, 64, 200)
        with pytest.raises(ValueError, match=r"answers: got 65 tokens with the prompt in row 1, .* context, 64"):
            score_answers(model, [[3], tokens(40, 1)], [[[4]], [tokens(25, 2)]], pad_id=PAD)

    def test_no_for_a_model_that_is_no_language_model(self, make_model):
        def looks_ahead(model):
            heard = model.base_model.forward

            def forward(*args, **kwargs):
                out = heard(*args, **kwargs)
                out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(dim=1, keepdim=True)
                return out

            model.base_model.forward = forward
            return model

        for shared in (lambda m: supports_shared_prefix(m), lambda m: sample_answers(m, [[3]], 1, **SETTINGS)):
            with pytest.raises(ValueError, match="model: the predictions of LlamaForCausalLM change with the tokens"):
                shared(looks_ahead(make_model("llama")))

    def test_weights_that_are_no_numbers_give_scores_that_are_none(self, make_model):
        """Whoever reads them names the row, or the step of a training that broke."""
        model = make_model("llama")
        model.lm_head.weight.data[3, 3] = math.nan
        assert score_answers(model, [[3]], [[[4]]], pad_id=PAD).logps.isnan().all()

    def test_no_road_is_an_error_that_says_what_was_tried(self, make_model, monkeypatch):
        model = make_model("llama")
        monkeypatch.setattr(trial, "_error", lambda model, road, size, seed: 0.5)
        with pytest.raises(
            ValueError, match=r"scored correctly in no way .*packed rows.*off by 0\.5.*alone.*off by 0\.5"
        ):
            score_answers(model, [[3]], [[[4]]], pad_id=PAD)

    @pytest.mark.parametrize("token", [VOCAB, -1])
    def test_tokens_beyond_the_model_are_refused(self, llama, token):
        for prompts, answers, name in (
            ([[3], [token]], [[[4]], [[4]]], "prompts"),
            ([[3]] * 2, [[[4]], [[token]]], "answers"),
        ):
            with pytest.raises(ValueError, match=f"{name}: got token {token} in row 1, expected 0 to {VOCAB - 1}"):
                score_answers(llama, prompts, answers, pad_id=PAD)
        with pytest.raises(ValueError, match=f"prompts: got token {token} in row 0"):
            sample_answers(llama, [[token]], 1, **SETTINGS)


SETTINGS = {"max_new_tokens": 3, "eos_id": EOS, "pad_id": PAD, "seed": 0}


@pytest.fixture(params=[12, None])
def window(request):
    return request.param


class TestWindows:
    @pytest.fixture
    def mistral(self, window):
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=window,
            initializer_range=0.4,
            bos_token_id=None,
            eos_token_id=EOS,
        )
        return MistralForCausalLM(config).double().eval()

    def test_a_window_is_part_of_the_shared_mask_and_counts_positions(self, mistral, oracle):
        prompts, answers = [tokens(20, 1)], [[tokens(10, 2), tokens(14, 3)]]
        assert supports_shared_prefix(mistral, 34, 44)
        with torch.no_grad():
            shared = score_answers(mistral, prompts, answers, pad_id=PAD, shared_prefix=True).logps[0]
        exact = [math.fsum(oracle(mistral, prompts[0], answer)[0]) for answer in answers[0]]
        # Mistral's norm rounds to float32
        assert shared.tolist() == pytest.approx(exact, abs=1e-4)

    def test_a_window_that_counts_columns_is_found_by_length(self, make_model, window):
        """GPT-Neo's kind, under a name that no list has: the control has no window."""
        model = make_model("llama")
        if window is not None:
            for layer in model.model.layers:
                layer.self_attn.forward = _local(layer.self_attn.forward, window)
        assert supports_shared_prefix(model, 12, 12)
        assert supports_shared_prefix(model, 40, 60) is (window is None)
        prompts, answers = [tokens(20, 1)], [[tokens(10, 2), tokens(14, 3)]]
        with torch.no_grad():
            scores = score_answers(model, prompts, answers, pad_id=PAD).logps[0].tolist()
            plain = [model(torch.tensor([prompts[0] + a])).logits[0, 19:-1].log_softmax(-1) for a in answers[0]]
        exact = [p.gather(1, torch.tensor(a)[:, None]).sum().item() for p, a in zip(plain, answers[0], strict=True)]
        assert scores == pytest.approx(exact, abs=1e-10)


def _local(heard, window):
    """Attention that hides what stands more columns back than a window, whatever its mask says."""

    def forward(hidden_states, attention_mask=None, **kwargs):
        length = hidden_states.shape[1]
        near = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
        mask = near[None, None] if attention_mask is None else attention_mask & near
        # what sees nothing any more is padding; it sees itself
        return heard(hidden_states=hidden_states, attention_mask=mask | torch.eye(length, dtype=torch.bool), **kwargs)

    return forward


class TestImpossibleTokens:
    """Logits of −∞: their tokens have no part in the entropy, and no gradient is NaN."""

    @pytest.mark.parametrize("shared", [True, False])
    def test_entropies_are_finite(self, make_model, shared):
        model = make_model("llama")
        prompts, answers = [[3, 4], [5]], [[[6, 7, EOS], [8, EOS]], [[EOS], [6, 6, EOS]]]

        def hide(_, __, logits):
            return logits.index_fill(-1, torch.tensor([10, 11]), -math.inf)

        hook = model.lm_head.register_forward_hook(hide)
        scores = score_answers(model, prompts, answers, pad_id=PAD, entropy=True, shared_prefix=shared)
        (scores.logps.sum() + scores.entropy_sums.sum()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            for i, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
                for j, answer in enumerate(own):
                    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                    rows = [_log_softmax([v for v in row.tolist() if v > -math.inf]) for row in logits]
                    entropy = -math.fsum(math.exp(v) * v for row in rows for v in row)
                    assert scores.entropy_sums[i, j].item() == pytest.approx(entropy, abs=1e-10)
        with sampling(model, prompts, 3, **SETTINGS, scores=True) as sampler:
            assert sampler.draw(prompts)[1].entropy_sums.isfinite().all()
        hook.remove()


@pytest.fixture(scope="module")
def small(make_model, kind):
    """Four tokens, of which 0 ends an answer: 40 answers in all, at most three tokens long."""
    return make_model(kind, vocab=4, eos=0, seed=3, initializer_range=0.25, dtype=torch.float32)


class TestSampleAnswers:
    LIMIT = 3

    def draw(self, model, prompts, k, **changes):
        settings = {"max_new_tokens": self.LIMIT, "eos_id": 0, "pad_id": 0, "seed": 0, **changes}
        return sample_answers(model, prompts, k, **settings)

    def test_frequencies_are_the_models_probabilities(self, small, enumerate_answers):
        prompts, n = [[1, 2, 3, 1, 2], [3], [2, 2]], 4000  # left padding of 4 and 3 tokens
        drawn = self.draw(small, prompts, n)
        for prompt, answers in zip(prompts, drawn.answers, strict=True):
            exact = enumerate_answers(small, prompt, eos=0, limit=self.LIMIT)
            assert {tuple(answer) for answer in answers} <= set(exact)
            # seeded, so it passes or fails for good; by chance one draw in a thousand would fail
            assert self.fit(answers, exact) > 1e-3
            # the control: a temperature of 0.8 is seen
            total = sum(p**1.25 for p in exact.values())
            assert self.fit(answers, {answer: p**1.25 / total for answer, p in exact.items()}) < 1e-6

    @staticmethod
    def fit(answers, exact):
        """p-value of the chi-square test; answers that are expected less than 5 times are put together."""
        count = {answer: 0 for answer in exact}
        for answer in answers:
            count[tuple(answer)] += 1
        often = [answer for answer, p in exact.items() if p * len(answers) >= 5]
        observed = [count[answer] for answer in often]
        expected = [exact[answer] * len(answers) for answer in often]
        rest = len(answers) - sum(expected)
        if rest > 1e-6 * len(answers):
            observed.append(len(answers) - sum(observed))
            expected.append(rest)
        return chisquare(observed, expected, sum_check=False).pvalue

    def test_a_prompt_is_computed_once_and_the_draws_are_those_of_generate(self, make_model, kind):
        """generate() by itself repeats each prompt before it computes it; with one seed both draw the same."""
        model, prompts, k = make_model(kind, vocab=50), [[3], [4, 2], [5, 6, 7, 8, 9]], 6
        width, fed = max(map(len, prompts)), []
        sample_answers(model, prompts, k, max_new_tokens=7, eos_id=49, pad_id=PAD, seed=0)  # its trial is not counted
        hook = model.get_input_embeddings().register_forward_hook(lambda _, args, __: fed.append(args[0].numel()))
        torch.manual_seed(11)
        expected = model.generate(
            torch.tensor([[PAD] * (width - len(p)) + p for p in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
            do_sample=True, top_k=0, max_new_tokens=7, num_return_sequences=k, pad_token_id=PAD, eos_token_id=49,
        )[:, width:].tolist()  # fmt: skip
        alone, steps = sum(fed), len(fed)
        fed.clear()
        drawn = sample_answers(model, prompts, k, max_new_tokens=7, eos_id=49, pad_id=PAD, seed=11)
        hook.remove()
        flat = [answer for own in drawn.answers for answer in own]
        assert flat == [(row[: row.index(49) + 1] if 49 in row else row) for row in expected]
        assert len({tuple(answer) for answer in flat}) > k  # or equal draws would say little
        assert alone == len(prompts) * k * (width + steps - 1)
        assert fed[0] == len(prompts) * (width - 1)
        assert sum(fed[1:]) == len(prompts) * k * steps

    def test_the_models_own_generation_settings_are_not_used_and_stay(self, make_model, kind):
        model = make_model(kind, vocab=4, eos=0, seed=3, initializer_range=0.25)
        before = self.draw(model, [[1, 2], [3]], 50)
        own = model.generation_config
        own.temperature, own.top_k, own.do_sample, own.repetition_penalty = 0.1, 1, True, 5.0
        assert self.draw(model, [[1, 2], [3]], 50) == before
        assert model.generation_config is own
        assert (own.temperature, own.top_k) == (0.1, 1)
        # the control: these settings do make a difference to generate()
        greedy = model.generate(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2), max_new_tokens=3)
        assert len({tuple(answer) for answer in before.answers[0]}) > 5
        assert torch.equal(
            greedy, model.generate(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2), max_new_tokens=3)
        )

    def test_the_callers_random_state_is_left_alone_and_draws_repeat(self, small):
        torch.manual_seed(7)
        state = torch.random.get_rng_state()
        first = self.draw(small, [[1, 2], [3]], 20)
        assert torch.equal(state, torch.random.get_rng_state())
        torch.rand(5)
        assert self.draw(small, [[1, 2], [3]], 20) == first
        assert self.draw(small, [[1, 2], [3]], 20, seed=1) != first

    def test_an_answer_stops_at_its_end_and_cut_ones_are_counted(self, small):
        drawn = self.draw(small, [[1, 2], [3]], 200)
        for answers, truncated in zip(drawn.answers, drawn.truncated, strict=True):
            assert len(answers) == 200
            cut = [answer for answer in answers if answer[-1] != 0]
            assert 0 < len(cut) == truncated < 200
            assert {len(answer) for answer in cut} == {self.LIMIT}
            assert all(0 not in answer[:-1] for answer in answers)

    def test_answers_come_back_in_the_order_of_the_prompts(self, make_model, kind):
        model = make_model(kind)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1e4)  # one token takes all: the answer is known
        prompts = [tokens(n, n) for n in (5, 2, 7, 1, 4)]
        drawn = sample_answers(model, prompts, 2, max_new_tokens=4, eos_id=EOS, pad_id=PAD, seed=0, batch_size=2)
        expected = []
        for prompt in prompts:
            row = list(prompt)
            while len(row) < len(prompt) + 4 and EOS not in row[len(prompt) :]:
                row.append(model(torch.tensor([row])).logits[0, -1].argmax().item())
            expected.append([row[len(prompt) :]] * 2)
        assert drawn.answers == expected
        assert len({tuple(own[0]) for own in expected}) > 1  # or the order could not be seen

    @pytest.mark.parametrize("training", [True, False])
    def test_the_mode_stays_and_dropout_does_not_act(self, make_model, training):
        model = make_model("gpt2", vocab=4, eos=0, seed=3)  # dropout 0.1
        expected = self.draw(model, [[1, 2]], 50)
        assert self.draw(model.train(training), [[1, 2]], 50) == expected
        assert model.training is training

    def test_transformers_has_nothing_to_warn_about(self, small, caplog):
        transformers_logger = logging.getLogger("transformers")
        transformers_logger.addHandler(caplog.handler)  # it does not propagate
        try:
            self.draw(small, [[1, 2], [3]], 2)
        finally:
            transformers_logger.removeHandler(caplog.handler)
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []

    @pytest.mark.parametrize(
        ("prompts", "k", "limit", "message"),
        [
            ([[1]], 0, 3, "k: got 0, expected at least 1"),
            ([], 1, 3, "prompts: got none, or an empty one"),
            ([[1], []], 1, 3, "prompts: got none, or an empty one"),
            ([[1], [1] * 62], 1, 3, "max_new_tokens: got 3, but a prompt has 62 tokens and the context 64"),
        ],
    )
    def test_refused(self, small, prompts, k, limit, message):
        with pytest.raises(ValueError, match=message):
            self.draw(small, prompts, k, max_new_tokens=limit)

    def test_a_prompt_that_just_fits(self, small):
        assert len(self.draw(small, [[1] * 61], 1).answers[0][0]) <= 3

    def test_batch_by_batch_is_one_stream(self, small):
        prompts = [[1, 2], [3], [2]]
        settings = {"max_new_tokens": self.LIMIT, "eos_id": 0, "pad_id": 0, "seed": 0}
        with sampling(small, prompts, 20, **settings) as sampler:
            first, _ = sampler.draw([[3], [2]])
            state = sampler.generator.get_state()
            second, _ = sampler.draw([[1, 2]])
        whole = self.draw(small, prompts, 20, batch_size=2)
        assert [*second, *first] == whole.answers
        with sampling(small, prompts, 20, **{**settings, "seed": 1}) as sampler:
            sampler.generator.set_state(state)
            assert sampler.draw([[1, 2]]) == (second, None)
            assert sampler.draw([[1, 2]])[0] != second  # the control: the stream goes on

    @pytest.mark.parametrize("k", [1, 5])
    def test_scores_read_where_they_are_drawn_are_those_of_a_second_pass(self, make_model, kind, k):
        model, prompts = make_model(kind, vocab=6, eos=EOS), 4 * [[3], [4, 5], [3, 4, 5, 1, 3]]
        settings = {"max_new_tokens": 12, "eos_id": EOS, "pad_id": PAD}
        with sampling(model, prompts, k, **settings, seed=1, scores=True) as sampler:
            batches = [([some, *sampler.draw(some)]) for some in (prompts, prompts[:2])]
        lengths = {len(answer) for _, answers, _ in batches for own in answers for answer in own}
        assert len(lengths) > 2 and 12 in lengths  # some end, at different places, and some are cut
        for some, answers, read in batches:
            again = score_answers(model, some, answers, pad_id=PAD, entropy=True, shared_prefix=False)
            assert torch.equal(read.lengths, again.lengths)
            for name in ("logps", "entropy_sums", "first_entropies"):
                assert getattr(read, name).dtype == torch.float64
                # generate() hands logits on in float32: 1e-6 of order 10, at most 12 of them
                torch.testing.assert_close(
                    getattr(read, name), getattr(again, name), rtol=0, atol=3e-5, check_dtype=False
                )
        with sampling(model, prompts, k, **settings, seed=1) as sampler:
            assert sampler.draw(prompts) == (batches[0][1], None)  # reading changes no draw

    def test_interrupted_everything_is_put_back(self, small):
        torch.manual_seed(7)
        state, own = torch.random.get_rng_state(), small.generation_config
        settings = {"max_new_tokens": self.LIMIT, "eos_id": 0, "pad_id": 0, "seed": 0}
        with pytest.raises(KeyboardInterrupt), sampling(small, [[3]], 2, **settings) as sampler:
            sampler.draw([[3]])
            raise KeyboardInterrupt
        assert torch.equal(state, torch.random.get_rng_state())
        assert small.generation_config is own
        assert torch.is_grad_enabled()


def test_by_length_puts_like_beside_like_and_keeps_the_order_of_equals():
    assert by_length([3, 1, 2, 1, 3], 2) == [[1, 3], [2, 0], [4]]


def test_context_length(make_model, kind):
    assert context_length(make_model(kind)) == 64
