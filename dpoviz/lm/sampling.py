"""Sample answers from a model's own distribution, and record their scores while sampling.

The keys and values of a prompt are computed once for all its answers where the model supports it. The way of sampling
is chosen per model by a trial against plain forward passes over the sampled text.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import StaticLayer

from dpoviz.lm.forward import cache_argument, context_length, fill_cache, language_model, plain_logits
from dpoviz.lm.packing import Tokens, by_length
from dpoviz.lm.processes import autocast, hidden
from dpoviz.lm.scoring import AnswerScores, log_softmax, require_tokens_of, token_entropies
from dpoviz.lm.trial import evaluating, random_tokens, relative_error, require_causal, tolerance

logger = logging.getLogger(__name__)


class Samples(NamedTuple):
    """Answers sampled from a model.

    Attributes:
        answers: K answers per prompt as token ids, with the end token if it was sampled.
        truncated: per prompt, the number of answers that hit the limit before the end token.
    """

    answers: list[list[list[int]]]
    truncated: list[int]


class Sampler(NamedTuple):
    """A sampler of answers in batches from one random generator, as yielded by `sampling`.

    Attributes:
        draw: maps prompts to K answers per prompt as token ids, with the end token if it was sampled, and to their
            scores, float64 sums of float32 values, if requested.
        generator: the random generator; its state is the position in the stream.
    """

    draw: Callable[[Tokens], tuple[list[list[list[int]]], AnswerScores | None]]
    generator: torch.Generator


class _Way(Enum):
    """Ways to sample answers, the fastest first."""

    STATIC = "a batch, in which keys and values of each prompt are computed once, in a cache of fixed size"
    SHARED = "a batch, in which keys and values of each prompt are computed once"
    BATCH = "a batch, padded on the left"
    ALONE = "prompt by prompt"
    UNCACHED = "prompt by prompt, without a cache"

    @property
    def alone(self) -> bool:
        """Return whether each prompt is sampled separately."""
        return self in (_Way.ALONE, _Way.UNCACHED)


class _Recorder(LogitsProcessor):
    """Recorder of the log-probabilities and entropies that `generate` samples from; leaves the logits unchanged."""

    def __init__(self, *, keep: bool = False) -> None:
        self.logps: list[Tensor] = []
        self.entropies: list[Tensor] = []
        self.last: Tensor | None = None
        self.kept: list[Tensor] | None = [] if keep else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.drew(input_ids[:, -1])
        self.last = log_softmax(scores)  # (rows, V)
        self.entropies.append(token_entropies(self.last))
        if self.kept is not None:
            self.kept.append(self.last)
        return scores

    def drew(self, tokens: Tensor) -> None:
        """Record the log-probability of the tokens just sampled (no-op before the first)."""
        if self.last is not None:
            self.logps.append(self.last.gather(-1, tokens[:, None]).squeeze(-1))

    def scores(self, lengths: Tensor) -> AnswerScores:
        """Return the scores of (B, K) answers, given their lengths; tokens after an answer's end do not count."""
        counted = torch.arange(len(self.logps), device=lengths.device)[:, None] < lengths.flatten()
        logps, entropies = (torch.stack(values).double() for values in (self.logps, self.entropies))  # (steps, B * K)
        return AnswerScores(
            logps=torch.where(counted, logps, 0).sum(dim=0).view_as(lengths),
            lengths=lengths,
            entropy_sums=torch.where(counted, entropies, 0).sum(dim=0).view_as(lengths),
            first_entropies=entropies[0].view_as(lengths)[:, 0],
        )


@contextmanager
def sampling(
    model: PreTrainedModel,
    prompts: Tokens,
    k: int,
    *,
    max_new_tokens: int,
    eos_id: int | None,
    pad_id: int,
    seed: int,
    scores: bool = False,
    static_cache: bool = False,
) -> Iterator[Sampler]:
    """Yield a sampler of K answers per prompt for batches chosen by the caller.

    Arguments and errors are as in `sample_answers`, besides:

    Args:
        prompts: all prompts that will be sampled at; checked in advance.
        eos_id: the end token; None samples `max_new_tokens` tokens of each answer.
        scores: also record the log-probabilities and entropies of the answers while sampling.
        static_cache: keep keys and values in memory of a fixed size. On a GPU `transformers` then compiles the step and
            replays it as a CUDA graph: faster steps, after minutes of compiling for each new shape of a batch. The
            distribution sampled from is the same.
    """
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1")
    if len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts: got none, or an empty one, expected at least one token each")
    model, longest = language_model(model), max(len(prompt) for prompt in prompts)
    require_tokens_of(model, "prompts", prompts)
    require_tokens_of(model, "eos_id, pad_id", [[pad_id] if eos_id is None else [eos_id, pad_id]])
    room = context_length(model)
    if room is not None and longest + max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens}, but a prompt has {longest} tokens and the context {room}; "
            "expected fewer, or shorter prompts"
        )
    way = _way(model, longest + max_new_tokens, static_cache)
    config = _settings(way, max_new_tokens, eos_id, pad_id)

    def draw(some: Tokens) -> tuple[list[list[list[int]]], AnswerScores | None]:
        parts = [
            _draw(model, own, k, config, way, eos_id, scores) for own in ([[p] for p in some] if way.alone else [some])
        ]
        answers = [own for part, _ in parts for own in part]
        return answers, _joined([read for _, read in parts if read is not None]) if scores else None

    with _sampled_by(model, config), _seeded(model.device, seed) as generator:
        yield Sampler(draw, generator)


