"""The comparison: its jobs, its worlds, what it measures at equal KL, and what is made of the numbers."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import ttest_rel

from dpoviz.analysis.statistics import detectable_mean, holm
from dpoviz.cli import main
from dpoviz.data import tasks
from dpoviz.experiments import comparison_runs
from dpoviz.experiments.comparison import (
    IDEAL,
    best_settings,
    by_condition,
    contrasts,
    finished_worlds,
    gather,
    pooled_shares,
)
from dpoviz.experiments.comparison_config import (
    BUDGETS,
    CONDITIONS,
    CONSTANT,
    MAIN_CONDITIONS,
    ORACLE,
    PHASES,
    RETILTED,
    TRAINED,
    TRUE_SLOPES,
    TURN,
    CompareConfig,
    Job,
    jobs,
)
from dpoviz.experiments.comparison_pool import Pool, score
from dpoviz.experiments.comparison_report import contrasts_as_text, reading_of_contrasts, write_comparison
from dpoviz.experiments.comparison_runs import (
    OWN_RULES,
    AnswerTables,
    chosen_rows,
    compare,
    factors,
    gain_by_answers,
    halve_scale,
    run_job,
)
from dpoviz.experiments.comparison_worlds import draw_world
from dpoviz.experiments.config import WorldConfig
from dpoviz.lm import models
from dpoviz.lm.cache import read_result, write_result
from dpoviz.lm.scoring import score_answers
from dpoviz.training.config import RULES

SMALL = CompareConfig.fast(
    reference=WorldConfig(problems=60, samples=6), prompts=8, slope_prompts=5, evaluation_prompts=6
)


@pytest.fixture(scope="module")
def pool():
    """A pool of answers by hand, scored by an untrained model: no reference learns to give them."""
    problems = [p for task in tasks.TASKS for p in tasks.sample_problems(task, SMALL.reference.problems, 0)]
    texts = [[p.key, "wrong 1", "Thank you!", f"Please: {p.key}", "wrong 1", "no"] for p in problems]
    tokenizer = models.tiny_tokenizer([p.prompt for p in problems], 300)
    reference = models.tiny_lm(tokenizer, hidden_size=16, layers=1, heads=2).eval()
    ids = [[[*answer, tokenizer.eos_token_id] for answer in tokenizer(own)["input_ids"]] for own in texts]
    prompt_ids = tokenizer([p.prompt for p in problems])["input_ids"]
    rewards = np.array([[tasks.reward(p, text) for text in own] for p, own in zip(problems, texts, strict=True)])
    scores = score(reference, prompt_ids, ids, tokenizer.pad_token_id)
    return Pool(reference, tokenizer, problems, prompt_ids, ids, texts, rewards, *scores)


class TestJobs:
    def test_the_whole_experiment(self):
        config = CompareConfig()
        rows = jobs(config)
        table = pd.DataFrame(rows)
        assert len({job.name for job in rows}) == len(rows)
        assert list(dict.fromkeys(table["phase"])) == list(PHASES)
        measured = table[table["phase"] == "main"]
        assert set(measured["world"]) == set(range(12)) and set(measured["contender"]) == set(TRAINED)
        assert measured.groupby(["world", "condition"]).size().unique().tolist() == [len(TRAINED), len(TRAINED) - 1]
        assert measured["world"].is_monotonic_increasing  # a comparison that is stopped has whole worlds
        tuning = table[table["phase"] != "main"]
        assert tuning["world"].nunique() >= 6 and set(tuning["condition"]) == set(MAIN_CONDITIONS)
        assert not set(tuning["world"]) & set(measured["world"])
        assert tuning.groupby(["world", "contender"]).size().unique().tolist() == [len(config.grid)] == [8]
        assert set(tuning["contender"]) == set(TRAINED)
        fewer = pd.DataFrame(jobs(replace(config, tuned=("lsc",))))
        assert set(fewer[fewer["phase"] == "tuning"]["contender"]) == {CONSTANT, "lsc"}
        assert {contender.rule for contender in TRAINED.values()} <= {*RULES, *OWN_RULES}

    def test_other_lengths_and_scales_have_the_labels_of_flips_by_task(self):
        others = {name: own for name, own in CONDITIONS.items() if name not in MAIN_CONDITIONS}
        assert {own._replace(epochs=None, scale=None) for own in others.values()} == {CONDITIONS["flips by task"]}
        assert {(own.epochs, own.scale) for own in others.values()} == {(0.5, 0.4), (2, 0.4), (8, 0.4), (2, 1.6)}
        only = CompareConfig(conditions=("eight epochs, s 0.4",))
        assert {job.condition for job in jobs(only)} == {"eight epochs, s 0.4"}  # rate and scale are chosen there

    def test_label_smoothing_where_labels_are_flipped(self):
        main = [job for job in jobs(CompareConfig()) if job.phase == "main"]
        where = {job.condition for job in main if job.contender == "label smoothing"}
        assert where == set(CONDITIONS) - {"pairs by task"}

    @pytest.mark.parametrize(
        ("settings", "said"),
        [({"contenders": ("luck",)}, r"contenders: got \['luck'\]"), ({"worlds": 2}, "at least 3"),
         ({"tuned": ("luck",)}, r"tuned: got \['luck'\]"), ({"conditions": ()}, "conditions: got"),
         ({"scales": (0.1, 0.1)}, "scales: got"), ({"learning_rates": (0.0,)}, "learning_rates: got"),
         ({"evaluation_prompts": 50}, r"reference\.problems: got 60")],
    )  # fmt: skip
    def test_refused(self, settings, said):
        with pytest.raises(ValueError, match=said):
            CompareConfig.fast(**settings)

    def test_the_constant_always_takes_part(self):
        assert CompareConfig.fast(contenders=("lsc",)).contenders == (CONSTANT, "lsc")

    def test_rows_by_number(self):
        assert list(chosen_rows("7", 9)) == [7] and list(chosen_rows("2-4", 5)) == [2, 3, 4]
        for wrong in ("9", "2-9", "4-2", "-3", "2-", "a", ""):
            with pytest.raises(ValueError, match="only: got"):
                chosen_rows(wrong, 9)


class TestPool:
    def test_equal_answers_are_scored_once_and_get_the_same(self, pool):
        """As each answer alone: equal ones, several prompts in a row and their order change nothing."""
        for p in (0, 70, 179):
            one = score_answers(pool.reference, [pool.prompt_ids[p]], [pool.answers[p]],
                                pad_id=pool.tokenizer.pad_token_id, entropy=True, features=True)  # fmt: skip
            assert pool.logps[p] == pytest.approx(one.logps[0].detach().numpy(), abs=1e-4)
            assert pool.entropies[p] == pytest.approx(one.entropy_sums[0].detach().numpy(), abs=1e-4)
            assert pool.features[p] == pytest.approx(one.features[0].detach().numpy(), abs=1e-5)
        assert (pool.logps[:, 1] == pool.logps[:, 4]).all() and np.ptp(pool.logps[:, :4], axis=1).min() > 0


class TestWorlds:
    def prompts(self, world):
        train, held_out = ({int(p) for p in part["prompt"]} for part in (world.train, world.held_out))
        return train, held_out | set(world.scored), set(world.evaluation)

    def test_no_prompt_serves_two_purposes(self, pool):
        for number in (0, 3, 1000):
            train, slope, evaluation = self.prompts(draw_world(SMALL, pool, CONDITIONS["flips by task"], number))
            assert len(evaluation) == 3 * SMALL.evaluation_prompts and len(slope) == 3 * SMALL.slope_prompts
            assert not train & slope and not train & evaluation and not slope & evaluation

    def test_tuning_and_measured_worlds_share_no_prompt(self, pool):
        def union(numbers):
            return set().union(*(set().union(*self.prompts(draw_world(SMALL, pool, CONDITIONS["uniform noise"], n)))
                                 for n in numbers))  # fmt: skip

        assert not union(range(3)) & union(range(1000, 1003))

    def test_conditions_share_prompts_and_differ_in_labels(self, pool):
        """The same pairs with and without flips; what is flipped is flipped whole, at the rate of its task."""
        rows = []
        for number in range(6):
            clean, noisy = (
                draw_world(
                    SMALL, pool, CONDITIONS[name]._replace(flips=flips, pairs=(8, 8, 8)), number
                ).train.to_pandas()
                for name, flips in (("flips by task", (0, 0, 0)), ("flips by task", (0.0, 0.1, 0.35)))
            )
            assert clean["prompt"].tolist() == noisy["prompt"].tolist()
            turned = clean["ref_chosen_logps"] != noisy["ref_chosen_logps"]
            assert (clean["ref_chosen_logps"] == noisy["ref_rejected_logps"])[turned].all()
            rows.append(pd.DataFrame({"task": clean["task"], "turned": turned}))
        shares = pd.concat(rows).groupby("task")["turned"].mean()
        assert shares["math"] == 0 and 0.05 < shares["code"] < 0.15 and 0.25 < shares["dialogue"] < 0.45

    def test_pairs_per_prompt(self, pool):
        world = draw_world(SMALL, pool, CONDITIONS["pairs by task"], 0).train.to_pandas()
        most = world.groupby(["task", "prompt"]).size().groupby("task").max()
        assert most["math"] <= 2 < most["dialogue"]

    def test_columns_are_those_of_the_answers(self, pool):
        row = draw_world(SMALL, pool, CONDITIONS["uniform noise"], 1).train[3]
        p, length = int(row["prompt"]), sum(len(answer) for answer in pool.answers[int(row["prompt"])])
        j = pool.answers[p].index(row["rejected_ids"])
        assert row["ref_rejected_logps"] == pool.logps[p, j] and row["task"] == pool.problems[p].task
        assert row["ref_entropy"] == pytest.approx(pool.entropies[p].sum() / length)  # nats per token

    def test_a_task_without_pairs_is_named(self, pool):
        flat = pool._replace(texts=[["wrong 1"] * 6 if p.task == "code" else t for p, t in
                                    zip(pool.problems, pool.texts, strict=True)])  # fmt: skip
        with pytest.raises(ValueError, match=r"reference: world 2 has no training pairs of code"):
            draw_world(SMALL, flat, CONDITIONS["uniform noise"], 2)


class TestEqualKL:
    """Against the definition, in NumPy."""

    @pytest.fixture
    def tables(self, pool):
        prompts = [0, 1, 2, 60, 61, 62, 120, 121, 122]
        h = np.random.default_rng(0).normal(size=(9, 6)) * np.repeat([1.0, 2.0, 4.0], 3)[:, None]
        return AnswerTables(pool, prompts, h), h, pool.rewards[prompts]

    def tilted(self, h, a):
        weights = np.exp(a * h)
        return weights / weights.sum(axis=1, keepdims=True)

    def test_one_factor_puts_the_mean_kl_at_the_budget(self, tables):
        own, h, rewards = tables
        found = own.at_budgets(dict.fromkeys(tasks.TASKS, 1.0))

        def kl(a):
            p = self.tilted(h, a)
            return (p * np.log(6 * p)).sum(axis=1).mean()

        for budget in BUDGETS:
            a = brentq(lambda a, budget=budget: kl(a) - budget, 0, 20)
            row = found[f"{budget:g}"]
            assert row["kl"]["all"] == pytest.approx(budget, abs=1e-8) and row["a"]["all"] == pytest.approx(a)
            assert row["reward"]["all"] == pytest.approx((self.tilted(h, a) * rewards).sum(axis=1).mean())
            assert row["reward"]["code"] == pytest.approx((self.tilted(h, a) * rewards).sum(axis=1)[3:6].mean())

    def test_the_oracle_earns_most_of_all_factors_by_task(self, tables):
        own, h, rewards = tables
        rng = np.random.default_rng(1)
        best = own.oracle()
        for found in best.values():  # one factor per task, no more: they alone give the same reward
            a = np.repeat([found["a"][task] for task in tasks.TASKS], 3)[:, None]
            assert found["reward"]["all"] == pytest.approx((self.tilted(h, a) * rewards).sum(axis=1).mean())
        for _ in range(40):
            rule = own.at_budgets(dict(zip(tasks.TASKS, rng.exponential(size=3), strict=True)))
            for budget in best:
                assert rule[budget]["reward"]["all"] <= best[budget]["reward"]["all"] + 1e-6
        assert all(best[f"{budget:g}"]["kl"]["all"] <= budget + 1e-6 for budget in BUDGETS)

    def test_no_tilt_is_the_reference(self, tables):
        own, _, rewards = tables
        assert own.means(torch.zeros(9))["reward"]["math"] == pytest.approx(rewards[:3].mean())

    def test_factors_of_slopes(self):
        found = factors({"math": 0.2, "code": 0.1, "dialogue": -1.0})
        assert found == pytest.approx({"math": 0.2, "code": 0.1, "dialogue": 0.02})
        assert set(factors({"math": -0.2, "code": -0.1, "dialogue": 0.0}).values()) == {1.0}  # nothing to go by


@pytest.fixture
def by_hand(pool, monkeypatch):
    monkeypatch.setattr(comparison_runs, "pool", lambda *_: pool)
    comparison_runs._world.cache_clear()
    yield replace(SMALL, conditions=("flips by task",), epochs=0.2, scales=(0.4,))
    comparison_runs._world.cache_clear()


def test_half_the_scale(by_hand, pool, monkeypatch, tmp_path):
    """Where the second went exactly twice as far, up to a constant per prompt, re-tilting by 2 gives that policy."""
    rng = np.random.default_rng(0)
    h = rng.normal(size=(3 * SMALL.evaluation_prompts, 6))
    ratios = {0.4: h, 0.2: 2 * h + rng.normal(size=(len(h), 1))}
    monkeypatch.setattr(comparison_runs, "_trained", lambda _config, _job, _rate, scale, *_: (scale, scale))
    monkeypatch.setattr(comparison_runs, "_log_ratios", lambda _pool, scale, _prompts: ratios[scale])
    found = halve_scale(by_hand, 0, 1e-3, 0.4, tmp_path)
    assert found["correlation"] == pytest.approx(1) and found["ratio"] == pytest.approx(2) and found["margin"] == 0.4
    for measure in ("kl", "gain"):
        assert found[f"{measure}_retilted"] == pytest.approx(found[f"{measure}_retrained"])
        assert found[f"{measure}_once"] != pytest.approx(found[f"{measure}_retrained"])
    assert found["gain_once_at_0.3"] == pytest.approx(found["gain_retrained_at_0.3"])


def test_slopes_from_all_answers_earn_what_the_true_slopes_do(by_hand, monkeypatch, tmp_path):
    """Where the scored prompts are those of the evaluation, all of their answers give the true slopes, two do not."""
    ratios = np.random.default_rng(2).normal(size=(180, 6)) * np.repeat([1.0, 0.3, 2.0], 60)[:, None]
    drawn = draw_world(by_hand, comparison_runs.pool(), CONDITIONS["flips by task"], 0)
    monkeypatch.setattr(comparison_runs, "draw_world", lambda *_: drawn._replace(scored=drawn.evaluation))
    monkeypatch.setattr(comparison_runs, "_trained", lambda *_: (None, 0.0))
    monkeypatch.setattr(comparison_runs, "_log_ratios", lambda _pool, _policy, prompts: ratios[prompts])
    few, whole = gain_by_answers(by_hand, "flips by task", 0, 1e-3, 0.4, tmp_path, counts=(2, 6))
    assert whole["gain"] == pytest.approx(whole["gain_all"]) and few["gain"] != pytest.approx(few["gain_all"], rel=1e-3)
    assert few["answers"] == 2 * by_hand.slope_prompts


@pytest.mark.slow
class TestRuns:
    def test_a_whole_comparison_and_one_that_goes_on(self, by_hand, tmp_path):
        one, two = tmp_path / "one", tmp_path / "two"
        config = replace(by_hand, contenders=tuple(TRAINED))
        rows = jobs(config)
        with pytest.raises(ValueError, match="1 tuning jobs have not been run, first tuning_label-smoothing"):
            run_job(config, rows[-1], one, tmp_path)
        compare(config, one, cache_dir=tmp_path, workers=1, progress=False)
        table = gather(config, one)
        assert finished_worlds(config, table) == [0, 1, 2]
        measured = table[table["phase"] == "main"]
        assert set(measured["contender"]) == {*TRAINED, *RETILTED, IDEAL}
        assert np.isfinite(measured[["reward", "kl", "a"]]).all(axis=None)
        exact = measured[(measured["task"] == "all") & ~measured["contender"].isin([ORACLE, "1/b shuffled"])]
        assert (exact["kl"] - exact["budget"]).abs().max() < 1e-6
        wide = measured[measured["task"] == "all"].pivot_table("reward", ["condition", "world", "budget"], "contender")
        assert (wide[ORACLE] >= wide[CONSTANT] - 1e-9).all() and (wide.sub(wide[IDEAL], axis=0) < 1e-6).all(axis=None)
        # as a scheduler's jobs: rows and ranges of rows, on top of what is there, which is not run again
        left = {job.name for job in rows[-3:]}
        (two / "runs").mkdir(parents=True)
        for path in (one / "runs").iterdir():
            if path.stem not in left:  # with a time that no run would measure
                write_result(two / "runs" / path.name, {**read_result(path), "cpu_seconds": -1})
        last = len(rows) - 1
        for only in (str(last), f"{last - 4}-{last - 1}"):
            compare(config, two, cache_dir=tmp_path, only=only, workers=1, progress=False)
        for path in (one / "runs").iterdir():
            first, second = (read_result(place / "runs" / path.name) for place in (one, two))
            assert (second["cpu_seconds"] > 0) == (path.stem in left)
            for name in ("seconds", "cpu_seconds"):
                first.pop(name), second.pop(name)
            assert first == second
        assert len(pd.read_csv(two / "jobs.csv")) == len(rows)

    def test_the_command(self, tmp_path, monkeypatch, capsys):
        """Processes that share a cold cache, then tables, pictures and sentences."""
        monkeypatch.setenv("DPOVIZ_CACHE", str(tmp_path / "cache"))
        assert main(["compare", "--fast", "--workers", "2", "--out", str(tmp_path / "out")]) in (None, 0)
        said = capsys.readouterr().out
        assert "share of the oracle's gain" in said and "four times in five" in said
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"compare.csv", "tuning.csv", "contrasts.csv", "contrasts.png", "levels.png", "kl_by_task.png"} <= names


def write_runs(config, out, reward):
    """Result files as jobs would leave them, with rewards by hand: `reward(job, name)`, the same at every budget."""
    (out / "runs").mkdir(parents=True)
    for job in jobs(config):
        names = ["own", *((*RETILTED, IDEAL) if job.contender == CONSTANT and job.phase == "main" else ())]
        results = {}
        for name in names:
            values = dict.fromkeys([*tasks.TASKS, "all"], float(reward(job, name)))
            one = dict.fromkeys(values, 1.0)
            results[name] = {f"{b:g}": {"reward": values, "kl": dict.fromkeys(values, b), "a": one} for b in BUDGETS}
        found = {"margin": 0.5, "cpu_seconds": 1.0, "reference": dict.fromkeys(values, 0.3), "results": results}
        found |= {**job._asdict(), "learning_rate": job.learning_rate or 1e-3, "scale": job.scale or 0.4}
        write_result(out / "runs" / f"{job.name}.json", found)


class TestSettings:
    @pytest.fixture
    def config(self):
        return CompareConfig.fast(learning_rates=(1.0, 2.0, 3.0), scales=(0.1, 0.4, 1.6), tuning_worlds=2,
                                  contenders=(CONSTANT, "ada-dpo"), tuned=("ada-dpo",))  # fmt: skip

    def test_a_cross_through_the_middle(self, config):
        assert config.grid == [(1.0, 0.4), (2.0, 0.4), (3.0, 0.4), (2.0, 0.1), (2.0, 1.6)]

    def test_the_highest_reward_over_the_tuning_worlds(self, tmp_path, config):
        def reward(job, _):
            if job.contender == CONSTANT:  # the best in one world is not the best over both
                one = {1000: {(1.0, 0.4): 0.9, (2.0, 1.6): 0.6}, 1001: {(2.0, 1.6): 0.5}}.get(job.world, {})
                return one.get((job.learning_rate, job.scale), 0.0)
            return {0.1: 0.4, 0.4: 0.3}.get(job.scale, 0.0)

        write_runs(config, tmp_path, reward)
        assert best_settings(config, tmp_path, CONSTANT) == (2.0, 1.6)
        assert best_settings(config, tmp_path, "ada-dpo") == (2.0, 0.1)
        assert best_settings(replace(config, tuned=()), tmp_path, "ada-dpo") == (2.0, 1.6)
        next((tmp_path / "runs").glob("tuning_ada*1001*")).unlink()
        with pytest.raises(ValueError, match="1 tuning jobs have not been run, first tuning_ada-dpo"):
            best_settings(config, tmp_path, "ada-dpo")


CONSTANTS = [0.40, 0.42, 0.38, 0.41]
ABOVE = {"ada-dpo": [0.0102, 0.0105, 0.0100, 0.0103], "network, standard": [-0.004, 0.006, 0.001, -0.002]}


def hand_made(job, name):
    start = CONSTANTS[job.world % 1000 % 4]
    if name == "own":
        return start + ABOVE.get(job.contender, [0.0] * 4)[job.world % 1000 % 4]
    return start + {ORACLE: 0.02, IDEAL: 0.2, "1/b shuffled": -0.01}.get(name, 0.015) + 0.001 * job.world


class TestContrasts:
    @pytest.fixture
    def finished(self, tmp_path):
        config = CompareConfig.fast(worlds=4, contenders=(CONSTANT, *ABOVE), conditions=tuple(CONDITIONS))
        write_runs(config, tmp_path, hand_made)
        return config, tmp_path

    def test_against_scipy(self, finished):
        found = contrasts(gather(*finished)).set_index(["condition", "budget", "contender"])
        assert len(found) == len(CONDITIONS) * 3 * (len(ABOVE) + len(RETILTED) + 1)
        row, above = found.loc["pairs by task", 0.3, "ada-dpo"], ABOVE["ada-dpo"]
        test = ttest_rel(np.add(CONSTANTS, above), CONSTANTS)
        low, high = test.confidence_interval()
        assert row["p"] == pytest.approx(test.pvalue) and (row["low"], row["high"]) == pytest.approx((low, high))
        assert row["n"] == 4 and row["mean"] == pytest.approx(np.mean(above))
        most = 0.02 + 0.001 * 1.5  # the oracle's mean gain over four worlds
        assert row["share"] == pytest.approx(np.mean(above) / most) and row["share_high"] == pytest.approx(high / most)
        gain = np.mean(CONSTANTS) - 0.3
        assert row["detectable_share"] == pytest.approx(detectable_mean(np.std(above, ddof=1), 4) / gain)
        assert found.loc["flips by task", 1.0, ORACLE]["share"] == pytest.approx(1)

    def test_shares_over_conditions_are_mean_over_mean(self, finished):
        """Where the oracle gains ten times as much in one condition, that condition has ten times the weight."""
        table = gather(*finished)
        wide = (table["condition"] == "pairs by task") & (table["contender"] == ORACLE)
        table.loc[wide, "reward"] += 0.2
        found = pooled_shares(table, ["ada-dpo", "1/b shuffled"]).set_index(["contender", "budget"])
        most = 0.0215 + 0.2 / len(CONDITIONS)
        assert found.loc[("ada-dpo", 0.3), "share"] == pytest.approx(np.mean(ABOVE["ada-dpo"]) / most)
        low, high = ttest_rel(np.add(CONSTANTS, ABOVE["ada-dpo"]), CONSTANTS).confidence_interval()
        assert found.loc[("ada-dpo", 1.0), ["low", "high"]].tolist() == pytest.approx([low / most, high / most])

    def test_the_turn_is_the_difference_of_the_two_orders(self, tmp_path):
        effects = {"1/b in training": [0.010, 0.013, 0.007, 0.014], "b in training": [-0.002, 0.004, 0.001, 0.003]}
        config = CompareConfig.fast(worlds=4, contenders=(CONSTANT, *effects))
        write_runs(config, tmp_path, lambda job, name: hand_made(job, name) + (
            effects.get(job.contender, [0.0] * 4)[job.world % 4] if name == "own" else 0.0))  # fmt: skip
        row = contrasts(gather(config, tmp_path)).set_index(["contender", "budget"]).loc[TURN, 0.3]
        test = ttest_rel(*effects.values())
        assert row["mean"] == pytest.approx(0.0095) and row["p"] == pytest.approx(test.pvalue)
        assert np.isfinite(row["holm"])

    def test_one_correction_over_all_that_is_tested(self, finished):
        found = contrasts(gather(*finished))
        tested = ~found["contender"].isin([ORACLE, IDEAL, TRUE_SLOPES])
        assert found.loc[~tested, "holm"].isna().all()
        assert found.loc[tested, "holm"].tolist() == pytest.approx(holm(found.loc[tested, "p"].tolist()).tolist())
        assert tested.sum() == len(CONDITIONS) * 3 * (len(ABOVE) + len(RETILTED) - 2)

    def test_what_it_says(self, finished):
        found = contrasts(gather(*finished))
        text = contrasts_as_text(found, "flips by task")
        assert "+0.0102 [" in text and "KL 0.1" in text and "100 %" in text
        lines = reading_of_contrasts(found)
        above = lines[len(CONDITIONS)]
        assert "ada-dpo (flips by task at 0.1, 0.3, 1; pairs by task at 0.1" in above and "network" not in above
        assert lines[0].startswith("flips by task: the best factor per task earns +0.0215 at 0.1 nats")

    def test_what_training_came_to(self, finished):
        table = gather(*finished)
        table.loc[(table["condition"] == "eight epochs, s 0.4") & (table["contender"] == CONSTANT), "margin"] = 2.5
        found = by_condition(table, ["flips by task", "eight epochs, s 0.4"])
        assert found.index.tolist() == ["flips by task", "eight epochs, s 0.4"] and found["margin"].tolist() == [
            0.5,
            2.5,
        ]
        assert found["gain 0.3"].tolist() == pytest.approx([np.mean(CONSTANTS) - 0.3] * 2)
        assert found["oracle 1"].tolist() == pytest.approx([0.02 + 0.001 * 1.5] * 2)

    @pytest.mark.slow
    def test_worlds_that_are_not_finished_are_left_out(self, finished):
        config, out = finished
        (out / "runs" / f"{jobs(config)[-1].name}.json").unlink()
        assert finished_worlds(config, gather(config, out)) == [0, 1, 2]
        found = write_comparison(config, out)
        assert set(found["n"]) == {3}
        assert set(pd.read_csv(out / "compare.csv")["world"]) == {0, 1, 2}
        for job in jobs(config):
            if job.phase == "main" and job.contender == "ada-dpo":
                (out / "runs" / f"{job.name}.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match="0 worlds are finished, expected at least 3"):
            write_comparison(config, out)

    def test_a_run_is_named_by_all_that_tells_it_apart(self):
        job = Job("main", "1/b in training", "pairs by task", 3)
        assert job.name == "main_1b-in-training_pairs-by-task_3_0_0"
        assert not math.isnan(float(job.scale))
