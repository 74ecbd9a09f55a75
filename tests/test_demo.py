"""The main job from the command line, in its fast version: what it leaves, that it is repeatable and resumable."""

import json
import os
import re
import signal
import sys
import time
from dataclasses import asdict
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers.launch import DPOVIZ, begin, finish, flat
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpoviz.analysis.tables import COLUMNS
from dpoviz.beta import BetaNetwork
from dpoviz.cli import main
from dpoviz.data import tasks
from dpoviz.experiments.config import DemoConfig
from dpoviz.experiments.demo import demo_folder
from dpoviz.experiments.small import small_world
from dpoviz.forms import FORMS
from dpoviz.training.stages import betas_at

FAST = DemoConfig.default(fast=True)
REPEATED = (
    "beta.csv", "history.csv", "held_out.csv", "answers.csv", "config.json", "pulls.csv", "beta_steps.parquet",
    "frozen.parquet", "pairs.parquet",
)  # fmt: skip
"""The files that a repeated or resumed run has with the same bytes."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return Path(os.environ.get("DPOVIZ_CACHE") or tmp_path_factory.mktemp("cache"))


def start(out, cache, *arguments):
    return begin([*DPOVIZ, "demo", "--fast", "--out", out, *arguments], DPOVIZ_CACHE=cache)


@pytest.fixture(scope="module")
def demo(tmp_path_factory, cache):
    """The folder of a finished demo, and what it printed on each stream."""
    out = tmp_path_factory.mktemp("demo") / "run"
    process = start(out, cache)
    printed, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    return out, printed, errors


@pytest.fixture(scope="module")
def world(demo, cache):
    return small_world(FAST.world, cache_dir=cache, progress=False)


@pytest.mark.slow
class TestWhatIsLeft:
    def test_files(self, demo):
        out = demo[0]
        names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        models = {f"{form}/{what}/model.safetensors" for form in FORMS for what in ("policy", "beta")}
        assert {
            "config.json",
            "history.csv",
            "beta.csv",
            "beta_by_task.png",
            "report.html",
            "left_out.json",
            "run.json",
            "held_out.csv",
            "answers.csv",
            "pulls.csv",
            "beta_steps.parquet",
            "frozen.parquet",
            "pairs.parquet",
            "reference/model.safetensors",
        } | models <= names

    def test_a_row_for_each_form_and_held_out_prompt(self, demo, world):
        table = pd.read_csv(demo[0] / "beta.csv")
        assert tuple(table.columns) == COLUMNS
        for form in FORMS:
            assert sorted(table[table["form"] == form]["prompt"]) == sorted(set(world.held_out["prompt"]))
        inverse = table["form"] == "inverse"
        assert table["scale"].to_numpy() == pytest.approx(np.where(inverse, 1 / table["beta"], table["beta"]))

    def test_saved_models_give_the_table_again(self, demo, world):
        table = pd.read_csv(demo[0] / "beta.csv")
        for form in FORMS:
            beta = BetaNetwork.from_pretrained(demo[0] / form / "beta")
            again = betas_at(beta, world.held_out)
            own = table[table["form"] == form].reset_index(drop=True)
            pd.testing.assert_frame_equal(own[list(again.columns)], again, check_dtype=False)
            assert (own["seed"] == 0).all()

    def test_saved_policy_is_a_model_that_answers(self, demo, world):
        folder = demo[0] / "inverse" / "policy"
        policy, tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False),
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        )
        ids = tokenizer("What is 3 + 4?\n", return_tensors="pt", return_token_type_ids=False)
        assert policy.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
        moved = [(p - q).abs().max() for p, q in zip(policy.parameters(), world.reference.parameters(), strict=True)]
        assert max(moved) > 1e-4

    def test_history(self, demo):
        history = pd.read_csv(demo[0] / "history.csv")
        config = FAST
        for form in FORMS:
            rows = history[history["form"] == form]
            assert rows["step"].is_monotonic_increasing
            assert rows["step"].max() == config.inverse.stage1_steps + config.inverse.stage2_steps - 1
            assert rows["kl"].notna().sum() >= 3

    def test_what_the_run_depends_on(self, demo):
        saved, run = (json.loads((demo[0] / name).read_text()) for name in ("config.json", "run.json"))
        assert saved == {"command": "demo", **json.loads(json.dumps(asdict(FAST)))}
        assert run["beta0"] == {"inverse": 10.0, "standard": 0.1}
        assert run["command line"][1:] == ["demo", "--fast", "--out", str(demo[0])]
        assert {name: run["packages"][name] for name in ("dpoviz", "torch", "transformers")} == {
            name: version(name) for name in ("dpoviz", "torch", "transformers")
        }
        assert run["threads"] == 1 and run["seconds"]["training"] > 0
        assert run["git commit"] is None or re.fullmatch(r"[0-9a-f]{7,40}( .*)?", run["git commit"])

    def test_its_settings_given_back_repeat_it(self, demo, cache, tmp_path, monkeypatch):
        """As YAML, too: what config.json holds, without --fast and without JSON."""
        monkeypatch.setenv("DPOVIZ_CACHE", str(cache))
        settings = yaml.safe_dump(json.loads((demo[0] / "config.json").read_text()))
        (tmp_path / "settings.yaml").write_text(settings)
        assert main(["demo", "--config", str(tmp_path / "settings.yaml"), "--out", str(tmp_path / "run")]) == 0
        for name in REPEATED:
            assert (tmp_path / "run" / name).read_bytes() == (demo[0] / name).read_bytes(), name

    def test_no_bars_where_nobody_watches(self, demo):
        assert demo[2] == ""

    def test_printed_table_is_that_of_the_file(self, demo):
        out, printed, _ = demo
        table = pd.read_csv(out / "beta.csv")
        for form in FORMS:
            rows = table[table["form"] == form]
            median = rows[rows["task"] == "dialogue"]["beta"].median()
            rho = spearmanr(rows["beta"], rows["ref_entropy"]).statistic
            assert re.search(rf"{form} dialogue +\d+ +{re.escape(f'{median:.3g}')} ", printed)
            assert re.search(rf"{form} +all .*{re.escape(f'{rho:+.2f}')} \[", printed)
        assert str(out / "report.html") in printed

    def test_report_asks_nothing_of_the_network(self, demo):
        class Links(HTMLParser):
            def __init__(self):
                super().__init__()
                self.found = []

            def handle_starttag(self, tag, attrs):
                assert tag not in ("script", "iframe", "link")
                self.found += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]

        parser = Links()
        parser.feed((demo[0] / "report.html").read_text(encoding="utf-8"))
        assert len(parser.found) >= 3
        assert all(link.startswith("data:image/png;base64,") for link in parser.found)


@pytest.mark.slow
class TestAgain:
    def test_killed_and_started_again_it_ends_as_if_it_had_not_been(self, demo, cache, tmp_path, monkeypatch):
        process = start(tmp_path / "run", cache)
        while not list((tmp_path / "run" / "stage1").glob("checkpoint-*[0-9]")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "run" / "beta.csv").exists()
        monkeypatch.setenv("DPOVIZ_CACHE", str(cache))
        assert main(["demo", "--fast", "--out", str(tmp_path / "run")]) == 0
        for name in REPEATED:
            assert (tmp_path / "run" / name).read_bytes() == (demo[0] / name).read_bytes()

    def test_another_seed_is_another_run(self, demo, capsys):
        assert main(["demo", "--fast", "--seed", "1", "--out", str(demo[0])]) == 2
        said = capsys.readouterr().err
        assert "world.seed is 0 there and 1 here" in said and "training.seed is 0 there and 1 here" in said
        assert str(demo[0]) in said

    def test_folder_of_a_notebook_follows_the_settings(self, tmp_path):
        folders = [demo_folder(DemoConfig.default(seed), tmp_path) for seed in (0, 0, 1)]
        assert folders[0] == folders[1] != folders[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not choose a process's cores")
def test_same_bytes_on_one_core_and_on_two(tmp_path):
    """From nothing: the world, too, and the forms in turn or side by side."""
    world = ["--world.demonstrations", 1500, "--world.problems", 48, "--world.entropy-samples", 2]
    training = ["--stage1-steps", 2, "--stage2-steps", 2, "--batch-size", 4, "--probe-prompts", 2]
    cores = sorted(os.sched_getaffinity(0))
    for n in (1, 2):
        own = f"import os, sys; os.sched_setaffinity(0, {cores[:n]})"
        code = f"{own}; from dpoviz.cli import main; sys.exit(main(sys.argv[1:]))"
        line = [sys.executable, "-c", code, "demo", "--out", tmp_path / f"run{n}", *world, *training]
        finish(line, DPOVIZ_CACHE=tmp_path / f"cache{n}", OMP_NUM_THREADS=n)
    worlds = [next((tmp_path / f"cache{n}").glob("small-world-*")) for n in (1, 2)]
    for name in ("reference/model.safetensors", "pairs.jsonl"):
        assert len({(world / name).read_bytes() for world in worlds}) == 1, name
    for name in REPEATED:
        assert (tmp_path / "run1" / name).read_bytes() == (tmp_path / "run2" / name).read_bytes(), name


class TestBadInput:
    def test_negative_seed(self, tmp_path, capsys):
        assert main(["demo", "--seed", "-1", "--out", str(tmp_path / "run")]) == 2
        assert "seed: got -1, expected" in flat(capsys.readouterr().err)
        assert not (tmp_path / "run").exists()

    def test_out_is_a_file(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert main(["demo", "--out", str(tmp_path / "file")]) == 2
        assert "file" in capsys.readouterr().err


@pytest.mark.slow
class TestWorld:
    def test_no_prompt_on_both_sides_and_every_task_on_each(self, world):
        train, held_out = set(world.train["prompt"]), set(world.held_out["prompt"])
        assert not train & held_out
        assert set(world.train["task"]) == set(world.held_out["task"]) == set(tasks.TASKS)

    def test_prompts_without_a_pair_are_counted_and_named(self, world):
        config = FAST.world
        for task in tasks.TASKS:
            rows = {
                p
                for part in (world.train, world.held_out)
                for p, t in zip(part["prompt"], part["task"], strict=True)
                if t == task
            }
            assert len(rows) + len(set(world.left_out[task])) == config.problems
            assert not rows & set(world.left_out[task])

    def test_rewards_are_those_of_the_answers(self, world):
        problems = {p.prompt: p for t in tasks.TASKS for p in tasks.sample_problems(t, FAST.world.problems, 0)}
        for row in world.held_out:
            assert row["reward_chosen"] == tasks.reward(problems[row["prompt"]], row["chosen"])
            assert row["reward_rejected"] == tasks.reward(problems[row["prompt"]], row["rejected"])
