"""The settings of the comparison, its conditions and contenders, and its table of jobs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from dpoviz.experiments.config import WorldConfig
from dpoviz.forms import Form

BUDGETS = (0.1, 0.3, 1.0)
"""Mean KL to the reference, nats per answer, at which all contenders are compared."""


class Condition(NamedTuple):
    """How the tasks differ, one number for math, code and dialogue each, and how long and from where one trains.

    Attributes:
        flips: fraction of the labels that are flipped.
        pairs: the largest number of pairs per prompt.
        epochs: passes over the pairs; None: those of the comparison.
        scale: the scale s at the start; None: the one that was chosen for the contender on the tuning worlds.
    """

    flips: tuple[float, float, float]
    pairs: tuple[int, int, int]
    epochs: float | None = None
    scale: float | None = None


CONDITIONS: dict[str, Condition] = {
    "flips by task": Condition((0.0, 0.1, 0.35), (8, 8, 8)),
    "pairs by task": Condition((0.0, 0.0, 0.0), (2, 8, 64)),
    "uniform noise": Condition((0.15, 0.15, 0.15), (8, 8, 8)),
}
"""The conditions by which tasks differ. A label is random to begin with: math's are most reliable, dialogue's least."""

MAIN_CONDITIONS = tuple(CONDITIONS)
"""The conditions of the primary endpoint, and those in which rate and scale are chosen."""

CONDITIONS |= {
    name: CONDITIONS["flips by task"]._replace(epochs=epochs, scale=scale)
    for name, epochs, scale in (
        ("half an epoch, s 0.4", 0.5, 0.4),
        ("two epochs, s 0.4", 2.0, 0.4),
        ("eight epochs, s 0.4", 8.0, 0.4),
        ("two epochs, s 1.6", 2.0, 1.6),
    )
}
"""Further conditions: the pairs and labels of "flips by task", with all contenders from the same scale. From 0.4 and
1.6 margins reach the nats at which the theory's advice turns; the scales that earn most end far below."""

CONSTANT = "constant"
"""The contender that all others are compared with: one beta for all pairs."""


class Contender(NamedTuple):
    """A contender that is trained.

    Attributes:
        rule: a name of `RULES`, or one of `comparison_runs.OWN_RULES`.
        form: the form of its loss.
        conditions: the conditions in which it takes part.
    """

    rule: str
    form: Form = "standard"
    conditions: tuple[str, ...] = tuple(CONDITIONS)


TRAINED: dict[str, Contender] = {
    CONSTANT: Contender("constant"),
    "network, inverse": Contender("network", "inverse"),
    "network, standard": Contender("network"),
    "entropy, inverse": Contender("entropy", "inverse"),
    "entropy, standard": Contender("entropy"),
    "1/b in training": Contender("slope"),
    "b in training": Contender("slope, inverted"),
    "beta-dpo": Contender("beta-dpo"),
    "epsilon-dpo": Contender("epsilon-dpo"),
    "mallows": Contender("mallows"),
    "lsc": Contender("lsc"),
    "ada-dpo": Contender("ada-dpo"),
    "madpo": Contender("madpo"),
    # without flips it is the constant
    "label smoothing": Contender("smoothing", conditions=tuple(c for c, own in CONDITIONS.items() if any(own.flips))),
}
"""The contenders that are trained, by name."""

ORACLE = "oracle"
"""The best factor per task of the constant's policy, on the evaluation prompts themselves: what any per-task beta gains
by re-tilting."""

CHOSEN = "chosen on scored answers"
"""The best factor per task at each budget on further prompts with scored answers: what can be known of the oracle's."""

TRUE_SLOPES = "1/b, all answers"
"""Factors in proportion to reward per nat on all answers to the evaluation prompts: what an estimate of it aims at."""

RETILTED = (ORACLE, CHOSEN, TRUE_SLOPES, "1/b, scored answers", "1/b, held-out pairs", "1/b reversed", "1/b shuffled")
"""The contenders that re-tilt the constant's policy by a factor per task, without training."""


TURN = "1/b minus b in training"
"""The reward of the one minus that of the other: below 0 early in training and above 0 late, if the theory is right."""


