"""The trainer for TRL's users: TRL's own numbers where beta is constant, and beta's own beside them elsewhere."""

import copy
import functools
import importlib.util
import inspect
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.launch import SCRIPTS, command, finish
from helpers.readme import blocks
from transformers import AutoModelForCausalLM, TrainerCallback

trl = pytest.importorskip("trl", reason="pip install dpoviz[trl]")

from dpoviz.allocation import allocate  # noqa: E402
from dpoviz.analysis.diagnose import SYMPTOMS  # noqa: E402
from dpoviz.beta import BetaNetwork, ConstantBeta, TaskBeta  # noqa: E402
from dpoviz.learn.run import load_run  # noqa: E402
from dpoviz.lm.reference import reference_pass  # noqa: E402
from dpoviz.losses import Logps, total_loss  # noqa: E402
from dpoviz.rules import (  # noqa: E402
    MADPO,
    AdaDPO,
    BetaDPO,
    DualKL,
    EpsilonDPO,
    LookupBeta,
    MallowsPO,
    RandomBeta,
    Rule,
    RuleOutput,
    TaskSmoothing,
)
from dpoviz.training.batch import shuffled_rows  # noqa: E402
from dpoviz.training.config import RULES, TrainConfig  # noqa: E402
from dpoviz.training.loop import train  # noqa: E402
from dpoviz.training.methods import build, load_beta  # noqa: E402
from dpoviz.trl import COLUMNS, BetaDPOTrainer, trl_dataset  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
TASKS = ("math", "code", "dialogue")


_WORLD = []
_EXACT_WORLD = []


@pytest.fixture
def world(make_model, tokenizer):
    """A model, its tokenizer, and 24 scored pairs; a copy for each test, scored once."""
    if not _WORLD:
        _WORLD.append(scored_world(make_model, tokenizer))
    return copy.deepcopy(_WORLD[0][0]), tokenizer, _WORLD[0][1]


@pytest.fixture
def exact_world(make_model, tokenizer):
    """As `world`, in float64: where a gradient is mere rounding, Adam's steps would follow float32's."""
    if not _EXACT_WORLD:
        _EXACT_WORLD.append(scored_world(make_model, tokenizer, torch.float64))
    return copy.deepcopy(_EXACT_WORLD[0][0]), tokenizer, _EXACT_WORLD[0][1]


def scored_world(make_model, tokenizer, dtype=torch.float32):
    model = make_model(dtype=dtype)
    words = [word for word in sorted(tokenizer.get_vocab()) if not word.startswith("<")]
    rows = []
    for i in range(24):
        text = " ".join(words[(i * 7 + j * 3) % len(words)] for j in range(12))
        parts = text.split()
        # an answer begins with a blank: TRL tokenises prompt and answer as one text
        answers = {"chosen": " " + " ".join(parts[6:9]), "rejected": " " + " ".join(parts[8 : 10 + i % 2])}
        rows.append({"prompt": " ".join(parts[: 3 + i % 3]), **answers, "task": TASKS[i % 3], "group": None})
    pairs = Dataset.from_list(rows)
    scored = reference_pass(model, tokenizer, pairs, max_length=32, max_new_tokens=4, entropy_samples=2, progress=False)
    return model, scored.add_column("reward_margin", [(i % 7) - 2.5 for i in range(24)])


def arguments(folder, **changed):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "beta": 0.1,
        "logging_steps": 1, "report_to": [], "seed": 0, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "gradient_checkpointing": False, "bf16": False, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
        "precompute_ref_log_probs": False,
    }  # fmt: skip
    return trl.DPOConfig(**{**settings, **changed})


def losses(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if name in row]


def trained(world, folder, beta=None, config=None, cls=None, data=None, callbacks=None, **changed):
    model, tokenizer, scored = world
    own = {} if beta is None else {"beta": beta, "config": config}
    trainer = (cls or (trl.DPOTrainer if beta is None else BetaDPOTrainer))(
        copy.deepcopy(model),
        ref_model=copy.deepcopy(model),
        args=arguments(folder, **changed),
        train_dataset=trl_dataset(scored) if data is None else data,
        processing_class=tokenizer,
        callbacks=callbacks,
        **own,
    )
    trainer.train()
    return trainer


@pytest.mark.slow
class TestConstantBeta:
    @pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
    def test_is_trl_with_the_same_beta(self, world, tmp_path, loss):
        theirs = trained(world, tmp_path / "a", loss_type=loss)
        config = TrainConfig.around(0.1, "standard")
        ours = trained(world, tmp_path / "b", ConstantBeta(0.1), config, loss_type=loss)
        # one machine, the same sums: nothing but the place of a factor differs
        assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)
        assert losses(ours, "rewards/margins") == pytest.approx(losses(theirs, "rewards/margins"), rel=1e-5, abs=1e-7)
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    def test_inverse_form_of_the_reciprocal_is_the_same_loss(self, world, tmp_path):
        standard = trained(world, tmp_path / "a", ConstantBeta(0.1), TrainConfig.around(0.1, "standard"))
        inverse = trained(world, tmp_path / "b", ConstantBeta(10.0), TrainConfig.around(0.1, "inverse"))
        assert losses(inverse) == pytest.approx(losses(standard), rel=1e-6)

    def test_another_beta_scales_the_first_gradient(self, world, tmp_path):
        """At h = 0 the gradient is beta / 2 times that of h, and AdamW's first step does not see its size."""
        theirs = trained(world, tmp_path / "a", max_steps=2)
        ours = trained(world, tmp_path / "b", ConstantBeta(0.3), TrainConfig.around(0.1, "standard"), max_steps=2)
        assert losses(ours, "grad_norm")[0] == pytest.approx(3 * losses(theirs, "grad_norm")[0], rel=1e-4)
        margins = [3 * margin for margin in losses(theirs, "rewards/margins")]
        assert losses(ours, "rewards/margins") == pytest.approx(margins, rel=1e-2, abs=1e-4)

    @pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
    def test_a_loss_that_sorts_its_batch_takes_no_beta_that_varies(self, world, tmp_path, loss):
        config = TrainConfig.around(0.1, "standard")
        theirs = trained(world, tmp_path / "a", loss_type=loss)
        ours = trained(world, tmp_path / "b", ConstantBeta(0.1), config, loss_type=loss)
        assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)
        with pytest.raises(ValueError, match=rf"args\.loss_type: got '{loss}', which sorts pairs apart from"):
            trained(world, tmp_path / "c", TaskBeta(TASKS, 0.1), config, loss_type=loss)


