"""The loop: equal to a loop written by hand, resumable at any step, honest about bad input."""

import copy
import json
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.worlds import (
    EOS,
    PAD,
    SMALL,
    TASKS,
    VOCABULARY,
    Killed,
    by_hand,
    dies_at,
    network,
    run,
    small_model,
    small_pairs,
    weights,
)

import dpoviz.training.state as module
from dpoviz.beta import ConstantBeta, TaskBeta
from dpoviz.rules import Rule, RuleOutput
from dpoviz.training import probes
from dpoviz.training.batch import ANSWER_ENTROPY, COLUMNS, shuffled_rows
from dpoviz.training.config import RULES, TrainConfig, alpha_for_mean
from dpoviz.training.loop import train
from dpoviz.training.methods import build


@pytest.fixture(scope="module")
def world():
    model = small_model()
    return model, small_pairs(model), small_pairs(model, n=9, seed=1)


class TestAgainstALoopByHand:
    """A second loop, from the formulas, without the library's losses, batches or optimiser wrappers."""

    @pytest.mark.slow
    @pytest.mark.parametrize("form", ["inverse", "standard"])
    def test_same_weights_and_losses(self, world, form):
        config = TrainConfig.around(0.1, form, **SMALL)
        reference, pairs, _ = world
        beta = network()
        beta.beta0 = config.beta0
        twin_policy, twin_beta = copy.deepcopy(reference).cpu(), copy.deepcopy(beta)
        policy, history = run(world, config, beta)

        alpha = config.beta0 / np.mean(pairs["ref_entropy"])
        penalty = config.regularization(alpha)
        optimizers = [
            torch.optim.AdamW(twin_policy.parameters(), lr=1e-3, weight_decay=0.0),
            torch.optim.AdamW(twin_beta.parameters(), lr=config.beta_learning_rate, weight_decay=0.0),
        ]
        losses = []
        for step, rows in enumerate(shuffled_rows(len(pairs), 6, 7, seed=config.seed + 2)):
            for optimizer, rate in zip(optimizers, (1e-3, config.beta_learning_rate), strict=True):
                optimizer.param_groups[0]["lr"] = rate * min(1.0, step / 2)
            twin_beta.train()
            x = torch.tensor([pairs[i]["ref_features"] for i in rows])
            b = twin_beta(x)
            s = 1 / b if form == "inverse" else b
            h = []
            for i in rows:
                row = pairs[i]
                ratios = [
                    by_hand(twin_policy, row["prompt_ids"], row[f"{side}_ids"]) - row[f"ref_{side}_logps"]
                    for side in ("chosen", "rejected")
                ]
                h.append(ratios[0] - ratios[1])
            loss = torch.log1p(torch.exp(-s * torch.stack(h))).mean()
            outside = (b - config.beta_max).clamp(min=0) + (config.beta_min - b).clamp(min=0)
            loss = loss + penalty.range * outside.mean()
            entropy = torch.tensor([pairs[i]["ref_entropy"] for i in rows])
            loss = loss + penalty.entropy * ((b - alpha * entropy) ** 2).mean()
            twin_beta.eval()
            for row in x:
                jacobian = torch.autograd.functional.jacobian(lambda z: twin_beta(z[None])[0], row, create_graph=True)
                loss = loss + penalty.smoothness * (jacobian**2).sum() / len(x)
            losses.append(loss.item())
            loss.backward()
            for net, optimizer in zip((twin_policy, twin_beta), optimizers, strict=True):
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        # float32, seven steps of Adam, which divides by the root of small squares: rounding grows to about 1e-4
        assert history["loss"].to_numpy() == pytest.approx([losses[i] for i in (0, 2, 4, 6)], rel=1e-4)
        assert torch.allclose(weights(policy), weights(twin_policy), atol=2e-4)
        assert torch.allclose(weights(beta), weights(twin_beta), atol=2e-3)
        assert not torch.allclose(weights(policy), weights(reference), atol=2e-4)

    def test_forms_agree_while_beta_is_fixed(self, world):
        # what lets the demo run stage 1 once for both forms
        a, b = (
            run(world, TrainConfig.around(0.1, form, **SMALL), ConstantBeta(beta0), stage=1)[0]
            for form, beta0 in (("inverse", 10.0), ("standard", 0.1))
        )
        assert torch.allclose(weights(a), weights(b), atol=1e-5)


