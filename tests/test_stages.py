"""Variants that are trained side by side, in processes really killed: as if in turn, and never killed."""

import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.launch import SCRIPTS, alive, begin, children
from helpers.scripts.side_by_side import results

from dpoviz.lm.workers import one_thread


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="/proc: there is none to see processes in")
def test_killed_side_by_side_and_resumed_it_ends_as_in_turn(tmp_path):
    with one_thread():
        in_turn = results(tmp_path / "in turn", 1)
    ahead = tmp_path / "side" / "standard"  # the second variant: while the first is trained, a worker's
    process = begin([sys.executable, SCRIPTS / "side_by_side.py", tmp_path / "side"])
    while not list(ahead.glob("checkpoint-*[0-9]")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while any(map(alive, workers)):
        time.sleep(0.05)
    assert not (ahead / "checkpoint-120").exists()
    side_by_side = results(tmp_path / "side", 2)
    assert [name for name, *_ in side_by_side] == [name for name, *_ in in_turn] == ["inverse", "standard"]
    for (_, *ours), (_, *theirs) in zip(side_by_side, in_turn, strict=True):
        pd.testing.assert_frame_equal(ours[0], theirs[0], check_exact=True)
        assert np.array_equal(ours[1], theirs[1])
        for own, other in zip(ours[2:], theirs[2:], strict=True):
            assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
    of_policies = [own[-1] for own in in_turn]
    assert any(not torch.equal(of_policies[0][key], of_policies[1][key]) for key in of_policies[0])
