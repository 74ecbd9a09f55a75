r""":math:`\beta` as a function of the prompt: four of them, all called alike, saved and loaded alike.

A beta may see the prompt and what the reference makes of it, never the answers: if it saw them, :math:`Z(x)`
would no longer cancel between chosen and rejected (the derivation, §4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from dpoviz.validation import require_features, require_positive, rows_where, task_index

_LOG_BOUND = 20.0  # beta / beta0 stays in e^±20: far beyond any use, and far inside float32


def _from_log(log_ratio: Tensor, beta0: float) -> Tensor:
    """beta0·exp(log_ratio), log_ratio held smoothly within ±20; exactly beta0 where it is 0."""
    return beta0 * torch.exp(_LOG_BOUND * torch.tanh(log_ratio / _LOG_BOUND))


class Beta(nn.Module, PyTorchModelHubMixin):
    """A function of the prompt, called as ``beta(x, *, task=None, ref_entropy=None) -> (B,)``.

    Saved by `save_pretrained(folder)` (safetensors and config.json) and `push_to_hub`; loaded, in evaluation
    mode, by `from_pretrained(folder or hub name)`.
    """

    def forward(
        self, x: Tensor, *, task: Sequence[str] | Tensor | None = None, ref_entropy: Tensor | None = None
    ) -> Tensor:
        """Beta at each prompt.

        Args:
            x: (B, D) features of the prompts, from the frozen reference: they are expected to carry no
                gradient.
            task: the task of each row; only `TaskBeta` reads it.
            ref_entropy: (B,) entropy of the reference at each prompt; only `EntropyBeta` reads it.

        Returns:
            (B,), positive and finite.

        Raises:
            ValueError: `x` is not floating (B, D) and finite, or what this beta reads is missing or
                malformed.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        assert isinstance(self._hub_mixin_config, dict)  # of the arguments, which the mixin collects
        return ", ".join(f"{name}={value!r}" for name, value in self._hub_mixin_config.items())

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs) -> Beta:
        # the mixin's own default would leave weights that the file lacks at their start, without a word
        return super()._from_pretrained(strict=strict, **kwargs)


class ConstantBeta(Beta):
    """One beta for every prompt: what DPO does without any of this.

    Args:
        beta0: the positive number.

    Raises:
        ValueError: `beta0` is not a positive finite number.
    """

    def __init__(self, beta0: float) -> None:
        super().__init__()
        require_positive("beta0", beta0)
        self.beta0 = beta0

    def forward(
        self, x: Tensor, *, task: Sequence[str] | Tensor | None = None, ref_entropy: Tensor | None = None
    ) -> Tensor:
        require_features(x)
        dtype = torch.promote_types(x.dtype, torch.float32)  # half has neither the range nor the digits
        return torch.full((len(x),), self.beta0, dtype=dtype, device=x.device)


class TaskBeta(Beta):
    """One free positive number for each task type, learned; beta0 for all of them at the start.

    Args:
        tasks: the names, in the order that integer tasks count in.
        beta0: where every task starts.

    Raises:
        ValueError: `tasks` is empty, repeats a name or is no list or tuple of names; `beta0` is not a
            positive finite number.
    """

    def __init__(self, tasks: Sequence[str], beta0: float) -> None:
        super().__init__()
        require_positive("beta0", beta0)
        names = isinstance(tasks, (list, tuple)) and all(isinstance(name, str) for name in tasks)
        if not names or not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks: got {tasks!r}, expected a list of different names, at least one")
        self.tasks = tuple(tasks)
        self.beta0 = beta0
        self.log_ratio = nn.Parameter(torch.zeros(len(tasks)))  # (tasks,) log(beta / beta0)

    def forward(
        self, x: Tensor, *, task: Sequence[str] | Tensor | None = None, ref_entropy: Tensor | None = None
    ) -> Tensor:
        require_features(x)
        index = task_index(task, len(x), self.tasks).to(self.log_ratio.device)
        return _from_log(self.log_ratio[index], self.beta0)