def test_what_measures_after_each_update_changes_nothing(world):
    config = TrainConfig.around(0.1, "standard", **SMALL)
    plain, _ = run(world, config, network())
    policy, beta, seen = copy.deepcopy(world[0]), network(), []

    def measure(updates):
        ratios = probes.log_ratios(policy, world[2], pad_id=PAD, batch_size=4, progress=False)
        beta.eval()  # as a probe of the loop does
        seen.append((updates, np.abs(ratios).max()))

    common = {"stage": 2, "pad_id": PAD, "eos_id": EOS, "held_out": world[2], "reference": world[0]}
    train(policy, beta, world[1], config, **common, after=measure, progress=False)
    assert torch.equal(weights(policy), weights(plain))
    assert [updates for updates, _ in seen] == list(range(1, 8))
    assert seen[0][1] < 1e-5 < 1e-2 < seen[-1][1]  # the first step warms up from a rate of 0


class TestResume:
    @pytest.mark.parametrize("killed_after", [1, 3, 4, 6, 7])
    def test_ends_as_if_it_had_not_been_killed(self, world, tmp_path, killed_after):
        config = TrainConfig.around(0.1, "inverse", **SMALL)
        whole_beta = network()
        whole, history = run(world, config, whole_beta)

        try:
            run(world, config, dies_at(network(), killed_after), out=tmp_path)
        except Killed:
            pass
        beta = network(seed=5)  # weights that the checkpoint must replace
        if killed_after < config.checkpoint_every:
            beta = network()
        policy, resumed = run(world, config, beta, out=tmp_path)
        assert torch.equal(weights(policy, beta), weights(whole, whole_beta))
        pd.testing.assert_frame_equal(resumed, history, check_exact=True)

    @pytest.mark.parametrize("changed", ["config", "data", "stage"])
    def test_another_run_in_the_folder_is_refused(self, world, tmp_path, changed):
        config = TrainConfig.around(0.1, "inverse", **SMALL)
        run(world, config, network(), out=tmp_path)
        reference, pairs, held_out = world
        if changed == "config":
            config = TrainConfig.around(0.1, "inverse", **{**SMALL, "seed": 1})
        if changed == "data":
            world = reference, pairs.select(range(len(pairs) - 1)), held_out
        told = {
            "config": "config.seed: 0 there, 1 now",
            "data": "pairs: '[0-9a-f]+' there",
            "stage": "stage: 2 there, 1 now",
        }
        with pytest.raises(ValueError, match=rf"other data \({told[changed]}.*\); give another folder"):
            run(world, config, network(), out=tmp_path, stage=1 if changed == "stage" else 2)


@pytest.fixture(scope="module")
def history(world):
    return run(world, TrainConfig.around(0.1, "inverse", **SMALL), network())[1]