@dataclass(frozen=True)
class CompareConfig:
    """Train every rule for beta in many small worlds and compare the true reward at exactly equal KL.

    All worlds share one reference and one pool of prompts with sampled, scored answers. A world is a draw of prompts,
    pairs and labels from it, and a seed of training. Intervals cover these, not the choice of the reference. Prompts
    of tuning worlds are not used in the others.

    Attributes:
        reference: the reference and the pool: `problems` per task, `samples` answers per prompt; pairs_per_prompt,
            held_out and entropy_samples are not used.
        contenders: names of `TRAINED`; the constant always takes part.
        conditions: names of `CONDITIONS`.
        worlds: number of worlds that are measured, numbered from 0.
        tuning_worlds: number of worlds on which rate and scale are chosen, numbered from 1000; they take turns in the
            conditions of `MAIN_CONDITIONS`.
        tuned: the contenders whose rate and scale are chosen for themselves; the others use the constant's.
        learning_rates: learning rates of the policy to try, each with the middle scale.
        scales: scales s that multiply h at the start, to try, each with the middle rate.
        epochs: passes over the pairs where the condition does not say; a trainable beta is fixed in the first half.
        batch_size: pairs per step.
        beta_learning_rate: learning rate of a trainable beta.
        prompts: training prompts per task.
        slope_prompts: further prompts per task from which slopes are estimated: from 4 scored answers each, or from 4
            labelled pairs each.
        evaluation_prompts: further prompts per task on which a policy is measured, with all answers of the pool.
    """

    reference: WorldConfig = field(default_factory=lambda: WorldConfig(
        demonstrations=22_000, hidden_size=64, layers=3, problems=380, samples=32))  # fmt: skip
    contenders: tuple[str, ...] = tuple(TRAINED)
    conditions: tuple[str, ...] = tuple(CONDITIONS)
    worlds: int = 12
    tuning_worlds: int = 6
    tuned: tuple[str, ...] = tuple(TRAINED)
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    scales: tuple[float, ...] = (0.0016, 0.00625, 0.025, 0.1, 0.4, 1.6)
    epochs: float = 2.0
    batch_size: int = 24
    beta_learning_rate: float = 1e-2
    prompts: int = 40
    slope_prompts: int = 15
    evaluation_prompts: int = 90

    def __post_init__(self) -> None:
        for name, values, known in (("contenders", self.contenders, TRAINED), ("tuned", self.tuned, TRAINED),
                                    ("conditions", self.conditions, CONDITIONS)):  # fmt: skip
            unknown = sorted(set(values) - set(known))
            if unknown or not (values or name == "tuned"):
                raise ValueError(f"{name}: got {list(values)}, expected some of {', '.join(known)}")
        for name in ("contenders", "tuned"):
            if CONSTANT not in getattr(self, name):  # what all others are compared with
                object.__setattr__(self, name, (CONSTANT, *getattr(self, name)))
        if self.worlds < 3 or self.tuning_worlds < 1:
            raise ValueError(
                f"worlds, tuning_worlds: got {self.worlds}, {self.tuning_worlds}, expected at least 3 and 1"
            )
        for name in ("learning_rates", "scales"):
            numbers = getattr(self, name)
            if not numbers or len(set(numbers)) != len(numbers) or min(numbers) <= 0:
                raise ValueError(f"{name}: got {numbers}, expected different positive numbers, at least one")
        tuning, measured = self.tuning_problems, self.reference.problems - self.tuning_problems
        wanted = self.prompts + self.slope_prompts + self.evaluation_prompts
        if min(tuning, measured) < wanted:
            raise ValueError(
                f"reference.problems: got {self.reference.problems}, of which a tuning world may use {tuning} and the "
                f"others {measured}, expected at least {wanted} for each: "
                "prompts + slope_prompts + evaluation_prompts"
            )

    @property
    def grid(self) -> list[tuple[float, float]]:
        """The pairs of a learning rate and a scale to try: a cross through the middle of both."""
        rate, scale = (values[len(values) // 2] for values in (self.learning_rates, self.scales))
        return list(dict.fromkeys([*((r, scale) for r in self.learning_rates), *((rate, s) for s in self.scales)]))

    @property
    def tuning_problems(self) -> int:
        """Number of prompts per task, the first of the pool, that belong to the tuning worlds."""
        return self.reference.problems * 2 // 5

    @property
    def tuning_conditions(self) -> list[str]:
        """The conditions in which rate and scale are chosen."""
        return [name for name in self.conditions if name in MAIN_CONDITIONS] or list(self.conditions)

    @classmethod
    def fast(cls, **settings) -> CompareConfig:
        """Return a tiny version for tests and a first look; its numbers mean nothing."""
        reference = WorldConfig(demonstrations=11_000, hidden_size=64, layers=2, problems=60, samples=16,
                                max_new_tokens=24)  # fmt: skip
        tiny = {"reference": reference, "worlds": 3, "tuning_worlds": 1, "learning_rates": (1e-3,), "scales": (0.4,),
                "epochs": 0.25, "batch_size": 4, "prompts": 8, "slope_prompts": 8, "evaluation_prompts": 5,
                "contenders": (CONSTANT, "network, standard", "1/b in training", "ada-dpo"),
                "conditions": ("flips by task",)}  # fmt: skip
        return cls(**{**tiny, **settings})


class Job(NamedTuple):
    """One training.

    Attributes:
        phase: "tuning" or "main".
        contender: a name of `TRAINED`.
        condition: a name of `CONDITIONS`.
        world: the number of the world.
        learning_rate: learning rate of the policy; 0 stands for the best one.
        scale: s at the start; 0 stands for the best one.
    """

    phase: str
    contender: str
    condition: str
    world: int
    learning_rate: float = 0.0
    scale: float = 0.0

    @property
    def name(self) -> str:
        """The name of its file, without the suffix."""
        parts = (self.phase, self.contender, self.condition, self.world, f"{self.learning_rate:g}", f"{self.scale:g}")
        return "_".join(str(part).replace(" ", "-").replace("/", "").replace(",", "") for part in parts)


PHASES = ("tuning", "main")
"""The phases, in order: the second needs the results of the first."""


def jobs(config: CompareConfig) -> list[Job]:
    """Return the table of jobs: phase by phase, the main phase world by world. `--only` takes numbers of its rows."""
    rows = []
    for world in range(1000, 1000 + config.tuning_worlds):
        condition = config.tuning_conditions[world % len(config.tuning_conditions)]
        names = [name for name in config.contenders if name in config.tuned]
        rows += [Job("tuning", name, condition, world, *point) for name in names for point in config.grid]
    for world in range(config.worlds):
        for condition in config.conditions:
            names = [name for name in config.contenders if condition in TRAINED[name].conditions]
            rows += [Job("main", name, condition, world) for name in names]
    return rows
