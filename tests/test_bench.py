"""The benchmark compares the same work: the contestants' losses agree, and what it counts is what there is.

No time is tested.
"""

from functools import partial

import pandas as pd
import pytest
import torch
from datasets import Dataset

from dpoviz.experiments.bench import (
    ALONE,
    COMPILED,
    INSIDE,
    LEARNED,
    OURS,
    PEER,
    PLAIN,
    bench,
    bench_lengths,
    bench_pairs,
    bench_sampling,
    bench_shared_prompts,
    bench_steps,
    bench_vocabulary,
    forward_operations,
    matrix_rate,
)
from dpoviz.lm.reference import reference_pass
from dpoviz.lm.scoring import score_answers
from dpoviz.losses import dpo_loss

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
TASKS = ("math", "code")


@pytest.fixture
def world(make_model, tokenizer):
    model = make_model(dtype=torch.float32, bos_token_id=1)
    words = [word for word in sorted(tokenizer.get_vocab()) if not word.startswith("<")]
    rows = []
    for i in range(12):
        parts = [words[(i * 7 + j * 3) % len(words)] for j in range(12)]
        answers = {"chosen": " " + " ".join(parts[6:9]), "rejected": " " + " ".join(parts[8 : 10 + i % 2])}
        rows.append({"prompt": " ".join(parts[: 3 + i % 3]), **answers, "task": TASKS[i % 2], "group": None})
    scored = reference_pass(model, tokenizer, Dataset.from_list(rows), max_length=32, max_new_tokens=4,
                            entropy_samples=2, progress=False)  # fmt: skip
    # entropies far enough apart for the entropy term to show in the loss
    scored = scored.map(lambda row, i: {"ref_entropy": 0.25 * (1 + i % 5)}, with_indices=True)
    return model, tokenizer, scored


@pytest.mark.slow
def test_everybody_does_the_same_work(world):
    pytest.importorskip("trl")
    model, tokenizer, scored = world
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = bench_steps(model, tokenizer, scored, batch_size=3, repeats=2, max_length=32, progress=False)
    assert list(found["who"]) == [PEER, INSIDE, PLAIN, OURS, LEARNED, ALONE] * 2
    for _, rows in found.groupby("task"):
        loss = rows.set_index("who")["loss"]
        # the policy is the reference: h = 0, whatever beta is
        assert loss[[PEER, INSIDE, PLAIN, OURS]].tolist() == pytest.approx([0.6931472] * 4, abs=1e-5)
        # what the four terms add, at the same network; its running means have moved a little
        assert loss[ALONE] == pytest.approx(loss[LEARNED], abs=1e-5) and loss[LEARNED] > loss[OURS] + 1e-4
    assert (found["low"] <= found["seconds"]).all() and (found["seconds"] <= found["high"]).all()
    assert (found["ratio"][found["who"] == PEER] == 1).all()
    assert found[found["who"] == ALONE][["ratio", "operations", "pairs_per_second"]].isna().all(axis=None)
    assert (found["over_fixed"][found["who"] == OURS] == 1).all() and (found["over_fixed"] > 0).all()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    # the tokens that one pass over each pair computes
    own = scored.filter(lambda row: row["task"] == "math").shuffle(seed=0).select(range(3))[:]
    assert len(set(map(tuple, own["prompt_ids"]))) == 3
    count = sum(len(p) for p in own["prompt_ids"]) + sum(
        len(a) - 1 for name in ("chosen_ids", "rejected_ids") for a in own[name]
    )
    assert found[found["task"] == "math"]["tokens"].eq(count).all()


