"""Change β after training: sample from a policy a times as far from the reference as the trained one.

Each token is sampled from log π_ref + a·(log π − log π_ref), normalised at each step (DeRa, Liu et al. 2024,
arXiv:2402.02992): a = 0 is the reference, a = 1 the policy, and a may differ per prompt. So a sweep of β, and any β(x),
needs no further training and uses the same weights.

Tilting per token differs from tilting per answer. Let π_a(y) ∝ π_ref(y)^(1−a)·π(y)^a over whole answers: the optimum
of the standard form with β/a. The policy tilted per token is

    π̂_a(y) = π_ref(y)^(1−a)·π(y)^a / Π_t Z_t(y_<t),    Z_t = Σ_v π_ref(v|y_<t)^(1−a)·π(v|y_<t)^a

The two agree where Π_t Z_t is the same for all answers: at a = 0 and 1, and for answers of one token. Otherwise the
per-token policy ignores which continuations a token leads to. So the measured E[r] and KL of the curves here are those
of π̂_a; the exact derivatives of `dpoviz.tabular.tilt_moments` are those of π_a.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from dpoviz.data.tasks import reward as task_reward
from dpoviz.lm.forward import context_length, language_model
from dpoviz.lm.packing import Tokens, by_length
from dpoviz.lm.processes import hidden
from dpoviz.lm.scoring import score_both
from dpoviz.lm.trial import evaluating


def tilted_logps(logits: Tensor, ref_logits: Tensor, a: float | Tensor) -> Tensor:
    """Return the next-token log-probabilities of the tilted policy.

        log π̂_a = log_softmax(log π_ref + a·(log π − log π_ref))

    Args:
        logits: (..., V) logits or log-probabilities of the policy.
        ref_logits: (..., V) logits or log-probabilities of the reference.
        a: a number, or a tensor that broadcasts against (...).

    Returns:
        (..., V) nats, at least float32.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logps, ref_logps = logits.to(dtype).log_softmax(-1), ref_logits.to(dtype).log_softmax(-1)
    if isinstance(a, Tensor):
        a = a.to(logps)[..., None]
    # if both give a token probability 0, −inf − (−inf) is nan
    direction = (logps - ref_logps).masked_fill(ref_logps == -torch.inf, 0.0)
    return (ref_logps + a * direction).log_softmax(-1)


class Retilted(NamedTuple):
    """Answers of a tilted policy with per-token scores.

    Attributes:
        answers: K answers per prompt as token ids, with the end token if it was sampled.
        logps: for each token, its log-probability under the tilted policy, nats.
        policy_logps: the same under the policy.
        ref_logps: the same under the reference.
        step_kls: for each token, the exact KL(π̂_a‖π_ref) of the next-token distributions it was sampled from, nats.
            The sum over an answer is an unbiased estimate of the KL over answers, with less variance than the
            log-ratio.
        truncated: per prompt, the number of answers that hit the limit before the end token.
    """

    answers: list[list[list[int]]]
    logps: list[list[list[float]]]
    policy_logps: list[list[list[float]]]
    ref_logps: list[list[list[float]]]
    step_kls: list[list[list[float]]]
    truncated: list[int]


