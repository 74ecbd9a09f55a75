r"""What keeps :math:`\beta(x)` from going where the loss alone would let it: four scalar penalties.

They are unweighted: the :math:`\lambda` belong to the caller (`losses.total_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def require_rows(name: str, values: Tensor, batch: int | None = None) -> None:
    """Refuse anything but one finite floating number per row.

    Args:
        name: what `values` is called in the message.
        values: expected to be (B,), B at least 1.
        batch: the B that is expected; None takes any.

    Raises:
        ValueError: not a floating tensor, not (B,), no rows, another B, or non-finite rows (which it lists).
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = f"a {values.dtype} tensor" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name}: got {got}, expected a floating tensor of shape (B,)")
    if values.ndim != 1 or len(values) == 0 or (batch is not None and len(values) != batch):
        expected = "(B,) with B at least 1" if batch is None else f"({batch},)"
        # (B, 1) is what a linear layer returns; against (B,) it would broadcast to (B, B) without a word
        hint = "; drop the last axis with .squeeze(-1)" if values.ndim == 2 and values.shape[1] == 1 else ""
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected {expected}{hint}")
    if not torch.isfinite(values).all():
        rows = (~torch.isfinite(values)).nonzero().flatten().tolist()
        raise ValueError(f"{name}: not finite in rows {rows}, expected finite numbers")


def range_penalty(beta: Tensor, beta_min: float, beta_max: float) -> Tensor:
    r"""Mean distance of beta from the range it should stay in (the derivation, §5.1.1).

    .. math:: E_x[\max(0, \beta(x) - \beta_{max}) + \max(0, \beta_{min} - \beta(x))]

    Zero inside the range; each row outside it is pulled with slope 1/B.

    Args:
        beta: (B,).
        beta_min: the lower end, positive.
        beta_max: the upper end, above `beta_min`.

    Returns:
        A scalar, in the unit of beta.

    Raises:
        ValueError: `beta` is not (B,) and finite, or not 0 < beta_min < beta_max < inf.
    """
    require_rows("beta", beta)
    if not 0 < beta_min < beta_max < math.inf:
        raise ValueError(
            f"beta_min, beta_max: got {beta_min}, {beta_max}, expected 0 < beta_min < beta_max, both finite"
        )
    return (torch.relu(beta - beta_max) + torch.relu(beta_min - beta)).mean()


@contextmanager
def _evaluation_mode(fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put every submodule of `fn` in evaluation mode, and each back in the mode it had."""
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
    r"""The squared length of the gradient of beta at each prompt: :math:`\|\nabla_x \beta(x_i)\|^2`.

    The text x is discrete; the gradient is with respect to the continuous features that beta reads.

    A module is taken in evaluation mode, its deterministic function, and left in the mode it was in. With
    batch statistics beta(x_i) depends on the other rows too, and one backward pass through the sum over the
    batch then mixes their gradients into row i; with running statistics rows are independent and the sum
    gives each its own.

    Args:
        beta_fn: a module (B, D) → (B,), or a function that treats rows independently. A function that hides a
            module, such as a lambda, cannot be put in evaluation mode: pass the module itself.
        x: (B, D) features; no gradient flows into them.

    Returns:
        (B,), differentiable in the parameters of `beta_fn` where gradients are enabled. Zeros where beta does
        not depend on x.

    Raises:
        ValueError: `x` is not (B, D) and floating, or `beta_fn` does not return (B,) finite numbers.
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
    r"""Mean squared gradient of beta with respect to the prompt's features (the derivation, §5.1.2).

    .. math:: E_x[\|\nabla_x \beta(x)\|^2]

    Args:
        beta_fn: as in `squared_gradient_norms`: a module is taken in evaluation mode.
        x: (B, D) features.

    Returns:
        A scalar, differentiable in the parameters of `beta_fn`.

    Raises:
        ValueError: as `squared_gradient_norms`.
    """
    return squared_gradient_norms(beta_fn, x).mean()


def _task_index(task: Tensor | Sequence[str], batch: int) -> Tensor:
    """Number the tasks of a batch from 0: (B,) int64."""
    if isinstance(task, Tensor):
        if task.is_floating_point() or task.shape != (batch,):
            raise ValueError(
                f"task: got {task.dtype} of shape {tuple(task.shape)}, expected integers of shape ({batch},)"
            )
        return torch.unique(task, return_inverse=True)[1]
    # a single name is a sequence of letters, and one of B letters would pass for B tasks
    if isinstance(task, str) or len(task) != batch or not all(isinstance(name, str) for name in task):
        got = repr(task) if isinstance(task, str) else f"{len(task)} entries"
        raise ValueError(f"task: got {got}, expected {batch} names, one per row, or an integer tensor")
    number = {name: i for i, name in enumerate(dict.fromkeys(task))}
    return torch.tensor([number[name] for name in task])


def task_consistency_penalty(beta: Tensor, task: Tensor | Sequence[str]) -> Tensor:
    r"""Variance of beta within each task of the batch (the text of the derivation's §5.1.2).

    .. math:: \frac1B \sum_i \bigl(\beta_i - \bar\beta_{task(i)}\bigr)^2

    The source asks for a beta that is alike within a task type and free between types; a gradient penalty
    does not say that, this does. Moving all betas of one task together costs nothing.

    Args:
        beta: (B,).
        task: the task of each row: (B,) integers, or B names.

    Returns:
        A scalar, in squared units of beta.

    Raises:
        ValueError: `beta` is not (B,) and finite, or `task` is not one name or integer per row.
    """
    require_rows("beta", beta)
    index = _task_index(task, len(beta)).to(beta.device)
    counts = torch.bincount(index).to(beta.dtype)
    means = beta.new_zeros(len(counts)).index_add(0, index, beta) / counts  # (tasks,)
    return (beta - means[index]).square().mean()


def entropy_penalty(beta: Tensor, ref_entropy: Tensor, alpha: float) -> Tensor:
    r"""Mean squared distance of beta from alpha times the reference's entropy (the derivation, §5.1.3).

    .. math:: E_x[(\beta(x) - \alpha H(\pi_{ref}(\cdot|x)))^2]

    Args:
        beta: (B,).
        ref_entropy: (B,) entropy of the reference at the prompt, in nats or nats per token; carries no
            gradient.
        alpha: beta per unit of entropy, a positive number. Never learned: alpha → 0 and beta → 0 would
            satisfy the term.

    Returns:
        A scalar, in squared units of beta.

    Raises:
        ValueError: `beta` or `ref_entropy` is not (B,) and finite, or `alpha` is not a positive finite
            number.
    """
    require_rows("beta", beta)
    require_rows("ref_entropy", ref_entropy, len(beta))
    if isinstance(alpha, Tensor) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha: got {alpha!r}, expected a positive finite number")
    return (beta - alpha * ref_entropy.detach()).square().mean()
