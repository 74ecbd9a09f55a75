"""The training loop, on `accelerate`: a policy by DPO, and beta(x) with it.

Stage 1 trains the policy with a fixed beta; stage 2 goes on with beta(x) and all four terms of the objective
(the derivation, §5 and §6.4). `train` runs one stage; call it twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import (
    broadcast_object_list,
    gather_object,
)
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpoviz.lm.sampling import sample_answers
from dpoviz.lm.scoring import evaluating, score_answers
from dpoviz.rules import PromptRule, Rule
from dpoviz.training.batch import batch_columns
from dpoviz.training.config import TrainConfig


def by_task(name: str, values: Sequence[float], task: Sequence[str]) -> dict[str, float]:
    means = pd.Series(values).groupby(list(task)).mean()
    return {f"{name}/{t}": mean for t, mean in means.items()}


def correctly_ranked(h: Tensor) -> Tensor:
    """1 where h > 0, 0 where h < 0, a half at a tie; what float32 rounds a zero to counts as one."""
    return (h.sign() * (h.abs() > 1e-4) + 1) / 2


class Probe:
    """Measurements on held-out prompts, the same prompts and the same draws each time."""

    def __init__(
        self,
        held_out: Dataset | None,
        reference: PreTrainedModel | None,
        config: TrainConfig,
        accelerator: Accelerator,
        *,
        pad_id: int,
        eos_id: int,
    ) -> None:
        self.reference, self.config, self.pad_id, self.eos_id = reference, config, pad_id, eos_id
        self.accelerator = accelerator
        self.data = held_out
        if held_out is not None:
            self.task = held_out["task"][:]
            self.x, self.ref_entropy = (
                torch.tensor(held_out[name][:], dtype=torch.float32, device=accelerator.device)
                for name in ("ref_features", "ref_entropy")
            )
            first = pd.DataFrame({"task": self.task, "prompt": map(tuple, held_out["prompt_ids"])})
            some = first.drop_duplicates("prompt").groupby("task").head(config.probe_prompts)
            self.prompts, self.tasks = [list(prompt) for prompt in some["prompt"]], some["task"].tolist()

    @torch.no_grad()
    def beta(self, rule: Rule) -> dict[str, float]:
        """Mean beta by task over the held-out prompts, in evaluation mode, where beta is a function of the prompt."""
        if self.data is None or not isinstance(rule, PromptRule):
            return {}
        rule.eval()
        values = rule.beta(self.x, task=self.task, ref_entropy=self.ref_entropy)
        return by_task("beta", values.tolist(), self.task)

    @torch.no_grad()
    def policy(self, scorer: nn.Module, policy: PreTrainedModel) -> dict[str, float]:
        """Reward accuracy on all held-out pairs; KL(policy ‖ reference) from one sampled answer a prompt."""
        if self.data is None:
            return {}
        scorer = self.accelerator.unwrap_model(scorer).eval()
        size, right = self.config.batch_size, []
        starts = range(0, len(self.data), size)
        for start in starts[self.accelerator.process_index :: self.accelerator.num_processes]:
            batch = batch_columns(self.data[start : start + size], self.accelerator.device)
            ratios = scorer(batch["prompt_ids"], batch["answer_ids"]) - batch["ref_logps"]
            right.append((start, correctly_ranked(ratios[:, 0] - ratios[:, 1]).tolist()))
        right = [value for _, values in sorted(gather_object(right)) for value in values]
        row = {"held_out_accuracy": sum(right) / len(right)}
        row |= by_task("held_out_accuracy", right, self.task)
        return row if self.reference is None or not self.prompts else row | self.kl(policy)

    @torch.no_grad()
    def kl(self, policy: PreTrainedModel, *, seed_shift: int = 0) -> dict[str, float]:
        """KL(policy ‖ reference) over the prompts, its standard error, and by task; one sampled answer a prompt."""
        row = [self._kl(policy, seed_shift) if self.accelerator.is_main_process else None]
        return broadcast_object_list(row)[0]

    def _kl(self, policy: PreTrainedModel, seed_shift: int) -> dict[str, float]:
        config = self.config
        answers = sample_answers(
            policy,
            self.prompts,
            1,
            max_new_tokens=config.max_new_tokens,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            seed=config.seed + seed_shift,
        ).answers

        def logps(model: PreTrainedModel) -> Tensor:
            return score_answers(model, self.prompts, answers, pad_id=self.pad_id).logps[:, 0]

        with evaluating(policy):
            of_policy = logps(policy)
            with adapter_off(policy) if self.reference is policy else nullcontext():
                of_reference = logps(self.reference)
        # the mean of log pi - log pi_ref over answers of the policy is unbiased for the KL
        difference = (of_policy - of_reference).double()
        row = {"kl": difference.mean().item(), "kl_se": (difference.std() / len(difference) ** 0.5).item()}
        return row | by_task("kl", difference.tolist(), self.tasks)


def adapter_off(policy: PreTrainedModel) -> AbstractContextManager:
    """The reference under a PEFT policy: the same weights with the adapter off, no second copy.

    Raises:
        ValueError: the model has no adapter.
    """
    if not hasattr(policy, "disable_adapter"):
        raise ValueError(
            f"reference: got the policy itself, a {type(policy).__name__} without an adapter to turn off; expected "
            "a copy of it from before training, or a PEFT model"
        )
    return policy.disable_adapter()
