"""Two stages: the policy with a fixed beta once, then from there one run for each beta that is asked about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from dpoviz.analysis.tables import beta_table
from dpoviz.beta import Beta, ConstantBeta
from dpoviz.data.tokens import IDS, token_counts
from dpoviz.lm.packing import by_length
from dpoviz.lm.processes import in_shares, processes
from dpoviz.lm.scoring import evaluating, score_answers
from dpoviz.losses import Form, scale
from dpoviz.rules import Rule
from dpoviz.training.config import TrainConfig
from dpoviz.training.loop import train
from dpoviz.training.methods import METHODS


@dataclass(frozen=True)
class Arm:
    """One run of stage 2.

    Attributes:
        config: its settings.
        make: the beta that it starts with; called as ``make(pairs, vocabulary=V)`` with the training pairs.
    """

    config: TrainConfig
    make: Callable[..., Beta | Rule]


@dataclass(frozen=True)
class Trained:
    """The result of one arm. The policy itself holds the arm's weights until the next arm is asked for.

    Attributes:
        name: the arm's.
        beta: the trained beta or rule.
        history: rows of stage 1, in this arm's form and beta, and of stage 2.
    """

    name: str
    beta: Beta | Rule
    history: pd.DataFrame


def arm(method: str, config: TrainConfig, strength: float | None = None) -> Arm:
    """The run of a rule of `METHODS`, with its settings and its strength."""
    return Arm(config, partial(METHODS[method].start, config, strength=strength))


def run_arms(
    policy: PreTrainedModel,
    pairs: Dataset,
    arms: Mapping[str, Arm],
    *,
    held_out: Dataset,
    reference: PreTrainedModel,
    pad_id: int,
    eos_id: int,
    out: Path | str | None = None,
    progress: bool = True,
) -> Iterator[Trained]:
    """Stage 1 once, then stage 2 for each arm, all from the same weights.

    Stage 1 runs once because with a fixed beta the two forms are the same loss where they start at the same
    scale.

    Args:
        policy: trained in place; equal to the reference at the start. While an arm's result is looked at, it
            holds that arm's weights; its weights that do not learn are never copied.
        pairs: what `reference_pass` returned.
        arms: by name.
        held_out: pairs of other prompts, likewise.
        reference: for the KL; the policy itself if it is a PEFT model.
        pad_id: token that pads.
        eos_id: token that ends an answer.
        out: a folder for the checkpoints; a run that was killed goes on from there.
        progress: show bars.

    Raises:
        ValueError: the arms do not start at the same scale, or with as many steps of stage 1.
    """
    starts = {(round(scale(own.config.beta0, own.config.form), 12), own.config.stage1_steps) for own in arms.values()}
    if len(starts) != 1:
        raise ValueError(f"arms: start at scales and steps {sorted(starts)}, expected one start for all")
    common = {"pad_id": pad_id, "eos_id": eos_id, "held_out": held_out, "reference": reference, "progress": progress}
    place = (lambda name: None) if out is None else (lambda name: Path(out) / name)
    vocabulary = policy.config.get_text_config().vocab_size
    betas = {name: own.make(pairs, vocabulary=vocabulary) for name, own in arms.items()}  # what is wrong fails here
    first = next(iter(arms.values())).config
    stage1 = train(policy, ConstantBeta(first.beta0), pairs, first, stage=1, out=place("stage1"), **common)
    learned = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in learned.items()}
    for name, own in arms.items():
        with torch.no_grad():
            for key, parameter in learned.items():
                parameter.copy_(start[key])
        stage2 = train(policy, betas[name], pairs, own.config, stage=2, out=place(name), **common)
        then = {column: own.config.beta0 for column in stage1 if column.startswith("beta/")}
        history = pd.concat([stage1.assign(form=own.config.form, **then), stage2], ignore_index=True)
        yield Trained(name, betas[name], history)


@torch.no_grad()
def held_out_table(beta: Beta, held_out: Dataset, *, form: Form, seed: int) -> pd.DataFrame:
    """Beta at each held-out prompt, once a prompt, beside the reference's entropy there."""
    rows = held_out.to_pandas().drop_duplicates("prompt")
    device = next(beta.parameters(), torch.empty(0)).device
    entropy = torch.tensor(rows["ref_entropy"].to_numpy(), device=device)
    x = torch.tensor(np.stack(rows["ref_features"]), device=device)
    return beta_table(
        form=form,
        seed=seed,
        task=rows["task"],
        prompt=rows["prompt"],
        beta=beta.eval()(x, task=rows["task"].tolist(), ref_entropy=entropy),
        ref_entropy=entropy,
        ref_entropy_se=rows["ref_entropy_se"],
    )


@torch.no_grad()
def log_ratio_differences(
    policy: PreTrainedModel, pairs: Dataset, *, pad_id: int, batch_size: int, progress: bool = True
) -> np.ndarray:
    """(N,) h of each pair under the policy, in nats, in the order of the pairs; processes share the work."""
    read = pairs.select_columns([*IDS, "ref_chosen_logps", "ref_rejected_logps"])
    size = token_counts(pairs).sum(axis=1)

    def score(some: list[int]) -> np.ndarray:
        prompts, chosen, rejected, *ref = read[some].values()
        own = list(zip(chosen, rejected, strict=True))
        logps = score_answers(policy, prompts, own, pad_id=pad_id).logps.double().cpu().numpy()
        ref = np.array(ref).T
        bar.update(len(some))
        return (logps - ref) @ [1, -1]

    batches, shown = by_length(size.tolist(), batch_size), progress and processes().is_main_process
    h = np.empty(len(size))
    with evaluating(policy), tqdm(total=len(size), desc="held-out pairs", unit="pair", disable=not shown) as bar:
        for some, own in zip(batches, in_shares(batches, score), strict=True):
            h[some] = own
    return h
