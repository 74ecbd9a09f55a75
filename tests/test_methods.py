"""Each rule by its name: how it starts, and that the loop takes it and a killed run ends as if it had not been."""

import json
import math

import pytest
import torch
from helpers.worlds import (
    RULES_AND_FORMS,
    SMALL,
    VOCABULARY,
    Killed,
    dies_at,
    run,
    small_model,
    small_pairs,
    start,
    weights,
    with_entropies,
)

from dpoviz.beta import ConstantBeta, EntropyBeta
from dpoviz.experiments.config import RealConfig
from dpoviz.experiments.real import load_whole
from dpoviz.forms import FORMS, scale
from dpoviz.rules import LSC, MADPO, AdaDPO, BetaDPO, DualKL, EpsilonDPO, MallowsPO
from dpoviz.training.batch import answer_entropy
from dpoviz.training.config import RULES, TrainConfig
from dpoviz.training.methods import load_beta, require_rule


@pytest.fixture(scope="module")
def world():
    model = small_model()
    return model, with_entropies(small_pairs(model)), small_pairs(model, n=9, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), RULES_AND_FORMS)
def test_a_killed_run_ends_as_if_it_had_not_been(world, name, form, tmp_path):
    config = TrainConfig.around(0.2, form, **SMALL)
    policy, history = run(world, config, start(name, form, world[1]))
    assert not torch.equal(weights(policy), weights(world[0]))
    with pytest.raises(Killed):  # two steps behind the checkpoint
        run(world, config, dies_at(start(name, form, world[1]), 5), out=tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    again, same = run(world, config, start(name, form, world[1]), out=tmp_path)
    assert torch.equal(weights(again), weights(policy)) and same["loss"].tolist() == history["loss"].tolist()


def test_a_rule_is_refused_where_it_is_not_defined(world):
    for name, info in RULES.items():
        for form in set(FORMS) - set(info.forms):
            with pytest.raises(ValueError, match=r"^form: got 'inverse', expected one of standard$"):
                start(name, form, world[1])


def test_no_such_rule(world):
    with pytest.raises(ValueError, match=r"^rule: got 'luck', expected one of constant, network"):
        start("luck", "standard", world[1])
    with pytest.raises(ValueError, match=r"^rule: got 'luck', expected one of constant, network"):
        RealConfig(rule="luck")


@pytest.mark.parametrize(
    ("name", "kind", "attribute", "default"),
    [("beta-dpo", BetaDPO, "a", 0.6), ("epsilon-dpo", EpsilonDPO, "epsilon", 0.01), ("ada-dpo", AdaDPO, "rho", 0.2),
     ("madpo", MADPO, "tau", math.log(999)), ("lsc", LSC, "target", 0.4),
     ("lsc-at-once", LSC, "target", 0.4), ("dual-kl", DualKL, "target", 1.0), ("mallows", MallowsPO, "sign", 1)],
)  # fmt: skip
def test_strength(world, name, kind, attribute, default):
    """The published default, or what is given."""
    rule = start(name, "standard", world[1])
    assert type(rule) is kind and getattr(rule, attribute) == default and rule.beta0 == 0.2
    other = -1.0 if name == "mallows" else 0.25
    assert getattr(start(name, "standard", world[1], strength=other), attribute) == other


@pytest.mark.parametrize("name", [name for name, info in RULES.items() if not info.setting])
def test_no_strength_to_set(world, name):
    message = rf"^strength: got 0\.5, but the rule '{name}' has no hyperparameter"
    with pytest.raises(ValueError, match=message):
        start(name, "standard", world[1], strength=0.5)
    with pytest.raises(ValueError, match=message):
        RealConfig(rule=name, strength=0.5)


@pytest.mark.parametrize("name", [name for name, info in RULES.items() if info.setting])
def test_a_strength_that_the_rule_refuses_is_refused_before_there_are_pairs(name):
    require_rule(name, RULES[name].default)  # what is published is taken
    with pytest.raises(ValueError, match=rf"^strength: got nan, which the rule '{name}' refuses"):
        require_rule(name, math.nan)


@pytest.mark.parametrize(
    ("margins", "said"),
    [(None, "data: lacks reward_margin, a number for each pair, which the rule 'madpo' reads"),
     ([1.0, None, 0.5], r"data: reward_margin is not finite in rows \[1\]"),
     (["a", "b", "c"], "reward_margin is Value")],
)  # fmt: skip
def test_a_column_that_the_rule_reads_is_missed_before_a_model_is_loaded(world, tmp_path, margins, said):
    rows = [{"prompt": f"p {i}", "chosen": "a b", "rejected": "c", "task": "math"} for i in range(3)]
    rows = [row | ({} if margins is None else {"reward_margin": margins[i]}) for i, row in enumerate(rows)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=said):
        load_whole(RealConfig(data=(str(file),), model="no-such-model", rule="madpo"))
    with pytest.raises(ValueError, match="pairs: lacks reward_margin, which MADPO looks at"):
        run(
            (world[0], world[1].remove_columns("reward_margin"), world[2]),
            TrainConfig.around(0.1, "standard", **SMALL),
            MADPO(0.1),
        )


def test_tasks_have_betas_of_their_own(world):
    assert start("dual-kl-task", "standard", world[1]).tasks == ("code", "dialogue", "math")
    assert start("dual-kl", "standard", world[1]).tasks is None


@pytest.mark.parametrize("form", FORMS)
def test_entropy_and_constant(world, form):
    beta = start("entropy", form, world[1])
    assert isinstance(beta, EntropyBeta)
    mean = sum(world[1]["ref_entropy"]) / len(world[1])
    assert beta.alpha * mean == pytest.approx(scale(0.2, form))
    assert isinstance(start("constant", form, world[1]), ConstantBeta)


@pytest.mark.parametrize("form", FORMS)
def test_the_network_is_the_same_for_the_same_seed_and_leaves_the_random_state_alone(world, form):
    before = torch.get_rng_state()
    one, two = (start("network", form, world[1]).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(torch.get_rng_state(), before)


class TestAnswerEntropy:
    def test_by_hand(self):
        rows = {"chosen_ids": [[1, 2, 3], [4]], "rejected_ids": [[1], [2, 3]], "ref_chosen_entropy": [3.0, 0.5],
                "ref_rejected_entropy": [2.0, 1.0]}  # fmt: skip
        # (3/3 + 2/1) / 2 and (0.5/1 + 1/2) / 2
        torch.testing.assert_close(answer_entropy(rows), torch.tensor([1.5, 0.5]))

    def test_mallows_has_the_mean_beta0(self, world):
        rule = start("mallows", "standard", world[1])
        phi = -(answer_entropy(world[1][:]) / math.log(VOCABULARY)).double().clamp(0.001, 0.999).log()
        assert rule.c * phi.mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["a-run/standard/beta", "nobody/a-beta-that-is-not-there"])
def test_a_beta_that_is_not_there_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^folder: {name} is no folder and not cached, and HF_HUB_OFFLINE is set"):
        load_beta(name)
