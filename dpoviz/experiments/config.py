"""The settings of whole runs. Importing this module does not load torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from tyro.conf import OmitArgPrefixes

from dpoviz.forms import Form
from dpoviz.training.config import RULES, TrainConfig, TrainSettings


@dataclass(frozen=True)
class WorldConfig:
    """The small world: its reference model and its preference pairs.

    Attributes:
        demonstrations: answers on which the reference is trained, over all tasks.
        hidden_size: width of the reference.
        layers: depth of the reference.
        problems: prompts per task for which answers are sampled.
        samples: answers sampled per prompt, from which pairs are made.
        pairs_per_prompt: the largest number of pairs per prompt.
        held_out: fraction of the prompts to hold out.
        entropy_samples: answers per prompt for the entropy of the reference.
        max_new_tokens: limit of a sampled answer, in tokens.
        seed: random seed of the world.
    """

    demonstrations: int = 45_000
    hidden_size: int = 128
    layers: int = 4
    problems: int = 320
    samples: int = 8
    pairs_per_prompt: int = 4
    held_out: float = 0.25
    entropy_samples: int = 8
    max_new_tokens: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"demonstrations": 3, "hidden_size": 8, "layers": 1, "problems": 2, "samples": 2, "seed": 0}
        _require_whole(self, {**least, "pairs_per_prompt": 1, "entropy_samples": 2, "max_new_tokens": 1})
        _require_fraction("held_out", self.held_out)


@dataclass(frozen=True)
class DemoConfig:
    """Train a tiny reference, then a policy by DPO with a fixed beta and with beta(x) in both forms.

    Writes the numbers, the pictures, the models and a report into a folder. To resume a run that was killed, give the
    same command again.

    Attributes:
        world: the small world.
        training: settings of training.
        answers: held-out prompts per task whose answers before and after training are saved.
        fast: run a tiny version for a first look; its numbers mean little.
    """

    world: WorldConfig = field(default_factory=WorldConfig)
    training: OmitArgPrefixes[TrainSettings] = field(default_factory=TrainSettings)
    answers: int = 3
    fast: bool = False

    def __post_init__(self) -> None:
        _require_whole(self, {"answers": 0})
        self.training.in_form("inverse")  # raises if a setting is None

    @classmethod
    def default(cls, seed: int = 0, *, fast: bool = False) -> DemoConfig:
        """Return the settings of the README's demo; `fast` takes a minute, for a first look and for tests."""
        world, training = WorldConfig(seed=seed), TrainSettings(seed=seed)
        if fast:
            world = replace(world, demonstrations=12_000, problems=64, entropy_samples=4)
            training = replace(training, stage1_steps=10, stage2_steps=20, probe_every=10, probe_prompts=8)
        return cls(world, training, fast=fast)

    @property
    def inverse(self) -> TrainConfig:
        """The run in the inverse form."""
        return self.training.in_form("inverse")

    @property
    def standard(self) -> TrainConfig:
        """The run in the standard form."""
        return self.training.in_form("standard")


def _real_training() -> TrainSettings:
    return TrainSettings(
        stage1_steps=None,
        stage2_steps=None,
        batch_size=None,
        eval_batch_size=8,
        policy_learning_rate=None,
        warmup_steps=None,
        log_every=None,
        probe_every=0,  # sampling takes long on a real model
        probe_prompts=8,
        max_new_tokens=64,
        checkpoint_every=None,
    )


