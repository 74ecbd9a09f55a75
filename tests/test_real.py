"""The main job on a model in a folder and pairs in files, from the command line: tiny, but nothing is replaced."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.launch import DPOVIZ, begin, command, environment, finish, flat
from transformers import AutoModelForCausalLM

from dpoviz.analysis.tables import read_table, write_table
from dpoviz.beta import BetaNetwork
from dpoviz.cli import main
from dpoviz.data import tasks
from dpoviz.data.records import load_pairs
from dpoviz.experiments.config import RealConfig
from dpoviz.experiments.options import read_settings
from dpoviz.experiments.real import EXAMPLES, FIXED, load, score
from dpoviz.experiments.retilt import open_run, sweep
from dpoviz.experiments.retilt_config import RetiltConfig
from dpoviz.forms import FORMS
from dpoviz.learn.run import load_run
from dpoviz.lm import models
from dpoviz.lm.models import load_lm
from dpoviz.lm.scoring import score_answers
from dpoviz.lm.workers import one_thread
from dpoviz.training.methods import features

peft = pytest.importorskip("peft", reason="adapters need peft: pip install dpoviz[real]")

SMALL = {
    "batch-size": 4, "stage1-steps": 3, "stage2-steps": 6, "lora-rank": 2, "entropy-samples": 3, "max-length": 96,
    "max-new-tokens": 12, "eval-batch-size": 4, "policy-learning-rate": 1e-2,
}  # fmt: skip

REPEATED = (
    "beta.csv", "held_out.csv", "entropy.csv", "answers.csv", "pulls.csv", "beta_steps.parquet", "frozen.parquet",
    "pairs.parquet",
)  # fmt: skip
"""The files that a repeated or resumed run has with the same bytes."""


def options(**changed):
    return [str(word) for name, value in {**SMALL, **changed}.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder and a file of pairs that it was not trained on."""
    folder = tmp_path_factory.mktemp("real")
    demonstrations = tasks.corpus(400, 0)
    tokenizer = models.tiny_tokenizer([prompt + answer for prompt, answer in demonstrations], 400)
    model = models.tiny_lm(tokenizer, hidden_size=32, layers=2, heads=2, max_length=160)
    models.fit_lm(model, tokenizer, demonstrations, progress=False)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "pairs.jsonl").open("w") as file:
        for task in tasks.TASKS:
            for problem in tasks.sample_problems(task, 8, 1):
                record = {"prompt": problem.prompt, "chosen": "yes, 12 please", "rejected": "x", "task": task}
                file.write(json.dumps(record) + "\n")
    return folder


def source(folder, out):
    return ["--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"), "--out", str(out)]


