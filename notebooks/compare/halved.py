"""Measure how near a policy re-tilted by 2 is to one trained with half the scale, and write halved.csv beside this.

About eight minutes of one core, after `dpoviz compare` has made the pool.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd

from dpoviz.experiments.comparison_config import CompareConfig
from dpoviz.experiments.comparison_runs import halve_scale
from dpoviz.lm.reference import default_cache_dir


def main(rate: float, scale: float) -> None:
    rows = [
        halve_scale(replace(CompareConfig(), epochs=epochs), world, rate, scale, default_cache_dir())
        for epochs in (0.5, 2.0, 8.0, 32.0)
        for world in range(4)
    ]
    pd.DataFrame(rows).to_csv(Path(__file__).parent / "halved.csv", index=False, float_format="%.5g")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:] or (3e-4, 0.4)))
