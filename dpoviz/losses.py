r"""The DPO loss in its two readings of beta, and the total objective: the only home of the formula.

With :math:`h = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}` the loss of
a pair is :math:`-\log\sigma(s(x) h)`. The two forms differ in s alone: the derivation (§4.2, §5) prints
:math:`s = 1/\beta(x)`, the ``"inverse"`` form; Rafailov et al. 2023 (arXiv:2305.18290, eq. 7) have :math:`s =
\beta(x)`, the ``"standard"`` form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpoviz.regularizers import (
    entropy_penalty,
    range_penalty,
    require_rows,
    squared_gradient_norms,
    task_consistency_penalty,
)

Form = Literal["inverse", "standard"]
FORMS: tuple[Form, ...] = ("inverse", "standard")


def scale(beta: float | Tensor, form: Form) -> float | Tensor:
    r"""What multiplies h in the loss: :math:`s = 1/\beta` (inverse) or :math:`s = \beta` (standard).

    Args:
        beta: a positive finite number, or (B,) of them.
        form: "inverse" or "standard".

    Returns:
        s, a number for a number and (B,) for (B,); differentiable in beta.

    Raises:
        ValueError: `form` is neither; `beta` is not a positive finite number nor a floating (B,) of them.
    """
    if form not in ("inverse", "standard"):
        raise ValueError(f"form: got {form!r}, expected 'inverse' (s = 1/beta) or 'standard' (s = beta)")
    if isinstance(beta, Tensor):
        require_rows("beta", beta)
        if not (beta > 0).all():
            raise ValueError(f"beta: not positive in rows {(beta <= 0).nonzero().flatten().tolist()}, expected > 0")
    elif isinstance(beta, bool) or not isinstance(beta, Real) or not 0 < beta < math.inf:
        raise ValueError(f"beta: got {beta!r}, expected a positive finite number or a tensor of shape (B,)")
    return 1 / beta if form == "inverse" else beta


def log_ratio_difference(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
) -> Tensor:
    r"""h: how much more the policy prefers chosen to rejected than the reference does.

    .. math:: h = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}

    Args:
        policy_chosen_logps: (B,) :math:`\log\pi(y_w|x)`, summed over the completion, in nats.
        policy_rejected_logps: (B,) :math:`\log\pi(y_l|x)`.
        ref_chosen_logps: (B,) :math:`\log\pi_{ref}(y_w|x)`; carries no gradient.
        ref_rejected_logps: (B,) :math:`\log\pi_{ref}(y_l|x)`; carries no gradient.

    Returns:
        (B,) in nats.

    Raises:
        ValueError: not four floating tensors of one shape (B,), or non-finite rows.
    """
    require_rows("policy_chosen_logps", policy_chosen_logps)
    batch = len(policy_chosen_logps)
    require_rows("policy_rejected_logps", policy_rejected_logps, batch)
    require_rows("ref_chosen_logps", ref_chosen_logps, batch)
    require_rows("ref_rejected_logps", ref_rejected_logps, batch)
    return (policy_chosen_logps - ref_chosen_logps.detach()) - (policy_rejected_logps - ref_rejected_logps.detach())


class DPOOutput(NamedTuple):
    """What `dpo_loss` returns, one number per pair.

    Attributes:
        losses: (B,) in nats, differentiable.
        chosen_rewards: (B,) implicit rewards of the chosen answers, detached.
        rejected_rewards: (B,) implicit rewards of the rejected answers, detached.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """(B,) chosen minus rejected reward, detached: s·h; -logsigmoid of it is `losses`, up to rounding."""
        return self.chosen_rewards - self.rejected_rewards


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float | Tensor,
    *,
    form: Form,
) -> DPOOutput:
    r"""The DPO loss of each pair, unreduced, with the beta of its own prompt.

    .. math:: \ell = -\log\sigma(s h), \qquad \hat r(y) = s \log\frac{\pi(y|x)}{\pi_{ref}(y|x)}

    "inverse", :math:`s = 1/\beta(x)`: the derivation as printed, §4.2 and §5. "standard", :math:`s =
    \beta(x)`: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7. There is no default: the two read the same
    number oppositely.

    Args:
        policy_chosen_logps: (B,) :math:`\log\pi(y_w|x)`, summed over the completion, in nats.
        policy_rejected_logps: (B,) :math:`\log\pi(y_l|x)`.
        ref_chosen_logps: (B,) :math:`\log\pi_{ref}(y_w|x)`; carries no gradient.
        ref_rejected_logps: (B,) :math:`\log\pi_{ref}(y_l|x)`; carries no gradient.
        beta: a positive number, or (B,); a tensor receives the gradient.
        form: "inverse" or "standard".

    Returns:
        Losses, and the implicit rewards (which leave out the :math:`\log Z(x)` that the pair has in common).
        In float32 losses and gradients are finite for |h| up to 1e4 and beta from 1e-6 to 1e6, in both forms.

    Raises:
        ValueError: log-probabilities that are not floating (B,) of one size, or not finite; a beta that is
            neither a positive number nor (B,) of them, (B, 1) included; an unknown form.
    """
    h = log_ratio_difference(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    s = scale(beta, form)
    if isinstance(s, Tensor):
        require_rows("beta", beta, len(h))
    losses = -F.logsigmoid(s * h)
    with torch.no_grad():
        chosen_rewards = s * (policy_chosen_logps - ref_chosen_logps)
        rejected_rewards = s * (policy_rejected_logps - ref_rejected_logps)
    return DPOOutput(losses, chosen_rewards, rejected_rewards)


@dataclass(frozen=True)
class TotalLoss:
    """The objective of a batch and its parts.

    Attributes:
        total: scalar, the sum of `terms`.
        terms: the weighted scalar terms "dpo", "range", "smoothness", "entropy"; one that is switched off is
            0. "smoothness" is the derivation's §5.1.2: gradient penalty plus task consistency.
        dpo: the losses and rewards of the pairs.
        squared_gradients: (B,) lambda_smoothness·‖∇β(x_i)‖², detached: the gradient penalty before its mean.
    """

    total: Tensor
    terms: dict[str, Tensor]
    dpo: DPOOutput
    squared_gradients: Tensor


def _require_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}: got {weight!r}, expected a finite number, at least 0 (0 switches it off)")


