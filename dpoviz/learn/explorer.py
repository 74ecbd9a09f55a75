"""The explorer of a run: β(x) of every held-out prompt, step by step, and of any prompt that is typed in.

The picture is drawn in the browser (explorer.js), so that it follows the step slider without the kernel. The kernel
is needed only for the β and the entropy of a new prompt.
"""

from __future__ import annotations

import base64
import io
import logging
import re
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import pandas as pd
import traitlets

from dpoviz.analysis.plots import ESTIMATORS, figure_beta_by_task
from dpoviz.analysis.style import TERM_COLORS, task_colors
from dpoviz.forms import FORMS
from dpoviz.learn.run import Run
from dpoviz.translation import current_language, say, translate

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_LINES = ("beta0", "beta_min", "beta_max", "alpha")


class RunExplorer(anywidget.AnyWidget):
    """The widget of `explore_run`. What it shows can be read and set from Python, too.

    Attributes:
        step: the training step that is shown.
        estimator: position of the entropy estimator on the x axis; 0 is the one that the run was trained with.
        log_beta: whether the β axis is logarithmic.
        log_entropy: whether the entropy axis is.
        hidden_tasks: tasks that are switched off.
        hidden_forms: forms that are switched off.
        selected: position of the selected prompt: held-out prompts as in `Run.table`, then the typed ones; −1: none.
        question: the prompt to compute, as {"id": number, "prompt": string or chat}. Setting it adds to `asked`.
        asked: the typed prompts with their β by form, entropy and standard error in nats, or "error".
    """

    _esm = _HERE / "explorer.js"
    _css = _HERE / "explorer.css"

    contents = traitlets.Dict(read_only=True).tag(sync=True)
    betas = traitlets.Bytes(read_only=True).tag(sync=True)
    step = traitlets.Int().tag(sync=True)
    estimator = traitlets.Int(0).tag(sync=True)
    log_beta = traitlets.Bool(True).tag(sync=True)
    log_entropy = traitlets.Bool(False).tag(sync=True)
    hidden_tasks = traitlets.List(traitlets.Unicode()).tag(sync=True)
    hidden_forms = traitlets.List(traitlets.Unicode()).tag(sync=True)
    selected = traitlets.Int(-1).tag(sync=True)
    question = traitlets.Dict().tag(sync=True)
    asked = traitlets.List(traitlets.Dict()).tag(sync=True)

    def __init__(self, run: Run) -> None:
        prompts = run.table[["task", "prompt"]].drop_duplicates("prompt").reset_index(drop=True)
        forms = list(run.table["form"].unique())
        steps, betas, notes = _by_step(run, forms, prompts)
        super().__init__(step=steps[-1])
        self.run = run
        self.set_trait("betas", betas.astype("<f4").tobytes())
        pulls, of_pulls = _pulls(run, prompts)
        points, of_points = _points(run, prompts, pulls)
        contents = {
            "run": run.folder.resolve().name,
            "chat": bool(run.metadata.get("reference", {}).get("chat")),
            "forms": [{"name": form, **_lines(run, form)} for form in forms],
            "tasks": [{"name": task, "color": color} for task, color in task_colors(prompts["task"]).items()],
            "terms": TERM_COLORS,
            "steps": steps,
            "estimators": _estimators(run, prompts),
            "points": points,
            "notes": notes + of_pulls + of_points,
            "words": _words(),
        }
        self.set_trait("contents", contents)
        self.observe(self._answer, "question")

    def _answer(self, change: Any) -> None:
        """Compute the β and the entropy of the prompt in `question`; what fails is shown in the widget."""
        asked = change["new"]
        if not asked:
            return
        answer: dict[str, Any] = {"id": asked["id"], "prompt": asked["prompt"]}
        try:
            answer["beta"] = {
                form["name"]: self.run.beta(asked["prompt"], form=form["name"]) for form in self.contents["forms"]
            }
            answer["entropy"], answer["se"] = (_finite(value) for value in self.run.entropy(asked["prompt"]))
        except Exception as error:  # the callback of a widget cannot report it elsewhere
            logger.debug("the prompt of the explorer", exc_info=True)
            answer = {"id": asked["id"], "prompt": asked["prompt"], "error": f"{type(error).__name__}: {error}"}
        self.asked = [*self.asked, answer]

    @property
    def prompt(self) -> Any:
        """The selected prompt, a string or a chat; None if none is selected."""
        if self.selected < 0:
            return None
        typed = [answer["prompt"] for answer in self.asked if "error" not in answer]
        return [*(point["prompt"] for point in self.contents["points"]), *typed][self.selected]

    @property
    def png(self) -> bytes:
        """The picture after the last step, without the widget: shown where no kernel runs."""
        lines = {name: self.run.metadata.get(name) for name in _LINES}
        out = io.BytesIO()
        figure_beta_by_task(self.run.table, **lines).savefig(out, format="png", dpi=90)
        return out.getvalue()

    def __repr__(self) -> str:
        return f"RunExplorer({self.contents['run']!r}, step {self.step})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        return {**data, "image/png": base64.b64encode(self.png).decode("ascii")}, metadata


def explore_run(run: Run) -> RunExplorer:
    """Return the explorer of a run, a widget for JupyterLab, in the current language (`dpoviz.language`).

    It shows β(x) by task and against the entropy of the reference, at each logged step. A point can be pointed at and
    clicked: its prompt, its answers, the pulls on its β, its β over the steps. A prompt that is typed in gets its β
    and its entropy from the kernel. Without a kernel, the picture after the last step remains.

    Args:
        run: what `load_run` returned.

    Raises:
        ValueError: β is not a function of the prompt in this run, so that there is nothing to explore.
    """
    if run.table.empty:
        raise ValueError(f"run: {run.folder} has no β(x), expected a run whose rule makes β a function of the prompt")
    return RunExplorer(run)


