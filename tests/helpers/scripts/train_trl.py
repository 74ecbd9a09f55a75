"""What each process of `test_trl.py` runs: four steps of the trainer with a beta that learns, then with a rule.

Arguments: a folder for what it leaves, and a checkpoint to go on from, if any.
"""

import copy
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import trl
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from dpoviz.beta import TaskBeta
from dpoviz.lm import models
from dpoviz.rules import BetaDPO
from dpoviz.training.config import TrainConfig
from dpoviz.trl import BetaDPOTrainer

TASKS = ("math", "code")


def held(weight: torch.Tensor) -> int:
    """How many of a weight's numbers this process has."""
    return (weight.to_local() if isinstance(weight, DTensor) else getattr(weight, "ds_tensor", weight)).numel()


def main(folder: Path, checkpoint: str | None = None) -> None:
    processes, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    texts = [f"{i} plus {i + 1} is {2 * i + 1}" for i in range(24)]
    tokenizer = models.tiny_tokenizer(texts, 300)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    rows = [{"prompt": text, "chosen": f" {text[:i % 5 + 2]}", "rejected": " no", "task": TASKS[i % 2],
             "ref_entropy": 1.0 + i % 3, "ref_features": [0.0]} for i, text in enumerate(texts)]  # fmt: skip
    settings = trl.DPOConfig(
        output_dir=str(folder / "out"), per_device_train_batch_size=4 // processes, max_steps=4, learning_rate=1e-3,
        logging_steps=1, report_to=[], bf16=False, disable_tqdm=True, save_strategy="steps", save_steps=2,
        gradient_checkpointing=False, max_grad_norm=1.0,
    )  # fmt: skip
    beta = TaskBeta(TASKS, 0.1)
    torch.nn.init.constant_(beta.log_ratio, 0.1 * rank)  # as if each process had drawn its own: the first one's counts
    model = LlamaForCausalLM(config)
    size, start = model.num_parameters(), copy.deepcopy(model)
    trainer = BetaDPOTrainer(
        model, ref_model=copy.deepcopy(model), beta=beta, args=settings, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, config=TrainConfig.around(0.1, "standard", beta_learning_rate=1e-2),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    policy = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # put together from all processes
    moments = [own["exp_avg"] for own in trainer.optimizer.state.values()]
    found = {
        "processes": trainer.accelerator.num_processes,
        "kind": trainer.accelerator.distributed_type.value,
        "weights": sum(map(held, trainer.model_wrapped.parameters())) / size,
        "moments": sum(map(held, moments)) / size,
        "beta": beta.log_ratio.tolist(),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }
    ruled = BetaDPOTrainer(
        copy.deepcopy(start), ref_model=copy.deepcopy(start), beta=BetaDPO(0.1, keep=0.7), shared_prefix=True,
        args=replace(settings, output_dir=str(folder / "rule"), save_strategy="no"), processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows).remove_columns(["ref_entropy", "ref_features"]),
    )  # fmt: skip
    ruled.train()
    own = [row for row in ruled.state.log_history if "loss" in row]
    found |= {
        "shared": ruled._sharing,
        "rule": [row[name] for row in own for name in ("loss", "beta/code", "logratio/chosen/math") if name in row],
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if rank == 0:
        torch.save({name: weight.clone() for name, weight in policy.items()}, folder / "policy.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
