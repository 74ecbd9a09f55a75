"""The experiment in small: its jobs, that they can be run one by one or go on, and what is made of their numbers."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from helpers.launch import flat

from dpoviz.analysis.statistics import effect, holm
from dpoviz.cli import main
from dpoviz.data.tasks import TASKS, preference_probability
from dpoviz.experiments import comparison_runs
from dpoviz.experiments.comparison import (
    BUDGETS,
    against,
    best_rates,
    differences,
    effects,
    gather,
    gather_betas,
    gather_reliability,
)
from dpoviz.experiments.comparison_config import CONTENDERS, CompareConfig, Job, jobs
from dpoviz.experiments.comparison_report import TABLES as RESULT_TABLES
from dpoviz.experiments.comparison_report import best_as_text, effects_as_text, reading_of_effects, write_comparison
from dpoviz.experiments.comparison_runs import compare, flip_labels, run_job
from dpoviz.training.config import RULES

SOME = ("constant", "network standard", "calibrated inverse", "shuffled, standard", "beta-dpo", "dual-kl-task")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="module")
def done(cache, tmp_path_factory):
    """A finished tiny experiment, run by two processes."""
    config, out = CompareConfig.fast(contenders=SOME), tmp_path_factory.mktemp("compare")
    compare(config, out, cache_dir=cache, workers=2, progress=False)
    return config, out


def read(out, job):
    return json.loads((out / "runs" / f"{job.name}.json").read_text())


def without_time(found):
    return {key: value for key, value in found.items() if key != "seconds"}


class TestJobs:
    def test_the_whole_experiment(self):
        config = CompareConfig()
        table = pd.DataFrame(jobs(config))
        main = table[table["phase"] == "main"]
        assert not table.duplicated().any()
        assert len({job.name for job in jobs(config)}) == len(table)
        assert set(main["contender"]) == set(CONTENDERS)
        for name, rows in main.groupby("contender"):
            assert set(rows["seed"]) == set(range(8))
            assert set(rows["noise"]) == ({0.15} if CONTENDERS[name].control else {0.0, 0.15, 0.3})
        assert len(main[main["contender"] == "constant"]) == 6 * 3 * 3 * 8  # values, rates, noise, seeds
        assert {CONTENDERS[name].method for name in CONTENDERS} <= set(RULES)
        # each method at its published default or at scales of the constants
        assert set(main[main["contender"] == "network inverse"]["value"]) <= set(config.constants)
        tuned = table[table["phase"] == "tuning"]
        assert tuned.groupby(["contender", "value", "seed"])["learning_rate"].nunique().eq(3).all()
        assert not set(tuned["seed"]) & set(main["seed"])

    def test_what_a_control_needs_comes_before_it(self):
        rows = [job for job in jobs(CompareConfig()) if job.phase == "main"]
        for place, job in enumerate(rows):
            if CONTENDERS[job.contender].control:
                source = CONTENDERS[job.contender].rates_of
                assert job._replace(contender=source) in rows[:place]

    @pytest.mark.parametrize(
        ("settings", "said"),
        [({"contenders": ("constant", "luck")}, r"contenders: got \['luck'\]"),
         ({"seeds": 2}, "at least 3"),
         ({"noise": (0.5,)}, "below 0.5"), ({"tuning_noise": 0.1}, "tuning_noise: got 0.1"),
         ({"scales": ()}, "scales: got"),
         ({"constants": (1, 1)}, "constants: got")],
    )  # fmt: skip
    def test_refused(self, settings, said):
        with pytest.raises(ValueError, match=said):
            CompareConfig.fast(**settings)

    def test_the_constant_always_takes_part(self):
        assert CompareConfig.fast(contenders=("lsc",)).contenders == ("constant", "lsc")


@pytest.mark.slow
class TestRuns:
    def test_every_job_left_its_file(self, done):
        config, out = done
        assert {path.stem for path in (out / "runs").iterdir()} == {job.name for job in jobs(config)}
        table = gather(config, out)
        assert len(table) == len(jobs(config))
        # so few steps may not meet every task, whose beta is then unknown
        numbers = table[[c for c in table if "/" in c and not c.startswith(("rho", "beta"))]]
        assert np.isfinite(numbers[table["phase"] == "main"]).all(axis=None)
        for name in ("kl", "reward"):
            for _, row in table.iterrows():
                assert row[f"{name}/all"] == pytest.approx(np.mean([row[f"{name}/{task}"] for task in TASKS]))

    def test_one_job_by_itself_gives_the_same(self, done, cache, tmp_path):
        """As a scheduler of a cluster runs them: tuning rows first, then any other."""
        config, out = done
        rows = jobs(config)
        for number, job in enumerate(rows):
            if job.seed >= 1000:
                compare(config, tmp_path, cache_dir=cache, only=number, progress=False)
        control = next(n for n, job in enumerate(rows) if CONTENDERS.get(job.contender, CONTENDERS["lsc"]).control)
        compare(config, tmp_path, cache_dir=cache, only=control, progress=False)
        alone = {path.stem for path in (tmp_path / "runs").iterdir()}
        source = rows[control]._replace(contender="network standard").name
        assert rows[control].name in alone and source in alone  # the control's beta comes from that run
        for name in alone:
            ours, theirs = (json.loads((place / "runs" / f"{name}.json").read_text()) for place in (tmp_path, out))
            assert json.dumps(without_time(ours)) == json.dumps(without_time(theirs))

    def test_goes_on_where_it_was(self, done, cache, tmp_path):
        config, out = done
        (tmp_path / "runs").mkdir()
        files = sorted((out / "runs").iterdir())
        for path in files[:-2]:  # with a time that no run would measure
            kept = {**json.loads(path.read_text()), "seconds": -1}
            (tmp_path / "runs" / path.name).write_text(json.dumps(kept))
        compare(config, tmp_path, cache_dir=cache, workers=1, progress=False)
        for path in files:
            ours, theirs = (json.loads((place / "runs" / path.name).read_text()) for place in (tmp_path, out))
            assert json.dumps(without_time(ours)) == json.dumps(without_time(theirs))
            assert (ours["seconds"] > 0) == (path in files[-2:])  # the others were not run again

    def test_main_needs_tuning(self, done, cache, tmp_path):
        config, _ = done
        with pytest.raises(ValueError, match=r"tuning jobs have not been run, first reference_reference_0_0_0_1000"):
            run_job(config, Job("main", "beta-dpo", 0.1, 0.0, 0.15, 0), tmp_path, cache)

    def test_no_such_row(self, done, cache):
        config, out = done
        with pytest.raises(ValueError, match=f"only: got {len(jobs(config))}, expected a row from 0"):
            compare(config, out, cache_dir=cache, only=len(jobs(config)))

    def test_the_shuffled_control_has_the_networks_betas(self, done):
        """The same values at other prompts: what is left to it is their distribution."""
        _, out = done
        row = {"phase": "main", "value": 0.1, "learning_rate": 0.0, "noise": 0.15, "seed": 0}
        source = read(out, Job(contender="network standard", **row))
        shuffled = read(out, Job(contender="shuffled, standard", **row))
        assert source["function_of_prompt"] and not shuffled["function_of_prompt"]
        given = np.array(shuffled["betas"]["beta"])
        of_network = np.array(source["training_betas"])
        assert all(np.abs(of_network - b).min() < 1e-6 * b for b in given)
        assert source["learning_rate"] == shuffled["learning_rate"]

    def test_calibrated_policy_and_beta_do_not_share_prompts(self, done, monkeypatch, cache, tmp_path):
        config, _ = done
        seen = []
        real = comparison_runs.train

        def watched(policy, beta, pairs, settings, *, beta_pairs=None, stage, **more):
            seen.append((stage, set(pairs["prompt"]), set(beta_pairs["prompt"]) if beta_pairs else None))
            return real(policy, beta, pairs, settings, beta_pairs=beta_pairs, stage=stage, **more)

        monkeypatch.setattr(comparison_runs, "train", watched)
        job = Job("tuning", "calibrated inverse", 0.1, 1e-3, 0.15, 1000)
        run_job(config, job, tmp_path, cache)
        (one, trained, _), (two, also, apart) = seen
        assert (one, two) == (1, 2) and trained == also and apart and not (apart & trained)

    def test_tables(self, done):
        config, out = done
        betas = gather_betas(config, out, noise=0.15, seed=0)
        assert set(betas["contender"]) == set(SOME) - {"constant", "shuffled, standard"} and (betas["beta"] > 0).all()
        bins = gather_reliability(config, out)
        pairs = {seed: read(out, Job("main", "beta-dpo", 0.1, 0.0, 0.15, seed))["reliability"] for seed in range(3)}
        of_rule = bins[bins["contender"] == "beta-dpo"]
        assert of_rule["n"].sum() == sum(sum(own["n"]) for own in pairs.values())
        total = sum(np.dot(own["n"], own["truth"]) for own in pairs.values())
        assert np.dot(of_rule["n"], of_rule["truth"]) == pytest.approx(total)


@pytest.mark.slow
class TestGround:
    def test_fresh_prompts_and_true_preferences(self, done, cache):
        config, _ = done
        ground = comparison_runs._ground(config, str(cache), 0)
        known = {*ground.world.train["prompt"], *ground.world.held_out["prompt"]}
        assert len(ground.problems) == 3 * config.prompts
        assert not known & {problem.prompt for problem in ground.problems}
        row = ground.world.held_out[5]
        expected = preference_probability(row["task"], row["reward_chosen"], row["reward_rejected"])
        assert ground.preference[5] == pytest.approx(expected)


class TestLabels:
    def pairs(self, n=400):
        return Dataset.from_dict({
            "prompt": [f"p{i}" for i in range(n)], "chosen": ["a"] * n, "rejected": ["b"] * n,
            "ref_chosen_logps": [1.0] * n, "ref_rejected_logps": [2.0] * n, "reward_chosen": [3.0] * n,
            "reward_rejected": [4.0] * n,
        })  # fmt: skip

    def test_all_of_a_pair_is_turned_or_nothing(self):
        found = flip_labels(self.pairs(), 0.3, seed=0).to_pandas()
        kept, turned = ("a", "b", 1.0, 2.0, 3.0, 4.0), ("b", "a", 2.0, 1.0, 4.0, 3.0)
        rows = set(found.drop(columns="prompt").itertuples(index=False, name=None))
        assert rows == {kept, turned}
        assert 0.2 < (found["chosen"] == "b").mean() < 0.4

    def test_more_noise_turns_the_same_and_more(self):
        some, more = (set(np.flatnonzero(np.array(flip_labels(self.pairs(), share, seed=0)["chosen"]) == "b"))
                      for share in (0.15, 0.3))  # fmt: skip
        assert some < more
        assert flip_labels(self.pairs(), 0.0, seed=0)["chosen"] == self.pairs()["chosen"]
        assert flip_labels(self.pairs(), 0.3, seed=1)["chosen"] != flip_labels(self.pairs(), 0.3, seed=0)["chosen"]


def write_runs(out, config, reward):
    """Result files as jobs would leave them, with numbers by hand."""
    (out / "runs").mkdir()
    for job in jobs(config):
        numbers = reward(job)
        (out / "runs" / f"{job.name}.json").write_text(json.dumps({**job._asdict(), **numbers}))


class TestRates:
    def test_chosen_by_hand(self, tmp_path):
        config = CompareConfig.fast(contenders=("constant", "beta-dpo"), learning_rates=(1.0, 2.0, 3.0))
        # constants: kl 1 and 2, rate 2 the best; the rule lies above that curve by 0.1 at rate 3 alone
        constants = {1.0: 0.4, 2.0: 0.6, 3.0: 0.5}

        def numbers(job):
            if job.contender == "reference":
                return {"reward/all": 0.2, "kl/all": 0.0}
            if job.contender == "constant":
                return {"reward/all": constants.get(job.learning_rate, 0), "kl/all": 1.0 if job.value == 0.4 else 2.0}
            # at rate 1 it earns most of all, at a KL at which the constant earns more
            found = {1.0: (0.55, 9.0), 2.0: (0.35, 0.5), 3.0: (0.5, 0.5)}
            reward, kl = found.get(job.learning_rate, (0, 0))
            return {"reward/all": reward, "kl/all": kl}

        write_runs(tmp_path, config, numbers)
        assert best_rates(config, tmp_path) == {"constant": 2.0, "beta-dpo": 3.0}


def table_by_hand(gaps, *, noises=(0.0, 0.3), seeds=5):
    """Constants on the line reward = 0.2 + 0.1·kl + seed/100, two runs of a rule above it by `gaps[noise][seed]`."""
    rows = []
    for seed in range(seeds):
        line = {f"reward/{t}": 0.2 + seed / 100 for t in (*TASKS, "all")}
        rows.append({"phase": "reference", "contender": "reference", "noise": 0.0, "seed": seed, **line})
        for noise in noises:
            for name, gap in (("constant", 0.0), ("rule", gaps[noise][seed]), ("other", 0.0)):
                for kl in (1.0, 2.0, 4.0) if name == "constant" else (1.5, 3.0):
                    numbers = {f"kl/{t}": kl for t in (*TASKS, "all")}
                    numbers |= {f"reward/{t}": 0.2 + seed / 100 + 0.1 * kl + gap for t in (*TASKS, "all")}
                    numbers["s/all"] = 1 / kl  # the constants': 1, 1/2, 1/4
                    place = {"phase": "main", "contender": name, "noise": noise, "seed": seed, "learning_rate": 1.0}
                    rows.append({**place, **numbers})
                    if name == "constant":  # at another rate they earn more at a KL of 4, and count for budgets alone
                        more = {f"reward/{t}": numbers[f"reward/{t}"] + (0.05 if kl == 4.0 else -0.3) for t in
                                (*TASKS, "all")}  # fmt: skip
                        rows.append({**place, **numbers, **more, "learning_rate": 2.0})
    return pd.DataFrame(rows)


GAPS = {0.0: [0.01, 0.02, 0.03, 0.02, 0.02], 0.3: [0.05, 0.04, 0.06, 0.05, 0.08]}


class TestWhatItSays:
    def test_differences(self):
        found = differences(table_by_hand(GAPS)).set_index(["contender", "noise", "seed", "task"])
        assert len(found) == 3 * 2 * 5 * 4
        row = found.loc["rule", 0.3, 4, "math"]
        assert row["above"] == pytest.approx(0.08)
        # from its first run (1.5) to its last (3) it is above by the gap everywhere
        assert row["area"] == pytest.approx(0.08)
        assert row["best/0.5"] == pytest.approx(0.24 + (0.15 + 0.08) / 3)
        assert row["best/2"] == pytest.approx(0.24 + 0.2 + 0.08)
        assert row["best_difference/2"] == pytest.approx(0.08)
        assert row["best_difference/4"] == pytest.approx(0.3 + 0.08 - 0.45)
        assert found.xs("other", level="contender")["above"].abs().max() < 1e-12
        # at s = 2/3, between the constants of 1 and 1/2, by the log; at 1/3 between 1/2 and 1/4
        kl = np.mean([1 + math.log(1.5, 2) - 1.5, 2 + 2 * math.log(1.5, 2) - 3])
        assert row["mean_scale/kl"] == pytest.approx(-kl)
        assert row["mean_scale/reward"] == pytest.approx(-0.1 * kl + 0.08)
        assert {f"best/{b:g}" for b in BUDGETS} <= set(found.columns)

    def test_effects(self):
        found = effects(differences(table_by_hand(GAPS)))
        assert set(found["contender"]) == {"rule", "other"}
        rows = found[found["contender"] == "rule"].set_index(["noise", "task"])
        assert rows.loc[0.3, "code"]["mean"] == pytest.approx(np.mean(GAPS[0.3]))
        # over all noise: the mean of a seed first, so that n stays the number of seeds
        pooled = (np.array(GAPS[0.0]) + GAPS[0.3]) / 2
        whole = found[(found["contender"] == "rule") & found["noise"].isna() & (found["task"] == "all")].iloc[0]
        expected = effect(pooled)
        assert whole[["mean", "p", "n", "detectable"]].tolist() == pytest.approx(
            [expected.mean, expected.p, 5, expected.detectable]
        )
        p = found[found["noise"].isna() & (found["task"] == "all")]
        assert p["holm"].tolist() == pytest.approx(holm(p["p"]).tolist())

    def test_against(self):
        found = against(differences(table_by_hand(GAPS)), "rule", "other").set_index("task")
        pooled = (np.array(GAPS[0.0]) + GAPS[0.3]) / 2
        assert found.loc["all", "mean"] == pytest.approx(pooled.mean())
        assert found.loc["all", "p"] == pytest.approx(effect(pooled).p)

    @pytest.mark.slow
    def test_of_the_real_thing(self, done):
        config, out = done
        found = effects(differences(gather(config, out)))
        assert set(found["contender"]) == set(SOME) - {"constant"}
        assert np.isfinite(found[["mean", "low", "high", "p", "holm"]]).all(axis=None)
        assert math.isfinite(found["detectable"].sum())


def test_reliability_of_two_seeds_is_pooled_by_pairs(tmp_path):
    config = replace(CompareConfig.fast(contenders=("constant",)), constants=(0.1,))
    bins = {0: {"bin": [3], "n": [10], "predicted": [0.3], "truth": [0.5]},
            1: {"bin": [3], "n": [30], "predicted": [0.34], "truth": [0.1]}}  # fmt: skip
    empty = {"bin": [], "n": [], "predicted": [], "truth": []}
    write_runs(tmp_path, config, lambda job: {"reliability": bins.get(job.seed, empty)})
    found = gather_reliability(config, tmp_path)
    row = found[found["bin"] == 3].iloc[0]
    assert row["n"] == 40 and row["predicted"] == pytest.approx(0.33) and row["truth"] == pytest.approx(0.2)


class TestResults:
    @pytest.mark.slow
    def test_left_in_the_folder(self, done):
        config, out = done
        measured = write_comparison(config, out)
        assert {f"{name}.csv" for name in (*RESULT_TABLES, "differences", "effects")} <= {p.name for p in out.iterdir()}
        for name in ("frontier", "parts", "reliability", "betas", "effects"):
            assert (out / f"{name}.png").stat().st_size > 10_000
        # five digits are written: the tables that are read again say the same
        again = effects(differences(pd.read_csv(out / "compare.csv")))
        assert again["mean"].to_numpy() == pytest.approx(measured["mean"].to_numpy(), abs=2e-5)
        text = effects_as_text(measured)
        for name in set(SOME) - {"constant"}:
            assert name in text
        assert best_as_text(differences(gather(config, out))).count("±") == len(SOME) * len(BUDGETS)

    def test_sentences_follow_from_the_numbers(self):
        found = effects(differences(table_by_hand(GAPS)))
        above, below, fine = reading_of_effects(found)
        assert above == "Beyond noise above the constants (Holm's p below 5 %): rule (+0.0380)."
        assert below == "Beyond noise below the constants (Holm's p below 5 %): none."
        assert fine.startswith("Half of the contenders were tested finely enough to find a difference of 0.0")
        worse = effects(differences(table_by_hand({noise: [-v for v in own] for noise, own in GAPS.items()})))
        assert reading_of_effects(worse)[1].endswith("rule (-0.0380).")

    def test_constants_alone(self):
        assert effects_as_text(pd.DataFrame()) == "nothing to compare the constants with"
        assert reading_of_effects(pd.DataFrame()) == []


class TestCommand:
    @pytest.mark.slow
    def test_by_rows_and_as_a_whole(self, cache, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("DPOVIZ_CACHE", str(cache))
        command = ["compare", "--fast", "--out", str(tmp_path / "o"), "--contenders", "constant", "entropy standard"]
        assert main([*command, "--only", "0"]) == 0
        first, *_ = names = [job.name for job in jobs(CompareConfig.fast(contenders=("constant", "entropy standard")))]
        assert [path.stem for path in (tmp_path / "o" / "runs").iterdir()] == [first]
        assert main([*command, "--workers", "1"]) == 0
        assert sorted(path.stem for path in (tmp_path / "o" / "runs").iterdir()) == sorted(names)
        assert "entropy standard" in capsys.readouterr().out
        assert main(["compare", "--fast", "--out", str(tmp_path / "o"), "--seeds", "4"]) == 2
        said = capsys.readouterr().err
        assert "seeds is 3 there and 4 here" in said and "contenders is ['constant', 'entropy standard'] there" in said

    @pytest.mark.parametrize(
        ("options", "said"),
        [(["--contenders", "constant", "luck"], r"contenders: got \['luck'\]"), (["--workers", "0"], "workers: got 0"),
         (["--only", "-1"], "only: got -1")],
    )  # fmt: skip
    def test_refused(self, tmp_path, capsys, options, said):
        assert main(["compare", "--fast", "--out", str(tmp_path / "o"), *options]) == 2
        assert re.search(said, flat(capsys.readouterr().err))
