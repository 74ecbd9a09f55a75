"""Evaluate a finished policy: its true reward, its KL from the reference, and the calibration of its margins.

`dpoviz.training.probes` has the KL that is sampled during training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoviz.data.tasks import Problem
from dpoviz.data.tasks import reward as task_reward
from dpoviz.lm.packing import by_length
from dpoviz.lm.processes import hidden, map_over_processes, process_seed, processes
from dpoviz.lm.sampling import sample_answers
from dpoviz.lm.scoring import score_both

MEASURES = ("reward", "kl", "kl_k1", "kl_k3", "entropy", "length")
"""The columns of measures in the table of `evaluate_policy`."""


def evaluate_policy(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 64,
    reward: Callable[[Problem, str], float] = task_reward,
    progress: bool = False,
) -> pd.DataFrame:
    """Sample answers from the policy and measure them, prompt by prompt.

    The processes of `accelerate launch` share the prompts; each samples with its own seed, and all return the full
    table.

    Three estimates of KL(π‖π_ref), in nats per answer of at most `max_new_tokens` tokens, use the same answers y ~ π.
    All are unbiased (k3 up to the probability of π_ref on answers that π never gives):

        k1 = log π(y|x) − log π_ref(y|x)        k3 = π_ref(y|x)/π(y|x) − 1 + k1
        kl = Σ_t KL(π(·|x, y_<t) ‖ π_ref(·|x, y_<t))

    k1 and k3 are named as by J. Schulman ("Approximating KL divergence", 2020). `kl` is k1 with each token's term
    replaced by its mean given the tokens before it (a Rao-Blackwell estimate per token); it had the least variance in
    our measurements. k3 over whole answers has heavy tails where the policy is far from the reference.

    Args:
        policy: a causal language model; its training or evaluation mode is kept.
        reference: the model it started from, on the same device; the policy itself if it is a PEFT model.
        tokenizer: the tokenizer of both models.
        problems: prompts, with the data that the reward needs.
        samples: answers per prompt.
        max_new_tokens: limit of an answer, in tokens.
        seed: random seed of the samples.
        batch_size: prompts per batch.
        reward: maps a problem and an answer to the true reward.
        progress: show a bar.

    Returns:
        A row per problem: task, prompt, and the means over its samples of reward, kl, kl_k1, kl_k3 (nats per answer),
        entropy (the policy's next-token entropy, nats per token, mean over all tokens of the answers) and length
        (tokens).

    Raises:
        ValueError: there are no problems, or as `sample_answers` and `score_both`.
    """
    if len(problems) == 0:
        raise ValueError("problems: got none, expected at least one")
    prompts = tokenizer([problem.prompt for problem in problems])["input_ids"]
    state, pad_id = processes(), tokenizer.pad_token_id

    def measure(share: Sequence[int]) -> dict[int, dict[str, object]]:
        found: dict[int, dict[str, object]] = {}
        if not share:
            return found
        answers = sample_answers(
            policy,
            [prompts[row] for row in share],
            samples,
            max_new_tokens=max_new_tokens,
            eos_id=tokenizer.eos_token_id,
            pad_id=pad_id,
            seed=process_seed(seed),
            batch_size=batch_size,
        ).answers
        drawn = dict(zip(share, answers, strict=True))
        lengths = [len(prompts[row]) + sum(map(len, drawn[row])) for row in share]
        for places in by_length(lengths, batch_size):
            rows = [share[place] for place in places]
            own = [drawn[row] for row in rows]
            sums = score_both(policy, reference, [prompts[row] for row in rows], own, _token_statistics, pad_id=pad_id)
            for row, answers_of_row, own_sums in zip(rows, own, sums, strict=True):
                texts = tokenizer.batch_decode(answers_of_row, skip_special_tokens=True)
                rewards = [reward(problems[row], text) for text in texts]
                found[row] = _measurements(problems[row], rewards, own_sums)
            bar.update(len(rows))
        return found

    shown = progress and state.is_main_process
    with tqdm(total=len(problems), desc="evaluation", unit="prompt", disable=hidden(shown)) as bar:
        shares = [range(first, len(problems), state.num_processes) for first in range(state.num_processes)]
        found = {row: numbers for part in map_over_processes(shares, measure) for row, numbers in part.items()}
    return pd.DataFrame([found[row] for row in range(len(problems))])


def _measurements(problem: Problem, rewards: Sequence[float], sums: Tensor) -> dict[str, object]:
    """Return the measurements at one prompt, from (samples, 4) sums of `_token_statistics` over its answers."""
    k1, step_kl, entropy, length = sums.unbind(dim=-1)
    return {
        "task": problem.task,
        "prompt": problem.prompt,
        "reward": float(np.mean(rewards)),
        "kl": step_kl.mean().item(),
        "kl_k1": k1.mean().item(),
        "kl_k3": (torch.expm1(-k1) + k1).mean().item(),
        "entropy": (entropy.sum() / length.sum()).item(),
        "length": length.mean().item(),
    }


def _token_statistics(logits: Tensor, ref_logits: Tensor, targets: Tensor) -> Tensor:
    """Return (n, 4) for each token: log-ratio, exact next-token KL, entropy of the policy, and 1 (to count tokens)."""
    logps, ref_logps = logits.log_softmax(dim=-1), ref_logits.log_softmax(dim=-1)
    p = logps.exp()
    ratio = logps - ref_logps
    taken = ratio.gather(-1, targets[:, None]).squeeze(-1)
    return torch.stack(
        [taken, (p * ratio).sum(dim=-1), -(p * logps).sum(dim=-1), torch.ones_like(taken)], dim=-1
    )  # fmt: skip


def summarize_evaluation(table: pd.DataFrame) -> pd.DataFrame:
    """Return means with standard errors over prompts, by task and over all tasks with equal weights.

    The prompt is the unit of the standard errors, because samples of one prompt are not independent.

    Args:
        table: the result of `evaluate_policy`, with at least two prompts per task.

    Returns:
        A row per task, and one for "all": task, n (prompts), and for each of `MEASURES` the mean and <measure>_se.

    Raises:
        ValueError: a task with a single prompt, which has no standard error.
    """
    counts = table["task"].value_counts()
    if counts.min() < 2:
        raise ValueError(f"table: got {counts.to_dict()} prompts, expected at least 2 of each task")
    groups = table.groupby("task", sort=False)[list(MEASURES)]
    means, errors = groups.mean(), groups.sem()
    rows = means.join(errors.add_suffix("_se"))
    rows.insert(0, "n", counts)
    whole = pd.concat([means.mean(), (errors.pow(2).sum() ** 0.5 / len(errors)).add_suffix("_se")])
    rows.loc["all"] = pd.concat([pd.Series({"n": len(table)}), whole])
    return rows.astype({"n": int}).reset_index(names="task")


def reliability(predicted: ArrayLike, truth: ArrayLike, *, bins: int = 10) -> pd.DataFrame:
    """Compare predicted with true probabilities per bin (a reliability diagram).

    Args:
        predicted: (N,) predicted probabilities, such as σ(s·h).
        truth: (N,) true preference probabilities, or labels 0 and 1.
        bins: number of bins of equal width from 0 to 1.

    Returns:
        A row per non-empty bin: bin (its number), n, predicted and truth (means over the bin).

    Raises:
        ValueError: the arrays differ in length, are empty, or have values outside 0 to 1.
    """
    predicted, truth = _probabilities(predicted, truth)
    number = np.minimum((predicted * bins).astype(int), bins - 1)
    table = pd.DataFrame({"bin": number, "predicted": predicted, "truth": truth})
    means = table.groupby("bin").mean()
    means.insert(0, "n", table.groupby("bin").size())
    return means.reset_index()


def calibration(predicted: ArrayLike, truth: ArrayLike, *, bins: int = 10) -> dict[str, float]:
    """Return the Brier score, the mean of (predicted − truth)², and the expected calibration error over `bins`.

    Arguments and errors are those of `reliability`.
    """
    predicted, truth = _probabilities(predicted, truth)
    table = reliability(predicted, truth, bins=bins)
    error = (table["n"] * (table["predicted"] - table["truth"]).abs()).sum() / table["n"].sum()
    return {"brier": float(np.mean((predicted - truth) ** 2)), "ece": float(error)}


def _probabilities(predicted: ArrayLike, truth: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predicted, truth = np.asarray(predicted, dtype=float), np.asarray(truth, dtype=float)
    if predicted.shape != truth.shape or predicted.ndim != 1 or len(predicted) == 0:
        raise ValueError(f"predicted, truth: got shapes {predicted.shape}, {truth.shape}, expected (N,) twice, N ≥ 1")
    for name, values in (("predicted", predicted), ("truth", truth)):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name}: got {values.min()} to {values.max()}, expected 0 to 1")
    return predicted, truth
