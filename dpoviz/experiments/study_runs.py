"""Run the jobs of the study: each trains one policy with one fold held out, and measures it as it trains."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, load_from_disk
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoviz.allocation import allocate, reward_per_nat_of_pairs
from dpoviz.analysis.tables import write_table
from dpoviz.beta import Beta, TaskBeta
from dpoviz.data.records import components, folds_by_group
from dpoviz.data.tokens import end_id
from dpoviz.experiments.memory_estimate import available, estimate_memory
from dpoviz.experiments.real import Loaded, load_whole, score_pairs
from dpoviz.experiments.study_config import ARMS, BASELINE, Job, StudyConfig, jobs
from dpoviz.lm.cache import open_entry, read_result, write_entry, write_result
from dpoviz.lm.models import add_lora
from dpoviz.lm.processes import hidden, in_its_precision, processes
from dpoviz.lm.workers import cores, one_thread, run_side_by_side
from dpoviz.rules import LookupBeta, Rule
from dpoviz.training.config import TrainConfig
from dpoviz.training.loop import train
from dpoviz.training.methods import build, features
from dpoviz.training.probes import log_ratios


class Ground(NamedTuple):
    """What all jobs share.

    Attributes:
        model: the reference.
        policy: a copy of it to train; the reference itself where adapters are trained.
        tokenizer: its tokenizer.
        pairs: all pairs, scored by the reference once.
    """

    model: PreTrainedModel
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: Dataset


_GROUND: dict[str, Ground] = {}
"""The ground of the latest study, kept by a worker from job to job."""


def ground(config: StudyConfig, out: Path, *, cache_dir: Path | str | None = None, progress: bool = False) -> Ground:
    """Return what all jobs share; the scored pairs lie in the folder of the study, so that every job reads the same."""
    key = repr((config, str(out)))
    if key not in _GROUND:
        _GROUND.clear()
        real = config.real()
        model, tokenizer, pairs = load_whole(real)
        scored = open_entry(out / "scored", lambda place: load_from_disk(str(place)))
        if scored is None:
            scored = score_pairs(real, model, tokenizer, pairs, cache_dir=cache_dir, progress=progress)
            write_entry(out / "scored", lambda place: scored.save_to_disk(str(place)))
        _GROUND[key] = Ground(model, model if config.lora_rank else copy.deepcopy(model), tokenizer, scored)
    return _GROUND[key]


def pairs_table(pairs: Dataset) -> pd.DataFrame:
    """Return a row per pair: task, unit (pairs of one unit belong together), prompt (a number), ref_entropy."""
    rows = pairs.select_columns(["task", "prompt", "ref_entropy"]).to_pandas()
    unit = [f"{task} {number}" for task, number in zip(rows["task"], components(pairs), strict=True)]
    return rows.assign(unit=unit, prompt=pd.factorize(rows["prompt"])[0])[["task", "unit", "prompt", "ref_entropy"]]


@one_thread()
@in_its_precision
def run_job(config: StudyConfig, job: Job, out: Path) -> dict[str, Any]:
    """Run a job and write its file; if the file exists, read it instead.

    Returns:
        The job; rows (of pairs.csv) that were held out; and by epochs, h (of those rows, nats) and, of beta(x), beta.
    """
    file = out / "runs" / f"{job.name}.json"
    if file.is_file():
        return read_result(file)
    began = time.monotonic()
    shared = ground(config, out)
    rows = folds_by_group(shared.pairs, config.folds, job.seed)[job.fold]
    kept = set(rows)
    held_out = shared.pairs.select(rows)
    pairs = shared.pairs.select([row for row in range(len(shared.pairs)) if row not in kept])
    settings = config.training(ARMS[job.arm], job.scale, pairs=len(pairs), seed=job.seed)
    beta = _beta(config, job, settings, shared, pairs, out)
    policy: Any = shared.policy
    if config.lora_rank:
        policy = add_lora(policy, rank=config.lora_rank, seed=job.seed)
    else:
        policy.load_state_dict(shared.model.state_dict())
    pad_id = shared.tokenizer.pad_token_id
    ratios = partial(log_ratios, policy, held_out, pad_id=pad_id, batch_size=config.eval_batch_size, progress=False)
    start = ratios()  # 0 but for rounding, which is that of the later measurements: it is taken off them
    at = {config.steps(epochs, len(pairs)): str(epochs) for epochs in config.epochs}
    found: dict[str, Any] = {**job._asdict(), "rows": rows, "h": {}, "beta": {}}

    def measure(updates: int) -> None:
        if updates in at:
            chosen, rejected = (ratios() - start).T
            found["h"][at[updates]] = (chosen - rejected).tolist()
            if ARMS[job.arm].network:
                assert isinstance(beta, Beta)
                found["beta"][at[updates]] = _betas(beta, held_out)

    reference = policy if config.lora_rank else shared.model
    common: dict[str, Any] = {"pad_id": pad_id, "eos_id": end_id(pairs), "reference": reference, "progress": False}
    train(policy, beta, pairs, settings, stage=2, after=measure, **common)
    if config.lora_rank:
        policy.unload()  # the model as it was
    found["seconds"] = time.monotonic() - began
    write_result(file, found)
    return found


@torch.no_grad()
def _betas(beta: Beta, pairs: Dataset) -> list[float]:
    device = next(beta.parameters()).device
    entropy = torch.tensor(pairs["ref_entropy"][:], device=device)
    return beta.eval()(features(pairs).to(device), task=pairs["task"][:], ref_entropy=entropy).tolist()


def _beta(
    config: StudyConfig, job: Job, settings: TrainConfig, shared: Ground, pairs: Dataset, out: Path
) -> Beta | Rule:
    arm = ARMS[job.arm]
    if not arm.slopes:
        vocabulary = shared.model.config.get_text_config().vocab_size
        return build("network" if arm.network else BASELINE, settings, pairs, vocabulary=vocabulary)
    betas = betas_by_slope(config, job, settings, shared, out)
    if arm.slopes != "shuffled":
        return TaskBeta.fixed(betas)
    names, x = pairs["task"][:], features(pairs)
    return LookupBeta.shuffled(
        x, torch.tensor([betas[name] for name in names]), names, within_task=False, seed=job.seed
    )


def betas_by_slope(config: StudyConfig, job: Job, settings: TrainConfig, shared: Ground, out: Path) -> dict[str, float]:
    """Return beta by task, in the standard form: s/a, where a is the task's reward per nat over that of all tasks.

    The slopes b are those of the middle constant after the first measured epochs, on the other folds of the same seed,
    each held out from the policy that is measured on it. (These policies were trained on this job's held-out pairs
    too, of which they pass on one number per task.) Noisy slopes are shrunk, a negative one counts as 0, and beta stays
    in its range.
    """
    others = [Job(BASELINE, config.scale, fold, job.seed) for fold in range(config.folds) if fold != job.fold]
    runs = [read_result(out / "runs" / f"{other.name}.json") for other in others]
    rows = pairs_table(shared.pairs).iloc[[row for run in runs for row in run["rows"]]]
    h = [value for run in runs for value in run["h"][str(config.epochs[0])]]
    table = reward_per_nat_of_pairs(h, task=rows["task"], prompt=rows["unit"])
    pooled = float(table.set_index("task")["slope"]["all"])
    if pooled <= 0:  # nothing was gained, so that no task is better than another
        return dict.fromkeys(sorted(set(rows["task"])), settings.beta0)
    found = allocate(table, price=pooled, shrink=True)
    a = found["a"] if ARMS[job.arm].slopes != "reversed" else 1 / found["a"].clip(lower=1e-9)
    betas = np.clip(settings.beta0 / a.clip(lower=1e-9), settings.beta_min, settings.beta_max)
    return dict(zip(found["task"], betas.tolist(), strict=True))


def study(
    config: StudyConfig,
    out: Path,
    *,
    cache_dir: Path | str,
    workers: int | None = None,
    most: int | None = None,
    progress: bool = True,
) -> int:
    """Run the unfinished jobs; a study that was interrupted goes on. Return the number of jobs that are left.

    Args:
        config: the study.
        out: the folder: pairs.csv (`pairs_table`), and a file under runs for each job.
        cache_dir: folder in which the reference's pass is cached.
        workers: number of processes; None: one per core, and on a GPU one.
        most: run at most so many jobs now.
        progress: show bars.

    Raises:
        ValueError: `workers` is not positive, a fold is smaller than a batch, or the policies do not fit the memory.
    """
    on_gpu = processes().device.type == "cuda"
    count = workers or (1 if on_gpu else cores())
    if workers is not None and workers < 1:
        raise ValueError(f"workers: got {workers}, expected at least 1")
    shared = ground(config, out, cache_dir=cache_dir, progress=progress)
    _require_fit(config, shared, count)
    write_table(pairs_table(shared.pairs), out / "pairs.csv")
    if on_gpu:  # the workers need the memory
        _GROUND.clear()
        del shared
        torch.cuda.empty_cache()
    rows = jobs(config)
    left = [job for job in rows if not (out / "runs" / f"{job.name}.json").is_file()]
    some = left[:most]
    with tqdm(total=len(rows), initial=len(rows) - len(left), desc="jobs", unit="job", disable=hidden(progress)) as bar:
        for late in (False, True):  # the slopes are read when all constants are there
            own = [job for job in some if bool(ARMS[job.arm].slopes) == late]
            work = partial(run_job, config, out=out)
            for _ in run_side_by_side(work, own, workers=count):
                bar.update()
    return len(left) - len(some)


def _require_fit(config: StudyConfig, shared: Ground, workers: int) -> None:
    parts: Sequence[list[int]] = folds_by_group(shared.pairs, config.folds, 0)
    least = len(shared.pairs) - max(map(len, parts))
    if least < config.batch_size:
        raise ValueError(f"batch_size: got {config.batch_size}, expected at most {least}, the pairs without a fold")
    loaded = Loaded(shared.model, shared.tokenizer, shared.pairs, shared.pairs)
    needed, room = estimate_memory(config.real(), loaded).total, available(shared.model.device)
    if workers * needed > room:
        raise ValueError(
            f"memory: got an estimated {workers} × {needed / 1e9:.3g} GB, expected at most {room / 1e9:.3g} GB; try "
            "fewer --workers, --gradient-checkpointing, a larger --gradient-accumulation or a smaller --max-length"
        )
