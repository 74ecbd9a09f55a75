"""Logs of other trainers, written here as they write them; tests/test_trl.py reads those of real trainers."""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers.worlds import network

from dpoviz.analysis.diagnose import SYMPTOMS
from dpoviz.analysis.text import number
from dpoviz.beta import ConstantBeta, EntropyBeta, MadeFor, TaskBeta
from dpoviz.learn.explore_beta import explore_beta
from dpoviz.learn.explorer import explore_run
from dpoviz.learn.run import compare_runs, load_run
from dpoviz.rules import BetaDPO


def rows(steps=20, *, chosen=0.5, rejected=-0.5, accuracy=0.8, noise=0.1, seed=0):
    """Rows of TRL's DPO at β = 0.1: log-ratios around the given means, in nats."""
    random = np.random.default_rng(seed)
    found = []
    for step in range(1, steps + 1):
        a, b = 0.1 * (np.array([chosen, rejected]) + noise * random.normal(size=2))
        found.append({
            "step": step, "epoch": step / 10, "loss": 0.6, "learning_rate": 1e-6, "rewards/chosen": a,
            "rewards/rejected": b, "rewards/margins": a - b, "rewards/accuracies": accuracy,
            "logps/chosen": -50 + 10 * a, "logps/rejected": -60 + 10 * b,
        })  # fmt: skip
    return found


def evaluated(accuracy, margin, pairs=200, step=20):
    return {"step": step, "epoch": 2.0, "eval_loss": 0.6, "eval_rewards/accuracies": accuracy,
            "eval_rewards/margins": margin, "eval_runtime": 4.0, "eval_samples_per_second": pairs / 4}  # fmt: skip


def write(folder, logged, step=20):
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": step, "train_batch_size": 8, "logging_steps": 10, "log_history": logged}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def found(run):
    return {finding.name: finding for finding in run.diagnose() if finding.severity != "not checked"}


class TestLog:
    def test_of_the_newest_checkpoint(self, tmp_path):
        for step in (9, 10):  # by number, not by name
            write(tmp_path / f"checkpoint-{step}", rows(step), step)
        (tmp_path / "checkpoint-old").mkdir()
        assert load_run(tmp_path).history["step"].tolist() == list(range(1, 11))
        assert load_run(tmp_path / "checkpoint-9").history["step"].max() == 9
        write(tmp_path, rows(12), 12)
        assert load_run(tmp_path).history["step"].max() == 12
        write(tmp_path, rows(5), 5)  # of an earlier training in the same folder
        assert load_run(tmp_path).history["step"].max() == 10

    def test_rows_of_a_step_are_one_and_the_summary_is_none(self, tmp_path):
        summary = {"step": 20, "train_loss": 0.5, "train_runtime": 3.0, "epoch": 2.0}
        history = load_run(write(tmp_path, [*rows(), evaluated(0.7, 0.1), summary])).history
        assert len(history) == 20 and "train_loss" not in history
        assert history["held_out_accuracy"].dropna().tolist() == [0.7]
        assert history["margin"].tolist() == [row["rewards/margins"] for row in rows()]

    def test_no_pickle_is_opened(self, tmp_path):
        class Hostile:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        (tmp_path / "training_args.bin").write_bytes(pickle.dumps(Hostile()))
        run = load_run(write(tmp_path, rows()))
        run.diagnose()
        assert not (tmp_path / "ran").exists()

    def test_lines_of_llama_factory(self, tmp_path):
        lines = [{"current_steps": i, "total_steps": 3, "loss": 0.7 - i / 10, "accuracy": 0.5, "lr": 1e-5, "epoch": i,
                  "percentage": 33.3, "elapsed_time": "0:00:01"} for i in (1, 2, 3)]  # fmt: skip
        more = [{"current_steps": 3, "total_steps": 3, "eval_loss": 0.5}, {"current_steps": 5, "percentage": 100}]
        (tmp_path / "trainer_log.jsonl").write_text("\n".join(map(json.dumps, [*lines, *more])) + "\n")
        run = load_run(tmp_path)
        assert run.history["loss"].tolist() == pytest.approx([0.6, 0.5, 0.4]) and len(run.history) == 3
        assert run.history["learning_rate"].tolist() == [1e-5] * 3 and run.history["eval_loss"].iloc[2] == 0.5
        assert {finding.severity for finding in run.diagnose()} == {"not checked"}
        with pytest.raises(ValueError, match=r"beta: got 0\.1, expected None: .* has no rewards"):
            load_run(tmp_path, beta=0.1)

    @pytest.mark.parametrize(
        ("logged", "message"),
        [
            (None, "has no log_history"),
            ([], "has no logged row of training"),
            ([{"loss": 0.1}], r"has a row without a step \(loss\)"),
            ([{"step": 1, "loss": "0.1"}], r"step 1: loss is '0\.1', not a number"),
        ],
    )
    def test_a_log_that_cannot_be_read(self, tmp_path, logged, message):
        with pytest.raises(ValueError, match=f"folder: .*trainer_state.json.*{message}"):
            load_run(write(tmp_path, logged))

    def test_a_damaged_line(self, tmp_path):
        (tmp_path / "trainer_log.jsonl").write_text('{"current_steps": 1, "loss": 0.1}\n{"curr')
        with pytest.raises(ValueError, match=r"trainer_log\.jsonl, line 2: not JSON"):
            load_run(tmp_path)

    @pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
    def test_a_beta_that_is_none(self, tmp_path, beta):
        with pytest.raises(ValueError, match=f"beta: got {beta}, expected a positive finite number"):
            load_run(write(tmp_path, rows()), beta=beta)

    def test_rewards_without_a_reference(self, tmp_path):
        logged = [row | {f"rewards/{a}": 2 * row[f"logps/{a}"] for a in ("chosen", "rejected")} for row in rows()]
        write(tmp_path, logged)
        with pytest.raises(ValueError, match=r"beta: got 2\.0, expected None: the rewards of .* without a reference"):
            load_run(tmp_path, beta=2.0)
        assert "both log-ratios fall" not in found(load_run(tmp_path))

    def test_what_a_log_has_not(self, tmp_path):
        run = load_run(write(tmp_path, rows()))
        asked = {
            "beta": [
                lambda: run.table,
                run.summary,
                lambda: explore_run(run),
                lambda: compare_runs({"a": run, "b": run}),
            ],
            "held_out": [lambda: run.scores],
            "beta_steps": [run.betas, lambda: run.steps],
            "pulls": [run.pulls],
            "pairs": [lambda: run.pairs],
            "answers": [lambda: run.answers("a", sample=True)],
            "frozen": [lambda: run.frozen("standard")],
            "entropy": [lambda: run.entropy("a")],
        }
        for name, calls in asked.items():
            for call in calls:
                with pytest.raises(ValueError, match=f"^{name}: .*trainer's"):
                    call()
        with pytest.raises(ValueError, match="trainer's output folder"):
            explore_beta(run)
        assert run.entropies is None and "20 logged rows of trainer_state.json" in repr(run)


