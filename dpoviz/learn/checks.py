"""Check the answers to the exercises: call the reader's function, and name the mistake in a sentence.

Each check calls the reader's function on fixed float64 numbers and compares the result with the right answer and with
the value that each known mistake gives. The numbers are chosen such that no two of these agree. The right number is not
enough: the check also compares the gradients by autograd with their closed forms, goes to |h| = 2000 in float32, and
looks for arguments changed in place. All expected values are computed here, not by the library. An exception in the
reader's function becomes a sentence, so that the notebook continues; a function that returns nothing counts as not
begun.
"""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple, NoReturn

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from dpoviz.forms import Form
from dpoviz.translation import say

# float32 answers are accepted (relative error 1e-7 per operation); two mistakes differ by more than 1e-3
_RTOL, _ATOL = 1e-5, 1e-6
# wider for gradients: an ε of 1e-8 beside a σ of 1e-4 changes them by 1e-4; the check at large |h| finds and names it
_GRADIENT_RTOL = 1e-3
# an answer this close, but outside the tolerance, contains an ε or was computed in half precision (3 digits)
_NEAR = 1e-2
_OTHER: dict[Form, Form] = {"inverse": "standard", "standard": "inverse"}
_SCALE = {"inverse": "1/β", "standard": "β"}


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    Attributes:
        right: True or False; None if the exercise is not begun.
        sentence: what is right, or which mistake was found and how to correct it.
    """

    right: bool | None
    sentence: str

    @property
    def mark(self) -> str:
        return {True: say("✓ Right."), False: say("✗ Not right."), None: say("… Not yet.")}[self.right]

    def __repr__(self) -> str:
        return f"{self.mark} {self.sentence}"

    def _repr_markdown_(self) -> str:
        return f"**{self.mark}** {self.sentence}"


class Mistake(NamedTuple):
    """A known wrong answer.

    Attributes:
        sentence: the explanation for the reader.
        value: the result of a function with this mistake.
    """

    sentence: str
    value: Tensor


class Answers(NamedTuple):
    """The numbers of an exercise.

    Attributes:
        args: the arguments of the reader's function.
        right: the right result.
        mistakes: the known wrong answers.
    """

    args: tuple
    right: Tensor
    mistakes: list[Mistake]


class _Stop(Exception):
    """Raised at the first mistake, to end a check with a verdict."""

    def __init__(self, right: bool | None, sentence: str) -> None:
        self.verdict = Verdict(right, sentence)


def _wrong(sentence: str, **values: object) -> NoReturn:
    raise _Stop(False, say(sentence, **values)) from None


def _check(body: Callable[..., Verdict]) -> Callable[..., Verdict]:
    @wraps(body)
    def check(*args, **kwargs) -> Verdict:
        try:
            return body(*args, **kwargs)
        except _Stop as stop:
            return stop.verdict

    return check


# -- calling the reader's function and comparing what it returns ---------------------------------------------


def _call(fn: Callable, *args: object) -> object:
    """Return the result of `fn`; an exception, None, or an argument changed in place ends the check.

    Tensors are passed as copies through which autograd still reaches the originals. After a RuntimeError, `fn` is
    called again in the other precision: `mask.float() @ logps` is right, but fails in float64.
    """
    failures = []
    for given in (_copies(args), _copies(args, other_precision=True)):
        before = _copies(given)
        try:
            got = fn(*given)
        except NotImplementedError:
            got = None
        except Exception as error:
            failures.append(_failure(error))
            if isinstance(error, RuntimeError):
                continue
            break
        if got is None or got is ...:
            name = getattr(fn, "__name__", "<lambda>")
            subject = say("Your function") if name == "<lambda>" else f"`{name}`"
            raise _Stop(
                None, say("{subject} returns nothing so far: write its body and run this cell again.", subject=subject)
            )
        for number, (now, was) in enumerate(zip(given, before, strict=True), start=1):
            if isinstance(now, Tensor) and not torch.equal(now, was):
                _wrong(
                    "Your function changes its argument {number} in place, and the caller still needs it: copy it.",
                    number=number,
                )
        return got
    raise failures[0]


def _copies(args: Sequence[object], *, other_precision: bool = False) -> list:
    other = {torch.float64: torch.float32, torch.float32: torch.float64} if other_precision else {}
    return [a.clone().to(other.get(a.dtype, a.dtype)) if isinstance(a, Tensor) else a for a in args]


def _failure(error: Exception) -> _Stop:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__ and frame.line]
    where = " " + say("at `{line}`", line=frames[0].line) if frames else ""
    return _Stop(
        False,
        say("Your function stopped with {type}: {error}{where}", type=type(error).__name__, error=error, where=where),
    )


def _is_torch(got: object) -> bool:
    """Return True if a gradient could reach the result: it cannot through numpy or plain numbers."""
    return isinstance(got, Tensor) or (isinstance(got, (list, tuple)) and any(map(_is_torch, got)))


def _tensor(got: object, name: str) -> Tensor:
    """Return `got` in float64, with its gradient; lists of tensors are stacked."""
    if isinstance(got, (list, tuple)) and _is_torch(got):
        parts = [_tensor(part, name) for part in got]
        if any(part.shape != parts[0].shape for part in parts):
            _wrong(
                "{name}: got parts of shapes {shapes}, expected one tensor.",
                name=name,
                shapes=[tuple(part.shape) for part in parts],
            )
        return torch.stack(parts)
    try:
        return torch.as_tensor(got).to(torch.float64)
    except (TypeError, ValueError, RuntimeError):
        _wrong("{name}: got {type}, expected a tensor of numbers.", name=name, type=type(got).__name__)


def _same(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=_RTOL, atol=_ATOL)


def _compare(name: str, got: object, right: Tensor, mistakes: Sequence[Mistake]) -> None:
    """End the check, unless `got` is right, with the sentence of its mistake or with its most wrong entry."""
    value = _tensor(got, name).detach()
    if _same(value, right):
        return
    for sentence, wrong in mistakes:
        if _same(value, wrong):
            _wrong(sentence)
    if value.shape == (*right.shape, 1) and _same(value[..., 0], right):
        _wrong(
            "{name}: got a column {shape}, expected {expected}: no `keepdim`, no last axis.",
            name=name,
            shape=tuple(value.shape),
            expected=tuple(right.shape),
        )
    if value.shape != right.shape:
        _wrong(
            "{name}: got shape {shape}, expected {expected}.",
            name=name,
            shape=tuple(value.shape),
            expected=tuple(right.shape),
        )
    dtype = got.dtype if isinstance(got, Tensor) else torch.float64
    if dtype not in (torch.float32, torch.float64):
        _wrong(
            "{name}: got {dtype}, expected float32 or float64: keep the precision of the arguments.",
            name=name,
            dtype=dtype,
        )
    gap = torch.nan_to_num((value - right).abs(), nan=torch.inf)
    at = _furthest(gap)
    hint = say("it is none of the usual mistakes")
    if (gap <= _NEAR * right.abs()).all():
        hint = say("it is near, but not equal: an ε is added, or numbers were rounded to half precision")
    _wrong(
        "{entry}: got {value:.6g}, expected {right:.6g}; {hint}.",
        entry=_entry(name, at),
        value=value[at].item(),
        right=right[at].item(),
        hint=hint,
    )


def _furthest(gap: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))


def _entry(name: str, at: Sequence[int]) -> str:
    return f"{name}[{', '.join(map(str, at))}]" if at else name


def _gradient(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of a scalar with respect to each input, zero if none arrives."""
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    try:
        found = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)
    except RuntimeError as error:
        _wrong("The numbers are right, but autograd cannot take their gradient: {error}", error=error)
    return [torch.zeros_like(x) if g is None else g.detach() for g, x in zip(found, inputs, strict=True)]


