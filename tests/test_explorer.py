"""The explorer of a run and the live training of β, without a browser: what they show is what the run kept."""

import base64
import re
import shutil
import tomllib
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from test_run import config, scored, train

from dpoviz.beta import BetaNetwork
from dpoviz.forms import FORMS
from dpoviz.learn.explore_beta import LEARNING_RATE, _caption, _some, explore_beta, retrain_beta
from dpoviz.learn.explorer import explore_run
from dpoviz.learn.run import Frozen, load_run
from dpoviz.training.config import TrainConfig
from dpoviz.translation import chinese_font, in_language


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("explored")
    out = train(scored(place / "model"), config(), place / "my run")
    known = pd.read_csv(out / "beta.csv").drop_duplicates("prompt")
    rows = [
        {"estimator": name, "task": row.task, "prompt": row.prompt, "entropy": factor * row.ref_entropy, "se": 0.25}
        for name, factor in (("per_token", 1.0), ("sequence", 9.0))
        for row in known.iloc[1:].itertuples()
    ]
    example = {"estimator": "sequence", "task": "math", "prompt": "1+1=", "entropy": 1.0, "se": 0.1}
    pd.DataFrame([*rows, example]).assign(example=[False] * len(rows) + [True]).to_csv(out / "entropy.csv", index=False)
    return out


@pytest.fixture
def run(folder):
    return load_run(folder)


@pytest.fixture
def explorer(run):
    return explore_run(run)


class TestContents:
    @pytest.mark.slow
    def test_betas_are_those_of_the_run_at_every_step(self, run, explorer):
        contents = explorer.contents
        prompts = [point["prompt"] for point in contents["points"]]
        forms = [form["name"] for form in contents["forms"]]
        shown = np.frombuffer(explorer.betas, "<f4").reshape(len(forms), len(contents["steps"]), len(prompts))
        assert set(forms) == set(FORMS) and contents["steps"] == run.steps and explorer.step == run.steps[-1]
        for f, form in enumerate(forms):
            for i, step in enumerate(run.steps):
                betas = run.betas(step)
                rows = betas[betas["form"] == form].set_index("prompt")["beta"]
                np.testing.assert_allclose(shown[f, i], rows[prompts], rtol=1e-6)  # float32
        assert np.ptp(shown[:, -1], axis=1).min() > 0  # the control: prompts differ

    def test_a_point_has_its_pulls_pairs_and_answers(self, run, explorer):
        points = explorer.contents["points"]
        assert len(points) == run.table["prompt"].nunique() and len(run.pairs) == 2 * len(points)
        for point in points:
            prompt = point["prompt"]
            assert point["task"] == run.table.set_index("prompt")["task"][prompt].iloc[0]
            pulls = run.pulls().query("prompt == @prompt").set_index("form")
            assert point["pulls"]["standard"] == pulls.loc["standard", list(point["pulls"]["standard"])].to_dict()
            assert {"dpo", "range", "smoothness", "entropy"} <= set(point["pulls"]["inverse"])
            texts = run.pairs.query("prompt == @prompt")[["chosen", "rejected"]].to_numpy().tolist()
            assert [[pair["chosen"], pair["rejected"]] for pair in point["pairs"]] == texts
            for variant in ("inverse", "standard", "fixed"):
                rows = run.scores.query("prompt == @prompt and variant == @variant")
                ratios = rows[["chosen", "rejected", "h"]].to_numpy().tolist()
                assert [pair["ratios"][variant] for pair in point["pairs"]] == ratios
            assert point["answers"] == run.answers(prompt).to_numpy().tolist()
        assert any(point["answers"] for point in points)

    def test_entropies_by_estimator(self, run, explorer):
        own, sequence = explorer.contents["estimators"]  # per_token is the run's own, and is not there twice
        known = run.table.drop_duplicates("prompt")
        assert own["values"] == known["ref_entropy"].tolist() and own["se"] == known["ref_entropy_se"].tolist()
        assert sequence["label"] == "sequence (nats)" and sequence["values"][0] is None
        np.testing.assert_allclose(sequence["values"][1:], 9 * known["ref_entropy"][1:])
        assert set(sequence["se"][1:]) == {0.25}

    def test_lines_of_a_form(self, run, explorer):
        for form in explorer.contents["forms"]:
            for name in ("beta0", "beta_min", "beta_max", "alpha"):
                assert form[name] == run.metadata[name][form["name"]]

    def test_an_older_run_shows_its_last_step_and_says_so(self, folder, tmp_path):
        older = tmp_path / "older"
        shutil.copytree(folder, older)
        for name in ("beta_steps.parquet", "pairs.parquet", "pulls.csv"):
            (older / name).unlink()
        run = load_run(older)
        explorer = explore_run(run)
        assert explorer.contents["steps"] == [run.history["step"].max()]
        assert np.isfinite(np.frombuffer(explorer.betas, "<f4")).all()
        notes = explorer.contents["notes"]
        assert all(any(name in note for note in notes) for name in ("beta_steps", "pairs", "pulls"))

    def test_a_run_without_beta_of_the_prompt(self, folder, tmp_path):
        without = tmp_path / "without"
        shutil.copytree(folder, without)
        (without / "beta.csv").unlink()
        for explore in (explore_run, explore_beta):
            with pytest.raises(ValueError, match=r"run: .*without"):
                explore(load_run(without))


