"""Direct Preference Optimization with an input-dependent beta: derived, trained and drawn."""

from dpoviz.beta import BetaNetwork, ConstantBeta, EntropyBeta, TaskBeta
from dpoviz.data import load_pairs, split_by_group
from dpoviz.entropy import estimate_entropy
from dpoviz.losses import DPOOutput, TotalLoss, dpo_loss, gradients_on_beta, total_loss
from dpoviz.plots import plot_beta_by_task, plot_beta_gradients, plot_beta_vs_entropy, plot_training
from dpoviz.reference import reference_pass
from dpoviz.regularizers import entropy_penalty, range_penalty, smoothness_penalty, task_consistency_penalty
from dpoviz.table import beta_table, summarize
from dpoviz.train import TrainConfig

__all__ = [
    "BetaNetwork",
    "ConstantBeta",
    "DPOOutput",
    "EntropyBeta",
    "TaskBeta",
    "TotalLoss",
    "TrainConfig",
    "beta_table",
    "dpo_loss",
    "entropy_penalty",
    "estimate_entropy",
    "gradients_on_beta",
    "load_pairs",
    "plot_beta_by_task",
    "plot_beta_gradients",
    "plot_beta_vs_entropy",
    "plot_training",
    "range_penalty",
    "reference_pass",
    "smoothness_penalty",
    "split_by_group",
    "summarize",
    "task_consistency_penalty",
    "total_loss",
]
