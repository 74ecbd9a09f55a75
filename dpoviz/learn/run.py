"""Explore a finished run: its tables, what it kept of its training, and beta and entropy at new prompts."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from dpoviz.analysis.diagnose import Finding, diagnose
from dpoviz.analysis.plots_runs import figure_runs
from dpoviz.analysis.tables import COLUMNS, read_table, summarize
from dpoviz.beta import Beta, EntropyBeta, TaskBeta
from dpoviz.data.tokens import answer_end, encode_prompts
from dpoviz.experiments.folder import betas_of_steps
from dpoviz.forms import Form
from dpoviz.lm.cache import read_json
from dpoviz.lm.entropy import estimate_entropy
from dpoviz.lm.models import LanguageModel, load_lm, weights_fingerprint
from dpoviz.lm.processes import no_bars
from dpoviz.lm.sampling import sample_answers
from dpoviz.lm.scoring import score_answers
from dpoviz.training.config import TrainConfig
from dpoviz.training.methods import load_beta

logger = logging.getLogger(__name__)

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or a chat: a list of messages, each with role and content."""

_NEEDED = ("config.json", "run.json", "history.csv")
_OLDER = "this run is of an older version, which did not keep it; run it again with the same settings to keep it"


class Frozen(NamedTuple):
    """The quantities that training beta alone holds fixed, at training pairs: all of them, or a sample of 4096.

    Attributes:
        features: (N, D) float32, the reference's features of the prompts.
        task: (N,) the task of each pair.
        prompt: (N,) the prompts; one with several pairs appears several times.
        ref_entropy: (N,) entropy of the reference at the prompt, in nats per token.
        h: (N,) log-ratio difference of the pair under the policy after the last step, in nats.
        config: the settings of the run in this form, with alpha filled in.
    """

    features: np.ndarray
    task: np.ndarray
    prompt: np.ndarray
    ref_entropy: np.ndarray
    h: np.ndarray
    config: TrainConfig


def load_run(
    folder: Path | str, *, reference: Path | str | LanguageModel | None = None, beta: float | None = None
) -> Run:
    """Open a run, wherever its folder lies now: of `dpoviz demo` or `dpoviz train`, or the output folder of a trainer.

    Args:
        folder: the run's --out; or what TRL or LLaMA-Factory wrote (`dpoviz.learn.trl_run.TrlRun`): their logs, and
            what `BetaDPOTrainer` leaves: its β, and the numbers of the pairs of its eval_dataset.
        reference: the model that the run started from, or where it is; needed only for new prompts, and only if the
            folder does not hold it and it is no longer where the run found it.
        beta: the β of TRL's own `DPOTrainer` or of LLaMA-Factory, which their logs do not name; turns the rewards of
            the log, β·log π/π_ref, into log-ratios.

    Raises:
        ValueError: the folder holds no run; or `beta` is given for a run that knows it, or whose rewards are not
            β·log π/π_ref.
    """
    from dpoviz.learn.trl_run import TrlRun, find_log  # which builds on Run

    folder = Path(folder)
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    log = find_log(folder) if missing else None
    if log is not None:
        return TrlRun(folder, log, reference, beta)
    if missing:
        raise ValueError(
            f"folder: {folder} holds no finished run, {', '.join(missing)} is missing; give a run's --out, or a "
            "trainer's output folder with trainer_log.jsonl or trainer_state.json (each checkpoint has one; "
            "trainer.save_state() writes it too)"
        )
    if beta is not None:
        raise ValueError(f"beta: got {beta!r}, expected None: a run of dpoviz knows its β")
    return Run(folder, reference)