class TestSavedBeta:
    def saved(self, folder, beta):
        beta.made_for = MadeFor("standard", "None", None, "means")  # as of a model without a name
        beta.save(write(folder, rows()) / "beta", form="standard", reference=None)
        return load_run(folder)

    def test_a_constant_reads_nothing(self, tmp_path):
        run = self.saved(tmp_path, ConstantBeta(0.3))
        assert run.beta("a") == pytest.approx(0.3) and set(run.history["variant"]) == {"fixed"}

    def test_inputs_that_a_beta_reads(self, tmp_path):
        run = self.saved(tmp_path / "task", TaskBeta.fixed({"a": 0.1, "b": 0.4}))
        assert run.beta("x", task="b") == pytest.approx(0.4) and set(run.history["variant"]) == {"standard"}
        with pytest.raises(ValueError, match="task: got None, expected one of a, b"):
            run.beta("x")
        run = self.saved(tmp_path / "entropy", EntropyBeta(0.1, 0.01, 1.0))
        assert run.beta("x", ref_entropy=2.0) == pytest.approx(0.2)
        with pytest.raises(ValueError, match="ref_entropy: got None"):
            run.beta("x")

    def test_a_rule_is_no_function_of_the_prompt(self, tmp_path):
        run = self.saved(tmp_path, BetaDPO(0.1))
        assert run.forms == []
        with pytest.raises(ValueError, match="beta: BetaDPO is no function of the prompt"):
            run.beta("x")

    def test_a_reference_that_nobody_named(self, tmp_path):
        run = self.saved(tmp_path, network())
        with pytest.raises(ValueError, match=r"reference: .* does not say which it was"):
            run.beta("x")


class TestDoctor:
    def test_a_healthy_log(self, tmp_path):
        run = load_run(write(tmp_path, [*rows(), evaluated(0.75, 0.05)]), beta=0.1)
        assert not found(run)
        assert {finding.name for finding in run.diagnose()} == set(SYMPTOMS) - {
            *("both log-ratios fall", "training pairs memorised"),
        }

    @pytest.mark.parametrize("beta", [0.1, None])
    def test_both_fall(self, tmp_path, beta):
        finding = found(load_run(write(tmp_path, rows(chosen=-1, rejected=-2)), beta=beta))["both log-ratios fall"]
        assert finding.severity == "note" and ("nats" in finding.evidence) == (beta is not None)
        for name in ("rewards/chosen", "rewards/rejected"):
            mean = np.mean([row[name] for row in rows(chosen=-1, rejected=-2)[10:]])
            assert f"{number(mean / (beta or 1))} ({name.removeprefix('rewards/')})" in finding.evidence
        noisy = rows(chosen=-0.01, rejected=-0.02, noise=1.0)
        assert not found(load_run(write(tmp_path / "noisy", noisy), beta=beta))

    def test_memorised(self, tmp_path):
        run = load_run(write(tmp_path / "a", [*rows(accuracy=1.0), evaluated(0.55, 0.01)]))
        assert set(found(run)) == {"training pairs memorised"}
        assert "on 200 pairs" in found(run)["training pairs memorised"].evidence
        few = load_run(write(tmp_path / "b", [*rows(accuracy=1.0), evaluated(0.6, 0.01, pairs=5)]))
        assert not found(few)  # 3 of 5 may be chance

    def test_flipped(self, tmp_path):
        run = load_run(write(tmp_path / "a", [*rows(accuracy=0.6), evaluated(0.3, -0.2)]))
        assert "labels look flipped" in found(run)
        # a policy that has not moved has ties alone, which TRL counts as wrong
        still = rows(chosen=0, rejected=0, noise=0, accuracy=0.0)
        assert not found(load_run(write(tmp_path / "b", [*still, evaluated(0.0, 0.0)])))
