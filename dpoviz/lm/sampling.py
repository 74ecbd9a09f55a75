"""Prompts and answers to shared-prefix batches, log-probabilities, entropies and prompt features; sampling.

A prompt stands once and its answers behind it (two for a preference pair); short prompts fill up the rows that long
ones need. An answer sees its prompt and itself, never its rivals, and its positions start again after the prompt: so
the scores are those of separate sequences, while what they share is computed once. Logits are computed only where an
answer is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from dpoviz.lm.packing import Tokens, by_length
from dpoviz.lm.scoring import (
    AnswerScores,
    context_length,
    evaluating,
    language_model,
    require_known,
    supports_shared_prefix,
    token_entropies,
)


class Samples(NamedTuple):
    """Answers drawn from a model.

    Attributes:
        answers: for each prompt K answers as token ids, the end token included where one was drawn.
        truncated: for each prompt, how many of its answers hit the limit before they ended.
    """

    answers: list[list[list[int]]]
    truncated: list[int]


class Sampler(NamedTuple):
    """Draws answers from one random stream, batch after batch; what `sampling` gives.

    Attributes:
        draw: prompts → for each K answers as token ids, the end token included where one was drawn; and their scores,
            in float64 sums of float32 numbers, if they were asked for.
        generator: where the draws come from; its state says how far the stream has come.
    """

    draw: Callable[[Tokens], tuple[list[list[list[int]]], AnswerScores | None]]
    generator: torch.Generator


class _Recorder(LogitsProcessor):
    """Reads what generate() draws from, token by token, and leaves it as it is."""

    def __init__(self) -> None:
        self.logps, self.entropies, self.last = [], [], None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.drew(input_ids[:, -1])
        self.last = scores.log_softmax(dim=-1)  # (rows, V)
        self.entropies.append(token_entropies(self.last))
        return scores

    def drew(self, tokens: Tensor) -> None:
        """Record the log-probability of the tokens just sampled (no-op before the first)."""
        if self.last is not None:
            self.logps.append(self.last.gather(-1, tokens[:, None]).squeeze(-1))

    def scores(self, lengths: Tensor) -> AnswerScores:
        """Of (B, K) answers with those lengths; rows that had ended went on, and are not counted there."""
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
    eos_id: int,
    pad_id: int,
    seed: int,
    scores: bool = False,
) -> Iterator[Sampler]:
    """Draw K answers to prompts, in batches of the caller's choice; arguments and errors as `sample_answers`.

    Args:
        prompts: all that will be asked for; they are checked before the first is drawn.
        scores: also the log-probabilities and entropies of the answers, read where they are drawn.
    """
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1")
    if len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts: got none, or an empty one, expected at least one token each")
    model, longest = language_model(model), max(len(prompt) for prompt in prompts)
    require_known(model, [*prompts, [eos_id, pad_id]])
    room = context_length(model)
    if room is not None and longest + max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens}, but a prompt has {longest} tokens and the context {room}; "
            "expected fewer, or shorter prompts"
        )
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max_new_tokens, eos_token_id=eos_id, pad_token_id=pad_id
    )  # fmt: skip

    def draw(some: Tokens) -> tuple[list[list[list[int]]], AnswerScores | None]:
        recorder = _Recorder() if scores else None
        drawn = [_until_end(row, eos_id) for row in _generate(model, some, k, config, recorder)]
        answers = [drawn[i : i + k] for i in range(0, len(drawn), k)]
        if recorder is None:
            return answers, None
        return answers, recorder.scores(torch.tensor([[len(a) for a in own] for own in answers], device=model.device))

    # generate() fills what a configuration leaves open with the model's own settings: both are the same here
    own, model.generation_config = model.generation_config, config
    try:
        with evaluating(model), _seeded(model.device, seed) as generator, torch.no_grad():
            yield Sampler(draw, generator)
    finally:
        model.generation_config = own


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[torch.Generator]:
    """The generator that PyTorch draws from on a device, seeded, and afterwards as it was."""
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
    """K answers to each prompt, drawn from the model's own distribution (temperature 1, nothing cut off).

    Args:
        model: a causal language model, or one with PEFT's adapters; left in the mode it was in. Its own
            generation settings are not used.
        prompts: token ids.
        k: answers a prompt.
        max_new_tokens: limit of an answer, in tokens.
        eos_id: token that ends an answer: `dpoviz.data.tokens.end_id` of the pairs that are trained on, or
            `answer_end` where there are none. An end token is not always the tokenizer's.
        pad_id: token that fills the rows.
        seed: the draws; the caller's random state is left alone.
        batch_size: prompts at once. Their answers are drawn side by side: `batch_size` × K sequences, each with a
            cache of keys and values for the prompt and `max_new_tokens`, are in memory.
        progress: show a bar.

    Raises:
        ValueError: k < 1, no prompt or an empty one, a token that the model does not know, an adapter by prompt
            tuning, or a prompt that leaves no room for `max_new_tokens` in the model's context.
    """
    answers: list[list[list[int]]] = [[] for _ in prompts]
    settings = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id, "seed": seed}
    with sampling(model, prompts, k, **settings) as sampler, tqdm(
        total=len(prompts), desc="sampling answers", unit="prompt", disable=not progress
    ) as bar:  # fmt: skip
        for rows in by_length([len(prompt) for prompt in prompts], batch_size):
            for row, own in zip(rows, sampler.draw([prompts[row] for row in rows])[0], strict=True):
                answers[row] = own
            bar.update(len(rows))
    return Samples(answers, [sum(answer[-1] != eos_id for answer in own) for own in answers])


def _generate(
    model: PreTrainedModel, prompts: Tokens, k: int, config: GenerationConfig, recorder: _Recorder | None
) -> list[list[int]]:
    """`generate` of k answers to each prompt; the keys and values of a prompt are made once and repeated."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[config.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    cache = None
    name = "cache" if "cache" in signature(model.base_model.forward).parameters else "past_key_values"  # before 5.24
    # the last token of a prompt is left to generate(), which goes on from what the cache holds
    if k > 1 and width > 1 and supports_shared_prefix(model):
        positions = (mask[:, :-1].cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        model.base_model(
            input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions, use_cache=True, **{name: cache}
        )  # fmt: skip
        cache.batch_repeat_interleave(k)
    ids, mask = ids.repeat_interleave(k, dim=0), mask.repeat_interleave(k, dim=0)
    out = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, **{name: cache},
        logits_processor=None if recorder is None else LogitsProcessorList([recorder]),
    )  # fmt: skip
    if recorder is not None:
        recorder.drew(out[:, -1])
    return out[:, width:].tolist()


def _until_end(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens
