"""Measurements of a policy during training: log-ratios, accuracy, beta by task, sampled KL.

`dpoviz.lm.retilt` measures a finished policy, with more samples; `dpoviz.tabular.kl` is exact.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from dpoviz.beta import Beta
from dpoviz.data.tokens import IDS, token_counts
from dpoviz.forms import Form
from dpoviz.lm.packing import by_length
from dpoviz.lm.processes import hidden, map_over_processes, processes
from dpoviz.lm.sampling import sample_answers
from dpoviz.lm.scoring import score_answers
from dpoviz.lm.trial import evaluating
from dpoviz.losses import Logps, gradients_on_beta, total_loss
from dpoviz.regularizers import Regularization
from dpoviz.rules import PromptRule, Rule

Numbers = TypeVar("Numbers", Tensor, np.ndarray)


class Models(NamedTuple):
    """The policy that is trained, and its reference.

    Attributes:
        policy: a causal language model, or one with PEFT's adapters.
        reference: the model it started from; the policy itself if the reference is the policy with its adapters off;
            None where no reference is needed.
        pad_id: id of the padding token.
        eos_id: id of the token that ends an answer.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    pad_id: int
    eos_id: int

    def adapter_off(self) -> AbstractContextManager:
        """Return a context in which the adapter is off, if the policy is its own reference.

        Raises:
            ValueError: the policy is its own reference and has no adapter.
        """
        if self.reference is not self.policy:
            return nullcontext()
        if not hasattr(self.policy, "disable_adapter"):
            raise ValueError(
                f"reference: got the policy itself, a {type(self.policy).__name__} without an adapter to turn off; "
                "expected a copy of it from before training, or a PEFT model"
            )
        policy: Any = self.policy  # a PeftModel
        return policy.disable_adapter()


class HeldOut(NamedTuple):
    """Pairs to measure on during training.

    Attributes:
        pairs: N scored pairs.
        task: the task of each pair.
        x: (N, D) features of the prompts.
        ref_entropy: (N,) in nats per token.
        first: (P,) number of the first pair of each distinct prompt, in order.
        prompts: the prompts at which KL is sampled, as token ids.
        prompt_tasks: the task of each of them.
    """

    pairs: Dataset
    task: list[str]
    x: Tensor
    ref_entropy: Tensor
    first: list[int]
    prompts: list[list[int]]
    prompt_tasks: list[str]

    @classmethod
    def of(cls, pairs: Dataset, prompts_per_task: int, device: torch.device) -> HeldOut:
        """Return scored pairs to measure on; KL is sampled at the first `prompts_per_task` prompts of each task."""
        task = pairs["task"][:]
        prompts, prompt_tasks = first_prompts(pairs["prompt_ids"], task, prompts_per_task)
        x, ref_entropy = (
            torch.tensor(pairs[name][:], dtype=torch.float32, device=device) for name in ("ref_features", "ref_entropy")
        )
        first = first_of_each(pairs["prompt"] if "prompt" in pairs.column_names else map(tuple, pairs["prompt_ids"]))
        return cls(pairs, task, x, ref_entropy, first, prompts, prompt_tasks)


def first_prompts(
    prompts: Iterable[Sequence[int]], task: Sequence[str], prompts_per_task: int
) -> tuple[list[list[int]], list[str]]:
    """Return the first different prompts of each task, as token ids, and the task of each."""
    table = pd.DataFrame({"task": task, "prompt": map(tuple, prompts)})
    few = table.drop_duplicates("prompt").groupby("task").head(prompts_per_task)
    return [list(prompt) for prompt in few["prompt"]], few["task"].tolist()


def first_of_each(prompts: Iterable[Hashable]) -> list[int]:
    """Return the positions at which a prompt appears for the first time."""
    seen: dict[Hashable, int] = {}
    for i, prompt in enumerate(prompts):
        seen.setdefault(prompt, i)
    return list(seen.values())


def means_by_task(name: str, values: Sequence[float] | np.ndarray, task: Sequence[str]) -> dict[str, float]:
    """Return the mean of the values of each task, named <name>/<task>."""
    means = pd.Series(values).groupby(list(task)).mean()
    return {f"{name}/{t}": mean for t, mean in means.items()}


