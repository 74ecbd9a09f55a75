"""What `BetaDPOTrainer` keeps of single held-out pairs, against its own β and policy, asked by hand."""

import copy
import inspect
import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.launch import SCRIPTS, command, finish
from transformers import AutoModelForCausalLM, Trainer

trl = pytest.importorskip("trl", reason="pip install dpoviz[trl]")

from test_trl import arguments, made, world  # noqa: E402, F401

from dpoviz.analysis.diagnose import SYMPTOMS  # noqa: E402
from dpoviz.cli import main  # noqa: E402
from dpoviz.learn.explorer import explore_run  # noqa: E402
from dpoviz.learn.run import load_run  # noqa: E402
from dpoviz.training.config import TrainConfig  # noqa: E402
from dpoviz.training.methods import load_beta  # noqa: E402
from dpoviz.trl import BetaDPOTrainer, trl_dataset  # noqa: E402
from dpoviz.trl_held_out import FOLDER, ROW, as_pairs, number_rows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
ROWS = (0, 1, 2, 0, 3, 4, 5)
"""The pairs of the held-out set: seven of six prompts."""

CONFIG = TrainConfig.around(0.1, "inverse", beta_learning_rate=1e-2)


@pytest.fixture
def train(world, tmp_path):  # noqa: F811
    """A function that trains for four steps, evaluating and saving at 2 and 4."""
    model, tokenizer, scored = world
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")
    data = trl_dataset(scored)

    def run(folder="out", beta="network", config=CONFIG, held_out=None, resume=None, **changed):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps",
                    "eval_steps": 2, "per_device_eval_batch_size": 4, "per_device_train_batch_size": 8}  # fmt: skip
        trainer = BetaDPOTrainer(
            copy.deepcopy(model), ref_model=copy.deepcopy(model), beta=made(beta, scored, config), config=config,
            args=arguments(tmp_path / folder, **{**settings, **changed}), train_dataset=data,
            eval_dataset=data.select(ROWS) if held_out is None else held_out(data), processing_class=tokenizer,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def logp(model, prompt, answer):
    """Return log π(answer|prompt), one forward pass alone."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    return logits[torch.arange(len(answer)), answer].sum().item()


@pytest.mark.slow
def test_tables_are_those_of_beta_and_policy(world, train, tmp_path):  # noqa: F811
    model, _, scored = world
    trainer = train()
    run = load_run(tmp_path / "out")
    first = scored.select(range(6))
    x, entropy = (torch.tensor(first[name][:]) for name in ("ref_features", "ref_entropy"))
    for step in (2, 4):
        beta = load_beta(tmp_path / "out" / f"checkpoint-{step}").eval()(x)
        rows = run.betas(step)
        assert rows["prompt"].tolist() == first["prompt"][:] and rows["task"].tolist() == first["task"][:]
        assert rows["beta"].tolist() == pytest.approx(beta.tolist(), rel=1e-5)
    assert run.steps == [2, 4]
    expected = trainer.beta_module.eval()(x)
    assert (expected / CONFIG.beta0 - 1).abs().max() > 0.01  # it moved
    assert run.table["beta"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert run.table["scale"].tolist() == pytest.approx((1 / expected).tolist(), rel=1e-5)
    assert run.table["ref_entropy"].tolist() == pytest.approx(entropy.tolist())
    assert run.table["ref_entropy_se"].tolist() == pytest.approx(first["ref_entropy_se"][:])

    # log-ratios: the saved policy's and the reference's log-probabilities of each answer, each in a pass of its own
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4", trust_remote_code=False)
    assert len(run.scores) == len(run.pairs) == len(ROWS)
    for scores, pair, row in zip(run.scores.to_dict("records"), run.pairs.to_dict("records"), ROWS, strict=True):
        assert pair["prompt"] == scores["prompt"] == scored["prompt"][row]
        for name in ("chosen", "rejected"):
            assert pair[name] == scored[name][row]
            prompt, answer = list(pair["prompt_ids"]), scored[f"{name}_ids"][row]
            ref = logp(model, prompt, answer)
            assert scores[f"ref_{name}"] == pytest.approx(ref, abs=1e-4)
            assert scores[name] == pytest.approx(logp(policy, prompt, answer) - ref, abs=1e-4)
            assert scores[f"{name}_tokens"] == len(answer)
        assert scores["h"] == pytest.approx(scores["chosen"] - scores["rejected"])
        assert scores["s"] == pytest.approx(1 / scores["beta"])
        assert scores["beta"] == pytest.approx(expected[first["prompt"].index(pair["prompt"])].item(), rel=1e-5)
    assert run.scores["h"].abs().min() > 0.01

    # pulls: the derivatives written out, at h of the prompt, and where a prompt has two pairs, their mean
    pulls = run.pulls().set_index("prompt").loc[first["prompt"][:]]
    h = torch.tensor(run.scores.groupby("prompt")["h"].first().loc[first["prompt"][:]].to_numpy())
    loss = torch.sigmoid(-h / expected) * h / expected**2
    assert pulls["dpo"].tolist() == pytest.approx(loss.tolist(), rel=1e-3)
    alpha = CONFIG.beta0 / np.mean(scored["ref_entropy"][:])
    pull = 2 * CONFIG.lambda_entropy / CONFIG.beta0**2 * (expected - alpha * entropy)
    assert pulls["entropy"].tolist() == pytest.approx(pull.tolist(), rel=1e-3)
    steps = pd.read_parquet(tmp_path / "out" / "checkpoint-4" / FOLDER / "beta_steps.parquet")
    last = steps[steps["step"] == 4]
    assert last["dpo"].tolist() == pulls["dpo"].tolist() and last["h"].tolist() == pytest.approx(h.tolist())
    assert last["s"].tolist() == pytest.approx((1 / expected).tolist(), rel=1e-5)

    check_explorer_and_report(run, tmp_path, expected)


def check_explorer_and_report(run, tmp_path, expected):
    assert run.summary()["n"].tolist() == [2, 2, 2, 6]
    unchecked = {finding.name for finding in run.diagnose() if finding.severity == "not checked"}
    assert unchecked == {"one term swamps the others", "KL beyond the margins", "entropies cut"}
    explorer = explore_run(run)
    assert explorer.contents["steps"] == [2, 4] and explorer.contents["notes"] == []
    betas = np.frombuffer(explorer.betas, "<f4").reshape(1, 2, 6)
    assert betas[0, 1].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    point = explorer.contents["points"][0]
    assert len(point["pairs"]) == 2 and point["pulls"]["inverse"]["dpo"] > 0
    held_out = run.table["prompt"][0]
    assert run.entropy(held_out)[0] == run.table["ref_entropy"][0]
    explorer.question = {"id": 1, "prompt": "a b"}  # a new prompt: the reference is loaded, and sampled from
    (answer,) = explorer.asked
    assert answer["beta"]["inverse"] == pytest.approx(run.beta("a b")) and answer["entropy"] > 0
    main(["report", str(tmp_path / "out")])
    page = (run.tables_folder / "report.html").read_text(encoding="utf-8")
    assert held_out in page and "No policy was trained with one constant β" in page
    assert page.count("<circle") == 12  # by task, and against the entropy


@pytest.mark.slow
def test_what_it_keeps_is_not_uploaded(train, tmp_path):
    """transformers leaves out of an upload what begins with "_"; the file list is made by huggingface_hub itself."""
    from huggingface_hub.utils import filter_repo_objects

    assert 'ignore_patterns=["_*", ' in inspect.getsource(Trainer.push_to_hub)
    trainer = train(eval_strategy="no", save_strategy="no")
    trainer.save_model()
    assert (tmp_path / "out" / FOLDER / "beta.csv").is_file()
    paths = [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()]
    kept = list(filter_repo_objects(paths, ignore_patterns=["_*", "checkpoint-*"]))
    assert "beta/config.json" in kept and not [path for path in kept if FOLDER in path]


@pytest.mark.slow
def test_a_run_that_was_not_evaluated(train, tmp_path):
    train(eval_strategy="no")
    run = load_run(tmp_path / "out")
    assert run.steps == [2, 4] and len(run.table) == 6
    for call in (lambda: run.scores, run.pulls):
        with pytest.raises(ValueError, match="The eval_dataset was not evaluated"):
            call()
    assert "The pairs are not shown" in explore_run(run).contents["notes"][1]
    assert run.report().tables.keys() == {"summary"}


@pytest.mark.slow
def test_killed_and_resumed_it_keeps_the_same(train, tmp_path):
    train("whole")
    train("part", max_steps=2)
    train("other", resume=str(tmp_path / "part" / "checkpoint-2"))  # into another folder
    whole, resumed = load_run(tmp_path / "whole"), load_run(tmp_path / "other")
    pd.testing.assert_frame_equal(resumed.betas(), whole.betas(), rtol=1e-5)
    pd.testing.assert_frame_equal(resumed.scores, whole.scores, rtol=1e-3, atol=1e-4)
    # without a further evaluation those of the checkpoint remain, and say of which step they are
    trainer = train("late", resume=str(tmp_path / "part" / "checkpoint-2"), eval_strategy="no")
    late = load_run(tmp_path / "late")
    pd.testing.assert_frame_equal(late.scores, load_run(tmp_path / "part").scores)
    assert late.steps == [2, 4] and late.metadata["evaluated at step"] == 2
    assert any("evaluation, at step 2; β is that of step 4" in line for line in late.missing())
    assert late.table["beta"].tolist() == pytest.approx(whole.table["beta"].tolist(), rel=1e-5)
    assert trainer.state.global_step == 4


@pytest.mark.slow
def test_another_held_out_set_begins_anew(train, tmp_path, caplog):
    train("part", max_steps=2)
    others = {"held_out": lambda data: data.select([7, 8])}
    train("part", resume=str(tmp_path / "part" / "checkpoint-2"), **others)
    assert "is of another eval_dataset" in caplog.text
    assert load_run(tmp_path / "part").steps == [4]


@pytest.mark.slow
def test_the_best_checkpoint_brings_its_scores_back(train, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = train(save_steps=2, eval_steps=2, **best)
    assert trainer.state.best_global_step == 2  # the loss falls: the largest is the first
    trainer.save_model()
    run = load_run(tmp_path / "out")
    assert run.tables_folder.parent == tmp_path / "out" and run.steps == [2, 4]
    assert run.metadata["step"] == run.metadata["evaluated at step"] == 2
    assert run.table["beta"].tolist() == pytest.approx(run.betas(2)["beta"].tolist(), rel=1e-6)
    first = load_run(tmp_path / "out" / "checkpoint-2")
    pd.testing.assert_frame_equal(run.scores, first.scores)
    pd.testing.assert_frame_equal(run.pulls(), first.pulls())


@pytest.mark.slow
def test_without_entropies_and_features(train, tmp_path):
    config = TrainConfig.around(0.1, "standard", lambda_entropy=0.0, beta_learning_rate=1e-2)
    columns = ["prompt", "chosen", "rejected", "task"]
    trainer = train(beta="task", config=config, held_out=lambda data: data.select(ROWS).select_columns(columns))
    run = load_run(tmp_path / "out")
    with torch.no_grad():
        expected = trainer.beta_module.eval()(torch.zeros(6, 1), task=run.table["task"].tolist())
    assert run.table["beta"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert run.beta(run.table["prompt"][1]) == pytest.approx(expected[1].item())  # whose task is known
    with pytest.raises(ValueError, match="task: got None, expected one of"):
        run.beta("a b")
    assert run.table[["ref_entropy", "ref_entropy_se"]].isna().all(axis=None)
    assert run.summary()[["ref_entropy_mean", "rho"]].isna().all(axis=None)
    assert explore_run(run).contents["estimators"][0]["values"] == [None] * 6
    assert len(run.report().sentences) > 0
    page = (run.tables_folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<circle") == 6 and "has no entropies of the reference" in page


@pytest.mark.slow
def test_a_beta_of_the_entropy(train, tmp_path):
    train(beta="entropy", max_steps=2)
    run = load_run(tmp_path / "out")
    betas = [run.beta(prompt) for prompt in run.table["prompt"]]
    assert betas == pytest.approx(run.table["beta"].tolist(), rel=1e-5) and len(set(betas)) == 6
    assert run.beta("a b") == pytest.approx(run.beta("a b", ref_entropy=run.entropy("a b")[0]))
    assert "beta follows the entropy" not in {finding.name for finding in run.diagnose()}  # as it was asked to


@pytest.mark.slow
@pytest.mark.parametrize("beta", ["steep", "constant"])
def test_a_rule_and_a_constant(train, tmp_path, beta):
    config = TrainConfig.around(0.1, "standard")
    columns = ["prompt", "chosen", "rejected"]
    train(beta=beta, config=config, held_out=lambda data: data.select(ROWS).select_columns(columns))
    run = load_run(tmp_path / "out")
    assert set(run.scores["task"]) == {"any"} and len(run.scores) == 7
    names = {finding.name for finding in run.diagnose() if finding.severity != "not checked"}
    assert "beta constant" not in names
    if beta == "constant":
        assert run.table["beta"].tolist() == pytest.approx([0.1] * 6) and set(run.scores["variant"]) == {"fixed"}
        assert run.pulls()["dpo"].abs().min() > 0
    else:
        assert run.table.empty and run.scores["beta"].nunique() > 1
        with pytest.raises(ValueError, match=r"pulls: .* β is not a function of the prompt alone"):
            run.pulls()
        with pytest.raises(ValueError, match=r"has no β\(x\)"):
            explore_run(run)
    assert "slopes" in run.report().tables


@pytest.mark.slow
def test_another_loss_has_no_pulls(train, tmp_path):
    train(max_steps=2)
    assert len(load_run(tmp_path / "out").pulls()) == 6
    train(loss_type="ipo", max_steps=2)  # in the same folder
    run = load_run(tmp_path / "out")
    with pytest.raises(ValueError, match="The pulls on β are kept only for the plain loss"):
        run.pulls()
    assert "The pulls on β are not shown" in explore_run(run).contents["notes"][0]


class TestSets:
    @pytest.mark.slow
    def test_several_are_one(self, train, tmp_path):
        trainer = train(max_steps=2, held_out=lambda data: {"a": data.select(ROWS[:3]), "b": data.select(ROWS[3:])})
        trainer.evaluate("b")  # a part, and another set: neither is kept
        trainer.evaluate(number_rows(trainer.train_dataset))
        trainer.save_model()
        several = load_run(tmp_path / "out").scores
        train("one", max_steps=2)
        pd.testing.assert_frame_equal(several, load_run(tmp_path / "one").scores, rtol=1e-5, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("held_out", "why"),
        [
            (lambda data: data.to_iterable_dataset(), "it is a stream"),
            (lambda data: data.map(lambda row: {**row, "task": "all"}), "'all' is the name of all tasks together"),
        ],
    )
    def test_one_that_cannot_be_kept(self, train, tmp_path, caplog, held_out, why):
        train(beta="constant", config=TrainConfig.around(0.1, "standard"), max_steps=2, held_out=held_out)
        assert f"eval_dataset: {why}" in caplog.text
        with pytest.raises(ValueError, match=r"beta: .*BetaDPOTrainer keeps those of its eval_dataset"):
            _ = load_run(tmp_path / "out").table

    def test_chats(self):
        chat = [{"role": "user", "content": "one"}]
        answers = {
            name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "two"), ("rejected", "no"))
        }
        rows = [{"prompt": chat, **answers, "prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}]
        (pair,) = as_pairs(Dataset.from_list(rows), "</s>").to_list()
        assert pair["prompt"] == "user: one" and pair["messages"] == chat
        assert (pair["chosen"], pair["rejected"], pair["task"]) == ("two", "no", "any")

    def test_rows_are_counted_through(self):
        parts = {name: Dataset.from_dict({"prompt": ["x"] * n}) for name, n in (("a", 2), ("b", 3))}
        for _ in range(2):  # a set may come from another trainer
            parts = number_rows(parts)
            assert {name: part[ROW][:] for name, part in parts.items()} == {"a": [0, 1], "b": [2, 3, 4]}


def test_report_of_a_plain_log(tmp_path, capsys):
    rows = [{"step": i, "loss": 0.7 - i / 100, "rewards/accuracies": 0.8, "rewards/margins": i / 100,
             "rewards/chosen": i / 200, "rewards/rejected": -i / 200} for i in range(1, 21)]  # fmt: skip
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": rows}))
    main(["report", str(tmp_path)])
    said = capsys.readouterr().out
    assert "not checked" in said and str(tmp_path / FOLDER / "report.html") in said
    page = (tmp_path / FOLDER / "report.html").read_text(encoding="utf-8")
    assert "This is the log of a trainer, without single prompts or pairs" in page
    assert {finding.name for finding in load_run(tmp_path).report().findings} == set(SYMPTOMS) - {
        "both log-ratios fall"
    }


@pytest.mark.slow
def test_two_processes_fill_up_the_last_batch_and_keep_each_pair_once(tmp_path):
    for processes in (1, 2):
        finish(command(processes, SCRIPTS / "evaluate_trl.py", tmp_path / str(processes), processes))
    one, two = (load_run(tmp_path / name) for name in ("1", "2"))
    assert len(two.scores) == 5 and len(two.table) == 4 and two.steps == [1, 2]
    assert one.scores["h"].abs().min() > 1e-3
    pd.testing.assert_frame_equal(two.scores, one.scores, rtol=1e-4, atol=1e-5)
    pd.testing.assert_frame_equal(two.betas(), one.betas(), rtol=1e-5)
    pd.testing.assert_frame_equal(two.pulls(), one.pulls(), rtol=1e-3, atol=1e-6)