class TestBetaThatLearns:
    @pytest.mark.slow
    def test_first_loss_is_the_total_objective(self, world, tmp_path):
        """Against `total_loss` on the same batch, from log-probabilities of two separate passes in float64."""
        scored = world[2]
        config = TrainConfig.around(0.1, "inverse", lambda_consistency=1.0)
        torch.manual_seed(0)
        beta = BetaNetwork(len(scored["ref_features"][0]), beta0=config.beta0, hidden=(8,))
        torch.nn.init.normal_(beta.layers[-1].weight)
        beta.fit_running_statistics(torch.tensor(scored["ref_features"][:]))
        start = copy.deepcopy(beta)
        trainer = trained(world, tmp_path, beta, config, per_device_train_batch_size=24, max_steps=1)
        task, x = scored["task"][:], torch.tensor(scored["ref_features"][:])
        entropy = torch.tensor(scored["ref_entropy"][:])
        ref = [torch.tensor(scored[f"ref_{name}_logps"][:]) for name in ("chosen", "rejected")]
        alpha = config.beta0 / entropy.mean().item()
        expected = total_loss(
            Logps(*ref, *ref), start.train()(x), form="inverse", regularization=config.regularization(alpha),
            ref_entropy=entropy, beta_fn=start, x=x, task=task,
        )  # fmt: skip
        # rows come in another order, and batch norm sums over them in it
        assert losses(trainer)[0] == pytest.approx(expected.total.item(), rel=1e-4)
        assert losses(trainer, "loss/entropy")[0] == pytest.approx(expected.terms["entropy"].item(), rel=1e-4)

    @pytest.mark.slow
    def test_moves_by_its_own_learning_rate_and_norm(self, world, tmp_path):
        moved = {}
        for rate in (0.0, 1e-2):
            config = TrainConfig.around(0.1, "standard", beta_learning_rate=max(rate, 1e-12))
            beta = TaskBeta(TASKS, 0.1)
            trained(world, tmp_path / str(rate), beta, config)
            moved[rate] = beta.log_ratio.abs().max().item()
        assert moved[0.0] < 1e-8 and 0.01 < moved[1e-2] <= 3 * 1e-2 * 1.01  # three steps of Adam, at most the rate each

    @pytest.mark.slow
    def test_is_clipped_by_itself(self, world, tmp_path):
        # AdamW divides by the gradient's size and 1e-8: what is cut to far below that hardly moves
        beta = TaskBeta(TASKS, 0.1)
        config = TrainConfig.around(0.1, "standard", beta_learning_rate=1e-2, beta_max_norm=1e-12)
        trainer = trained(world, tmp_path, beta, config)
        assert 0 < beta.log_ratio.abs().max() < 1e-5
        assert trainer.state.log_history[0]["grad_norm"] > 0.1

    @pytest.mark.slow
    @pytest.mark.parametrize(("steps", "most"), [(1, 0.0), (2, 0.5 * 1e-2)])
    def test_follows_the_schedule_of_the_policy(self, world, tmp_path, steps, most):
        """In two steps of warming up the rate is 0, then half."""
        beta = TaskBeta(TASKS, 0.1)
        config = TrainConfig.around(0.1, "standard", beta_learning_rate=1e-2)
        trained(world, tmp_path, beta, config, max_steps=steps, warmup_steps=2, lr_scheduler_type="linear")
        assert most / 2 <= beta.log_ratio.abs().max() <= most * 1.01

    @pytest.mark.slow
    def test_accumulated_gradients_are_those_of_one_batch(self, world, tmp_path):
        found = []
        for size in (2, 4):
            beta = TaskBeta(TASKS, 0.1)
            config = TrainConfig.around(0.1, "standard", beta_learning_rate=1e-2)
            trained(world, tmp_path / str(size), beta, config, per_device_train_batch_size=size,
                    gradient_accumulation_steps=4 // size)  # fmt: skip
            assert beta.log_ratio.grad is None  # nothing is left for a further step
            found.append(beta.log_ratio.detach())
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)

    @pytest.mark.slow
    @pytest.mark.parametrize(("loss_scale", "weight"), [(2.0**10, 0.1), (2.0**127, 1e3)])
    def test_loss_scaled_for_float16(self, world, tmp_path, loss_scale, weight):
        """The same steps whatever the loss is multiplied by, and none where that overflows."""
        beta, scaled = TaskBeta(TASKS, 0.1), TaskBeta(TASKS, 0.1)
        config = TrainConfig.around(0.1, "standard", beta_learning_rate=1e-2, lambda_entropy=weight)
        trained(world, tmp_path / "a", beta, config, learning_rate=0.0)
        assert beta.log_ratio.abs().max() > 1e-2

        class Scaled(BetaDPOTrainer):
            def create_optimizer(self, *args, **kwargs):
                self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale, growth_interval=1000)
                return super().create_optimizer(*args, **kwargs)

        trained(world, tmp_path / "b", scaled, config, cls=Scaled, learning_rate=0.0)
        expected = beta.log_ratio.detach() if weight < 1 else torch.zeros(3)
        torch.testing.assert_close(scaled.log_ratio.detach(), expected, rtol=1e-5, atol=1e-8)

    @pytest.mark.slow
    def test_a_step_that_is_not_finite_leaves_beta_as_it_is(self, world, tmp_path):
        data, bad = trl_dataset(world[2]).to_list(), float("1e38")
        for row in data:
            row["ref_entropy"] = bad  # its square is infinite
        beta = TaskBeta(TASKS, 0.1)
        config = TrainConfig.around(0.1, "standard", alpha=1.0, beta_learning_rate=1e-2)
        trained(world, tmp_path, beta, config, data=Dataset.from_list(data), learning_rate=0.0)
        assert torch.equal(beta.log_ratio, torch.zeros(3))

    @pytest.mark.slow
    def test_any_collator_of_the_trainer(self, world, tmp_path):
        model, tokenizer, scored = world
        config = TrainConfig.around(0.1, "standard")
        seen = []

        class Own(trl.trainer.dpo_trainer.DataCollatorForPreference):
            def torch_call(self, examples):
                seen.append(len(examples))
                return super().torch_call(examples)

        with_own = BetaDPOTrainer(
            copy.deepcopy(model), ref_model=copy.deepcopy(model), beta=TaskBeta(TASKS, 0.1), config=config,
            args=arguments(tmp_path / "a"), train_dataset=trl_dataset(scored), processing_class=tokenizer,
            data_collator=Own(pad_token_id=tokenizer.pad_token_id),
        )  # fmt: skip
        with_own.train()
        assert len(seen) >= 3 and set(seen) == {4}
        assert losses(with_own) == losses(trained(world, tmp_path / "b", TaskBeta(TASKS, 0.1), config))

    @pytest.mark.slow
    def test_evaluates_on_a_further_set(self, world, tmp_path):
        data = trl_dataset(world[2])
        trainer = trained(world, tmp_path, TaskBeta(TASKS, 0.1), TrainConfig.around(0.1, "standard"),
                          precompute_ref_log_probs=True)  # fmt: skip
        seen = set()
        trainer.model.register_forward_pre_hook(lambda model, args, given: seen.update(given), with_kwargs=True)
        found = trainer.evaluate(data.select(range(6)))
        assert found["eval_loss"] > 0 and found["eval_beta/math"] > 0
        assert "input_ids" in seen and not seen & set(COLUMNS)  # the model is not given what beta reads
        with pytest.raises(ValueError, match="eval_dataset: lacks ref_entropy; expected what trl_dataset returns"):
            trainer.evaluate(data.remove_columns("ref_entropy"))

    @pytest.mark.slow
    def test_several_processes_precompute_the_reference_of_a_set_on_disk(self, world, tmp_path, monkeypatch):
        data = trl_dataset(world[2])
        trainer = trained(world, tmp_path / "a", TaskBeta(TASKS, 0.1), TrainConfig.around(0.1, "standard"))
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
        with pytest.raises(ValueError, match="train_dataset: is in memory; with args"):
            trainer._precompute_ref_logps(data, "train", 4)

    @pytest.mark.slow
    def test_precomputed_reference_gives_the_same(self, world, tmp_path):
        config = TrainConfig.around(0.1, "standard")
        whole = trained(world, tmp_path / "a", TaskBeta(TASKS, 0.1), config)
        precomputed = trained(world, tmp_path / "b", TaskBeta(TASKS, 0.1), config, precompute_ref_log_probs=True)
        assert losses(precomputed) == pytest.approx(losses(whole), rel=1e-5)

    @pytest.mark.slow
    def test_the_best_checkpoint_brings_its_beta_back(self, world, tmp_path):
        beta = TaskBeta(TASKS, 0.1)
        model, tokenizer, scored = world
        data = trl_dataset(scored)
        trainer = BetaDPOTrainer(
            copy.deepcopy(model), ref_model=copy.deepcopy(model), beta=beta, train_dataset=data, eval_dataset=data,
            args=arguments(tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
                           load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True),
            processing_class=tokenizer, config=TrainConfig.around(0.1, "standard", beta_learning_rate=1e-2),
        )  # fmt: skip
        trainer.train()
        assert (
            Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
        )  # the loss falls: the largest is the first
        first, last = (TaskBeta.from_pretrained(tmp_path / f"checkpoint-{step}" / "beta") for step in (1, 3))
        assert torch.equal(beta.log_ratio, first.log_ratio) and not torch.equal(beta.log_ratio, last.log_ratio)

    @pytest.mark.slow
    def test_logs_beta_by_task(self, world, tmp_path):
        trainer = trained(world, tmp_path, TaskBeta(TASKS, 0.1), TrainConfig.around(0.1, "standard"), max_steps=6)
        rows = [row for row in trainer.state.log_history if "loss" in row]
        assert rows[0]["beta/math"] == pytest.approx(0.1)
        assert all(any(f"beta/{task}" in row for row in rows) for task in TASKS)

    @pytest.mark.slow
    def test_logs_what_pulls_on_beta(self, world, tmp_path):
        """One batch of all pairs: means by task, against the loop's own measurements of it."""
        model, tokenizer, scored = world
        config = TrainConfig.around(
            0.1, "inverse", stage1_steps=0, stage2_steps=2, batch_size=24, policy_learning_rate=1e-3, warmup_steps=0,
            log_every=1, probe_every=100, lambda_consistency=1.0,
        )  # fmt: skip
        ends = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
        beta = made("network", scored, config)
        history = train(copy.deepcopy(model), beta, scored, config, stage=2, progress=False, **ends).history
        seen = []

        class Tracker(TrainerCallback):
            """Gets what any service of `report_to` gets."""

            def on_log(self, args, state, control, logs=None, **kwargs):
                seen.append(dict(logs))

        trainer = trained(world, tmp_path, made("network", scored, config), config, max_steps=2, weight_decay=0.0,
                          per_device_train_batch_size=24, callbacks=[Tracker()])  # fmt: skip
        for step, row in enumerate(seen[:2]):
            for task in TASKS:
                terms = ("dpo", "range", "smoothness", "consistency", "entropy")
                pulls = {name: row[f"pull/{name}/{task}"] for name in terms}
                assert sum(pulls.values()) == pytest.approx(1) and min(pulls.values()) >= 0
                assert row[f"s/{task}"] == pytest.approx(1 / row[f"beta/{task}"], rel=0.1)  # means of 1/beta and beta
                chosen, rejected = (row[f"logratio/{name}/{task}"] for name in ("chosen", "rejected"))
                assert chosen - rejected == 0 if step == 0 else chosen > 0 > rejected
            assert row["loss/entropy"] == pytest.approx(history["loss/entropy"][step], rel=1e-4)
        # at h = 0 the loss does not pull on beta
        assert seen[0]["pull/dpo/math"] == 0 < seen[1]["pull/dpo/math"]
        assert trainer.state.log_history[0]["pull/dpo/math"] == 0

    @pytest.mark.slow
    def test_killed_and_resumed_it_ends_the_same(self, world, tmp_path):
        model, tokenizer, scored = world
        config = TrainConfig.around(0.1, "standard", beta_learning_rate=1e-2)

        def run(folder, steps, resume=None):
            beta = TaskBeta(TASKS, 0.1)
            trainer = BetaDPOTrainer(
                copy.deepcopy(model), ref_model=copy.deepcopy(model), beta=beta, config=config,
                args=arguments(folder, save_strategy="steps", save_steps=2, max_steps=steps),
                train_dataset=trl_dataset(scored), processing_class=tokenizer,
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=resume)
            return beta.log_ratio.detach(), losses(trainer)

        whole, whole_losses = run(tmp_path / "whole", 4)
        run(tmp_path / "part", 2)
        resumed, resumed_losses = run(tmp_path / "part", 4, resume=str(tmp_path / "part" / "checkpoint-2"))
        torch.testing.assert_close(resumed, whole, rtol=1e-6, atol=1e-8)
        assert resumed_losses[-1] == pytest.approx(whole_losses[-1], rel=1e-5)


