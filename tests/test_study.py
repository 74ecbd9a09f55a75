"""The study: its folds, its tables against hand-made runs, and a tiny one, really killed and gone on with."""

import json
import math
import random
import signal
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset
from helpers.launch import DPOVIZ, alive, begin, children

from dpoviz.analysis.plots_study import figure_study
from dpoviz.analysis.tables import write_table
from dpoviz.cli import main
from dpoviz.data.records import components, folds_by_group
from dpoviz.experiments import study_runs
from dpoviz.experiments.study_config import ARMS, Job, StudyConfig, jobs
from dpoviz.experiments.study_report import (
    TABLES,
    accuracy_of,
    betas_of,
    gains_of,
    sentences,
    slopes_of,
    write_study,
)
from dpoviz.experiments.study_runs import Ground, betas_by_slope, ground, pairs_table, run_job
from dpoviz.lm.cache import read_result, write_result


def records(n=30):
    return [{"prompt": f"{i // 2 if i < 8 else i}", "task": ("math", "code", "dialogue")[i // 10],
             "group": "one problem" if i in (9, 11) else None} for i in range(n)]  # fmt: skip


class TestFolds:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_each_pair_is_held_out_once_and_no_group_is_split(self, seed):
        pairs = Dataset.from_list(records())
        folds = folds_by_group(pairs, 4, seed)
        assert sorted(row for fold in folds for row in fold) == list(range(30))
        group = components(pairs)
        assert len({(group[row], i) for i, fold in enumerate(folds) for row in fold}) == len(set(group)) == 25
        for task, most in (("math", 2), ("code", 3), ("dialogue", 3)):  # 6, 9 and 10 groups in four folds
            own = [len({group[r] for r in fold if pairs[group[r]]["task"] == task}) for fold in folds]
            assert max(own) - min(own) <= 1 and max(own) == most
        assert folds != folds_by_group(pairs, 4, seed + 1)

    def test_more_folds_than_groups_are_refused(self):
        with pytest.raises(ValueError, match="folds: got 7, expected at most 6, the groups of pairs of 'math'"):
            folds_by_group(Dataset.from_list(records()), 7, 0)

    def test_each_arm_has_each_fold_of_each_seed_once(self):
        config = StudyConfig()
        rows = jobs(config)
        assert len(rows) == len(set(rows)) == (3 + 7) * 5 * 2
        assert len({job.name for job in rows}) == len(rows)
        reads = [bool(ARMS[job.arm].slopes) for job in rows]
        assert reads == sorted(reads)  # what reads the slopes of others comes after them


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"arms": ("sloops",)}, r"arms: got \['sloops'\], expected some of constant"),
        ({"folds": 1}, "folds, seeds: got 1, 2, expected"),
        ({"epochs": (2, 1)}, r"epochs: got \[2, 1\], expected rising"),
        ({"scales": ()}, r"scales: got \[\], expected rising"),
        ({"policy_learning_rate": -1.0}, "policy_learning_rate: got -1.0"),
        ({"max_length": 1}, "max_length: got 1"),
    ],
)
def test_settings_that_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        StudyConfig(**settings)


def made(arm, scale, h, *, seed=0, beta=(), epochs=1):
    """Rows of an arm on six pairs, two folds of three, one pair of each task in each."""
    entropy = [0.1, 0.2, 0.9, 0.15, 0.3, 0.8]
    return pd.DataFrame(
        {"arm": arm, "scale": scale, "fold": [0, 0, 0, 1, 1, 1], "seed": seed, "epochs": epochs, "row": range(6),
         "h": h, "beta": beta or math.nan, "task": ["math", "code", "dialogue"] * 2, "unit": list("abcdef"),
         "prompt": list("012345"), "ref_entropy": entropy}
    )  # fmt: skip