def quartiles_by_task(name: str, ratios: Tensor | np.ndarray, task: Sequence[str]) -> dict[str, float]:
    """Return mean and quartiles by task of the two columns of log π/π_ref, chosen and rejected.

    Args:
        name: the beginning of all names.
        ratios: (B, 2) in nats.
        task: (B,) the task of each pair.

    Returns:
        <name>/chosen/<task> and <name>/rejected/<task>, the means, and each with the suffixes /q25 and /q75.
    """
    row: dict[str, float] = {}
    for answer, values in zip(("chosen", "rejected"), np.asarray(ratios.tolist()).T, strict=True):
        grouped = pd.Series(values).groupby(list(task))
        columns = {"": grouped.mean(), "/q25": grouped.quantile(0.25), "/q75": grouped.quantile(0.75)}
        row |= {f"{name}/{answer}/{t}{suffix}": v for suffix, by_task in columns.items() for t, v in by_task.items()}
    return row


def correctly_ranked(h: Numbers) -> Numbers:
    """Return 1 where h > 0, 0 where h < 0, and ½ at a tie; |h| ≤ 1e-4, the rounding of float32, is a tie."""
    return ((h > 1e-4) * 1.0 + (h >= -1e-4) * 1.0) / 2


@torch.no_grad()
def mean_betas(rule: Rule, held_out: HeldOut) -> dict[str, float]:
    """Return the mean beta by task in evaluation mode; empty if beta is not a function of the prompt."""
    if not isinstance(rule, PromptRule):
        return {}
    rule.eval()
    values = rule.beta(held_out.x, task=held_out.task, ref_entropy=held_out.ref_entropy)
    return means_by_task("beta", values.tolist(), held_out.task)


@torch.no_grad()
def prompt_betas(rule: Rule, held_out: HeldOut) -> np.ndarray | None:
    """Return (P,) beta at each distinct prompt in evaluation mode; None if beta is not a function of the prompt."""
    if not isinstance(rule, PromptRule):
        return None
    rule.eval()
    task = [held_out.task[i] for i in held_out.first]
    betas = rule.beta(held_out.x[held_out.first], task=task, ref_entropy=held_out.ref_entropy[held_out.first])
    return betas.cpu().numpy()


def betas_by_step(betas: Mapping[int, np.ndarray]) -> pd.DataFrame:
    """Return betas by step as a table: step, prompt (its number), beta."""
    steps = [np.full(len(values), step) for step, values in betas.items()]
    if not steps:
        return pd.DataFrame({"step": np.empty(0, int), "prompt": np.empty(0, int), "beta": np.empty(0, np.float32)})
    prompts = [np.arange(len(values)) for values in betas.values()]
    columns = {"step": steps, "prompt": prompts, "beta": list(betas.values())}
    return pd.DataFrame({name: np.concatenate(parts) for name, parts in columns.items()})


def pulls_at(
    beta: Beta, held_out: Dataset, ratios: np.ndarray, form: Form, regularization: Regularization | None
) -> pd.DataFrame:
    """Return the pull of each term of the objective on beta at each held-out prompt (`gradients_on_beta`).

    Args:
        beta: a function of the prompt, evaluated in evaluation mode.
        held_out: N scored pairs.
        ratios: (N, 2) the policy's log π/π_ref of chosen and rejected, in nats.
        form: "inverse" or "standard".
        regularization: the weights of the penalties; None for the DPO loss alone.

    Returns:
        A row per distinct prompt, in order of first appearance: task, prompt, dpo, range, smoothness and entropy, and
        consistency if it is switched on. A term that is switched off pulls with 0. The pairs of a prompt are averaged.
    """
    data = HeldOut.of(held_out, 0, next(beta.parameters(), torch.empty(0)).device)
    with torch.no_grad():
        values = beta.eval()(data.x, task=data.task, ref_entropy=data.ref_entropy)
    values.requires_grad_()  # a leaf: a beta without weights has pulls too
    chosen, rejected = torch.as_tensor(ratios, dtype=values.dtype, device=values.device).unbind(dim=1)
    objective = total_loss(
        Logps(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(rejected)),
        values,
        form=form,
        regularization=regularization,
        ref_entropy=data.ref_entropy,
        beta_fn=beta,
        x=data.x,
        task=data.task,
    )
    pulls = {term: pull.tolist() for term, pull in gradients_on_beta(objective, values).items()}
    rows = pd.DataFrame(dict.fromkeys(("dpo", "range", "smoothness", "entropy"), 0.0) | pulls)
    means = rows.groupby(held_out["prompt"][:], sort=False).mean().reset_index(names="prompt")
    means.insert(0, "task", [data.task[i] for i in data.first])
    return means