class Halved(Rule):
    """Weights that are neither 0 nor 1."""

    form = "standard"
    reads = frozenset()

    def forward(self, observation):
        beta = torch.full_like(observation.h, 0.1)
        return RuleOutput(beta, torch.arange(1.0, 1 + len(beta)).to(beta) % 3 / 2)


def allocated(scored):
    table = pd.DataFrame({"task": TASKS, "slope": [0.1, 0.2, 0.4], "variance": [1.0, 2.0, 1.5], "prompts": [8, 8, 8]})
    found = allocate(table, kl=0.5, beta=0.1, form="standard")
    beta = TaskBeta.fixed(dict(zip(found["task"], found["beta"], strict=True)))
    x = torch.tensor(scored["ref_features"][:3])
    assert beta(x, task=found["task"].tolist()).tolist() == pytest.approx(found["beta"].tolist(), rel=1e-5)
    return beta


def made(name, scored, config):
    """A beta or a rule by its name, anew at each call."""
    if name in RULES:
        return build(name, config, scored, vocabulary=30)
    x = torch.tensor(scored["ref_features"][:])
    others = {
        "allocation": lambda: allocated(scored),
        "random": lambda: RandomBeta(0.1, spread=0.5),
        "lookup": lambda: LookupBeta(x, torch.linspace(0.05, 0.4, len(x))),
        "weights": Halved,
        "often": lambda: DualKL(0.1, target=0.05, every=3, tasks=TASKS),
        "far": lambda: EpsilonDPO(0.1, epsilon=0.3),
        "uncertain": lambda: MallowsPO(0.1, c=0.7, sign=-1),
        "steep": lambda: BetaDPO(0.1, a=2.0, keep=0.6, momentum=0.5),
        "scaled": lambda: AdaDPO(0.1),
        "margins": lambda: MADPO(0.1, tau=1.0),
    }
    return others[name]()


