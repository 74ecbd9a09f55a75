"""What the README says can be run, runs; what it names, is there."""

import os
import re
import subprocess

import pandas as pd
import pytest
import torch
from helpers.readme import README, ROOT, blocks

from dpoviz.cli import COMMANDS, _parse, main
from dpoviz.experiments.bench import INSIDE, OURS
from dpoviz.experiments.comparison import IDEAL, by_condition, pooled_shares
from dpoviz.experiments.comparison_config import (
    BUDGETS,
    CHOSEN,
    CONSTANT,
    MAIN_CONDITIONS,
    ORACLE,
    TRAINED,
    TRUE_SLOPES,
    TURN,
    CompareConfig,
    jobs,
)


def run_blocks():
    found = []
    for block in blocks("python"):
        found.append({})
        exec(block, found[-1])
    return found


def test_python_runs(capsys):
    allocation, loss = run_blocks()
    assert loss["out"].losses.shape == (8,)
    assert any(p.grad is not None and torch.isfinite(p.grad).all() for p in loss["beta"].parameters())
    # the rewards were made as 0.1 and 0.4 times h
    slopes = allocation["table"].set_index("task")["slope"]
    assert (slopes["math"], slopes["dialogue"]) == pytest.approx((0.1, 0.4), abs=1e-5)
    assert capsys.readouterr().out


def test_measured_numbers_are_those_of_the_tables():
    measured = ROOT / "notebooks" / "measured"
    found = pd.read_csv(measured / "retilt_allocation.csv").set_index(["variant", "rule", "task"])
    said = []
    for rule in ("by slope", "best by task"):
        for form in ("standard", "inverse"):
            row = found.loc[form, rule, "all"]
            numbers = [f"{row[name]:.3f}".replace("-", "−") for name in ("gain", "gain_low", "gain_high")]
            said.append("{} [{}, {}]".format(*numbers))
    own = [found.loc[form, "one a", "all"]["kl"] for form in ("standard", "inverse")]
    said.append("at their own mean KL of {:.1f} and {:.1f} nats".format(*own))
    best = [found.loc[form, "best by task", "all"]["kl"] for form in ("standard", "inverse")]
    said.append("at {:.2f} and {:.2f} nats".format(*best))
    steps = pd.read_csv(measured / "steps_h200.csv").set_index("who")
    trl, plain, ours, learned = steps.index[:4]
    said += [f"{steps.loc[trl, 'seconds']:.3f} s a step with TRL", f"{steps.loc[plain, 'seconds']:.3f} concatenated"]
    said += [f"{steps.loc[ours, 'seconds']:.3f} with ours and {steps.loc[learned, 'seconds']:.3f} with β(x)"]
    said += [f"TRL over ours {steps.loc[ours, 'ratio']:.2f}", f"{steps.loc[trl, 'tokens']:,} tokens"]
    said += [f"ours adds {steps.loc[ours, 'memory']:,.0f} MiB, TRL {steps.loc[trl, 'memory']:,.0f}"]
    inside = pd.read_csv(measured / "steps_inside.csv").set_index(["who", "task"])["ratio"]
    ratios = [" and ".join(f"{inside[who, task]:.1f}" for task in ("math", "dialogue")) for who in (INSIDE, OURS)]
    said += ["on math and dialogue TRL over it is {}, TRL over ours {}".format(*ratios)]
    assert [text for text in said if text not in README] == []
    assert (steps["share_of_matrix_rate"].dropna().round(2) == 0.02).all()


