"""What each process of `test_processes.py` runs: a reference pass, and scores of held-out pairs."""

import json
import sys
from pathlib import Path

from datasets import Dataset

from dpoviz.data import tasks
from dpoviz.lm import models
from dpoviz.lm.entropy import estimate_entropy
from dpoviz.lm.processes import processes
from dpoviz.lm.reference import reference_pass
from dpoviz.training.probes import log_ratios


def main(result: Path, cache: Path) -> None:
    print(f"one of {processes().num_processes}")
    problems = [problem for task in tasks.TASKS for problem in tasks.sample_problems(task, 9, 0)]
    tokenizer = models.tiny_tokenizer([problem.prompt for problem in problems], 300)
    model = models.tiny_lm(tokenizer, hidden_size=16, layers=2, heads=2, max_length=64).eval()
    answers = ["yes", "no, 12", "perhaps 7 or so"]
    pairs = Dataset.from_list(
        [{"prompt": problem.prompt, "chosen": answers[i % 3], "rejected": answers[(i + 1) % 3], "task": problem.task,
          "group": problem.prompt} for i, problem in enumerate(problems)]
    )  # fmt: skip
    scored = reference_pass(
        model, tokenizer, pairs, max_length=64, max_new_tokens=6, entropy_samples=8, batch_size=6, cache_dir=cache,
        progress=False,
    )  # fmt: skip
    policy = models.tiny_lm(tokenizer, hidden_size=16, layers=2, heads=2, max_length=64, seed=1).eval()
    ratios = log_ratios(policy, scored, pad_id=tokenizer.pad_token_id, batch_size=4, progress=False)
    ids = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    prompts = [scored["prompt_ids"][0]] * 4
    again = estimate_entropy(model, prompts, samples=8, max_new_tokens=6, seed=0, batch_size=2, **ids)
    if processes().is_main_process:
        found = scored.to_dict() | {"ratios": ratios.tolist(), "again": again.per_token.value.tolist()}
        result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
