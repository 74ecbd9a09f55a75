"""Every sentence that figures, sliders, exercises and reports speak has its translation, and they speak it."""

import ast
import json
import re
from pathlib import Path
from string import Formatter
from types import SimpleNamespace
from unittest.mock import MagicMock

import pandas as pd
import pytest
import torch
from jinja2 import Environment
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text

import dpoviz
from dpoviz import cli, translation
from dpoviz.analysis.diagnose import Finding
from dpoviz.analysis.plots import figure_beta_by_task
from dpoviz.analysis.report import reading, write_report
from dpoviz.analysis.tables import summarize
from dpoviz.experiments import folder, memory_estimate, time_estimate
from dpoviz.experiments.config import RealConfig
from dpoviz.forms import FORMS
from dpoviz.learn import checks, sliders
from dpoviz.translation import catalogue, in_language, say

PACKAGE = Path(dpoviz.__file__).parent
CHINESE = re.compile(r"[\u4e00-\u9fff]")
FROM_DATA = {
    *FORMS,
    "fixed",
    "reference",
    "seed",
    "chosen",
    "rejected",
}  # forms, variants and columns, said by their names in the tables
SAYING = {"say", "label", "key", "_wrong", "Mistake"}
"""The functions whose first argument, where it is a literal, is a sentence."""

needs_font = pytest.mark.skipif(translation.chinese_font() is None, reason="no font with Chinese characters")