def in_order(order, cls=BetaDPOTrainer):
    class InOrder(cls):
        def _get_train_sampler(self, *_):
            return order

    return InOrder


OTHERS = ("allocation", "random", "lookup", "weights", "often", "far", "uncertain", "steep", "scaled", "margins")


@pytest.mark.slow
def test_labels_smoothed_by_task_are_refused(world, tmp_path):
    """TRL has one label_smoothing for all pairs."""
    config = TrainConfig.around(0.1, "standard", batch_size=4, rescore_reference=True)
    with pytest.raises(ValueError, match="beta: TaskSmoothing smooths labels"):
        trained(world, tmp_path, TaskSmoothing(0.1, dict.fromkeys(TASKS, 0.1)), config, max_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name, info in RULES.items() for form in info.forms if name != "constant" or form == "standard"]
    + [(name, "standard") for name in OTHERS],
)
def test_a_rule_is_that_of_our_own_loop(exact_world, tmp_path, name, form):
    """Ours and TRL's, the same batches in the same order, 20 steps: losses, weights, and the state of the rule."""
    model, tokenizer, scored = exact_world
    config = TrainConfig.around(
        0.1, form, stage1_steps=0, stage2_steps=20, batch_size=4, policy_learning_rate=1e-3, warmup_steps=0,
        log_every=1, probe_every=100, checkpoint_every=100, max_new_tokens=4, probe_prompts=2, beta_learning_rate=3e-3,
        rescore_reference=True,  # in the same batch, as TRL does: h is exactly 0 at the start, for filters to see
    )  # fmt: skip
    policy, rule = copy.deepcopy(model), made(name, scored, config)
    ends = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    result = train(policy, rule, scored, config, stage=2, reference=model, progress=False, **ends)
    order = [i for rows in shuffled_rows(len(scored), 4, 20, seed=config.seed + 2) for i in rows]
    own = made(name, scored, config)
    trainer = trained(exact_world, tmp_path, own, config, cls=in_order(order), max_steps=20, weight_decay=0.0)
    history = result.history
    assert history["loss"].tolist() == pytest.approx(losses(trainer), abs=1e-5)
    assert (history["loss"] - history["loss"].iloc[0]).abs().max() > 0.05  # it went somewhere
    for a, b in zip(trainer.model.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-5)
    if any(p.requires_grad for p in rule.parameters()):  # beta's network is in float32, so its betas are compared
        x, entropy = (torch.tensor(scored[name][:]) for name in ("ref_features", "ref_entropy"))
        given = {"task": scored["task"][:], "ref_entropy": entropy}
        betas = [getattr(trained_beta, "beta", trained_beta).eval()(x, **given) for trained_beta in (rule, own)]
        torch.testing.assert_close(betas[1], betas[0], rtol=1e-4, atol=0)
        assert (betas[0] / config.beta0 - 1).abs().max() > 1e-3  # they moved
    else:
        state = rule.state_dict()
        for key, value in own.state_dict().items():
            torch.testing.assert_close(value, state[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_parity_of_both_loops(world, tmp_path):
    """Ours and TRL's own trainer, a fixed beta in the standard form, 20 steps."""
    model, tokenizer, scored = world
    config = TrainConfig.around(
        0.1, "standard", stage1_steps=20, batch_size=4, policy_learning_rate=1e-3, warmup_steps=0, log_every=1,
        probe_every=100, checkpoint_every=100,
    )  # fmt: skip
    policy = copy.deepcopy(model)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    result = train(policy, ConstantBeta(0.1), scored, config, stage=1, pad_id=pad, eos_id=eos, progress=False)
    order = [i for rows in shuffled_rows(len(scored), 4, 20, seed=config.seed + 1) for i in rows]
    trainer = trained(world, tmp_path, cls=in_order(order, trl.DPOTrainer), max_steps=20, weight_decay=0.0)
    assert result.history["loss"].tolist() == pytest.approx(losses(trainer), abs=1e-5)


LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["steep", "far", "lsc-at-once", "often", "lookup"])
def test_a_rule_goes_on_from_a_checkpoint(world, tmp_path, name):
    """Killed after two of four steps, it ends the same, and its state is that of the end."""
    scored = world[2]
    config = TrainConfig.around(0.1, "standard", max_new_tokens=4, probe_prompts=2)
    common = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}

    def run(folder, steps, resume=None):
        rule = made(name, scored, config)

        class Resumed(BetaDPOTrainer):
            def train(self):
                return super().train(resume_from_checkpoint=resume)

        return rule, trained(world, folder, rule, config, cls=Resumed, max_steps=steps, **common)

    whole, all_of_it = run(tmp_path / "whole", 4)
    run(tmp_path / "part", 2)
    rule, rest = run(tmp_path / "part", 4, str(tmp_path / "part" / "checkpoint-2"))
    assert losses(rest)[-1] == pytest.approx(losses(all_of_it)[-1], rel=1e-5)
    start = made(name, scored, config).state_dict()
    loaded = load_beta(tmp_path / "part" / "checkpoint-4")
    assert repr(loaded) == repr(rule) and type(loaded) is type(rule)
    for key, value in whole.state_dict().items():
        for own in (rule, loaded):
            torch.testing.assert_close(own.state_dict()[key], value, rtol=1e-4, atol=1e-6)
        assert name == "lookup" or not torch.equal(value, start[key]), key


