"""Four penalties on β(x), and their weighted sum.

The DPO loss alone does not determine β(x). The penalties hold it within a range, make it change little with the prompt
and little within a task, and tie it to the entropy of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpoviz.validation import require, require_positive, require_rows, task_index


def _require_range(beta_min: float, beta_max: float) -> None:
    if not 0 < beta_min < beta_max < math.inf:
        raise ValueError(f"beta_min, beta_max: got {beta_min}, {beta_max}, expected 0 < beta_min < beta_max < inf")


def range_penalty(beta: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """Return the mean distance of beta from its allowed range (the derivation, §5.1.1).

        E_x[max(0, β(x) − β_max) + max(0, β_min − β(x))]

    The penalty is 0 inside the range. Outside it, the gradient on each row is ±1/B.

    Args:
        beta: (B,).
        beta_min: the lower end, above 0.
        beta_max: the upper end, above `beta_min`.

    Returns:
        A scalar, in the unit of beta.

    Raises:
        ValueError: `beta` is not (B,) and finite, or 0 < beta_min < beta_max < inf does not hold.
    """
    require_rows("beta", beta)
    _require_range(beta_min, beta_max)
    return (torch.relu(beta - beta_max) + torch.relu(beta_min - beta)).mean()


@contextmanager
def _evaluation_mode(fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put every submodule of `fn` in evaluation mode, and restore each submodule's mode afterwards."""
    modules = list(fn.modules()) if isinstance(fn, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def squared_gradient_norms(beta_fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the squared norm of the gradient of beta at each prompt, ‖∇_x β(x_i)‖².

    Text is discrete, so the gradient is taken with respect to the continuous features that beta reads.

    A module is evaluated in evaluation mode; its training mode is restored afterwards. With batch statistics β(x_i)
    would also depend on the other rows, and the gradient of the sum over the batch would mix rows. With running
    statistics the rows are independent, so one backward pass through the sum gives each row its own gradient.

    Args:
        beta_fn: a module (B, D) → (B,), or a function that treats rows independently. Pass the module itself: inside a
            lambda it cannot be put in evaluation mode.
        x: (B, D) features; receive no gradient.

    Returns:
        (B,), differentiable in the parameters of `beta_fn` if gradients are enabled; zeros if beta does not depend on
        x.

    Raises:
        ValueError: `x` is not floating (B, D), or `beta_fn` does not return (B,) finite numbers.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x: got a {x.dtype} tensor of shape {tuple(x.shape)}, expected floating (B, D)")
    with _evaluation_mode(beta_fn), torch.enable_grad():
        x = x.detach().requires_grad_()
        beta = beta_fn(x)
        require_rows("beta_fn(x)", beta, len(x))
        if not beta.requires_grad:
            return torch.zeros_like(beta)
        (gradient,) = torch.autograd.grad(beta.sum(), x, create_graph=True, materialize_grads=True)
    return gradient.square().sum(dim=1)


def smoothness_penalty(beta_fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the mean squared gradient of beta with respect to the prompt's features (the derivation, §5.1.2).

        E_x[‖∇_x β(x)‖²]

    Args:
        beta_fn: a module or function (B, D) → (B,), evaluated as in `squared_gradient_norms`.
        x: (B, D) features.

    Returns:
        A scalar, differentiable in the parameters of `beta_fn`.

    Raises:
        ValueError: as `squared_gradient_norms`.
    """
    return squared_gradient_norms(beta_fn, x).mean()


def task_consistency_penalty(beta: Tensor, task: Tensor | Sequence[str]) -> Tensor:
    """Return the variance of beta within the tasks of the batch (the text of the derivation's §5.1.2).

        (1/B)·Σ_i (β_i − β̄_task(i))²

    β̄_t is the mean of beta over the rows of task t. The source asks for a beta that is similar within a task and free
    to differ between tasks. A gradient penalty does not express that; this penalty does. Moving all betas of a task
    together costs nothing.

    Args:
        beta: (B,).
        task: the task of each row: (B,) integers, or B names.

    Returns:
        A scalar, in squared units of beta.

    Raises:
        ValueError: `beta` is not (B,) and finite, or `task` is not one name or integer per row.
    """
    require_rows("beta", beta)
    index = task_index(task, len(beta)).to(beta.device)
    counts = torch.bincount(index).to(beta.dtype)
    means = beta.new_zeros(len(counts)).index_add(0, index, beta) / counts  # (tasks,)
    return (beta - means[index]).square().mean()


def entropy_penalty(beta: Tensor, ref_entropy: Tensor, alpha: float) -> Tensor:
    """Return the mean squared distance of beta from alpha times the reference's entropy (the derivation, §5.1.3).

        E_x[(β(x) − α·H(π_ref(·|x)))²]

    Args:
        beta: (B,).
        ref_entropy: (B,) entropy of the reference at the prompt, in nats or nats per token; receives no gradient.
        alpha: beta per unit of entropy, a positive number. It is never trained: with α → 0 and β → 0 the penalty would
            vanish.

    Returns:
        A scalar, in squared units of beta.

    Raises:
        ValueError: `beta` or `ref_entropy` is not (B,) and finite, or `alpha` is not a positive finite number.
    """
    require_rows("beta", beta)
    require_rows("ref_entropy", ref_entropy, len(beta))
    require_positive("alpha", alpha)
    return (beta - alpha * ref_entropy.detach()).square().mean()


@dataclass(frozen=True)
class Regularization:
    """The weights of the penalties, and the targets they hold beta to.

    Attributes:
        beta_min: lower end of the range.
        beta_max: upper end of the range.
        alpha: beta per unit of entropy; None if the entropy term is off.
        range: λ1, weight of `range_penalty`.
        smoothness: λ2, weight of `smoothness_penalty`.
        consistency: weight of `task_consistency_penalty`, the other half of the source's λ2 term.
        entropy: λ3, weight of `entropy_penalty`.

    Raises:
        ValueError: a weight is negative or not finite, the range is empty, or λ3 > 0 without alpha.
    """

    beta_min: float
    beta_max: float
    alpha: float | None = None
    range: float = 0.0
    smoothness: float = 0.0
    consistency: float = 0.0
    entropy: float = 0.0

    def __post_init__(self) -> None:
        _require_range(self.beta_min, self.beta_max)
        for name in ("range", "smoothness", "consistency", "entropy"):
            weight = getattr(self, name)
            require(name, weight, 0 <= weight < math.inf, "a finite weight, at least 0 (0 switches the term off)")
        if self.entropy > 0 and self.alpha is None:
            raise ValueError("alpha: got None, expected a positive number, because the weight of entropy is above 0")


class Penalties(NamedTuple):
    """The weighted penalties of a batch.

    Attributes:
        terms: scalars by name: those of "range", "smoothness", "consistency" and "entropy" that are switched on.
        squared_gradients: (B,) λ2·‖∇β(x_i)‖², detached: the weighted gradient penalty before its mean; zeros if it is
            off.
    """

    terms: dict[str, Tensor]
    squared_gradients: Tensor


def penalties(
    beta: Tensor,
    weights: Regularization,
    *,
    ref_entropy: Tensor | None = None,
    beta_fn: Callable[[Tensor], Tensor] | None = None,
    x: Tensor | None = None,
    task: Tensor | Sequence[str] | None = None,
) -> Penalties:
    """Return each penalty times its weight; skip those whose weight is 0.

    Args:
        beta: (B,) beta at each prompt.
        weights: the weights of the penalties.
        ref_entropy: (B,) for the entropy term, in the unit that `alpha` is per.
        beta_fn: the function (B, D) → (B,) that returned `beta`, for the gradient penalty.
        x: (B, D) the features that `beta_fn` read.
        task: the task of each row, for the task consistency.

    Raises:
        ValueError: a weight is above 0 but an input of its penalty is missing, or a penalty refuses its input.
    """
    terms, squared_gradients = {}, torch.zeros_like(beta)
    if weights.range > 0:
        terms["range"] = weights.range * range_penalty(beta, weights.beta_min, weights.beta_max)
    if weights.smoothness > 0:
        _require_inputs("smoothness", beta_fn=beta_fn, x=x)
        assert x is not None and beta_fn is not None
        if len(x) != len(beta):
            raise ValueError(f"x: got {len(x)} rows, expected {len(beta)}, one per row of beta")
        weighted = weights.smoothness * squared_gradient_norms(beta_fn, x)
        terms["smoothness"], squared_gradients = weighted.mean(), weighted.detach()
    if weights.consistency > 0:
        _require_inputs("consistency", task=task)
        assert task is not None
        terms["consistency"] = weights.consistency * task_consistency_penalty(beta, task)
    if weights.entropy > 0:
        _require_inputs("entropy", ref_entropy=ref_entropy)
        assert ref_entropy is not None and weights.alpha is not None
        terms["entropy"] = weights.entropy * entropy_penalty(beta, ref_entropy, weights.alpha)
    return Penalties(terms, squared_gradients)


def _require_inputs(weight: str, **inputs: object) -> None:
    missing = [name for name, value in inputs.items() if value is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: got None, expected a value, because the weight of {weight} is above 0; "
            f"pass it, or set {weight}=0"
        )
