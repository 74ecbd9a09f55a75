"""What a run keeps, and `load_run`: the numbers of a finished run again, and beta and entropy at new prompts."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.readme import blocks
from helpers.worlds import CONFIG, Killed, dies_at, network, run, small_model, small_pairs

from dpoviz.analysis.tables import read_table, write_table
from dpoviz.beta import BetaNetwork, ConstantBeta, MadeFor, TaskBeta
from dpoviz.data import tasks
from dpoviz.data.records import as_chat
from dpoviz.experiments import kept, real
from dpoviz.experiments.config import RealConfig
from dpoviz.experiments.folder import report
from dpoviz.experiments.pipeline import ScoredPairs
from dpoviz.experiments.real import variants
from dpoviz.forms import FORMS
from dpoviz.learn.run import compare_runs, load_run
from dpoviz.lm.models import LanguageModel, load_lm, tiny_lm, tiny_tokenizer, weights_fingerprint
from dpoviz.lm.reference import reference_pass
from dpoviz.training.methods import load_beta
from dpoviz.training.probes import pulls_at, quartiles_by_task
from dpoviz.training.stages import Variant

KEPT = ("beta_steps.parquet", "frozen.parquet", "pairs.parquet", "pulls.csv")
TABLES = ("beta.csv", "history.csv", "held_out.csv", "answers.csv")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def config(**changed):
    settings = RealConfig(data=("pairs.jsonl",), entropy_samples=2, max_length=96, lora_rank=0, answers=1)
    training = dataclasses.replace(
        settings.training, stage1_steps=2, stage2_steps=5, batch_size=6, log_every=2, checkpoint_every=2,
        max_new_tokens=4, policy_learning_rate=1e-3, eval_batch_size=8,
    )  # fmt: skip
    return dataclasses.replace(settings, training=training, **changed)


def problems(first, last):
    """Pairs on some problems of each task, two per prompt, so that prompts and pairs have other numbers."""
    rows = []
    for task in tasks.TASKS:
        for problem in tasks.sample_problems(task, last, 1)[first:]:
            for chosen, rejected in (("12", "no"), ("yes, 3", "x")):
                row = {"prompt": problem.prompt, "chosen": chosen, "rejected": rejected, "task": task, "group": None}
                rows.append({**row, "line": len(rows) + 1})
    return Dataset.from_list(rows)


def scored(place, *, chat=False):
    """A tiny model loaded from a folder, and pairs that it has scored."""
    tokenizer = tiny_tokenizer([p + a for p, a in tasks.corpus(60, 0)], 300)
    if chat:
        tokenizer.chat_template = TEMPLATE
    model = tiny_lm(tokenizer, hidden_size=16, layers=1, heads=2)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    model, tokenizer = load_lm(place)
    parts = []
    for pairs in (problems(0, 4), problems(4, 7)):
        pairs = as_chat(pairs, tasks.TASKS) if chat else pairs
        limits = {"max_length": 96, "max_new_tokens": 4, "entropy_samples": 2}
        parts.append(reference_pass(model, tokenizer, pairs, **limits, progress=False))
    return ScoredPairs(model, tokenizer, *parts)


def train(data, settings, out):
    data = dataclasses.replace(data, model=copy.deepcopy(data.model))  # adapters would stay in it
    real.run_real(settings, data, out=out, progress=False)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scored(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    return train(data, config(), tmp_path_factory.mktemp("runs") / "with-entropy")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A run on chats with adapters, too large to hold its reference, and the folder of the reference."""
    pytest.importorskip("peft")
    place = tmp_path_factory.mktemp("chats")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "SMALL", 0)
        return train(scored(place / "model", chat=True), config(lora_rank=2), place / "run"), place / "model"


