"""Build a beta or a rule by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from torch import Tensor

from dpoviz.beta import Beta, BetaNetwork, ConstantBeta, EntropyBeta, TaskBeta, saved_kind
from dpoviz.lm.models import require_on_hub
from dpoviz.rules import (
    LSC,
    MADPO,
    AdaDPO,
    BetaDPO,
    DualKL,
    EpsilonDPO,
    LookupBeta,
    MallowsPO,
    RandomBeta,
    Rule,
    TaskSmoothing,
)
from dpoviz.training.batch import ANSWER_ENTROPY, answer_entropy, require_finite
from dpoviz.training.config import RULES, TrainConfig, alpha_for_mean


def build(
    rule: str, config: TrainConfig, pairs: Dataset, *, vocabulary: int, strength: float | None = None
) -> Beta | Rule:
    """Return the beta or rule of this name.

    Args:
        rule: a name of `RULES`.
        config: the settings.
        pairs: the training pairs, scored by `reference_pass`.
        vocabulary: size of the model's vocabulary.
        strength: value of the rule's hyperparameter; None is its default.

    Raises:
        ValueError: an unknown rule, one that is not defined in the configuration's form, a strength for a rule without
            a hyperparameter, or a value that the rule refuses.
    """
    require_rule(rule, strength)
    info = RULES[rule]
    if config.form not in info.forms:
        raise ValueError(f"form: got {config.form!r}, expected one of {', '.join(info.forms)}")
    return _BUILDERS[rule](config, pairs, vocabulary, info.default if strength is None else strength)


def load_beta(folder: str | Path, *, form: str | None = None, fingerprint: str | None = None) -> Beta | Rule:
    """Return a saved beta or rule, in evaluation mode.

    Args:
        folder: what `dpoviz.trl.BetaDPOTrainer` left, its part "beta", that of a run, or a hub name.
        form: as in `Beta.require_made_for`.
        fingerprint: as in `Beta.require_made_for`.

    Raises:
        ValueError: no beta is there, one of a class that is not dpoviz's, or one trained for another form or reference.
    """
    own = Path(folder)
    if not own.is_dir():
        own = _from_hub(str(folder))
    place = own / "beta" if (own / "beta").is_dir() else own
    name = saved_kind(place)
    if name is None:
        raise ValueError(f"folder: {folder} has no beta/config.json that names a rule, expected what the trainer saved")
    if name not in _SAVED:
        raise ValueError(f"folder: {folder} has a {name}, expected {', '.join(_SAVED)}; load another with its class")
    return _SAVED[name].from_pretrained(str(place), form=form, fingerprint=fingerprint)


def _from_hub(name: str) -> Path:
    """Return the folder in which the hub's client keeps what a trainer pushed."""
    try:
        return Path(snapshot_download(name, allow_patterns="beta/*", local_files_only=True))
    except (OSError, ValueError):  # not cached, or no name of the hub
        require_on_hub("folder", name, "expected the folder that the trainer left, or the name under which it pushed")
    return Path(snapshot_download(name, allow_patterns="beta/*"))


def require_rule(rule: str, strength: float | None) -> None:
    """Raise for an unknown rule or a refused value of its hyperparameter, before anything is computed.

    Raises:
        ValueError: as `build`.
    """
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}, expected one of {', '.join(RULES)}")
    if strength is None:
        return
    if not RULES[rule].setting:
        raise ValueError(f"strength: got {strength!r}, but the rule {rule!r} has no hyperparameter besides beta0")
    try:
        _TRIALS[rule](strength)
    except ValueError as error:
        raise ValueError(f"strength: got {strength!r}, which the rule {rule!r} refuses: {error}") from None


def require_column(rule: str, pairs: Dataset) -> None:
    """Raise for pairs without the numbers that a rule reads, before anything is computed.

    Raises:
        ValueError: the column is missing, or not a finite number in some row.
    """
    column = RULES[rule].column
    if not column:
        return
    if column not in pairs.column_names:
        raise ValueError(f"data: lacks {column}, a number for each pair, which the rule {rule!r} reads")
    require_finite("data", pairs, column)


