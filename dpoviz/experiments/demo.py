"""The demo: from nothing to beta(x) by task, against the entropy of the reference."""

from __future__ import annotations

import json
from pathlib import Path

from dpoviz.experiments.config import DemoConfig
from dpoviz.experiments.pipeline import Results, ScoredPairs, run
from dpoviz.experiments.small import World, config_digest, small_world
from dpoviz.forms import FORMS
from dpoviz.training.stages import Variant


def demo_folder(config: DemoConfig, cache_dir: Path | str) -> Path:
    """Return where a notebook keeps a demo, so that the next one need not train it again."""
    return Path(cache_dir) / f"demo-{config_digest(config, __name__)}"


def run_demo(
    config: DemoConfig, *, out: Path | str, cache_dir: Path | str | None = None, progress: bool = True
) -> Results:
    """Run the small world: stage 1, and stage 2 in both forms.

    Args:
        config: the settings.
        out: the folder, also of the checkpoints; a run that was killed goes on from there.
        cache_dir: where the small world is kept; None keeps nothing.
        progress: show bars.
    """
    world = small_world(config.world, cache_dir=cache_dir, progress=progress)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    # prompts to which all sampled answers earn the same carry no preference: named, not silently dropped
    left_out = json.dumps(dict(world.left_out), indent=1, ensure_ascii=False)
    (out / "left_out.json").write_text(left_out, encoding="utf-8")
    variants: dict[str, Variant] = {form: Variant.of("network", config.training.in_form(form)) for form in FORMS}
    return run(scored_pairs(world), variants, out=out, answers=config.answers, progress=progress)


def scored_pairs(world: World) -> ScoredPairs:
    """Return the world's pairs as a run takes them."""
    metadata = {
        "reference rewards": dict(world.rewards),
        "prompts without a pair": {task: len(prompts) for task, prompts in world.left_out.items()},
    }
    return ScoredPairs(world.reference, world.tokenizer, world.train, world.held_out, metadata=metadata)
