"""Command lines of programs and of dpoviz, in one process or several, and running them to their end."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"
TESTS = Path(__file__).parents[1]
DPOVIZ = (sys.executable, "-m", "dpoviz")


def environment(**more):
    """That of a process on the CPU, without network, which finds these helpers."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    cpu = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return {**os.environ, **cpu, **{name: str(value) for name, value in more.items()}}


def command(processes, *arguments):
    """A command line of Python's, for one process or for several of `torchrun`."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    return [sys.executable, *map(str, (*several, *arguments))]


def finish(line, cwd=None, **more):
    """Run a command line to its end, and return its output."""
    done = subprocess.run(
        [*map(str, line)], cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def begin(line, **more):
    """Start a command line; its output is to be read."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, line)], env=environment(**more), **pipes)


def python(code, **more):
    """Run a program of Python's in a process of its own, and return its output."""
    return finish([sys.executable, "-c", code], **more)


def alive(pid):
    """Whether there is such a process that has not ended; one that nobody has waited for has."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def children(pid):
    """The ids of the processes that a process has started and that have not ended."""
    found = [int(name) for path in Path(f"/proc/{pid}/task").glob("*/children") for name in path.read_text().split()]
    return [child for child in found if alive(child)]


def flat(text):
    """A message on one line, without the box that the parser of options draws around its own."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())