def _jacobians(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return ∂value/∂input, of shape (*value.shape, *input.shape), for each input."""
    rows = [_gradient(entry, inputs) for entry in value.flatten()]
    columns = zip(*rows, strict=True)
    return [torch.stack(column).reshape(*value.shape, *x.shape) for column, x in zip(columns, inputs, strict=True)]


def _compare_gradient(
    name: str, by: str, got: Tensor, right: Tensor, *, missing: str | None = None, hint: str = "", dims: int = 1
) -> None:
    """End the check unless the Jacobian of `name` with respect to `by` is `right`.

    Args:
        name: name of the differentiated result.
        by: name of the input.
        got: the Jacobian by autograd, zero where no gradient arrives.
        right: the closed form of the Jacobian.
        missing: the sentence if no gradient arrives at all; None if that is allowed.
        hint: the explanation that follows the numbers if they differ.
        dims: number of axes of the result, the first axes of the Jacobian.
    """
    if torch.allclose(got, right, rtol=_GRADIENT_RTOL, atol=_ATOL):
        return
    if not got.any():
        if missing is None:
            return
        _wrong(missing)
    if torch.allclose(got, -right, rtol=_GRADIENT_RTOL, atol=_ATOL):
        _wrong("The numbers are right, but the gradient with respect to {by} has the wrong sign.", by=by)
    at = _furthest(torch.nan_to_num((got - right).abs(), nan=torch.inf))
    derivative = f"∂{_entry(name, at[:dims])}/∂{_entry(by, at[dims:])}"
    hint = hint or say("a part of it was detached or replaced")
    _wrong(
        "The numbers are right, but their gradient is not: {derivative} is {got:.6g}, expected {right:.6g}; {hint}.",
        derivative=derivative,
        got=got[at].item(),
        right=right[at].item(),
        hint=hint,
    )


def _rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def _softplus(z: Tensor) -> Tensor:
    """Return −log σ(−z), stable for any z."""
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))


def _scale(beta: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Return s and ds/dβ."""
    return (1 / beta, -1 / beta**2) if form == "inverse" else (beta, torch.ones_like(beta))


class _Far(NamedTuple):
    """Pairs with large |h|: every β is a power of two, so that s·h is exact in float32."""

    h: Tensor
    beta: Tensor

    @classmethod
    def pairs(cls) -> _Far:
        # σ rounds to 1 in float32 from s·h = 17 on, exp(s·h) is infinite from 89 on (710 in float64)
        rows = itertools.product((30.0, -30.0, 100.0, -100.0, 2000.0, -2000.0), (1.0, 1 / 16, 16.0))
        return cls(*torch.tensor(list(rows), dtype=torch.float32).T)

    def first_wrong(self, got: Tensor, right: Tensor, size: Tensor | float = 1.0) -> int | None:
        """Return the first row whose error exceeds the rounding in float32 of numbers of magnitude `size`."""
        off = ~((got - right).abs() <= 1e-4 * right.abs() + 1e-6 * size)  # NaN counts as off
        return int(off.nonzero()[0]) if off.any() else None

    def place(self, row: int) -> str:
        return say("h = {h:g}, β = {beta:g}", h=self.h[row].item(), beta=self.beta[row].item())


# -- the loss ------------------------------------------------------------------------------------------------


def completion_logps_answers() -> Answers:
    """Return the numbers of `check_completion_logps`."""
    logps = -torch.tensor([[0.3, 1.1, 0.7, 2.3], [1.9, 0.2, 0.5, 0.8], [0.6, 1.4, 2.9, 0.1]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True, False], [True, True, True, True], [False, False, True, False]])
    kept = logps * mask
    right = kept.sum(dim=1)
    early = say("The mask is off by one: it meets the token before its own. `mask[t]` belongs to `logps[t]`.")
    late = say("The mask is off by one: it meets the token after its own. `mask[t]` belongs to `logps[t]`.")
    last = torch.stack([row[m][-1] for row, m in zip(logps, mask, strict=True)])
    mistakes = [
        Mistake(
            "You average over the tokens where the equation sums: log π(y|x) = Σ_t log π(y_t|x, y_<t). A mean "
            "divides h by the length of the answer, which is a hidden, different β for every pair.",
            right / mask.sum(1),
        ),
        Mistake("You divide by the padded length: the equation sums, and padding has no part in it.", kept.mean(dim=1)),
        Mistake(
            "The mask is not used: prompt and padding tokens are counted as if they were the answer.", logps.sum(dim=1)
        ),
        Mistake("The mask is the wrong way round: you sum what is not the answer.", (logps * ~mask).sum(dim=1)),
        Mistake("You sum over the batch as well: keep one number per answer.", right.sum()),
        Mistake("You average over the batch as well: keep one number per answer.", right.mean()),
        Mistake("You sum over the batch (axis 0); the tokens of one answer lie along axis 1.", kept.sum(dim=0)),
        Mistake("The sign is flipped: log-probabilities are negative.", -right),
        Mistake("You did not sum: one number per token, expected one per answer.", kept),
        Mistake(early, (logps[:, :-1] * mask[:, 1:]).sum(dim=1)),
        Mistake(early, (logps.roll(1, dims=1) * mask).sum(dim=1)),
        Mistake(late, (logps[:, 1:] * mask[:, :-1]).sum(dim=1)),
        Mistake(late, (logps.roll(-1, dims=1) * mask).sum(dim=1)),
        Mistake("These are sums of probabilities: the logarithms are summed, Σ_t log π.", (logps.exp() * mask).sum(1)),
        Mistake("This is the probability π(y|x): return its logarithm.", right.exp()),
        Mistake("This is the last token alone: the answer is all of its tokens.", last),
    ]
    return Answers((logps, mask), right, mistakes)