class TestHistory:
    def test_rows_and_columns(self, history):
        assert history["step"].tolist() == [4, 6, 8, 10]  # four steps of stage 1 come before
        assert history["kl"].notna().tolist() == [True, False, False, True]
        grads = [f"grad/{term}/{task}" for term in ("dpo", "range", "smoothness", "entropy") for task in TASKS]
        assert set(grads) <= set(history.columns)
        assert history[[f"beta/{task}" for task in TASKS]].notna().all(axis=None)

    def test_loss_is_the_sum_of_its_terms(self, history):
        terms = history[[f"loss/{term}" for term in ("dpo", "range", "smoothness", "entropy")]].sum(axis=1)
        assert terms.to_numpy() == pytest.approx(history["loss"].to_numpy(), rel=1e-5)

    def test_first_pull_of_the_entropy_term_by_hand(self, world, history):
        # beta is beta0 everywhere at the first step, so the pull is 2 lambda (beta0 - alpha H), averaged by task
        config = TrainConfig.around(0.1, "inverse", **SMALL)
        pairs = world[1]
        alpha = alpha_for_mean(pairs["ref_entropy"], config.beta0)
        rows = shuffled_rows(len(pairs), 6, 7, seed=config.seed + 2)[0]
        for task in TASKS:
            entropies = [pairs[i]["ref_entropy"] for i in rows if pairs[i]["task"] == task]
            expected = 2 * config.regularization(alpha).entropy * (config.beta0 - alpha * np.mean(entropies))
            # entropies are read in float32
            assert history[f"grad/entropy/{task}"][0] == pytest.approx(expected, rel=1e-4, abs=1e-7)

    def test_kl_is_zero_at_the_reference_and_held_out_accuracy_is_a_share(self, world, history):
        # the warm-up's first learning rate is 0, so after step 0 the policy still is the reference
        assert history["kl"][0] == pytest.approx(0, abs=1e-5)
        assert history["kl"][3] != pytest.approx(0, abs=1e-4)
        assert history["held_out_accuracy"].dropna().between(0, 1).all()

    def test_sampled_kl_agrees_with_the_exact_one(self, world):
        # one-token answers: KL is a sum over the vocabulary
        reference = world[0]
        policy = small_model(seed=3)
        prompt = [5, 6, 7]
        models = probes.Models(policy, reference, PAD, EOS)
        found = probes.sampled_kl(models, [prompt] * 4000, ["math"] * 4000, max_new_tokens=1, seed=0)
        with torch.no_grad():
            p, q = (
                m(torch.tensor([prompt], device=m.device)).logits[0, -1].double().log_softmax(-1)
                for m in (policy, reference)
            )
        exact = (p.exp() * (p - q)).sum().item()
        assert abs(found["kl"] - exact) < 4 * found["kl_se"]
        assert found["kl_se"] < 0.1 * exact  # the control: an estimate this sharp would miss a wrong formula

    def test_stage_1_has_no_regularisers(self, world):
        history = run(world, TrainConfig.around(0.1, "inverse", **SMALL), ConstantBeta(10.0), stage=1)[1]
        assert history["loss"].to_numpy() == pytest.approx(history["loss/dpo"].to_numpy())
        assert not [column for column in history.columns if column.startswith("grad/")]

    def test_any_beta_that_learns_is_trained(self, world):
        beta = TaskBeta(TASKS, 10.0)
        # its features are not read, so that there is no gradient to penalise
        run(world, TrainConfig.around(0.1, "inverse", lambda_smoothness=0.0, **SMALL), beta)
        assert (beta.log_ratio != 0).all()


class LastBatch(Rule):
    """A rule with a memory: beta is 1 plus the mean |h| of the batch before; pairs ranked wrongly weigh nothing."""

    form = "standard"
    wrong = -1e-3  # before the policy moves h is 0 but for rounding, and no pair is ranked wrongly

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, seen):
        beta = (1 + self.seen).expand(len(seen.h))
        self.seen = seen.h.abs().mean()
        weight = (seen.h >= self.wrong).float()
        return RuleOutput(beta, weight)