class TestTypedPrompt:
    def test_beta_and_entropy_are_those_of_the_run(self, run, explorer):
        explorer.question = {"id": "a", "prompt": "Compute 3 + 4.\n"}
        (asked,) = explorer.asked
        assert asked["beta"] == {form: run.beta("Compute 3 + 4.\n", form=form) for form in FORMS}
        assert (asked["entropy"], asked["se"]) == run.entropy("Compute 3 + 4.\n")

    def test_the_selected_prompt(self, run, explorer):
        assert explorer.prompt is None
        explorer.selected = 1
        assert explorer.prompt == explorer.contents["points"][1]["prompt"]
        explorer.question = {"id": "a", "prompt": ""}  # fails, and is no point
        explorer.question = {"id": "b", "prompt": "Compute 5 + 4.\n"}
        explorer.selected = len(explorer.contents["points"])
        assert explorer.prompt == "Compute 5 + 4.\n"

    def test_what_fails_is_shown_and_the_next_one_works(self, explorer):
        explorer.question = {"id": "a", "prompt": ""}
        explorer.question = {"id": "b", "prompt": "Compute 3 + 4.\n"}
        first, second = explorer.asked
        assert "ValueError: prompt" in first["error"] and "beta" not in first
        assert second["id"] == "b" and "error" not in second


def test_without_a_kernel_the_picture_remains(explorer):
    bundle, _ = explorer._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"] == repr(explorer) == f"RunExplorer('my run', step {explorer.step})"


@pytest.mark.skipif(chinese_font() is None, reason="no font with Chinese characters")
def test_its_words_are_in_the_language_in_which_it_was_made(run, explorer):
    assert explorer.contents["words"] == {}
    with in_language("zh"):
        chinese = explore_run(run).contents
    assert len(chinese["words"]) > 60
    assert [
        text for text in chinese["words"].values() if not re.search(r"[\u4e00-\u9fff]|^DPO$|^nat|^{form}$", text)
    ] == []
    assert [estimator["label"] for estimator in chinese["estimators"]] == ["每 token（nat/token）", "整个序列（nat）"]


