"""What is read is what was written; what was damaged is noticed; a name changes with all that it stands for."""

import logging
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from dpoviz.lm import cache as module
from dpoviz.lm.cache import Journal, fingerprint

BATCH = {"prompts": np.array(["one", "two"]), "numbers": np.array([[0.1, -np.pi], [1e-300, np.inf]])}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "journal"


class TestJournal:
    def test_reads_what_was_written_bit_by_bit_in_the_order_of_names(self, folder):
        journal = Journal(folder)
        assert journal.read() == {}
        assert not folder.exists()
        journal.add("b", BATCH)
        journal.add("a", {"state": np.arange(5, dtype=np.uint8)})
        found = Journal(folder).read()
        assert list(found) == ["a", "b"]
        for name, array in BATCH.items():
            assert found["b"][name].dtype == array.dtype
            assert found["b"][name].tobytes() == array.tobytes()
        assert found["a"]["state"].dtype == np.uint8

    def test_a_second_batch_of_one_name_replaces_the_first(self, folder):
        journal = Journal(folder)
        for value in (1, 2):
            journal.add("a", {"x": np.array(value)})
        assert journal.read()["a"]["x"] == 2

    def test_without_a_folder_nothing_is_kept(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        journal = Journal(None)
        journal.add("a", BATCH)
        assert journal.read() == {}
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[:-30],
            lambda data: data[: len(data) // 2],
            lambda data: b"no archive",
            # one bit of a number
            lambda data: data.replace(BATCH["numbers"].tobytes(), BATCH["numbers"].view("u8").__xor__(1).tobytes()),
        ],
        ids=["emptied", "cut", "halved", "overwritten", "a bit"],
    )
    def test_a_damaged_batch_is_left_out_with_a_warning(self, folder, damage, caplog):
        journal = Journal(folder)
        journal.add("a", BATCH)
        journal.add("b", BATCH)
        file = folder / "a.npz"
        assert damage(file.read_bytes()) != file.read_bytes()
        file.write_bytes(damage(file.read_bytes()))
        with caplog.at_level(logging.WARNING, logger=module.__name__):
            assert list(journal.read()) == ["b"]
        assert "a.npz cannot be read" in caplog.text
        assert "b.npz" not in caplog.text

    def test_a_write_that_was_interrupted_leaves_the_old_batch_and_nothing_else(self, folder, monkeypatch):
        journal = Journal(folder)
        journal.add("a", BATCH)

        def killed(file, **arrays):
            file.write(b"half of it")
            raise KeyboardInterrupt

        monkeypatch.setattr(module.np, "savez", killed)
        with pytest.raises(KeyboardInterrupt):
            journal.add("a", BATCH)
        assert [path.name for path in folder.iterdir()] == ["a.npz"]
        assert list(journal.read()) == ["a"]


class TestFingerprint:
    @pytest.fixture
    def model(self, make_model):
        return make_model("llama", dtype=torch.float32)

    @staticmethod
    def of(model, facts=("x", {"seed": 0}), code="dpoviz.lm.cache"):
        return fingerprint(model, facts, code)

    def test_the_same_for_another_object_wherever_it_came_from(self, model, make_model):
        twin = make_model("llama", dtype=torch.float32)
        twin.config._name_or_path = "elsewhere"
        assert self.of(twin) == self.of(model)

    def test_another_for_a_weight_a_type_a_configuration_facts_or_code(self, model, make_model, monkeypatch):
        seen = {self.of(model)}
        seen.add(self.of(model, ("x", {"seed": 1})))
        seen.add(self.of(model, code="dpoviz.lm.entropy"))
        with monkeypatch.context() as patch:
            patch.setattr(module, "code_digest", lambda name: "changed")
            seen.add(self.of(model))
        seen.add(self.of(make_model("llama", dtype=torch.bfloat16)))
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500.0}
        seen.add(self.of(model))
        with torch.no_grad():
            model.lm_head.weight[5, 5] += 1e-6
        seen.add(self.of(model))
        assert len(seen) == 7

    def test_another_with_an_adapter_and_with_that_switched_off(self, model):
        peft = pytest.importorskip("peft")
        plain = self.of(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is to go
            adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        on = self.of(adapted)
        with adapted.disable_adapter():
            off = self.of(adapted)
            assert self.of(adapted) == off
        assert len({plain, on, off}) == 3
        assert self.of(adapted) == on


class TestSources:
    """A key that lacks a module would let an old result pass for a new one."""

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["lm.entropy", "lm.reference", "experiments.small", "experiments.real"])
    def test_hold_all_that_an_import_loads(self, name):
        code = (
            f"import sys, dpoviz.{name}; from dpoviz.lm.cache import sources; "
            f"loaded = {{m for m in sys.modules if m.startswith('dpoviz.') and hasattr(sys.modules[m], '__file__')}}; "
            f"rooms = {{m for m in loaded if hasattr(sys.modules[m], '__path__')}}; "
            f"print(sorted(loaded - rooms - set(sources('dpoviz.{name}')) - {{'dpoviz.old_names'}}))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_adapters_decide_a_run(self):
        assert {"dpoviz.lm.models", "dpoviz.losses"} <= set(module.sources("dpoviz.experiments.real"))

    def test_follow_a_change_of_the_code_and_of_nothing_else(self, monkeypatch):
        before = module.code_digest("dpoviz.lm.reference")
        inner = module.sources

        def with_line(line):
            more = {"dpoviz.lm.packing": line}
            monkeypatch.setattr(
                module, "sources", lambda name: {k: v + more.get(k, "") for k, v in inner(name).items()}
            )
            return module.code_digest("dpoviz.lm.reference")

        assert with_line("# a comment\n") == before
        assert with_line('"""More of a docstring."""\n') == before
        assert with_line("x = 1\n") != before