class TestTables:
    def test_slopes_by_hand(self):
        rows = made("constant", 0.1, [1.0, -1.0, 2.0, 3.0, 2.0, -1.0])
        found = slopes_of(rows).set_index("task")
        # ½·Σh/Σh²
        assert found["slope"].to_dict() == pytest.approx(
            {"math": 0.5 * 4 / 10, "code": 0.5 * 1 / 5, "dialogue": 0.5 * 1 / 5, "all": 0.5 * 6 / 20}
        )
        assert list(found.index) == ["math", "code", "dialogue", "all"] and (found["answers"] == [4, 4, 4, 12]).all()
        # of the trainings: 1/2 and 1/6; −1/2 and 1/4; ½·2/6 and ½·4/14
        spread = {"math": (1 / 2 - 1 / 6) / 2**0.5, "code": (1 / 4 + 1 / 2) / 2**0.5}
        assert found["spread"][["math", "code"]].to_dict() == pytest.approx(spread)
        assert found["spread"]["all"] == pytest.approx((1 / 6 - 1 / 7) / 2**0.5)

    def test_gains_by_hand(self):
        h = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0]
        rows = pd.concat(
            [made("constant", 0.1, h), made("standard", 0.1, [1.0, 1.0, 2.0, 1.0, 2.0, 4.0])], ignore_index=True
        )
        found = gains_of(rows, slopes_of(rows), 0.1).set_index("arm")
        ratio = (11 / 27**0.5) / (8 / 12**0.5) - 1  # of E[h]/√E[h²]
        assert found["gain"].to_dict() == pytest.approx({"constant": 0.0, "standard": ratio})
        assert found["gain_low"]["standard"] <= ratio <= found["gain_high"]["standard"]
        # slopes ½, ½·3/5, ½·3/5, variances 1, 2.5, 2.5: √(1 + CV²) − 1, before what noise adds is taken off
        v, b = [1, 2.5, 2.5], [0.5, 0.3, 0.3]
        squares, mean = sum(x * y * y for x, y in zip(v, b, strict=True)), sum(x * y for x, y in zip(v, b, strict=True))
        assert 0 <= found["bound"]["constant"] <= (squares * sum(v)) ** 0.5 / mean - 1 + 1e-12

    def test_accuracy_by_hand(self):
        right = pd.concat([made("constant", 0.1, [-1, -1, -1, -1, 1, 1], seed=s) for s in (0, 1)])
        better = [made("slopes", 0.1, h, seed=s) for s, h in enumerate(([1, 1, 1, 1, 1, -1], [-1, -1, -1, 0, 1, 1]))]
        found = accuracy_of(pd.concat([right, *better], ignore_index=True), 0.1)
        assert found[["arm", "seed", "gained", "lost", "pairs"]].to_numpy().tolist() == [
            ["slopes", 0, 4, 1, 6], ["slopes", 1, 0, 0, 6]]  # fmt: skip
        # 4 of 5 or more extreme, on both sides: 2·(C(5,4) + C(5,5))/2⁵
        assert found["p"].tolist() == pytest.approx([2 * (5 + 1) / 32, 1.0])
        assert found["holm"].tolist() == pytest.approx([2 * 2 * 6 / 32, 1.0])
        assert found["accuracy"].tolist() == pytest.approx([5 / 6, 2 / 6])

    def test_betas_by_hand(self):
        beta = [0.1, 0.2, 0.4, 0.3, 0.2, 0.8]
        rows = pd.concat(
            [made("constant", 0.1, [1.0] * 6), made("standard", 0.1, [1.0] * 6, beta=beta)], ignore_index=True
        )
        found = betas_of(rows).set_index("task")
        assert set(found["arm"]) == {"standard"} and (found["trainings"] == 2).all()
        assert found["beta"].to_dict() == pytest.approx({"math": 0.2, "code": 0.2, "dialogue": 0.6, "all": 0.25})
        half = 12.706204736 * 0.1  # t of one degree of freedom, times the standard error of 0.1 and 0.3
        assert (found["beta_low"]["math"], found["beta_high"]["math"]) == pytest.approx((0.2 - half, 0.2 + half))
        # ranks 1 2 3 in one training; entropies 0.15 0.3 0.8 with β 0.3 0.2 0.8 in the other: 1 and ½
        assert found["rho"]["all"] == pytest.approx(0.75) and math.isnan(found["rho"]["math"])
        assert found["ref_entropy"]["math"] == pytest.approx(0.125)

    def test_what_the_figure_shows(self):
        h = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0]
        beta = [5.0, 10.0, 20.0, 5.0, 10.0, 20.0]
        rows = pd.concat([made("constant", 0.1, h), made("inverse", 0.1, h, beta=beta)], ignore_index=True)
        slopes = slopes_of(rows)
        figure = figure_study(slopes, gains_of(rows, slopes, 0.1), betas_of(rows), scale=0.1)
        left, middle, right = figure.axes
        assert [float(line.get_ydata()[0]) for line in left.lines[:3]] == pytest.approx(
            [0.5, 0.5 * 3 / 5, 0.5 * 3 / 5]
        )  # math, code, dialogue
        assert [label.get_text() for label in middle.get_yticklabels()] == ["inverse"]
        assert right.lines[1].get_ydata().tolist() == pytest.approx([0.5, 1, 2])  # over the 10 at which it starts

    def test_with_constants_alone(self):
        rows = made("constant", 0.1, [1.0, 1.0, 1.0, 1.0, 2.0, 2.0])
        slopes, betas, accuracy = slopes_of(rows), betas_of(rows), accuracy_of(rows, 0.1)
        gains = gains_of(rows, slopes, 0.1)
        assert len(betas) == len(accuracy) == 0
        lines = sentences(StudyConfig(scales=(0.1,), epochs=(1,)), slopes, gains, betas, accuracy)
        assert len(lines) == 3 and "math 0.5 [" in lines[1] and lines[2].endswith("5 %): none.")
        assert len(figure_study(slopes, gains, betas, scale=0.1).axes) == 3