def test_no_text_of_its_javascript_stands_outside_word():
    source = (files("dpoviz.learn") / "explorer.js").read_text(encoding="utf-8")
    said = r"/\*.*?\*/|//[^\n]*|\bword\(\"[^\"]*\"|\b(?:class|style|type): (?:\"[^\"]*\"|`[^`]*`)"
    texts = re.findall(r"\"([^\"\n]*)\"|`([^`\n]*)`", re.sub(said, "", source, flags=re.DOTALL))
    plain = [re.sub(r"\$\{[^}]*\}", "", quoted or template) for quoted, template in texts]
    assert len(plain) > 100
    assert [text for text in plain if re.search(r"[A-Za-z]{2,} [a-z]|^ [a-z]|[A-Z][a-z]+ $", text)] == []


def test_its_files_lie_in_the_package_and_load_nothing_from_elsewhere():
    here = files("dpoviz.learn")
    packed = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    for name in ("explorer.js", "explorer.css"):
        text = (here / name).read_text(encoding="utf-8")
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
        assert f"learn/{name}" in packed["setuptools"]["package-data"]["dpoviz"]


# -- β retrained alone ---------------------------------------------------------------------------------------


def frozen(form="inverse", n=30, **settings):
    draw = np.random.default_rng(0)
    config = TrainConfig(form=form, seed=3, alpha=0.8, **settings)
    task = np.array(["math", "code", "dialogue"])[np.arange(n) % 3]
    features = draw.normal(size=(n, 4)).astype(np.float32) + (np.arange(n) % 3)[:, None]
    prompt = np.array([f"prompt {i // 2}" for i in range(n)])
    return Frozen(features, task, prompt, draw.uniform(0.3, 2, n), 4 * draw.normal(size=n) + 1, config)


WEIGHTS = {
    "the defaults": {},
    "no entropy term": {"lambda_entropy": 0.0},
    "the entropy term alone": {"lambda_range": 0.0, "lambda_smoothness": 0.0, "lambda_entropy": 3.0},
    "all of them": {"lambda_range": 1.0, "lambda_smoothness": 0.3, "lambda_consistency": 0.5, "lambda_entropy": 0.2},
    "none": {"lambda_range": 0.0, "lambda_smoothness": 0.0, "lambda_entropy": 0.0},
}


def by_hand(kept, steps):
    """The same training from the formulas: Adam on the mean loss plus the weighted penalties, in float64."""
    config, form = kept.config, kept.config.form
    beta0, n = config.beta0, len(kept.h)
    x, h, entropy = (torch.tensor(values, dtype=torch.float64) for values in (kept.features, kept.h, kept.ref_entropy))
    torch.manual_seed(config.seed)
    net = BetaNetwork(x.shape[1], beta0=beta0).double()
    adam = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        net.fit_running_statistics(x)
        beta = net.train()(x)
        s = 1 / beta if form == "inverse" else beta
        loss = -F.logsigmoid(s * h).mean()
        outside = (beta - config.beta_max).clamp(min=0) + (config.beta_min - beta).clamp(min=0)
        loss = loss + config.lambda_range / beta0 * outside.mean()
        rows = [x[i : i + 1].clone().requires_grad_() for i in range(n)]
        norms = [torch.autograd.grad(net.eval()(row).sum(), row, create_graph=True)[0].square().sum() for row in rows]
        loss = loss + config.lambda_smoothness / beta0**2 * torch.stack(norms).mean()
        means = {task: beta[kept.task == task].mean() for task in set(kept.task)}
        spread = torch.stack([(b - means[task]) ** 2 for b, task in zip(beta, kept.task, strict=True)])
        loss = loss + config.lambda_consistency / beta0**2 * spread.mean()
        target = config.alpha * beta0 * entropy
        loss = loss + config.lambda_entropy / beta0**2 * ((beta - target) ** 2).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    net.fit_running_statistics(x)
    return net.eval()(x).detach().numpy()


