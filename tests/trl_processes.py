"""What each process of `test_trl.py` runs: three steps of the trainer with a beta that learns."""

import copy
import json
import os
import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from dpoviz import models
from dpoviz.beta import TaskBeta
from dpoviz.train import TrainConfig
from dpoviz.trl import BetaDPOTrainer

TASKS = ("math", "code")


def main(folder: Path) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    texts = [f"{i} plus {i + 1} is {2 * i + 1}" for i in range(24)]
    tokenizer = models.tiny_tokenizer(texts, 300)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    rows = [{"prompt": text, "chosen": f" {text[:i % 5 + 2]}", "rejected": " no", "task": TASKS[i % 2],
             "ref_entropy": 1.0 + i % 3, "ref_features": [0.0]} for i, text in enumerate(texts)]  # fmt: skip
    settings = trl.DPOConfig(
        output_dir=str(folder / "out"), per_device_train_batch_size=4 // processes, max_steps=3, learning_rate=1e-3,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=False, max_grad_norm=1.0, lr_scheduler_type="constant",
    )  # fmt: skip
    beta = TaskBeta(TASKS, 0.1)
    model = LlamaForCausalLM(config)
    trainer = BetaDPOTrainer(
        model, ref_model=copy.deepcopy(model), beta=beta, args=settings, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, config=TrainConfig.around(0.1, "standard", beta_learning_rate=1e-2),
    )  # fmt: skip
    trainer.train()
    found = {"processes": trainer.accelerator.num_processes, "beta": beta.log_ratio.tolist()}
    (folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
