"""Precisions against float32, weights in 4 bits against their dequantised twin, and what is refused."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from helpers.launch import flat
from helpers.worlds import SMALL, network, run, small_model, small_pairs

from dpoviz.cli import main
from dpoviz.data import tasks
from dpoviz.experiments.config import RealConfig
from dpoviz.experiments.memory_estimate import estimate_memory
from dpoviz.experiments.real import load, run_real, score
from dpoviz.learn.run import load_run
from dpoviz.lm import models, processes
from dpoviz.lm.models import add_lora, load_lm, lora_targets
from dpoviz.lm.processes import computing_in, in_its_precision, mixed_precision
from dpoviz.lm.scoring import score_answers
from dpoviz.training.config import TrainConfig, TrainSettings

PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 4]]
ANSWERS = [[[5, 6, 2], [7, 2]], [[8, 2], [9, 4, 5, 2]]]
BFLOAT16 = 0.05
"""Relative error that is allowed, as in test_gpu: bfloat16 has two or three digits."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder and a file of pairs."""
    folder = tmp_path_factory.mktemp("precision")
    demonstrations = tasks.corpus(200, 0)
    tokenizer = models.tiny_tokenizer([prompt + answer for prompt, answer in demonstrations], 400)
    model = models.tiny_lm(tokenizer, hidden_size=64, layers=2, heads=2, max_length=160)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "pairs.jsonl").open("w") as file:
        for task in tasks.TASKS:
            for i, problem in enumerate(tasks.sample_problems(task, 6, 1)):
                record = {"prompt": problem.prompt, "chosen": f"yes, {i} please", "rejected": "x", "task": task}
                file.write(json.dumps(record) + "\n")
    return folder


def settings(folder, **more):
    training = TrainSettings(batch_size=4, stage1_steps=1, stage2_steps=2, max_new_tokens=6, warmup_steps=1,
                             policy_learning_rate=1e-2, probe_every=0, checkpoint_every=5)  # fmt: skip
    given = {"lora_rank": 2, "entropy_samples": 2, "max_length": 96, "answers": 0, **more}
    return RealConfig(data=(str(folder / "pairs.jsonl"),), model=str(folder / "model"), training=training, **given)


class TestBFloat16:
    def test_scores_are_those_of_float32_but_for_rounding(self):
        model, found = small_model(), {}
        for precision in ("auto", "float32", "bfloat16"):
            with computing_in(precision), torch.no_grad():
                found[precision] = score_answers(model, PROMPTS, ANSWERS, pad_id=0, entropy=True)
        assert torch.equal(found["auto"].logps, found["float32"].logps)
        for name in ("logps", "entropy_sums"):
            own, expected = (getattr(found[precision], name) for precision in ("bfloat16", "float32"))
            assert own.dtype == torch.float32
            assert 1e-5 < (own - expected).norm() / expected.norm() < BFLOAT16  # it was rounded, and no more than that

    def test_training_is_that_of_float32_but_for_rounding(self):
        model = small_model()
        world = model, small_pairs(model), None
        config = TrainConfig.around(0.1, "standard", **SMALL)
        _, expected = run(world, config, network())
        with computing_in("bfloat16"):
            policy, history = run(world, config, network())
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        assert abs(history["margin"][0]) < 1e-6  # the reference is scored in the same batch: h is 0 at the start
        off = (history["loss/dpo"] - expected["loss/dpo"]).abs().max()
        moved = (expected["loss/dpo"] - expected["loss/dpo"][0]).abs().max()
        assert 0 < off < BFLOAT16 * moved

    @pytest.mark.parametrize(("rank", "precision", "stored"), [
        (2, "bfloat16", torch.bfloat16), (2, "float32", torch.float32), (0, "bfloat16", torch.float32)])  # fmt: skip
    def test_frozen_weights_are_stored_in_it_and_trained_ones_in_float32(self, folder, rank, precision, stored):
        model = load(settings(folder, lora_rank=rank, precision=precision)).model
        assert model.dtype == stored
        if rank:
            pytest.importorskip("peft")
            policy = add_lora(model, rank=rank)
            assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}

    def test_it_ends_with_its_context(self):
        assert mixed_precision() == "no"
        with computing_in("bfloat16"):
            assert mixed_precision() == "bf16"
            with computing_in("auto"):
                assert mixed_precision() == "bf16"
            with computing_in("float32"):
                assert mixed_precision() == "no"
            assert mixed_precision() == "bf16"
        assert mixed_precision() == "no"
        assert in_its_precision(lambda config: mixed_precision())(RealConfig(precision="bfloat16")) == "bf16"

    def test_float32_against_the_launcher_is_refused(self, monkeypatch):
        monkeypatch.setattr(processes, "is_initialized", lambda: False)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        with pytest.raises(ValueError, match="precision: got float32 under --mixed_precision bf16"):
            with computing_in("float32"):
                pass


