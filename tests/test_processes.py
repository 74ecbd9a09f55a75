"""Two processes under `accelerate launch` train what one does, and what they leave one can go on from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

SCRIPT = Path(__file__).with_name("two_processes.py")


def launch(processes, result, out="", stop=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        start += [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
    done = subprocess.run(
        [*start, str(SCRIPT), str(result), str(out), str(stop)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if stop:
        return None, None
    history = pd.DataFrame(json.loads(result.read_text()))
    return history, torch.load(result.with_suffix(".pt"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(1, tmp_path_factory.mktemp("one") / "history.json")


def equal(found, expected):
    history, weights = found
    assert list(history.columns) == list(expected[0].columns)
    for name in history.columns:
        if name != "form":
            # float32 sums in another order; a KL is a mean of differences of sums of a few nats
            np.testing.assert_allclose(history[name], expected[0][name], rtol=1e-5, atol=1e-5, err_msg=name)
    for part, tensors in weights.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[1][part][name], rtol=1e-4, atol=1e-6, msg=f"{part} {name}")


def test_two_processes_train_what_one_does(one, tmp_path):
    assert one[0]["beta/math"].iloc[-1] != one[0]["beta/math"].iloc[0]  # beta moved
    equal(launch(2, tmp_path / "history.json"), one)


def test_one_goes_on_from_what_two_left(one, tmp_path):
    launch(2, tmp_path / "history.json", out=tmp_path / "run", stop=3)
    assert json.loads((tmp_path / "run" / "checkpoint" / "run.json").read_text())["step"] == 3
    equal(launch(1, tmp_path / "history.json", out=tmp_path / "run"), one)
