r"""The DPO loss in its two readings of beta, and the total objective: the only home of the formula.

With :math:`h = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}` the loss of
a pair is :math:`-\log\sigma(s(x) h)`. The two forms differ in s alone: the derivation (§4.2, §5) prints
:math:`s = 1/\beta(x)`, the ``"inverse"`` form; Rafailov et al. 2023 (arXiv:2305.18290, eq. 7) have :math:`s =
\beta(x)`, the ``"standard"`` form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpoviz.forms import Form, scale
from dpoviz.regularizers import Regularization, penalties
from dpoviz.validation import require_rows


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
    if isinstance(beta, Tensor):
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
        terms: the weighted scalar terms: "dpo", and "range", "smoothness", "consistency", "entropy" where they are
            switched on.
        dpo: the losses and rewards of the pairs.
        squared_gradients: (B,) lambda_smoothness·‖∇β(x_i)‖², detached: the gradient penalty before its mean.
    """

    total: Tensor
    terms: dict[str, Tensor]
    dpo: DPOOutput
    squared_gradients: Tensor


class Logps(NamedTuple):
    """Log-probabilities of a batch of pairs, each (B,), summed over the completion, in nats.

    Attributes:
        policy_chosen: log π(y_w|x).
        policy_rejected: log π(y_l|x).
        ref_chosen: log π_ref(y_w|x); carries no gradient.
        ref_rejected: log π_ref(y_l|x); carries no gradient.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor


def total_loss(
    logps: Logps,
    beta: Tensor,
    *,
    form: Form,
    regularization: Regularization | None,
    weight: Tensor | None = None,
    ref_entropy: Tensor | None = None,
    beta_fn: Callable[[Tensor], Tensor] | None = None,
    x: Tensor | None = None,
    task: Tensor | Sequence[str] | None = None,
) -> TotalLoss:
    """Return the total objective of a batch (the derivation, §5), each term by itself.

        L_total = L_DPO + L_range + L_smooth + L_entropy

    A term is computed only where its weight is above 0.

    Args:
        logps: of policy and reference.
        beta: (B,) the value of beta at each pair's prompt.
        form: "inverse" or "standard".
        regularization: weights of the penalties; None leaves the DPO loss alone.
        weight: (B,) weight of each pair in the mean of the DPO losses; 0 leaves a pair out. None: all alike.
        ref_entropy: (B,) for the entropy term.
        beta_fn: the function (B, D) → (B,) that gave `beta`, for the gradient penalty.
        x: (B, D) the features it read.
        task: the task of each row, for the task consistency.

    Returns:
        The sum, its terms, and what `gradients_on_beta` needs.

    Raises:
        ValueError: a penalty whose inputs are missing; pairs whose weights are negative, or all 0; whatever
            `dpo_loss` and the penalties refuse.
    """
    require_rows("beta", beta)
    dpo = dpo_loss(*logps, beta, form=form)
    if weight is None:
        mean = dpo.losses.mean()
    else:
        require_rows("weight", weight, len(beta))
        if (weight < 0).any() or not weight.any():
            raise ValueError(f"weight: got {weight.tolist()}, expected numbers, at least 0, and not all of them 0")
        mean = (weight * dpo.losses).sum() / weight.sum()
    total, terms, squared_gradients = mean, {"dpo": mean}, torch.zeros_like(beta)
    if regularization is not None:
        found = penalties(beta, regularization, ref_entropy=ref_entropy, beta_fn=beta_fn, x=x, task=task)
        total = sum(found.terms.values(), mean)
        terms |= found.terms
        squared_gradients = found.squared_gradients
    return TotalLoss(total, terms, dpo, squared_gradients.detach())


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
    if "smoothness" in pulls:
        pulls["smoothness"] = pulls["smoothness"] + 2 * out.squared_gradients / beta.detach()
    return pulls
