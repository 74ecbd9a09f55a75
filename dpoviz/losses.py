"""The DPO loss in both readings of β, and the total objective: the only home of the formula.

For a pair with h = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x) the loss is −log σ(s(x)·h). The two forms
differ only in s. The "inverse" form has s = 1/β(x), as the derivation prints it (§4.2, §5). The "standard" form has
s = β(x), as in Rafailov et al. 2023 (arXiv:2305.18290, eq. 7).
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
    """Return h: how much more the policy prefers the chosen answer than the reference does.

        h = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)

    Args:
        policy_chosen_logps: (B,) log π(y_w|x), summed over the answer's tokens, in nats.
        policy_rejected_logps: (B,) log π(y_l|x), likewise.
        ref_chosen_logps: (B,) log π_ref(y_w|x); receives no gradient.
        ref_rejected_logps: (B,) log π_ref(y_l|x); receives no gradient.

    Returns:
        (B,) in nats.

    Raises:
        ValueError: the four are not finite floating tensors of the same shape (B,).
    """
    require_rows("policy_chosen_logps", policy_chosen_logps)
    batch = len(policy_chosen_logps)
    require_rows("policy_rejected_logps", policy_rejected_logps, batch)
    require_rows("ref_chosen_logps", ref_chosen_logps, batch)
    require_rows("ref_rejected_logps", ref_rejected_logps, batch)
    return (policy_chosen_logps - ref_chosen_logps.detach()) - (policy_rejected_logps - ref_rejected_logps.detach())


class DPOOutput(NamedTuple):
    """The loss and the rewards of each pair, as `dpo_loss` returns them.

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
        """(B,) chosen minus rejected reward, s·h, detached; `losses` is −log σ of it if no label is smoothed."""
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
    """Return the DPO loss of each pair, unreduced, with the beta of the pair's prompt.

        ℓ = −log σ(s·h),    r̂(y) = s·log π(y|x)/π_ref(y|x)

    In the "inverse" form s = 1/β(x), as the derivation prints it (§4.2, §5). In the "standard" form s = β(x) (Rafailov
    et al. 2023, arXiv:2305.18290, eq. 7). There is no default, because the same beta means the opposite in the other
    form.

    Args:
        policy_chosen_logps: (B,) log π(y_w|x), summed over the answer's tokens, in nats.
        policy_rejected_logps: (B,) log π(y_l|x), likewise.
        ref_chosen_logps: (B,) log π_ref(y_w|x); receives no gradient.
        ref_rejected_logps: (B,) log π_ref(y_l|x); receives no gradient.
        beta: a positive number, or (B,); a tensor receives the gradient.
        form: "inverse" or "standard".

    Returns:
        The losses ℓ and the implicit rewards r̂, which leave out the term in log Z(x) that both answers share. In
        float32, losses and gradients are finite for |h| up to 1e4 and beta from 1e-6 to 1e6, in both forms.

    Raises:
        ValueError: the log-probabilities are not finite floating (B,) of the same size; `beta` is neither a positive
            number nor (B,) of them ((B, 1) is refused too); the form is unknown.
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
    """The objective of a batch and its terms.

    Attributes:
        total: scalar, the sum of `terms`.
        terms: the weighted scalar terms: "dpo", and those of "range", "smoothness", "consistency" and "entropy" that
            are switched on.
        dpo: the losses and rewards of the pairs.
        squared_gradients: (B,) λ2·‖∇β(x_i)‖², detached: the weighted gradient penalty before its mean.
    """

    total: Tensor
    terms: dict[str, Tensor]
    dpo: DPOOutput
    squared_gradients: Tensor


class Logps(NamedTuple):
    """Log-probabilities of a batch of pairs, each (B,), summed over the answer's tokens, in nats.

    Attributes:
        policy_chosen: log π(y_w|x).
        policy_rejected: log π(y_l|x).
        ref_chosen: log π_ref(y_w|x); receives no gradient.
        ref_rejected: log π_ref(y_l|x); receives no gradient.
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
    smoothing: Tensor | None = None,
    normalised: bool = True,
    ref_entropy: Tensor | None = None,
    beta_fn: Callable[[Tensor], Tensor] | None = None,
    x: Tensor | None = None,
    task: Tensor | Sequence[str] | None = None,
) -> TotalLoss:
    """Return the total objective of a batch (the derivation, §5) and each of its terms.

        L_total = L_DPO + L_range + L_smooth + L_entropy

    L_smooth is the gradient penalty plus the task consistency. A term is computed only if its weight is above 0.

    Args:
        logps: log-probabilities under policy and reference.
        beta: (B,) beta at each pair's prompt.
        form: "inverse" or "standard".
        regularization: the weights of the penalties; None for the DPO loss alone.
        weight: (B,) weight of each pair in the mean of the DPO losses; 0 leaves the pair out. None weighs all pairs
            equally.
        smoothing: (B,) probability ε that the label is wrong; the loss of a pair is then (1 − ε)·ℓ(h) + ε·ℓ(−h).
        normalised: divide the weighted sum by the sum of the weights; False divides it by B.
        ref_entropy: (B,) for the entropy term, in the unit that `alpha` is per.
        beta_fn: the function (B, D) → (B,) that returned `beta`, for the gradient penalty.
        x: (B, D) the features that `beta_fn` read.
        task: the task of each row, for the task consistency.

    Returns:
        The total, its terms, and what `gradients_on_beta` needs.

    Raises:
        ValueError: an input of a penalty is missing; a pair weight is negative, or all are 0; or an input is refused by
            `dpo_loss` or a penalty.
    """
    require_rows("beta", beta)
    dpo = dpo_loss(*logps, beta, form=form)
    if smoothing is not None:
        require_rows("smoothing", smoothing, len(beta))
        # −log σ(−z) = −log σ(z) + z, and the margin z = s·h
        margin = scale(beta, form) * log_ratio_difference(*logps)
        dpo = dpo._replace(losses=dpo.losses + smoothing * margin)
    if weight is None:
        mean = dpo.losses.mean()
    else:
        require_rows("weight", weight, len(beta))
        if (weight < 0).any() or not weight.any():
            raise ValueError(f"weight: got {weight.tolist()}, expected numbers, at least 0, and not all of them 0")
        mean = (weight * dpo.losses).sum() / (weight.sum() if normalised else len(weight))
    total, terms, squared_gradients = mean, {"dpo": mean}, torch.zeros_like(beta)
    if regularization is not None:
        found = penalties(beta, regularization, ref_entropy=ref_entropy, beta_fn=beta_fn, x=x, task=task)
        total = sum(found.terms.values(), mean)
        terms |= found.terms
        squared_gradients = found.squared_gradients
    return TotalLoss(total, terms, dpo, squared_gradients.detach())


