"""Measure how much factors a ∝ b earn by the number of scored answers, and write answers.csv beside this file.

About four minutes of one core, after `dpoviz compare` has made the pool. Arguments: the rate and the scale of the
constant, as `dpoviz compare` chose them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from dpoviz.experiments.comparison_config import MAIN_CONDITIONS, CompareConfig
from dpoviz.experiments.comparison_runs import gain_by_answers
from dpoviz.lm.reference import default_cache_dir


def main(rate: float, scale: float) -> None:
    config = CompareConfig()
    rows = [
        row
        for world in range(config.worlds)
        for condition in MAIN_CONDITIONS
        for row in gain_by_answers(config, condition, world, rate, scale, default_cache_dir())
    ]
    pd.DataFrame(rows).to_csv(Path(__file__).parent / "answers.csv", index=False, float_format="%.5g")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:] or (3e-4, 0.0016)))
