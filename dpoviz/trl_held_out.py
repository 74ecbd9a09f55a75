"""What `BetaDPOTrainer` keeps of single held-out pairs, in the files and columns of a run of `dpoviz train`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from dpoviz.analysis.tables import beta_table, read_table, write_parquet, write_table
from dpoviz.beta import ConstantBeta
from dpoviz.data.columns import as_text
from dpoviz.data.records import RESERVED_TASKS, pairs_table
from dpoviz.data.tokens import IDS
from dpoviz.forms import scale
from dpoviz.lm.cache import read_json
from dpoviz.lm.reference import reference_columns
from dpoviz.regularizers import Regularization
from dpoviz.rules import PromptRule, Rule
from dpoviz.training.config import TrainConfig
from dpoviz.training.probes import HeldOut, prompt_betas, pulls_at
from dpoviz.training.stages import betas_at

logger = logging.getLogger(__name__)

FOLDER = "_run"
"""The folder beside a saved β. transformers uploads nothing that begins with "_", so the prompts stay here."""

ROW = "held_out_row"
"""The column with the number of a pair, by which the last, padded batch of several processes has no pair twice."""

NO_TASK = "any"
"""The task of pairs that name none."""

_SCORES = ("chosen", "rejected", "ref_chosen", "ref_rejected", "beta")
_FILES = ("beta.csv", "beta_steps.parquet", "held_out.csv", "pulls.csv", "pairs.parquet", "run.json", "report.html")

EVALUATED = "evaluated at step"
"""What run.json calls the step after which the scores of the pairs were measured."""


def cannot_keep(data: Any) -> str:
    """Return why nothing of the single pairs of an eval_dataset can be kept; "" if it can."""
    for part in data.values() if isinstance(data, dict) else [data]:
        if not isinstance(part, Dataset):
            return "it is a stream"
        if not {"prompt", *IDS} <= set(part.column_names):
            return "it has images"
        reserved = sorted(set(RESERVED_TASKS) & set(part["task"])) if "task" in part.column_names else []
        if reserved:
            return f"{reserved[0]!r} is the name of all tasks together in tables; rename the task"
    return ""


def number_rows(data: Dataset | dict[str, Dataset]) -> Dataset | dict[str, Dataset]:
    """Return the sets to evaluate on with the column `ROW`, counted through all of them."""
    parts = data if isinstance(data, dict) else {"": data}
    found, end = {}, 0
    for name, part in parts.items():
        first, end = end, end + len(part)
        bare = part.remove_columns(ROW) if ROW in part.column_names else part  # of another trainer
        found[name] = bare.add_column(ROW, np.arange(first, end))
    return found if isinstance(data, dict) else found[""]


def as_pairs(data: Dataset, eos_token: str | None) -> Dataset:
    """Return a set that TRL has prepared in the layout of scored pairs; what it lacks is filled in.

    Returns:
        task (`NO_TASK` if the set names none), group, prompt, chosen, rejected, messages (None where the prompt is a
        text), the token ids, ref_features (0 if unknown), ref_entropy and ref_entropy_se (NaN if unknown).
    """
    own, size = data.column_names, len(data)
    rows = data.select_columns([name for name in ("prompt", "chosen", "rejected", "tools") if name in own])[:]
    found: dict[str, Any] = {"task": data["task"][:] if "task" in own else [NO_TASK] * size, "group": [None] * size}
    if size and isinstance(rows["prompt"][0], list):
        tools = rows.get("tools", [None] * size)
        found |= {"prompt": list(map(as_text, rows["prompt"], tools)), "messages": rows["prompt"]}
        for name in ("chosen", "rejected"):
            found[name] = [turns[0]["content"] if len(turns) == 1 else as_text(turns) for turns in rows[name]]
    else:
        found |= {"prompt": rows["prompt"], "messages": [None] * size}
        found |= {name: [text.removesuffix(eos_token or "") for text in rows[name]] for name in ("chosen", "rejected")}
    found |= {name: data[name][:] for name in IDS}
    found["ref_features"] = data["ref_features"][:] if "ref_features" in own else [[0.0]] * size
    for name in ("ref_entropy", "ref_entropy_se"):
        values = np.asarray(data[name][:] if name in own else [], dtype=float)
        known = name in own and bool(np.isfinite(values).all() and (values >= 0).all())
        found[name] = values if known else np.full(size, np.nan)
    return Dataset.from_dict(found)


class HeldOutPairs:
    """β, s, h and the pulls of the terms at the prompts of eval_dataset, by step; the pairs' scores of the last one.

    Args:
        data: the set to evaluate on, or several by name, prepared by TRL, with the column `ROW`.
        rule: the rule. By prompt and step is kept only what is a function of the prompt.
        config: the configuration of beta.
        regularization: the weights of the penalties; None without any.
        seed: the seed of the training.
        plain: whether the loss is −log σ(s·h), so that h gives its pull on β.
        eos_token: what TRL has put after each answer.
        device: where beta is.
    """

    def __init__(
        self,
        data: Dataset | Mapping[str, Dataset],
        rule: Rule,
        config: TrainConfig,
        regularization: Regularization | None,
        *,
        seed: int,
        plain: bool,
        eos_token: str | None,
        device: torch.device,
    ) -> None:
        parts = [as_pairs(part, eos_token) for part in (data.values() if isinstance(data, Mapping) else [data])]
        self.pairs = concatenate_datasets(parts)
        entropy = np.asarray(self.pairs["ref_entropy"][:])
        self._filled = self.pairs.remove_columns("ref_entropy").add_column("ref_entropy", np.nan_to_num(entropy))
        self.rule, self.config, self.regularization = rule, config, regularization
        self.seed, self.plain = seed, plain
        self._held_out = HeldOut.of(self._filled, 0, device)
        self._scores = self._nothing()
        self._last: tuple[int, np.ndarray] | None = None
        self._steps, self._pulls = pd.DataFrame(), pd.DataFrame()

    def _nothing(self) -> np.ndarray:
        return np.full((len(self.pairs), len(_SCORES)), np.nan)

    def add(self, rows: Tensor, ratios: Tensor, ref: Tensor, beta: Tensor) -> None:
        """Take the scores of a batch.

        Args:
            rows: (B,) the numbers of its pairs; where one is repeated to fill up the batch, so are its scores.
            ratios: (B, 2) log π/π_ref of chosen and rejected, in nats.
            ref: (B, 2) log π_ref of them, in nats.
            beta: (B,) beta of each pair.
        """
        self._scores[rows.cpu().numpy()] = torch.cat([ratios, ref, beta[:, None]], dim=1).double().cpu().numpy()

    def end_evaluation(self, step: int) -> None:
        """Keep what was added since the last evaluation, as that of a step."""
        scores, self._scores = self._scores, self._nothing()
        bad = int((~np.isfinite(scores).all(axis=1)).sum())
        if bad:
            logger.warning("step %d: %d of %d held-out pairs have no finite log-ratios or β; none of this evaluation "
                           "is kept", step, bad, len(scores))  # fmt: skip
            return
        self._last = step, scores
        ratios = scores[:, :2]
        h = pd.Series(ratios[:, 0] - ratios[:, 1]).groupby(self.pairs["prompt"][:], sort=False).mean()
        pulls = pd.DataFrame()
        if self.plain and isinstance(self.rule, PromptRule):
            pulls = pulls_at(self.rule.beta, self._filled, ratios, self.config.form, self.regularization)
            self._pulls = pulls.assign(form=self.config.form)[["form", *pulls.columns]]
        self._add_step(step, {"h": h.to_numpy(), **pulls.drop(columns=["task", "prompt"], errors="ignore")})

    def _add_step(self, step: int, more: Mapping[str, Any]) -> None:
        """Keep beta at each prompt after a step, and forget what is of later steps, and so of another training."""
        beta = prompt_betas(self.rule, self._held_out)
        if beta is None:
            return
        form = self.config.form
        s = scale(torch.from_numpy(beta), form).numpy()
        rows = {"form": form, "step": step, "prompt": np.arange(len(beta)), "beta": beta, "s": s}
        before = [self._steps[self._steps["step"] < step]] if len(self._steps) else []
        self._steps = pd.concat([*before, pd.DataFrame(rows | dict(more))], ignore_index=True)

    def write(self, folder: Path, step: int, about: Mapping[str, Any]) -> None:
        """Write beta.csv, beta_steps.parquet, held_out.csv, pulls.csv, pairs.parquet and run.json, as far as known.

        Args:
            folder: the one in which beta is saved.
            step: the step after which beta became what it is now.
            about: what else run.json says.
        """
        out = folder / FOLDER
        out.mkdir(parents=True, exist_ok=True)
        for name in _FILES:  # an earlier training may have had others
            (out / name).unlink(missing_ok=True)
        chat = all(self.pairs["messages"][:])
        about = {**about, "step": step, EVALUATED: None if self._last is None else self._last[0]}
        about |= {"reference": {"chat": chat}}
        (out / "run.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
        write_parquet(out, pairs=pairs_table(self.pairs))
        if self._last is not None:
            write_table(self._pair_table(self._last[1]), out / "held_out.csv")
        if isinstance(self.rule, PromptRule):
            if not len(self._steps) or step not in set(self._steps["step"]):
                self._add_step(step, {})
            write_table(self._beta_table(self.rule), out / "beta.csv")
            write_parquet(out, beta_steps=self._steps)
            if len(self._pulls):
                write_table(self._pulls, out / "pulls.csv")

    def _beta_table(self, rule: PromptRule) -> pd.DataFrame:
        """Return beta at each prompt as it is now; the entropy is NaN where it is unknown."""
        columns = betas_at(rule.beta, self._filled)
        table = beta_table(form=self.config.form, seed=self.seed, **columns.fillna(0.0).to_dict("list"))
        entropy = self.pairs.select(self._held_out.first).select_columns(["ref_entropy", "ref_entropy_se"]).to_pandas()
        return table.assign(**entropy)

    def _pair_table(self, scores: np.ndarray) -> pd.DataFrame:
        """Return the scores of the last evaluation, a row per pair, with its β and s: a rule has them nowhere else."""
        own, form = dict(zip(_SCORES, scores.T, strict=True)), self.config.form
        pairs = self.pairs
        for name in ("chosen", "rejected"):
            pairs = pairs.add_column(f"ref_{name}_logps", own[f"ref_{name}"])
        fixed = isinstance(self.rule, PromptRule) and isinstance(self.rule.beta, ConstantBeta)
        return reference_columns(pairs).assign(
            variant="fixed" if fixed else form,
            form=form,
            chosen=own["chosen"],
            rejected=own["rejected"],
            h=own["chosen"] - own["rejected"],
            beta=own["beta"],
            s=scale(torch.from_numpy(own["beta"].copy()), form).numpy(),
        )

    def restore(self, folder: Path, *, steps: bool = True) -> None:
        """Read what `write` left in a folder, if it is of these pairs; the betas by step only if `steps`."""
        out = folder / FOLDER
        if not (out / "pairs.parquet").is_file():
            return
        if pd.read_parquet(out / "pairs.parquet")["prompt"].tolist() != self.pairs["prompt"][:]:
            logger.warning("%s is of another eval_dataset; what is kept of held-out pairs begins anew", out)
            return
        if steps and (out / "beta_steps.parquet").is_file():
            self._steps = pd.read_parquet(out / "beta_steps.parquet")
        evaluated = read_json(out / "run.json")[EVALUATED]
        self._last, self._pulls = None, pd.DataFrame()
        if evaluated is not None:
            self._last = evaluated, read_table(out / "held_out.csv")[list(_SCORES)].to_numpy()
            if (out / "pulls.csv").is_file():
                self._pulls = read_table(out / "pulls.csv")