class TestKept:
    @pytest.mark.slow
    def test_betas_of_every_logged_step(self, folder):
        found = load_run(folder)
        for form in FORMS:
            history = found.history[found.history["variant"] == form]
            betas = found.betas()[found.betas()["form"] == form]
            assert sorted(set(history["step"])) == sorted(set(betas["step"])) == found.steps
            for task in tasks.TASKS:  # two pairs of each prompt are held out: the mean over prompts is that over pairs
                means = betas[betas["task"] == task].groupby("step")["beta"].mean()
                logged = history.set_index("step")[f"beta/{task}"]
                assert means.to_numpy() == pytest.approx(logged.to_numpy(), rel=1e-6)
            table = found.table[found.table["form"] == form]
            last = found.betas(found.steps[-1])
            assert last[last["form"] == form]["beta"].tolist() == table["beta"].tolist()
            assert last[last["form"] == form]["prompt"].tolist() == table["prompt"].tolist()
            assert table["beta"].nunique() > 3

    @pytest.mark.slow
    def test_steps_before_beta_is_trained_have_the_fixed_one(self, folder):
        found = load_run(folder).betas(0)
        assert found.groupby("form")["beta"].agg(["min", "max"]).to_dict("index") == {
            "inverse": {"min": 10.0, "max": 10.0},
            "standard": {"min": np.float32(0.1), "max": np.float32(0.1)},
        }

    def test_a_step_that_was_not_logged(self, folder):
        with pytest.raises(ValueError, match=r"step: got 3, expected a logged step: 0, 1, 2, 4, 6"):
            load_run(folder).betas(3)

    def test_pulls_are_those_of_the_last_policy(self, folder):
        """By closed form, from the tables alone."""
        found = load_run(folder)
        pulls = found.pulls()
        assert set(pulls) == {"form", "task", "prompt", "dpo", "range", "smoothness", "entropy"}
        settings = found.frozen("inverse").config
        for form in FORMS:
            own = found.table[found.table["form"] == form].set_index("prompt")
            beta, alpha = own["beta"], found.metadata["alpha"][form]
            h = found.scores[found.scores["variant"] == form].set_index("prompt")["h"]
            s = beta[h.index].map(lambda b, form=form: 1 / b if form == "inverse" else b)
            slope = -1 / beta[h.index] ** 2 if form == "inverse" else 1.0
            dpo = (-h / (1 + np.exp(s * h)) * slope).groupby(level=0).mean()
            rows = pulls[pulls["form"] == form].set_index("prompt")
            assert rows.index.tolist() == own.index.tolist()
            assert rows["dpo"].to_numpy() == pytest.approx(dpo[rows.index].to_numpy(), rel=1e-4, abs=1e-7)
            weight = settings.lambda_entropy / found.metadata["beta0"][form] ** 2
            entropy = 2 * weight * (beta - alpha * own["ref_entropy"])
            assert rows["entropy"].to_numpy() == pytest.approx(entropy.to_numpy(), rel=1e-4, abs=1e-7)
            assert (rows["range"] == 0).all() and (rows["smoothness"] > 0).all()

    def test_frozen_quantities_are_the_training_pairs(self, folder, data):
        frozen = load_run(folder).frozen("standard")
        rows = data.train.to_pandas()
        assert frozen.prompt.tolist() == rows["prompt"].tolist() and frozen.task.tolist() == rows["task"].tolist()
        assert np.array_equal(frozen.features, np.stack(rows["ref_features"])) and frozen.features.dtype == np.float32
        assert np.array_equal(frozen.ref_entropy, rows["ref_entropy"])
        assert frozen.config.form == "standard" and frozen.config.stage2_steps == 5
        alpha = load_run(folder).metadata["alpha"]["standard"]
        assert frozen.config.alpha_for([1.0]) == pytest.approx(alpha, rel=1e-12)
        other = load_run(folder).frozen("inverse").h
        assert frozen.h.std() > 0 and (frozen.h != other).any()

    def test_of_many_pairs_a_sample_by_the_seed(self, monkeypatch):
        monkeypatch.setattr(kept, "MOST_FROZEN", 10)
        some = kept.frozen_rows(25, seed=0)
        assert some == sorted(set(some)) and len(some) == 10 and some != kept.frozen_rows(25, seed=1)
        assert kept.frozen_rows(10, seed=0) == list(range(10))

    def test_texts_of_the_held_out_pairs(self, folder, data):
        found = load_run(folder)
        for name in ("task", "prompt", "chosen", "rejected"):
            assert found.pairs[name].tolist() == data.held_out[name][:]
        of_one = found.scores[found.scores["variant"] == "fixed"]
        assert of_one["prompt"].tolist() == found.pairs["prompt"].tolist()

    @pytest.mark.slow
    def test_killed_and_started_again_it_keeps_the_same_bytes(self, folder, data, tmp_path, monkeypatch):
        def dying(*given):
            found = variants(*given)
            own = found["standard"]
            return found | {"standard": Variant(own.config, lambda *a, **k: dies_at(own.make(*a, **k), 3))}

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(real, "variants", dying)
            train(data, config(), tmp_path / "run")
        assert not (tmp_path / "run" / "beta_steps.parquet").exists()
        assert (tmp_path / "run" / "standard" / "checkpoint-2").is_dir()  # it resumes in the middle
        train(data, config(), tmp_path / "run")
        for name in (*KEPT, *TABLES):
            assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes(), name

    @pytest.mark.slow
    def test_a_rule_that_is_no_function_of_the_prompt_keeps_the_rest(self, data, tmp_path):
        out = train(data, config(rule="beta-dpo"), tmp_path / "run")
        found = load_run(out)
        assert found.table.empty and found.forms == [] and len(found.frozen("standard").h) == len(data.train)
        with pytest.raises(ValueError, match="form: got 'standard', expected one of the run's: none"):
            found.beta("a", form="standard")
        report(out)