def start(folder, cache, out):
    return begin([*DPOVIZ, "train", *source(folder, out), *options()], DPOVIZ_CACHE=cache)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(folder, cache, tmp_path_factory):
    """The folder of a finished run, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    process = start(folder, cache, out)
    printed, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    return out, printed


@pytest.mark.slow
class TestRetilt:
    """`dpoviz retilt` on a finished run of adapters."""

    OPTIONS = ("--samples", "2", "--a", "2", "--max-new-tokens", "6", "--variants", FIXED)

    def test_in_win_rates_without_a_reward(self, run, cache, tmp_path):
        out = shutil.copytree(run[0], tmp_path / "run")
        printed = finish([*DPOVIZ, "retilt", out, *self.OPTIONS], DPOVIZ_CACHE=cache)
        rows, curves = (read_table(out / name) for name in ("retilt.csv", "retilt_curves.csv"))
        assert sorted(curves["a"].unique()) == [0, 1, 2] and set(rows["variant"]) == {FIXED}
        scores = read_table(out / "held_out.csv")
        mean = scores[scores["variant"] == FIXED].groupby("prompt")["h"].mean()
        expected = rows["a"] * rows["prompt"].map(mean) / 4
        assert rows["reward"].to_numpy() == pytest.approx(expected.to_numpy())
        halves = rows.groupby("group")["half"].nunique()
        assert (halves == 1).all() and set(rows["half"]) == {"choose", "evaluate"}
        assert "win rate per nat" in printed and "re-tilted" in (out / "report.html").read_text()
        assert read_settings(out / "retilt.json", RetiltConfig(), "retilt").samples == 2

    def test_with_a_function_and_its_mistakes(self, run, cache, tmp_path):
        out = shutil.copytree(run[0], tmp_path / "run")
        (tmp_path / "judge.py").write_text(
            "def length(prompt, answer, task):\n    return len(answer)\n\ndef word(*given):\n    return 'good'\n"
        )
        ran = subprocess.run(
            [*DPOVIZ, "retilt", out, *self.OPTIONS, "--reward", "judge:length"], cwd=tmp_path,
            env=environment(DPOVIZ_CACHE=cache), capture_output=True, text=True, check=True,
        )  # fmt: skip
        rows = read_table(out / "retilt.csv")
        assert (rows["reward"] == rows["answer"].str.len()).all() and "reward per nat" in ran.stdout
        for name, words in (
            ("judge:word", "reward: got 'good' for the answer"),
            ("judge:no", "reward: got 'judge:no'"),
        ):
            ran = subprocess.run(
                [*DPOVIZ, "retilt", out, *self.OPTIONS, "--reward", name], cwd=tmp_path,
                env=environment(DPOVIZ_CACHE=cache), capture_output=True, text=True,
            )  # fmt: skip
            assert ran.returncode == 2 and words in ran.stderr

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks by a name that is to go
    def test_another_policy_than_the_runs(self, run, tmp_path):
        """Its recorded h no longer fits: the adapter of another variant would pass unseen otherwise."""
        out = shutil.copytree(run[0], tmp_path / "run")
        table = read_table(out / "held_out.csv")
        write_table(table.assign(h=table["h"] + 1), out / "held_out.csv")
        opened = open_run(out, cache_dir=None, progress=False)
        with pytest.raises(ValueError, match="the model or the world has changed since"):
            sweep(opened, [FIXED], RetiltConfig(samples=2), progress=False)

    def test_what_is_no_finished_run(self, run, tmp_path, capsys):
        assert main(["retilt", str(tmp_path)]) == 2
        assert "holds no finished run" in capsys.readouterr().err
        assert main(["retilt", str(run[0]), "--variants", "best"]) == 2
        assert "variants: got ['best'], expected some of" in capsys.readouterr().err


@pytest.mark.slow
class TestTrain:
    def test_what_is_left(self, run):
        out, _ = run
        names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        tables = {f"{name}.csv" for name in ("beta", "history", "entropy", "held_out", "answers")}
        adapters = {f"{variant}/policy/adapter_model.safetensors" for variant in (*FORMS, FIXED)}
        betas = {f"{variant}/beta/model.safetensors" for variant in FORMS}
        kept = {"pulls.csv", "beta_steps.parquet", "frozen.parquet", "pairs.parquet"}
        assert tables | adapters | betas | kept | {"config.json", "run.json", "report.html", "entropy.png"} <= names
        assert not [name for name in names if name.endswith("policy/model.safetensors")]  # no second copy of the model

    def test_time_estimate_comes_before_the_work(self, run):
        assert re.search(r"about \d+ s if nothing is cached .*: reference \d+ s, entropy \d+ s, training \d+ s", run[1])

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks by a name that is to go
    def test_saved_adapter_gives_the_scores_again(self, run, folder):
        """Each variant's h, from the files alone: the base model, the adapter on top, and two separate passes."""
        scores = pd.read_csv(run[0] / "held_out.csv")
        tokenizer = load_lm(folder / "model").tokenizer
        held_out = load(config_of(run[0])).held_out
        for variant in (*FORMS, FIXED):
            reference = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=False).eval()
            policy = peft.PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=False),
                run[0] / variant / "policy",
            ).eval()
            answers = [list(pair) for pair in zip(held_out["chosen_ids"], held_out["rejected_ids"], strict=True)]
            with torch.no_grad():
                of_policy, of_reference = (
                    score_answers(
                        model, held_out["prompt_ids"][:], answers, pad_id=tokenizer.pad_token_id, shared_prefix=False
                    ).logps.double()
                    for model in (policy.merge_and_unload(), reference)
                )
            h = ((of_policy - of_reference) @ torch.tensor([1.0, -1.0], dtype=torch.float64)).numpy()
            own = scores[scores["variant"] == variant]["h"].to_numpy()
            # float32 sums over a dozen tokens, by other routes
            assert own == pytest.approx(h, abs=2e-3)
            assert np.abs(h).max() > 0.05

    def test_saved_beta_gives_the_table_again(self, run, folder, cache):
        table = pd.read_csv(run[0] / "beta.csv")
        config = config_of(run[0])
        held_out = score(config, load(config), cache_dir=cache, progress=False).held_out
        for form in FORMS:
            beta = BetaNetwork.from_pretrained(run[0] / form / "beta")
            with torch.no_grad():
                values = beta(features(held_out)).tolist()
            assert table[table["form"] == form]["beta"].tolist() == pytest.approx(values, rel=1e-6)
            assert table[table["form"] == form]["beta"].std() > 0

    def test_arms_start_alike_and_train_as_long(self, run):
        history = pd.read_csv(run[0] / "history.csv")
        steps = history.groupby("variant")["step"].max()
        assert set(steps.index) == {*FORMS, FIXED} and steps.nunique() == 1
        start = history[history["step"] == 0].set_index("variant")
        assert start["loss/dpo"].nunique() == 1
        last = history.groupby("variant")["loss/dpo"].last()
        assert last.nunique() == 3

    def test_answers_before_and_after(self, run):
        answers = pd.read_csv(run[0] / "answers.csv", keep_default_na=False)
        assert set(answers["variant"]) == {"reference", *FORMS, FIXED}
        assert answers.groupby("variant").size().nunique() == 1
        wide = answers.pivot(index="prompt", columns="variant", values="answer")
        assert (wide["reference"] != wide["inverse"]).any()

    def test_report_shows_the_tables(self, run):
        text = (run[0] / "report.html").read_text(encoding="utf-8")
        for heading in ("Held-out pairs", "The entropy of the reference, by estimator", "Answers before and after"):
            assert heading in text
        accuracy = pd.read_csv(run[0] / "held_out.csv").query("variant == 'inverse'")["h"].gt(0).mean()
        assert f"is {accuracy:.3f}, " in text

    def test_examples_are_among_the_entropies(self, run):
        entropy = pd.read_csv(run[0] / "entropy.csv")
        assert set(entropy[entropy["example"]]["prompt"]) == set(EXAMPLES)
        counts = entropy[~entropy["example"]].groupby("estimator").size()
        assert set(counts.index) == {"first_token", "per_token", "sequence", "monte_carlo", "teacher_forced"}
        assert counts.nunique() == 1

    def test_printed_medians_are_those_of_the_file(self, run):
        table = pd.read_csv(run[0] / "beta.csv")
        for form in FORMS:
            median = table[(table["form"] == form) & (table["task"] == "math")]["beta"].median()
            assert re.search(rf"{form} +math +\d+ +{re.escape(f'{median:.3g}')} ", run[1])


