"""What the README says can be run, runs; what it names, is there."""

import re

import pandas as pd
import pytest
import torch
from helpers.readme import README, ROOT, blocks

from dpoviz.cli import COMMANDS, _parse, main
from dpoviz.experiments.bench import INSIDE, OURS


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
