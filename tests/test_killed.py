"""Real processes, really killed at random moments, or at the same time on the same files: nothing is lost."""

import json
import subprocess
import sys

import pytest
from helpers.launch import SCRIPTS, environment

pytestmark = pytest.mark.slow


def found(function, folder, times):
    line = [sys.executable, SCRIPTS / "killed_work.py", folder, function, str(times)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("function", ["killed", "overlap", "terminated"])
def test_a_killed_run_ends_byte_by_byte_as_if_it_had_not_been(tmp_path, function):
    """All columns, all weights and all rows of the history; also where another run used the cache in between."""
    got, said = found(function, tmp_path, 2)
    assert got["equal"] == 2
    stopped = 143 if function == "terminated" else -9
    assert set(got["codes"]) <= {0, stopped} and got["codes"].count(stopped) >= 2, said
    assert got["left"] == [] and got.get("scratch", []) == []


@pytest.mark.parametrize("function", ["worlds", "references"])
def test_several_at_once_on_one_cold_cache(tmp_path, function):
    processes, times = {"worlds": (2, 2), "references": (4, 2)}[function]
    got, said = found(function, tmp_path, times)
    assert got == {"well": processes * times, "equal": processes * times}, said


def test_a_folder_in_use_is_refused_and_one_of_a_killed_run_is_free(tmp_path):
    told = found("locked", tmp_path, 3)[0]["told"]
    assert len(told) == 3
    assert all("run is in use by its process on " in line for line in told)
