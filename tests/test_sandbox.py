"""What a program may not do, done; and that what it may do goes through."""

import os
import time
from pathlib import Path

import pytest

from dpoviz.experiments.sandbox import run_program


def test_a_program_that_ends_has_passed():
    assert run_program("import math, collections, re, random\nassert math.gcd(4, 6) == 2\nprint('x' * 100000)").passed


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("x = (", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended before its end, with status 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("input()", "Error"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_failed(source, message):
    outcome = run_program(source)
    assert outcome.kind == "failed" and message in outcome.message


def test_printing_is_not_passing():
    assert not run_program("print('passed')\nimport sys\nsys.stdout.flush()\nraise SystemExit(0)").passed


@pytest.mark.parametrize(
    "source",
    ["while True: pass", "import time; time.sleep(60)", "try:\n    while True: pass\nexcept BaseException: pass"],
)
def test_time(source):
    begin = time.perf_counter()
    assert run_program(source, timeout=1.0).kind == "timeout"
    assert time.perf_counter() - begin < 5


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="other systems do not limit the address space")
def test_memory():
    assert run_program("x = [0] * 10**9", memory_mib=256).kind == "memory"
    assert run_program("x = [0] * 10**6", memory_mib=256).passed


@pytest.mark.parametrize(
    "source",
    [
        "import socket; socket.create_connection(('127.0.0.1', 80))",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os, signal; os.kill(os.getppid(), signal.SIGTERM)",
        "import ctypes; ctypes.CDLL(None)",
        "open('file', 'w')",
        "import os; os.open('file', os.O_WRONLY | os.O_CREAT)",
        "from pathlib import Path; Path('file').write_text('x')",
        "import os; os.mkdir('folder')",
        "import shutil; shutil.rmtree('/nowhere')",
        # caught, and still the end of it
        "try:\n    open('file', 'w')\nexcept BaseException:\n    pass",
    ],
)
def test_forbidden(source):
    outcome = run_program(source)
    assert outcome.kind == "forbidden", outcome


def test_a_file_of_ours_stays(tmp_path):
    file = tmp_path / "mine"
    file.write_text("kept")
    assert run_program(f"import os; os.remove({str(file)!r})").kind == "forbidden"
    assert file.read_text() == "kept"
    assert run_program(f"assert open({str(file)!r}).read() == 'kept'").passed  # reading is allowed


def test_no_environment_and_no_folder_of_ours(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert run_program("import os; assert 'SECRET' not in os.environ and os.listdir('.') == []").passed
    here = str(Path(__file__).parent)
    assert run_program(f"import sys; assert {here!r} not in sys.path and '' not in sys.path").passed


def test_leaves_no_process_and_no_open_file():
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    for source in ("pass", "while True: pass", "import os; os._exit(3)"):
        run_program(source, timeout=0.5)
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    assert after == before