@_check
def check_completion_logps(fn: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Check the reader's log π(y|x) = Σ_t log π(y_t|x, y_<t), and that a policy can be trained with it.

    Args:
        fn: (token_logps (B, T), completion_mask (B, T) bool) → (B,).

    Returns:
        The verdict.
    """
    (logps, mask), right, mistakes = completion_logps_answers()
    got = _call(fn, logps, mask)
    _compare("logps", got, right, mistakes)
    long = _tensor(_call(fn, torch.full((1, 1000), -3.0, dtype=torch.float64), torch.ones(1, 1000).bool()), "logps")
    if long.isinf().any():
        _wrong(
            "Right for 4 tokens, but for an answer of 1000 tokens of −3 each it is −∞, expected "
            "−3000: a product of probabilities rounds to 0. Sum the log-probabilities."
        )
    _compare(say("logps of 1000 tokens"), long, _rows(-3000.0), [])
    praise = say("The log-probability of an answer is the sum over its own tokens.")
    if not _is_torch(got):
        return Verdict(
            True, say("{praise} But only torch carries a gradient: in training this one would stop it.", praise=praise)
        )
    (leaf,) = _leaves(logps)
    (jacobian,) = _jacobians(_tensor(_call(fn, leaf, mask), "logps"), [leaf])
    expected = torch.eye(len(mask), dtype=torch.float64)[:, :, None] * mask
    missing = say(
        "The numbers are right, but no gradient reaches token_logps, so they could not train "
        "a policy: `.detach()`, `.item()`, `torch.no_grad()` and `torch.tensor([...])` cut "
        "it off."
    )
    _compare_gradient("logps", "token_logps", jacobian, expected, missing=missing)
    return Verdict(True, praise)


_DPO_ARGS = (
    _rows(-3.1, -7.4, -2.2, -11.3),
    _rows(-4.0, -6.1, -6.3, -10.2),
    _rows(-3.9, -6.6, -3.0, -10.4),
    _rows(-3.3, -7.2, -5.1, -12.0),
    _rows(0.2, 0.5, 1.7, 3.1),
)


def _column() -> str:
    return say(
        "β has become a column (B, 1): against h of shape (B,) it broadcasts to (B, B), every β meeting every pair. "
        "Keep it (B,)."
    )


def dpo_loss_answers(form: Form) -> Answers:
    """Return the numbers of `check_dpo_loss` for the losses."""
    chosen, rejected, ref_chosen, ref_rejected, beta = _DPO_ARGS
    h = (chosen - ref_chosen) - (rejected - ref_rejected)  # 1.5, -1.9, 2.0, -2.7
    s, mean, other = _scale(beta, form)[0], _scale(beta.mean(), form)[0], _scale(beta, _OTHER[form])[0]
    losses = _softplus(-s * h)
    matrix = _softplus(-s[:, None] * h)
    mistakes = [
        Mistake(
            say(
                "β and 1/β are swapped: this is the {other} form, s = {scale}; the {form} form has s = {scale2}.",
                other=_OTHER[form],
                scale=_SCALE[_OTHER[form]],
                form=form,
                scale2=_SCALE[form],
            ),
            _softplus(-other * h),
        ),
        Mistake(
            "Chosen and rejected are swapped (or the sign of h is): the loss falls as the policy comes to prefer the "
            "rejected answer.",
            _softplus(s * h),
        ),
        Mistake("β is missing from the loss: this is −log σ(h).", _softplus(-h)),
        Mistake(
            "The reference is missing: h compares each log-probability with the reference's.",
            _softplus(-s * (chosen - rejected)),
        ),
        Mistake(
            "The reference has the wrong sign: it is added, or the two references are swapped.",
            _softplus(-s * ((chosen + ref_chosen) - (rejected + ref_rejected))),
        ),
        Mistake("The minus sign is missing: log σ is negative, the loss is −log σ.", -losses),
        Mistake("The logarithm is missing: the loss is −log σ(s·h), this is −σ(s·h).", -torch.sigmoid(s * h)),
        Mistake("The logarithm is missing: this is σ(−s·h), the weight of the pair.", torch.sigmoid(-s * h)),
        Mistake("log σ is missing: this is −s·h.", -s * h),
        Mistake("The losses are averaged already: return one per pair, (B,); the mean is the caller's.", losses.mean()),
        Mistake("The losses are summed already: return one per pair, (B,).", losses.sum()),
        Mistake(_column(), matrix),
        Mistake(_column(), matrix.T),
        Mistake(say("{column} (You averaged the matrix, which hides it.)", column=_column()), matrix.mean()),
        Mistake(say("{column} (You averaged the matrix, which hides it.)", column=_column()), matrix.mean(0)),
        Mistake(say("{column} (You averaged the matrix, which hides it.)", column=_column()), matrix.mean(1)),
        Mistake(
            "One β, their mean, is used for all pairs: each pair has the β of its own prompt.", _softplus(-mean * h)
        ),
        Mistake(
            "One β, the first, is used for all pairs: each pair has the β of its own prompt.", _softplus(-s[0] * h)
        ),
        Mistake("This is the IPO loss, (h − 1/(2s))²: DPO has −log σ(s·h).", (h - 1 / (2 * s)).square()),
        Mistake("This is the hinge loss, max(0, 1 − s·h): DPO has −log σ(s·h).", (1 - s * h).clamp(min=0)),
        Mistake(
            "The labels are smoothed: the loss has no term −log σ(−s·h).",
            0.9 * _softplus(-s * h) + 0.1 * _softplus(s * h),
        ),
    ]
    return Answers(_DPO_ARGS, losses, mistakes)


def dpo_rewards_answers(form: Form) -> Answers:
    """Return the numbers of `check_dpo_loss` for the rewards (2, B) of chosen and rejected."""
    chosen, rejected, ref_chosen, ref_rejected, beta = _DPO_ARGS
    logps, refs = torch.stack([chosen, rejected]), torch.stack([ref_chosen, ref_rejected])
    ratios = logps - refs
    s, mean, other = _scale(beta, form)[0], _scale(beta.mean(), form)[0], _scale(beta, _OTHER[form])[0]
    used = say("the loss used s = {scale}", scale=_SCALE[form])
    mistakes = [
        Mistake(say("The rewards are without β: r̂ = s·log(π/π_ref), and {used}.", used=used), ratios),
        Mistake(
            say(
                "The rewards carry another β than the loss: they have s = {scale}, {used}.",
                scale=_SCALE[_OTHER[form]],
                used=used,
            ),
            other * ratios,
        ),
        Mistake(
            say("The rewards carry one β, the mean, for all prompts; {used} of each pair's own prompt.", used=used),
            mean * ratios,
        ),
        Mistake("The rewards lack the reference: r̂ = s·log(π/π_ref), not s·log π.", s * logps),
        Mistake(
            "The rewards have the reference added: log(π/π_ref) is a difference of logarithms.", s * (logps + refs)
        ),
        Mistake("The rewards are swapped: chosen comes first.", s * ratios.flip(0)),
        Mistake("The rewards have the wrong sign: r̂ = s·log(π/π_ref).", -s * ratios),
    ]
    return Answers(_DPO_ARGS, s * ratios, mistakes)


@_check
def check_dpo_loss(fn: Callable[..., tuple[Tensor, Tensor, Tensor]], *, form: Form) -> Verdict:
    """Check the reader's DPO loss −log σ(s·h) and rewards s·log(π/π_ref).

    Also checked: the gradients with respect to both log-probabilities of the policy and to β; that the rewards carry
    none; loss and gradients at |h| = 2000 in float32; and that a β of shape (B, 1) is refused, not broadcast.

    Args:
        fn: (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta), each
            (B,), → (losses, chosen_rewards, rejected_rewards), each (B,).
        form: the form that `fn` should have: "inverse" (s = 1/β) or "standard" (s = β).

    Returns:
        The verdict.
    """
    args, right, mistakes = dpo_loss_answers(form)
    chosen, rejected, beta = _leaves(args[0], args[1], args[4])
    losses, *rewards = _three(_call(fn, chosen, rejected, *args[2:4], beta))
    _compare("losses", losses, right, mistakes)
    for name, part in zip(("chosen_rewards", "rejected_rewards"), rewards, strict=True):
        shape = _tensor(part, name).shape
        if shape != right.shape:
            _wrong(
                "{name}: got shape {shape}, expected {expected}.",
                name=name,
                shape=tuple(shape),
                expected=tuple(right.shape),
            )
    _compare("rewards", rewards, *dpo_rewards_answers(form)[1:])
    _check_dpo_gradients(_tensor(losses, "losses"), (chosen, rejected, beta), args, form)
    if any(_tensor(part, "rewards").requires_grad for part in rewards):
        _wrong("The rewards carry a gradient: they are there to be looked at, detach them.")
    _check_dpo_far(fn, form)
    _check_column(fn, args, right)
    praise = say(
        "Loss and rewards of the {form} form, one β per prompt, stable for large |h|, and a column β is refused.",
        form=form,
    )
    return Verdict(True, praise + _check_dpo_start(fn, form))


def _three(got: object) -> Sequence[object]:
    if not isinstance(got, (tuple, list)) or len(got) != 3:
        _wrong("Return three things: losses, chosen_rewards, rejected_rewards, each of shape (B,).")
    return got


def _dpo_slopes(h: Tensor, beta: Tensor, form: Form) -> dict[str, Tensor]:
    """Return ∂ℓ/∂(input) = −σ(−s·h)·∂(s·h)/∂(input) for each input, at each pair."""
    s, ds = _scale(beta, form)
    weight = torch.sigmoid(-s * h)
    return {"policy_chosen_logps": -weight * s, "policy_rejected_logps": weight * s, "beta": -weight * h * ds}


def _check_dpo_gradients(losses: Tensor, leaves: Sequence[Tensor], args: Sequence[Tensor], form: Form) -> None:
    chosen, rejected, ref_chosen, ref_rejected, beta = args
    right = _dpo_slopes((chosen - ref_chosen) - (rejected - ref_rejected), beta, form)
    got = dict(zip(right, _jacobians(losses, leaves), strict=True))
    if not got["policy_chosen_logps"].any() and not got["policy_rejected_logps"].any():
        _wrong("The losses carry no gradient to the policy: something was detached that should not be.")
    missing = {
        side: say(
            "No gradient reaches policy_{side}_logps: the {side} side of h is detached, so the "
            "loss trains the other answer alone. Only the reference is a constant.",
            side=side,
        )
        for side in ("chosen", "rejected")
    }
    missing["beta"] = say(
        "No gradient reaches β: it is detached in the loss. Every number is right, and a "
        "learned β(x) would never move. Detach the rewards, not the loss."
    )
    for by, jacobian in got.items():
        sentence = missing[by.removeprefix("policy_").removesuffix("_logps")]
        _compare_gradient("losses", by, jacobian, torch.diag(right[by]), missing=sentence)


def _dpo_at(fn: Callable, h: Tensor, beta: Tensor, form: Form) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return the reader's losses at `h`, their gradients by input, and the right gradients by input."""
    zero = torch.zeros_like(h)
    leaves = _leaves(h.clamp(max=0), -h.clamp(min=0), beta)  # log-probabilities are not positive
    losses = _tensor(_three(_call(fn, *leaves[:2], zero, zero, leaves[2]))[0], "losses")
    if losses.shape != h.shape:
        _wrong(
            "losses: got shape {shape} for {count} pairs, expected {expected}.",
            shape=tuple(losses.shape),
            count=len(h),
            expected=tuple(h.shape),
        )
    right = _dpo_slopes(h.double(), beta.double(), form)
    got = [g.double() for g in _gradient(losses.sum(), leaves)]
    return losses.detach(), dict(zip(right, got, strict=True)), right


def _check_dpo_far(fn: Callable, form: Form) -> None:
    far = _Far.pairs()
    h, beta = far.h.double(), far.beta.double()
    s, ds = _scale(beta, form)
    losses, got, right = _dpo_at(fn, far.h, far.beta, form)
    expected = _softplus(-s * h)
    row = far.first_wrong(losses, expected)
    if row is not None:
        numbers = say(
            "Right for moderate h, but at {place} the loss is {got:g}, expected {right:g}",
            place=far.place(row),
            got=losses[row].item(),
            right=expected[row].item(),
        )
        if not math.isfinite(losses[row]):
            _wrong(
                "{numbers}: σ rounds to 0 and its logarithm is −∞, or exp overflows. Stay in log "
                "space: `torch.nn.functional.logsigmoid`.",
                numbers=numbers,
            )
        if losses[row] < expected[row] and (s * h)[row] < 0:
            _wrong(
                "{numbers}: an ε added to σ, or a clamp, caps the loss, and its gradient vanishes "
                "where the pair is most wrong. Stay in log space, without either: "
                "`torch.nn.functional.logsigmoid`.",
                numbers=numbers,
            )
        _wrong("{numbers}: h or β is clamped, or rounded to half precision.", numbers=numbers)
    sizes = {"policy_chosen_logps": s, "policy_rejected_logps": s, "beta": (h * ds).abs()}
    for by, size in sizes.items():
        row = far.first_wrong(got[by], right[by], size)
        if row is not None:
            _wrong(
                "The losses are right, but at {place} the gradient with respect to {by} is {got:g}, "
                "expected {right:g}: a clamp or a branch hides what the value does not show "
                "(`torch.where` has the gradient of both branches). Stay in log space: "
                "`torch.nn.functional.logsigmoid`.",
                place=far.place(row),
                by=by,
                got=got[by][row].item(),
                right=right[by][row].item(),
            )


def _check_dpo_start(fn: Callable, form: Form) -> str:
    """Return a remark if the gradient is wrong at h = 0, where |h| and max(0, h) have a kink; end the check if NaN."""
    h, beta = torch.zeros(2), torch.tensor([0.5, 2.0])
    losses, got, right = _dpo_at(fn, h, beta, form)
    if not torch.allclose(losses, _rows(math.log(2), math.log(2)), rtol=_RTOL, atol=_ATOL):
        _wrong(
            "At h = 0, where training starts: the loss is {losses:.6g}, expected log 2 = 0.693147.",
            losses=losses[0].item(),
        )
    if not all(torch.isfinite(g).all() for g in got.values()):
        _wrong("At h = 0, where training starts, the gradient is not finite: something is divided by h or by |h|.")
    by = "policy_chosen_logps"
    if all(torch.allclose(got[name], right[name], rtol=_RTOL, atol=_ATOL) for name in right):
        return ""
    return " " + say(
        "One remark: at h = 0 exactly, where training starts (the policy is the reference), "
        "autograd gives ∂loss/∂{by} = {got:g} instead of {right:g}, since |h| and max(0, h) "
        "have a kink there; with 0 the policy never leaves the reference. "
        "`torch.nn.functional.logsigmoid` has no kink.",
        by=by,
        got=got[by][0].item(),
        right=right[by][0].item(),
    )


def _check_column(fn: Callable, args: Sequence[Tensor], right: Tensor) -> None:
    *logps, beta = args
    try:
        got = fn(*_copies(logps), beta.clone()[:, None])
    except Exception:
        return
    if isinstance(got, (tuple, list)) and len(got) == 3 and _same(_tensor(got[0], "losses").detach(), right):
        _wrong(
            "Right for β of shape (B,), and a column (B, 1) is silently repaired; the exercise "
            "asks you to refuse it. Raise a ValueError: a column shows a mistake of the caller, "
            "who should hear of it."
        )
    _wrong(
        "Right for β of shape (B,), but β as a column (B, 1), which is what a linear layer "
        "returns, goes through: against h it broadcasts to (B, B), and the mean of that "
        "looks like a loss. Raise a ValueError for it."
    )


def beta_gradient_answers(form: Form) -> Answers:
    """Return the numbers of `check_beta_gradient` for a form."""
    h, beta = _rows(1.5, -0.8, 0.3, -2.2), _rows(0.4, 0.7, 2.5, 1.3)
    (s, ds), (other, other_ds) = _scale(beta, form), _scale(beta, _OTHER[form])
    weight = torch.sigmoid(-s * h)
    right = -weight * h * ds
    mistakes = [
        Mistake(
            say(
                "The sign is flipped ({form} form): −log σ falls where s·h grows, and 1/β falls where β grows.",
                form=form,
            ),
            -right,
        ),
        Mistake(
            say(
                "The weight is σ(−s·h), small where the pair is ranked correctly; you have σ(s·h) ({form} form).",
                form=form,
            ),
            -(1 - weight) * h * ds,
        ),
        Mistake(say("The factor h is missing ({form} form): s multiplies h inside the loss.", form=form), -weight * ds),
        Mistake(say("The weight σ(−s·h) is missing ({form} form): this is −h·ds/dβ.", form=form), -h * ds),
        Mistake(
            say(
                "β and 1/β are swapped in the {form} form: this is the {other} form's gradient.",
                form=form,
                other=_OTHER[form],
            ),
            -torch.sigmoid(-other * h) * h * other_ds,
        ),
        Mistake(
            say("This is ∂ℓ/∂h ({form} form): the factor next to the weight is h·ds/dβ, not s.", form=form), -weight * s
        ),
        Mistake(
            say("You divide by the batch ({form} form): this is the gradient of the mean of the losses.", form=form),
            right / 4,
        ),
        Mistake(say("You sum over the batch ({form} form): return one number per pair.", form=form), right.sum()),
        Mistake(say("You average over the batch ({form} form): return one number per pair.", form=form), right.mean()),
        Mistake(
            say("This is the loss −log σ(s·h) ({form} form); return its derivative.", form=form), _softplus(-s * h)
        ),
    ]
    if form == "inverse":
        mistakes += [
            Mistake("This is ∂ℓ/∂s: in the inverse form s = 1/β, and the chain rule adds ds/dβ = −1/β².", right / ds),
            Mistake("The factor is ds/dβ = −1/β² in the inverse form, not −1/β (which gives ∂ℓ/∂log β).", right * beta),
        ]
    else:
        mistakes.append(Mistake("This is ∂ℓ/∂log β (standard form): a factor β too many.", right * beta))
    return Answers((h, beta, form), right, mistakes)


@_check
def check_beta_gradient(fn: Callable[[Tensor, Tensor, Form], Tensor]) -> Verdict:
    """Check the reader's ∂ℓ/∂β = −σ(−s·h)·h·ds/dβ in both forms, up to |h| = 2000 in float32.

    Args:
        fn: (h (B,), beta (B,), form) → (B,).

    Returns:
        The verdict.
    """
    forms: tuple[Form, ...] = ("standard", "inverse")
    for form in forms:
        args, right, mistakes = beta_gradient_answers(form)
        _compare(say("gradient ({form})", form=form), _call(fn, *args), right, mistakes)
    far = _Far.pairs()
    for form in forms:
        got = _tensor(_call(fn, *far, form), say("gradient ({form})", form=form)).detach()
        right = _dpo_slopes(far.h.double(), far.beta.double(), form)["beta"]
        if got.shape != right.shape:
            _wrong(
                "gradient ({form}): got shape {shape} for {count} pairs, expected one per pair.",
                form=form,
                shape=tuple(got.shape),
                count=len(right),
            )
        row = far.first_wrong(got, right, (far.h * _scale(far.beta, form)[1]).abs())
        if row is not None:
            hint = "" if math.isfinite(got[row]) else ": " + say("exp overflows, and ∞/∞ or 0·∞ is no number")
            _wrong(
                "Right for moderate h, but at {place} ({form} form) the gradient is {got:g}, "
                "expected {right:g}{hint}. `torch.sigmoid(-s * h)` is right at any size.",
                place=far.place(row),
                form=form,
                got=got[row].item(),
                right=right[row].item(),
                hint=hint,
            )
    return Verdict(
        True,
        say("Correctly ranked pairs push s up in both forms: β up in the standard form, β down in the inverse form."),
    )


# -- the exact world -----------------------------------------------------------------------------------------


def optimal_policy_answers() -> Answers:
    """Return the numbers of `check_optimal_policy`."""
    ref = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, -0.4, 2.1], [0.3, 1.7, -0.9]], dtype=torch.float64)
    beta = 0.6
    weights = ref * torch.exp(rewards / beta)
    factors = torch.exp(rewards / beta)

    def normalised(w: Tensor) -> Tensor:
        return (w / w.sum(1, keepdim=True)).log()

    right = normalised(weights)
    mistakes = [
        Mistake(
            "Z is forgotten: the rows do not sum to 1. Subtract log Z(x) = log Σ_y π_ref(y|x) exp(r/β).", weights.log()
        ),
        Mistake(
            "One Z for the whole table: every prompt has its own, so sum over the answers of one row.",
            (weights / weights.sum()).log(),
        ),
        Mistake(
            "Z is summed over the prompts (axis 0); it is a sum over answers, axis 1.", (weights / weights.sum(0)).log()
        ),
        Mistake(
            "Z is the sum of exp(r/β) alone: it is weighted by the reference, Σ_y π_ref(y|x) exp(r/β).",
            (weights / factors.sum(1, keepdim=True)).log(),
        ),
        Mistake(
            "Z is a mean over the answers, expected the sum: the rows do not sum to 1.",
            (weights / weights.mean(1, keepdim=True)).log(),
        ),
        Mistake(
            "β and 1/β are swapped: π* ∝ π_ref·exp(r/β), the reward is divided by β.",
            normalised(ref * torch.exp(beta * rewards)),
        ),
        Mistake("β is missing: this is π_ref·exp(r)/Z.", normalised(ref * torch.exp(rewards))),
        Mistake("The reference is missing: this is the softmax of r/β.", normalised(factors)),
        Mistake(
            "The reference is divided by β too: only the reward is.",
            normalised((ref * torch.exp(rewards)) ** (1 / beta)),
        ),
        Mistake(
            "The sign of the reward is flipped: this policy prefers bad answers.",
            normalised(ref * torch.exp(-rewards / beta)),
        ),
        Mistake("These are probabilities; return log-probabilities.", right.exp()),
        Mistake(
            "π_ref is given as log-probabilities and used as probabilities: add it to r/β inside the exponential.",
            normalised(-ref.log() * factors),
        ),
        Mistake(
            "This is the greedy policy: all probability on one answer. π* is a softmax.",
            torch.nn.functional.one_hot(weights.argmax(1), 3).double(),
        ),
    ]
    return Answers((ref.log(), rewards, beta), right, mistakes)