def config_of(out: Path) -> RealConfig:
    return read_settings(out / "config.json", RealConfig(), "train")


@pytest.fixture
def at_once(cache, monkeypatch):
    """Runs a command in this process, on one thread as the others; returns its status."""

    def run(words, cache=cache):
        monkeypatch.setenv("DPOVIZ_CACHE", str(cache))
        with one_thread():
            return main([str(word) for word in words])

    return run


@pytest.mark.slow
class TestResume:
    def test_killed_and_started_again_it_ends_the_same(self, run, folder, tmp_path, at_once):
        """Killed three times: in the reference pass, and when the folder of a stage appears, in its first steps."""
        cache, out = tmp_path / "cache", tmp_path / "out"
        moments = (
            lambda: list(cache.rglob("*")),
            (out / "stage1").exists,
            (out / "standard").exists,
        )
        for number, moment in enumerate(moments):
            assert not moment()
            process = start(folder, cache, out)
            while not moment():
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert not any(later() for later in moments[number + 1 :])
        assert not (out / "report.html").exists()
        assert at_once(["train", *source(folder, out), *options()], cache) == 0
        for name in REPEATED:
            assert (out / name).read_bytes() == (run[0] / name).read_bytes(), name

    def test_its_settings_given_back_repeat_it(self, run, tmp_path, at_once):
        assert at_once(["train", "--config", run[0] / "config.json", "--out", tmp_path / "out"]) == 0
        for name in (*REPEATED, "config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (run[0] / name).read_bytes(), name


@pytest.mark.slow
class TestProcesses:
    def test_two_processes_leave_what_one_leaves(self, run, folder, cache, tmp_path):
        """The reference pass is kept from the run of one; everything after it is done by two."""
        line = command(2, "-m", "dpoviz", "train", *source(folder, tmp_path / "out"), *options())
        printed = finish(line, DPOVIZ_CACHE=cache)
        assert printed.count("reward accuracy on held-out pairs") == 1  # one of them speaks
        for name in ("beta", "history", "held_out"):
            one, two = (pd.read_csv(place / f"{name}.csv") for place in (run[0], tmp_path / "out"))
            assert len(one) == len(two) > 0
            pd.testing.assert_frame_equal(one, two, rtol=1e-3, atol=1e-4, obj=name)
        one, two = (load_run(place) for place in (run[0], tmp_path / "out"))
        pd.testing.assert_frame_equal(one.betas(), two.betas(), rtol=1e-3)
        pd.testing.assert_frame_equal(one.pulls(), two.pulls(), rtol=1e-2, atol=1e-4)
        np.testing.assert_allclose(one.frozen("inverse").h, two.frozen("inverse").h, rtol=1e-3, atol=1e-3)
        assert (tmp_path / "out" / "report.html").exists()
        assert {path.name for path in (run[0] / "inverse").iterdir()} == {
            path.name for path in (tmp_path / "out" / "inverse").iterdir()
        }

    def test_a_command_for_one_process_says_so(self, tmp_path):
        line = command(2, "-m", "dpoviz", "demo", "--fast", "--out", tmp_path / "out")
        done = subprocess.run(line, capture_output=True, text=True, env=environment())
        assert done.returncode != 0
        assert "processes: got 2, expected one" in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
class TestOtherCommands:
    def test_report_makes_the_same_page_again(self, run, capsys):
        out = run[0]
        before = (out / "report.html").read_bytes()
        (out / "report.html").unlink()
        assert main(["report", str(out)]) == 0
        assert (out / "report.html").read_bytes() == before

    def test_report_of_no_run(self, tmp_path, capsys):
        assert main(["report", str(tmp_path)]) == 2
        assert "holds no finished run" in capsys.readouterr().err

    def test_reference_alone(self, folder, cache, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("DPOVIZ_CACHE", str(cache))
        few = ["--entropy-samples", "3", "--max-length", "96", "--max-new-tokens", "12", "--eval-batch-size", "4"]
        assert main(["reference", *source(folder, tmp_path), *few]) == 0
        assert "first_token" in capsys.readouterr().out
        assert (tmp_path / "entropy.png").stat().st_size > 10_000

    def test_full_weights_and_a_rule(self, folder, cache, tmp_path, monkeypatch):
        monkeypatch.setenv("DPOVIZ_CACHE", str(cache))
        few = options(**{"stage1-steps": 2, "stage2-steps": 2, "lora-rank": 0})
        assert main(["train", *source(folder, tmp_path / "o"), *few, "--rule", "entropy"]) == 0
        moved = AutoModelForCausalLM.from_pretrained(tmp_path / "o" / "inverse" / "policy", trust_remote_code=False)
        base = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=False)
        assert any(not torch.equal(a, b) for a, b in zip(moved.parameters(), base.parameters(), strict=True))


class TestBadInput:
    """Each is refused by name, before any time is spent, and leaves no folder that would be in the way."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
            (["--model", "no/such-model"], "no/such-model"),
            (["--held-out", "1.5"], "held_out"),
            (["--batch-size", "0"], "batch_size"),
            (["--entropy-samples", "1"], "entropy_samples"),
            (["--max-length", "100000"], "100000"),
            (["--max-new-tokens", "100000"], "100000"),
            (["--columns", "prompt"], "columns"),
            (["--initial-scale", "-1"], "initial_scale: got -1"),
            (["--batch-size", "500"], "500"),
            (["--pairs-per-task", "0"], "pairs_per_task"),
            (["--seed", "-1"], "seed"),
            (["--chat", "poetry"], "poetry"),
            (["--chat", "math"], "chat template"),
            (["--preset", "none"], "none"),
            (["--strength", "0.5"], "rule 'network' has no"),
        ],
    )
    def test_refused(self, folder, tmp_path, capsys, monkeypatch, changed, message):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        out = tmp_path / "out"
        given = {"--model": str(folder / "model"), "--data": str(folder / "pairs.jsonl"), "--out": str(out)}
        given |= {"--max-length": "96"} | dict(zip(changed[::2], changed[1::2], strict=True))
        assert main(["train", *(word for option in given.items() for word in option)]) == 2
        error = flat(capsys.readouterr().err)
        assert re.search(message, error), error
        assert "Traceback" not in error
        assert not out.exists()

    @pytest.mark.slow
    def test_another_run_in_the_folder(self, run, folder, capsys):
        assert main(["train", *source(folder, run[0]), *options(**{"lora-rank": 3})]) == 2
        assert "lora_rank is 2 there and 3 here" in capsys.readouterr().err


@pytest.mark.skipif("DPOVIZ_DATA" not in os.environ, reason="DPOVIZ_DATA: no folder of real pairs is named")
def test_real_pairs_load_together():
    pairs = load_pairs(os.environ["DPOVIZ_DATA"])
    assert pd.Series(pairs["task"]).value_counts().to_dict() == {"math": 366, "dialogue": 150, "code": 135}