class TestRules:
    def test_a_rule_looks_at_h_weighs_pairs_and_remembers(self, world):
        """Against a loop by hand, which has the log-probabilities by two separate passes."""
        reference, pairs, _ = world
        config = TrainConfig.around(0.1, "standard", **{**SMALL, "log_every": 1, "stage2_steps": 3})
        _, history = run(world, config, LastBatch())
        policy = copy.deepcopy(reference).cpu()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, weight_decay=0.0)
        beta = 1.0
        for step, rows in enumerate(shuffled_rows(len(pairs), config.batch_size, 3, seed=config.seed + 2)):
            h = torch.stack(
                [
                    by_hand(policy, p["prompt_ids"], p["chosen_ids"]) - p["ref_chosen_logps"]
                    - by_hand(policy, p["prompt_ids"], p["rejected_ids"]) + p["ref_rejected_logps"]
                    for p in pairs.select(rows)
                ]
            )  # fmt: skip
            kept = (h >= LastBatch.wrong).float()
            loss = (kept * -torch.nn.functional.logsigmoid(beta * h)).sum() / kept.sum()
            assert history["loss"][step] == pytest.approx(loss.item(), rel=1e-3)
            beta = 1 + h.abs().mean().item()
            optimizer.param_groups[0]["lr"] = config.policy_learning_rate * min(1, step / config.warmup_steps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), config.policy_max_norm)
            optimizer.step()

    def test_what_a_rule_reads_of_the_reference_is_part_of_its_checkpoint(self, world, tmp_path):
        reference, pairs, held_out = world
        first, other = (
            pairs.map(lambda row, i, n=n: dict.fromkeys(ANSWER_ENTROPY, (i % n + 1.0) / 8), with_indices=True)
            for n in (3, 5)
        )
        for form in RULES["mallows"].forms:
            config = TrainConfig.around(0.1, form, **SMALL)
            start = build("mallows", config, first, vocabulary=30)
            run((reference, first, held_out), config, start, out=tmp_path / form)
            start = build("mallows", config, first, vocabulary=30)
            with pytest.raises(ValueError, match="holds a run with another configuration or other data"):
                run((reference, other, held_out), config, start, out=tmp_path / form)

    def test_its_memory_is_in_the_checkpoint(self, world, tmp_path):
        config = TrainConfig.around(0.1, "standard", **SMALL)
        rule = LastBatch()
        run(world, config, rule, out=tmp_path)
        again = LastBatch()
        run(world, config, again, out=tmp_path)  # finds the finished run
        assert rule.seen > 0 and torch.equal(again.seen, rule.seen)

    def test_a_rule_of_the_standard_form_is_refused_in_the_other(self, world):
        with pytest.raises(ValueError, match="LastBatch is defined in the standard form, got 'inverse'"):
            run(world, TrainConfig.around(0.1, "inverse", **SMALL), LastBatch())


@pytest.mark.slow
class TestBetaPairs:
    """Beta learns from pairs that the policy does not see, and the policy from its own."""

    def test_beta_learns_from_its_pairs_alone(self, world):
        reference, pairs, held_out = world
        apart = small_pairs(reference, n=12, seed=5)
        config = TrainConfig.around(0.1, "standard", **{**SMALL, "policy_learning_rate": 1e-12})

        def swap(data):
            return data.map(
                lambda r: {"ref_chosen_logps": r["ref_rejected_logps"], "ref_rejected_logps": r["ref_chosen_logps"]}
            )

        def learned(calibration, own=pairs):
            beta = network()
            run((reference, own, held_out), config, beta, beta_pairs=calibration)
            return weights(beta)

        # with a policy that stands still, what beta learns is a function of the calibration pairs
        assert torch.equal(learned(apart), learned(apart, swap(pairs)))
        assert not torch.allclose(learned(apart), learned(swap(apart)), atol=1e-4)
        assert not torch.allclose(learned(None), learned(None, swap(pairs)), atol=1e-4)

    def test_temperature_of_a_policy_that_stands_still(self, world):
        """Against the maximum-likelihood scale by a search: what calibrating a temperature is."""
        reference = world[0]
        policy = small_model(seed=4)
        apart = small_pairs(reference, n=24, seed=6)
        config = TrainConfig(
            form="standard", initial_scale=0.5, scale_min=1e-3, scale_max=1e3, lambda_range=0.0, lambda_smoothness=0.0,
            lambda_entropy=0.0, stage2_steps=200, batch_size=24, beta_learning_rate=0.04, policy_learning_rate=1e-12,
            warmup_steps=0, log_every=200, probe_every=200, checkpoint_every=1000,
        )  # fmt: skip
        beta = TaskBeta(TASKS, 0.5)
        train(policy, beta, apart, config, stage=2, pad_id=PAD, eos_id=EOS, beta_pairs=apart, progress=False)
        for i, task in enumerate(TASKS):
            rows = [r for r in apart if r["task"] == task]
            with torch.no_grad():
                h = [
                    float(by_hand(policy, r["prompt_ids"], r["chosen_ids"]))
                    - float(by_hand(policy, r["prompt_ids"], r["rejected_ids"]))
                    - (r["ref_chosen_logps"] - r["ref_rejected_logps"])
                    for r in rows
                ]
            grid = np.exp(np.linspace(np.log(1e-4), np.log(1e3), 20001))
            loss = sum(np.logaddexp(0, -grid * value) for value in h)
            found = beta.beta0 * float(beta.log_ratio[i].detach().exp())
            if 1e-3 < grid[loss.argmin()] < 1e2:  # a finite optimum
                assert found == pytest.approx(grid[loss.argmin()], rel=0.02)


