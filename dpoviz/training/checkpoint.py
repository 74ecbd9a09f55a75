"""The last two checkpoints of a run on disk; a damaged one is detected."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from dpoviz.lm.cache import move, read_json, seal, verify, writing

logger = logging.getLogger(__name__)


@dataclass
class Log:
    """What a stage has logged so far.

    Attributes:
        rows: the rows of its history.
        betas: (P,) beta at each held-out prompt, by step; without a step where beta is not a function of the prompt.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    betas: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, rows: list[dict[str, Any]]) -> Log:
        """Return the rows with the betas saved in a folder; none in that of an older version."""
        if not (folder / _BETAS).is_file():
            return cls(rows)
        with np.load(folder / _BETAS) as saved:
            return cls(rows, {int(step): saved[step] for step in saved.files})


_BETAS = "betas.npz"


class Checkpoint:
    """The last two checkpoints of a run, as ``checkpoint-<step>`` in a folder visible to all its processes.

    Args:
        accelerator: its models, optimizers, schedules, registered objects and random states are saved.
        folder: where checkpoints are saved; None saves none.
        identity: JSON values; a checkpoint with any other identity is refused.
    """

    def __init__(self, accelerator: Accelerator, folder: Path | None, identity: dict[str, Any]) -> None:
        self.accelerator, self.folder = accelerator, folder
        self.identity = json.loads(json.dumps(identity))

    def load(self) -> tuple[int, Log]:
        """Return the step to resume from and what was logged; 0 and an empty log if there is no checkpoint.

        A damaged checkpoint is renamed, with a warning that names the damaged file, and the one before it is used.

        Raises:
            ValueError: the run in the folder has another configuration or other data.
        """
        if self.folder is None:
            return 0, Log()
        if self.accelerator.is_main_process:
            _set_damaged_aside(self.folder)
        self.accelerator.wait_for_everyone()
        found = _found(self.folder)
        if not found:
            return 0, Log()
        saved = read_json(found[-1] / "run.json")
        if saved["identity"] != self.identity:
            raise ValueError(
                f"out: {self.folder} holds a run with another configuration or other data "
                f"({'; '.join(_differences(saved['identity'], self.identity))}); "
                "give another folder, or delete that one"
            )
        if not (found[-1] / f"random_states_{self.accelerator.process_index}.pkl").is_file():
            logger.warning("%s was saved by fewer processes: the random state of this one starts anew", found[-1])
        self.accelerator.load_state(str(found[-1]))
        return saved["step"], Log.read(found[-1], saved["history"])

    def save(self, step: int, log: Log) -> None:
        """Save the state after a step, then delete all but the last two checkpoints.

        Raises:
            OSError: the checkpoint cannot be written, as on a full disk; the earlier ones are unchanged.
        """
        if self.folder is None:
            return
        new, main = self.folder / "checkpoint.tmp", self.accelerator.is_main_process
        if main:
            shutil.rmtree(new, ignore_errors=True)  # left by a killed run
        self.accelerator.wait_for_everyone()
        try:
            with writing(self.folder):
                self.accelerator.save_state(str(new))
            self.accelerator.wait_for_everyone()
            with writing(self.folder):
                if main:
                    run = {"identity": self.identity, "step": step, "history": log.rows}
                    (new / "run.json").write_text(json.dumps(run))
                    betas: dict[str, Any] = {str(logged): values for logged, values in log.betas.items()}
                    np.savez(new / _BETAS, **betas)
                    seal(new)
                    move(new, self.folder / f"checkpoint-{step}")
        except OSError:
            shutil.rmtree(new, ignore_errors=True)  # an incomplete checkpoint is useless and takes up space
            raise
        for old in _found(self.folder)[:-2] if main else ():
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def _found(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest last."""
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    return [folder / f"checkpoint-{step}" for step in sorted(int(name) for name in names if name.isdecimal())]


def _set_damaged_aside(run: Path) -> None:
    """Rename the damaged checkpoints of a run, from the newest back to the first intact one."""
    found = _found(run)
    for number, folder in reversed(list(enumerate(found))):
        try:
            verify(folder)
            return
        except (ValueError, OSError) as error:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            then = f"goes on from {found[number - 1].name}" if number else "starts anew"
            logger.warning("%s cannot be used (%s): it is now %s, and the run %s", folder, error, aside.name, then)


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Return each value that differs between two trees of JSON, as "name: X there, Y now"."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        parts = [_differences(there.get(key), here.get(key), f"{name}.{key}" if name else key) for key in keys]
        return [line for part in parts for line in part]
    return [] if there == here else [f"{name}: {there!r} there, {here!r} now"]