class Run:
    """A finished run. Tables are read when first asked for; models are loaded for the first new prompt.

    Attributes:
        folder: the folder of the run.
        config: its settings, as in config.json.
        metadata: as in run.json: lines of the figures, reference, versions, seconds.
    """

    def __init__(self, folder: Path, reference: Path | str | LanguageModel | None = None) -> None:
        self.folder = folder
        self.config, self.metadata = self._facts()
        self._given = reference
        self._features: dict[tuple[int, ...], torch.Tensor] = {}
        self._entropies: dict[tuple[int, ...], tuple[float, float]] = {}
        self._betas: dict[str, Beta] = {}
        self._sampled: dict[tuple[int, ...], pd.DataFrame] = {}

    @property
    def tables_folder(self) -> Path:
        """The folder of the run's tables."""
        return self.folder

    def _facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the settings and the metadata."""
        return read_json(self.folder / "config.json"), read_json(self.folder / "run.json")

    def __repr__(self) -> str:
        prompts = self.table["prompt"].nunique()
        return f"Run({str(self.folder)!r}: {', '.join(self.forms)}; {prompts} held-out prompts)"

    @cached_property
    def table(self) -> pd.DataFrame:
        """Beta at each held-out prompt after the last step (`beta_table`); empty if beta reads more than the prompt."""
        return self._read("beta", pd.DataFrame(columns=list(COLUMNS)))

    @cached_property
    def history(self) -> pd.DataFrame:
        """The histories of all variants (`TrainResult.history`), with the column variant."""
        return read_table(self.folder / "history.csv")

    @cached_property
    def scores(self) -> pd.DataFrame:
        """A row per variant and held-out pair: log π/π_ref of chosen and rejected, and h, in nats."""
        return self._read("held_out")

    @cached_property
    def entropies(self) -> pd.DataFrame | None:
        """The reference's entropy by estimator, task and prompt; None if the run compared no estimators."""
        return self._read("entropy", None)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """The held-out pairs as texts, in the order of `scores`: task, prompt, chosen, rejected, messages, prompt_ids.

        Raises:
            ValueError: the run is of an older version.
        """
        return self._kept("pairs")

    @property
    def forms(self) -> list[Form]:
        """The forms in which the run has a beta of the prompt."""
        return sorted(self.table["form"].unique())

    def summary(self) -> pd.DataFrame:
        """Return medians and quartiles of beta and its correlation with the entropy (`summarize`)."""
        return summarize(self.table)

    @cached_property
    def steps(self) -> list[int]:
        """The logged steps, at which `betas` are known."""
        return sorted(int(step) for step in self._kept("beta_steps")["step"].unique())

    def betas(self, step: int | None = None) -> pd.DataFrame:
        """Return beta at each held-out prompt at the logged steps.

        Args:
            step: one of `steps`; None returns all.

        Returns:
            form, step, task, prompt, ref_entropy, beta. The last step's are those of `table`.

        Raises:
            ValueError: a step that was not logged, or the run is of an older version.
        """
        if step is not None and step not in self.steps:
            raise ValueError(f"step: got {step!r}, expected a logged step: {_some(self.steps)}")
        return self._all_betas if step is None else self._all_betas[self._all_betas["step"] == step]

    @cached_property
    def _all_betas(self) -> pd.DataFrame:
        self._kept("beta_steps")  # raises if there is none
        return betas_of_steps(self.tables_folder, self.table)

    def pulls(self) -> pd.DataFrame:
        """Return the pull of each term on beta at each held-out prompt after the last step (`gradients_on_beta`).

        Returns:
            form, task, prompt, and a column per term: dpo, range, smoothness, entropy, and consistency if it is on.

        Raises:
            ValueError: the run is of an older version.
        """
        return self._read("pulls")

    def diagnose(self) -> list[Finding]:
        """Return what looks wrong in the run, with the evidence and what to try (`dpoviz.analysis.diagnose`)."""
        return diagnose(
            table=self.table,
            history=self.history,
            scores=self.scores,
            config=self.config,
            metadata=self.metadata,
            entropies=self.entropies,
        )

    def answers(self, prompt: Prompt, *, sample: bool = False) -> pd.DataFrame:
        """Return an answer of the reference and of each trained policy: variant, answer.

        Args:
            prompt: a text or a chat.
            sample: sample the answers, with the run's seed, if the run saved none; this loads every policy. False
                returns no rows then.
        """
        rows = self._answers[self._answers["prompt"] == prompt] if isinstance(prompt, str) else self._answers.iloc[:0]
        if len(rows) or not sample:
            return rows[["variant", "answer"]].reset_index(drop=True)
        ids = tuple(self._ids(prompt))
        if ids not in self._sampled:
            self._sampled[ids] = self._sample(ids, prompt)
        return self._sampled[ids]

    def beta(self, prompt: Prompt, *, form: Form, task: str | None = None) -> float:
        """Return beta at a prompt, new or held out, after the last step.

        The first call loads the reference and beta.

        Args:
            prompt: a text or a chat. In a run on chats, a text becomes a user's message.
            form: "inverse" or "standard".
            task: the task of a new prompt, for a beta by task; the known one of a held-out prompt.

        Raises:
            ValueError: a form that the run has not; no reference, or another than the run's; a prompt that does not fit
                the model's context; a beta by task without a task.
        """
        beta = self._beta(form)
        with torch.no_grad():
            x = self._feature(prompt).to(self._reference.model.device)
            more: dict[str, Any] = {}
            if isinstance(beta, TaskBeta):
                more["task"] = [self._task(prompt, task)]
            if isinstance(beta, EntropyBeta):
                more["ref_entropy"] = x.new_tensor([self.entropy(prompt)[0]])
            return float(beta(x, **more))

    def entropy(self, prompt: Prompt) -> tuple[float, float]:
        """Return the reference's entropy at a prompt in nats per token (`per_token`), and its standard error.

        That of a held-out prompt is read from the table; for a new one answers are sampled with the run's settings.

        Raises:
            ValueError: as `beta`.
        """
        if isinstance(prompt, str):
            known = self.table[self.table["prompt"] == prompt]
            if len(known) and known["ref_entropy"].notna().all():
                return float(known["ref_entropy"].iloc[0]), float(known["ref_entropy_se"].iloc[0])
        ids = tuple(self._ids(prompt))
        if ids not in self._entropies:
            samples, max_new_tokens, seed = self._sampling()
            found = estimate_entropy(
                self._reference.model,
                [list(ids)],
                samples=samples,
                max_new_tokens=max_new_tokens,
                eos_id=self._end(prompt),
                pad_id=self._reference.tokenizer.pad_token_id,
                seed=seed,
            ).per_token
            self._entropies[ids] = float(found.value[0]), float(found.se[0])
        return self._entropies[ids]

    def _sampling(self) -> tuple[int, int, int]:
        """Return how the entropy of a prompt was sampled: answers, the most tokens of each, and the seed."""
        settings = self.config.get("world") or {**self.config, **self.config["training"]}
        return settings["entropy_samples"], settings["max_new_tokens"], settings["seed"]

    def frozen(self, form: Form) -> Frozen:
        """Return the quantities that training beta alone holds fixed, of the training pairs.

        Args:
            form: "inverse" or "standard".

        Raises:
            ValueError: a form that the run has not, or the run is of an older version.
        """
        kept = self._kept("frozen")
        if f"h/{form}" not in kept:
            forms = [name.removeprefix("h/") for name in kept if name.startswith("h/")]
            raise ValueError(f"form: got {form!r}, expected one of the run's: {', '.join(forms)}")
        config = TrainConfig(**self.metadata["training"][form])
        alpha = self.metadata["alpha"].get(form)
        return Frozen(
            features=np.stack(kept["features"].to_list()).astype(np.float32),
            task=kept["task"].to_numpy(),
            prompt=kept["prompt"].to_numpy(),
            ref_entropy=kept["ref_entropy"].to_numpy(),
            h=kept[f"h/{form}"].to_numpy(),
            config=config if alpha is None else replace(config, alpha=alpha / config.beta0),
        )

    @cached_property
    def _answers(self) -> pd.DataFrame:
        """The answers that the run saved, of some held-out prompts."""
        return self._read("answers", pd.DataFrame(columns=["variant", "prompt", "answer"]))

    def _read(self, name: str, *default: Any) -> Any:
        """Return a table of the run; without its file the default, or an error if there is none."""
        file = self.tables_folder / f"{name}.csv"
        if file.is_file():
            return read_table(file)
        if default:
            return default[0]
        raise ValueError(f"{name}: {file} is missing; {self._why_missing(name)}")

    def _why_missing(self, name: str) -> str:
        """Return why the run has no table of this name."""
        return _OLDER

    def _kept(self, name: str) -> pd.DataFrame:
        file = self.tables_folder / f"{name}.parquet"
        if not file.is_file():
            raise ValueError(f"{name}: {file} is missing; {self._why_missing(name)}")
        return pd.read_parquet(file)

    @cached_property
    def _reference(self) -> LanguageModel:
        """The reference, checked against the record of the run."""
        record = self.metadata.get("reference", {})
        if isinstance(self._given, LanguageModel):
            found = self._given
        else:
            found = self._load(record)
        expected = record.get("fingerprint")
        if expected is None:
            logger.warning(
                "%s has no record of its reference: %s is not checked", self.folder, found.model.name_or_path
            )
        elif weights_fingerprint(found.model) != expected:
            raise ValueError(
                f"reference: {found.model.name_or_path} is not the model of this run, {record['name']}: its weights "
                f"differ (fingerprint {weights_fingerprint(found.model)}, expected {expected}); give the right one to "
                "load_run(folder, reference=...)"
            )
        return found

    def _load(self, record: Mapping[str, Any]) -> LanguageModel:
        own = self.folder / "reference"
        known = own if own.is_dir() else record.get("name", self.config.get("model"))
        name: Any = known if self._given is None else self._given
        if name is None:
            raise ValueError(
                f"reference: {self.folder} does not say which it was; give it to load_run(folder, reference=...)"
            )
        try:
            with no_bars():
                dtype = getattr(torch, record["dtype"]) if "dtype" in record else None
                return load_lm(name, dtype=dtype, four_bit=record.get("four_bit", False) and not own.is_dir())
        except (ValueError, OSError) as error:
            raise ValueError(
                f"reference: the run was made with {name}, which cannot be loaded here ({error}); give its place to "
                "load_run(folder, reference=...)"
            ) from error

    def _beta(self, form: str) -> Beta:
        if form not in self.forms:
            raise ValueError(f"form: got {form!r}, expected one of the run's: {', '.join(self.forms) or 'none'}")
        if form not in self._betas:
            fingerprint = self.metadata.get("reference", {}).get("fingerprint")
            beta = load_beta(self.folder / form / "beta", form=form, fingerprint=fingerprint)
            assert isinstance(beta, Beta)  # a form of the table has one
            self._betas[form] = beta.to(self._reference.model.device)
        return self._betas[form]

    def _feature(self, prompt: Prompt) -> torch.Tensor:
        """Return (1, D) the reference's features of a prompt."""
        ids = tuple(self._ids(prompt))
        if ids not in self._features:
            model, tokenizer = self._reference
            end = [self._end(prompt)]
            found = score_answers(model, [list(ids)], [[end]], pad_id=tokenizer.pad_token_id, features=True).features
            assert found is not None
            self._features[ids] = found
        return self._features[ids]

    def _ids(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt; those of a held-out prompt as they were in training."""
        if isinstance(prompt, str) and prompt in self._known_ids:
            return self._known_ids[prompt]
        text, chat = (prompt, self._chat(prompt)) if isinstance(prompt, str) else ("", [dict(m) for m in prompt])
        (ids,) = encode_prompts([text], [chat], self._reference.tokenizer)
        if not ids:
            raise ValueError("prompt: got a text of no tokens, expected some")
        return ids

    def _chat(self, text: str) -> list[dict] | None:
        """Return a text as a user's message if the run's prompts are chats; None otherwise."""
        chats = self.metadata.get("reference", {}).get("chat", False)
        return [{"role": "user", "content": text}] if chats else None

    def _end(self, prompt: Prompt) -> int:
        """Return the token that ends an answer to a prompt."""
        chat = self._chat(prompt) if isinstance(prompt, str) else [dict(message) for message in prompt]
        return answer_end(self._reference.tokenizer, chat)

    @cached_property
    def _known_ids(self) -> dict[str, list[int]]:
        if not (self.tables_folder / "pairs.parquet").is_file():
            return {}
        rows = self.pairs.drop_duplicates("prompt")
        return {prompt: ids.tolist() for prompt, ids in zip(rows["prompt"], rows["prompt_ids"], strict=True)}

    def _task(self, prompt: Prompt, task: str | None) -> str:
        known = self.table[self.table["prompt"] == prompt]["task"] if isinstance(prompt, str) else pd.Series([])
        if task is None and known.empty:
            raise ValueError(f"task: got None, expected one of {sorted(self.table['task'].unique())}: beta is by task")
        return known.iloc[0] if task is None else task

    def _sample(self, ids: tuple[int, ...], prompt: Prompt) -> pd.DataFrame:
        model, tokenizer = self._reference
        end, training = self._end(prompt), self.config["training"]
        variants = list(dict.fromkeys(self.history["variant"]))
        found = []
        for variant in ("reference", *variants):
            policy = model if variant == "reference" else self._policy(self.folder / variant / "policy")
            answer = sample_answers(
                policy,
                [list(ids)],
                1,
                max_new_tokens=training["max_new_tokens"],
                eos_id=end,
                pad_id=tokenizer.pad_token_id,
                seed=training["seed"],
            ).answers[0][0]
            text = tokenizer.decode(answer[:-1] if answer[-1] == end else answer, skip_special_tokens=True)
            found.append({"variant": variant, "answer": text})
        return pd.DataFrame(found)

    def _policy(self, folder: Path) -> Any:
        """Return a trained policy: its own folder, or the reference with the folder's adapter."""
        if not (folder / "adapter_config.json").is_file():
            with no_bars():
                return load_lm(folder, dtype=self._reference.model.dtype).model
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name of transformers
            return PeftModel.from_pretrained(copy.deepcopy(self._reference.model), str(folder)).eval()


class Comparison(NamedTuple):
    """Several runs side by side, as `compare_runs` returns them.

    Attributes:
        table: the tables of `Run.summary`, with the name of each run in the column run.
        figure: beta by task, a panel per form, the runs beside each other.
        differences: a row per setting in which the runs differ, a column per run.
    """

    table: pd.DataFrame
    figure: Figure
    differences: pd.DataFrame


def compare_runs(runs: Mapping[str, Run] | Sequence[Run]) -> Comparison:
    """Put the betas of several runs side by side, such as one with the entropy term and one without.

    Args:
        runs: at least two; by name, or named by their folders.

    Raises:
        ValueError: fewer than two runs, or one without a beta of the prompt.
    """
    named = dict(runs) if isinstance(runs, Mapping) else _named(runs)
    if len(named) < 2:
        raise ValueError(f"runs: got {len(named)}, expected at least two")
    empty = [name for name, run in named.items() if run.table.empty]
    if empty:
        raise ValueError(f"runs: {', '.join(empty)} has no beta of the prompt, expected runs with beta.csv")
    tables = {name: run.table for name, run in named.items()}
    summary = pd.concat([run.summary().assign(run=name) for name, run in named.items()], ignore_index=True)
    summary = summary[["run", *summary.columns.drop("run")]]
    settings = pd.DataFrame({name: pd.Series(_flat(run.config)) for name, run in named.items()})
    shown = settings.map(lambda value: json.dumps(value, ensure_ascii=False))
    differ = shown.nunique(axis=1, dropna=False) > 1
    lines = {name: run.metadata.get("beta0", {}) for name, run in named.items()}
    return Comparison(summary, figure_runs(tables, beta0=next(iter(lines.values()))), settings[differ])


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Return runs by the shortest ends of their folders that differ."""
    folders = [run.folder.resolve() for run in runs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"runs: got a folder twice in {[str(folder) for folder in folders]}, expected each once")
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return {"/".join(folder.parts[-parts:]): run for folder, run in zip(folders, runs, strict=True)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _some(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return shown if len(values) <= 8 else f"{shown}, … {values[-1]}"