def sample_retilted(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompts: Tokens,
    k: int,
    *,
    a: float | Sequence[float] | Tensor,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    seed: int,
    batch_size: int = 64,
    progress: bool = False,
) -> Retilted:
    """Sample K answers per prompt from log π_ref + a·(log π − log π_ref), at temperature 1, nothing cut off.

    Both models run in parallel, each with its KV cache; rows that have ended leave the batch.

    Args:
        policy: a causal language model, also with PEFT adapters; its training mode is restored afterwards.
        reference: the model it was trained from, on the same device. A PEFT policy may be its own reference: its
            adapter is then turned off.
        prompts: B prompts as token ids.
        k: answers per prompt.
        a: finite factor, one for all prompts or one per prompt.
        max_new_tokens: limit of an answer, in tokens.
        eos_id: token that ends an answer.
        pad_id: padding token; it is masked.
        seed: random seed; the caller's random state is unchanged.
        batch_size: prompts per batch; `batch_size` × K sequences are in memory, with two KV caches.
        progress: show a progress bar.

    Raises:
        ValueError: k, max_new_tokens or batch_size is below 1; there are no prompts or an empty one; `a` is not
            finite, or not one per prompt; the vocabularies differ; `reference` is a policy without an adapter; an
            adapter is a prompt-tuning one; a prompt leaves no room for `max_new_tokens`.
    """
    for name, value in (("k", k), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected an integer of at least 1")
    if len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts: got none, or an empty one, expected at least one token each")
    factors = _factors(a, len(prompts))
    models = _Models(policy, reference)
    models.require_room(max(map(len, prompts)), max_new_tokens)
    generator = torch.Generator(device=policy.device).manual_seed(seed)
    found: list[_Drawn | None] = [None] * (len(prompts) * k)
    with (
        evaluating(policy), evaluating(reference), torch.no_grad(),
        tqdm(total=len(prompts), desc="sampling answers", unit="prompt", disable=hidden(progress)) as bar,
    ):  # fmt: skip
        for rows in by_length([len(prompt) for prompt in prompts], batch_size):
            places = [row * k + i for row in rows for i in range(k)]
            drawn = _decode(
                models,
                [prompts[row] for row in rows for _ in range(k)],
                torch.tensor([factors[row] for row in rows for _ in range(k)]),
                max_new_tokens=max_new_tokens,
                eos_id=eos_id,
                pad_id=pad_id,
                generator=generator,
            )
            for place, own in zip(places, drawn, strict=True):
                found[place] = own
            bar.update(len(rows))
    columns: list[Any] = [
        [[getattr(own, name) for own in found[start : start + k]] for start in range(0, len(found), k)]
        for name in _Drawn._fields
    ]
    truncated = [sum(answer[-1] != eos_id for answer in own) for own in columns[0]]
    return Retilted._make([*columns, truncated])


def _factors(a: float | Sequence[float] | Tensor, prompts: int) -> list[float]:
    values = a.tolist() if hasattr(a, "tolist") else a
    values = [values] * prompts if isinstance(values, int | float) else list(values)
    if len(values) != prompts or not all(np.isfinite(value) for value in values):
        raise ValueError(f"a: got {a!r}, expected a finite number, or one for each of {prompts} prompts")
    return [float(value) for value in values]


class _Drawn(NamedTuple):
    """One sampled answer, with the per-token fields of `Retilted`."""

    answer: list[int]
    logps: list[float]
    policy_logps: list[float]
    ref_logps: list[float]
    step_kls: list[float]


class _Models:
    """Policy and reference as functions from tokens to next-token logits."""

    def __init__(self, policy: Any, reference: Any) -> None:  # models, or PEFT's around them
        if reference is policy and not hasattr(policy, "disable_adapter"):
            raise ValueError("reference: got the policy itself, without an adapter to turn off; expected another model")
        for name, model in (("policy", policy), ("reference", reference)):
            if hasattr(model, "active_peft_config") and model.active_peft_config.is_prompt_learning:
                raise ValueError(
                    f"{name}: got a prompt-tuning adapter, which shifts positions; expected one such as LoRA"
                )
        sizes = [model.config.get_text_config().vocab_size for model in (policy, reference)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"reference: got a vocabulary of {sizes[1]}, expected the policy's {sizes[0]}")
        self.both = (policy, reference)
        self.adapter_off = policy.disable_adapter if reference is policy else nullcontext

    def require_room(self, longest: int, max_new_tokens: int) -> None:
        for model in self.both:
            room = context_length(model)
            if room is not None and longest + max_new_tokens > room:
                raise ValueError(
                    f"max_new_tokens: got {max_new_tokens}, but a prompt has {longest} tokens and the context {room}; "
                    "expected fewer, or shorter prompts"
                )

    def caches(self) -> list[DynamicCache]:
        return [DynamicCache(config=model.config) for model in self.both]

    def next_logits(self, ids: Tensor, mask: Tensor, caches: Sequence[DynamicCache]) -> tuple[Tensor, Tensor]:
        """Return (rows, V) logits of policy and reference after the (rows, T) tokens that are not yet in the caches."""
        logits = []
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        for model, cache, off in zip(self.both, caches, (nullcontext, self.adapter_off), strict=True):
            with off():
                out = model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                    **_arguments(model, cache),
                )  # fmt: skip
            logits.append(out.logits[:, -1])
        return logits[0], logits[1]