class TestRefusals:
    def refused(self, world, tmp_path, match, name="far", config=None, **changed):
        with pytest.raises(ValueError, match=match):
            trained(world, tmp_path, made(name, world[2], CONFIG), config or CONFIG, **changed)

    def test_what_a_rule_cannot_do(self, world, tmp_path):
        inverse = TrainConfig.around(0.1, "inverse")
        self.refused(world, tmp_path, "beta: EpsilonDPO is defined in the standard form, got 'inverse'", config=inverse)
        self.refused(world, tmp_path, "max_length|cut at", truncation_mode="keep_end", max_length=20)
        bare = trl_dataset(world[2]).remove_columns(["ref_answer_entropy", "task"])
        self.refused(world, tmp_path, "train_dataset: lacks ref_answer_entropy", name="uncertain", data=bare)
        self.refused(world, tmp_path, "train_dataset: lacks task", name="often", data=bare)
        stream = trl_dataset(world[2]).to_iterable_dataset()
        self.refused(
            world, tmp_path, "train_dataset: got a stream, expected a Dataset: DualKL", name="often", data=stream
        )

    @pytest.mark.slow
    def test_a_rule_that_reads_the_reference_needs_it(self, world, tmp_path):
        peft = pytest.importorskip("peft")
        model, tokenizer, scored = world
        common = {"train_dataset": trl_dataset(scored), "processing_class": tokenizer, "beta": EpsilonDPO(0.1)}
        with pytest.raises(ValueError, match=r"args\.precompute_ref_log_probs: got True, but EpsilonDPO reads"):
            BetaDPOTrainer(copy.deepcopy(model), args=arguments(tmp_path, precompute_ref_log_probs=True), **common)
        lora = peft.LoraConfig(target_modules=["q_proj"])
        with pytest.raises(ValueError, match="model: got an adapter to train on, but EpsilonDPO reads"):
            BetaDPOTrainer(peft.get_peft_model(copy.deepcopy(model), lora), args=arguments(tmp_path), **common)
        trainer = BetaDPOTrainer(copy.deepcopy(model), args=arguments(tmp_path), peft_config=lora, **common)
        trainer.train()
        assert trainer.rule.current != 0.1  # the adapter was off for the reference

    def test_a_beta_per_task_that_no_task_can_have(self):
        for bad in (0.0, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=f"betas: got {bad} for 'b', expected a positive finite number"):
                TaskBeta.fixed({"a": 1.0, "b": bad})
        with pytest.raises(ValueError, match="expected numbers within a factor of"):
            TaskBeta.fixed({"a": 1e-12, "b": 1e12})


CONFIG = TrainConfig.around(0.1, "standard")


class TestCards:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["network", "steep"])
    def test_the_lines_of_the_card_load_policy_and_beta(self, world, tmp_path, name):
        scored = world[2]
        model = copy.deepcopy(world[0])
        model.config._name_or_path = "someone/some-model"
        trainer = trained((model, *world[1:]), tmp_path / "out", made(name, scored, CONFIG), CONFIG)
        trainer.create_model_card(model_name="mine")
        trainer.save_model()  # as push_to_hub does, before it uploads the folder
        card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        kind, paper = {"network": ("BetaNetwork", "2305.18290"), "steep": ("BetaDPO", "2407.08639")}[name]
        for said in (f"Rule: {kind} ([arXiv:{paper}]", "Form: standard", "Reference: someone/some-model"):
            assert card.count(said) == 1
        (block,) = re.findall(r"```python\n(.*?)```", card[card.index("## β") :], flags=re.DOTALL)
        assert len(block.splitlines()) == 3
        found = {}
        exec(block, found)
        for a, b in zip(found["policy"].parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(a, b)
        state = trainer.beta_module.state_dict()
        assert type(found["beta"]) is type(trainer.beta_module) and not found["beta"].training
        assert all(torch.equal(value, state[key]) for key, value in found["beta"].state_dict().items())
        config = json.loads((tmp_path / "out" / "beta" / "config.json").read_text())
        about = {"rule": kind, "form": "standard", "paper": paper, "reference": "someone/some-model"}
        assert about.items() <= config.items()
        own = (tmp_path / "out" / "beta" / "README.md").read_text(encoding="utf-8")
        assert f"{kind}, in the standard form" in " ".join(own.split()) and "reference: someone/some-model" in own

    def test_every_rule_comes_back(self, world, tmp_path):
        for name in (*RULES, *OTHERS):
            if name == "weights":  # of this file
                continue
            own = made(name, world[2], CONFIG)
            own.save(tmp_path / name / "beta", form="standard")
            loaded = load_beta(tmp_path / name)
            assert type(loaded) is type(own)
            for key, value in own.state_dict().items():
                assert torch.equal(loaded.state_dict()[key], value)
        with pytest.raises(ValueError, match=r"folder: .* has no beta/config.json that names a rule"):
            load_beta(tmp_path)
        Halved().save(tmp_path / "weights" / "beta")
        with pytest.raises(ValueError, match=r"folder: .* has a Halved, expected ConstantBeta"):
            load_beta(tmp_path / "weights")


@pytest.mark.slow
class TestLoadRun:
    """The output folders of two steps on all pairs at once, as `load_run` reads them."""

    @pytest.fixture
    def trainers(self, world, tmp_path):
        model, tokenizer, scored = world
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / "model")
        model.config._name_or_path = str(tmp_path / "model")
        data = trl_dataset(scored)

        def run(name, cls, **own):
            trainer = cls(
                copy.deepcopy(model), ref_model=copy.deepcopy(model), train_dataset=data, processing_class=tokenizer,
                args=arguments(tmp_path / name, max_steps=2, per_device_train_batch_size=24, save_strategy="steps",
                               save_steps=2, save_only_model=True, eval_strategy="steps", eval_steps=2),
                eval_dataset=data.select(range(6)), **own,
            )  # fmt: skip
            trainer.train()
            return trainer

        config = TrainConfig.around(0.1, "inverse", beta_learning_rate=1e-2)
        return run("ours", BetaDPOTrainer, beta=made("network", scored, config), config=config), run(
            "plain", trl.DPOTrainer
        )

    def test_reads_what_they_logged_and_the_beta_that_was_saved(self, world, trainers, tmp_path):
        ours, scored = trainers[0], world[2]
        run = load_run(tmp_path / "ours")
        assert run.metadata["log"] == "checkpoint-2/trainer_state.json" and run.forms == ["inverse"]
        logged = [row for row in ours.state.log_history if "loss" in row]
        assert run.history["step"].tolist() == [1, 2] and set(run.history["variant"]) == {"inverse"}
        assert run.history["loss"].tolist() == [row["loss"] for row in logged]
        assert run.history["accuracy"].tolist() == [row["rewards/accuracies"] for row in logged]
        for name in ("beta/math", "s/code", "logratio/chosen/math", "logratio/rejected/dialogue", "pull/dpo/code"):
            assert run.history[name].tolist() == [row[name] for row in logged], name
        (evaluated,) = [row for row in ours.state.log_history if "eval_loss" in row]
        assert run.history["held_out_accuracy"].iloc[1] == evaluated["eval_rewards/accuracies"]
        assert run.history["held_out_logratio/chosen/math"].iloc[1] == evaluated["eval_logratio/chosen/math"]
        x = torch.tensor(scored["ref_features"][:3])
        expected = ours.beta_module.eval()(x).tolist()
        assert expected[0] != pytest.approx(10.0, rel=1e-3)  # it was trained
        assert [run.beta(prompt) for prompt in scored["prompt"][:3]] == pytest.approx(expected, rel=1e-5)
        with pytest.raises(ValueError, match="form: got 'standard', expected 'inverse'"):
            run.beta("a", form="standard")
        with pytest.raises(ValueError, match=r"beta: got 0\.1, expected None: .* has log-ratios"):
            load_run(tmp_path / "ours", beta=0.1)
        ours.save_model()  # the folder's own β comes first
        assert load_run(tmp_path / "ours").beta(scored["prompt"][0]) == pytest.approx(expected[0], rel=1e-5)

        # a plain trainer's log-ratios, against the log-probabilities that it logged beside its rewards
        run = load_run(tmp_path / "plain", beta=0.1)
        for answer in ("chosen", "rejected"):
            ratio = run.history[f"logps/{answer}"] - sum(scored[f"ref_{answer}_logps"]) / 24
            assert run.history[f"logratio/{answer}/all"].tolist() == pytest.approx(ratio.tolist(), abs=2e-5)
            assert abs(ratio.iloc[1]) > 1e-3
        assert set(run.history["variant"]) == {"fixed"} and run.history["beta/all"].tolist() == [0.1, 0.1]
        names = {finding.name for finding in run.diagnose() if finding.severity == "not checked"}
        assert names == set(SYMPTOMS) - {"both log-ratios fall", "training pairs memorised"}
        with pytest.raises(ValueError, match=r"beta: .*plain and its checkpoints have no folder beta"):
            run.beta("a")
        assert not [name for name in load_run(tmp_path / "plain").history if name.startswith("logratio/")]


