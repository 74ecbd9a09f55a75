"""One pass of the reference over a data set, beside which its results are kept: it never has to run again."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoviz import data, entropy, logprobs
from dpoviz.data import tokenize_pairs
from dpoviz.entropy import estimate_entropy
from dpoviz.logprobs import AnswerScores, evaluating, score_answers

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """Where commands and notebooks keep what need not be computed twice: $DPOVIZ_CACHE, or ~/.cache/dpoviz."""
    return Path(os.environ.get("DPOVIZ_CACHE") or Path.home() / ".cache" / "dpoviz")


def reference_pass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    *,
    max_length: int,
    max_new_tokens: int,
    entropy_samples: int = 8,
    batch_size: int = 64,
    seed: int = 0,
    too_long: str = "refuse",
    cache_dir: Path | str | None = None,
    progress: bool = True,
) -> Dataset:
    """Tokenise the pairs and put beside them what the reference makes of them.

    Args:
        model: the reference.
        tokenizer: its tokenizer.
        pairs: records as `load_pairs` returns them.
        max_length: limit of the prompt and one answer together, in tokens.
        max_new_tokens: limit of an answer that is sampled for the entropy.
        entropy_samples: answers a prompt that are sampled for the entropy.
        batch_size: pairs, or prompts, at once.
        seed: the draws.
        too_long: "refuse" or "drop" pairs over `max_length`.
        cache_dir: a folder; the result is kept there by a fingerprint of model, tokenizer, data, settings and
            code, and found there the next time. None keeps nothing.
        progress: show bars.

    Returns:
        The pairs with prompt_ids, chosen_ids, rejected_ids; ref_chosen_logps and ref_rejected_logps (nats,
        summed over the answer); ref_entropy and ref_entropy_se (nats per token, the `per_token` estimator);
        ref_features (D numbers, the mean of the last hidden states over the prompt). All of the reference's
        columns are float32; ref_entropy and ref_features depend on the prompt alone.

    Raises:
        ValueError: as `tokenize_pairs`, or log-probabilities that are not finite, by row.
    """
    pairs = tokenize_pairs(pairs, tokenizer, max_length, too_long=too_long)
    settings = {
        "batch_size": batch_size,  # answers are drawn batch by batch, so it decides which
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "entropy_samples": entropy_samples,
        "seed": seed,
    }
    if cache_dir is None:
        return _compute(model, tokenizer, pairs, progress, **settings)
    folder = Path(cache_dir) / f"reference-{_fingerprint(model, tokenizer, pairs, settings)}"
    if folder.exists():
        try:
            return load_from_disk(str(folder))
        except Exception as error:  # whatever a damaged Arrow file may raise: computing again mends it
            logger.warning("%s cannot be read (%s); the reference runs again", folder, error)
    scored = _compute(model, tokenizer, pairs, progress, **settings)
    _keep(scored, folder)
    return load_from_disk(str(folder))


def _compute(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    progress: bool,
    *,
    batch_size: int,
    max_length: int,
    max_new_tokens: int,
    entropy_samples: int,
    seed: int,
) -> Dataset:
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    pad = end if pad is None else pad
    prompts = list({tuple(prompt): None for prompt in pairs["prompt_ids"]})  # each prompt once
    scores = _score(model, pairs, pad, batch_size, progress)
    bad = (~torch.isfinite(scores.logps)).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"the reference's log-probabilities are not finite in rows {bad[:10]} ({len(bad)} in all)")
    per_token = estimate_entropy(
        model,
        prompts,
        samples=entropy_samples,
        max_new_tokens=max_new_tokens,
        eos_id=end,
        pad_id=pad,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    ).per_token
    if not torch.isfinite(per_token.value).all():
        row = (~torch.isfinite(per_token.value)).nonzero()[0].item()
        raise ValueError(f"the reference's entropy is not finite at the prompt with tokens {list(prompts[row])[:20]}")
    number = {prompt: i for i, prompt in enumerate(prompts)}
    of_row = torch.tensor([number[tuple(prompt)] for prompt in pairs["prompt_ids"]])
    columns = {
        "ref_chosen_logps": scores.logps[:, 0],
        "ref_rejected_logps": scores.logps[:, 1],
        "ref_entropy": per_token.value[of_row],
        "ref_entropy_se": per_token.se[of_row],
        "ref_features": scores.features,
    }
    return Dataset.from_dict({**pairs[:], **{name: c.float().numpy() for name, c in columns.items()}})


@torch.no_grad()
def _score(model: PreTrainedModel, pairs: Dataset, pad: int, batch_size: int, progress: bool) -> AnswerScores:
    """Log-probabilities and features of all rows, in the order of the rows."""
    rows = pairs[:]
    answers = [list(pair) for pair in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
    size = [len(p) + len(c) + len(r) for p, (c, r) in zip(rows["prompt_ids"], answers, strict=True)]
    order = sorted(range(len(size)), key=size.__getitem__)
    parts = []
    with evaluating(model), tqdm(
        total=len(order), desc="reference: log-probs", unit="pair", disable=not progress
    ) as bar:  # fmt: skip
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            prompts, own = [rows["prompt_ids"][i] for i in some], [answers[i] for i in some]
            scores = score_answers(model, prompts, own, pad_id=pad, features=True)
            parts.append((scores.logps.cpu(), scores.features.cpu()))
            bar.update(len(some))
    back = torch.tensor(order).argsort()
    logps, features = (torch.cat(part)[back] for part in zip(*parts, strict=True))
    return AnswerScores(logps=logps, lengths=torch.tensor(size), features=features)


def _fingerprint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, settings: dict[str, int]
) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    # the path that a model was loaded from is part of its configuration, and is not part of what it is
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    parts = [config, tokenizer.eos_token_id, tokenizer.pad_token_id, settings, pairs[:]]
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    for module in (data, entropy, logprobs, sys.modules[__name__]):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


def _keep(scored: Dataset, folder: Path) -> None:
    """Write beside, then move: a killed run leaves no half of a cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        scored.save_to_disk(str(new))
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
