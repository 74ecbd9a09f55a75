"""Read the output folder of another trainer as a run: of `BetaDPOTrainer`, TRL's `DPOTrainer`, or LLaMA-Factory.

Only text and safetensors are read. The settings are in training_args.bin, a pickle, which could run code; it is left
alone, so that a plain trainer's β has to be given.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dpoviz.analysis.diagnose import Finding, diagnose, diagnose_log
from dpoviz.beta import Beta, EntropyBeta, TaskBeta
from dpoviz.experiments.folder import Report, write_page
from dpoviz.forms import Form
from dpoviz.learn.run import Prompt, Run
from dpoviz.lm.cache import read_json
from dpoviz.lm.models import LanguageModel
from dpoviz.lm.reference import reference_pass
from dpoviz.training.methods import load_beta
from dpoviz.translation import key, say
from dpoviz.trl_held_out import EVALUATED, FOLDER

STATE, LINES = "trainer_state.json", "trainer_log.jsonl"

_NAMES = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "eval_rewards/accuracies": "held_out_accuracy",
    # of LLaMA-Factory's lines
    "current_steps": "step",
    "lr": "learning_rate",
}
"""The run's names of what trainers log."""

_ANSWERS = ("chosen", "rejected")


def find_log(folder: Path) -> Path | None:
    """Return the log of a trainer in its output folder.

    Returns:
        trainer_state.json of the folder or of its newest checkpoint, whichever has seen more steps; else
        trainer_log.jsonl; None if there is neither.
    """
    found = [file for place in (folder, *_checkpoints(folder)[:1]) if (file := place / STATE).is_file()]
    if found:
        return max(found, key=lambda file: _of_trainer(file).get("global_step", 0))  # the folder's own if equal
    lines = folder / LINES
    return lines if lines.is_file() else None


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that have a log, the newest first."""
    numbered = [(place.name.removeprefix("checkpoint-"), place) for place in folder.glob("checkpoint-*")]
    kept = [(int(number), place) for number, place in numbered if number.isdigit() and (place / STATE).is_file()]
    return [place for _, place in sorted(kept, reverse=True)]


def _of_trainer(file: Path) -> dict[str, Any]:
    state = read_json(file, "take the folder of an older checkpoint")
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise ValueError(f"folder: {file} has no log_history, expected what a trainer of transformers writes")
    return state


class TrlRun(Run):
    """A run of another trainer: the history of its log, and the β that `BetaDPOTrainer` left.

    A log has means over batches and tasks. `BetaDPOTrainer` also keeps β, s, h and the pulls at the prompts of its
    eval_dataset; without that, `table`, `scores`, `pairs`, `betas` and `pulls` raise a ValueError that says what is
    missing, as `frozen` and sampled answers always do. β by task over the steps is in `history`.

    Attributes:
        folder: the trainer's output folder.
        config: the form and rule of the saved β, and `beta`, as far as known.
        metadata: the name of the reference, and log: the file that was read; and what `BetaDPOTrainer` kept of its
            settings, with step (after which β is that of `table`) and "evaluated at step" (of `scores` and `pulls`).
    """

    def __init__(
        self, folder: Path, log: Path, reference: Path | str | LanguageModel | None = None, beta: float | None = None
    ) -> None:
        if beta is not None and not 0 < beta < math.inf:
            raise ValueError(f"beta: got {beta!r}, expected a positive finite number")
        self.log, self._constant = log, beta
        super().__init__(folder, reference)
        _ = self.history  # a log that cannot be read is refused at once

    def _facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        about: dict[str, Any] = {}
        if self._saved is not None:
            about = read_json(self._saved / "config.json")
            if (self._saved / "made_for.json").is_file():
                record = read_json(self._saved / "made_for.json")
                about = {"rule": record["kind"]} | about | record
        config = {name: about[name] for name in ("form", "rule") if about.get(name)}
        if self._constant is not None:
            config["beta"] = self._constant
        metadata: dict[str, Any] = {"log": str(self.log.relative_to(self.folder)), "reference": {}}
        if about.get("reference") not in (None, "None"):  # the trainer did not know it
            metadata["reference"] = {"name": about["reference"], "fingerprint": about.get("fingerprint")}
        if self._keeps:
            kept = read_json(self.tables_folder / "run.json")
            config["training"] = kept["training"][config["form"]]
            metadata = kept | metadata | {"reference": kept["reference"] | metadata["reference"]}
        return config, metadata

    @property
    def tables_folder(self) -> Path:
        """The folder of the tables, beside the saved β."""
        return (self.folder if self._saved is None else self._saved.parent) / FOLDER

    @property
    def _keeps(self) -> bool:
        return (self.tables_folder / "run.json").is_file()

    @cached_property
    def _saved(self) -> Path | None:
        """The folder of the β: at the end of training, else of the newest checkpoint."""
        places = [place / "beta" for place in (self.folder, self.log.parent, *_checkpoints(self.folder))]
        return next((place for place in places if (place / "config.json").is_file()), None)

    def __repr__(self) -> str:
        what = self.config.get("rule", "no saved β")
        return f"TrlRun({str(self.folder)!r}: {what}; {len(self.history)} logged rows of {self.metadata['log']})"

    @property
    def forms(self) -> list[Form]:
        """The form of the β of the prompt that was saved; none without one."""
        return [self.config["form"]] if isinstance(self._any_beta, Beta) and "form" in self.config else []

    @cached_property
    def history(self) -> pd.DataFrame:
        """A row per logged step, under the names of a run's history (`TrainResult.history`) where it has them.

        step is the trainer's: the updates made when the row was logged; the row has the means over the batches since
        the row before. loss, accuracy (rewards/accuracies: ties count as wrong), margin (rewards/margins: mean s·h),
        held_out_accuracy (eval_rewards/accuracies). From `BetaDPOTrainer`: beta/<task>, s/<task>,
        logratio/<answer>/<task> in nats, held_out_logratio/<answer>/<task>, loss/<term>, pull/<term>/<task>. From other
        trainers, if `beta` was given: beta/all, s/all and logratio/<answer>/all = rewards/<answer> / β. All other
        columns have the trainer's own names. variant is the form of a trained β, and "fixed" for a constant one.
        """
        table = pd.DataFrame(list(self._rows()))
        form = self.config.get("form", "standard")
        variant = "fixed" if self.config.get("rule", "ConstantBeta") == "ConstantBeta" else form
        table = self._with_log_ratios(table)
        return pd.concat(
            [pd.DataFrame({"variant": variant, "form": form, "stage": 2}, index=table.index), table], axis=1
        )

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Yield the logged measurements, those of a step in one row; without the summary at the end of training."""
        by_step: dict[int, dict[str, Any]] = {}
        for logged in self._logged():
            row = {_renamed(name): value for name, value in logged.items()}
            if "train_runtime" in row:
                continue
            if not isinstance(row.get("step"), int):
                raise ValueError(f"folder: {self.log} has a row without a step ({_short(logged)})")
            for name in ("loss", "accuracy", "margin", "held_out_accuracy"):
                if not isinstance(row.get(name, 0.0), int | float):
                    raise ValueError(f"folder: {self.log}, step {row['step']}: {name} is {row[name]!r}, not a number")
            by_step.setdefault(row["step"], {}).update(row)
        if not any("loss" in row for row in by_step.values()):
            raise ValueError(f"folder: {self.log} has no logged row of training; set logging_steps below max_steps")
        yield from (by_step[step] for step in sorted(by_step))

    def _logged(self) -> list[dict[str, Any]]:
        if self.log.name == STATE:
            return _of_trainer(self.log)["log_history"]
        rows = []
        for number, line in enumerate(self.log.read_text(encoding="utf-8").splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"folder: {self.log}, line {number}: not JSON ({error}); delete the line") from None
        return [row for row in rows if "loss" in row or "eval_loss" in row]  # others only show progress

    def _with_log_ratios(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the rows with the log-ratios that belong to the rewards of a constant β."""
        beta = self._constant
        if beta is None:
            return table
        if any(name.startswith("logratio/") for name in table):
            raise ValueError(f"beta: got {beta!r}, expected None: {self.log} has log-ratios and β")
        if not {f"rewards/{answer}" for answer in _ANSWERS} <= set(table):
            raise ValueError(f"beta: got {beta!r}, expected None: {self.log} has no rewards to turn into log-ratios")
        if not _has_reference(table):
            raise ValueError(
                f"beta: got {beta!r}, expected None: the rewards of {self.log} are a multiple of logps, β·log π, as in "
                "SimPO and ORPO; without a reference there are no log-ratios"
            )
        more: dict[str, Any] = {"beta/all": beta, "s/all": beta}
        for answer in _ANSWERS:
            more[f"logratio/{answer}/all"] = table[f"rewards/{answer}"] / beta
            if f"eval_rewards/{answer}" in table:
                more[f"held_out_logratio/{answer}/all"] = table[f"eval_rewards/{answer}"] / beta
        return table.assign(**more)

    def diagnose(self) -> list[Finding]:
        """Return what looks wrong: in the single pairs, as `Run.diagnose`, if they were kept; else in the log.

        In a log (`diagnose_log`) only log-ratios and accuracy are looked at; the rest is "not checked".
        """
        if self._has("held_out"):
            kinds = {"ConstantBeta": "constant", "EntropyBeta": "entropy"}
            return diagnose(
                table=self.table,
                history=self.history,
                scores=self.scores,
                config=self.config | {"rule": kinds.get(self.config["rule"])},
                metadata=self.metadata,
                remedy=key("Train with `dpoviz train`, which keeps what this check needs."),
            )
        pairs = 1
        if self.log.name == STATE:
            state = _of_trainer(self.log)
            pairs = max(1, int((state.get("train_batch_size") or 1) * (state.get("logging_steps") or 1)))
        return diagnose_log(self.history, row_pairs=pairs, has_reference=_has_reference(self.history))

    def _has(self, name: str) -> bool:
        return any((self.tables_folder / f"{name}.{kind}").is_file() for kind in ("csv", "parquet"))

    def missing(self) -> list[str]:
        """Return sentences on what a run of `dpoviz train` has and this one has not, or has of other steps."""
        if not self._keeps:
            return [
                say(
                    "This is the log of a trainer, without single prompts or pairs: BetaDPOTrainer keeps those of its "
                    "eval_dataset."
                )
            ]
        found = []
        step, evaluated = self.metadata["step"], self.metadata[EVALUATED]
        if not self._has("beta"):
            found.append(say("β is not a function of the prompt alone, so there is no table of it."))
        elif self.table["ref_entropy"].isna().any():
            found.append(say("The eval_dataset has no entropies of the reference (ref_entropy, by reference_pass)."))
        if evaluated is None:
            found.append(say("The eval_dataset was not evaluated, so there are no log-ratios of its pairs."))
        else:
            if evaluated != step:
                found.append(
                    say(
                        "Log-ratios and pulls are those of the last evaluation, at step {evaluated}; β is that of step "
                        "{step}.",
                        evaluated=evaluated,
                        step=step,
                    )
                )
            if self._has("beta") and not self._has("pulls"):
                found.append(say("The pulls on β are kept only for the plain loss −log σ(s·h)."))
        found.append(
            say(
                "No policy was trained with one constant β beside this one; no answers were sampled, and h of the "
                "training pairs was not kept."
            )
        )
        return found

    def report(self) -> Report:
        """Draw the pictures, and write report.html into `tables_folder`, as far as the data goes."""
        seed = self.config.get("training", {}).get("seed", 0)
        tables = {"history": self.history.assign(seed=seed)}
        for name, table in (("beta", lambda: self.table), ("held_out", lambda: self.scores)):
            if self._has(name):
                tables[name] = table()
        self.tables_folder.mkdir(exist_ok=True)
        return write_page(
            self.tables_folder,
            tables,
            metadata={"beta0": {}, "beta_min": {}, "beta_max": {}, "alpha": {}} | self.metadata,
            config=self.config,
            betas=self.betas() if self._has("beta_steps") else None,
            findings=self.diagnose(),
            notes=self.missing(),
        )

    def beta(
        self, prompt: Prompt, *, form: str | None = None, task: str | None = None, ref_entropy: float | None = None
    ) -> float:
        """Return β at a prompt at the end of training.

        The first call loads β, and the reference where β reads its features: the model that β names, or that of
        load_run(folder, reference=...).

        Args:
            prompt: a text, which stays one, or a chat.
            form: that of the run, as a check; None takes it.
            task: the task of the prompt, for a β by task; None: that of a held-out prompt that was kept.
            ref_entropy: the reference's entropy at the prompt in nats per token, for an `EntropyBeta`; None: that of
                `entropy`, if held-out pairs were kept.

        Raises:
            ValueError: no β was saved; it is a rule, whose β reads more than the prompt; another form; no reference;
                or an input that β reads is missing.
        """
        beta = self._any_beta
        if beta is None:
            raise ValueError(
                f"beta: {self.folder} and its checkpoints have no folder beta, expected what BetaDPOTrainer saves"
            )
        if not isinstance(beta, Beta):
            raise ValueError(
                f"beta: {type(beta).__name__} is no function of the prompt; `history` has its β by task, and "
                f"load_beta({str(self.folder)!r}) its state"
            )
        if form is not None:
            beta.require_made_for(form=form)
        if self._keeps and isinstance(beta, TaskBeta):
            task = self._task(prompt, task)
        if self._keeps and isinstance(beta, EntropyBeta) and ref_entropy is None:
            ref_entropy = self.entropy(prompt)[0]
        if isinstance(beta, EntropyBeta) and ref_entropy is None:
            raise ValueError("ref_entropy: got None, expected the reference's entropy at the prompt (nats per token)")
        if isinstance(beta, TaskBeta) and task not in beta.tasks:
            raise ValueError(f"task: got {task!r}, expected one of {', '.join(beta.tasks)}: β is by task")
        with torch.no_grad():
            x = self._feature(prompt) if "x" in beta.reads else torch.zeros(1, 1)
            entropy = None if ref_entropy is None else torch.tensor([ref_entropy])
            return float(beta.to(x.device)(x, task=None if task is None else [task], ref_entropy=entropy))

    @cached_property
    def _any_beta(self) -> Any:
        return None if self._saved is None else load_beta(self._saved)

    def entropy(self, prompt: Prompt) -> tuple[float, float]:
        """Return the reference's entropy at a prompt in nats per token (`per_token`), and its standard error.

        That of a held-out prompt is read from the table, if it is there; else answers are sampled as `reference_pass`
        does by default, with the trainer's max_new_tokens and seed.

        Raises:
            ValueError: the folder keeps no settings for it; or as `beta`.
        """
        if not self._keeps:
            raise ValueError("entropy: a trainer's folder has no settings for sampling it; use reference_pass")
        return super().entropy(prompt)

    def _sampling(self) -> tuple[int, int, int]:
        samples = inspect.signature(reference_pass).parameters["entropy_samples"].default
        return samples, self.config["training"]["max_new_tokens"], self.config["training"]["seed"]

    def answers(self, prompt: Prompt, *, sample: bool = False) -> pd.DataFrame:
        """Return no rows; raise if they are to be sampled: the trainer keeps no answers."""
        if sample or not self._keeps:
            raise ValueError(f"answers: {self._why_missing('answers')}; sample them from the saved policy")
        return pd.DataFrame(columns=["variant", "answer"])

    def _read(self, name: str, *default: Any) -> Any:
        if name == "entropy":
            return None
        return super()._read(name, *(default if self._keeps else ()))

    def _why_missing(self, name: str) -> str:
        if self._keeps and name != "answers":
            return "a trainer's folder has it only as far as `missing` says: " + " ".join(self.missing())
        return (
            f"{self.folder} is a trainer's output folder, whose log has means over batches and no {name} of single "
            "prompts or pairs; `history` has what it logged, BetaDPOTrainer keeps those of its eval_dataset, and "
            "`dpoviz train` the rest"
        )


def _renamed(name: str) -> str:
    return _NAMES.get(name, name.replace("eval_logratio/", "held_out_logratio/"))


def _has_reference(table: pd.DataFrame) -> bool:
    """Return whether rewards are of log-ratios: not one and the same multiple of log π in all rows and answers."""
    names = [f"{kind}/{answer}" for kind in ("rewards", "logps") for answer in _ANSWERS]
    if not set(names) <= set(table):
        return True  # as TRL's DPO; there is nothing to tell it by
    rewards, logps = np.split(table[names].dropna().to_numpy(dtype=float), 2, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = rewards / logps
    return ratios.size == 0 or not (ratios.min() > 0 and np.ptp(ratios) < 1e-3 * ratios.max())


def _short(row: Mapping[str, Any]) -> str:
    return ", ".join(list(row)[:4])
