"""Run the reference once over a data set and keep the results as columns."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets, load_from_disk
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoviz.data.tokens import IDS, digest, end_id, highest_ids, token_counts, tokenize_pairs
from dpoviz.lm.cache import Journal, fingerprint, open_entry, require_writable, write_entry
from dpoviz.lm.entropy import EntropyEstimates, estimate_entropy
from dpoviz.lm.packing import by_length
from dpoviz.lm.processes import hidden, map_over_processes, processes
from dpoviz.lm.sampling import prompts_at_once
from dpoviz.lm.scoring import context_length, require_tokens_of, score_answers
from dpoviz.lm.trial import evaluating


def default_cache_dir() -> Path:
    """Return the cache folder of commands and notebooks: $DPOVIZ_CACHE, or else ~/.cache/dpoviz.

    Raises:
        OSError: the variable is not set and the user has no home folder.
    """
    if os.environ.get("DPOVIZ_CACHE"):
        return Path(os.environ["DPOVIZ_CACHE"])
    try:
        return Path.home() / ".cache" / "dpoviz"
    except RuntimeError as error:
        raise OSError("DPOVIZ_CACHE: got nothing, and this user has no home; set it to a folder for results") from error


def reference_pass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    *,
    max_length: int,
    max_new_tokens: int,
    entropy_samples: int = 8,
    batch_size: int = 64,
    sampling_batch_size: int | None = None,
    static_cache: bool = False,
    seed: int = 0,
    too_long: str = "refuse",
    cache_dir: Path | str | None = None,
    progress: bool = True,
) -> Dataset:
    """Tokenise the pairs and add columns with the reference's scores, entropies and features.

    The processes of `accelerate launch` share the work; each returns all columns, the same as in a single process.

    Args:
        model: the reference.
        tokenizer: its tokenizer.
        pairs: records as returned by `load_pairs` or `tokenize_pairs`.
        max_length: limit of the prompt and one answer together, in tokens.
        max_new_tokens: limit of an answer sampled for the entropy, in tokens.
        entropy_samples: K, answers per prompt sampled for the entropy.
        batch_size: pairs per batch.
        sampling_batch_size: prompts per batch; K sequences of each, and their KV cache, are in memory. None:
            `batch_size`, and on a GPU as many as fit its free memory.
        static_cache: sample with a cache of fixed size, as in `dpoviz.lm.sampling.sampling`.
        seed: random seed.
        too_long: "refuse" or "drop" pairs over `max_length`.
        cache_dir: folder, shared by all processes, that stores the result and every finished batch by a fingerprint of
            model, tokenizer, data, settings and code. A killed run resumes and gives the same columns as an
            uninterrupted one. None stores nothing.
        progress: show progress bars.

    Returns:
        The pairs with prompt_ids, chosen_ids, rejected_ids, and these float32 columns:

        - ref_chosen_logps, ref_rejected_logps: log π_ref(y|x), nats;
        - ref_chosen_entropy, ref_rejected_entropy: exact next-token entropies summed along the answer, nats. They
          depend on the answers, so they must not be inputs of β(x);
        - ref_entropy, ref_entropy_se: the `per_token` estimate and its standard error, nats per token;
        - ref_entropy_first_token: exact, nats;
        - ref_entropy_sequence, ref_entropy_monte_carlo: nats, each with its standard error in a column with suffix _se;
        - ref_entropy_truncated: fraction of the sampled answers that hit `max_new_tokens`;
        - ref_features: (D,) mean of the last hidden states over the prompt.

        ref_entropy, all columns that begin with ref_entropy_, and ref_features depend on the prompt only.

    Raises:
        ValueError: as in `tokenize_pairs`; `max_length`, or a prompt with `max_new_tokens`, exceeds the model's
            context; a token is not in the model's vocabulary; log-probabilities are not finite, by row.
        OSError: `cache_dir` cannot be written (checked before the computation), or its disk is full.
    """
    pairs = tokenize_pairs(pairs, tokenizer, max_length, too_long=too_long)
    require_room(model, pairs, max_length, max_new_tokens)
    at_once = sampling_batch_size
    if at_once is None:
        longest = int(token_counts(pairs)[:, 0].max())
        at_once = prompts_at_once(model, longest, entropy_samples, max_new_tokens=max_new_tokens, least=batch_size)
    settings = {
        "batch_size": batch_size,
        "sampling_batch_size": at_once,  # answers are sampled per batch, so they depend on it
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "entropy_samples": entropy_samples,
        "static_cache": static_cache,
        "seed": seed,
    }
    ends = {"eos_id": end_id(pairs), "pad_id": tokenizer.pad_token_id}
    if ends["pad_id"] is None:
        ends["pad_id"] = tokenizer.eos_token_id
    if cache_dir is None:
        return _compute(model, pairs, settings, ends, None, Journal(None), progress)
    facts = [tokenizer.pad_token_id, ends, settings, digest(pairs)]
    name = fingerprint(model, facts, __name__)
    folder, unfinished = Path(cache_dir) / f"reference-{name}", Path(cache_dir) / f"unfinished-{name}"
    found = open_entry(folder, _read)
    if all(gather_object([found is not None])):  # either all processes read the entry, or all compute
        return found
    require_writable(Path(cache_dir), "cache")
    scored = _compute(model, pairs, settings, ends, cache_dir, Journal(unfinished), progress)
    if processes().is_main_process:
        write_entry(folder, lambda place: scored.save_to_disk(str(place)))
        shutil.rmtree(unfinished, ignore_errors=True)
    processes().wait_for_everyone()
    return _read(folder)


def _read(folder: Path) -> Dataset:
    return load_from_disk(str(folder))


def require_room(model: PreTrainedModel, pairs: Dataset, max_length: int, max_new_tokens: int) -> None:
    """Check that the model can read the pairs, before any computation.

    Args:
        model: the reference.
        pairs: tokenised pairs.
        max_length: limit of the prompt and one answer together, in tokens.
        max_new_tokens: limit of a sampled answer, in tokens.

    Raises:
        ValueError: `max_length`, or a prompt with `max_new_tokens`, exceeds the model's context; a token is not in the
            model's vocabulary.
    """
    require_tokens_of(model, "pairs", [highest_ids(pairs)])
    room = context_length(model)
    if room is None:
        return
    if max_length > room:
        raise ValueError(
            f"max_length: got {max_length}, but the model's context has {room} tokens; expected at most that "
            '(with too_long="drop" longer pairs are left out)'
        )
    longest = token_counts(pairs)[:, 0].max()
    if longest + max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens}, but a prompt has {longest} tokens and the model's context {room}; "
            f'expected at most {room - longest}, or a smaller max_length with too_long="drop"'
        )


def _compute(
    model: PreTrainedModel,
    pairs: Dataset,
    settings: dict[str, int],
    ends: dict[str, int],
    keep: Path | str | None,
    journal: Journal,
    progress: bool,
) -> Dataset:
    number: dict[tuple[int, ...], int] = {}  # index of each distinct prompt
    of_row = torch.tensor([number.setdefault(tuple(prompt), len(number)) for prompt in pairs["prompt_ids"]])
    prompts = list(number)
    scores = _score(model, pairs, ends["pad_id"], settings["batch_size"], journal, progress)
    bad = (~np.isfinite(scores["logps"])).any(axis=1).nonzero()[0].tolist()
    if bad:
        raise ValueError(f"the reference's log-probabilities are not finite in rows {bad[:10]} ({len(bad)} in all)")
    estimates = estimate_entropy(
        model,
        prompts,
        samples=settings["entropy_samples"],
        max_new_tokens=settings["max_new_tokens"],
        **ends,
        seed=settings["seed"],
        batch_size=settings["sampling_batch_size"],
        static_cache=bool(settings["static_cache"]),
        keep=keep,
        progress=progress,
    )
    finite = torch.isfinite(estimates.per_token.value)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"the reference's entropy is not finite at the prompt with tokens {list(prompts[row])[:20]}")
    columns = {f"ref_{side}_logps": scores["logps"][:, i] for i, side in enumerate(("chosen", "rejected"))}
    columns |= {f"ref_{side}_entropy": scores["entropy_sums"][:, i] for i, side in enumerate(("chosen", "rejected"))}
    columns |= {name: values[of_row].numpy() for name, values in _entropy_columns(estimates).items()}
    # take them from a prompt's first row: another row's may differ in the last bit, and then β would too
    columns["ref_features"] = scores["features"][np.unique(of_row, return_index=True)[1]][of_row.numpy()]
    beside = Dataset.from_dict({name: column.astype(np.float32) for name, column in columns.items()})
    return concatenate_datasets([pairs, beside], axis=1)


def _entropy_columns(estimates: EntropyEstimates) -> dict[str, torch.Tensor]:
    columns = {"ref_entropy": estimates.per_token.value, "ref_entropy_se": estimates.per_token.se}
    columns["ref_entropy_first_token"] = estimates.first_token.value
    for name in ("sequence", "monte_carlo"):
        value, se = getattr(estimates, name)
        columns |= {f"ref_entropy_{name}": value, f"ref_entropy_{name}_se": se}
    return {**columns, "ref_entropy_truncated": estimates.truncated}


@torch.no_grad()
def _score(
    model: PreTrainedModel, pairs: Dataset, pad: int, batch_size: int, journal: Journal, progress: bool
) -> dict[str, np.ndarray]:
    """Return logps (N, 2), entropy_sums (N, 2) and features (N, D) of all rows, in order."""
    ids, size = pairs.select_columns(list(IDS)), token_counts(pairs).sum(axis=1)
    batches, kept = by_length(size.tolist(), batch_size), journal.read()

    def score(number: int) -> dict[str, np.ndarray]:
        name, some = f"{number:06d}", batches[number]
        if name not in kept:
            prompts, *answers = ids[some].values()
            own = list(zip(*answers, strict=True))
            scores = score_answers(model, prompts, own, pad_id=pad, entropy=True, features=True)
            kept[name] = {key: getattr(scores, key).cpu().numpy() for key in ("logps", "entropy_sums", "features")}
            journal.add(name, kept[name])
        bar.update(len(some))
        return kept[name]

    shown = progress and processes().is_main_process
    with (
        evaluating(model),
        tqdm(total=len(size), desc="reference: log-probs", unit="pair", disable=hidden(shown)) as bar,
    ):
        parts = map_over_processes(range(len(batches)), score)
    back = np.argsort([row for some in batches for row in some])
    return {key: np.concatenate([part[key] for part in parts])[back] for key in parts[0]}


def reference_columns(pairs: Dataset) -> pd.DataFrame:
    """Return task, group and prompt of scored pairs, the reference's log-probability of each answer, and its length."""
    own = ["ref_chosen_logps", "ref_rejected_logps", "chosen_ids", "rejected_ids"]
    rows = pairs.select_columns(["task", "group", "prompt", *own]).to_pandas()
    for answer in ("chosen", "rejected"):
        rows[f"{answer}_tokens"] = rows.pop(f"{answer}_ids").map(len)
    return rows.rename(columns={"ref_chosen_logps": "ref_chosen", "ref_rejected_logps": "ref_rejected"})