def _arguments(model: PreTrainedModel, cache: DynamicCache) -> dict[str, object]:
    """Return the cache under the model's argument name, and a request for the last logits only, if supported."""
    model = language_model(model)
    known = signature(model.forward).parameters
    name = "cache" if "cache" in signature(model.base_model.forward).parameters else "past_key_values"  # before 5.24
    return {name: cache} | ({"logits_to_keep": 1} if "logits_to_keep" in known else {})


def _decode(
    models: _Models, prompts: Tokens, a: Tensor, *, max_new_tokens: int, eos_id: int, pad_id: int,
    generator: torch.Generator,
) -> list[_Drawn]:  # fmt: skip
    """Sample one answer per prompt, in one batch padded on the left."""
    device = models.both[0].device
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    a = a.to(device)
    caches, rows = models.caches(), torch.arange(len(prompts), device=device)
    drawn = [_Drawn([], [], [], [], []) for _ in prompts]
    for _ in range(max_new_tokens):
        logits, ref_logits = models.next_logits(ids, mask, caches)
        logps = tilted_logps(logits, ref_logits, a)
        each = logits.to(logps.dtype).log_softmax(-1), ref_logits.to(logps.dtype).log_softmax(-1)
        probs = logps.exp()
        tokens = torch.multinomial(probs, 1, generator=generator)
        ratio = (logps - each[1]).masked_fill(probs == 0, 0.0)  # 0·inf is nan
        seen = [values.gather(1, tokens)[:, 0].tolist() for values in (logps, *each)]
        seen.append((probs * ratio).sum(1).tolist())
        for row, *values in zip(rows.tolist(), tokens[:, 0].tolist(), *seen, strict=True):
            for column, value in zip(drawn[row], values, strict=True):
                column.append(value)
        going = (tokens[:, 0] != eos_id).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(rows):  # drop the keys and values of ended rows
            for cache in caches:
                cache.batch_select_indices(going)
        ids, rows, a = tokens[going], rows[going], a[going]
        mask = torch.nn.functional.pad(mask[going], (0, 1), value=1)
    return drawn


def score_retilted(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompts: Tokens,
    answers: Sequence[Tokens],
    a: float,
    *,
    pad_id: int,
) -> Tensor:
    """Return the log-probability of given answers under the tilted policy; no gradient.

    Args:
        policy: as in `sample_retilted`.
        reference: as in `sample_retilted`.
        prompts: B prompts as token ids.
        answers: K answers per prompt as token ids.
        a: the factor.
        pad_id: padding token.

    Returns:
        (B, K, 3) log π̂_a, log π and log π_ref of each answer, nats, float64. The difference log π − log π_ref is the h
        of `dpoviz.allocation.reward_per_nat`.

    Raises:
        ValueError: as in `dpoviz.lm.scoring.score_both`; `a` is not finite.
    """
    (a,) = _factors(a, 1)

    def score(logits: Tensor, ref_logits: Tensor, targets: Tensor) -> Tensor:
        logps = (tilted_logps(logits, ref_logits, a), logits.log_softmax(-1), ref_logits.log_softmax(-1))
        return torch.cat([values.gather(-1, targets[:, None]) for values in logps], -1)

    return score_both(policy, reference, prompts, answers, score, pad_id=pad_id)