@_check
def check_optimal_policy(fn: Callable[[Tensor, Tensor, float], Tensor]) -> Verdict:
    """Check the reader's π* = π_ref·exp(r/β)/Z, its gradient if it has one, and its stability at a small β.

    Args:
        fn: (ref_logps (X, Y), rewards (X, Y), beta number) → (X, Y) log-probabilities.

    Returns:
        The verdict.
    """
    (ref_logps, rewards, beta), right, mistakes = optimal_policy_answers()
    got = _call(fn, ref_logps, rewards, beta)
    _compare("log π*", got, right, mistakes)
    _check_small_beta(fn, ref_logps, rewards)
    if _is_torch(got):
        leaves = _leaves(ref_logps, rewards)
        followed = _followed(fn, *leaves, beta)
        if followed is not None:
            rows, same = torch.eye(2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
            slopes = rows[:, None, :, None] * (same[None, :, None, :] - right.exp()[:, None, None, :])
            by_ref, by_rewards = _jacobians(followed, leaves)
            _compare_gradient("log π*", "ref_logps", by_ref, slopes, dims=2)
            _compare_gradient("log π*", "rewards", by_rewards, slopes / beta, dims=2)
    return Verdict(True, say("π* = π_ref·exp(r/β)/Z, row by row, in log space."))


def _check_small_beta(fn: Callable, ref_logps: Tensor, rewards: Tensor) -> None:
    beta = 1e-3
    far = _tensor(_call(fn, ref_logps, rewards, beta), "log π*").detach()
    z = ref_logps + rewards / beta
    top = z - z.amax(dim=1, keepdim=True)
    expected = top - top.exp().sum(dim=1, keepdim=True).log()
    if _same(far, expected):
        return
    prefix = say("Right at β = 0.6, but at β = {beta}", beta=beta)
    stay = say("Stay in log space: log π_ref + r/β minus its `torch.logsumexp`.")
    if not torch.isfinite(far.amax(dim=1)).all():
        _wrong("{prefix} it is not finite: exp(r/β) overflows. {stay}", prefix=prefix, stay=stay)
    if not torch.isfinite(far).all():
        _wrong(
            "{prefix} it is not finite: a small probability rounds to 0, and its logarithm is −∞. {stay}",
            prefix=prefix,
            stay=stay,
        )
    at = _furthest((far - expected).abs())
    _wrong(
        "{prefix} {entry} is {far:g}, expected {expected:g}: an ε or a clamp holds small probabilities up. {stay}",
        prefix=prefix,
        entry=_entry("log π*", at),
        far=far[at].item(),
        expected=expected[at].item(),
        stay=stay,
    )


def _followed(fn: Callable, *args: object) -> Tensor | None:
    """Return the reader's tensor with its gradient; None if the function fails on tensors that require one."""
    try:
        return _tensor(_call(fn, *args), say("a returned value"))
    except _Stop:
        return None


def reward_difference_answers() -> Answers:
    """Return the numbers of `check_reward_difference`."""
    chosen, rejected = _rows(-0.4, -1.9, -1.1), _rows(-2.3, -0.7, -1.6)
    ref_chosen, ref_rejected = _rows(-1.2, -1.5, -0.8), _rows(-0.9, -1.0, -2.1)
    beta = 0.3
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    mistakes = [
        Mistake(
            "The reference is missing: log π*(y_w)/π*(y_l) is what §4.1 prints first, and it is the equality that does "
            "not hold.",
            chosen - rejected,
        ),
        Mistake("The reference is missing: this is β·log π(y_w)/π(y_l).", beta * (chosen - rejected)),
        Mistake("β is missing: this is h, and r_w − r_l = β·h.", h),
        Mistake("β and 1/β are swapped: r_w − r_l = β·h, the temperature comes back as a factor.", h / beta),
        Mistake("Chosen and rejected are swapped.", -beta * h),
        Mistake(
            "The reference has the wrong sign: it is added, or the two references are swapped.",
            beta * ((chosen + ref_chosen) - (rejected + ref_rejected)),
        ),
        Mistake(
            "This is the chosen answer alone, β·log(π/π_ref): subtract the rejected.", beta * (chosen - ref_chosen)
        ),
        Mistake("This is the rejected answer alone, β·log(π/π_ref).", beta * (rejected - ref_rejected)),
        Mistake("This is exp(β·h): the reward itself is β·h.", torch.exp(beta * h)),
        Mistake("This is σ(β·h), the Bradley–Terry probability: the reward itself is β·h.", torch.sigmoid(beta * h)),
    ]
    return Answers((chosen, rejected, ref_chosen, ref_rejected, beta), beta * h, mistakes)


@_check
def check_reward_difference(fn: Callable[..., Tensor]) -> Verdict:
    """Check the reader's r_w − r_l = β·h, the reward difference recovered from the optimal policy.

    Args:
        fn: (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta number),
            the first four (B,), → (B,).

    Returns:
        The verdict.
    """
    (chosen, rejected, *refs, beta), right, mistakes = reward_difference_answers()
    got = _call(fn, chosen, rejected, *refs, beta)
    _compare("r_w − r_l", got, right, mistakes)
    leaves = _leaves(chosen, rejected)
    followed = _followed(fn, *leaves, *refs, beta) if _is_torch(got) else None
    if followed is not None and followed.requires_grad:
        slope = beta * torch.eye(len(right), dtype=torch.float64)
        missing = say("A gradient reaches one policy only: one side of h is detached. Detach both, or none.")
        by_chosen, by_rejected = _jacobians(followed, leaves)
        _compare_gradient("r_w − r_l", "policy_chosen_logps", by_chosen, slope, missing=missing)
        _compare_gradient("r_w − r_l", "policy_rejected_logps", by_rejected, -slope, missing=missing)
    return Verdict(True, say("r_w − r_l = β·h: Z(x) is the same for both answers and cancels."))


# -- measuring -----------------------------------------------------------------------------------------------


def kl_estimate_answers() -> Answers:
    """Return the numbers of `check_kl_estimate`."""
    policy, ref = _rows(-2.1, -7.4, -3.3, -5.0, -1.2), _rows(-2.6, -6.9, -4.7, -5.1, -2.4)
    ratio = policy - ref  # 0.5, −0.5, 1.4, 0.1, 1.2
    mean, se = ratio.mean(), ratio.std() / len(ratio) ** 0.5

    def both(value: Tensor, error: Tensor = se) -> Tensor:
        return torch.stack([value, error])

    mistakes = [
        Mistake("The sign is flipped: KL(π‖π_ref) is the mean of log π − log π_ref, over answers of π.", both(-mean)),
        Mistake("You sum over the answers: an expectation under π is the mean over its samples.", both(ratio.sum())),
        Mistake(
            "You take absolute values: single log-ratios may be negative, their mean is the KL.",
            both(ratio.abs().mean(), ratio.abs().std() / len(ratio) ** 0.5),
        ),
        Mistake(
            "The answers are weighted by π again: they are sampled from π, so each counts once.",
            both((policy.exp() * ratio).sum()),
        ),
        Mistake("The reference is missing: this is the mean of −log π, the entropy.", both(-policy.mean())),
        Mistake(
            "The error is the standard deviation of one answer: the mean of n has 1/√n of it.", both(mean, ratio.std())
        ),
        Mistake("The error is the variance of one answer: take the root, then 1/√n.", both(mean, ratio.var())),
        Mistake("The error is squared: this is the variance of the mean.", both(mean, se.square())),
        Mistake("The standard deviation is divided by n: the mean of n has 1/√n of it.", both(mean, ratio.std() / 5)),
        Mistake(
            "The standard deviation divides by n: from a sample it divides by n − 1, which `torch.std` does.",
            both(mean, ratio.std(correction=0) / len(ratio) ** 0.5),
        ),
    ]
    return Answers((policy, ref), both(mean), mistakes)


@_check
def check_kl_estimate(fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Verdict:
    """Check the reader's estimate of KL(π‖π_ref) from answers sampled from π, and its standard error.

    Args:
        fn: (policy_logps (N,), ref_logps (N,)) of sampled answers → (mean, standard error).

    Returns:
        The verdict.
    """
    (policy, ref), right, mistakes = kl_estimate_answers()
    got = _call(fn, policy, ref)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        _wrong("Return two things: the mean and its standard error.")
    _compare("(KL, error)", torch.stack([_tensor(part, "KL").reshape(()) for part in got]), right, mistakes)
    return Verdict(
        True, say("The mean log-ratio of answers of π, unbiased, so that near 0 it may be negative; and its error.")
    )


def token_entropy_answers() -> Answers:
    """Return the numbers of `check_token_entropy`."""
    entropies = torch.tensor([[2.0, 1.0, 0.6, 0.2], [1.5, 0.3, 9.0, 9.0], [0.8, 0.4, 0.9, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    kept, lengths = entropies * mask, mask.sum(1)
    sums, right = kept.sum(1), kept.sum() / mask.sum()
    mistakes = [
        Mistake(
            "Each answer is averaged first, then the answers: that weighs a token of a short answer more. Divide the "
            "sum over all answers by the number of all their tokens.",
            (sums / lengths).mean(),
        ),
        Mistake("The padding is counted: divide by the number of the answers' own tokens.", kept.mean()),
        Mistake("The mask is not used: padding has no entropy.", entropies.mean()),
        Mistake("The mask is the wrong way round: these are the tokens of the padding.", entropies[~mask].mean()),
        Mistake("This is nats per answer, the estimator *sequence*: divide by the number of tokens.", sums.mean()),
        Mistake("This is the sum over all answers: divide by the number of their tokens.", kept.sum()),
        Mistake("Only the first token counts here: the average is over all tokens.", entropies[:, 0].mean()),
        Mistake("One number per answer: the prompt has one entropy.", sums / lengths),
        Mistake("The sum is divided by the longest answer: divide by the number of all tokens.", kept.sum() / 4),
        Mistake("The sign is flipped: an entropy is not negative.", -right),
        Mistake("These are bits: the entropies were in nats, leave them so.", right / math.log(2)),
    ]
    return Answers((entropies, mask), right, mistakes)


@_check
def check_token_entropy(fn: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Check the reader's entropy of the reference at a prompt, in nats per token, from sampled answers.

    Args:
        fn: (token_entropies (K, T) nats, mask (K, T) bool) of K answers → scalar.

    Returns:
        The verdict.
    """
    (entropies, mask), right, mistakes = token_entropy_answers()
    _compare("H", _call(fn, entropies, mask), right, mistakes)
    return Verdict(True, say("Every token counts once, whichever answer it is in, and padding does not."))


def entropy_beta_answers() -> Answers:
    """Return the numbers of `check_entropy_beta`."""
    entropy, beta0, low, high = _rows(0.1, 0.5, 0.8, 1.4, 3.2), 0.3, 0.1, 0.5
    line = beta0 * entropy / entropy.mean()  # 0.025, 0.125, 0.2, 0.35, 0.8

    def clip(values: Tensor) -> Tensor:
        return values.clamp(low, high)

    mistakes = [
        Mistake("The range is missing: below β_min it is β_min, above β_max it is β_max.", line),
        Mistake("The lower end of the range is missing.", line.clamp(max=high)),
        Mistake("The upper end of the range is missing.", line.clamp(min=low)),
        Mistake("β₀ is missing: this makes the mean of αH equal to 1.", clip(entropy / entropy.mean())),
        Mistake("α is β₀ here, so that the mean of αH is β₀·mean H: divide by mean H.", clip(beta0 * entropy)),
        Mistake("This is H itself: α is missing.", clip(entropy)),
        Mistake("α is β₀ over the mean of H, not the mean of β₀/H.", clip(beta0 * (1 / entropy).mean() * entropy)),
        Mistake("α is β₀ over the mean of H, not over its median.", clip(beta0 * entropy / entropy.median())),
        Mistake("α is β₀ over the mean of H, not over its sum.", clip(beta0 * entropy / entropy.sum())),
        Mistake("α is β₀ over the mean of H, not over its largest value.", clip(beta0 * entropy / entropy.max())),
        Mistake("Upside down: this gives the largest β where H is smallest.", clip(beta0 * entropy.mean() / entropy)),
        Mistake("This is β₀ at every prompt: H is not used.", torch.full_like(line, beta0)),
        Mistake(
            "The clipped values are scaled once more: α is set before clipping, and the mean afterwards is what it is.",
            beta0 * clip(line) / clip(line).mean(),
        ),
        Mistake("H is clipped to the range of β: clip αH.", beta0 * clip(entropy) / clip(entropy).mean()),
    ]
    return Answers((entropy, beta0, low, high), clip(line), mistakes)


@_check
def check_entropy_beta(fn: Callable[[Tensor, float, float, float], Tensor]) -> Verdict:
    """Check the reader's clip(αH), with α such that the mean of αH is β₀.

    Args:
        fn: (ref_entropy (N,), beta0, beta_min, beta_max) → (N,).

    Returns:
        The verdict.
    """
    (entropy, beta0, low, high), right, mistakes = entropy_beta_answers()
    _compare("β", _call(fn, entropy, beta0, low, high), right, mistakes)
    _compare(say("β, with H in bits"), _call(fn, entropy / math.log(2), beta0, low, high), right, [])
    return Verdict(True, say("α only sets the unit of H: with H in bits β is the same."))


def rho_within_answers() -> Answers:
    """Return the numbers of `check_rho_within`: a table of 15 prompts, and ρ of math, code and dialogue."""
    beta = [0.10, 0.13, 0.12, 0.30, 0.16, 0.40, 0.20, 0.28, 0.25, 0.24, 0.52, 0.55, 0.60, 0.90, 0.50]
    entropy = [0.10, 0.20, 0.30, 0.40, 0.90, 0.50, 0.60, 0.70, 0.60, 1.60, 2.00, 2.30, 2.10, 2.90, 3.60]
    table = pd.DataFrame({"task": np.repeat(["math", "code", "dialogue"], 5), "beta": beta, "ref_entropy": entropy})
    groups = [rows[["beta", "ref_entropy"]] for _, rows in table.groupby("task", sort=False)]

    def within(method: str, parts: Sequence[pd.DataFrame] = groups) -> Tensor:
        return _rows(*(part.corr(method=method).iloc[0, 1] for part in parts))

    pooled, right = table[["beta", "ref_entropy"]], within("spearman")
    ranked = pooled.rank()
    first = within("pearson", [part.rank(method="first") for part in groups])
    logarithms = within("pearson", [np.log(part) for part in groups])
    mistakes = [
        Mistake(
            "These are the pooled ρ of all prompts: split by task first, and rank within each task.",
            torch.full((3,), pooled.corr(method="spearman").iloc[0, 1], dtype=torch.float64),
        ),
        Mistake("This is Pearson's r: Spearman's ρ is that of the ranks.", within("pearson")),
        Mistake("This is Kendall's τ: Spearman's ρ is Pearson's r of the ranks.", within("kendall")),
        Mistake(
            "The ranks are taken over all prompts before the split: rank within each task.",
            _rows(*(ranked.loc[part.index].corr().iloc[0, 1] for part in groups)),
        ),
        Mistake("Equal entropies get different ranks: give each of them the mean of their ranks.", first),
        Mistake("This is Pearson's r of the logarithms: take ranks.", logarithms),
        Mistake("The sign is flipped: was one of the two 1/β, or ranked downwards?", -right),
        Mistake("This is ρ²: ρ has a sign.", right.square()),
    ]  # fmt: skip
    return Answers((table,), right, mistakes)


@_check
def check_rho_within(fn: Callable[[pd.DataFrame], Mapping[str, float] | pd.Series]) -> Verdict:
    """Check the reader's Spearman's ρ of β and H within each task.

    Args:
        fn: table with task, beta and ref_entropy → ρ by task, as a dict or a Series.

    Returns:
        The verdict.
    """
    (table,), right, mistakes = rho_within_answers()
    got = _call(fn, table.copy())
    tasks = table["task"].unique().tolist()
    if isinstance(got, pd.DataFrame) and got.shape[1] == 1:
        got = got.iloc[:, 0]
    if not isinstance(got, (Mapping, pd.Series)):
        _wrong("ρ: got {type}, expected a dict or a Series with one number for each task.", type=type(got).__name__)
    if set(got.keys()) != set(tasks):
        _wrong("ρ: got {got}, expected one number for each of {tasks}.", got=list(got.keys()), tasks=tasks)
    _compare("ρ", [_tensor(got[task], "ρ") for task in tasks], right, mistakes)
    return Verdict(True, say("Differences between the tasks are gone: what is left is order within each of them."))


# -- the regularisers ----------------------------------------------------------------------------------------


def entropy_penalty_answers() -> Answers:
    """Return the numbers of `check_entropy_penalty`."""
    beta, entropy, alpha = _rows(0.1, 0.7, 0.45, 1.2), _rows(2.0, 1.1, 3.3, 0.4), 0.2
    gap = beta - alpha * entropy
    column = say(
        "β has become a column (B, 1): against H of shape (B,) it broadcasts to (B, B), every prompt with every H."
    )
    mistakes = [
        Mistake("You sum over the batch: E_x is a mean, and a sum makes λ3 depend on its size.", gap.square().sum()),
        Mistake("One number per prompt: the term is their mean, E_x.", gap.square()),
        Mistake(
            "The mean is squared: positive and negative gaps cancel. Square first, then average.", gap.mean().square()
        ),
        Mistake("The square is missing: this is the mean absolute gap.", gap.abs().mean()),
        Mistake("The square is missing: gaps of opposite sign cancel.", gap.mean()),
        Mistake("α is missing: this is (β − H)².", (beta - entropy).square().mean()),
        Mistake("α is on the wrong side: the line is β = αH, not αβ = H.", (alpha * beta - entropy).square().mean()),
        Mistake("α divides H; the line is β = αH.", (beta - entropy / alpha).square().mean()),
        Mistake("H is added: the term is the distance β − αH.", (beta + alpha * entropy).square().mean()),
        Mistake("This is the root of the mean square; the term has no root.", gap.square().mean().sqrt()),
        Mistake(column, (beta[:, None] - alpha * entropy).square().mean()),
        Mistake("There is a factor ½ that the term does not have.", gap.square().mean() / 2),
        Mistake("The sign is flipped: a penalty is positive.", -gap.square().mean()),
        Mistake(
            "This is 1/β for β: the term has β itself, in both forms.", (1 / beta - alpha * entropy).square().mean()
        ),
        Mistake(
            "This is the distance of logarithms: the term has β and αH themselves.",
            (beta.log() - (alpha * entropy).log()).square().mean(),
        ),
        Mistake("This is the relative distance: the term does not divide.", (gap / (alpha * entropy)).square().mean()),
    ]
    return Answers((beta, entropy, alpha), gap.square().mean(), mistakes)


@_check
def check_entropy_penalty(fn: Callable[[Tensor, Tensor, float], Tensor]) -> Verdict:
    """Check the reader's E_x[(β(x) − αH)²], its gradient, and that no gradient reaches the reference.

    Args:
        fn: (beta (B,), ref_entropy (B,), alpha number) → scalar.

    Returns:
        The verdict.
    """
    (beta, entropy, alpha), right, mistakes = entropy_penalty_answers()
    _check_entropy_gradient(fn, beta, entropy, alpha, right, mistakes)
    # on the line the gap is 0, where the gradient of a square root is 0·∞
    entropy = _rows(2.0, 1.0)
    _check_entropy_gradient(fn, 0.25 * entropy, entropy, 0.25, torch.zeros((), dtype=torch.float64), [])
    return Verdict(True, say("The mean squared distance from the line αH, with a gradient on β alone."))


def _check_entropy_gradient(
    fn: Callable, beta: Tensor, entropy: Tensor, alpha: float, right: Tensor, mistakes: Sequence[Mistake]
) -> None:
    leaves = _leaves(beta, entropy)
    got = _call(fn, *leaves, alpha)
    _compare("penalty", got, right, mistakes)
    by_beta, by_entropy = _jacobians(_tensor(got, "penalty"), leaves)
    _compare_gradient(
        "penalty",
        "beta",
        by_beta,
        2 * (beta - alpha * entropy) / len(beta),
        missing=say("The penalty carries no gradient to β: something was detached that should not be."),
        hint=say("a part of it was detached, or a root or a logarithm has no slope where β = αH"),
        dims=0,
    )
    if by_entropy.any():
        _wrong("A gradient reaches the entropy of the reference, which is frozen: detach it.")


class BetaWithBatchNorm(nn.Module):
    """β(x) = exp(w·(x − m)/√(v + ε)), with m and v of the batch in training mode and stored in evaluation mode."""

    mean, var, weight_start = _rows(0.4, -0.3, 0.2), _rows(1.9, 0.6, 1.3), _rows(0.7, -0.5, 0.3)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.norm.register_buffer("running_mean", self.mean.clone())
        self.norm.register_buffer("running_var", self.var.clone())
        self.weight = nn.Parameter(self.weight_start.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return β (B,) of features (B, 3)."""
        return torch.exp(self.norm(x) @ self.weight)


def smoothness_penalty_answers() -> Answers:
    """Return the numbers of `check_smoothness_penalty`; the argument is the features of `BetaWithBatchNorm`."""
    x = torch.stack([_rows(0.2, -1.1, 0.7), _rows(1.6, 0.4, -0.6), _rows(-0.7, 0.9, 1.8), _rows(2.3, -0.2, 0.1)])
    net = BetaWithBatchNorm
    slope = net.weight_start / (net.var + 1e-5).sqrt()  # (D,) gradient of log β
    beta = torch.exp((x - net.mean) @ slope)
    gradient = beta[:, None] * slope  # (B, D)
    norms = gradient.square().sum(1)
    jacobian = torch.autograd.functional.jacobian(net(), x)  # (B, B, D), ∂β(x_i)/∂x_j in training mode
    moved = net()
    moved(x)
    moved.eval()
    assert moved.norm.running_var is not None
    moved_slope = moved.weight.detach() / (moved.norm.running_var + 1e-5).sqrt()
    by_weight = (beta[:, None] * (x - net.mean) / (net.var + 1e-5).sqrt()).sum(0)
    mistakes = [
        Mistake(
            "The gradient is taken through the sum over the batch in training mode: batch norm makes β(x_i) depend on "
            "the other rows, and their gradients are mixed into row i. Put the module in evaluation mode for the "
            "penalty, and back afterwards.",
            jacobian.sum(0).square().sum(1).mean(),
        ),
        Mistake(
            "The gradient is taken in training mode: row by row, but of a β that depends on the batch. Put the module "
            "in evaluation mode for the penalty, and back afterwards.",
            jacobian.diagonal(dim1=0, dim2=1).square().sum(0).mean(),
        ),
        Mistake("The square is missing: the term is ‖∇β‖², this is the mean of ‖∇β‖.", norms.sqrt().mean()),
        Mistake("The square is missing: this is the norm over the whole batch.", norms.sum().sqrt()),
        Mistake("The norm is ‖·‖², a sum of squares: this sums absolute values.", gradient.abs().sum(1).mean()),
        Mistake("You sum over the batch: E_x is a mean.", norms.sum()),
        Mistake("One number per prompt: the term is their mean, E_x.", norms),
        Mistake("You average over the features too: ‖·‖² is a sum over them.", gradient.square().mean()),
        Mistake(
            "This is the gradient of the mean of β: it is 1/B of each row's own, and its square 1/B². Take the "
            "gradient of the sum, so that each row keeps its own.",
            norms.mean() / len(x) ** 2,
        ),
        Mistake("This is the gradient of log β; the term has β itself.", slope.square().sum()),
        Mistake(
            "Average after squaring: this squares the mean gradient over the batch, where gradients cancel.",
            gradient.mean(0).square().sum(),
        ),
        Mistake("This is the gradient with respect to the parameters: the term has ∇_x.", by_weight.square().sum()),
        Mistake(
            "The module is called in training mode before the penalty is taken: every such call moves the running "
            "statistics of batch norm, and with them β. Put the module in evaluation mode first.",
            moved(x).detach().square().mean() * moved_slope.square().sum(),
        ),
        Mistake("There is a factor ½ that the term does not have.", norms.mean() / 2),
        Mistake("The sign is flipped: a penalty is positive.", -norms.mean()),
    ]
    return Answers((x,), norms.mean(), mistakes)


def smoothness_gradient(x: Tensor) -> Tensor:
    """Return ∂E_x[‖∇_xβ‖²]/∂w (3,) of `BetaWithBatchNorm`: with u = w/√(v + ε), E_x[β²]·‖u‖² by the product rule."""
    net = BetaWithBatchNorm
    deviation = (net.var + 1e-5).sqrt()
    slope = net.weight_start / deviation
    centred = (x - net.mean) / deviation
    squared = torch.exp(2 * centred @ net.weight_start)
    return 2 * (squared[:, None] * centred).mean(0) * slope.square().sum() + 2 * squared.mean() * slope / deviation


@_check
def check_smoothness_penalty(fn: Callable[[nn.Module, Tensor], Tensor]) -> Verdict:
    """Check the reader's E_x[‖∇_xβ(x)‖²] on a module with batch norm, in training mode.

    Also checked: the gradient with respect to the parameters of the given module itself, not of a copy, and where β is
    constant; and that mode, buffers and `.grad` of the module are left unchanged.

    Args:
        fn: (beta_fn module (B, D) → (B,), x (B, D)) → scalar.

    Returns:
        The verdict.
    """
    (x,), right, mistakes = smoothness_penalty_answers()
    net = BetaWithBatchNorm().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    got = _call(fn, net, x)
    _compare("penalty", got, right, mistakes)
    penalty = _tensor(got, "penalty")
    if not penalty.requires_grad:
        _wrong("The number is right, but it has no gradient to train by: `autograd.grad(..., create_graph=True)`.")
    _check_left_behind(net, before)
    _compare_gradient(
        "penalty",
        "weight",
        _gradient(penalty, [net.weight])[0],
        smoothness_gradient(x),
        missing=(
            say(
                "The number is right, but its gradient never reaches the parameters of the module "
                "you were given: the penalty is taken on a copy, or on detached parameters, and "
                "training by it changes nothing. Use the module itself."
            )
        ),
        dims=0,
    )
    _check_constant_beta(fn, x)
    return Verdict(
        True,
        say(
            "Each prompt's own gradient, of the deterministic β, squared, summed over features, averaged over prompts."
        ),
    )


def _check_left_behind(net: BetaWithBatchNorm, before: dict[str, Tensor]) -> None:
    if not net.training or not net.norm.training:
        _wrong("The module is given in training mode and left in evaluation mode: put it back.")
    for name, value in net.state_dict().items():
        if not torch.equal(value, before[name]):
            _wrong(
                "Your function changes the module: `{name}` is not what it was. A penalty only "
                "looks; in training mode every call moves the running statistics of batch norm.",
                name=name,
            )
    if net.weight.grad is not None:
        _wrong(
            "Your function fills `.grad` of the parameters, and the optimizer would step by it: "
            "`backward()` does that. Take the gradient by `torch.autograd.grad`, which returns "
            "it."
        )


def _check_constant_beta(fn: Callable, x: Tensor) -> None:
    net = BetaWithBatchNorm().train()
    net.weight.data.zero_()
    got = _call(fn, net, x)
    _compare(say("penalty of a constant β"), got, torch.zeros((), dtype=torch.float64), [])
    (gradient,) = _gradient(_tensor(got, "penalty"), [net.weight])
    if not torch.isfinite(gradient).all():
        _wrong(
            "The number is right, but where β is the same for all prompts, as at the start of "
            "training, the gradient to the parameters is NaN: a square root has no slope at 0. "
            "Square without taking the root first."
        )


# -- reward per nat ------------------------------------------------------------------------------------------


def slope_answers() -> Answers:
    """Return the numbers of `check_slope`."""
    ref = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)
    h = torch.tensor([[1.0, -0.4, 0.3], [0.2, 1.5, -0.9]], dtype=torch.float64)
    rewards = torch.tensor([[2.0, 1.1, 1.9], [0.3, 1.2, 0.8]], dtype=torch.float64)

    def mean(values: Tensor) -> Tensor:
        return (ref * values).sum(1)

    covariance = mean(h * rewards) - mean(h) * mean(rewards)
    variance = mean(h * h) - mean(h).square()
    spread = mean(rewards * rewards) - mean(rewards).square()
    flat_h, flat_r = (values - values.mean(1, keepdim=True) for values in (h, rewards))
    pooled = covariance.mean() / variance.mean()
    mistakes = [
        Mistake("This is the covariance alone: divide by Var(h).", covariance),
        Mistake("This is the variance alone.", variance),
        Mistake(
            "The answers are weighed equally: both moments are under π_ref, so weigh each answer by its probability.",
            (flat_h * flat_r).sum(1) / flat_h.square().sum(1),
        ),
        Mistake("The means are not subtracted: this is E[r·h]/E[h²].", mean(h * rewards) / mean(h * h)),
        Mistake(
            "The mean is subtracted in Var(h) but not in Cov(r, h) = E[r·h] − E[r]·E[h].", mean(h * rewards) / variance
        ),
        Mistake("The variance lacks its mean: Var(h) = E[h²] − E[h]².", covariance / mean(h * h)),
        Mistake("This divides by Var(r): it is the slope of h on the reward.", covariance / spread),
        Mistake("This is the correlation: divide by Var(h), not by the two deviations.",
                covariance / (variance * spread).sqrt()),
        Mistake("This divides by the standard deviation of h: the slope has its square.", covariance / variance.sqrt()),
        Mistake("Upside down: this is Var(h)/Cov(r, h), which is β*/λ.", variance / covariance),
        Mistake("One number for all prompts: the slope is per prompt, (X,).", pooled),
        Mistake("The prompts are pooled: each has its own slope.", pooled.expand(2)),
        Mistake("The sign is flipped.", -covariance / variance),
    ]  # fmt: skip
    return Answers((ref.log(), h, rewards), covariance / variance, mistakes)


@_check
def check_slope(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Verdict:
    """Check the reader's b(x) = Cov(r, h|x)/Var(h|x) under the reference.

    Args:
        fn: (ref_logps (X, Y), h (X, Y), rewards (X, Y)) → (X,).

    Returns:
        The verdict.
    """
    (ref_logps, h, rewards), right, mistakes = slope_answers()
    _compare("b", _call(fn, ref_logps, h, rewards), right, mistakes)
    _compare(say("b, with 5 added to every reward"), _call(fn, ref_logps, h, rewards + 5), right, [])
    return Verdict(True, say("The reward that one more nat earns, per prompt: constants in r or h change nothing."))


def allocation_answers() -> Answers:
    """Return the numbers of `check_allocation`."""
    slopes, variances, budget = _rows(0.1, 0.4, -0.2), _rows(2.0, 0.5, 1.0), 0.3
    positive = slopes.clamp(min=0)

    def to_budget(direction: Tensor, kl: float = budget) -> Tensor:
        return direction * (2 * kl / (variances * direction.square()).mean()).sqrt()

    right = to_budget(positive)
    lagrangian = (variances * positive.square()).mean()
    mistakes = [
        Mistake("A negative slope counts as 0: there the best policy is the reference.", to_budget(slopes)),
        Mistake("These factors are equal: a is in proportion to b.", to_budget(torch.ones(3, dtype=torch.float64))),
        Mistake("KL ≈ a²·Var(h)/2: the ½ is missing, so half the budget is spent.", to_budget(positive, budget / 2)),
        Mistake("The budget is doubled twice: KL ≈ a²·Var(h)/2.", to_budget(positive, 2 * budget)),
        Mistake("The budget is for the mean over tasks: these spend it on their sum.", to_budget(positive, budget / 3)),
        Mistake("This gives every task the same KL, √(2ε/Var h): a budget per task earns less.",
                (2 * budget / variances).sqrt()),
        Mistake("This is the direction b alone: scale it until the mean KL is the budget.", positive),
        Mistake("a is in proportion to Cov(r, h): that is what a step earns, and Var(h) is what it costs; a ∝ b.",
                to_budget(positive * variances)),
        Mistake("This is λ, one number: a = b/λ.", (lagrangian / (2 * budget)).sqrt()),
        Mistake("This is b·λ: a = b/λ.", positive * (lagrangian / (2 * budget)).sqrt()),
        Mistake("The square root is missing: KL grows with a².", positive * 2 * budget / lagrangian),
        Mistake("The sign is flipped.", -right),
    ]  # fmt: skip
    return Answers((slopes, variances, budget), right, mistakes)


@_check
def check_allocation(fn: Callable[[Tensor, Tensor, float], Tensor]) -> Verdict:
    """Check the reader's a = max(b, 0)/λ, which spends a small KL budget best.

    Args:
        fn: (slopes (T,), variances (T,), budget of mean KL, nats) → (T,); tasks weigh equally.

    Returns:
        The verdict.
    """
    (slopes, variances, budget), right, mistakes = allocation_answers()
    _compare("a", _call(fn, slopes, variances, budget), right, mistakes)
    _compare(say("a, at a quarter of the budget"), _call(fn, slopes, variances, budget / 4), right / 2, [])
    return Verdict(True, say("a = max(b, 0)/λ: the price λ follows from the budget, and no task goes backwards."))


def bound_answers() -> Answers:
    """Return the numbers of `check_bound`."""
    slopes, variances = _rows(0.1, 0.4, 0.25), _rows(2.0, 0.5, 1.2)
    weight = variances / variances.sum()
    mean, square = (weight * slopes).sum(), (weight * slopes.square()).sum()
    cv2 = square / mean.square() - 1
    plain = slopes.square().mean() / slopes.mean().square() - 1
    mistakes = [
        Mistake("The 1 is not subtracted: this is the ratio of the two rewards, the gain is that minus 1.",
                (1 + cv2).sqrt()),
        Mistake("This is CV²: the gain is √(1 + CV²) − 1.", cv2),
        Mistake("This is CV: the gain is √(1 + CV²) − 1.", cv2.sqrt()),
        Mistake("The CV is squared twice, or its root is missing under the root.", (1 + cv2.square()).sqrt() - 1),
        Mistake("The CV enters without its square: the gain is √(1 + CV²) − 1.", (1 + cv2.sqrt()).sqrt() - 1),
        Mistake("The tasks weigh equally: the CV is weighted by Var(h).", (1 + plain).sqrt() - 1),
        Mistake("The weights are Var(h)²: they are Var(h).", _weighted_bound(slopes, variances.square())),
        Mistake("The weights are √Var(h): they are Var(h).", _weighted_bound(slopes, variances.sqrt())),
        Mistake("Upside down: this is what the constant lacks of the best, the gain is relative to the constant.",
                1 - 1 / (1 + cv2).sqrt()),
        Mistake("The sign is flipped.", 1 - (1 + cv2).sqrt()),
        Mistake("The variance has T − 1: the CV is over the tasks themselves.", (1 + 1.5 * cv2).sqrt() - 1),
    ]  # fmt: skip
    return Answers((slopes, variances), (1 + cv2).sqrt() - 1, mistakes)


def _weighted_bound(slopes: Tensor, weights: Tensor) -> Tensor:
    weights = weights / weights.sum()
    return ((weights * slopes.square()).sum() / (weights * slopes).sum().square()).sqrt() - 1


@_check
def check_bound(fn: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """Check the reader's √(1 + CV²(b)) − 1, the most that any β by task gains at equal small KL.

    Args:
        fn: (positive slopes (T,), variances (T,)) → scalar; tasks weigh equally but for their variance.

    Returns:
        The verdict.
    """
    (slopes, variances), right, mistakes = bound_answers()
    _compare(say("bound"), _call(fn, slopes, variances), right, mistakes)
    equal = _rows(0.3, 0.3, 0.3)
    _compare(say("bound, of equal slopes"), _call(fn, equal, variances), torch.zeros((), dtype=torch.float64), [])
    return Verdict(True, say("Only the spread of reward per nat matters: with equal slopes there is nothing to gain."))


# -- a comparison at equal KL ---------------------------------------------------------------------------------


def tilt_answers() -> Answers:
    """Return the numbers of `check_tilt`."""
    h = torch.tensor([[1.0, -0.4, 0.3, 0.9], [0.2, 1.5, -0.9, -0.1]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0.0, 0.2, 0.7], [0.1, 0.4, 0.9, 0.3]], dtype=torch.float64)
    a = 1.7
    logps = torch.log_softmax(a * h, 1)
    policy = logps.exp()

    def both(p: Tensor, kl: Tensor) -> Tensor:
        return torch.stack([(p * rewards).sum(1).mean(), kl.mean()])

    def kl(p: Tensor, ref: float = 0.25) -> Tensor:
        return (p * (p / ref).log()).sum(1)

    plain, pooled = torch.softmax(h, 1), torch.softmax(a * h.flatten(), 0).reshape(h.shape)
    mistakes = [
        Mistake("The factor a is missing: these are the numbers of the policy itself, a = 1.", both(plain, kl(plain))),
        Mistake("The weights are exp(h)·a: the factor belongs in the exponent, exp(a·h).",
                both(a * plain, kl(policy))),
        Mistake("The prompts are pooled: exp(a·h) is normalised prompt by prompt.",
                torch.stack([(pooled * rewards).sum(), (pooled * (pooled * 8).log()).sum()])),
        Mistake("Over the prompts this is the sum: the budget is for the mean.", 2 * both(policy, kl(policy))),
        Mistake("The reference is missing: this is Σ π_a·log π_a, and π_ref is 1/M.",
                both(policy, (policy * logps).sum(1))),
        Mistake("The KL is the other way round: Σ π_ref·log(π_ref/π_a).", both(policy, -(4 * policy).log().mean(1))),
        Mistake("The log-ratio is averaged under π_ref: KL(π_a‖π_ref) averages it under π_a.",
                both(policy, (4 * policy).log().mean(1))),
        Mistake("This takes a·h for log π_a/π_ref: log Z is not subtracted.",
                both(policy, (policy * a * h).sum(1))),
        Mistake("The rewards are averaged under π_ref: weigh them by π_a.",
                torch.stack([rewards.mean(), kl(policy).mean()])),
    ]  # fmt: skip
    return Answers((h, rewards, a), both(policy, kl(policy)), mistakes)


@_check
def check_tilt(fn: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]) -> Verdict:
    """Check the reader's mean reward and mean KL of a policy re-tilted by a, on M equally likely answers per prompt.

    Args:
        fn: (h (P, M), rewards (P, M), a) → (mean reward, mean KL in nats).

    Returns:
        The verdict.
    """
    (h, rewards, a), right, mistakes = tilt_answers()
    got = _call(fn, h, rewards, a)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        _wrong("Return two things: the mean reward and the mean KL.")
    _compare("(reward, KL)", torch.stack([_tensor(part, "KL").reshape(()) for part in got]), right, mistakes)
    return Verdict(True, say("One pass of scores gives reward and KL at every a, without sampling."))


def share_answers() -> Answers:
    """Return the numbers of `check_share`."""
    constant, oracle = _rows(0.30, 0.42, 0.35, 0.38), _rows(0.33, 0.43, 0.40, 0.42)
    contender = _rows(0.32, 0.425, 0.34, 0.40)
    gain, most = contender - constant, oracle - constant
    right, n = gain.mean() / most.mean(), len(gain)
    t = gain.mean() / (gain.std() / n**0.5)

    def both(share: Tensor, statistic: Tensor = t) -> Tensor:
        return torch.stack([share, statistic])

    apart = (contender.var() / n + constant.var() / n).sqrt()
    mistakes = [
        Mistake("This is the mean of the worlds' shares: one world in which the oracle gains little would decide it; "
                "divide the means.", both((gain / most).mean())),
        Mistake("This is the ratio of the rewards: both gains are over the constant.",
                both(contender.mean() / oracle.mean())),
        Mistake("Upside down: the share is the contender's gain over the oracle's.", both(1 / right)),
        Mistake("This is what the oracle has left over the contender.", both(1 - right)),
        Mistake("t is not paired: the differences between worlds are in both, take the contender's minus the "
                "constant's world by world.", both(right, gain.mean() / apart)),
        Mistake("t divides by the standard deviation of one world: the mean of n has 1/√n of it.",
                both(right, gain.mean() / gain.std())),
        Mistake("The standard deviation divides by n: from a sample it divides by n − 1, which `torch.std` does.",
                both(right, gain.mean() / (gain.std(correction=0) / n**0.5))),
        Mistake("t is of the share of each world: the share is not what is tested, the difference is.",
                both(right, (gain / most).mean() / ((gain / most).std() / n**0.5))),
        Mistake("The sign is flipped.", both(-right, -t)),
    ]  # fmt: skip
    return Answers((contender, constant, oracle), both(right), mistakes)


@_check
def check_share(fn: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Verdict:
    """Check the reader's share of the oracle's gain, and the paired t statistic of the difference from the constant.

    Args:
        fn: rewards of (contender (N,), constant (N,), oracle (N,)) in N worlds → (share, t).

    Returns:
        The verdict.
    """
    args, right, mistakes = share_answers()
    got = _call(fn, *args)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        _wrong("Return two things: the share and t.")
    _compare("(share, t)", torch.stack([_tensor(part, "t").reshape(()) for part in got]), right, mistakes)
    return Verdict(True, say("Worlds are the unit, and each is its own control."))