class TestLogRatios:
    def test_quartiles_by_task(self):
        ratios = np.random.default_rng(0).normal(size=(40, 2))
        task = np.array(["math", "a/q25"])[np.arange(40) % 2]
        found = quartiles_by_task("logratio", torch.tensor(ratios), task.tolist())
        for t in set(task):
            for column, answer in enumerate(("chosen", "rejected")):
                values, name = ratios[task == t, column], f"logratio/{answer}/{t}"
                assert found[name] == pytest.approx(values.mean(), rel=1e-12)
                quartiles = np.percentile(values, [25, 75])
                assert [found[f"{name}/q25"], found[f"{name}/q75"]] == pytest.approx(quartiles.tolist(), rel=1e-12)
        assert len(found) == 12

    def test_history_has_those_of_the_batch_and_of_the_held_out_pairs(self, folder):
        found = load_run(folder)
        last = found.history[found.history["variant"] == "inverse"].iloc[-1]
        scores = found.scores[found.scores["variant"] == "inverse"]
        for task in tasks.TASKS:
            own = scores[scores["task"] == task]["rejected"]
            assert last[f"held_out_logratio/rejected/{task}"] == pytest.approx(own.mean(), rel=1e-9)
            assert last[f"held_out_logratio/rejected/{task}/q75"] == pytest.approx(own.quantile(0.75), rel=1e-9)
        start = found.history[found.history["step"] == 0].filter(like="logratio/chosen/")
        assert start.notna().any(axis=None) and start.abs().max(axis=None) < 1e-5  # policy and reference agree
        batch = found.history[found.history["stage"] == 2].filter(regex="^logratio/")
        assert batch.notna().any(axis=1).all() and batch.abs().max(axis=None) > 1e-3


class TestNewPrompts:
    @pytest.mark.slow
    def test_beta_at_held_out_prompts_is_that_of_the_table(self, folder, chats):
        for found in (load_run(folder), load_run(chats[0])):
            for row in found.table.itertuples():
                assert found.beta(row.prompt, form=row.form) == pytest.approx(row.beta, rel=1e-5)

    def test_entropy_of_a_known_and_of_a_new_prompt(self, folder):
        found = load_run(folder)
        row = found.table.iloc[0]
        assert found.entropy(row["prompt"]) == (row["ref_entropy"], row["ref_entropy_se"])
        value, se = found.entropy("What is this?")
        assert value > 0 and se > 0 and found.entropy("What is this?") == (value, se)
        assert found.beta("What is this?", form="inverse") != found.beta("And that?", form="inverse")

    def test_a_folder_elsewhere_with_its_reference_gone(self, data, folder, tmp_path, monkeypatch):
        there = shutil.copytree(folder, tmp_path / "there")
        record = json.loads((there / "run.json").read_text())
        record["reference"]["name"] = str(tmp_path / "nowhere")
        (there / "run.json").write_text(json.dumps(record))
        monkeypatch.chdir(tmp_path)
        row = load_run("there").table.iloc[-1]
        assert load_run("there").beta(row["prompt"], form="standard") == pytest.approx(row["beta"], rel=1e-5)

    @pytest.mark.slow
    def test_a_text_becomes_a_message_in_a_run_on_chats(self, chats):
        found = load_run(chats[0])
        message = [{"role": "user", "content": "Tell me."}]
        assert found.beta("Tell me.", form="inverse") == found.beta(message, form="inverse")
        assert found.beta("Tell me.", form="inverse") != found.beta("Tell you.", form="inverse")

    def test_reference_that_is_not_there_or_another(self, chats, data, tmp_path):
        out, model = chats
        moved = shutil.move(model, tmp_path / "moved")
        try:
            with pytest.raises(ValueError, match=r"reference: the run was made with .*model.*load_run\(folder, ref"):
                load_run(out).beta("Tell me.", form="inverse")
            there = load_run(out, reference=moved)
            row = there.table.iloc[0]
            assert there.beta(row["prompt"], form=row["form"]) == pytest.approx(row["beta"], rel=1e-5)
            wrong = LanguageModel(small_model(seed=5), data.tokenizer)
            with pytest.raises(ValueError, match=r"reference: .* is not the model of this run"):
                load_run(out, reference=wrong).beta("Tell me.", form="inverse")
        finally:
            shutil.move(moved, model)

    def test_answers_saved_and_sampled(self, folder, chats):
        for out in (folder, chats[0]):
            found = load_run(out)
            saved = pd.read_csv(out / "answers.csv", keep_default_na=False)
            prompt = saved["prompt"].iloc[0]
            names = ["reference", *FORMS, "fixed"]
            assert found.answers(prompt)["variant"].tolist() == names
            assert found.answers("Another one?").empty
            assert found.answers("Another one?", sample=True)["variant"].tolist() == names

    @pytest.mark.slow
    def test_a_beta_by_task_needs_the_task(self, data, tmp_path):
        found = load_run(train(data, config(rule="task"), tmp_path / "run"))
        row = found.table.iloc[0]
        assert found.beta(row["prompt"], form="inverse") == pytest.approx(row["beta"], rel=1e-5)
        assert found.beta("new", form="inverse", task=row["task"]) == pytest.approx(row["beta"], rel=1e-5)
        with pytest.raises(ValueError, match="task: got None, expected one of"):
            found.beta("new", form="inverse")

    def test_unknown_form(self, folder):
        with pytest.raises(ValueError, match="form: got 'other', expected one of the run's: inverse, standard"):
            load_run(folder).beta("a", form="other")
        with pytest.raises(ValueError, match="form: got 'other', expected one of the run's: inverse, standard"):
            load_run(folder).frozen("other")