class TestAdapters:
    """LoRA: the reference is the policy with its adapter off, and a checkpoint holds the adapter alone."""

    @pytest.fixture
    def adapted(self):
        peft = pytest.importorskip("peft")

        def make(reference):
            torch.manual_seed(0)
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a deprecated name
                return peft.get_peft_model(copy.deepcopy(reference), config)

        return make

    @pytest.mark.slow
    def test_kl_is_that_of_a_second_copy(self, world, adapted):
        reference, pairs, held_out = world
        histories = []
        for own in (True, False):
            policy = adapted(reference)
            config = TrainConfig.around(0.1, "inverse", **SMALL)
            histories.append(
                train(
                    policy, network(), pairs, config, stage=2, pad_id=PAD, eos_id=EOS, held_out=held_out,
                    reference=policy if own else reference, progress=False,
                ).history
            )  # fmt: skip
        assert histories[0]["kl"].dropna().iloc[-1] > 1e-4
        # a GPU adds in an order of its own, so that the last digits of two runs may differ there
        pd.testing.assert_frame_equal(*histories, rtol=1e-4 if torch.cuda.is_available() else 1e-12)

    def test_checkpoint_holds_what_learns_and_resumes(self, world, adapted, tmp_path):
        reference, pairs, _ = world
        config = TrainConfig.around(0.1, "inverse", **SMALL)
        common = {"stage": 2, "pad_id": PAD, "eos_id": EOS, "progress": False}
        whole = adapted(reference)
        train(whole, network(), pairs, config, **common)
        frozen = sum(p.numel() * 4 for p in whole.parameters() if not p.requires_grad)
        policy = adapted(reference)
        train(policy, network(), pairs, config, out=tmp_path, **common)
        saved = max(tmp_path.glob("checkpoint-*/model.safetensors"))
        assert saved.stat().st_size < frozen
        again = adapted(reference)
        train(again, network(), pairs, config, out=tmp_path, **common)  # finds the finished run
        assert torch.equal(weights(again), weights(whole))

    def test_a_policy_without_adapter_is_no_reference_of_itself(self, world):
        reference, pairs, held_out = world
        policy = copy.deepcopy(reference)
        with pytest.raises(ValueError, match="without an adapter"):
            train(
                policy, ConstantBeta(10.0), pairs, TrainConfig.around(0.1, "inverse", **SMALL), stage=1, pad_id=PAD,
                eos_id=EOS, held_out=held_out, reference=policy, progress=False,
            )  # fmt: skip