@pytest.mark.slow
def test_in_half_precision(world):
    pytest.importorskip("trl")
    model, tokenizer, scored = world
    model.to(torch.bfloat16)
    found = bench_steps(model, tokenizer, scored, batch_size=3, repeats=1, max_length=32, progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # the reference was scored in float32: h is the rounding of about 10 tokens' logits, times a beta of 0.1
    assert found[~found["who"].isin([LEARNED, ALONE])]["loss"].tolist() == pytest.approx([0.6931472] * 8, abs=0.02)


@pytest.mark.slow
def test_other_work_is_refused(world, monkeypatch):
    import dpoviz.experiments.bench as module

    def slipped(*args, **more):
        found = dpo_loss(*args, **more)
        return found._replace(losses=found.losses + (0.01 if len(calls) % 2 else 0.0))

    calls = []
    monkeypatch.setattr(module, "dpo_loss", lambda *args, **more: calls.append(0) or slipped(*args, **more))
    model, tokenizer, scored = world
    with pytest.raises(FloatingPointError, match="the losses differ"):
        bench_steps(model, tokenizer, scored, batch_size=3, repeats=1, max_length=32, progress=False)


@pytest.mark.slow
def test_a_peer_that_scores_other_tokens_is_refused(world):
    pytest.importorskip("trl")
    model, tokenizer, scored = world
    longest = max(len(p) + len(a) for p, a in zip(scored["prompt_ids"], scored["chosen_ids"], strict=True))
    with pytest.raises(FloatingPointError, match="the losses differ"):
        bench_steps(model, tokenizer, scored, batch_size=3, repeats=1, max_length=longest - 2, progress=False)


@pytest.mark.slow
def test_all_of_it(world, monkeypatch):
    import dpoviz.experiments.bench as module

    monkeypatch.setattr(module, "bench_pairs", partial(bench_pairs, (20, 40)))
    monkeypatch.setattr(module, "bench_vocabulary", partial(bench_vocabulary, (500, 900)))
    found = dict(bench(*world, batch_size=3, repeats=1, max_length=32, samples=2, new_tokens=4, progress=False))
    of_model = ["steps", "reference", "sampling", "lengths", "shared prompts"]
    assert list(found) == ["steps", "profile", *of_model[1:], "pairs", "vocabulary"]
    profiled = found["profile"].set_index("who")
    assert list(profiled.index) == list(dict.fromkeys(found["steps"]["who"]))
    parts = profiled[["matrix", "attention", "optimizer", "other"]]
    assert (parts >= 0).all(axis=None) and parts.sum(axis=1).to_numpy() == pytest.approx(1)
    assert profiled["top"].str.fullmatch(r"(\S.* \d+%, ){2}\S.* \d+%").all()
    assert (parts.loc[OURS] > 0).all() and parts.loc[ALONE, "attention"] == 0  # no model runs there
    assert (profiled[["gpu", "copies", "gpu_share", "kernels"]].max() > 0).all() == torch.cuda.is_available()
    assert all(isinstance(table, pd.DataFrame) and len(table) for table in found.values())
    for name in of_model:
        shares = found[name][found[name]["who"] != ALONE if name == "steps" else slice(None)]["share_of_matrix_rate"]
        assert ((shares > 0) & (shares < 1)).all(), name
    assert found["pairs"]["pairs"].tolist() == [20, 40]


@pytest.mark.slow
def test_sampling_from_a_cache_of_fixed_size_too(world):
    model, tokenizer, scored = world
    prompts = scored["prompt_ids"][:3]
    found = bench_sampling(
        model, tokenizer, prompts, samples=2, new_tokens=4, repeats=1, at_once=(2,), compiled=True, progress=False
    )
    assert found["who"].tolist() == [who + end for end in ("", COMPILED)
                                     for who in ("generate alone", "answers and entropies")]  # fmt: skip
    assert (found["tokens_per_second"] > 0).all() and found["ratio"].min() > 0


@pytest.mark.slow
def test_batches_that_grow_and_that_share_prompts(make_model, monkeypatch):
    import dpoviz.experiments.bench as module

    model, laid_out = make_model(dtype=torch.float32), []

    def seen(*args, **more):
        laid_out.append(module.prefix_batch(*args[1:], more["pad_id"]))
        return score_answers(*args, **more)

    monkeypatch.setattr(module, "score_answers", seen)
    lengths, shared = (
        call(model, 0, repeats=1, longest=40, progress=False)  # the context has 64
        for call in (bench_lengths, bench_shared_prompts)
    )
    assert lengths["length"].tolist() == [4, 8, 16, 32]
    # two prompts, and four answers whose last token is not fed in
    assert lengths["tokens"].tolist() == [2 * n + 4 * (n - 1) for n in (4, 8, 16, 32)]
    assert shared["prompts"].tolist() == [8, 4, 2, 1]
    assert shared["tokens"].tolist() == [n * 16 + 16 * 3 for n in (8, 4, 2, 1)]
    assert shared["ratio"][0] == 1
    # as many are there: no others than those of the padding
    counts = {int((batch.segments >= 0).sum()) for batch in laid_out}
    assert counts == {*lengths["tokens"], *shared["tokens"]}
    assert all(p.grad is None for p in model.parameters())


def test_operations_by_hand(make_model):
    """One layer, counted from the sizes of its matrices."""
    model = make_model(vocab=30, num_hidden_layers=1, dtype=torch.float32)
    # hidden 32, keys and values 16 wide, the gated layer 48: q, o, k, v, gate, up, down
    linear = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    fed, predicted = 3 + 1 + 0, 2 + 1
    seen = (1 + 2 + 3) + 4  # a prompt token sees itself and what is before; the one answer token fed in sees four
    forward = 2 * linear * fed + 2 * 30 * 32 * predicted + 4 * 32 * seen
    assert forward_operations(model, [[1, 2, 3]], [[[4, 5], [6]]]) == forward
    # what two pairs share is needed once
    assert forward_operations(model, [[1, 2, 3]] * 2, [[[4, 5], [6]], [[6], [4, 5]]]) == forward
    assert forward_operations(model, [[1, 2, 3]] * 2, [[[4, 5], [6]], [[7], [4, 5]]]) == forward + 2 * 30 * 32


def test_matrix_rate_is_a_rate():
    assert 1e8 < matrix_rate(torch.device("cpu"), torch.float32, size=256, repeats=1) < 1e15