class TestOlderFolders:
    @pytest.fixture
    def older(self, folder, tmp_path):
        """The folder as a version that kept none of this would have left it."""
        out = shutil.copytree(folder, tmp_path / "older")
        for name in KEPT:
            (out / name).unlink()
        for form in FORMS:
            (out / form / "beta" / "made_for.json").unlink()
        shutil.rmtree(out / "reference")
        record = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(
            json.dumps({k: v for k, v in record.items() if k not in ("reference", "training")})
        )
        return out

    @pytest.mark.slow
    def test_tables_are_read_and_what_lacks_is_named(self, older):
        found = load_run(older)
        assert len(found.table) and len(found.summary()) and len(found.scores)
        for ask in (found.betas, found.pulls, lambda: found.frozen("inverse"), lambda: found.pairs):
            with pytest.raises(ValueError, match="older version"):
                ask()
        report(older)

    def test_its_beta_is_used_with_a_warning(self, older, data, caplog):
        found = load_run(older, reference=LanguageModel(data.model, data.tokenizer))
        row = found.table.iloc[0]
        assert found.beta(row["prompt"], form="inverse") == pytest.approx(row["beta"], rel=1e-5)
        assert "has no record of its reference" in caplog.text and "no record of its form" in caplog.text

    def test_no_run_at_all(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"folder: .* holds no finished run, config\.json, run\.json, history\.csv"
        ):
            load_run(tmp_path)


class TestSavedBeta:
    RECORD = MadeFor("inverse", "a model", "abc", "means")

    @pytest.mark.parametrize("beta", [network(), ConstantBeta(2.0), TaskBeta(["a", "b"], 1.0)])
    def test_of_any_kind_it_is_read_with_its_record(self, tmp_path, beta):
        beta.made_for = self.RECORD
        beta.save_pretrained(tmp_path)
        again = load_beta(tmp_path, form="inverse", fingerprint="abc")
        assert type(again) is type(beta) and again.made_for == self.RECORD
        with pytest.raises(ValueError, match="form: got 'standard', expected 'inverse'"):
            load_beta(tmp_path, form="standard")
        with pytest.raises(ValueError, match=r"reference: got .* xyz, expected a model \(abc\)"):
            type(beta).from_pretrained(str(tmp_path), fingerprint="xyz")

    def test_without_a_record_it_is_read_as_before(self, tmp_path, caplog):
        network().save_pretrained(tmp_path)
        assert load_beta(tmp_path).made_for is None and not caplog.text
        assert load_beta(tmp_path, form="standard").made_for is None and "cannot be checked" in caplog.text

    def test_folders_of_a_run_say_what_they_are_for(self, folder, data):
        record = load_beta(folder / "standard" / "beta").made_for
        assert record.form == "standard" and record.fingerprint == weights_fingerprint(data.model)

    def test_the_loop_refuses_the_other_form(self):
        reference = small_model()
        beta = network()
        beta.made_for = dataclasses.replace(self.RECORD, form="standard")
        with pytest.raises(ValueError, match="form: got 'inverse', expected 'standard'"):
            run((reference, small_pairs(reference), None), CONFIG, beta)

    def test_fingerprint_follows_the_weights_alone(self, tmp_path):
        model = small_model()
        own = weights_fingerprint(model)
        assert weights_fingerprint(torch.nn.ParameterList([torch.tensor(1.0)]))  # a single number has no rows
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, trust_remote_code=False, dtype=torch.bfloat16)
        assert weights_fingerprint(again) == own != weights_fingerprint(small_model(seed=1))


