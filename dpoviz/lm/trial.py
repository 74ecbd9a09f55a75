"""Find the fastest road, or way to score answers, that agrees with plain forward passes of a model, by a trial.

A plain forward pass has one sequence, a prompt and its answer, and nothing else in the batch. The trial compares
logits, so it needs no list of architectures: a model that ignores masks or positions, or has windows, sparse attention
or unusual position schemes, gives other logits once the trial is as long as the rows. So trials are at least as long as
the data's rows, and are repeated when longer rows come.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpoviz.lm.forward import (
    Predictions,
    context_length,
    language_model,
    plain_logits,
    predict_alone,
    predict_padded,
    predict_shared,
)
from dpoviz.lm.packing import PrefixBatch, Tokens, prefix_batch, require_tokens

logger = logging.getLogger(__name__)


class Road(Enum):
    """Ways to score answers, the fastest first."""

    SHARED = "prompts are shared in packed rows"
    SHARED_IN_CONTEXT = "prompts are shared in packed rows no wider than the context"
    PADDED = "one row an answer, padded on the right"
    ALONE = "one forward an answer, alone"

    @property
    def shared(self) -> bool:
        """Return whether answers share their prompt."""
        return self in (Road.SHARED, Road.SHARED_IN_CONTEXT)


class Size(NamedTuple):
    """Length of the longest sequence and of the widest row, in tokens."""

    longest: int
    widest: int

    def within(self, other: Size) -> bool:
        return self.longest <= other.longest and self.widest <= other.widest


_NOTHING = Size(0, 0)


@dataclass
class _Tried:
    """Results of the trials of a road on a model: largest correct size, a wrong size, and the error there."""

    right: Size = _NOTHING
    wrong: Size | None = None
    error: str = ""
    said: bool = False


_TRIED: weakref.WeakKeyDictionary[PreTrainedModel, dict[Road, _Tried]] = weakref.WeakKeyDictionary()

_SHORTEST = 32
"""Minimum length of a trial, in tokens."""

_PLACES = 16
"""Positions compared in a long answer, besides the first four."""

_DRAWS = 2
"""Random texts per trial; a road passes if it is correct on one of them."""

_SLOW = 2.0
"""Seconds after which a trial is logged."""


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in evaluation mode, and restore the mode of every module afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def lay_out(
    model: PreTrainedModel,
    prompts: Tokens,
    answers: Sequence[Tokens],
    pad_id: int,
    road: Road | None = None,
    *,
    laid_out: PrefixBatch | None = None,
) -> tuple[Road, PrefixBatch]:
    """Return the fastest road that scores these answers correctly, and the batch laid out for it.

    Args:
        model: a causal language model without PEFT's wrapper.
        prompts: B prompts as token ids.
        answers: K answers per prompt as token ids.
        pad_id: padding token.
        road: use this road without a trial.
        laid_out: the batch of the first road, if it was laid out ahead.

    Raises:
        ValueError: no road scores the model correctly, or as in `prefix_batch`.
    """
    require_tokens(prompts, answers)
    longest = max(len(p) + len(a) for p, some in zip(prompts, answers, strict=True) for a in some)
    batch: PrefixBatch | None = None
    for own in [road] if road is not None else Road:
        if own is Road.SHARED_IN_CONTEXT and batch and batch.input_ids.shape[1] <= (context_length(model) or math.inf):
            continue  # SHARED gave the same batch
        first = own is Road.SHARED and laid_out is not None
        batch = laid_out if first else _batch(model, prompts, answers, pad_id, own)
        assert batch is not None
        if road is not None or is_right(model, own, Size(longest, max(longest, batch.input_ids.shape[1]))):
            return own, batch.to(model.device)
    raise ValueError(
        f"model: {type(model).__name__} is scored correctly in no way that was tried, against a plain forward of each "
        "sequence: " + "; ".join(f"{own.value}: {tried.error}" for own, tried in _TRIED[model].items())
    )


def predict(model: PreTrainedModel, batch: PrefixBatch, road: Road, *, prompts: bool = False) -> Predictions:
    """Predict the answers of a batch that was laid out for a road.

    Args:
        prompts: also return the hidden states of the prompts.
    """
    if road.shared:
        return predict_shared(model, batch)
    return predict_padded(model, batch) if road is Road.PADDED else predict_alone(model, batch, prompts=prompts)


def _batch(model: PreTrainedModel, prompts: Tokens, answers: Sequence[Tokens], pad_id: int, road: Road) -> PrefixBatch:
    if road.shared:
        room = context_length(model) if road is Road.SHARED_IN_CONTEXT else None
        return prefix_batch(prompts, answers, pad_id, room=room)
    prompts = [prompt for prompt, own in zip(prompts, answers, strict=True) for _ in own]
    return prefix_batch(prompts, [[answer] for own in answers for answer in own], pad_id, packed=False)


def is_right(model: PreTrainedModel, road: Road, size: Size) -> bool:
    """Return whether a road gives the logits of plain forward passes at a size; results are remembered per model.

    Raises:
        ValueError: as in `require_causal`.
    """
    model = language_model(model)  # so that a model and its PEFT wrapper share their trials
    require_causal(model)
    if model not in _CAUSAL:  # its logits are NaN on every road, so no trial can decide
        return road is Road.PADDED
    tried = _TRIED.setdefault(model, {}).setdefault(road, _Tried())
    if size.within(tried.right):
        return True
    if tried.wrong is not None and tried.wrong.within(size):
        return False
    ahead = _ahead(model, road, size, tried.right)
    if tried.wrong is not None and tried.wrong.within(ahead):
        ahead = size
    for asked in dict.fromkeys([ahead, size]):
        tried.error = _difference(model, road, asked)
        if not tried.error:
            tried.right = asked
            return True
        tried.wrong = asked
    if road in _SLOWER and not tried.said:
        tried.said = True
        logger.warning("%s %s (%s)", type(model).__name__, _SLOWER[road], tried.error)
    return False


_SLOWER = {
    Road.SHARED: "cannot take shared-prefix batches in rows as wide as these; they are made narrower, or each answer "
    "is scored by itself, at about twice the cost",
    Road.PADDED: "does not give its own numbers in a padded batch; each answer is scored alone, which is slow",
}
"""Consequence of not taking a road, for the warning."""


def _ahead(model: PreTrainedModel, road: Road, size: Size, right: Size) -> Size:
    """Return a size large enough beyond `size` that the next trial is not needed soon."""
    context = context_length(model)
    longest, widest = (1 << (max(n, _SHORTEST) - 1).bit_length() for n in size)
    if context is not None:
        longest = min(longest, max(context, size.longest))
        if road is Road.SHARED_IN_CONTEXT:
            widest = min(widest, max(context, size.widest))
    longest = max(longest, right.longest)
    return Size(longest, max(widest, longest, right.widest))


def _difference(model: PreTrainedModel, road: Road, size: Size) -> str:
    """Try a road and describe its error; return an empty text if it is correct."""
    begin = time.perf_counter()
    try:
        with _plainly(model):
            # rounding may rarely flip the choice between experts; a real error shows on every text
            error = math.inf
            for seed in range(_DRAWS):
                if error > tolerance(model):
                    error = min(error, _error(model, road, size, seed))
            off = "" if error <= tolerance(model) else f"off by {error:.2g} of the spread of the logits"
    except Exception as error:  # an unfamiliar model may raise anything; the next road is tried
        off = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    seconds = time.perf_counter() - begin
    if seconds > _SLOW:
        logger.info("%s was tried at %d tokens (%s) in %.1f s", type(model).__name__, size.longest, road.value, seconds)
    return off and f"with {size.longest} tokens in rows of {size.widest}: {off}"


@contextmanager
def _plainly(model: PreTrainedModel) -> Iterator[None]:
    """Enter evaluation mode without gradients or autocast."""
    with evaluating(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        yield


def tolerance(model: PreTrainedModel) -> float:
    """Return the largest accepted error of the logits, relative to their spread."""
    # rounding alone makes two ways differ by about 1e-6 per layer in float32, and 1e-2 in half precision
    return 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1


def _error(model: PreTrainedModel, road: Road, size: Size, seed: int) -> float:
    """Return the largest relative error of the logits over positions in long and short answers."""
    prompts, answers = _texts(model, road, size, seed)
    k = len(answers[0])
    room = len(prompts[0]) + sum(len(answer) - 1 for answer in answers[0])  # so the short ones get their own row
    if road.shared:
        if road is Road.SHARED_IN_CONTEXT:
            room = min(room, size.widest)
        batch = prefix_batch(prompts, answers, 0, room=room).to(model.device)
        owners = batch.answers
    else:
        batch = _batch(model, prompts, answers, 0, road).to(model.device)
        owners = batch.answers.view(-1, k)
    found = predict(model, batch, road)
    worst = 0.0
    for row, column in [(0, 0), (0, k - 1), (1, 0), (1, 1), (2, 0), (2, 1)]:
        prompt, answer = prompts[row], answers[row][column]
        places = _places(len(answer), model.device)
        states = found.states[(batch.owners == owners[row, column]).nonzero().flatten()[places]]
        plain = plain_logits(model, prompt + answer, places + len(prompt) - 1)
        worst = max(worst, relative_error(found.head(states), plain).max().item())
    return worst


def _texts(model: PreTrainedModel, road: Road, size: Size, seed: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Return three prompts with K answers each: one of the requested size, one half as long, and a short one.

    Further answers between the longest prompt and its last answer fill the row.
    """
    start = size.longest // 2
    rest = size.longest - start
    between = max(2, size.widest - size.longest) if road.shared else 2
    parts = [min(rest, between - done) for done in range(0, between, rest)]
    lengths = [*parts, rest, rest // 2, rest // 3, 6, 2]
    texts = random_tokens(model, [start, start // 2, 3, *lengths], seed)
    prompts, texts = texts[:3], texts[3:]
    long, mid, short = texts[: len(parts) + 1], texts[-4:-2], texts[-2:]
    return prompts, [long, *(two + two[:1] * (len(parts) - 1) for two in (mid, short))]


def random_tokens(model: PreTrainedModel, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Return random token sequences of the given lengths, at least 1."""
    draw = torch.Generator().manual_seed(seed)
    embeddings: Any = model.get_input_embeddings()
    top = embeddings.num_embeddings
    return [torch.randint(top, (max(1, n),), generator=draw).tolist() for n in lengths]


def _places(length: int, device: torch.device) -> Tensor:
    """Return the first positions of an answer, where wrong masks show most, and some of the others."""
    spread = torch.linspace(0, length - 1, min(length, _PLACES)).long()
    return torch.cat([torch.arange(min(length, 4)), spread]).unique().to(device)


def relative_error(logits: Tensor, expected: Tensor) -> Tensor:
    """Return the (n,) errors of log-probabilities, given (n, V) logits, relative to their spread."""
    found, right = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(dim=-1) for x in (logits, expected))
    counted = right.isfinite() | (found != right)  # tokens impossible under both do not count
    difference = torch.where(counted, found - right, 0).square().sum(dim=-1)
    count = counted.sum(dim=-1)
    mean = torch.where(counted, right, 0).sum(dim=-1, keepdim=True) / count[:, None]
    # a spread below 0.01 nats counts as that: an error of 1e-5 nats says nothing, however flat the distribution
    spread = torch.where(counted, right - mean, 0).square().sum(dim=-1).clamp(min=count * 1e-4)
    error = torch.where(difference == 0, 0, (difference / spread).sqrt())
    return error.nan_to_num(nan=math.inf)


_CAUSAL: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def require_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose predictions depend on later tokens or change from call to call.

    Raises:
        ValueError: they do, or the model does not accept a plain sequence of tokens.
    """
    model = language_model(model)
    if model in _CAUSAL:
        return
    name = type(model).__name__
    embeddings: Any = model.get_input_embeddings()
    top = embeddings.num_embeddings
    one = torch.randint(top, (12,), generator=torch.Generator().manual_seed(0))
    other = torch.cat([one[:6], (one[6:] + 1) % top])
    with _plainly(model):
        try:
            first, second, again = (plain_logits(model, ids.tolist())[:6] for ids in (one, other, one))
        except Exception as error:  # an unfamiliar model may raise anything
            raise ValueError(
                f"model: {name} does not read a plain sequence of tokens ({type(error).__name__}: {error}); expected "
                "a causal language model"
            ) from error
    if first.isnan().any():
        return  # undecidable; the caller that gets the NaN scores names row and step
    for logits, why in ((again, "from one call to the next"), (second, "with the tokens that come later")):
        off = relative_error(logits, first).max().item()
        if off > tolerance(model):
            raise ValueError(
                f"model: the predictions of {name} change {why}, by {off:.2g} of their spread; expected a causal "
                "language model (an encoder such as BERT is none)"
            )
    _CAUSAL.add(model)