@torch.no_grad()
def log_ratios(
    policy: PreTrainedModel, pairs: Dataset, *, pad_id: int, batch_size: int, progress: bool = True
) -> np.ndarray:
    """Return log π/π_ref of the chosen and the rejected answer of each pair; processes share the work.

    Returns:
        (N, 2) in nats, float64, in the order of the pairs; chosen minus rejected is h.
    """
    read = pairs.select_columns([*IDS, "ref_chosen_logps", "ref_rejected_logps"])
    sizes = token_counts(pairs).sum(axis=1)
    batches = by_length(sizes.tolist(), batch_size)
    ratios = np.empty((len(sizes), 2))

    def score(rows: list[int]) -> np.ndarray:
        prompts, chosen, rejected, *ref = read[rows].values()
        answers = list(zip(chosen, rejected, strict=True))
        logps = score_answers(policy, prompts, answers, pad_id=pad_id).logps.double().cpu().numpy()
        bar.update(len(rows))
        return logps - np.array(ref).T

    with (
        evaluating(policy),
        tqdm(total=len(sizes), desc="held-out pairs", unit="pair", disable=hidden(progress)) as bar,
    ):
        for rows, part in zip(batches, map_over_processes(batches, score), strict=True):
            ratios[rows] = part
    return ratios


def accuracy(ratios: np.ndarray, task: Sequence[str]) -> dict[str, float]:
    """Return the fraction of pairs with h > 0, overall and by task, from the result of `log_ratios`."""
    ranked = correctly_ranked(ratios[:, 0] - ratios[:, 1])
    return {"held_out_accuracy": ranked.mean(), **means_by_task("held_out_accuracy", ranked, task)}


def held_out_measurements(ratios: np.ndarray, task: Sequence[str]) -> dict[str, float]:
    """Return `accuracy` and the quartiles of the log-ratios by task, from the result of `log_ratios`."""
    return accuracy(ratios, task) | quartiles_by_task("held_out_logratio", ratios, task)


@torch.no_grad()
def sampled_kl(
    models: Models, prompts: Sequence[list[int]], tasks: Sequence[str], *, max_new_tokens: int, seed: int
) -> Mapping[str, float]:
    """Estimate KL(policy ‖ reference) from one sampled answer per prompt; the main process samples.

        KL = E_{y ~ π}[log π(y|x) − log π_ref(y|x)]

    Returns:
        kl, kl_se (its standard error over prompts) and kl/<task>, in nats.
    """
    measured = [_sampled_kl(models, prompts, tasks, max_new_tokens, seed) if processes().is_main_process else None]
    return broadcast_object_list(measured)[0]


def _sampled_kl(
    models: Models, prompts: Sequence[list[int]], tasks: Sequence[str], max_new_tokens: int, seed: int
) -> dict[str, float]:
    eos_id, pad_id = models.eos_id, models.pad_id
    answers = sample_answers(
        models.policy, prompts, 1, max_new_tokens=max_new_tokens, eos_id=eos_id, pad_id=pad_id, seed=seed
    ).answers

    def logps(model: PreTrainedModel) -> Tensor:
        return score_answers(model, prompts, answers, pad_id=pad_id).logps[:, 0]

    assert models.reference is not None
    with evaluating(models.policy):
        of_policy = logps(models.policy)
        with models.adapter_off():
            of_reference = logps(models.reference)
    difference = (of_policy - of_reference).double()
    row = {"kl": difference.mean().item(), "kl_se": (difference.std() / len(difference) ** 0.5).item()}
    return row | means_by_task("kl", difference.tolist(), tasks)
