"""What each process of `test_processes.py` runs: stage 2 with every method, and with calibration pairs."""

import json
import sys
from pathlib import Path

import test_methods as methods
from test_train import SMALL, run, small_model, small_pairs, weights

from dpoviz.lm.processes import processes
from dpoviz.training.config import TrainConfig


def main(result: Path) -> None:
    print(f"one of {processes().num_processes}")
    model = small_model()
    world = model, methods.with_entropies(small_pairs(model)), small_pairs(model, n=9, seed=1)
    other = methods.with_entropies(small_pairs(model, n=12, seed=2))
    # the policy has moved already: where it is the reference but for rounding, a rule that asks which of them prefers
    # an answer more is told by chance
    moved = small_model(seed=1)
    found = {}
    for name, form in methods.PAIRS:
        config = TrainConfig.around(0.2, form, **SMALL)
        for calibration in (None, other) if name == "network" else (None,):
            start = methods.start(name, form, world[1])
            policy, history = run(world, config, start, start=moved, calibration=calibration)
            key = f"{name} {form}{' calibrated' if calibration else ''}"
            found[key] = {"loss": history["loss"].tolist(), "weights": weights(policy).tolist()}
    if processes().is_main_process:
        result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