OVERRIDDEN = {
    "_compute_loss": "self model inputs return_outputs",
    "_prepare_dataset": "self dataset processing_class args dataset_name",
    "_precompute_ref_logps": "self dataset name batch_size",
    "compute_ref_log_probs": "self model inputs",
    "_set_signature_columns_if_needed": "self",
    "_save_optimizer_and_scheduler": "self output_dir",
    "_load_optimizer_and_scheduler": "self checkpoint",
    "_load_best_model": "self",
    "evaluate": "self eval_dataset ignore_keys metric_key_prefix",
    "save_model": "self output_dir _internal_call",
    "create_model_card": "self model_name dataset_name tags",
    "log": "self logs start_time",
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_is_overridden_is_as_it_was(name):
    """The methods of TRL's and transformers' trainers that `BetaDPOTrainer` replaces or is called by."""
    found = " ".join(inspect.signature(getattr(trl.DPOTrainer, name)).parameters)
    assert found == OVERRIDDEN[name], (
        f"DPOTrainer.{name} of trl {trl.__version__} takes ({found}), expected ({OVERRIDDEN[name]}): see what has "
        "changed, adapt dpoviz/trl.py, then the bounds of the extra trl in pyproject.toml"
    )


@pytest.mark.slow
def test_what_is_read_of_trl_is_there(world, tmp_path):
    """The attributes, and the fields of a model's output, that `BetaDPOTrainer` reads or replaces."""
    trainer = trained(world, tmp_path, max_steps=1)
    for name in ("beta", "precompute_ref_logps", "ref_model", "loss_types", "use_weighting", "aux_loss_enabled",
                 "router_aux_loss_coef", "ld_alpha", "_metrics", "_total_train_tokens", "_tokenizer", "_tag_names",
                 "_is_vision_dataset", "_signature_columns"):  # fmt: skip
        assert hasattr(trainer, name), f"DPOTrainer of trl {trl.__version__} has no attribute {name}"
    inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    out = trainer.model(inputs["input_ids"], labels=labels, fused_lm_head=True)
    assert {"log_probs", "entropy", "mean_logits", "is_top1"} <= set(out), f"of trl {trl.__version__}"


class TestSharedPrefix:
    """TRL's step on our rows, against TRL's on its own."""

    @pytest.fixture
    def both(self, world, tmp_path):
        def make(**changed):
            model, tokenizer, scored = world
            data = trl_dataset(scored).remove_columns(["ref_chosen_logps", "ref_rejected_logps"])  # TRL makes its own
            common = {"train_dataset": data, "processing_class": tokenizer}
            found = []
            for cls, more in ((trl.DPOTrainer, {}), (BetaDPOTrainer, {"shared_prefix": True})):
                reference = copy.deepcopy(model)
                with torch.no_grad():  # so that h is not 0
                    for weight in reference.parameters():
                        weight += 0.1 * weight.roll(1, 0)
                args = arguments(tmp_path, label_smoothing=0.1, **changed)
                own = cls(copy.deepcopy(model), ref_model=reference, args=args, **common, **more)
                own.model.train()
                found.append(own)
            return found

        return make

    @staticmethod
    def step(trainer, rows):
        """The loss, the gradients and the metrics of a batch."""
        examples = [trainer.train_dataset[i] for i in rows]
        batch = trainer._prepare_inputs(trainer.data_collator(examples))
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        return loss.item(), [p.grad.clone() for p in trainer.model.parameters()], metrics

    def same(self, theirs, ours, rows=range(5)):
        (loss, gradients, metrics), (own, own_gradients, own_metrics) = (self.step(t, rows) for t in (theirs, ours))
        assert own == pytest.approx(loss, rel=1e-4, abs=1e-6)
        largest = max(g.abs().max() for g in gradients)
        for a, b in zip(own_gradients, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest.item())
        assert len(metrics) > 10
        for name, value in metrics.items():
            assert own_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name

    def test_every_loss_of_trl(self, both):
        theirs, ours = both()
        for loss in LOSSES:
            theirs.loss_types = ours.loss_types = [loss]
            self.same(theirs, ours)
        assert ours._sharing and ours._shared_prefix
        weights = [0.5, 1.0]
        theirs.loss_types, theirs.loss_weights = ours.loss_types, ours.loss_weights = ["sigmoid", "sft"], weights
        self.same(theirs, ours)
        # it is compared: the control takes another loss
        ours.loss_types = ["hinge", "sft"]
        with pytest.raises(AssertionError):
            self.same(theirs, ours)

    @pytest.mark.parametrize(
        "changed",
        [
            {"use_weighting": True},
            {"ld_alpha": 0.4},
            {"f_divergence_type": "js_divergence"},
            {"precompute_ref_log_probs": True},
            {"max_length": 7, "truncation_mode": "keep_end"},  # the two prompts of a pair are cut differently
            {"max_length": 7, "truncation_mode": "keep_start"},
            {"gradient_checkpointing": True},
        ],
        ids=lambda own: "-".join(map(str, own)),
    )
    def test_settings_of_trl(self, both, changed):
        self.same(*both(**changed))

    @pytest.mark.slow
    def test_in_mixed_precision(self, world, tmp_path):
        """TRL's default; two ways to round, of log-probabilities of about 20 nats."""
        found = [
            trained(world, tmp_path, ConstantBeta(0.1), CONFIG, cls=cls, bf16=True, learning_rate=1e-4)
            for cls in (BetaDPOTrainer, functools.partial(BetaDPOTrainer, shared_prefix=True))
        ]
        assert found[1]._sharing and found[1]._shared_prefix
        assert found[1].accelerator.mixed_precision == "bf16"
        assert losses(found[1]) == pytest.approx(losses(found[0]), abs=0.02)
        assert losses(found[1], "logps/chosen") == pytest.approx(losses(found[0], "logps/chosen"), rel=0.01)

    def test_equal_prompts_are_laid_out_once(self, both):
        _, ours = both()
        batch = ours._prepare_inputs(ours.data_collator([ours.train_dataset[i] for i in (0, 1, 0)]))
        rows = ours._split(batch)[1]["shared_rows"].batch
        first, second = (ours.train_dataset[i] for i in (0, 1))
        tokens = sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) - 2
                     for row in (first, second))  # fmt: skip
        assert (rows.segments >= 0).sum() == tokens

    @pytest.mark.slow
    def test_with_an_adapter(self, world, tmp_path):
        peft = pytest.importorskip("peft")
        model, tokenizer, scored = world
        for given in ("config", "model"):  # the reference is the model without its adapter, or a copy of the adapter
            found = []
            for cls, more in ((trl.DPOTrainer, {}), (BetaDPOTrainer, {"shared_prefix": True})):
                own, lora = copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj", "v_proj"])
                torch.manual_seed(0)
                if given == "model":
                    own = peft.get_peft_model(own, lora)
                else:
                    more = {**more, "peft_config": lora}
                trainer = cls(own, args=arguments(tmp_path), train_dataset=trl_dataset(scored),
                              processing_class=tokenizer, **more)  # fmt: skip
                trainer.train()
                found.append(trainer)
            theirs, ours = found
            assert ours._sharing and ours._shared_prefix
            assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
            assert losses(ours, "grad_norm") == pytest.approx(losses(theirs, "grad_norm"), rel=1e-3)

    @pytest.mark.slow
    def test_with_a_rule_and_a_beta_that_learns(self, world, tmp_path):
        scored = world[2]
        for name in ("beta-dpo", "epsilon-dpo", "network"):
            config = TrainConfig.around(0.1, "standard")
            found = [
                trained(world, tmp_path, made(name, scored, config), config, cls=cls)
                for cls in (BetaDPOTrainer, functools.partial(BetaDPOTrainer, shared_prefix=True))
            ]
            assert found[1]._sharing and not found[0]._sharing
            assert losses(found[1]) == pytest.approx(losses(found[0]), rel=1e-4), name

    @pytest.mark.slow
    def test_falls_back_and_says_so(self, world, tmp_path, caplog):
        """A model that adds the number of the row's position to its states, whatever `position_ids` says."""
        model, tokenizer, scored = world

        def shift(module, args, out):
            return out + torch.arange(out.shape[1], dtype=out.dtype)[:, None]

        model.model.embed_tokens.register_forward_hook(shift)
        found = []
        for cls, more in ((trl.DPOTrainer, {}), (BetaDPOTrainer, {"shared_prefix": True})):
            trainer = cls(copy.deepcopy(model), ref_model=copy.deepcopy(model), args=arguments(tmp_path),
                          train_dataset=trl_dataset(scored), processing_class=tokenizer, **more)  # fmt: skip
            trainer.train()
            found.append(losses(trainer))
        assert found[1] == pytest.approx(found[0], rel=1e-6)
        said = [record.getMessage() for record in caplog.records if record.name == "dpoviz.trl"]
        assert said == ["shared_prefix: LlamaForCausalLM gives other scores there than by itself; TRL's own rows are "
                        "used, one for each answer"]  # fmt: skip

    @pytest.mark.slow
    def test_a_stream_is_as_long_as_its_rows_may_be(self, world, tmp_path):
        model, tokenizer, scored = world
        for limit, longest in ((None, 64), (20, 20)):  # the model's context
            trainer = BetaDPOTrainer(
                copy.deepcopy(model), ref_model=copy.deepcopy(model), args=arguments(tmp_path, max_length=limit),
                train_dataset=trl_dataset(scored).to_iterable_dataset(), processing_class=tokenizer, shared_prefix=True,
            )  # fmt: skip
            trainer.train()
            assert trainer._sharing and trainer._longest == longest


