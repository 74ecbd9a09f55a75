"""What each process of `test_processes.py` runs: stage 2 of a small world, to its end or until it is killed."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from helpers.worlds import SMALL, dies_at, network, run, small_model, small_pairs

from dpoviz.training.config import TrainConfig


def main(result: Path, out: str, stop: int) -> None:
    print(f"one of {Accelerator().num_processes}", flush=True)
    reference = small_model()
    world = reference, small_pairs(reference), small_pairs(reference, n=9, seed=1)
    config = TrainConfig.around(0.1, "inverse", lambda_consistency=0.5, **{**SMALL, "log_every": 1})
    beta = network()
    with torch.no_grad():  # as if each process had drawn its own: the first one's counts
        next(p for p in beta.parameters() if p.dim() == 2).add_(0.1 * Accelerator().process_index)
    if stop:
        dies_at(beta, stop, lambda: os._exit(0))
    policy, history = run(world, config, beta, out=out or None)
    if Accelerator().is_main_process:
        weights = {"policy": policy.state_dict(), "beta": beta.state_dict()}
        torch.save(weights, result.with_suffix(".pt"))
        result.write_text(json.dumps(history.to_dict("list")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