class TestSlopeArms:
    @pytest.fixture
    def place(self, tmp_path):
        """Runs of three folds of the middle constant: h = 1 in dialogue, and ±1 at 3:1 in math and code."""
        rows = [{"prompt": f"{i}", "task": "math" if i % 2 else "dialogue", "group": None, "ref_entropy": 1.0,
                 "ref_features": [float(i)]} for i in range(24)]  # fmt: skip
        pairs = Dataset.from_list(rows)
        config = StudyConfig(folds=3, seeds=1)
        (tmp_path / "runs").mkdir()
        for fold, own in enumerate(folds_by_group(pairs, 3, 0)):
            odd = [row for row in own if row % 2]
            h = [-1.0 if row in odd[:1] else 1.0 for row in own]
            self.write(tmp_path, fold, own, h)
        return config, tmp_path, Ground(None, None, None, pairs)

    def write(self, out, fold, rows, h):
        file = out / "runs" / f"{Job('constant', 0.1, fold, 0).name}.json"
        write_result(file, {"rows": rows, "h": {"1": h, "8": [0.0] * len(h)}})

    def betas(self, place, arm="slopes"):
        config, out, shared = place
        settings = config.training(ARMS[arm], 0.1, pairs=16, seed=0)
        return betas_by_slope(config, Job(arm, 0.1, 0, 0), settings, shared, out)

    def test_beta_is_the_scale_over_the_relative_slope(self, place, monkeypatch):
        kept = study_runs.allocate
        monkeypatch.setattr(study_runs, "allocate", lambda table, **more: kept(table, **{**more, "shrink": False}))
        # ½·E[h]/E[h²]: dialogue ½; math (6 − 2)/8 of that; all tasks (8 + 4)/16
        assert self.betas(place) == pytest.approx({"dialogue": 0.1 * 0.75, "math": 0.1 * 0.75 / 0.5})
        assert self.betas(place, "slopes-reversed") == pytest.approx({"dialogue": 0.1 / 0.75, "math": 0.1 * 0.5 / 0.75})

    def test_its_own_fold_is_not_read(self, place):
        before = self.betas(place)
        rows = folds_by_group(place[2].pairs, 3, 0)
        self.write(place[1], 0, rows[0], [-3.0] * len(rows[0]))
        assert self.betas(place) == before
        self.write(place[1], 1, rows[1], [-0.5, 2.0] * (len(rows[1]) // 2))  # the control
        assert self.betas(place) != before

    def test_where_nothing_is_gained_all_tasks_have_one_beta(self, place):
        for fold in (1, 2):
            rows = folds_by_group(place[2].pairs, 3, 0)[fold]
            self.write(place[1], fold, rows, [-1.0] * len(rows))
        assert self.betas(place) == {"dialogue": 0.1, "math": 0.1}


OPTIONS = {
    "model": "random:tiny", "folds": 2, "seeds": 1, "epochs": (1, 2), "scales": (0.1,), "batch-size": 5,
    "entropy-samples": 2, "max-new-tokens": 4, "policy-learning-rate": 1e-3, "arms": ("standard", "slopes-shuffled"),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    draw = random.Random(0)
    words = "alpha beta gamma delta one two three four".split()
    file = tmp_path_factory.mktemp("study") / "pairs.jsonl"
    with file.open("w") as lines:
        for i in range(30):
            answers = [" ".join(draw.choices(words, k=draw.randint(2, 7))) for _ in range(2)]
            row = {"prompt": f"{i} {draw.choice(words)}", "chosen": answers[0], "rejected": answers[1]}
            lines.write(json.dumps({**row, "task": ("math", "code", "dialogue")[i % 3]}) + "\n")
    return file


def config(data, **more):
    return StudyConfig(data=(str(data),), **{name.replace("-", "_"): value for name, value in OPTIONS.items()}, **more)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Let this process compute where the processes that it starts do: a GPU adds in another order each time."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, PartialState):
        state._reset_state()


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
class TestTiny:
    def test_killed_and_resumed_it_is_as_never_killed(self, data, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("DPOVIZ_CACHE", str(tmp_path / "cache"))
        words = ["study", "--data", str(data), "--out", str(tmp_path / "killed")]
        for name, value in OPTIONS.items():
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
        words += ["--workers", "1"]
        process = begin([*DPOVIZ, *words], DPOVIZ_CACHE=tmp_path / "cache")
        while not list(tmp_path.glob("killed/runs/*.json")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        while any(map(alive, workers)):
            time.sleep(0.05)
        ended = len(list(tmp_path.glob("killed/runs/*.json")))
        assert ended < 6
        assert main([*words, "--most", "0"]) == 0
        assert f"{6 - ended} of 6 trainings are left" in capsys.readouterr().out
        assert main(words) == 0  # and says what it goes on with
        printed = capsys.readouterr().out

        whole = tmp_path / "whole"
        settings = config(data)
        shared = ground(settings, whole, cache_dir=tmp_path / "cache")
        write_table(pairs_table(shared.pairs), whole / "pairs.csv")
        for job in jobs(settings):
            run_job(settings, job, whole)
        lines = write_study(settings, whole)
        assert printed.startswith(f"{6 - ended} of 6 trainings to do\n")
        assert all(line in printed for line in lines) and len(lines) == 7
        for name in TABLES:
            assert (whole / f"{name}.csv").read_bytes() == (tmp_path / "killed" / f"{name}.csv").read_bytes()
        runs = [read_result(file) for file in whole.glob("runs/*.json")]
        assert all(len(run["h"][epochs]) == 15 for run in runs for epochs in "12")
        assert all(any(abs(h) > 1e-3 for h in run["h"]["1"]) and run["h"]["1"] != run["h"]["2"] for run in runs)
        assert (whole / "study.png").stat().st_size > 10_000

    def test_adapters_leave_the_model_as_it_was(self, data, tmp_path):
        pytest.importorskip("peft")
        settings = config(data, lora_rank=2)
        model = ground(settings, tmp_path, cache_dir=None).model
        before = {name: p.clone() for name, p in model.named_parameters()}
        found = run_job(settings, Job("standard", 0.1, 0, 0), tmp_path)
        assert {name: True for name in before} == {name: torch.equal(p, before[name])
                                                   for name, p in model.named_parameters()}  # fmt: skip
        again = run_job(replace(settings, epochs=(1, 2)), Job("standard", 0.1, 0, 0), tmp_path / "other")
        assert again["h"] == found["h"] and max(map(abs, found["h"]["2"])) > 1e-3

    def test_a_batch_larger_than_the_folds_is_refused(self, data, tmp_path):
        with pytest.raises(ValueError, match="batch_size: got 16, expected at most 15"):
            study_runs.study(replace(config(data), batch_size=16), tmp_path, cache_dir=None, progress=False)
