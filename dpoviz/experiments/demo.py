"""The demo: train beta(x) in the small world and show it by task, against the entropy of the reference."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from dpoviz.experiments.config import DemoConfig
from dpoviz.experiments.folder import write_config
from dpoviz.experiments.pipeline import Results, ScoredPairs, run
from dpoviz.experiments.small import World, config_digest, small_world
from dpoviz.forms import FORMS
from dpoviz.lm.workers import one_thread
from dpoviz.training.stages import Variant
from dpoviz.validation import require


def demo_folder(config: DemoConfig, cache_dir: Path | str) -> Path:
    """Return the folder in which a notebook caches a demo, so that it is trained once."""
    return Path(cache_dir) / f"demo-{config_digest(config, __name__)}"


def run_demo(
    config: DemoConfig,
    *,
    out: Path | str,
    cache_dir: Path | str | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Results:
    """Train in the small world: stage 1, then stage 2 in both forms.

    The numbers do not depend on the number of cores: policies are trained on one thread.

    Args:
        config: the settings.
        out: the folder of results and checkpoints; a run that was killed resumes from it.
        cache_dir: folder in which the small world is cached; None: no cache.
        workers: the number of forms that are trained side by side, with the same result; more than one needs a cache.
            A script that asks for it protects its entry point by ``if __name__ == "__main__":``.
        progress: show bars.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    require("workers", workers, workers == 1 or cache_dir is not None, "1 without a cache_dir")
    world = small_world(config.world, cache_dir=cache_dir, progress=progress)
    out = Path(out)
    write_config(out, {"command": "demo", **asdict(config)})
    # prompts whose sampled answers all have the same reward give no pair: they are listed, not dropped silently
    left_out = json.dumps(dict(world.left_out), indent=1, ensure_ascii=False)
    (out / "left_out.json").write_text(left_out, encoding="utf-8")
    variants: dict[str, Variant] = {form: Variant.of("network", config.training.in_form(form)) for form in FORMS}
    with one_thread():
        return run(scored_pairs(world), variants, out=out, answers=config.answers, workers=workers, progress=progress)


def scored_pairs(world: World) -> ScoredPairs:
    """Return the reference and the pairs of a world as the input of a run."""
    metadata = {
        "reference rewards": dict(world.rewards),
        "prompts without a pair": {task: len(prompts) for task, prompts in world.left_out.items()},
    }
    return ScoredPairs(world.reference, world.tokenizer, world.train, world.held_out, metadata=metadata)
