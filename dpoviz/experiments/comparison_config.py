"""The settings of the comparison, who takes part, and its table of jobs. Importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from dpoviz.experiments.config import WorldConfig
from dpoviz.forms import Form


class Contender(NamedTuple):
    """A method as it takes part.

    Attributes:
        method: a name of `METHODS`; of a control, the one whose beta(x) it takes.
        form: the form of its loss.
        swept: what its points differ in: the scale s0 that multiplies h at the start, or the method's strength.
        strength: of the method; None is its default.
        calibrated: beta learns from pairs that the policy is not trained on.
        control: "" for none; else what is made of the trained beta(x) of `method`, which is then held fixed:
            "frozen" as it is, "shuffled" over all prompts, "shuffled within tasks", "random" (a draw of the same mean
            and spread).
    """

    method: str
    form: Form
    swept: Literal["scale", "strength"] = "scale"
    strength: float | None = None
    calibrated: bool = False
    control: str = ""

    @property
    def rates_of(self) -> str:
        """The contender whose learning rate it takes: a control that of its method."""
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
"""Who takes part, by name; the constant is what the others are compared with."""

STRENGTHS = {"lsc": (0.2, 0.4), "dual-kl": (0.2, 0.5), "dual-kl-task": (0.2, 0.5)}
"""What is swept of the methods whose strength is: LSC's published target and its half, and KL budgets (nats) that the
training here comes to."""

BASELINE = "constant"


@dataclass(frozen=True)
class CompareConfig:
    """The experiment.

    Attributes:
        world: the small world; each seed has its own.
        contenders: names of `CONTENDERS`; the constant always takes part.
        constants: scales of the constant, the frontier to beat.
        scales: scales s0 of the methods that are swept over it; the others start at the first of them.
        seeds: worlds and runs, numbered from 0.
        noise: shares of the training pairs whose label is turned round; a larger share turns the same and more.
        learning_rates: of the policy; each method uses its best, the constants run at all of them.
        tuning_seeds: worlds of their own, numbered from 1000, on which the best is found.
        tuning_noise: the share at which it is found, and at which the controls run; one of `noise`.
        stage1_steps: steps with a fixed beta, where beta learns; the rule's own steps otherwise.
        stage2_steps: steps with the rule.
        batch_size: pairs in a step.
        beta_learning_rate: of beta, where it learns.
        calibration: share of the training prompts that "calibrated" takes for beta.
        prompts: fresh prompts a task that a policy is measured on.
        samples: answers at each.
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
        if BASELINE not in self.contenders:
            raise ValueError(f"contenders: got {self.contenders}, expected {BASELINE!r} among them")
        if self.seeds < 3 or self.tuning_seeds < 1:
            raise ValueError(f"seeds, tuning_seeds: got {self.seeds}, {self.tuning_seeds}, expected at least 3 and 1")
        if any(not 0 <= share < 0.5 for share in self.noise):
            raise ValueError(f"noise: got {self.noise}, expected shares from 0 to below 0.5")
        if self.tuning_noise not in self.noise:
            raise ValueError(f"tuning_noise: got {self.tuning_noise}, expected one of {self.noise}")
        for name in ("constants", "scales", "noise", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: got {values}, expected different numbers, at least one")

    @classmethod
    def fast(cls, **settings) -> CompareConfig:
        """A tiny version, for tests and a first look: its numbers say nothing."""
        world = WorldConfig(demonstrations=9000, hidden_size=48, layers=2, problems=32, samples=6, entropy_samples=2,
                            max_new_tokens=24)  # fmt: skip
        tiny = {"world": world, "constants": (0.1, 0.4), "scales": (0.1,), "seeds": 3, "noise": (0.15,),
                "learning_rates": (1e-3,), "tuning_seeds": 1, "stage1_steps": 1, "stage2_steps": 2, "batch_size": 4,
                "prompts": 4, "samples": 2}  # fmt: skip
        return cls(**{**tiny, **settings})

    def values(self, contender: str) -> tuple[float, ...]:
        """What is swept of a contender."""
        if contender == BASELINE:
            return self.constants
        values = STRENGTHS[contender] if CONTENDERS[contender].swept == "strength" else self.scales
        return values[-1:] if len(self.scales) == 1 else values


class Job(NamedTuple):
    """One run.

    Attributes:
        phase: "reference", "tuning" or "main".
        contender: a name of `CONTENDERS`, or "reference".
        value: of what is swept.
        learning_rate: of a tuning run and of the constants, which run at all of them; 0 is the method's best.
        noise: share of labels turned round.
        seed: of the world and of the run.
    """

    phase: str
    contender: str
    value: float
    learning_rate: float
    noise: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        parts = (self.phase, self.contender, f"{self.value:g}", f"{self.learning_rate:g}", f"{self.noise:g}", self.seed)
        return "_".join(str(part).replace(" ", "-").replace(",", "") for part in parts)


def jobs(config: CompareConfig) -> list[Job]:
    """The table of jobs, each world's together; a number of `dpoviz compare --only` is a row of it."""
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