def retilt_table(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Any],
    a: Sequence[float],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 64,
    reward: Callable[[Any, str], float] | None = task_reward,
    prompt_ids: Tokens | None = None,
    eos_id: int | None = None,
    progress: bool | str = False,
) -> pd.DataFrame:
    """Sample answers along a sweep of a, and measure reward and KL.

    Args:
        policy: as in `sample_retilted`.
        reference: as in `sample_retilted`.
        tokenizer: tokenizer of both models.
        problems: objects with `task`, `prompt` and whatever `reward` needs, such as `dpoviz.data.tasks.Problem`.
        a: factors of the sweep; include 0, the reference, for `at_equal_kl`.
        samples: answers per prompt and factor.
        max_new_tokens: limit of an answer, in tokens.
        seed: random seed; each factor gets its own, counted up from this one.
        batch_size: prompts per batch.
        reward: reward of an answer, given its problem; None if there is none, which leaves the column `reward` out.
        prompt_ids: token ids of the prompts, such as of rendered chats; None tokenises each problem's `prompt`.
        eos_id: token that ends an answer; None: the tokenizer's.
        progress: show a progress bar; a text is its label.

    Returns:
        A row per factor, prompt and answer: a, task, prompt, answer (text), reward, h (log π − log π_ref of the answer,
        nats), kl (exact next-token KL(π̂_a‖π_ref) summed along the answer, nats; its mean estimates the KL), length
        (tokens), truncated. The rows of one factor are an input of `reward_per_nat`.

    Raises:
        ValueError: there are no problems or no factors, a factor occurs twice, or as in `sample_retilted`.
    """
    if len(problems) == 0:
        raise ValueError("problems: got none, expected at least one")
    factors = _factors(list(a), len(list(a)))
    if not factors or len(set(factors)) != len(factors):
        raise ValueError(f"a: got {factors}, expected different numbers, at least one")
    prompts = tokenizer([problem.prompt for problem in problems])["input_ids"] if prompt_ids is None else prompt_ids
    if len(prompts) != len(problems):
        raise ValueError(f"prompt_ids: got {len(prompts)} prompts, expected those of {len(problems)} problems")
    end = tokenizer.eos_token_id if eos_id is None else eos_id
    rows = []
    label = progress if isinstance(progress, str) else "sweep of a"
    for number, factor in enumerate(tqdm(factors, desc=label, disable=hidden(bool(progress)))):
        drawn = sample_retilted(
            policy,
            reference,
            prompts,
            samples,
            a=factor,
            max_new_tokens=max_new_tokens,
            eos_id=end,
            pad_id=tokenizer.pad_token_id,
            seed=seed + number,
            batch_size=batch_size,
        )
        for i, problem in enumerate(problems):
            # not every end token counts as special
            ids = [own[:-1] if own[-1] == end else own for own in drawn.answers[i]]
            for j, text in enumerate(tokenizer.batch_decode(ids, skip_special_tokens=True)):
                rows.append(
                    {
                        "a": factor,
                        "task": problem.task,
                        "prompt": problem.prompt,
                        "answer": text,
                        **({} if reward is None else {"reward": float(reward(problem, text))}),
                        "h": sum(drawn.policy_logps[i][j]) - sum(drawn.ref_logps[i][j]),
                        "kl": sum(drawn.step_kls[i][j]),
                        "length": len(drawn.answers[i][j]),
                        "truncated": drawn.answers[i][j][-1] != end,
                    }
                )
    return pd.DataFrame(rows)


def reward_kl_curves(table: pd.DataFrame) -> pd.DataFrame:
    """Average the reward and KL of a sweep by task and factor.

    Args:
        table: output of `retilt_table`.

    Returns:
        A row per task and factor, sorted by factor within a task: task, a, reward (if the table has it), kl (nats per
        answer), their standard errors over prompts reward_se and kl_se (nan for a single prompt), and n, the number of
        prompts. All factors share the prompts, so differences along a curve are more certain than these standard errors
        suggest. They do not cover variation between training runs.
    """
    columns = [column for column in ("reward", "kl") if column in table]
    by_prompt = table.groupby(["task", "a", "prompt"], sort=False)[columns].mean()
    groups = by_prompt.groupby(["task", "a"], sort=False)
    found = groups.mean().join(groups.sem().add_suffix("_se"))
    found["n"] = groups.size()
    found = found.reset_index()
    order = {task: number for number, task in enumerate(found["task"].unique())}
    return found.sort_values(["task", "a"], key=lambda c: c.map(order) if c.name == "task" else c, ignore_index=True)