def gradients_on_beta(out: TotalLoss, beta: Tensor) -> dict[str, Tensor]:
    """Return how strongly each term pulls on the beta of each prompt.

        pull(x_i) = B·∂L_term/∂β(x_i)

    The terms are means over the batch; the factor B keeps the pull independent of the batch size. Gradient descent
    moves beta against the pull: a positive pull lowers beta.

    The gradient penalty depends on the function β, so it has no derivative in the value of β at a single prompt. Its
    pull is defined by shifting log β while ∇log β stays fixed. Since ‖∇β‖² = β²·‖∇log β‖², the derivative in β is
    2·λ2·‖∇β(x_i)‖²/β(x_i).

    Args:
        out: the return value of `total_loss`. Its graph is kept, so `out.total.backward()` may follow.
        beta: (B,) the same tensor object that `total_loss` got; it must require a gradient.

    Returns:
        A dict with the keys of `out.terms`; each value is (B,), detached.

    Raises:
        ValueError: `beta` is not the tensor that `total_loss` got, or does not require a gradient.
    """
    if not beta.requires_grad:
        raise ValueError("beta: requires no gradient, expected the differentiable tensor that total_loss got")
    pulls = {}
    for name, term in out.terms.items():
        gradient = None
        if term.requires_grad:
            (gradient,) = torch.autograd.grad(term, beta, retain_graph=True, allow_unused=True)
        if gradient is None and name == "dpo":
            raise ValueError("beta: not a part of out, expected the same tensor object that total_loss got")
        pulls[name] = torch.zeros_like(beta) if gradient is None else len(beta) * gradient
    if "smoothness" in pulls:
        pulls["smoothness"] = pulls["smoothness"] + 2 * out.squared_gradients / beta.detach()
    return pulls
