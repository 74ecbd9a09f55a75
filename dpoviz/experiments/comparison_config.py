"""The settings of the comparison, its variants, and its table of jobs. Importing this module does not load torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from dpoviz.experiments.config import WorldConfig
from dpoviz.forms import Form


class Contender(NamedTuple):
    """A variant that takes part in the comparison.

    Attributes:
        method: a name of `RULES`; for a control, the rule whose trained beta(x) it takes.
        form: the form of its loss.
        swept: the setting that is swept: the scale s that multiplies h at the start, or the rule's strength.
        strength: value of the rule's hyperparameter; None: its default.
        calibrated: train beta on pairs on which the policy is not trained.
        control: "" if it is none. Otherwise beta is fixed to the trained beta(x) of `method`: "frozen" (unchanged),
            "shuffled" over all prompts, "shuffled within tasks", or "random" (sampled with the same mean and spread).
    """

    method: str
    form: Form
    swept: Literal["scale", "strength"] = "scale"
    strength: float | None = None
    calibrated: bool = False
    control: str = ""

    @property
    def rates_of(self) -> str:
        """The variant whose learning rate a control uses; "" for all others."""
        return f"{self.method} {self.form}" if self.control else ""


CONTENDERS: dict[str, Contender] = {
    "constant": Contender("constant", "standard"),
    **{f"{name} {form}": Contender(name, form) for name in ("network", "task", "entropy")
       for form in ("inverse", "standard")},
    **{f"calibrated {form}": Contender("network", form, calibrated=True) for form in ("inverse", "standard")},
    "beta-dpo": Contender("beta-dpo", "standard"),
    "epsilon-dpo": Contender("epsilon-dpo", "standard"),
    "mallows": Contender("mallows", "standard"),
    "mallows reversed": Contender("mallows", "standard", strength=-1.0),
    "lsc": Contender("lsc-at-once", "standard", "strength"),
    "dual-kl": Contender("dual-kl", "standard", "strength"),
    "dual-kl-task": Contender("dual-kl-task", "standard", "strength"),
    **{f"{control}, {form}": Contender("network", form, control=control)
       for control in ("frozen", "shuffled", "shuffled within tasks", "random") for form in ("inverse", "standard")},
}  # fmt: skip
"""The variants, by name; all others are compared with the constant."""

STRENGTHS = {"lsc": (0.2, 0.4), "dual-kl": (0.2, 0.5), "dual-kl-task": (0.2, 0.5)}
"""Values of the variants that are swept over their strength: LSC's published target and half of it, and KL budgets in
nats that training reaches here."""

BASELINE = "constant"


@dataclass(frozen=True)
class CompareConfig:
    """Train every rule for beta in many small worlds and compare it with constants at the same KL.

    Attributes:
        world: the small world; each seed has its own.
        contenders: variants to compare; one of them must be the constant.
        constants: scales of the constant, the frontier to beat.
        scales: initial scales of the variants that are swept over the scale; all others start at the first.
        seeds: number of worlds, each with its own runs, numbered from 0.
        noise: fractions of the training labels that are flipped; the flipped sets are nested.
        learning_rates: learning rates of the policy; each variant uses its best, the constants run at all of them.
        tuning_seeds: number of further worlds, numbered from 1000, on which the best rates are found.
        tuning_noise: fraction of flipped labels for tuning and for the controls; one of `noise`.
        stage1_steps: steps with a fixed beta, if the rule is trainable; with the rule otherwise.
        stage2_steps: steps with the rule.
        batch_size: pairs per step.
        beta_learning_rate: learning rate of a trainable beta.
        calibration: fraction of the training prompts on which the calibrated variants train beta.
        prompts: fresh prompts per task on which a policy is measured.
        samples: answers per prompt.
    """

    world: WorldConfig = field(default_factory=lambda: WorldConfig(
        demonstrations=30_000, hidden_size=64, layers=3, problems=300, pairs_per_prompt=8))  # fmt: skip
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    constants: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    scales: tuple[float, ...] = (0.2, 0.8)
    seeds: int = 8
    noise: tuple[float, ...] = (0.0, 0.15, 0.3)
    learning_rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    tuning_seeds: int = 2
    tuning_noise: float = 0.15
    stage1_steps: int = 30
    stage2_steps: int = 50
    batch_size: int = 24
    beta_learning_rate: float = 1e-2
    calibration: float = 0.25
    prompts: int = 48
    samples: int = 4

    def __post_init__(self) -> None:
        unknown = sorted(set(self.contenders) - set(CONTENDERS))
        if unknown:
            raise ValueError(f"contenders: got {unknown}, expected some of {', '.join(CONTENDERS)}")
        if BASELINE not in self.contenders:  # what all others are compared with
            object.__setattr__(self, "contenders", (BASELINE, *self.contenders))
        if self.seeds < 3 or self.tuning_seeds < 1:
            raise ValueError(f"seeds, tuning_seeds: got {self.seeds}, {self.tuning_seeds}, expected at least 3 and 1")
        if any(not 0 <= share < 0.5 for share in self.noise):
            raise ValueError(f"noise: got {self.noise}, expected fractions from 0 to below 0.5")
        if self.tuning_noise not in self.noise:
            raise ValueError(f"tuning_noise: got {self.tuning_noise}, expected one of {self.noise}")
        for name in ("constants", "scales", "noise", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: got {values}, expected different numbers, at least one")

    @classmethod
    def fast(cls, **settings) -> CompareConfig:
        """Return a tiny version for tests and a first look; its numbers mean nothing."""
        world = WorldConfig(demonstrations=9000, hidden_size=48, layers=2, problems=32, samples=6, entropy_samples=2,
                            max_new_tokens=24)  # fmt: skip
        tiny = {"world": world, "constants": (0.1, 0.4), "scales": (0.1,), "seeds": 3, "noise": (0.15,),
                "learning_rates": (1e-3,), "tuning_seeds": 1, "stage1_steps": 1, "stage2_steps": 2, "batch_size": 4,
                "prompts": 4, "samples": 2}  # fmt: skip
        return cls(**{**tiny, **settings})

    def values(self, contender: str) -> tuple[float, ...]:
        """Return the values of the swept setting of a variant."""
        if contender == BASELINE:
            return self.constants
        values = STRENGTHS[contender] if CONTENDERS[contender].swept == "strength" else self.scales
        return values[-1:] if len(self.scales) == 1 else values


class Job(NamedTuple):
    """One run.

    Attributes:
        phase: "reference", "tuning" or "main".
        contender: the variant, a name of `CONTENDERS`; or "reference".
        value: value of the swept setting.
        learning_rate: learning rate of the policy; 0 stands for the variant's best, found by tuning.
        noise: fraction of the training labels that are flipped.
        seed: seed of the world and of the run.
    """

    phase: str
    contender: str
    value: float
    learning_rate: float
    noise: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its file, without the suffix."""
        parts = (self.phase, self.contender, f"{self.value:g}", f"{self.learning_rate:g}", f"{self.noise:g}", self.seed)
        return "_".join(str(part).replace(" ", "-").replace(",", "") for part in parts)


def jobs(config: CompareConfig) -> list[Job]:
    """Return the table of jobs, grouped by world; `dpoviz compare --only` takes the number of a row."""
    rows = []
    for seed in range(1000, 1000 + config.tuning_seeds):
        rows.append(Job("reference", "reference", 0.0, 0.0, 0.0, seed))
        for name in config.contenders:
            if not CONTENDERS[name].rates_of:
                values = config.values(name)
                tried = values if name == BASELINE else values[-1:]
                rows += [
                    Job("tuning", name, v, rate, config.tuning_noise, seed)
                    for v in tried
                    for rate in config.learning_rates
                ]
    for seed in range(config.seeds):
        rows.append(Job("reference", "reference", 0.0, 0.0, 0.0, seed))
        for noise in config.noise:
            for name in sorted(config.contenders, key=lambda name: bool(CONTENDERS[name].control)):
                if CONTENDERS[name].control and noise != config.tuning_noise:
                    continue
                rates = config.learning_rates if name == BASELINE else (0.0,)
                rows += [Job("main", name, v, rate, noise, seed) for rate in rates for v in config.values(name)]
    return rows
