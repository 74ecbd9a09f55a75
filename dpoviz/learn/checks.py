r"""Answer checks for the exercises: the reader's function in, a sentence out that names the mistake.

Each check calls the reader's function on fixed float64 numbers and compares the answer with the right one and
with what each known mistake would give; all of these are worked out here by their closed forms, not by the
library. The numbers are such that no two of them agree. Nothing the reader's function does stops a notebook:
an exception becomes a sentence, and a function that returns nothing yet is told so.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor, nn

from dpoviz.forms import Form

# float32 answers are welcome (relative error 1e-7 per operation); two mistakes differ by more than 1e-3
_TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
_OTHER: dict[Form, Form] = {"inverse": "standard", "standard": "inverse"}
_SCALE = {"inverse": "1/β", "standard": "β"}


@dataclass(frozen=True)
class Verdict:
    """What a check says.

    Attributes:
        right: True, False, or None for an exercise that nobody has begun.
        sentence: what is right, or which mistake was seen and how to mend it.
    """

    right: bool | None
    sentence: str

    @property
    def mark(self) -> str:
        return {True: "✓ Right.", False: "✗ Not right.", None: "… Not yet."}[self.right]

    def __repr__(self) -> str:
        return f"{self.mark} {self.sentence}"

    def _repr_markdown_(self) -> str:
        return f"**{self.mark}** {self.sentence}"


class _Stop(Exception):
    """Carries a verdict out of a check at the first thing that is wrong."""

    def __init__(self, right: bool | None, sentence: str) -> None:
        self.verdict = Verdict(right, sentence)


def _check(body: Callable[..., Verdict]) -> Callable[..., Verdict]:
    @wraps(body)
    def check(*args, **kwargs) -> Verdict:
        try:
            return body(*args, **kwargs)
        except _Stop as stop:
            return stop.verdict

    return check


def _call(fn: Callable, *args: object) -> object:
    try:
        came = fn(*args)
    except NotImplementedError:
        came = None
    except Exception as error:
        inside = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if frame.line]
        where = f" at `{inside[0].line}`" if inside else ""
        raise _Stop(False, f"Your function stopped with {type(error).__name__}: {error}{where}") from None
    if came is None or came is ...:
        raise _Stop(None, "Your function returns nothing so far: write its body and run this cell again.")
    return came


def _tensor(came: object, name: str) -> Tensor:
    try:
        return torch.as_tensor(came).to(torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise _Stop(False, f"{name} came as {type(came).__name__}, expected a tensor of numbers.") from None


def _same(came: Tensor, expected: Tensor) -> bool:
    return came.shape == expected.shape and torch.allclose(came, expected, **_TOLERANCE)


def _compare(name: str, came: object, right: Tensor, mistakes: dict[str, Tensor]) -> None:
    """Stop with the sentence of the mistake that `came` agrees with, or of the first entry that is off."""
    came = _tensor(came, name).detach()
    if _same(came, right):
        return
    for sentence, wrong in mistakes.items():
        if _same(came, wrong):
            raise _Stop(False, sentence)
    if came.shape != right.shape:
        raise _Stop(False, f"{name}: came shape {tuple(came.shape)}, expected {tuple(right.shape)}.")
    gap = torch.nan_to_num((came - right).abs(), nan=torch.inf)
    at = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    where = f"{name}[{', '.join(map(str, at))}]" if at else name
    raise _Stop(
        False,
        f"{where} came {came[at].item():.6g}, expected {right[at].item():.6g}; it is none of the usual mistakes.",
    )


def _rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _softplus(z: Tensor) -> Tensor:
    """-log σ(-z) for moderate z, by its definition."""
    return torch.log1p(torch.exp(z))


# -- the loss ------------------------------------------------------------------------------------------------


def completion_logps_answers() -> tuple[tuple[Tensor, ...], Tensor, dict[str, Tensor]]:
    """Arguments, right answer and known mistakes of `check_completion_logps`."""
    logps = -torch.tensor([[0.3, 1.1, 0.7, 2.3], [1.9, 0.2, 0.5, 0.8], [0.6, 1.4, 2.9, 0.1]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True, False], [True, True, True, True], [False, False, True, False]])
    kept = logps * mask
    right = kept.sum(dim=1)
    mistakes = {
        "You average over the tokens where the equation sums: log π(y|x) = Σ_t log π(y_t|x, y_<t). A mean "
        "divides h by the length of the answer, which is a hidden, different β for every pair.": right / mask.sum(1),
        "You divide by the padded length: the equation sums, and padding has no part in it.": kept.mean(dim=1),
        "The mask is not used: prompt and padding tokens are counted as if they were the answer.": logps.sum(dim=1),
        "The mask is the wrong way round: you sum what is not the answer.": (logps * ~mask).sum(dim=1),
        "You sum over the batch as well: keep one number per answer.": right.sum(),
        "You sum over the batch (axis 0); the tokens of one answer lie along axis 1.": kept.sum(dim=0),
        "The sign is turned: log-probabilities are negative.": -right,
    }
    return (logps, mask), right, mistakes


@_check
def check_completion_logps(fn: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    r"""Check the reader's :math:`\log\pi(y|x) = \sum_t \log\pi(y_t|x, y_{<t})`.

    Args:
        fn: (token_logps (B, T), completion_mask (B, T) bool) → (B,).

    Returns:
        The verdict.
    """
    args, right, mistakes = completion_logps_answers()
    _compare("logps", _call(fn, *(a.clone() for a in args)), right, mistakes)
    return Verdict(True, "The log-probability of an answer is the sum over its own tokens.")


def dpo_loss_answers(form: Form) -> tuple[tuple[Tensor, ...], dict, dict]:
    """Arguments, right answers and known mistakes (by part) of `check_dpo_loss`."""
    chosen, rejected = _rows(-3.1, -7.4, -2.2, -11.3), _rows(-4.0, -6.1, -6.3, -10.2)
    ref_chosen, ref_rejected = _rows(-3.9, -6.6, -3.0, -10.4), _rows(-3.3, -7.2, -5.1, -12.0)
    beta = _rows(0.2, 0.5, 1.7, 3.1)
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    h = chosen_ratio - rejected_ratio  # 1.5, -1.9, 2.0, -2.7
    s, other = (1 / beta, beta) if form == "inverse" else (beta, 1 / beta)
    losses = _softplus(-s * h)
    matrix = _softplus(-s[:, None] * h)
    column = (
        "β has become a column (B, 1): against h of shape (B,) it broadcasts to (B, B), every β meeting every "
        "pair. Keep it (B,)."
    )
    wrong_losses = {
        f"β and 1/β are swapped: this is the {_OTHER[form]} form, s = {_SCALE[_OTHER[form]]}; the {form} form has "
        f"s = {_SCALE[form]}.": _softplus(-other * h),
        "Chosen and rejected are swapped (or the sign of h is): the loss falls as the policy comes to prefer the "
        "rejected answer.": _softplus(s * h),
        "β is missing from the loss: this is −log σ(h).": _softplus(-h),
        "The reference is missing: h compares each log-probability with the reference's.": _softplus(
            -s * (chosen - rejected)
        ),
        "The minus sign is missing: log σ is negative, the loss is −log σ.": -losses,
        "The logarithm is missing: the loss is −log σ(s·h), this is −σ(s·h).": -torch.sigmoid(s * h),
        "The losses are averaged already: return one per pair, (B,); the mean belongs to the caller.": losses.mean(),
        "The losses are summed already: return one per pair, (B,).": losses.sum(),
        column: matrix,
        column + " (You averaged the matrix, which hides it.)": matrix.mean(),
        "One β, their mean, is used for all pairs: each pair has the β of its own prompt.": _softplus(
            -(1 / beta.mean() if form == "inverse" else beta.mean()) * h
        ),
    }
    used = f"the loss used s = {_SCALE[form]}"
    wrong_rewards = {
        f"The rewards are without β: r̂ = s·log(π/π_ref), and {used}.": (chosen_ratio, rejected_ratio),
        f"The rewards carry another β than the loss: they have s = {_SCALE[_OTHER[form]]}, {used}.": (
            other * chosen_ratio,
            other * rejected_ratio,
        ),
        f"The rewards carry one β, the mean, for all prompts; {used} of each pair's own prompt.": (
            (1 / beta.mean() if form == "inverse" else beta.mean()) * chosen_ratio,
            (1 / beta.mean() if form == "inverse" else beta.mean()) * rejected_ratio,
        ),
        "The rewards lack the reference: r̂ = s·log(π/π_ref), not s·log π.": (s * chosen, s * rejected),
        "The rewards are swapped: chosen comes first.": (s * rejected_ratio, s * chosen_ratio),
    }
    right = {"losses": losses, "rewards": torch.stack([s * chosen_ratio, s * rejected_ratio])}
    wrong = {
        "losses": wrong_losses,
        "rewards": {sentence: torch.stack(pair) for sentence, pair in wrong_rewards.items()},
    }
    return (chosen, rejected, ref_chosen, ref_rejected, beta), right, wrong


@_check
def check_dpo_loss(fn: Callable[..., tuple[Tensor, Tensor, Tensor]], *, form: Form) -> Verdict:
    r"""Check the reader's DPO loss :math:`-\log\sigma(s h)` and rewards :math:`s\log(\pi/\pi_{ref})`.

    Beyond the numbers it looks at what numbers hide: that gradients reach the policy and not the reported
    rewards, that |h| = 2000 stays finite, and that a β of shape (B, 1) is refused instead of broadcast.

    Args:
        fn: (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta), each
            (B,), → (losses, chosen_rewards, rejected_rewards), each (B,).
        form: "inverse" (s = 1/β) or "standard" (s = β), the one that `fn` should have.

    Returns:
        The verdict.
    """
    args, right, mistakes = dpo_loss_answers(form)
    args = [a.clone().requires_grad_(i < 2) for i, a in enumerate(args)]
    came = _call(fn, *args)
    if not isinstance(came, (tuple, list)) or len(came) != 3:
        raise _Stop(False, "Return three things: losses, chosen_rewards, rejected_rewards, each of shape (B,).")
    losses, *rewards = (_tensor(part, "a returned value") for part in came)
    _compare("losses", losses, right["losses"], mistakes["losses"])
    if any(part.shape != losses.shape for part in rewards):
        raise _Stop(False, f"rewards: came shape {tuple(rewards[0].shape)}, expected {tuple(losses.shape)}.")
    _compare("rewards", torch.stack(rewards), right["rewards"], mistakes["rewards"])
    if not losses.requires_grad:
        raise _Stop(False, "The losses carry no gradient to the policy: something was detached that should not be.")
    if any(part.requires_grad for part in rewards):
        raise _Stop(False, "The rewards carry a gradient: they are there to be looked at, detach them.")
    _check_extremes(fn)
    _check_column(fn, args)
    return Verdict(
        True, f"Loss and rewards of the {form} form, one β per prompt, stable for large |h|, and a column β is refused."
    )


def _check_extremes(fn: Callable) -> None:
    far = _call(fn, _rows(0.0, -2000.0), _rows(-2000.0, 0.0), _rows(0.0, 0.0), _rows(0.0, 0.0), _rows(1.0, 1.0))
    if not torch.isfinite(_tensor(far[0], "losses")).all():
        raise _Stop(
            False,
            "Right for moderate h, but at h = ±2000 the loss is not finite: σ rounds to 0 and its logarithm is −∞. "
            "Stay in log space: `torch.nn.functional.logsigmoid`.",
        )


def _check_column(fn: Callable, args: list[Tensor]) -> None:
    *logps, beta = args
    try:
        fn(*logps, beta[:, None])
    except Exception:
        return
    raise _Stop(
        False,
        "Right for β of shape (B,), but β as a column (B, 1), which is what a linear layer returns, goes through: "
        "against h it broadcasts to (B, B), and the mean of that looks like a loss. Raise a ValueError for it.",
    )


def beta_gradient_answers() -> tuple[tuple[Tensor, ...], dict[Form, Tensor], dict[Form, dict[str, Tensor]]]:
    """Arguments (without the form), right answers and known mistakes by form of `check_beta_gradient`."""
    h, beta = _rows(1.5, -0.8, 0.3, -2.2), _rows(0.4, 0.7, 2.5, 1.3)
    s = {"inverse": 1 / beta, "standard": beta}
    slope = {"inverse": -1 / beta**2, "standard": torch.ones_like(beta)}
    right, mistakes = {}, {}
    for form, other in _OTHER.items():
        weight = torch.sigmoid(-s[form] * h)
        right[form] = -weight * h * slope[form]
        mistakes[form] = {
            f"The sign is turned ({form} form): −log σ falls where s·h grows, and 1/β falls where β grows.": -right[
                form
            ],
            f"The weight is σ(−s·h), small where the pair is ranked rightly; you have σ(s·h) ({form} form).": (
                -(1 - weight) * h * slope[form]
            ),
            f"The factor h is missing ({form} form): s multiplies h inside the loss.": -weight * slope[form],
            f"β and 1/β are swapped in the {form} form: this is the {other} form's gradient.": (
                -torch.sigmoid(-s[other] * h) * h * slope[other]
            ),
        }
    mistakes["inverse"]["This is ∂ℓ/∂s: in the inverse form s = 1/β, and the chain rule adds ds/dβ = −1/β²."] = (
        right["inverse"] / slope["inverse"]
    )
    return (h, beta), right, mistakes


@_check
def check_beta_gradient(fn: Callable[[Tensor, Tensor, Form], Tensor]) -> Verdict:
    r"""Check the reader's :math:`\partial\ell/\partial\beta = -\sigma(-s h)\,h\,s'(\beta)` in both forms.

    Args:
        fn: (h (B,), beta (B,), form) → (B,).

    Returns:
        The verdict.
    """
    (h, beta), right, mistakes = beta_gradient_answers()
    for form in ("standard", "inverse"):
        _compare(f"gradient ({form})", _call(fn, h.clone(), beta.clone(), form), right[form], mistakes[form])
    return Verdict(
        True, "Rightly ranked pairs push s up in both forms: β up in the standard form, β down in the inverse form."
    )


# -- the exact world -----------------------------------------------------------------------------------------


def optimal_policy_answers() -> tuple[tuple, Tensor, dict[str, Tensor]]:
    """Arguments, right answer and known mistakes of `check_optimal_policy`."""
    ref = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, -0.4, 2.1], [0.3, 1.7, -0.9]], dtype=torch.float64)
    beta = 0.6
    weights = ref * torch.exp(rewards / beta)
    right = (weights / weights.sum(1, keepdim=True)).log()

    def normalised(w: Tensor) -> Tensor:
        return (w / w.sum(1, keepdim=True)).log()

    mistakes = {
        "Z is forgotten: the rows do not sum to 1. Subtract log Z(x) = log Σ_y π_ref(y|x) exp(r/β).": weights.log(),
        "One Z for the whole table: every prompt has its own, so sum over the answers of one row.": (
            weights / weights.sum()
        ).log(),
        "Z is summed over the prompts (axis 0); it is a sum over answers, axis 1.": (weights / weights.sum(0)).log(),
        "β and 1/β are swapped: π* ∝ π_ref·exp(r/β), the reward is divided by β.": normalised(
            ref * torch.exp(beta * rewards)
        ),
        "β is missing: this is π_ref·exp(r)/Z.": normalised(ref * torch.exp(rewards)),
        "The reference is missing: this is the softmax of r/β.": normalised(torch.exp(rewards / beta)),
        "The reference is divided by β too: only the reward is.": normalised((ref * torch.exp(rewards)) ** (1 / beta)),
        "The sign of the reward is turned: this policy prefers bad answers.": normalised(
            ref * torch.exp(-rewards / beta)
        ),
        "These are probabilities; return log-probabilities.": right.exp(),
        "π_ref came in as log-probabilities and is used as probabilities: add it to r/β inside the exponential.": (
            normalised(-ref.log() * torch.exp(rewards / beta))
        ),
    }
    return (ref.log(), rewards, beta), right, mistakes


@_check
def check_optimal_policy(fn: Callable[[Tensor, Tensor, float], Tensor]) -> Verdict:
    r"""Check the reader's :math:`\pi^* = \pi_{ref}\exp(r/\beta)/Z`, and that it stands a small β.

    Args:
        fn: (ref_logps (X, Y), rewards (X, Y), beta number) → (X, Y) log-probabilities.

    Returns:
        The verdict.
    """
    (ref_logps, rewards, beta), right, mistakes = optimal_policy_answers()
    _compare("log π*", _call(fn, ref_logps.clone(), rewards.clone(), beta), right, mistakes)
    far = _tensor(_call(fn, ref_logps.clone(), rewards.clone(), 1e-3), "log π*")
    if not torch.isfinite(far).all():
        raise _Stop(
            False,
            "Right at β = 0.6, but at β = 0.001 it is not finite: exp(r/β) overflows. Stay in log space: "
            "log π_ref + r/β minus its `torch.logsumexp`.",
        )
    return Verdict(True, "π* = π_ref·exp(r/β)/Z, row by row, in log space.")


def reward_difference_answers() -> tuple[tuple, Tensor, dict[str, Tensor]]:
    """Arguments, right answer and known mistakes of `check_reward_difference`."""
    chosen, rejected = _rows(-0.4, -1.9, -1.1), _rows(-2.3, -0.7, -1.6)
    ref_chosen, ref_rejected = _rows(-1.2, -1.5, -0.8), _rows(-0.9, -1.0, -2.1)
    beta = 0.3
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    mistakes = {
        "The reference is missing: log π*(y_w)/π*(y_l) is what §4.1 prints first, and it is the equality that does "
        "not hold.": chosen - rejected,
        "The reference is missing: this is β·log π(y_w)/π(y_l).": beta * (chosen - rejected),
        "β is missing: this is h, and r_w − r_l = β·h.": h,
        "β and 1/β are swapped: r_w − r_l = β·h, the temperature comes back as a factor.": h / beta,
        "Chosen and rejected are swapped.": -beta * h,
        "The reference is added: the ratio π/π_ref is a difference of logarithms.": beta
        * ((chosen + ref_chosen) - (rejected + ref_rejected)),
    }
    return (chosen, rejected, ref_chosen, ref_rejected, beta), beta * h, mistakes


@_check
def check_reward_difference(fn: Callable[..., Tensor]) -> Verdict:
    r"""Check the reader's :math:`r_w - r_l = \beta h`, which reads the reward back from the optimal policy.

    Args:
        fn: (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta number),
            the first four (B,), → (B,).

    Returns:
        The verdict.
    """
    args, right, mistakes = reward_difference_answers()
    _compare("r_w − r_l", _call(fn, *args), right, mistakes)
    return Verdict(True, "r_w − r_l = β·h: Z(x) is the same for both answers and cancels.")


# -- the regularisers ----------------------------------------------------------------------------------------


def entropy_penalty_answers() -> tuple[tuple, Tensor, dict[str, Tensor]]:
    """Arguments, right answer and known mistakes of `check_entropy_penalty`."""
    beta, entropy, alpha = _rows(0.1, 0.7, 0.45, 1.2), _rows(2.0, 1.1, 3.3, 0.4), 0.2
    gap = beta - alpha * entropy
    column = "β has become a column (B, 1): against H of shape (B,) it broadcasts to (B, B), every prompt with every H."
    mistakes = {
        "You sum over the batch: E_x is a mean, and a sum makes λ3 depend on the batch size.": gap.square().sum(),
        "One number per prompt: the term is their mean, E_x.": gap.square(),
        "The mean is squared: positive and negative gaps cancel. Square first, then average.": gap.mean().square(),
        "The square is missing: this is the mean absolute gap.": gap.abs().mean(),
        "The square is missing: gaps of opposite sign cancel.": gap.mean(),
        "α is missing: this is (β − H)².": (beta - entropy).square().mean(),
        "α is on the wrong side: the line is β = αH, not αβ = H.": (alpha * beta - entropy).square().mean(),
        "α divides H; the line is β = αH.": (beta - entropy / alpha).square().mean(),
        "This is the root of the mean square; the term has no root.": gap.square().mean().sqrt(),
        column: (beta[:, None] - alpha * entropy).square().mean(),
        "There is a factor ½ that the term does not have.": gap.square().mean() / 2,
    }
    return (beta, entropy, alpha), gap.square().mean(), mistakes


@_check
def check_entropy_penalty(fn: Callable[[Tensor, Tensor, float], Tensor]) -> Verdict:
    r"""Check the reader's :math:`E_x[(\beta(x) - \alpha H)^2]`, and that no gradient reaches the reference.

    Args:
        fn: (beta (B,), ref_entropy (B,), alpha number) → scalar.

    Returns:
        The verdict.
    """
    (beta, entropy, alpha), right, mistakes = entropy_penalty_answers()
    beta, entropy = beta.requires_grad_(), entropy.requires_grad_()
    penalty = _tensor(_call(fn, beta, entropy, alpha), "penalty")
    _compare("penalty", penalty, right, mistakes)
    if not penalty.requires_grad:
        raise _Stop(False, "The penalty carries no gradient to β: something was detached that should not be.")
    if torch.autograd.grad(penalty, [beta, entropy], allow_unused=True)[1] is not None:
        raise _Stop(False, "A gradient reaches the entropy of the reference, which is frozen: detach it.")
    return Verdict(True, "The mean squared distance from the line αH, with a gradient on β alone.")


class _Bumpy(nn.Module):
    """exp(w·(x - m)/√(v + eps)): m, v are the batch's in training mode and stored ones in evaluation mode."""

    mean, var, weight = _rows(0.4, -0.3, 0.2), _rows(1.9, 0.6, 1.3), _rows(0.7, -0.5, 0.3)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False).double()
        self.norm.running_mean.copy_(self.mean)
        self.norm.running_var.copy_(self.var)
        self.weight_ = nn.Parameter(self.weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(self.norm(x) @ self.weight_)


def _batch_jacobian(x: Tensor) -> Tensor:
    """(B, B, D) with ∂β(x_i)/∂x_j of `_Bumpy` in training mode."""
    net = _Bumpy()
    return torch.autograd.functional.jacobian(net, x)


def smoothness_penalty_answers() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Features, right answer and known mistakes of `check_smoothness_penalty`."""
    x = torch.stack([_rows(0.2, -1.1, 0.7), _rows(1.6, 0.4, -0.6), _rows(-0.7, 0.9, 1.8), _rows(2.3, -0.2, 0.1)])
    per_unit = _Bumpy.weight / (_Bumpy.var + 1e-5).sqrt()  # (D,) gradient of log beta
    beta = torch.exp((x - _Bumpy.mean) @ per_unit)
    gradient = beta[:, None] * per_unit  # (B, D)
    norms = gradient.square().sum(1)
    jacobian = _batch_jacobian(x)
    by_sum = jacobian.sum(0).square().sum(1)
    own = torch.stack([jacobian[i, i] for i in range(len(x))]).square().sum(1)
    mistakes = {
        "The gradient is taken through the sum over the batch in training mode: batch norm makes β(x_i) depend on "
        "the other rows, and their gradients are mixed into row i. Put the module in evaluation mode for the "
        "penalty, and back afterwards.": by_sum.mean(),
        "The gradient is taken in training mode: row by row, but of a β that depends on the batch. Put the module in "
        "evaluation mode for the penalty, and back afterwards.": own.mean(),
        "The square is missing: the term is ‖∇β‖², this is the mean of ‖∇β‖.": norms.sqrt().mean(),
        "You sum over the batch: E_x is a mean.": norms.sum(),
        "One number per prompt: the term is their mean, E_x.": norms,
        "You average over the features too: ‖·‖² is a sum over them.": gradient.square().mean(),
        "This is the gradient of the mean of β: it is 1/B of each row's own, and its square 1/B². Take the gradient "
        "of the sum, so that each row keeps its own.": norms.mean() / len(x) ** 2,
        "This is the gradient of log β; the term has β itself.": per_unit.square().sum(),
        "Average after squaring: this squares the mean gradient over the batch, where gradients cancel.": (
            gradient.mean(0).square().sum()
        ),
        "There is a factor ½ that the term does not have.": norms.mean() / 2,
    }
    return x, norms.mean(), mistakes


@_check
def check_smoothness_penalty(fn: Callable[[nn.Module, Tensor], Tensor]) -> Verdict:
    r"""Check the reader's :math:`E_x[\|\nabla_x\beta(x)\|^2]` on a module with batch norm, in training mode.

    Also seen: a penalty that cannot train (no gradient to the parameters), and a module that is left in
    another mode than it came in.

    Args:
        fn: (beta_fn module (B, D) → (B,), x (B, D)) → scalar.

    Returns:
        The verdict.
    """
    x, right, mistakes = smoothness_penalty_answers()
    net = _Bumpy().train()
    penalty = _tensor(_call(fn, net, x.clone()), "penalty")
    _compare("penalty", penalty, right, mistakes)
    if not penalty.requires_grad:
        raise _Stop(
            False, "The number is right, but it has no gradient to train by: `autograd.grad(..., create_graph=True)`."
        )
    if not net.training or not net.norm.training:
        raise _Stop(False, "The module came in training mode and is left in evaluation mode: put it back.")
    return Verdict(
        True,
        "Each prompt's own gradient, of the deterministic β, squared, summed over features, averaged over prompts.",
    )