class Allocated(NamedTuple):
    """An allocation scaled to a KL budget.

    Attributes:
        multiple: multiple of the direction at which the mean KL equals the budget.
        a: factor per task.
        reward: weighted mean over tasks.
        kl: weighted mean over tasks, nats.
    """

    multiple: float
    a: dict[object, float]
    reward: float
    kl: float


def at_equal_kl(
    curves: pd.DataFrame,
    direction: Mapping[object, float],
    budget: float,
    *,
    weight: Mapping[object, float] | None = None,
    cap: bool = False,
) -> Allocated:
    """Scale an allocation over tasks until its mean KL equals a budget, using the curves of a sweep.

    Reward and KL are interpolated linearly between the factors of the sweep. Direction 1 for all tasks is a constant β;
    the direction of `dpoviz.allocation.allocate` is its column a.

    Args:
        curves: output of `reward_kl_curves`, including factor 0.
        direction: non-negative factor per task, not all 0.
        budget: mean KL, nats.
        weight: for each task, its weight in the means; None: all equal.
        cap: keep a task that would go beyond the end of the sweep at its end, while the others go on.

    Raises:
        ValueError: the tasks differ from the curves', a direction is negative or all are 0, the sweep lacks 0, or it
            does not reach the budget.
    """
    parts = {task: part.sort_values("a") for task, part in curves.groupby("task", sort=False)}
    if set(parts) != set(direction):
        raise ValueError(f"direction: got tasks {sorted(map(str, direction))}, expected {sorted(map(str, parts))}")
    if min(direction.values()) < 0 or not max(direction.values()) > 0:
        raise ValueError(f"direction: got {dict(direction)}, expected numbers of at least 0 and not all of them 0")
    if weight is not None and set(weight) != set(parts):
        raise ValueError(f"weight: got tasks {sorted(map(str, weight))}, expected {sorted(map(str, parts))}")
    if any(part["a"].min() > 0 for part in parts.values()):
        raise ValueError("curves: got no factor 0, expected the reference as the start of each curve")
    names = list(parts)
    lines = [Line(*(part[name].to_numpy(float) for name in ("a", "reward", "kl"))) for part in parts.values()]
    multiple, reward, kl = reach(
        lines,
        [float(direction[task]) for task in names],
        budget,
        weights=[1.0 if weight is None else float(weight[task]) for task in names],
        cap=cap,
    )
    factors = {task: min(multiple * direction[task], line.a[-1]) for task, line in zip(names, lines, strict=True)}
    return Allocated(multiple, factors, reward, kl)


class Line(NamedTuple):
    """The curve of one task: (F,) factors in ascending order from 0, and the reward and the KL at each."""

    a: np.ndarray
    reward: np.ndarray
    kl: np.ndarray


def reach(
    lines: Sequence[Line], direction: Sequence[float], budget: float, *, weights: Sequence[float], cap: bool
) -> tuple[float, float, float]:
    """Return the first multiple of a direction whose mean KL is the budget, and the mean reward and KL there.

    As `at_equal_kl`, on arrays and unchecked.
    """
    # between these multiples every curve, and so their mean, is a straight line
    knots = [line.a / own for line, own in zip(lines, direction, strict=True) if own > 0]
    end = (max if cap else min)(own[-1] for own in knots)
    multiples = np.unique(np.concatenate(knots))
    multiples = multiples[multiples <= end]

    def mean(at: np.ndarray | float, column: str) -> np.ndarray:
        # np.interp holds the last value beyond the end
        values = [
            np.interp(at * own, line.a, getattr(line, column)) for line, own in zip(lines, direction, strict=True)
        ]
        return np.average(values, axis=0, weights=weights)

    # KL increases with a except for sampling noise
    spent = mean(multiples, "kl")
    if not (spent >= budget).any():
        raise ValueError(f"budget: got {budget} nats, expected at most {spent.max():.4g}, where the sweep ends")
    i = int(np.argmax(spent >= budget))
    multiple = multiples[i] if i == 0 else float(np.interp(budget, spent[i - 1 : i + 1], multiples[i - 1 : i + 1]))
    return float(multiple), float(mean(multiple, "reward")), float(mean(multiple, "kl"))
