"""Every rule for beta by its name: the forms it has, its one setting, and how it starts on a set of pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from dpoviz.beta import Beta, BetaNetwork, ConstantBeta, EntropyBeta, TaskBeta
from dpoviz.losses import FORMS, Form
from dpoviz.rules import LSC, BetaDPO, DualKL, EpsilonDPO, MallowsPO, Rule
from dpoviz.training.config import TrainConfig, calibrate_alpha
from dpoviz.training.observe import ANSWER_ENTROPY, answer_entropy


@dataclass(frozen=True)
class Method:
    """A rule that a run can ask for.

    Attributes:
        make: (settings, training pairs, size of the vocabulary, strength) → what gives beta.
        forms: the forms that it is defined in.
        strength: what its one setting is called, for messages; "" where it has none but beta0.
        default: of the strength.
    """

    make: Callable[[TrainConfig, Dataset, int, float], Beta | Rule]
    forms: tuple[Form, ...] = FORMS
    strength: str = ""
    default: float = 0.0

    def start(
        self, config: TrainConfig, pairs: Dataset, *, vocabulary: int, strength: float | None = None
    ) -> Beta | Rule:
        """What gives beta.

        Args:
            config: the settings.
            pairs: what `reference_pass` returned for the training pairs.
            vocabulary: size of the model's vocabulary.
            strength: None is the published default, or ours where nothing is published.

        Raises:
            ValueError: the method is not defined in the configuration's form, or has no strength.
        """
        if config.form not in self.forms:
            raise ValueError(f"form: got {config.form!r}, expected one of {', '.join(self.forms)}")
        if strength is not None and not self.strength:
            raise ValueError(f"strength: got {strength!r}, but this rule has no setting besides beta0")
        return self.make(config, pairs, vocabulary, self.default if strength is None else strength)


def _network(config: TrainConfig, pairs: Dataset, vocabulary: int, strength: float) -> BetaNetwork:
    """The source's beta(x): a network on the reference's view of the prompt."""
    x = features(pairs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        beta = BetaNetwork(x.shape[1], beta0=config.beta0)
    beta.calibrate(x)
    return beta


def _by_entropy(config: TrainConfig, pairs: Dataset, vocabulary: int, strength: float) -> EntropyBeta:
    return EntropyBeta(calibrate_alpha(pairs["ref_entropy"], config.beta0), config.beta_min, config.beta_max)


def _mallows(config: TrainConfig, pairs: Dataset, vocabulary: int, sign: float) -> MallowsPO:
    rows = pairs.select_columns([*ANSWER_ENTROPY, "chosen_ids", "rejected_ids"])[:]
    return MallowsPO.calibrated(config.beta0, answer_entropy(rows, vocabulary), sign=int(sign))


def _dual(config: TrainConfig, pairs: Dataset, target: float, tasks: list[str] | None) -> DualKL:
    # a horizon of 10, the published gain, swings between too much and too little when it is measured every 10
    return DualKL(config.beta0, target=target, tasks=tasks, every=10, horizon=20)


def _tasks(pairs: Dataset) -> list[str]:
    return sorted(set(pairs["task"]))


_STANDARD: tuple[Form, ...] = ("standard",)

METHODS = {
    "constant": Method(lambda config, *_: ConstantBeta(config.beta0)),
    "network": Method(_network),
    "task": Method(lambda config, pairs, *_: TaskBeta(_tasks(pairs), config.beta0)),
    "entropy": Method(_by_entropy),
    "beta-dpo": Method(lambda config, _, __, a: BetaDPO(config.beta0, a=a, seed=config.seed), _STANDARD, "a", 0.6),
    "epsilon-dpo": Method(
        lambda config, _, __, epsilon: EpsilonDPO(config.beta0, epsilon=epsilon), _STANDARD, "epsilon", 0.01
    ),
    "mallows": Method(_mallows, _STANDARD, "sign", 1.0),
    "lsc": Method(lambda config, _, __, target: LSC(config.beta0, target=target), _STANDARD, "target margin", 0.4),
    # as published it waits until margins have grown, which a short training may never see
    "lsc-at-once": Method(
        lambda config, _, __, target: LSC(config.beta0, target=target, start=1.0), _STANDARD, "target margin", 0.4
    ),
    "dual-kl": Method(
        lambda config, pairs, _, target: _dual(config, pairs, target, None), _STANDARD, "KL in nats", 1.0
    ),
    "dual-kl-task": Method(
        lambda config, pairs, _, target: _dual(config, pairs, target, _tasks(pairs)), _STANDARD, "KL in nats", 1.0
    ),
}
"""By name."""


def features(pairs: Dataset) -> Tensor:
    """(N, D) the reference's features of the prompts."""
    return torch.tensor(pairs["ref_features"][:])