class EntropyBeta(Beta):
    r""":math:`\beta(x) = \mathrm{clip}(\alpha H(\pi_{ref}(\cdot|x)), \beta_{min}, \beta_{max})`, nothing
    learned.

    What the entropy term (the derivation, §5.1.3) would have on its own.

    Args:
        alpha: beta per unit of entropy.
        beta_min: the lower end.
        beta_max: the upper end.

    Raises:
        ValueError: `alpha` is not a positive finite number, or not 0 < beta_min < beta_max < inf.
    """

    def __init__(self, alpha: float, beta_min: float, beta_max: float) -> None:
        super().__init__()
        require_positive("alpha", alpha)
        require_positive("beta_min", beta_min)
        require_positive("beta_max", beta_max)
        if beta_min >= beta_max:
            raise ValueError(f"beta_min, beta_max: got {beta_min}, {beta_max}, expected beta_min < beta_max")
        self.alpha, self.beta_min, self.beta_max = alpha, beta_min, beta_max

    def forward(
        self, x: Tensor, *, task: Sequence[str] | Tensor | None = None, ref_entropy: Tensor | None = None
    ) -> Tensor:
        require_features(x)
        if ref_entropy is None or ref_entropy.shape != (len(x),):
            got = None if ref_entropy is None else f"shape {tuple(ref_entropy.shape)}"
            raise ValueError(f"ref_entropy: got {got}, expected shape ({len(x)},), one per row of x")
        if not torch.isfinite(ref_entropy).all():
            rows = rows_where(~torch.isfinite(ref_entropy))
            raise ValueError(f"ref_entropy: not finite in rows {rows}, expected finite entropies")
        return (self.alpha * ref_entropy.detach()).clamp(self.beta_min, self.beta_max)


class _BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that takes the running statistics for a batch of one row, which has no variance."""

    running_mean: Tensor
    running_var: Tensor

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) if self.training and len(z) > 1 else self.by_running_statistics(z)

    def by_running_statistics(self, z: Tensor) -> Tensor:
        return F.batch_norm(z, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class BetaNetwork(Beta):
    r""":math:`\beta(x) = \beta_0 e^{f(x)}`, f a small network on the prompt's features.

    The last layer of f starts at zero, so that beta is exactly beta0 at every prompt at the first step (the
    derivation, §6.4): stage 2 starts where a fixed beta left off. Hidden layers are smooth (SiLU), because
    the gradient penalty differentiates beta twice. f is bounded smoothly by ±20, which keeps beta positive
    and finite.

    In training mode batch norm (§6.3) makes beta(x_i) depend on the other rows of the batch; in evaluation
    mode it does not. A batch of one row in training mode takes the running statistics, which
    `fit_running_statistics` sets at once.

    Args:
        in_features: D, the width of the features.
        beta0: beta at the start.
        hidden: widths of the hidden layers; () makes f linear.
        batch_norm: normalise the features and each hidden layer over the batch.

    Raises:
        ValueError: `in_features` or a width in `hidden` is not a positive integer, `beta0` not a positive
            finite number.
    """

    def __init__(
        self, in_features: int, *, beta0: float, hidden: Sequence[int] = (64,), batch_norm: bool = True
    ) -> None:
        super().__init__()
        require_positive("beta0", beta0)
        for name, width in [("in_features", in_features), *(("hidden", width) for width in hidden)]:
            if not isinstance(width, int) or width < 1:
                raise ValueError(f"{name}: got {width!r}, expected a positive integer")
        self.in_features = in_features
        self.beta0 = beta0
        widths = [in_features, *hidden]
        layers: list[nn.Module] = [_BatchNorm(in_features)] if batch_norm else []
        for i, o in pairwise(widths):
            layers += [nn.Linear(i, o), *([_BatchNorm(o)] if batch_norm else []), nn.SiLU()]
        last = nn.Linear(widths[-1], 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(
        self, x: Tensor, *, task: Sequence[str] | Tensor | None = None, ref_entropy: Tensor | None = None
    ) -> Tensor:
        require_features(x, self.in_features)
        log_ratio = self.layers(x.to(self._dtype)).squeeze(-1)  # (B, 1) would broadcast to (B, B)
        return _from_log(log_ratio, self.beta0)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.layers[-1].parameters()).dtype

    @torch.no_grad()
    def fit_running_statistics(self, x: Tensor) -> None:
        """Set the running statistics to those of `x`, layer by layer.

        The features never change while the network trains, so the statistics of all prompts can be had
        exactly: beta in evaluation mode then is what training mode gives for `x` as one batch, and does not
        lag behind.

        Args:
            x: (N, D) the features of all prompts, N at least 2.

        Raises:
            ValueError: `x` is not floating (N, D) and finite, or has a single row.
        """
        require_features(x, self.in_features)
        if len(x) < 2:
            raise ValueError("x: got 1 row, expected at least 2: one has no variance")
        z = x.to(self._dtype)
        for layer in self.layers:
            if isinstance(layer, _BatchNorm):
                layer.running_mean.copy_(z.mean(dim=0))
                # the population variance, which training mode divides by; PyTorch stores the sample variance
                layer.running_var.copy_(z.var(dim=0, unbiased=False))
                z = layer.by_running_statistics(z)
            else:
                z = layer(z)