def _words() -> dict[str, str]:
    """Return the translation of each text that explorer.js says; none in English."""
    if current_language() == "en":
        return {}
    said = re.findall(r'\bword\("([^"]*)"', (_HERE / "explorer.js").read_text(encoding="utf-8"))
    return {text: translate(text) for text in [*said, *FORMS, "reference", "fixed", *TERM_COLORS]}


def _finite(value: float) -> float | None:
    """Return a number, or None for one that JSON does not have."""
    return float(value) if np.isfinite(value) else None


def _lines(run: Run, form: str) -> dict[str, float | None]:
    return {name: (run.metadata.get(name) or {}).get(form) for name in _LINES}


def _by_step(run: Run, forms: list[str], prompts: pd.DataFrame) -> tuple[list[int], np.ndarray, list[str]]:
    """Return the logged steps, β of shape (forms, steps, prompts) with NaN where it is unknown, and notes."""
    try:
        betas, notes = run.betas(), []
    except ValueError as error:  # a folder from before runs kept it
        last = int(run.history["step"].max())
        betas, notes = run.table.assign(step=last), [say("Only the last step is shown: {error}", error=error)]
    steps = sorted(int(step) for step in betas["step"].unique())
    wide = betas.pivot(index=["form", "step"], columns="prompt", values="beta")
    rows = pd.MultiIndex.from_product([forms, steps])
    values = wide.reindex(index=rows, columns=prompts["prompt"]).to_numpy()
    return steps, values.reshape(len(forms), len(steps), len(prompts)), notes


def _pulls(run: Run, prompts: pd.DataFrame) -> tuple[list[dict], list[str]]:
    """Return for each prompt the pull of each term on its β, by form, and notes."""
    try:
        pulls = run.pulls()
    except ValueError as error:
        return [{} for _ in range(len(prompts))], [say("The pulls on β are not shown: {error}", error=error)]
    terms = [term for term in TERM_COLORS if term in pulls.columns]
    found: dict[str, dict] = {prompt: {} for prompt in prompts["prompt"]}
    for row in pulls.to_dict("records"):
        if row["prompt"] in found:
            found[row["prompt"]][row["form"]] = {term: _finite(row[term]) for term in terms}
    return list(found.values()), []


def _estimators(run: Run, prompts: pd.DataFrame) -> list[dict]:
    """Return the entropies of the prompts by estimator: first those that the run was trained with."""
    own = run.table.drop_duplicates("prompt").set_index("prompt").loc[prompts["prompt"]]
    tables = {_label("per_token"): (own["ref_entropy"], own["ref_entropy_se"])}
    if run.entropies is not None:
        of_data = run.entropies[~run.entropies["example"].astype(bool)]
        for name in (name for name in ESTIMATORS if name != "per_token"):
            rows = of_data[of_data["estimator"] == name].drop_duplicates("prompt").set_index("prompt")
            rows = rows.reindex(prompts["prompt"])
            if rows["entropy"].notna().any():
                tables[_label(name)] = (rows["entropy"], rows["se"])
    return [
        {"label": label, "values": [_finite(v) for v in values], "se": [_finite(v) for v in errors]}
        for label, (values, errors) in tables.items()
    ]


def _label(estimator: str) -> str:
    return translate(ESTIMATORS[estimator]).replace("\n（", "（").replace("\n", " ")


def _points(run: Run, prompts: pd.DataFrame, pulls: list[dict]) -> tuple[list[dict], list[str]]:
    """Return for each held-out prompt what a click on its point shows, and notes."""
    pairs, notes = _pairs(run)
    points = [
        {
            "task": task,
            "prompt": prompt,
            "pulls": pull,
            "pairs": pairs.get(prompt, []),
            "answers": run.answers(prompt)[["variant", "answer"]].to_numpy().tolist(),
        }
        for task, prompt, pull in zip(prompts["task"], prompts["prompt"], pulls, strict=True)
    ]
    return points, notes


def _pairs(run: Run) -> tuple[dict[str, list[dict]], list[str]]:
    """Return the pairs of each prompt: log π/π_ref and h by variant, and the texts if the run kept them; and notes."""
    try:
        scores = run.scores
    except ValueError as error:  # a trainer's folder without an evaluation
        return {}, [say("The pairs are not shown: {error}", error=error)]
    by_variant = {str(name): rows for name, rows in scores.groupby("variant", sort=False)}
    rows = next(iter(by_variant.values()))
    found: list[dict[str, Any]] = [{"ratios": {}} for _ in range(len(rows))]
    for name, own in by_variant.items():  # every variant has the same pairs, in the same order
        for pair, ratios in zip(found, own[["chosen", "rejected", "h"]].to_numpy().tolist(), strict=True):
            pair["ratios"][name] = ratios
    notes = []
    try:
        for pair, chosen, rejected in zip(found, run.pairs["chosen"], run.pairs["rejected"], strict=True):
            pair |= {"chosen": chosen, "rejected": rejected}
    except ValueError as error:
        notes = [say("The answers of the pairs are not shown: {error}", error=error)]
    of_prompt: dict[str, list[dict]] = {}
    for prompt, pair in zip(rows["prompt"], found, strict=True):
        of_prompt.setdefault(prompt, []).append(pair)
    return of_prompt, notes