def _settings(way: _Way, max_new_tokens: int, eos_id: int | None, pad_id: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max_new_tokens, eos_token_id=eos_id, pad_token_id=pad_id,
        use_cache=way is not _Way.UNCACHED,
    )  # fmt: skip


@contextmanager
def _sampled_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Enter evaluation mode without gradients, with `config` in place of the model's generation settings."""
    # generate() fills unset fields of a configuration from the model's own: make both the same
    own, model.generation_config = model.generation_config, config
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        model.generation_config = own


def _draw(
    model: PreTrainedModel,
    prompts: Tokens,
    k: int,
    config: GenerationConfig,
    way: _Way,
    eos_id: int | None,
    scores: bool,
) -> tuple[list[list[list[int]]], AnswerScores | None]:
    recorder = _Recorder() if scores else None
    with autocast(model.device):
        drawn = [_until_end(row, eos_id) for row in _generate(model, prompts, k, config, recorder, way)]
    answers = [drawn[i : i + k] for i in range(0, len(drawn), k)]
    if recorder is None:
        return answers, None
    return answers, recorder.scores(torch.tensor([[len(a) for a in own] for own in answers], device=model.device))


def _joined(parts: list[AnswerScores]) -> AnswerScores:
    columns: Any = (None if own[0] is None else torch.cat(own) for own in zip(*parts, strict=True))
    return AnswerScores(*columns)


_TRIED: weakref.WeakKeyDictionary[PreTrainedModel, dict[_Way, tuple[int, _Way]]] = weakref.WeakKeyDictionary()
"""Per model and first way to try, the way to sample and the length in tokens up to which it is known to be correct."""

_STEPS = 24
"""Tokens sampled in a trial."""


def _way(model: PreTrainedModel, longest: int, static_cache: bool) -> _Way:
    """Return the fastest way whose next-token distributions equal those of plain forward passes, found by a trial.

    Args:
        model: a model without PEFT's wrapper.
        longest: maximum length of a prompt with its answer, in tokens.
        static_cache: begin with the way that has one.

    Raises:
        ValueError: no way is correct.
    """
    require_causal(model)
    first = _Way.STATIC if static_cache else _Way.SHARED
    tried, known = _TRIED.setdefault(model, {}).get(first, (0, first))
    if longest <= tried:
        return known
    asked = min(1 << (max(longest, 2 * _STEPS) - 1).bit_length(), context_length(model) or 1 << 62)
    differences: list[str] = []
    for way in list(_Way)[list(_Way).index(known) :]:
        try:
            with torch.autocast(model.device.type, enabled=False), _seeded(model.device, 0):
                error = _error(model, way, asked)
            off = "" if error <= tolerance(model) else f"off by {error:.2g} of the spread of the logits"
        except Exception as error:  # an unfamiliar model may raise anything; the next way is tried
            off = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not off:
            _TRIED[model][first] = asked, way
            if way.alone:
                logger.warning(
                    "%s is sampled %s, which is slow (%s)", type(model).__name__, way.value, "; ".join(differences)
                )
            return way
        differences.append(f"{way.value}: {off}")
    raise ValueError(
        f"model: {type(model).__name__} samples from other distributions than those of its plain forwards, in each way "
        "that was tried: " + "; ".join(differences)
    )