def _network(config: TrainConfig, pairs: Dataset, _vocabulary: int, _strength: float) -> BetaNetwork:
    x = features(pairs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        beta = BetaNetwork(x.shape[1], beta0=config.beta0)
    if len(x) > 1:  # one prompt has no variance
        beta.fit_running_statistics(x)
    return beta


def _constant(config: TrainConfig, _pairs: Dataset, _vocabulary: int, _strength: float) -> ConstantBeta:
    return ConstantBeta(config.beta0)


def _task(config: TrainConfig, pairs: Dataset, _vocabulary: int, _strength: float) -> TaskBeta:
    return TaskBeta(_tasks(pairs), config.beta0)


def _entropy(config: TrainConfig, pairs: Dataset, _vocabulary: int, _strength: float) -> EntropyBeta:
    return EntropyBeta(alpha_for_mean(pairs["ref_entropy"], config.beta0), config.beta_min, config.beta_max)


def _beta_dpo(config: TrainConfig, _pairs: Dataset, _vocabulary: int, a: float) -> BetaDPO:
    return BetaDPO(config.beta0, a=a, seed=config.seed)


def _epsilon_dpo(config: TrainConfig, _pairs: Dataset, _vocabulary: int, epsilon: float) -> EpsilonDPO:
    return EpsilonDPO(config.beta0, epsilon=epsilon)


def _mallows(config: TrainConfig, pairs: Dataset, vocabulary: int, sign: float) -> MallowsPO:
    rows = pairs.select_columns([*ANSWER_ENTROPY, "chosen_ids", "rejected_ids"])[:]
    normalised = answer_entropy(rows) / torch.tensor(float(vocabulary)).log()
    return MallowsPO.with_mean(config.beta0, normalised, sign=int(sign))


def _ada_dpo(config: TrainConfig, _pairs: Dataset, _vocabulary: int, rho: float) -> AdaDPO:
    return AdaDPO(config.beta0, rho=rho)


def _madpo(config: TrainConfig, _pairs: Dataset, _vocabulary: int, tau: float) -> MADPO:
    return MADPO(config.beta0, tau=tau)


def _lsc(config: TrainConfig, _pairs: Dataset, _vocabulary: int, target: float) -> LSC:
    return LSC(config.beta0, target=target)


def _lsc_at_once(config: TrainConfig, _pairs: Dataset, _vocabulary: int, target: float) -> LSC:
    # as published, LSC waits until margins have grown, which may never happen in a short training
    return LSC(config.beta0, target=target, start=1.0)


def _dual_kl(config: TrainConfig, _pairs: Dataset, _vocabulary: int, target: float) -> DualKL:
    return _controller(config.beta0, target, None)


def _dual_kl_task(config: TrainConfig, pairs: Dataset, _vocabulary: int, target: float) -> DualKL:
    return _controller(config.beta0, target, _tasks(pairs))


def _controller(beta0: float, target: float, tasks: list[str] | None) -> DualKL:
    # measured every 10 steps, KL oscillates at a horizon of 10, the published gain
    return DualKL(beta0, target=target, tasks=tasks, every=10, horizon=20)


def _tasks(pairs: Dataset) -> list[str]:
    return sorted(set(pairs["task"]))


_BUILDERS: dict[str, Callable[[TrainConfig, Dataset, int, float], Beta | Rule]] = {
    "constant": _constant,
    "network": _network,
    "task": _task,
    "entropy": _entropy,
    "beta-dpo": _beta_dpo,
    "epsilon-dpo": _epsilon_dpo,
    "mallows": _mallows,
    "ada-dpo": _ada_dpo,
    "madpo": _madpo,
    "lsc": _lsc,
    "lsc-at-once": _lsc_at_once,
    "dual-kl": _dual_kl,
    "dual-kl-task": _dual_kl_task,
}

_SAVED: dict[str, type[Beta | Rule]] = {
    own.__name__: own
    for own in (
        *(ConstantBeta, TaskBeta, EntropyBeta, BetaNetwork),
        *(AdaDPO, BetaDPO, EpsilonDPO, MADPO, MallowsPO, LSC, DualKL, RandomBeta, LookupBeta, TaskSmoothing),
    )
}

_TRIALS: dict[str, Callable[[float], object]] = {
    "beta-dpo": lambda a: BetaDPO(1.0, a=a),
    "epsilon-dpo": lambda epsilon: EpsilonDPO(1.0, epsilon=epsilon),
    "mallows": lambda sign: MallowsPO(1.0, c=1.0, sign=sign),
    "ada-dpo": lambda rho: AdaDPO(1.0, rho=rho),
    "madpo": lambda tau: MADPO(1.0, tau=tau),
    "lsc": lambda target: LSC(1.0, target=target),
    "lsc-at-once": lambda target: LSC(1.0, target=target),
    "dual-kl": lambda target: _controller(1.0, target, None),
    "dual-kl-task": lambda target: _controller(1.0, target, None),
}
"""For each rule with a hyperparameter, a call that raises ValueError for a refused value."""


def features(pairs: Dataset) -> Tensor:
    """Return (N, D) the reference's features of the prompts."""
    return torch.tensor(pairs["ref_features"][:])