def _require_inputs(weight: str, **inputs: object) -> None:
    missing = [name for name, value in inputs.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: missing, needed because {weight} > 0; pass it or set {weight}=0")


def total_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: Tensor,
    *,
    weight: Tensor | None = None,
    form: Form,
    beta_min: float,
    beta_max: float,
    ref_entropy: Tensor | None,
    alpha: float | None,
    lambda_range: float,
    lambda_smoothness: float,
    lambda_consistency: float,
    lambda_entropy: float,
    beta_fn: Callable[[Tensor], Tensor] | None = None,
    x: Tensor | None = None,
    task: Tensor | Sequence[str] | None = None,
) -> TotalLoss:
    r"""The total objective of a batch (the derivation, §5), each term by itself.

    .. math:: L_{total} = L_{DPO} + L_{range} + L_{smooth} + L_{entropy}

    A term is computed only where its weight is above 0.

    Args:
        policy_chosen_logps: (B,), as in `dpo_loss`.
        policy_rejected_logps: (B,), as in `dpo_loss`.
        ref_chosen_logps: (B,), as in `dpo_loss`.
        ref_rejected_logps: (B,), as in `dpo_loss`.
        beta: (B,) the value of beta at each pair's prompt.
        weight: (B,) weight of each pair in the mean of the DPO losses; 0 leaves a pair out. None: all alike.
        form: "inverse" or "standard".
        beta_min: lower end of the range, for `range_penalty`.
        beta_max: upper end of the range.
        ref_entropy: (B,) for `entropy_penalty`, or None.
        alpha: beta per unit of entropy, or None.
        lambda_range: the source's λ1.
        lambda_smoothness: the source's λ2, on `smoothness_penalty`.
        lambda_consistency: the weight of `task_consistency_penalty`, the other half of the source's λ2 term.
        lambda_entropy: the source's λ3.
        beta_fn: the function (B, D) → (B,) that gave `beta`, for the gradient penalty.
        x: (B, D) the features it read.
        task: the task of each row, for the task consistency.

    Returns:
        The sum, its terms, and what `gradients_on_beta` needs.

    Raises:
        ValueError: a λ that is negative or not finite; a λ above 0 whose inputs are missing; pairs whose weights
            are negative, or all 0; whatever `dpo_loss` and the penalties refuse.
    """
    _require_weights(
        lambda_range=lambda_range,
        lambda_smoothness=lambda_smoothness,
        lambda_consistency=lambda_consistency,
        lambda_entropy=lambda_entropy,
    )
    require_rows("beta", beta)
    dpo = dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, form=form)
    zero = beta.new_zeros(())
    if weight is None:
        mean = dpo.losses.mean()
    else:
        require_rows("weight", weight, len(beta))
        if (weight < 0).any() or not weight.any():
            raise ValueError(f"weight: got {weight.tolist()}, expected numbers, at least 0, and not all of them 0")
        mean = (weight * dpo.losses).sum() / weight.sum()
    terms = {"dpo": mean, "range": zero, "smoothness": zero, "entropy": zero}
    squared_gradients = torch.zeros_like(beta)
    if lambda_range > 0:
        terms["range"] = lambda_range * range_penalty(beta, beta_min, beta_max)
    if lambda_smoothness > 0:
        _require_inputs("lambda_smoothness", beta_fn=beta_fn, x=x)
        if len(x) != len(beta):
            raise ValueError(f"x: got {len(x)} rows, expected {len(beta)}, one per row of beta")
        squared_gradients = lambda_smoothness * squared_gradient_norms(beta_fn, x)
        terms["smoothness"] = squared_gradients.mean()
    if lambda_consistency > 0:
        _require_inputs("lambda_consistency", task=task)
        terms["smoothness"] = terms["smoothness"] + lambda_consistency * task_consistency_penalty(beta, task)
    if lambda_entropy > 0:
        _require_inputs("lambda_entropy", ref_entropy=ref_entropy, alpha=alpha)
        terms["entropy"] = lambda_entropy * entropy_penalty(beta, ref_entropy, alpha)
    return TotalLoss(sum(terms.values()), terms, dpo, squared_gradients.detach())