def comparison_rows():
    """The README's table of the comparison, line by line, from its tables."""
    folder = ROOT / "notebooks" / "compare"
    table, found = pd.read_csv(folder / "compare.csv"), pd.read_csv(folder / "contrasts.csv")
    columns = [(condition, budget) for condition in MAIN_CONDITIONS for budget in BUDGETS]

    def line(name, values):
        cells = [f"{values[column]:+.3f}".replace("-", "−") for column in columns]
        return f"| {name} | {' | '.join(cells)} |"

    gains = table[(table["task"] == "all") & (table["contender"] == CONSTANT)].groupby(["condition", "budget"])["gain"]
    above = found.set_index(["condition", "budget", "contender"])["mean"].unstack("contender")
    trained = above[[name for name in TRAINED if name in above]]
    rows = {
        "one constant, over the reference": gains.mean(),
        "any policy, over the constant": above[IDEAL],
        "best factor per task (oracle)": above[ORACLE],
        "a ∝ b, all answers": above[TRUE_SLOPES],
        "a ∝ b, 60 scored answers per task": above["1/b, scored answers"],
        "the same, order reversed": above["1/b reversed"],
        "a ∝ b, 60 held-out pairs per task": above["1/b, held-out pairs"],
        "factors chosen on 480 scored answers per task": above[CHOSEN],
        "trained rules, the best": trained.max(axis=1),
        "trained rules, the worst": trained.min(axis=1),
    }
    return [line(name, values) for name, values in rows.items()]


SHARES = {
    "factors chosen on 480 scored answers per task": CHOSEN,
    "a ∝ b, all answers": TRUE_SLOPES,
    "a ∝ b, 60 scored answers per task": "1/b, scored answers",
    "a ∝ b, 60 held-out pairs per task": "1/b, held-out pairs",
}


def share_rows():
    """The README's table of the primary endpoint, line by line, from the table of the comparison."""
    table = pd.read_csv(ROOT / "notebooks" / "compare" / "compare.csv").assign(phase="main")
    found = pooled_shares(table[table["condition"].isin(MAIN_CONDITIONS)], list(SHARES.values()))
    cells = (100 * found.set_index(["contender", "budget"])).round().astype(int).astype(str)
    cells = cells.apply(lambda column: column.str.replace("-", "−")).apply(
        "{0.share} [{0.low}, {0.high}]".format, axis=1
    )
    return [
        " | ".join([f"| {name}", *(cells[who, budget] for budget in BUDGETS)]) + " |" for name, who in SHARES.items()
    ]


def halved_words():
    """The factors and correlations of training with half the scale, in English and in Chinese."""
    means = pd.read_csv(ROOT / "notebooks" / "compare" / "halved.csv").groupby("epochs").mean()
    assert means.index.tolist() == [0.5, 2, 8, 32]
    lists = [[f"{x:.2f}" for x in means[name]] for name in ("ratio", "correlation")]
    return [f"{', '.join(x[:-1])} and {x[-1]}" for x in lists] + [f"{'、'.join(x[:-1])} 和 {x[-1]}" for x in lists]


NAMES = {"madpo": "MADPO", "lsc": "LSC-DPO", "1/b in training": "s ∝ 1/b", "b in training": "s ∝ b"}
FURTHER = {
    "flips by task": "two epochs, each rule from its own best scale",
    "half an epoch, s 0.4": "half an epoch from s = 0.4",
    "two epochs, s 0.4": "two epochs from s = 0.4",
    "eight epochs, s 0.4": "eight epochs from s = 0.4",
    "two epochs, s 1.6": "two epochs from s = 1.6",
}


def further_rows():
    """The README's table of other lengths and scales, line by line, from the tables of the comparison."""
    folder = ROOT / "notebooks" / "compare"
    table, found = pd.read_csv(folder / "compare.csv"), pd.read_csv(folder / "contrasts.csv")
    training = by_condition(table.assign(phase="main"), list(FURTHER)).sort_values("margin")
    above = found[found["budget"] == 0.3].set_index(["condition", "contender"])
    lines = []
    for name, row in training.iterrows():
        trained = above.loc[name]["mean"].reindex(list(TRAINED)).dropna()
        turn = above.loc[(name, TURN)]
        best, worst = (f"{x:+.3f} ({NAMES.get(who, who)})" for who, x in ((trained.idxmax(), trained.max()),
                                                         (trained.idxmin(), trained.min())))  # fmt: skip
        cells = [f"{row['margin']:.2f}", f"{row['gain 0.3']:+.3f}", f"{row['oracle 0.3']:+.3f}",
                 f"{turn['mean']:+.3f} [{turn['low']:+.3f}, {turn['high']:+.3f}]", best, worst]  # fmt: skip
        lines.append(" | ".join([f"| {FURTHER[name]}", *cells]).replace("-0", "−0") + " |")
    return lines