def launched(kind, script, *arguments):
    """As many processes as `kind` says, or a line of the README's for several GPUs on two; and its environment."""
    if isinstance(kind, int):
        return command(kind, script, *arguments), {}
    lines = [line for block in blocks("bash") for line in block.splitlines() if " dpo.py" in line]
    (line,) = (line for line in lines if ("--use_fsdp" if kind == "fsdp" else "--use_deepspeed") in line)
    if kind == "zero2":
        line = line.replace("--zero_stage 3 --zero3_save_16bit_model true", "--zero_stage 2")
    line = line.split(" dpo.py")[0].replace("--num_processes 4", "--num_processes 2 --main_process_port 0")
    line = line.replace("accelerate launch", f"{sys.executable} -m accelerate.commands.launch")
    environment = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    return [*line.split(), *map(str, (SCRIPTS / "as_on_gpus.py", script, *arguments))], environment


DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install deepspeed")


@pytest.mark.slow
class TestTwoProcesses:
    """A batch of four, or two shares of two: beta's gradients are averaged before they are clipped."""

    @pytest.fixture(scope="class")
    def one(self, tmp_path_factory):
        return self.left(tmp_path_factory.mktemp("one"), 1)

    @staticmethod
    def left(folder, kind, *checkpoint):
        folder.mkdir(exist_ok=True)
        line, environment = launched(kind, SCRIPTS / "train_trl.py", folder, *checkpoint)
        finish(line, **environment)
        found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        assert [own["processes"] for own in found] == [len(found)] * len(found)
        return found, torch.load(folder / "policy.pt")

    def equal(self, found, one):
        (first, second), policy = found
        (alone,), expected = one
        assert first["beta"] == second["beta"]
        assert min(abs(value) for value in alone["beta"]) > 1e-3  # it moved
        assert first["beta"] == pytest.approx(alone["beta"], abs=1e-5)
        assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert first["rule"] == second["rule"] == pytest.approx(alone["rule"], rel=1e-4, abs=1e-5)
        assert alone["shared"]
        assert len(set(alone["losses"])) == 4
        torch.testing.assert_close(policy, expected, rtol=1e-5, atol=1e-5)

    def test_train_one_beta(self, one, tmp_path):
        found = self.left(tmp_path / "two", 2)
        self.equal(found, one)
        assert found[0][0]["shared"]

    @pytest.mark.parametrize(
        ("kind", "name", "weights"),
        [
            ("fsdp", "FSDP", 0.5),
            pytest.param("zero2", "DEEPSPEED", 1.0, marks=DEEPSPEED),
            pytest.param("zero3", "DEEPSPEED", 0.5, marks=DEEPSPEED),
        ],
    )
    def test_hold_pieces_of_one_policy(self, one, tmp_path, kind, name, weights):
        found = self.left(tmp_path / "whole", kind)
        self.equal(found, one)
        for own in found[0]:
            assert own["kind"] == name and own["shared"] == (kind == "zero2")
            assert (own["weights"], own["moments"]) == pytest.approx((weights, 0.5), abs=0.01)
        self.equal(self.left(tmp_path / "resumed", kind, tmp_path / "whole" / "out" / "checkpoint-2"), one)

    @pytest.mark.parametrize("kind", [1, "fsdp", pytest.param("zero3", marks=DEEPSPEED)])
    def test_run_the_script_of_the_readme(self, make_model, tokenizer, tmp_path, kind):
        start = make_model(dtype=torch.float32, max_position_embeddings=1024)
        for part in (start, tokenizer):
            part.save_pretrained(tmp_path / "my-model")
        rows = [{"prompt": f"a b {word}", "chosen": f" {word} c", "rejected": " d", "task": TASKS[i % 2]}
                for i, word in enumerate("efghijklmnopqrst")]  # fmt: skip
        (tmp_path / "my-pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (script,) = blocks("py")
        assert "logging_steps=1" in script and 'report_to="trackio"' in script
        # three steps of its learning rate would be lost in bfloat16
        settings = "logging_steps=1, learning_rate=1e-2" + (", use_cpu=True, bf16=False" if kind == 1 else "")
        script = script.replace('report_to="trackio"', "report_to=[]").replace("logging_steps=1", settings)
        (tmp_path / "dpo.py").write_text(script)
        line, environment = launched(kind, tmp_path / "dpo.py")
        finish(line, cwd=tmp_path, **environment)
        (left,) = (tmp_path / "my-dpo").glob("checkpoint-*")
        steps = [row for row in json.loads((left / "trainer_state.json").read_text())["log_history"] if "loss" in row]
        assert (
            len(steps) == (6 if kind == 1 else 3) and steps[0]["rewards/margins"] == 0 != steps[-1]["rewards/margins"]
        )
        beta, policy = (
            BetaNetwork.from_pretrained(left / "beta"),
            AutoModelForCausalLM.from_pretrained(left, trust_remote_code=False),
        )
        assert beta.layers[-1].weight.abs().max() > 0
        assert torch.equal(load_beta(tmp_path / "my-dpo").layers[-1].weight, beta.layers[-1].weight)
        assert (policy.lm_head.weight.float() - start.lm_head.weight).abs().max() > 1e-2
        run = load_run(tmp_path / "my-dpo", reference=tmp_path / "my-model")
        assert len(run.table) == len(run.scores) == 2 and len(run.steps) == 3  # epochs
        betas = [run.beta(prompt) for prompt in run.table["prompt"]]
        assert betas == pytest.approx(run.table["beta"].tolist(), rel=1e-3)
        assert run.scores["h"].abs().min() > 0 and not run.missing()[:-1]


class TestData:
    def test_chats_and_texts(self, world):
        scored = world[2].select(range(3))
        texts = trl_dataset(scored)
        assert texts["prompt"][:] == scored["prompt"][:] and set(COLUMNS) <= set(texts.column_names)
        chat = [{"role": "user", "content": "a"}]
        chats = trl_dataset(Dataset.from_dict({**scored[:], "messages": [chat] * 3}))
        assert chats[0]["prompt"] == chat
        assert chats[0]["chosen"] == [{"role": "assistant", "content": scored[0]["chosen"]}]
        with pytest.raises(ValueError, match="1 of 3 prompts are chats, expected all or none"):
            trl_dataset(Dataset.from_dict({**scored[:], "messages": [chat, None, None]}))

    @pytest.mark.slow
    def test_a_set_without_the_columns_is_refused(self, world, tmp_path):
        data = trl_dataset(world[2]).remove_columns("ref_entropy")
        with pytest.raises(ValueError, match="train_dataset: lacks ref_entropy; expected what trl_dataset returns"):
            trained(world, tmp_path, TaskBeta(TASKS, 0.1), TrainConfig.around(0.1, "standard"), data=data)
        bare = data.remove_columns(["task", "ref_features"])
        assert len(losses(trained(world, tmp_path, ConstantBeta(0.1), data=bare))) == 3  # it reads none of them

    @pytest.mark.slow
    def test_streams_and_several_sets_to_evaluate_on(self, world, tmp_path):
        model, tokenizer, scored = world
        data = trl_dataset(scored)
        beta = BetaNetwork(len(scored["ref_features"][0]), beta0=0.1, hidden=(8,))
        common = {"beta": beta, "processing_class": tokenizer, "args": arguments(tmp_path)}
        config = TrainConfig.around(0.1, "standard")
        with pytest.raises(ValueError, match=r"config\.alpha: got None, expected a number"):
            BetaDPOTrainer(model, config=config, train_dataset=data.to_iterable_dataset(), **common)
        without = data.remove_columns("ref_features")
        with pytest.raises(ValueError, match=r"eval_dataset\['b'\]: lacks ref_features"):
            BetaDPOTrainer(model, config=config, train_dataset=data, eval_dataset={"a": data, "b": without}, **common)
        trainer = BetaDPOTrainer(
            copy.deepcopy(model), ref_model=copy.deepcopy(model), config=replace(config, alpha=0.05),
            train_dataset=data.to_iterable_dataset(), eval_dataset={"a": data, "b": data.select(range(6))}, **common,
        )  # fmt: skip
        trainer.train()
        found = trainer.evaluate()
        assert found["eval_a_loss"] > 0 and found["eval_b_loss"] > 0
        assert len(losses(trainer, "eval_beta/math")) == 2  # once a set
        assert len(losses(trainer)) == 3

    def test_a_stream_whose_reference_is_to_be_precomputed_is_refused_by_trl(self, world, tmp_path):
        model, tokenizer, scored = world
        stream = trl_dataset(scored).to_iterable_dataset().map(lambda row: row)
        assert stream.column_names is None
        with pytest.raises(ValueError, match=r"precompute_ref_log_probs.*not supported with IterableDataset"):
            BetaDPOTrainer(
                model, beta=ConstantBeta(0.1), config=TrainConfig.around(0.1, "standard"), train_dataset=stream,
                processing_class=tokenizer, args=arguments(tmp_path, precompute_ref_log_probs=True),
            )  # fmt: skip