def gradients_on_beta(out: TotalLoss, beta: Tensor) -> dict[str, Tensor]:
    r"""What pulls on the beta of each prompt, by term: :math:`B\,\partial L_{term}/\partial\beta(x_i)`.

    The terms are means over the batch; times B the pull does not shrink with the batch. Gradient descent
    moves beta against it: a positive pull lowers beta.

    The gradient penalty is a functional of the function and has no derivative in the value of beta at one
    prompt. Its pull is defined by holding the shape :math:`\nabla\log\beta` fixed and shifting
    :math:`\log\beta`: as :math:`\|\nabla\beta\|^2 = \beta^2\|\nabla\log\beta\|^2`, the derivative in beta is
    :math:`2\lambda\|\nabla\beta(x_i)\|^2/\beta(x_i)`.

    Args:
        out: what `total_loss` returned; its graph is kept, so `out.total.backward()` may follow.
        beta: (B,) the very tensor that `total_loss` was given, requiring a gradient.

    Returns:
        A dict with the keys of `out.terms`; each value (B,), detached.

    Raises:
        ValueError: `beta` is not the tensor that `total_loss` was given, or requires no gradient.
    """
    if not beta.requires_grad:
        raise ValueError("beta: requires no gradient, expected the differentiable tensor given to total_loss")
    pulls = {}
    for name, term in out.terms.items():
        gradient = None
        if term.requires_grad:
            (gradient,) = torch.autograd.grad(term, beta, retain_graph=True, allow_unused=True)
        if gradient is None and name == "dpo":
            raise ValueError("beta: not a part of out, expected the very tensor that total_loss was given")
        pulls[name] = torch.zeros_like(beta) if gradient is None else len(beta) * gradient
    pulls["smoothness"] = pulls["smoothness"] + 2 * out.squared_gradients / beta.detach()
    return pulls