def test_the_comparison_is_that_of_its_tables():
    folder = ROOT / "notebooks" / "compare"
    table, found = pd.read_csv(folder / "compare.csv"), pd.read_csv(folder / "contrasts.csv")
    assert [line for line in [*comparison_rows(), *share_rows(), *further_rows()] if line not in README] == []
    trained = table[table["contender"].isin(TRAINED)].drop_duplicates(["condition", "world", "contender"])
    main, tested = found[found["condition"].isin(MAIN_CONDITIONS)], found[found["holm"].notna()]
    oracle = main[main["contender"] == ORACLE].groupby("budget")["mean"].mean()
    gains = table[(table["task"] == "all") & (table["contender"] == CONSTANT)]
    gain = gains[gains["condition"].isin(MAIN_CONDITIONS)].groupby("budget")["gain"].mean()
    beyond = main[main["holm"] < 0.05]
    fine = 100 * main[main["contender"].isin(TRAINED)].groupby("budget")["detectable_share"].median()

    answers = pd.read_csv(folder / "answers.csv").groupby("answers")[["gain", "gain_all"]].mean()
    reached = (100 * answers["gain"] / answers["gain_all"]).round().astype(int)

    of_gain = [f"{100 * oracle[budget] / gain[budget]:.0f} % at {budget:g}" for budget in BUDGETS]
    madpo = main[(main["contender"] == "madpo") & (main["mean"] > 0)]
    single = (madpo["p"] < 0.05).sum()
    tuning = pd.read_csv(folder / "tuning.csv").groupby(["contender", "learning_rate", "scale"])["gain"].mean()
    scales = tuning.groupby("contender").idxmax().map(lambda at: at[2])
    low = (scales == min(CompareConfig().scales)).sum()
    ratios, correlations, *_ = halved_words()
    said = [
        f"h becomes {ratios} times as large",
        f"correlates with the first h by {correlations}",
        f"{table['world'].nunique()} worlds and {len(trained):,} trainings",
        "{} nats, {} and {}".format(*of_gain),
        f"those from 60 answers earn {reached[60]} % of what those from all answers earn, ",
        f"those from 480 answers to the same prompts {reached[480]} %",
        f"correcting for all {len(tested)} comparisons",
        f"{(beyond['mean'] > 0).sum()} contrasts are above the constant",
        f"and {(beyond['mean'] < 0).sum()} below: {(beyond['contender'] == '1/b shuffled').sum()} of shuffled factors",
        f"{(beyond['contender'] == 'label smoothing').sum()} of label smoothing",
        f"above the constant in {single} of 9 before the correction, in none after it",
        f"finds {fine[0.1]:.0f} % of the training gain at 0.1 nats and {fine[0.3]:.0f} % at 0.3",
        f"one of all {(found['contender'] == TURN).sum()} is",
        f"the constant and {low - 1} of {len(TRAINED) - 1} rules do best at the smallest".replace("the c", "The c"),
    ]
    assert [text for text in said if text not in README] == []
    assert set(beyond[beyond["mean"] > 0]["contender"]) == {CHOSEN}
    assert set(beyond[beyond["mean"] < 0]["contender"]) == {"1/b shuffled", "label smoothing"}
    turn = found[found["contender"] == TURN]
    sure = turn[turn["holm"] < 0.05]
    assert sure[["condition", "budget"]].to_numpy().tolist() == [["half an epoch, s 0.4", 0.1]]
    shown = turn[turn["condition"].isin(FURTHER) & (turn["budget"] == 0.3)]
    assert len(shown) == 5 and (shown["low"] * shown["high"] > 0).all()
    wide = gains.groupby(["condition", "budget"])["gain"].mean().unstack()
    assert (wide[1.0] < wide[0.3]).loc[list(MAIN_CONDITIONS)].sum() == 2  # gone too far
    # from too large a scale
    large = found[(found["condition"] == "two epochs, s 1.6") & (found["holm"] < 0.05) & (found["mean"] > 0)]
    assert set(large["contender"]) - {CHOSEN} == {"epsilon-dpo", "lsc", "network, standard"}
    for budget in BUDGETS:
        tuned, high = (gains[(gains["condition"] == name) & (gains["budget"] == budget)]["gain"].mean()
                       for name in ("flips by task", "two epochs, s 1.6"))  # fmt: skip
        own = found[(found["condition"] == "two epochs, s 1.6") & (found["budget"] == budget)].set_index("contender")
        assert high + own.loc[["epsilon-dpo", "lsc", "network, standard"], "mean"].max() < tuned
        if budget == 0.3:
            assert f"{high + own.loc['lsc', 'mean'] - tuned:+.3f} at 0.3 nats".replace("-", "−") in README