def _error(model: PreTrainedModel, way: _Way, longest: int) -> float:
    """Return the largest relative error of the sampling distributions after a long, a medium and a short prompt."""
    steps = max(1, min(_STEPS, longest - 3))
    prompts = random_tokens(model, [max(1, longest - steps), max(1, (longest - steps) // 2), min(3, longest - steps)])
    k, worst = 2, 0.0
    config = _settings(way, steps, None, 0)
    with _sampled_by(model, config):
        for own in [[prompt] for prompt in prompts] if way.alone else [prompts]:
            recorder = _Recorder(keep=True)
            drawn = _generate(model, own, k, config, recorder, way)
            logps = torch.stack(recorder.kept or [])  # (steps, rows, V)
            for i, prompt in enumerate(own):
                row = i * k + k - 1
                places = torch.arange(len(prompt) - 1, len(prompt) + steps - 1, device=model.device)
                plain = plain_logits(model, prompt + drawn[row], places)
                worst = max(worst, relative_error(logps[:, row], plain).max().item())
    return worst


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[torch.Generator]:
    """Yield PyTorch's default generator for a device, seeded, and restore its state afterwards."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index]
    else:
        generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield generator
    finally:
        generator.set_state(before)


def prompts_at_once(model: PreTrainedModel, longest: int, k: int, *, max_new_tokens: int, least: int) -> int:
    """Return how many prompts to sample at together: a power of two that fits half of a GPU's free memory.

    A GPU takes about as long for a token of one sequence as for a token of thousands.

    Args:
        model: a causal language model, on its device.
        longest: tokens of the longest prompt.
        k: answers per prompt.
        max_new_tokens: limit of an answer, in tokens.
        least: the number on a CPU, which gains nothing from more, and the smallest on a GPU.
    """
    device = model.device
    if device.type != "cuda":
        return least
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    each = sequence_bytes(model, longest + max_new_tokens) * k
    return max(least, 1 << max(0, int(free / 2 / each).bit_length() - 1))


def sequence_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the memory of one sampled sequence: keys and values of its tokens, and the logits of one token."""
    config: Any = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * tokens
    # a layer's cache is copied when it grows; logits, log-probabilities, probabilities and their products in float32
    return kept + 2 * kept // config.num_hidden_layers + 5 * 4 * config.vocab_size


def sample_answers(
    model: PreTrainedModel,
    prompts: Tokens,
    k: int,
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    seed: int,
    batch_size: int = 128,
    progress: bool = False,
) -> Samples:
    """Sample K answers per prompt from the model's own distribution (temperature 1, no top-k or top-p).

    Args:
        model: a causal language model, also with PEFT adapters; its training mode is restored afterwards. Its
            generation settings are ignored.
        prompts: B prompts as token ids.
        k: answers per prompt.
        max_new_tokens: limit of an answer, in tokens.
        eos_id: token that ends an answer.
        pad_id: padding token.
        seed: random seed; the caller's random state is unchanged.
        batch_size: prompts per batch; `batch_size` × K sequences, each with a KV cache for the prompt and
            `max_new_tokens`, are in memory.
        progress: show a progress bar.

    Raises:
        ValueError: k < 1, there are no prompts or an empty one, the adapter is a prompt-tuning one, or a prompt leaves
            no room for `max_new_tokens` in the model's context.
    """
    answers: list[list[list[int]]] = [[] for _ in prompts]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id, "seed": seed}
    with sampling(model, prompts, k, **settings) as sampler, tqdm(
        total=len(prompts), desc="sampling answers", unit="prompt", disable=hidden(progress)
    ) as bar:  # fmt: skip
        for rows in by_length([len(prompt) for prompt in prompts], batch_size):
            for row, own in zip(rows, sampler.draw([prompts[row] for row in rows])[0], strict=True):
                answers[row] = own
            bar.update(len(rows))
    return Samples(answers, [sum(answer[-1] != eos_id for answer in own) for own in answers])


def _generate(
    model: PreTrainedModel, prompts: Tokens, k: int, config: GenerationConfig, recorder: _Recorder | None, way: _Way
) -> list[list[int]]:
    """Generate k answers per prompt, as token ids without the prompt."""
    width = max(len(prompt) for prompt in prompts)
    if way is _Way.STATIC:  # few shapes, because each is compiled
        width = -(-width // _STATIC_WIDTH) * _STATIC_WIDTH
    ids = torch.tensor([[config.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    more = {}
    # generate() needs a token that is not yet in the cache: the last one of the prompt
    if way is _Way.STATIC or (way is _Way.SHARED and k > 1 and width > 1):
        cache = DynamicCache(config=model.config)
        fill_cache(model, ids[:, :-1], mask[:, :-1], cache)
        cache.batch_repeat_interleave(k)
        static = way is _Way.STATIC
        more[cache_argument(model)] = _static(model, cache, width + (config.max_new_tokens or 0)) if static else cache
    ids, mask = ids.repeat_interleave(k, dim=0), mask.repeat_interleave(k, dim=0)
    generate: Any = model.generate
    out = generate(
        input_ids=ids, attention_mask=mask, generation_config=config, **more,
        logits_processor=None if recorder is None else LogitsProcessorList([recorder]),
    )  # fmt: skip
    if recorder is not None:
        recorder.drew(out[:, -1])
    return out[:, width:].tolist()


_STATIC_WIDTH = 64
"""Prompts are padded to a multiple of so many tokens where the cache has a fixed size."""


def _static(model: PreTrainedModel, filled: DynamicCache, tokens: int) -> StaticCache:
    """Return a cache of a fixed number of tokens with the keys and values of another one."""
    cache = StaticCache(config=model.config, max_cache_len=tokens)
    layers: list[Any] = [*filled.layers]
    for layer, own in zip(cache.layers, layers, strict=True):
        if type(layer) is not StaticLayer:
            raise NotImplementedError(f"a {type(layer).__name__} is not filled from another cache")
        layer.update(own.keys, own.values)
    return cache


def _until_end(tokens: list[int], eos_id: int | None) -> list[int]:
    return tokens[: tokens.index(eos_id) + 1] if eos_id is not None and eos_id in tokens else tokens
