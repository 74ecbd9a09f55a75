"""Direct Preference Optimization with an input-dependent beta: derived, trained and drawn."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from dpoviz.old_names import install

_HOMES = {
    "losses": ("DPOOutput", "TotalLoss", "dpo_loss", "gradients_on_beta", "total_loss"),
    "regularizers": ("entropy_penalty", "range_penalty", "smoothness_penalty", "task_consistency_penalty"),
    "beta": ("Beta", "BetaNetwork", "ConstantBeta", "EntropyBeta", "TaskBeta"),
    "allocation": ("allocate", "gain_bound", "reward_per_nat", "reward_per_nat_of_pairs"),
    "data.records": ("as_chat", "load_pairs", "split_by_group"),
    "data.tokens": ("tokenize_pairs",),
    "lm.models": ("add_lora", "load_lm", "tiny_lm", "tiny_tokenizer"),
    "lm.scoring": ("score_answers",),
    "lm.sampling": ("sample_answers",),
    "lm.entropy": ("estimate_entropy",),
    "lm.reference": ("reference_pass",),
    "training.config": ("TrainConfig",),
    "training.loop": ("train",),
    "training.methods": ("load_beta",),
    "translation": ("language",),
    "analysis.tables": ("beta_table", "summarize"),
    "learn.run": ("compare_runs", "load_run"),
    "learn.explorer": ("explore_run",),
    "learn.explore_beta": ("explore_beta",),
    "analysis.plots": ("plot_beta_by_task", "plot_beta_gradients", "plot_beta_vs_entropy", "plot_training"),
}
"""The public names, by the module that defines each. A module is imported when one of its names is first used."""

__version__: str

_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


install()


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version("dpoviz")
    if name not in _HOME:
        raise AttributeError(f"module 'dpoviz' has no attribute {name!r}")
    return getattr(import_module(f"dpoviz.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


if TYPE_CHECKING:  # what editors and type checkers read
    from dpoviz.allocation import allocate, gain_bound, reward_per_nat, reward_per_nat_of_pairs
    from dpoviz.analysis.plots import plot_beta_by_task, plot_beta_gradients, plot_beta_vs_entropy, plot_training
    from dpoviz.analysis.tables import beta_table, summarize
    from dpoviz.beta import Beta, BetaNetwork, ConstantBeta, EntropyBeta, TaskBeta
    from dpoviz.data.records import as_chat, load_pairs, split_by_group
    from dpoviz.data.tokens import tokenize_pairs
    from dpoviz.learn.explore_beta import explore_beta
    from dpoviz.learn.explorer import explore_run
    from dpoviz.learn.run import compare_runs, load_run
    from dpoviz.lm.entropy import estimate_entropy
    from dpoviz.lm.models import add_lora, load_lm, tiny_lm, tiny_tokenizer
    from dpoviz.lm.reference import reference_pass
    from dpoviz.lm.sampling import sample_answers
    from dpoviz.lm.scoring import score_answers
    from dpoviz.losses import DPOOutput, TotalLoss, dpo_loss, gradients_on_beta, total_loss
    from dpoviz.regularizers import entropy_penalty, range_penalty, smoothness_penalty, task_consistency_penalty
    from dpoviz.training.config import TrainConfig
    from dpoviz.training.loop import train
    from dpoviz.training.methods import load_beta
    from dpoviz.translation import language