def test_the_array_script_runs_every_row_once(tmp_path):
    (script,) = (block for block in blocks("bash") if "#SBATCH" in block)
    program = tmp_path / "dpoviz"
    program.write_text('#!/bin/bash\necho "${@: -1}"\n')
    program.chmod(0o755)
    phases = [job.phase for job in jobs(CompareConfig())]
    for phase, first, last in (("tuning", 0, 671), ("main", 672, 1835)):
        assert f"FIRST={first},LAST={last}" in script
        done = []
        for task in range(32):
            own = {"FIRST": str(first), "LAST": str(last), "SLURM_ARRAY_TASK_ID": str(task)}
            path = {**os.environ, **own, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
            said = subprocess.run(["bash", "-c", script], env=path, capture_output=True, text=True, check=True).stdout
            if said:
                start, end = map(int, said.split("-"))
                done += range(start, end + 1)
        assert done == [row for row, own in enumerate(phases) if own == phase]


def test_continuous_integration_runs_what_it_says():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace(" -q", "")
    run, test = blocks("bash")[:2]
    assert run == "pip install -e . && dpoviz demo\n"
    for command in test.strip().split(" && "):
        assert f"\n{command}\n" in script, command


def test_options_that_it_names_exist(capsys):
    main(["train", "--help"])
    known = capsys.readouterr().out
    table = README[README.index("| option | what it does |") :].split("\n\n")[0]
    named = re.findall(r"`(--[\w-]+)`", table)
    assert len(named) > 10
    for option in named:
        assert f"{option} " in known, option


@pytest.mark.slow
def test_its_commands_have_only_options_that_there_are():
    lines = [part.split("#")[0].split() for block in blocks("bash") for part in re.split(r"\n|&&", block)]
    of_us = [words[words.index("dpoviz") + 1 :] for words in lines if "dpoviz" in words]
    known = [words for words in of_us if words[0] in COMMANDS and "--config" not in words]
    assert {words[0] for words in known} >= {"demo", "train", "retilt", "compare", "study", "bench"}
    for name, *options in known:
        _parse(name, COMMANDS[name], options)


def test_what_it_names_is_there():
    for name in re.findall(r"`([\w/]+\.(?:py|md))`", README):
        assert list(ROOT.glob(f"**/{name.split('/')[-1]}")), name
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_every_module_and_room_is_in_the_table():
    for path in (ROOT / "dpoviz").glob("*.py"):
        assert path.stem in ("__init__", "__main__") or path.name in README, path.name
    for path in (ROOT / "dpoviz").glob("*/__init__.py"):
        assert f"{path.parent.name}/" in README, path.parent.name