class TestBadInput:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("scale_min", 50.0),
            ("scale_min", 0.0),
            ("scale_max", 0.05),
            ("alpha", 0.0),
            ("alpha", -1.0),
            ("initial_scale", -1.0),
            ("initial_scale", 1e200),
            ("form", "both"),
            ("seed", 2**32),
            ("stage1_steps", 10**12),
            ("lambda_entropy", -0.1),
            ("lambda_range", float("nan")),
            ("policy_learning_rate", 0.0),
            ("batch_size", 0),
            ("batch_size", 2.5),
            ("stage1_steps", -1),
            ("policy_max_norm", 0.0),
        ],
    )
    def test_configuration(self, field, value):
        name = "scale_min, scale_max" if value in (50.0, 0.05) else field
        with pytest.raises(ValueError, match=f"^{name}: got .*expected"):
            TrainConfig(**{field: value})

    def test_missing_column(self, world):
        reference, pairs, held_out = world
        with pytest.raises(ValueError, match="pairs: lacks ref_entropy; expected what reference_pass returns"):
            run((reference, pairs.remove_columns("ref_entropy"), held_out), TrainConfig(**SMALL), network())

    def test_fewer_pairs_than_a_batch(self, world):
        reference, pairs, held_out = world
        with pytest.raises(ValueError, match="pairs: got 3, expected at least batch_size = 6"):
            run((reference, pairs.select(range(3)), held_out), TrainConfig(**SMALL), network())

    def test_stage(self, world):
        with pytest.raises(ValueError, match="stage: got 3"):
            run(world, TrainConfig(**SMALL), network(), stage=3)

    def test_a_policy_that_breaks_is_named_by_step_and_pair(self, world):
        reference, pairs, held_out = world
        broken = copy.deepcopy(reference)
        with torch.no_grad():
            broken.lm_head.weight[7] = float("nan")
        with pytest.raises(FloatingPointError, match=r"step 0: the policy's log-probabilities are not finite for rows"):
            run((broken, pairs, held_out), TrainConfig(**SMALL), ConstantBeta(10.0), stage=1)

    def test_entropy_that_cannot_calibrate_alpha(self):
        with pytest.raises(ValueError, match=r"ref_entropy: got a mean of 0\.0 nats"):
            alpha_for_mean([0.0, 0.0], 0.1)


class TestAround:
    def test_relative_departures_cost_the_same_in_both_forms(self):
        inverse, standard = (TrainConfig.around(0.1, form) for form in ("inverse", "standard"))
        assert (inverse.beta0, standard.beta0) == (10.0, 0.1)
        for config in (inverse, standard):
            assert config.beta_min == config.beta0 / 4
            assert config.beta_max == config.beta0 * 4
            penalty = config.regularization(1.0)
            assert penalty.range * config.beta0 == pytest.approx(4.0)
            assert penalty.entropy * config.beta0**2 == pytest.approx(0.1)
            assert config.alpha_for([1.0, 3.0]) == pytest.approx(config.beta0 / 2)
        assert inverse == TrainConfig()

    def test_the_range_is_one_of_scales_in_both_forms(self):
        inverse, standard = (
            TrainConfig.around(0.1, form, scale_min=0.05, scale_max=0.4) for form in ("inverse", "standard")
        )
        assert (inverse.beta_min, inverse.beta_max) == pytest.approx((2.5, 20.0))
        assert (standard.beta_min, standard.beta_max) == (0.05, 0.4)

    def test_alpha_is_calibrated_so_that_alpha_h_means_beta0(self):
        assert alpha_for_mean([1.0, 3.0], 10.0) == pytest.approx(5.0)


def test_data_order_sees_every_pair_once_an_epoch():
    batches = shuffled_rows(10, 5, 6, seed=0)
    for epoch in range(3):
        assert sorted(batches[2 * epoch] + batches[2 * epoch + 1]) == list(range(10))
    assert batches == shuffled_rows(10, 5, 6, seed=0) != shuffled_rows(10, 5, 6, seed=1)


def test_columns_are_those_of_the_fixture(world):
    assert set(COLUMNS) <= set(world[1].column_names)
    assert json.dumps(world[1]["ref_features"][0])


def test_a_tie_counts_half():
    # at the reference h is 0 up to rounding, and neither answer is ranked above the other
    h = torch.tensor([0.5, -0.5, 0.0, 3e-7, -3e-7])
    assert probes.correctly_ranked(h).tolist() == [1.0, 0.0, 0.5, 0.5, 0.5]


