"""β as a function of the prompt: four kinds with the same interface.

A beta may depend on the prompt and on what the reference computes from it, but never on the answers. If it did, the
normaliser Z(x) would no longer cancel between the chosen and the rejected answer (the derivation, §4.1).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from dpoviz.validation import refused, require_features, require_positive, rows_where, task_index

logger = logging.getLogger(__name__)

_LOG_BOUND = 20.0  # beta / beta0 stays within e^±20: beyond any useful value, and well inside float32's range


def _from_log(log_ratio: Tensor, beta0: float) -> Tensor:
    """Return beta0·exp(20·tanh(log_ratio/20)): log_ratio bounded smoothly by ±20, and exactly beta0 at 0."""
    return beta0 * torch.exp(_LOG_BOUND * torch.tanh(log_ratio / _LOG_BOUND))


@dataclass(frozen=True)
class MadeFor:
    """What a beta was trained for: its numbers mean something else in the other form, or on other features.

    Attributes:
        form: "inverse" or "standard".
        reference: name of the model whose features it reads.
        fingerprint: of that model's weights (`dpoviz.lm.models.weights_fingerprint`); None if it is not known.
        features: how the features are made from a prompt.
    """

    form: str
    reference: str
    fingerprint: str | None
    features: str


_RECORD = "made_for.json"


_CARD = """---
{{ card_data }}
---

