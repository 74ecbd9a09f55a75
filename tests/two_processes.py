"""What each process of `test_processes.py` runs: stage 2 of the small world of `test_train.py`."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent))
import test_train as small

from dpoviz.training.checkpoint import Checkpoint
from dpoviz.training.config import TrainConfig


def main(result: Path, out: str, stop: int) -> None:
    print(f"one of {Accelerator().num_processes}")
    reference = small.small_model()
    world = reference, small.small_pairs(reference), small.small_pairs(reference, n=9, seed=1)
    config = TrainConfig.around(0.1, "inverse", lambda_consistency=0.5, **{**small.SMALL, "log_every": 1})
    if stop:
        save = Checkpoint.save

        def then_die(self, step, history):
            save(self, step, history)
            if step == stop:
                sys.exit(0)

        Checkpoint.save = then_die
    beta = small.network()
    with torch.no_grad():  # as if each process had drawn its own: the first one's counts
        next(p for p in beta.parameters() if p.dim() == 2).add_(0.1 * Accelerator().process_index)
    policy, history = small.run(world, config, beta, out=out or None)
    if Accelerator().is_main_process:
        weights = {"policy": policy.state_dict(), "beta": beta.state_dict()}
        torch.save(weights, result.with_suffix(".pt"))
        result.write_text(json.dumps(history.to_dict("list")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