class TestRetrained:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("weights", WEIGHTS)
    def test_equals_a_plain_loop(self, form, weights):
        kept = frozen(form, n=12, **WEIGHTS[weights])
        got, expected = retrain_beta(kept, kept.config, steps=8), by_hand(kept, 8)
        np.testing.assert_allclose(got, expected, rtol=1e-6)  # Adam divides by small gradients: not 1e-12
        other = replace(kept.config, lambda_entropy=kept.config.lambda_entropy + 0.3)
        assert np.abs(got / retrain_beta(kept, other, steps=8) - 1).max() > 1e-4  # the control

    def test_the_entropy_term_alone_reaches_its_line(self):
        kept = frozen("standard", lambda_entropy=1e6, lambda_smoothness=0.0)
        kept = kept._replace(ref_entropy=1 + 0.5 * np.tanh(kept.features[:, 0]))
        target = 0.8 * kept.config.beta0 * kept.ref_entropy
        assert np.abs(retrain_beta(kept, kept.config, steps=300) / target - 1).mean() < 0.1
        free = replace(kept.config, lambda_entropy=0.0)
        assert np.abs(retrain_beta(kept, free, steps=300) / target - 1).mean() > 0.3

    def test_leaves_the_random_state_alone(self):
        kept, before = frozen(), torch.get_rng_state()
        retrain_beta(kept, kept.config, steps=1)
        assert torch.equal(torch.get_rng_state(), before)


class TestExploreBeta:
    @pytest.mark.slow
    def test_starts_at_the_settings_of_the_run_and_follows_its_sliders(self, run):
        explorer = explore_beta(run)
        controls, settings = explorer.controls, run.frozen("inverse").config
        for name in ("lambda_range", "lambda_smoothness", "lambda_consistency", "lambda_entropy"):
            assert controls[name].value == getattr(settings, name)
        assert controls["alpha"].value == pytest.approx(settings.alpha)
        for name, value in (("lambda_entropy", 0.0), ("form", "standard"), ("width", 2), ("lambda_smoothness", 1.0)):
            before = explorer.png
            controls[name].value = value
            assert explorer.png != before, name
            assert not explorer.trouble

    @pytest.mark.slow
    def test_the_picture_is_the_retrained_beta(self, run):
        explorer = explore_beta(run)
        explorer.controls["lambda_entropy"].value = 0.0
        kept = run.frozen("inverse")
        expected = retrain_beta(kept, replace(kept.config, lambda_entropy=0.0))
        drawn = np.concatenate([part.get_offsets()[:, 1] for part in explorer.figure.axes[1].collections])
        assert set(np.round(expected, 6)) <= set(np.round(drawn, 6))

    @pytest.mark.parametrize(("width", "most"), [(4, 256), (256, 256), (576, 113), (4096, 64)])
    def test_many_pairs_are_sampled_by_their_size_and_it_says_so(self, width, most):
        kept = frozen(n=300)
        wide = kept._replace(features=np.tile(np.arange(300, dtype=np.float32)[:, None], width))
        some = _some(wide)
        assert some.features.shape == (most, width) and len(set(some.features[:, 0])) == most
        rows = some.features[:, 0].astype(int)
        for name in ("task", "prompt", "ref_entropy", "h"):
            np.testing.assert_array_equal(getattr(some, name), getattr(kept, name)[rows])
        assert f"{most} of 300 training pairs" in _caption("inverse", most, 300, 0)
        assert _some(kept._replace(features=kept.features[:60], h=kept.h[:60])).h.shape == (60,)

    def test_says_what_is_held_fixed(self, run):
        said = explore_beta(run).figure.get_suptitle()
        assert f"{len(run.frozen('inverse').h)} training pairs" in said and "Held fixed" in said

    @pytest.mark.skipif(chinese_font() is None, reason="no font with Chinese characters")
    def test_says_so_in_chinese(self, run):
        with in_language("zh"):
            chinese = explore_beta(run)
        said = [chinese.figure.get_suptitle(), *(control.description for control in chinese.controls.values())]
        assert [text for text in said if not re.search(r"[\u4e00-\u9fff]|^α", text)] == []
