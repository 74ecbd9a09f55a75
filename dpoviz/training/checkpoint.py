"""The training loop, on `accelerate`: a policy by DPO, and beta(x) with it.

Stage 1 trains the policy with a fixed beta; stage 2 goes on with beta(x) and all four terms of the objective
(the derivation, §5 and §6.4). `train` runs one stage; call it twice.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from accelerate import Accelerator


class Checkpoint:
    """The state of a run in a folder; the newest one replaces the last in one move."""

    def __init__(self, accelerator: Accelerator, folder: Path | None, identity: dict) -> None:
        self.accelerator, self.identity = accelerator, identity
        self.folder = None if folder is None else folder / "checkpoint"

    def load(self) -> tuple[int, list[dict]]:
        """Step to go on from, and the rows so far: (0, []) where there is nothing to go on from."""
        if self.folder is None:
            return 0, []
        old = self.folder.with_suffix(".old")
        if self.accelerator.is_main_process and old.exists() and not self.folder.exists():
            old.rename(self.folder)  # killed between the two moves of `save`
        self.accelerator.wait_for_everyone()
        if not (self.folder / "run.json").is_file():
            return 0, []
        saved = json.loads((self.folder / "run.json").read_text())
        if saved["identity"] != self.identity:
            raise ValueError(
                f"out: {self.folder.parent} holds a run with another configuration or other data; "
                "give another folder, or delete that one"
            )
        self.accelerator.load_state(str(self.folder))
        return saved["step"], saved["history"]

    def save(self, step: int, history: list[dict]) -> None:
        if self.folder is None:
            return
        new, old = self.folder.with_suffix(".new"), self.folder.with_suffix(".old")
        main = self.accelerator.is_main_process
        for leftover in (new, old) if main else ():
            shutil.rmtree(leftover, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(new))
        self.accelerator.wait_for_everyone()
        if main:
            run = {"identity": self.identity, "step": step, "history": history}
            (new / "run.json").write_text(json.dumps(run))
            if self.folder.exists():
                self.folder.rename(old)
            new.rename(self.folder)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
