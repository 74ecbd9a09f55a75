"""Two processes do what one does, and what they leave one can go on from."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from helpers.launch import SCRIPTS, command, finish
from helpers.worlds import SMALL, network, run, small_model, small_pairs

from dpoviz.training.config import TrainConfig


def launch(processes, result, out="", stop=0, **environment):
    printed = finish(command(processes, SCRIPTS / "train_small.py", result, out, stop), **environment)
    assert printed.count(f"one of {processes}") == processes
    if stop:
        return None, None
    history = pd.DataFrame(json.loads(result.read_text()))
    return history, torch.load(result.with_suffix(".pt"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(1, tmp_path_factory.mktemp("one") / "history.json")


def equal(found, expected):
    history, weights = found
    assert list(history.columns) == list(expected[0].columns)
    for name in history.columns:
        if name != "form":
            # float32 sums in another order; a KL is a mean of differences of sums of a few nats
            np.testing.assert_allclose(history[name], expected[0][name], rtol=1e-5, atol=1e-5, err_msg=name)
    for part, tensors in weights.items():
        for name, tensor in tensors.items():
            # Adam makes much of the rounding of small gradients: a hundredth of one step of the learning rate
            torch.testing.assert_close(
                tensor,
                expected[1][part][name],
                rtol=1e-4,
                atol=1e-5,
                msg=lambda said, where=f"{part} {name}": f"{where}: {said}",
            )


@pytest.mark.slow
def test_two_processes_train_what_one_does(one, tmp_path):
    assert one[0]["beta/math"].iloc[-1] != one[0]["beta/math"].iloc[0]  # beta moved
    equal(launch(2, tmp_path / "history.json"), one)


@pytest.mark.slow
def test_one_goes_on_from_what_two_left(one, tmp_path):
    launch(2, tmp_path / "history.json", out=tmp_path / "run", stop=3)
    assert json.loads((tmp_path / "run" / "checkpoint-3" / "run.json").read_text())["step"] == 3
    equal(launch(1, tmp_path / "history.json", out=tmp_path / "run"), one)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_by_accelerate_it_trains_the_same(one, tmp_path):
    compiler = {f"ACCELERATE_DYNAMO_USE_{name}": "true" for name in ("REGIONAL_COMPILATION", "DYNAMIC")}
    compiler |= {"ACCELERATE_DYNAMO_BACKEND": "inductor", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    equal(launch(1, tmp_path / "history.json", out=tmp_path / "run", **compiler), one)
    assert list((tmp_path / "compiled").glob("**/*.so"))  # it was
    # a checkpoint does not ask how its weights were trained
    equal(launch(1, tmp_path / "again.json", out=tmp_path / "run"), one)


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_every_rule(tmp_path):
    found = {}
    for n in (1, 2):
        printed = finish(command(n, SCRIPTS / "train_rules.py", tmp_path / f"{n}.json"))
        assert printed.count(f"one of {n}") == n
        found[n] = json.loads((tmp_path / f"{n}.json").read_text())
    assert len(found[1]) == len(found[2]) > 12
    for name, one in found[1].items():
        np.testing.assert_allclose(found[2][name]["loss"], one["loss"], rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(found[2][name]["weights"], one["weights"], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """By number of processes: the columns of a reference pass and h of its pairs; and the caches."""
    place = tmp_path_factory.mktemp("shared")
    for n in (1, 2):
        printed = finish(command(n, SCRIPTS / "shared_work.py", place / f"{n}.json", place / f"cache{n}"))
        assert printed.count(f"one of {n}") == n
    return {n: json.loads((place / f"{n}.json").read_text()) for n in (1, 2)}, place


@pytest.mark.slow
class TestSharedWork:
    """The reference's pass: what two processes gather is in the order of one."""

    def test_what_is_not_sampled_is_equal(self, shared):
        one, two = shared[0][1], shared[0][2]
        assert one["prompt"] == two["prompt"]
        for name in ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_entropy", "ref_features", "ratios"):
            np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.ptp(np.array(one["ratios"]), axis=0).min() > 0.01  # an order mixed up would be seen
        np.testing.assert_allclose(two["ref_entropy_first_token"], one["ref_entropy_first_token"], rtol=1e-5)

    def test_so_is_what_is_sampled_for_the_entropy(self, shared):
        """The same batches of prompts, each by a seed of its own: the same numbers to the last bit."""
        one, two = shared[0][1], shared[0][2]
        for name in ("ref_entropy", "ref_entropy_se", "ref_entropy_monte_carlo", "ref_entropy_truncated"):
            assert two[name] == one[name], name
        assert shared[0][1]["again"] == shared[0][2]["again"]

    def test_processes_draw_by_seeds_of_their_own(self, shared):
        """One prompt again and again: with one seed, the second process would draw what the first does."""
        first, second = shared[0][2]["again"][:2], shared[0][2]["again"][2:]  # a batch each
        assert not set(first) & set(second)

    def test_the_cache_of_two_serves_one(self, shared):
        found, place = shared
        finish(command(1, SCRIPTS / "shared_work.py", place / "again.json", place / "cache2"))
        assert json.loads((place / "again.json").read_text())["ref_entropy"] == found[2]["ref_entropy"]


def test_float16_is_refused(monkeypatch):
    """accelerate scales one loss for each optimizer, and here there are two."""
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    reference = small_model()
    world = reference, small_pairs(reference), small_pairs(reference, n=9, seed=1)
    with pytest.raises(ValueError, match="mixed_precision: got 'fp16', expected bf16 or no"):
        run(world, TrainConfig.around(0.1, "inverse", **SMALL), network())


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_policy_in_pieces_is_refused(monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    reference = small_model()
    world = reference, small_pairs(reference), small_pairs(reference, n=9, seed=1)
    message = rf"processes: got '?{kind}'?, expected data parallelism; dpoviz\.trl\.BetaDPOTrainer trains"
    with pytest.raises(ValueError, match=message):
        run(world, TrainConfig.around(0.1, "inverse", **SMALL), network())
