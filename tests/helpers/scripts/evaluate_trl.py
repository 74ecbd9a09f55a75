"""What each process of `test_trl_held_out.py` runs: two steps, each followed by an evaluation of five pairs.

Two processes of two pairs each fill up the last batch with three pairs that they have had.
Arguments: the trainer's folder, and how many processes there are.
"""

import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from dpoviz.beta import TaskBeta
from dpoviz.lm import models
from dpoviz.training.config import TrainConfig
from dpoviz.trl import BetaDPOTrainer

TASKS = ("math", "code")


def main(folder: Path) -> None:
    texts = [f"{i} plus {i + 1} is {2 * i + 1}" for i in range(16)]
    tokenizer = models.tiny_tokenizer(texts, 300)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    rows = [{"prompt": text, "chosen": f" {text[:i % 5 + 2]}", "rejected": " no", "task": TASKS[i % 2],
             "ref_entropy": 1.0 + i % 3, "ref_features": [0.0]} for i, text in enumerate(texts)]  # fmt: skip
    model, reference = (LlamaForCausalLM(config) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    data = Dataset.from_list(rows)
    settings = trl.DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=8 // int(sys.argv[2]), max_steps=2, learning_rate=1e-2,
        per_device_eval_batch_size=2, logging_steps=1, report_to=[], bf16=False, disable_tqdm=True, eval_steps=1,
        eval_strategy="steps", save_strategy="steps", save_steps=2, gradient_checkpointing=False,
    )  # fmt: skip
    BetaDPOTrainer(
        model, ref_model=reference, beta=TaskBeta(TASKS, 0.1), args=settings, train_dataset=data.select(range(8)),
        eval_dataset=data.select([8, 9, 10, 11, 8]), processing_class=tokenizer,
        config=TrainConfig.around(0.1, "standard", beta_learning_rate=1e-2),
    ).train()  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
