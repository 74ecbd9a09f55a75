"""Train two variants side by side on a small world, in the folder that the first argument names."""

import copy
import sys

from helpers.worlds import EOS, PAD, SMALL, small_model, small_pairs

from dpoviz.training.config import TrainConfig
from dpoviz.training.stages import Variant, run_variants

STEPS = {**SMALL, "stage2_steps": 120, "checkpoint_every": 5, "log_every": 20, "probe_every": 0}


def results(out, workers):
    """Name, history, held-out ratios, beta's weights and policy's weights of each variant."""
    reference = small_model()
    policy = copy.deepcopy(reference)
    variants = {form: Variant.of("network", TrainConfig.around(0.1, form, **STEPS)) for form in ("inverse", "standard")}
    pairs, held_out = small_pairs(reference), small_pairs(reference, 6, seed=1)
    ends = {"pad_id": PAD, "eos_id": EOS, "progress": False}
    run = run_variants(
        policy, pairs, variants, held_out=held_out, reference=reference, out=out, workers=workers, **ends
    )
    return [
        (own.name, own.result.history, own.result.held_out, own.beta.state_dict(), copy.deepcopy(policy.state_dict()))
        for own in run
    ]


if __name__ == "__main__":
    results(sys.argv[1], 2)