def keys_of_code(source: str) -> set[str]:
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    first = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id in SAYING]
    return {node.value for node in first if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def keys_of_template(source: str) -> set[str]:
    environment = Environment(extensions=["jinja2.ext.i18n"], trim_blocks=True, lstrip_blocks=True)
    environment.policies["ext.i18n.trimmed"] = True
    return {message for _, _, message in environment.extract_translations(source)}


def keys() -> set[str]:
    code = [keys_of_code(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    pages = [keys_of_template(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.j2")]
    widgets = [re.findall(r'\bword\("([^"]*)"', path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.js")]
    return set().union(*code, *pages, *widgets)


class TestCatalogue:
    @pytest.mark.slow
    def test_every_sentence_has_its_translation_and_none_is_left_over(self):
        assert len(keys()) > 250
        assert set(catalogue("zh")) == keys() | FROM_DATA

    def test_keys_are_seen(self):
        assert keys_of_code("say('a', b='c'); label('d'); f('e'); say(g)") == {"a", "d"}
        assert keys_of_template("{% trans %}a\n  b{% endtrans %}{{ _('c') }}d") == {"a b", "c"}

    @pytest.mark.parametrize("pattern", [r"`[^`]*`", r"<[^>]*>", r"§[\d.]+", r"(?<!_)\d+(?:\.\d+)?"])
    def test_code_tags_and_numbers_are_those_of_the_english(self, pattern):
        for english, chinese in catalogue("zh").items():
            wanted, found = (set(re.findall(pattern, re.sub(r"\{[^}]*\}", "", text))) for text in (english, chinese))
            assert wanted == found, (english, chinese)

    def test_fields_are_those_of_the_english(self):
        for english, chinese in catalogue("zh").items():
            fields = [
                sorted((name, spec) for _, name, spec, _ in Formatter().parse(text) if name)
                for text in (english, chinese)
            ]
            assert fields[0] == fields[1], english


class TestLanguage:
    def test_english_until_said_otherwise_and_again_afterwards(self):
        with pytest.raises(ZeroDivisionError), in_language("zh"):
            assert say("form") == "形式" and translation.current_language() == "zh"
            raise ZeroDivisionError
        assert say("form") == "form" and translation.current_language() == "en"

    def test_a_sentence_without_translation_stays_english(self):
        with in_language("zh"):
            assert say("{n} of a kind that nobody translated", n=3) == "3 of a kind that nobody translated"

    def test_refuses_another_language(self):
        with pytest.raises(ValueError, match="language: got 'fr', expected one of"):
            dpoviz.language("fr")

    def test_without_a_font_figures_stay_english_and_say_so(self, monkeypatch):
        monkeypatch.setattr(fontManager, "ttflist", [])
        with pytest.warns(UserWarning, match="Noto Sans CJK"), in_language("zh"):
            assert translation.label("probability") == "probability" and say("probability") == "概率"


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text().strip()]


def betas(n: int = 12) -> pd.DataFrame:
    rows = [
        {"form": form, "seed": 0, "task": task, "prompt": f"{task} {i}", "beta": 0.1 * (1 + i + 3 * j), "scale": 1.0,
         "ref_entropy": 0.1 * i + j + 0.1, "ref_entropy_se": 0.01}
        for form in FORMS for j, task in enumerate(("math", "code", "dialogue")) for i in range(n)
    ]  # fmt: skip
    return pd.DataFrame(rows)


class TestSpoken:
    @needs_font
    def test_figures(self):
        with in_language("zh"):
            figure = figure_beta_by_task(betas())
            figure.canvas.draw()  # a character without a glyph would warn, and warnings are errors
        of_data = re.compile(r"math|code|dialogue|\\[a-z]+")  # names of tasks, and formulas
        words = [of_data.sub("", text) for text in texts_of(figure)]
        assert not [text for text in words if re.search(r"[A-Za-z]{4}", text) and not CHINESE.search(text)]
        assert any("参考策略的熵" in text for text in texts_of(figure))

    @pytest.mark.slow
    @needs_font
    @pytest.mark.parametrize(
        "make",
        [sliders.frontier, sliders.two_forms, sliders.price_and_entropy, sliders.term_curves, sliders.which_beta],
    )
    def test_sliders(self, make):
        english = make()
        with in_language("zh"):
            chinese = make()
            for control in chinese.controls.values():
                assert CHINESE.search(control.description) or control.description in ("β", "α")
        assert chinese.trouble == "" and chinese.png != english.png
        assert any(map(CHINESE.search, texts_of(chinese.figure))) and not any(
            map(CHINESE.search, texts_of(english.figure))
        )

    def test_exercises(self):
        with in_language("zh"):
            missing = checks.check_optimal_policy(lambda ref, r, beta: ...)
            swapped = checks.check_beta_gradient(lambda h, beta, form: torch.sigmoid(-h) * 0 + h)
            plain = checks.check_entropy_penalty(lambda beta, ref_entropy, alpha: (beta - ref_entropy).square().mean())
            right = checks.check_entropy_penalty(lambda b, e, alpha: (b - alpha * e.detach()).square().mean())
        for verdict in (missing, swapped, plain, right):
            assert CHINESE.search(verdict.sentence)
            with in_language("zh"):
                assert CHINESE.search(verdict.mark)
        assert plain.sentence == "少了 α：这是 (β − H)²。"

    def test_every_known_mistake(self):
        """Each mistake's sentence is Chinese when it is said, whatever it is put together from."""
        answers = [
            checks.completion_logps_answers, checks.optimal_policy_answers, checks.reward_difference_answers,
            checks.entropy_penalty_answers, checks.smoothness_penalty_answers, checks.kl_estimate_answers,
            checks.slope_answers, checks.allocation_answers, checks.bound_answers,
            checks.tilt_answers, checks.share_answers,
            checks.token_entropy_answers, checks.entropy_beta_answers, checks.rho_within_answers,
            *(lambda f=f, form=form: f(form) for form in FORMS
              for f in (checks.dpo_loss_answers, checks.dpo_rewards_answers, checks.beta_gradient_answers)),
        ]  # fmt: skip
        with in_language("zh"):
            spoken = [say(mistake.sentence) for make in answers for mistake in make().mistakes]
        assert len(spoken) > 100
        assert not [sentence for sentence in spoken if not CHINESE.search(sentence)]

    @pytest.mark.slow
    @needs_font
    def test_report(self, tmp_path):
        table = betas()
        history = pd.DataFrame(
            {"variant": ["inverse"], "form": ["inverse"], "seed": [0], "step": [0], "stage": [2], "loss/dpo": [0.7]}
        )
        slopes = pd.DataFrame({"variant": ["fixed"], "task": ["math"], "answers": [4], "prompts": [2], "slope": [0.1],
                               "low": [0.0], "high": [0.2], "variance": [1.0]})  # fmt: skip
        findings = [Finding("few prompts", "math", "note", "证据。", "建议。"),
                    Finding("entropies cut", None, "not checked", "证据。", "建议。")]  # fmt: skip
        with in_language("zh"):
            summary = summarize(table)
            sentences = reading(summary)
            path = write_report(
                tmp_path / "report.html", table=table, history=history, summary=summary, config={"fast": True},
                figures={"beta_by_task": figure_beta_by_task(table), "retilt": Figure()}, reading=sentences,
                slopes=slopes, findings=findings,
            )  # fmt: skip
        page = path.read_text(encoding="utf-8")
        assert (
            'lang="zh-CN"' in page
            and "怎样读这张图" in page
            and all(sentence in page for sentence in map(_escaped, sentences))
        )
        shown = re.sub(r"<style>.*?</style>|<pre>.*?</pre>|src=\"[^\"]*\"", "", page, flags=re.DOTALL)
        left = [key for key in keys() if len(key.split()) > 3 and key in shown]
        assert left == []
        assert all(text in page for text in ("说明：提示太少", "未检查：", "每 nat 的奖励", "训练之后的 β"))
        assert not re.search(r"note|few prompts|not checked|>run<|>fixed<", shown.replace('class="note"', ""))


TWO_WORDS = re.compile(r"\b(?!dpoviz )[A-Za-z]{2,} [a-z]{2,}")  # but the name of a command


@pytest.fixture
def say_all(tmp_path, monkeypatch, capsys):
    """Call what `dpoviz demo` and `train` print with; return the lines."""
    table = betas()
    pairs = table.loc[table["form"] == "standard", ["task", "prompt"]].assign(
        variant="fixed", form="standard", group=None, h=1.0, chosen=-1.0, rejected=-2.0, ref_chosen=-5.0,
        ref_rejected=-4.0, chosen_tokens=4, rejected_tokens=5,
    )  # fmt: skip
    history = pd.DataFrame({"variant": FORMS, "form": FORMS, "seed": 0, "step": 0, "stage": 2})
    entropy = table[["task", "prompt"]].assign(estimator="per_token", entropy=table["ref_entropy"], example=False)
    lines = {name: {form: scale for form in FORMS} for name, scale in
             {"beta0": 1.0, "beta_min": 0.1, "beta_max": 9.0, "alpha": 1.0}.items()}  # fmt: skip
    folder.write_tables(
        tmp_path, metadata=lines | {"baseline": "fixed"}, beta=table, history=history, entropy=entropy,
        held_out=pd.concat([pairs, pairs.assign(variant="inverse", form="inverse", h=-1.0)]),
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"fast": True}))
    for drawn in [name for name in vars(folder) if name.startswith(("figure_", "plot_", "write_report"))]:
        monkeypatch.setattr(folder, drawn, MagicMock())  # takes seconds, and prints nothing
    seconds = {"reference": 9.0, "entropy": 200.0, "training": 9000.0}
    monkeypatch.setattr(time_estimate, "estimate_seconds", lambda *_, **__: seconds)
    monkeypatch.setattr(memory_estimate, "require_memory", lambda *_: SimpleNamespace(total=2e9))
    loaded = SimpleNamespace(train=table, held_out=table, model=SimpleNamespace(num_parameters=lambda: 7))

    def call() -> list[str]:
        cli._say_loaded(RealConfig(), loaded)
        cli._say_memory(RealConfig(), loaded)
        cli._say_time(RealConfig(), loaded, variants=3)
        cli._say_results(tmp_path, SimpleNamespace(entropy=entropy), 0)
        return [line.replace(str(tmp_path), "") for line in capsys.readouterr().out.splitlines() if line]

    return call


@pytest.mark.slow
@needs_font
def test_no_printed_line_of_a_run_is_left_in_english(say_all):
    english = say_all()
    with in_language("zh"):
        chinese = say_all()
    assert len(english) == len(chinese) > 25 and sum(map(bool, map(TWO_WORDS.search, english))) > 15
    assert [line for line in chinese if TWO_WORDS.search(line)] == []
    # a row of a table may be numbers and the names of data alone
    assert [line for line in chinese if not CHINESE.search(line) and not re.search(r" \d", line)] == []


def test_all_that_demo_and_train_print_is_said():
    """Nothing else in them prints, and no text stands in a print but through say."""
    tree = ast.parse((PACKAGE / "cli.py").read_text(encoding="utf-8"))
    names = re.compile("_say_.*|_demo|_train|_reference|_report")
    own = [node for node in tree.body if isinstance(node, ast.FunctionDef) and names.fullmatch(node.name)]
    prints = [call for node in own for call in ast.walk(node) if isinstance(call, ast.Call) and named(call) == "print"]
    assert len(prints) > 10
    assert [text for call in prints for text in plain(call) if re.search(r"[A-Za-z]{2}", text)] == []


def named(call: ast.Call) -> str:
    return getattr(call.func, "id", "")


def plain(node: ast.AST) -> list[str]:
    """The texts below a node that are printed as they are: not those in a call of say, or the name of a column."""
    if isinstance(node, ast.Subscript) or (isinstance(node, ast.Call) and named(node) in ("say", "key")):
        return []
    own = [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
    return own + [text for child in ast.iter_child_nodes(node) for text in plain(child)]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