class TestRefused:
    def test_float16_with_its_reason(self, capsys):
        assert main(["train", "--data", "x", "--precision", "float16"]) == 2
        assert "precision: got 'float16', expected auto, float32 or bfloat16: float16 needs the loss scaled" in flat(
            capsys.readouterr().err
        )
        with pytest.raises(ValueError, match=r"precision: got 'int8', expected auto, float32 or bfloat16$"):
            RealConfig(precision="int8")

    def test_four_bits_without_adapters_or_of_random_weights(self):
        with pytest.raises(ValueError, match="four_bit: got true with lora_rank 0, expected adapters"):
            RealConfig(four_bit=True, lora_rank=0)
        with pytest.raises(ValueError, match="four_bit: got true with the model random:tiny"):
            RealConfig(four_bit=True, model="random:tiny")

    def test_four_bits_of_what_cannot_have_them_before_it_is_loaded(self, tmp_path):
        with pytest.raises(ValueError, match=r"four_bit: got the GGUF file of .*a\.gguf, expected a folder"):
            load_lm(tmp_path / "a.gguf", four_bit=True)
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match="four_bit: got the adapter in"):
            load_lm(tmp_path, four_bit=True)

    def test_four_bits_without_the_package(self, folder, monkeypatch, capsys):
        kept = models.importlib.util.find_spec
        absent = "bitsandbytes"
        monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == absent else kept(name))
        words = ["--data", str(folder / "pairs.jsonl"), "--model", str(folder / "model"), "--out", str(folder / "out")]
        assert main(["train", *words, "--four-bit"]) == 2
        error = capsys.readouterr().err
        assert flat(error).endswith("four_bit: needs the package bitsandbytes: pip install bitsandbytes")
        assert not (folder / "out").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
class TestFourBits:
    """Where bitsandbytes is installed."""

    @pytest.fixture(autouse=True)
    def packages(self):
        pytest.importorskip("peft")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pytest.importorskip("bitsandbytes")

    def test_adapters_learn_on_them_as_on_the_dequantised_weights(self, folder, packages):
        model = load_lm(folder / "model", dtype=torch.float32, four_bit=True).model
        twin = load_lm(folder / "model", dtype=torch.float32).model.to(model.device)
        assert len(lora_targets(model)) == 14 and lora_targets(model) == lora_targets(twin)
        for name in lora_targets(model):
            own = model.get_submodule(name).weight
            whole = packages.functional.dequantize_4bit(own.data, own.quant_state)
            assert not torch.equal(twin.get_submodule(name).weight, whole)  # the control: they were rounded
            twin.get_submodule(name).weight.data = whole
        found = []
        for own in (model, twin):
            policy = add_lora(own, rank=2)
            draw = torch.Generator().manual_seed(0)
            for name, p in policy.named_parameters():
                if "lora_B" in name:
                    p.data = 0.1 * torch.randn(p.shape, generator=draw).to(p.device)
            logps = score_answers(policy, PROMPTS, ANSWERS, pad_id=0).logps
            logps.sum().backward()
            found.append(
                (logps.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad]))
            )
        (logps, gradient), (expected, right) = found
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)
        assert (gradient - right).norm() / right.norm() < 1e-4 and right.norm() > 1

    @pytest.mark.slow
    def test_a_run_on_them_and_its_reference_afterwards(self, folder, tmp_path):
        config = settings(folder, four_bit=True)
        loaded = load(config)
        less, whole = (estimate_memory(own, load(own)).weights for own in (config, replace(config, four_bit=False)))
        assert less < 0.6 * whole
        results = run_real(config, score(config, loaded, cache_dir=tmp_path / "cache"), out=tmp_path / "run")
        first = results.history[results.history["step"] == 0]
        assert (first["margin"].abs() < 1e-5).all() and (results.scores["h"].abs() > 1e-3).any()
        found = load_run(tmp_path / "run")
        assert found.metadata["reference"]["four_bit"] is True
        prompt = found.table["prompt"][0]
        expected = found.table[(found.table["form"] == "standard") & (found.table["prompt"] == prompt)]["beta"]
        assert found.beta(prompt, form="standard") == pytest.approx(float(expected.iloc[0]), rel=1e-4)