A β for Direct Preference Optimization, made with [dpoviz](https://pypi.org/project/dpoviz). `config.json` has its
arguments{% if rule %}. Rule: {{ rule }}, in the {{ form }} form{% if paper %}
([arXiv:{{ paper }}](https://arxiv.org/abs/{{ paper }})){% endif %}; reference: {{ reference }}{% endif %}.
"""


class Saved(nn.Module, PyTorchModelHubMixin, library_name="dpoviz", model_card_template=_CARD):
    """A module that is saved with its arguments.

    Save it with `save_pretrained(folder)` (safetensors, config.json, and made_for.json if `made_for` is set) or
    `push_to_hub`. Load it, in evaluation mode, with `from_pretrained(folder or hub name)`; the arguments `form` and
    `fingerprint` there refuse a beta that was trained for another form or reference. `dpoviz.load_beta` finds the class
    by itself.

    Attributes:
        made_for: what it was trained for; None if that is not known.
        reads: the inputs that it reads, of "x", "task" and "ref_entropy".
    """

    made_for: MadeFor | None = None
    reads: frozenset[str] = frozenset({"x", "task", "ref_entropy"})

    def save(self, folder: Path, **about: str | None) -> None:
        """Save it to a folder, with further entries in config.json and on its card; `load_beta` reads "rule"."""
        arguments = self._hub_mixin_config or {}  # collected by the mixin; None without arguments that JSON can hold
        assert isinstance(arguments, dict)
        about = {"rule": type(self).__name__, **about}
        self.save_pretrained(folder, config={**arguments, **about}, model_card_kwargs=about)

    def require_made_for(self, *, form: str | None = None, fingerprint: str | None = None) -> None:
        """Refuse another form or reference than beta was trained for; warn if it is not known what that was.

        Args:
            form: the form in which it is to be used; None leaves it unchecked.
            fingerprint: of the reference whose features it is to read; None leaves it unchecked.

        Raises:
            ValueError: beta was trained for another form or another reference.
        """
        if form is None and fingerprint is None:
            return
        if self.made_for is None:
            logger.warning("beta: has no record of its form and reference, so that they cannot be checked")
            return
        if form is not None and form != self.made_for.form:
            raise ValueError(
                f"form: got {form!r}, expected {self.made_for.form!r}, in which this beta was trained; the same beta "
                "means the opposite in the other form"
            )
        if fingerprint is not None and self.made_for.fingerprint not in (None, fingerprint):
            raise ValueError(
                f"reference: got a model with the fingerprint {fingerprint}, expected {self.made_for.reference} "
                f"({self.made_for.fingerprint}), whose features this beta reads"
            )

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        if self.made_for is not None:
            record = {"kind": type(self).__name__, **asdict(self.made_for)}
            (save_directory / _RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, strict: bool = True, form: str | None = None, fingerprint: str | None = None, **kwargs
    ) -> Self:
        # the mixin's default, strict=False, would silently leave weights missing from the file at their initial values
        hub = {name: kwargs[name] for name in ("revision", "cache_dir", "force_download", "local_files_only", "token")}
        arguments = {name: value for name, value in kwargs.items() if name not in hub}
        with redirect_stdout(StringIO()):  # the mixin prints that it loads weights
            saved = super()._from_pretrained(model_id=model_id, strict=strict, **hub, **arguments)
        record = _record(model_id, **hub)
        if record is not None:
            saved.made_for = MadeFor(**{name: value for name, value in record.items() if name != "kind"})
        saved.require_made_for(form=form, fingerprint=fingerprint)
        return saved


class Beta(Saved):
    """A function of the prompt, called as `beta(x, *, task=None, ref_entropy=None)`; returns (B,)."""

    def forward(
        self, x: Tensor, *, task: Sequence[str] | Tensor | None = None, ref_entropy: Tensor | None = None
    ) -> Tensor:
        """Return beta at each prompt.

        Args:
            x: (B, D) features of the prompts, from the frozen reference; expected to carry no gradient.
            task: the task of each row; only `TaskBeta` reads it.
            ref_entropy: (B,) entropy of the reference at each prompt; only `EntropyBeta` reads it.

        Returns:
            (B,), positive and finite.

        Raises:
            ValueError: `x` is not floating (B, D) and finite, or an input that this beta reads is missing or malformed.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        assert isinstance(self._hub_mixin_config, dict)  # of the arguments, which the mixin collects
        return ", ".join(f"{name}={value!r}" for name, value in self._hub_mixin_config.items())


def _record(model_id: str, **hub) -> dict[str, str] | None:
    """Return the contents of made_for.json in a folder or on the hub; None if there is none."""
    file = Path(model_id) / _RECORD
    if not Path(model_id).is_dir():
        try:
            file = Path(hf_hub_download(model_id, _RECORD, **hub))
        except EntryNotFoundError:
            return None
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def saved_kind(folder: Path) -> str | None:
    """Return the name of the class that was saved in a folder; None if the folder does not say."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    own = config.get("rule") or (_record(str(folder)) or {}).get("kind")
    return own or ("BetaNetwork" if "in_features" in config else None)  # only that class was saved without its name


class ConstantBeta(Beta):
    """One fixed beta for every prompt, as in plain DPO.

    Args:
        beta0: a positive number.

    Raises:
        ValueError: `beta0` is not a positive finite number.
    """

    reads = frozenset()

    def __init__(self, beta0: float) -> None:
        super().__init__()
        require_positive("beta0", beta0)
        self.beta0 = beta0

    def forward(
        self, x: Tensor, *, task: Sequence[str] | Tensor | None = None, ref_entropy: Tensor | None = None
    ) -> Tensor:
        require_features(x)
        dtype = torch.promote_types(x.dtype, torch.float32)  # half precision has too little range and precision
        return torch.full((len(x),), self.beta0, dtype=dtype, device=x.device)


class TaskBeta(Beta):
    """One trainable positive beta per task.

    Args:
        tasks: the names; integer tasks are positions in this list.
        beta0: initial beta of every task.

    Raises:
        ValueError: `tasks` is not a list or tuple of different names, or is empty; `beta0` is not a positive finite
            number.
    """

    reads = frozenset({"task"})

    def __init__(self, tasks: Sequence[str], beta0: float) -> None:
        super().__init__()
        require_positive("beta0", beta0)
        names = isinstance(tasks, (list, tuple)) and all(isinstance(name, str) for name in tasks)
        if not names or not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks: got {tasks!r}, expected a list of different names, at least one")
        self.tasks = tuple(tasks)
        self.beta0 = beta0
        self.log_ratio = nn.Parameter(torch.zeros(len(tasks)))  # (tasks,) log(beta / beta0)

    @classmethod
    def fixed(cls, betas: Mapping[str, float]) -> TaskBeta:
        """Return a given beta per task, none of them trainable, such as ``dict(zip(table.task, table.beta))`` of
        `dpoviz.allocate`.

        Raises:
            ValueError: a beta is not a positive finite number, or e²⁰ times another or more; `allocate` gives 0 or inf
                to a task that should stay at the reference: leave its pairs out.
        """
        for task, beta in betas.items():
            if not 0 < beta < math.inf:
                raise ValueError(
                    f"betas: got {beta} for {task!r}, expected a positive finite number; leave the task's pairs out if "
                    "it should stay at the reference"
                )
        logs = torch.tensor(list(betas.values()), dtype=torch.float64).log()
        own = cls(list(betas), logs.mean().exp().item() if betas else 1.0)
        distance = (logs - logs.mean()) / _LOG_BOUND
        if distance.abs().max() >= 1:
            raise ValueError(f"betas: got {dict(betas)}, expected numbers within a factor of e^{_LOG_BOUND:g}")
        own.log_ratio.data.copy_(_LOG_BOUND * distance.atanh())
        own.log_ratio.requires_grad_(False)
        return own

    def forward(
        self, x: Tensor, *, task: Sequence[str] | Tensor | None = None, ref_entropy: Tensor | None = None
    ) -> Tensor:
        require_features(x)
        index = task_index(task, len(x), self.tasks).to(self.log_ratio.device)
        return _from_log(self.log_ratio[index], self.beta0)


class EntropyBeta(Beta):
    """A beta proportional to the reference's entropy and clipped to a range; nothing is trainable.

        β(x) = clip(α·H(π_ref(·|x)), β_min, β_max)

    Within the range, this is the beta at which the entropy term (the derivation, §5.1.3) is 0.

    Args:
        alpha: beta per unit of entropy.
        beta_min: the lower end of the range.
        beta_max: the upper end of the range.

    Raises:
        ValueError: `alpha` is not a positive finite number, or 0 < beta_min < beta_max < inf does not hold.
    """

    reads = frozenset({"ref_entropy"})

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
        if refused(~torch.isfinite(ref_entropy)):
            rows = rows_where(~torch.isfinite(ref_entropy))
            raise ValueError(f"ref_entropy: not finite in rows {rows}, expected finite entropies")
        return (self.alpha * ref_entropy.detach()).clamp(self.beta_min, self.beta_max)


class _BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that uses the running statistics for a batch of one row, which has no variance."""

    running_mean: Tensor
    running_var: Tensor

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) if self.training and len(z) > 1 else self.by_running_statistics(z)

    def by_running_statistics(self, z: Tensor) -> Tensor:
        return F.batch_norm(z, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class BetaNetwork(Beta):
    """A small network f on the prompt's features that gives log β, up to a constant.

        β(x) = β₀·exp(20·tanh(f(x)/20)) ≈ β₀·exp(f(x))

    The bound of ±20 on the exponent is smooth and keeps beta positive and finite. The last layer of f starts at zero,
    so beta is exactly β₀ at every prompt at the first step (the derivation, §6.4): stage 2 starts where a fixed beta
    ended. Hidden layers are smooth (SiLU), because training on the gradient penalty differentiates beta twice.

    In training mode, batch norm (§6.3) makes β(x_i) depend on the other rows of the batch; in evaluation mode it does
    not. A batch of one row uses the running statistics even in training mode. `fit_running_statistics` sets them
    exactly.

    Args:
        in_features: D, the width of the features.
        beta0: β₀, beta at the start.
        hidden: widths of the hidden layers; () makes f linear.
        batch_norm: normalise the features and each hidden layer over the batch.

    Raises:
        ValueError: `in_features` or a width in `hidden` is not a positive integer, or `beta0` is not a positive finite
            number.
    """

    reads = frozenset({"x"})

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

        The features do not change during training, so the statistics over all prompts can be computed exactly. Beta in
        evaluation mode then equals beta in training mode with `x` as one batch, and does not lag behind the weights.

        Args:
            x: (N, D) the features of all prompts, N at least 2.

        Raises:
            ValueError: `x` is not floating (N, D) and finite, or has only one row.
        """
        require_features(x, self.in_features)
        if len(x) < 2:
            raise ValueError("x: got 1 row, expected at least 2: one has no variance")
        z = x.to(self._dtype)
        for layer in self.layers:
            if isinstance(layer, _BatchNorm):
                layer.running_mean.copy_(z.mean(dim=0))
                # training mode divides by the population variance, but PyTorch would store the sample variance
                layer.running_var.copy_(z.var(dim=0, unbiased=False))
                z = layer.by_running_statistics(z)
            else:
                z = layer(z)
