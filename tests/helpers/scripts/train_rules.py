"""What each process of `test_processes.py` runs: stage 2 with every rule, and with pairs for beta alone."""

import json
import sys
from pathlib import Path

from helpers.worlds import RULES_AND_FORMS, SMALL, run, small_model, small_pairs, start, weights, with_entropies

from dpoviz.lm.processes import processes
from dpoviz.training.config import TrainConfig


def main(result: Path) -> None:
    print(f"one of {processes().num_processes}")
    model = small_model()
    world = model, with_entropies(small_pairs(model)), small_pairs(model, n=9, seed=1)
    other = with_entropies(small_pairs(model, n=12, seed=2))
    # the policy has moved already: where it is the reference but for rounding, a rule that asks which of them prefers
    # an answer more is told by chance
    moved = small_model(seed=1)
    found = {}
    for name, form in RULES_AND_FORMS:
        config = TrainConfig.around(0.2, form, **SMALL)
        for beta_pairs in (None, other) if name == "network" else (None,):
            policy, history = run(world, config, start(name, form, world[1]), start=moved, beta_pairs=beta_pairs)
            key = f"{name} {form}{' on pairs of its own' if beta_pairs else ''}"
            found[key] = {"loss": history["loss"].tolist(), "weights": weights(policy).tolist()}
    if processes().is_main_process:
        result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
