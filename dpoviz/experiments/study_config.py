"""The settings of the study, its arms, and its table of jobs. Importing this module does not load torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dpoviz.experiments.config import RealConfig
from dpoviz.forms import Form
from dpoviz.training.config import TrainConfig


class Arm(NamedTuple):
    """A way to choose beta.

    Attributes:
        form: the form of its loss.
        network: beta(x) by a network; else beta is fixed.
        entropy: whether its entropy term is on; λ3 is 0 otherwise.
        slopes: "" or how beta follows the reward per nat b of the other folds: "inverse" (∝ 1/b), "reversed" (∝ b), or
            "shuffled" (∝ 1/b, dealt to other prompts).
    """

    form: Form = "standard"
    network: bool = False
    entropy: bool = False
    slopes: str = ""


ARMS = {
    "constant": Arm(),
    **{f"{form}{end}": Arm(form, network=True, entropy=not end) for form in ("inverse", "standard")
       for end in ("", "-no-entropy")},
    "slopes": Arm(slopes="inverse"),
    "slopes-reversed": Arm(slopes="reversed"),
    "slopes-shuffled": Arm(slopes="shuffled"),
}  # fmt: skip
"""The arms by name; the constant is trained at each scale, the others start at the middle one."""

BASELINE = "constant"


@dataclass(frozen=True)
class StudyConfig:
    """Train every arm with each fold of the pairs held out in turn, for several seeds, and measure it as it trains.

    Arms are constants, beta(x) in both forms with and without its entropy term, and beta by task from the reward per
    nat of the other folds, as it is, reversed and shuffled. To resume a study, give the same command again.

    Attributes:
        data: files, folders, a hub name or a preset's name.
        model: a folder, a GGUF file, a hub name, smollm2-135m, or random:tiny, with random weights.
        preset: the layout of a known public set, for a file of it.
        task: the task of all pairs, if they name none.
        columns: columns of the data to rename to ours, such as question=prompt.
        chat: tasks whose plain prompts become a user's message.
        pairs_per_task: the largest number of pairs per task, sampled by seed 0; None: all.
        max_length: limit of the prompt and one answer together, in tokens; longer pairs are dropped, with a warning.
        entropy_samples: answers per prompt for the entropy of the reference.
        max_new_tokens: limit of a sampled answer, in tokens.
        arms: the arms to train: constant, which is always among them; inverse and standard, also with the end
            -no-entropy (λ3 = 0); slopes, slopes-reversed and slopes-shuffled.
        scales: scales s of the constants; the other arms start at the middle one.
        folds: number of folds; a training holds out one.
        seeds: number of seeds, each with folds of its own.
        epochs: passes over the training pairs after which a policy is measured; the last one ends its training.
        batch_size: pairs per step.
        eval_batch_size: pairs per batch where nothing is trained.
        policy_learning_rate: learning rate of the policy; None: 1e-4 with adapters, 1e-6 for all weights.
        beta_learning_rate: learning rate of beta.
        lambda_entropy: weight λ3 of the entropy term where it is on.
        lora_rank: rank of the adapters; 0 trains all weights.
        precision: what policy and reference compute in, as in dpoviz train.
        gradient_accumulation: parts in which a batch passes through the policy, to save memory.
        gradient_checkpointing: keep only the input of each layer for the backward pass, to save memory.
        compile: compile the policy's layers.
    """

    data: tuple[str, ...] = ()
    model: str = "smollm2-135m"
    preset: str | None = None
    task: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    chat: tuple[str, ...] = ()
    pairs_per_task: int | None = None
    max_length: int = 512
    entropy_samples: int = 8
    max_new_tokens: int = 64
    arms: tuple[str, ...] = tuple(ARMS)
    scales: tuple[float, ...] = (0.03, 0.1, 0.3)
    folds: int = 5
    seeds: int = 2
    epochs: tuple[int, ...] = (1, 2, 4, 8)
    batch_size: int = 8
    eval_batch_size: int = 16
    policy_learning_rate: float | None = None
    beta_learning_rate: float = 3e-3
    lambda_entropy: float = 0.1
    lora_rank: int = 0
    precision: str = "auto"
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown:
            raise ValueError(f"arms: got {unknown}, expected some of {', '.join(ARMS)}")
        if BASELINE not in self.arms:  # what all others are compared with
            object.__setattr__(self, "arms", (BASELINE, *self.arms))
        if self.folds < 2 or self.seeds < 1:
            raise ValueError(f"folds, seeds: got {self.folds}, {self.seeds}, expected at least 2 and 1")
        for name in ("scales", "epochs"):
            values = getattr(self, name)
            if not values or sorted(set(values)) != list(values) or not 0 < values[0] <= values[-1] < math.inf:
                raise ValueError(f"{name}: got {list(values)}, expected rising numbers above 0, at least one")
        self.real()  # raises if it refuses a setting
        self.training(ARMS[BASELINE], self.scale, pairs=1, seed=0)

    @property
    def scale(self) -> float:
        """The middle scale, at which all arms but the other constants start."""
        return self.scales[(len(self.scales) - 1) // 2]

    def real(self) -> RealConfig:
        """Return the settings under which `experiments.real` loads and scores the pairs."""
        real = RealConfig(**{name: getattr(self, name) for name in _OF_RUN})
        return replace(real, training=replace(real.training, **{name: getattr(self, name) for name in _OF_TRAINING}))

    def steps(self, epochs: int, pairs: int) -> int:
        """Return the number of updates in some passes over the training pairs, at least one."""
        return max(1, round(epochs * pairs / self.batch_size))

    def training(self, arm: Arm, scale: float, *, pairs: int, seed: int) -> TrainConfig:
        """Return the settings of one training; beta(x) is trained from the first step."""
        steps = self.steps(self.epochs[-1], pairs)
        settings = replace(
            self.real().training,
            initial_scale=scale,
            lambda_entropy=self.lambda_entropy if arm.entropy else 0.0,
            stage1_steps=0,
            stage2_steps=steps,
            warmup_steps=max(1, steps // 20),
            log_every=steps,
            checkpoint_every=steps,
            seed=seed,
        )
        return settings.resolved(pairs, adapters=self.lora_rank > 0).in_form(arm.form)


_OF_RUN = ("data", "model", "preset", "task", "columns", "chat", "pairs_per_task", "max_length", "entropy_samples",
           "lora_rank", "precision")  # fmt: skip
_OF_TRAINING = ("max_new_tokens", "batch_size", "eval_batch_size", "policy_learning_rate", "beta_learning_rate",
                "gradient_accumulation", "gradient_checkpointing", "compile")  # fmt: skip


class Job(NamedTuple):
    """One training.

    Attributes:
        arm: a name of `ARMS`.
        scale: the scale of a constant; that at which another arm starts.
        fold: the fold that is held out.
        seed: seed of the folds and of the training.
    """

    arm: str
    scale: float
    fold: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its file, without the suffix."""
        return f"{self.arm}_{self.scale:g}_{self.fold}_{self.seed}"


def jobs(config: StudyConfig) -> list[Job]:
    """Return the table of jobs; those that read the slopes of others come last."""
    rows = [
        Job(arm, scale, fold, seed)
        for seed in range(config.seeds)
        for fold in range(config.folds)
        for arm in config.arms
        for scale in (config.scales if arm == BASELINE else (config.scale,))
    ]
    return sorted(rows, key=lambda job: bool(ARMS[job.arm].slopes))