def test_a_fused_optimizer_takes_the_same_steps(world, monkeypatch):
    config = TrainConfig.around(0.1, "inverse", **SMALL)
    assert module.adamw(torch.nn.Linear(1, 1), 0.1).defaults["fused"]

    def plainly(model, learning_rate):
        return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=False)

    plain, fused = [], []
    for found, optimizer in ((plain, plainly), (fused, module.adamw)):
        monkeypatch.setattr(module, "adamw", optimizer)
        policy, history = run(world, config, network())
        found += [weights(policy), history["loss"].to_numpy()]
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(fused[1], plain[1], rtol=1e-5)


@pytest.fixture(scope="module")
def gpt2(make_model):
    """GPT-2 with dropout 0.1 wherever it has some, and pairs that it has scored without."""
    rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    model = make_model("gpt2", dtype=torch.float32, vocab=VOCABULARY, eos=EOS, **rates)
    return model, small_pairs(model), small_pairs(model, n=9, seed=1)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # a name that is to go
class TestDropout:
    """By default the policy trains as the reference is scored: without."""

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_first_loss_is_log_2_and_training_that_of_the_model_without(self, gpt2, make_model, checkpointing):
        """At the reference h = 0 exactly but for rounding; every later step agrees with a model that has none."""
        config = TrainConfig.around(0.1, "inverse", **{**SMALL, "log_every": 1})
        start = copy.deepcopy(gpt2[0])
        if checkpointing:
            start.gradient_checkpointing_enable({"use_reentrant": False})
        policy, history = run(gpt2, config, ConstantBeta(10.0), stage=1, start=start)
        assert history["loss"][0] == pytest.approx(np.log(2), abs=1e-6)
        without = make_model("gpt2", dtype=torch.float32, vocab=VOCABULARY, eos=EOS, resid_pdrop=0, embd_pdrop=0,
                             attn_pdrop=0)  # fmt: skip
        without.load_state_dict(gpt2[0].state_dict())
        plain, expected = run(gpt2, config, ConstantBeta(10.0), stage=1, start=without)
        # checkpointing computes the same numbers again
        assert history["loss"].to_numpy() == pytest.approx(expected["loss"].to_numpy(), rel=1e-5)
        assert torch.allclose(weights(policy), weights(plain), atol=1e-5)
        assert history["grad_norm/policy"].to_numpy() == pytest.approx(
            expected["grad_norm/policy"].to_numpy(), rel=1e-3
        )

    def test_where_it_is_asked_for_the_first_loss_differs(self, gpt2):
        config = TrainConfig.around(0.1, "inverse", **SMALL, dropout=True)
        _, history = run(gpt2, config, ConstantBeta(10.0), stage=1)
        assert abs(history["loss"][0] - np.log(2)) > 1e-3

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients_are_those_without_and_the_modes_come_back(self, gpt2, checkpointing):
        model = copy.deepcopy(gpt2[0])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        tokens, recomputed = torch.tensor([[5, 6, 7, 8]]), []
        model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
        found = []
        for own in (model, gpt2[0]):
            with module.training_mode(own, dropout=False):
                own(tokens, labels=tokens, use_cache=False).loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in own.parameters()]))
            own.zero_grad(set_to_none=True)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
        assert len(recomputed) == 1 + checkpointing  # it acted: the layer ran once more in the backward pass
        assert all(part.training for part in model.modules())
        assert not any(part.training for part in gpt2[0].modules())


def test_no_bars_where_nobody_watches(world, capfd, monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # as without a notebook, whatever ran before
    reference, pairs, held_out = world
    config = TrainConfig.around(0.1, "inverse", **SMALL)
    common = {"stage": 1, "pad_id": PAD, "eos_id": EOS, "held_out": held_out, "reference": reference}
    train(copy.deepcopy(reference), ConstantBeta(10.0), pairs, config, **common, progress=True)
    assert capfd.readouterr().err == ""