def test_pulls_of_every_term_by_hand():
    """Outside the range, with a beta whose gradient is known, and two pairs of one prompt."""
    beta = BetaNetwork(2, beta0=1.0, hidden=(), batch_norm=False).double()
    with torch.no_grad():
        beta.layers[-1].weight.copy_(torch.tensor([[0.5, -1.0]]))
    x = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    pairs = Dataset.from_dict({
        "prompt": ["a", "a", "b"], "task": ["t", "t", "u"], "prompt_ids": [[1], [1], [2]],
        "ref_features": x.tolist(), "ref_entropy": [0.7, 0.7, 0.2],
    })  # fmt: skip
    ratios = np.array([[0.5, -1.0], [-2.0, 1.0], [0.3, 0.1]])
    weights = CONFIG.regularization(0.3)
    weights = dataclasses.replace(
        weights, beta_min=0.5, beta_max=1.2, range=0.9, smoothness=0.3, consistency=0.0, entropy=0.4
    )
    found = pulls_at(beta, pairs, ratios, "standard", weights)
    f = x @ np.array([0.5, -1.0])
    value = np.exp(20 * np.tanh(f / 20))
    gradient = value**2 * (1 - np.tanh(f / 20) ** 2) ** 2 * 1.25
    h = ratios[:, 0] - ratios[:, 1]
    expected = {
        "dpo": -h / (1 + np.exp(value * h)),
        "range": 0.9 * ((value > 1.2) * 1.0 - (value < 0.5)),
        "smoothness": 2 * 0.3 * gradient / value,
        "entropy": 2 * 0.4 * (value - 0.3 * np.array([0.7, 0.7, 0.2])),
    }
    assert found["prompt"].tolist() == ["a", "b"] and found["task"].tolist() == ["t", "u"]
    for term, pull in expected.items():
        by_prompt = [(pull[0] + pull[1]) / 2, pull[2]]
        assert found[term].to_numpy() == pytest.approx(by_prompt, rel=1e-5), term  # features are kept in float32
    alone = pulls_at(beta, pairs, ratios, "standard", None)
    assert (alone[["range", "smoothness", "entropy"]] == 0).all(axis=None) and alone["dpo"].equals(found["dpo"])


@pytest.fixture(scope="module")
def other(folder):
    """The folder as a run of another setting might have left it."""
    out = shutil.copytree(folder, folder.with_name("without-entropy"))
    settings = json.loads((out / "config.json").read_text())
    settings["training"]["lambda_entropy"] = 0.0
    (out / "config.json").write_text(json.dumps(settings))
    table = read_table(out / "beta.csv")
    write_table(table.assign(beta=table["beta"] * 2, scale=table["scale"] / 2), out / "beta.csv")
    return out


class TestCompareRuns:
    @pytest.mark.slow
    def test_table_figure_and_differences(self, folder, other):
        runs = [load_run(folder), load_run(other)]
        found = compare_runs(runs)
        assert found.table["run"].unique().tolist() == ["with-entropy", "without-entropy"]
        own = found.table[found.table["run"] == "without-entropy"].drop(columns="run").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, runs[1].summary())
        assert found.differences.index.tolist() == ["training.lambda_entropy"]
        assert found.differences.iloc[0].tolist() == [0.1, 0.0]
        assert len(found.figure.axes) == 2
        assert compare_runs({"a": runs[0], "b": runs[1]}).table["run"].unique().tolist() == ["a", "b"]

    def test_the_readme_runs(self, folder, other):
        block, _ = blocks("python3")  # the other shows the widgets
        block = block.replace('"dpoviz-run"', repr(str(folder))).replace('"without-entropy"', repr(str(other)))
        names = {}
        exec(block, names)
        assert len(names["run"].betas(step=0)) == len(names["run"].table)

    def test_refuses_one_and_the_same(self, folder):
        with pytest.raises(ValueError, match="runs: got 1, expected at least two"):
            compare_runs([load_run(folder)])
        with pytest.raises(ValueError, match="runs: got a folder twice"):
            compare_runs([load_run(folder), load_run(folder)])
