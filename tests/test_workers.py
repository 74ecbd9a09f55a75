"""Work side by side: its order, and what is left when a process of it, or the one that began it, is killed."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers.launch import alive, begin

from dpoviz.lm.workers import run_side_by_side, started

pytestmark = pytest.mark.slow


def work(task):
    """Sleep where it is told to, say where it runs, or end its process by a signal."""
    place, number, end = task
    (Path(place) / f"{number}").write_text(str(os.getpid()))
    if end == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "stay":
        time.sleep(600)
    return number, os.getpid(), os.environ.get("OMP_NUM_THREADS")


def test_results_in_order_from_other_processes(tmp_path):
    found = list(run_side_by_side(work, [(tmp_path, i, "") for i in range(4)], workers=2))
    assert [number for number, *_ in found] == [0, 1, 2, 3]
    assert os.getpid() not in {pid for _, pid, _ in found}


def test_nothing_to_do_starts_nothing():
    assert list(run_side_by_side(work, [], workers=2)) == []


def test_a_killed_worker_is_one_line(tmp_path):
    with pytest.raises(ChildProcessError) as caught:
        list(run_side_by_side(work, [(tmp_path, 0, "die")], workers=1))
    assert "worker process was killed" in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, OSError)  # what the command line shows as one line, with status 2


def test_workers_end_with_the_context(tmp_path):
    """Where the parent is stopped or fails, no worker keeps it waiting."""
    with pytest.raises(KeyboardInterrupt), started(work, [(tmp_path, 0, "stay")], workers=1):
        while not list(tmp_path.iterdir()) or not (tmp_path / "0").read_text():
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert not alive(int((tmp_path / "0").read_text()))


def test_a_worker_that_draws_bars_leaves_no_word_at_the_end(tmp_path):
    """tqdm makes a lock that processes share; left behind by a killed one, it is reported."""
    said = begin([sys.executable, "-c", BARS, tmp_path]).communicate()
    assert said == ("done\n", "")


BARS = """
import sys
import test_workers as own
from dpoviz.lm.workers import started
if __name__ == "__main__":
    try:
        with started(own.draw, [sys.argv[1]], workers=1):
            while not own.Path(sys.argv[1], "drawn").exists():
                own.time.sleep(0.05)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        print("done")
"""


def draw(place):
    from tqdm import tqdm

    with tqdm(total=1, disable=True):
        pass
    tqdm.get_lock()
    (Path(place) / "drawn").touch()
    time.sleep(600)


PARENT = """
import sys
import test_workers as own
from dpoviz.lm.workers import run_side_by_side
if __name__ == "__main__":
    list(run_side_by_side(own.work, [(sys.argv[1], i, "stay") for i in range(2)], workers=2))
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="/proc: there is none to see processes in")
def test_workers_of_a_killed_process_end(tmp_path):
    script, place = tmp_path / "parent.py", tmp_path / "said"
    script.write_text(PARENT)
    place.mkdir()
    parent = begin([sys.executable, script, place])
    while len(list(place.iterdir())) < 2 or not all(path.read_text() for path in place.iterdir()):
        assert parent.poll() is None, parent.stderr.read()
        time.sleep(0.05)
    pids = [int(path.read_text()) for path in place.iterdir()]
    assert all(map(alive, pids))
    parent.kill()
    parent.communicate()
    while any(map(alive, pids)):  # without an end to themselves they would stay for ten minutes
        time.sleep(0.05)