@dataclass(frozen=True)
class RealConfig:
    """Score your pairs with the reference, then train DPO with a fixed beta and with beta(x) in both forms.

    The baseline continues with the fixed beta for the same number of steps. Writes the numbers, the pictures, the
    adapters and a report into a folder. To resume a run that was killed, give the same command again.

    Attributes:
        data: files, folders, a hub name or a preset's name.
        model: a folder, a GGUF file, a hub name, or smollm2-135m.
        preset: the layout of a known public set, for a file of it.
        task: the task of all pairs, if they name none.
        columns: columns of the data to rename to ours, such as question=prompt.
        ignore_columns: columns to ignore although they would change the prompt.
        chat: tasks whose plain prompts become a user's message.
        pairs_per_task: the largest number of pairs per task, sampled by the seed; None: all.
        held_out: fraction of the prompts to hold out.
        max_length: limit of the prompt and one answer together, in tokens; longer pairs are dropped, with a warning.
        entropy_samples: answers per prompt for the entropy of the reference.
        lora_rank: rank of the adapters; 0 trains all weights.
        precision: what policy and reference compute in: float32; bfloat16, in which frozen weights are stored too; or
            auto: frozen weights in bfloat16 on a GPU that has it, all else as accelerate launch was told, or float32.
        four_bit: store the frozen weights under the adapters in 4 bits (NF4), which needs bitsandbytes.
        rule: the rule for beta, trained in each form in which it is defined.
        strength: value of the rule's hyperparameter; None: its default.
        answers: held-out prompts per task whose answers before and after training are saved.
        training: settings of training.
    """

    data: tuple[str, ...] = ()
    model: str = "smollm2-135m"
    preset: str | None = None
    task: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    ignore_columns: tuple[str, ...] = ()
    chat: tuple[str, ...] = ()
    pairs_per_task: int | None = None
    held_out: float = 0.25
    max_length: int = 512
    entropy_samples: int = 8
    lora_rank: int = 16
    precision: str = "auto"
    four_bit: bool = False
    rule: str = "network"
    strength: float | None = None
    answers: int = 3
    training: OmitArgPrefixes[TrainSettings] = field(default_factory=_real_training)

    def __post_init__(self) -> None:
        _require_whole(self, {"entropy_samples": 2, "max_length": 2, "lora_rank": 0, "answers": 0})
        if self.pairs_per_task is not None:
            _require_whole(self, {"pairs_per_task": 2})
        _require_fraction("held_out", self.held_out)
        require_precision(self.precision)
        if self.four_bit and not self.lora_rank:
            raise ValueError("four_bit: got true with lora_rank 0, expected adapters: 4 bits are too few to train")
        if self.four_bit and self.model.startswith("random:"):
            raise ValueError(f"four_bit: got true with the model {self.model}, expected a folder or hub name")
        if self.rule not in RULES:
            raise ValueError(f"rule: got {self.rule!r}, expected one of {', '.join(RULES)}")
        if self.strength is not None and not RULES[self.rule].setting:
            raise ValueError(f"strength: got {self.strength!r}, but the rule {self.rule!r} has no hyperparameter")

    def require_data(self) -> None:
        """Raise ValueError if the settings name no data."""
        if not self.data:
            raise ValueError("data: got none, expected a file, a folder, a hub name or a preset")

    def settings(self, pairs: int) -> TrainSettings:
        """Return the settings of training on `pairs` pairs, with every None that depends on them filled in."""
        return self.training.resolved(pairs, adapters=self.lora_rank > 0)

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms in which the rule is trained."""
        return RULES[self.rule].forms


@dataclass(frozen=True)
class SampleConfig:
    """Sample preference pairs from a model, labelled by programs.

    Answers to HumanEval's problems are labelled by the problems' tests, those to generated word problems by their
    number, and those to chat openers by the dialogue's reward. Programs run isolated by bubblewrap. To resume a run
    that was killed, give the same command again.

    Attributes:
        model: a folder, a GGUF file, a hub name, or smollm2-135m.
        tasks: tasks to sample: some of math, code and dialogue.
        prompts: prompts per task.
        samples: answers per prompt.
        max_new_tokens: limit of an answer, in tokens.
        batch: prompts per batch.
        seed: random seed of prompts, samples, pairs and labels.
        unsafe: run the model's programs even where bubblewrap cannot isolate them.
    """

    model: str = "smollm2-135m"
    tasks: tuple[str, ...] = ("math", "code", "dialogue")
    prompts: int = 50
    samples: int = 8
    max_new_tokens: int = 128
    batch: int = 8
    seed: int = 0
    unsafe: bool = False

    def __post_init__(self) -> None:
        _require_whole(self, {"prompts": 1, "samples": 2, "max_new_tokens": 1, "batch": 1, "seed": 0})
        unknown = sorted(set(self.tasks) - {"math", "code", "dialogue"})
        if unknown or not self.tasks:
            raise ValueError(f"tasks: got {list(self.tasks)}, expected some of math, code, dialogue")


def require_precision(precision: str) -> None:
    """Raise ValueError for a precision that is not "auto", "float32" or "bfloat16"."""
    if precision == "float16":
        raise ValueError(
            "precision: got 'float16', expected auto, float32 or bfloat16: float16 needs the loss scaled, for one "
            "optimizer, and policy and beta have one each"
        )
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision: got {precision!r}, expected auto, float32 or bfloat16")


def _require_whole(config: object, least: Mapping[str, int]) -> None:
    for name, smallest in least.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value < 2**31:
            raise ValueError(f"{name}: got {value!r}, expected a whole number, at least {smallest}")


def _require_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a fraction between 0 and 1")


TABLES = ("steps", "profile", "reference", "sampling", "lengths", "shared prompts", "pairs", "vocabulary")
"""The measurements of the benchmark, in order."""


@dataclass(frozen=True)
class BenchConfig:
    """Time a training step, scoring by the reference, and sampling, each against a peer.

    A step of dpoviz is timed against TRL's DPOTrainer, if it is installed, and a plain concatenated step, on the same
    pairs of each task; scoring against a bare forward pass; sampling with entropies against generate.

    Attributes:
        data: files, folders, a hub name or a preset's name; none: pairs and model of the small world of `dpoviz demo`.
        model: a folder, a GGUF file, a hub name, smollm2-135m, or random:smollm2-135m, random:1.5b or random:tiny, with
            random weights of that size.
        preset: the layout of a known public set, for a file of it.
        task: the task of all pairs, if they name none.
        columns: columns of the data to rename to ours, such as question=prompt.
        chat: tasks whose plain prompts become a user's message.
        pairs_per_task: the largest number of pairs per task, sampled by the seed; None: all.
        max_length: limit of the prompt and one answer together, in tokens.
        max_new_tokens: limit of a sampled answer, in tokens.
        batch_size: pairs per step.
        dtype: type of the model's weights.
        device: where the model is; auto: a GPU if there is one.
        compile: also time the steps with compiled layers, and sampling with a cache of fixed size; compiling takes
            minutes.
        tables: the measurements to make.
        repeats: timed calls of each.
        seed: random seed.
    """

    data: tuple[str, ...] = ()
    model: str = "smollm2-135m"
    preset: str | None = None
    task: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    chat: tuple[str, ...] = ()
    pairs_per_task: int | None = None
    max_length: int = 512
    max_new_tokens: int = 64
    batch_size: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    tables: tuple[str, ...] = TABLES
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        _require_whole(self, {"batch_size": 1, "repeats": 1, "max_length": 2, "max_new_tokens": 1, "seed": 0})
        unknown = [name for name in self.tables if name not in TABLES]
        if unknown or not self.tables:
            raise ValueError(f"tables: got {list(self.tables)}, expected some of {', '.join(TABLES)}")

    def real(self) -> RealConfig:
        """Return the settings under which `experiments.real` loads and scores the pairs."""
        training = replace(_real_training(), max_new_tokens=self.max_new_tokens, seed=self.seed)
        names = ("data", "model", "preset", "task", "columns", "chat", "pairs_per_task", "max_length")
        return RealConfig(**{name: getattr(self, name) for name in names}, lora_rank=0, training=training)
