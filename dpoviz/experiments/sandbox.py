"""Run programs that a model wrote, isolated by bubblewrap, and test them from a process they cannot reach.

There are two processes. One runs the program. The other, the judge, runs only trusted tests: their function
`candidate` sends its arguments to the first process and receives plain data. Expected values and comparisons stay in
the judge, so an object that equals everything, a patched builtin or an early exit cannot make a program pass.

Both run under bubblewrap (`bwrap`) in their own namespaces, without network, writable files, home, /proc, environment
or inherited descriptors, and end with this process. A seccomp filter blocks what namespaces do not: further processes,
sockets, memory that counts towards no process, the kernel's keys. Resource limits bound the rest. Where bubblewrap does
not work, programs are refused, unless `unsafe=True` allows to run them with only limits and a guard.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Literal, NamedTuple

Kind = Literal["passed", "failed", "timeout", "memory", "forbidden"]

logger = logging.getLogger(__name__)

_MESSAGE = 500  # characters kept of a failure's message
_START = 60.0  # seconds allowed for two interpreters to start on a busy machine


class Outcome(NamedTuple):
    """The outcome of a program.

    Attributes:
        kind: "passed"; "failed" if it raised, ended too early or failed its tests; "timeout"; "memory";
            "forbidden" if the guard of `unsafe` stopped it.
        message: the exception's message, or what was forbidden.
    """

    kind: Kind
    message: str = ""

    @property
    def passed(self) -> bool:
        """True if the program reached its end and passed its tests, if there were any."""
        return self.kind == "passed"


class NoIsolation(OSError):
    """Raised if programs cannot be isolated and `unsafe` is False."""


def run_program(source: str, *, timeout: float = 5.0, memory_mib: int = 512, unsafe: bool = False) -> Outcome:
    """Run Python source to its end, without tests.

    It passes only if it reaches its end; exiting early, by `sys.exit` or `os._exit`, counts as failure. A malicious
    program can fake its end. To test what a program computes, use `check_program`.

    Args:
        source: the program. Its output is discarded.
        timeout: seconds, counted from when the interpreter is ready.
        memory_mib: limit of its address space, in MiB.
        unsafe: without isolation, run it with limits and a guard only. They stop accidents, not attacks: such a program
            can do whatever this process can.

    Raises:
        NoIsolation: bubblewrap is missing or does not work here, and `unsafe` is False.
        ValueError: timeout or memory_mib is not positive.
        OSError: the interpreters did not start.
    """
    return _run(source, None, "", timeout, memory_mib, unsafe)


def check_program(
    source: str, name: str, tests: str, *, timeout: float = 5.0, memory_mib: int = 512, unsafe: bool = False
) -> Outcome:
    """Run trusted tests against a function of a program.

    The tests run in a separate process, in which no line of the program runs. Arguments and results are passed as plain
    data: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset and dict. A result of another type,
    such as a generator or a NumPy array, fails, as does any exception. The tests see neither changes that the function
    makes to its arguments, nor its output, nor whether two results share an object.

    Args:
        source: the untrusted program.
        name: the function to test.
        tests: trusted Python source that calls `candidate(...)` and raises if a result is wrong.
        timeout: seconds for the program and all tests, counted from when the interpreters are ready.
        memory_mib: limit of each process's address space, in MiB.
        unsafe: as in `run_program`; without isolation, a program can reach the judge too.

    Raises:
        NoIsolation: bubblewrap is missing or does not work here, and `unsafe` is False.
        ValueError: timeout or memory_mib is not positive; the tests are not valid Python, or pass other data.
        OSError: the interpreters did not start.
    """
    return _run(source, name, tests, timeout, memory_mib, unsafe)


def require_isolation(*, unsafe: bool = False) -> bool:
    """Return True if programs can be isolated here; if not, return False with one warning, provided `unsafe` is True.

    Raises:
        NoIsolation: programs cannot be isolated and `unsafe` is False.
    """
    problem = _isolation_problem(shutil.which("bwrap"))
    if not problem:
        return True
    if not unsafe:
        raise NoIsolation(
            f"programs: got no isolation ({problem}), expected a bubblewrap that works; install it (Linux: apt install "
            "bubblewrap) or allow user namespaces, or use unsafe=True (--unsafe) to run programs that could do "
            "whatever you can"
        )
    _warn(problem)
    return False


@functools.cache
def _warn(problem: str) -> None:
    logger.warning("programs run without isolation (%s): they could do whatever you can", problem)


def _run(source: str, name: str | None, tests: str, timeout: float, memory_mib: int, unsafe: bool) -> Outcome:
    if not (0 < timeout < math.inf and memory_mib > 0):
        raise ValueError(f"timeout, memory_mib: got {timeout}, {memory_mib}, expected positive numbers")
    isolated = require_isolation(unsafe=unsafe)
    seconds = math.ceil(timeout) + 1
    limits = {"CPU": seconds, "CORE": 0, "NOFILE": 64, "AS": memory_mib * 2**20, "FSIZE": 0}
    if isolated:  # without namespaces they would count the user's other processes too
        limits |= {"NPROC": 64, "MEMLOCK": 0, "MSGQUEUE": 0}
    with ExitStack() as stack:
        (asked, ask), (answers, answer), (verdicts, verdict) = (_pipe(stack) for _ in range(3))
        program = _start(stack, isolated, stdin=asked, stdout=answer)
        task = {
            **{"limits": limits, "strict": isolated, "ask": ask.fileno(), "answers": answers.fileno()},
            **{"source": source, "name": name, "tests": tests},
        }
        with _as_file(json.dumps(task).encode() + b"\n") as task_file:
            judge = _start(stack, isolated, stdin=task_file, stdout=verdict, pass_fds=(ask, answers))
        for end in (asked, ask, answers, answer, verdict):
            end.close()
        if _read_line(verdicts, _START) != b'"ready"\n':
            raise OSError("programs: the interpreters did not start; is the machine out of memory or of processes?")
        line = _read_line(verdicts, timeout)
        if line is None:
            return Outcome("timeout", f"ran for {timeout:g} s")
        for process in (judge, program):  # if they end by themselves, bubblewrap cleans up after them
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        kind, message = json.loads(line or b'["failed", "the judge ended: was an answer too large?"]')
        if kind == "tests":
            raise ValueError(f"tests: {message}")
        if kind == "ended":
            return _ended(program, seconds)
        return Outcome(kind, message[:_MESSAGE].encode("utf-8", "replace").decode())


def _ended(program: subprocess.Popen, seconds: int) -> Outcome:
    """Return why a program ended, from its exit status; bubblewrap adds 128 to the number of a signal."""
    status = program.poll()  # None: it closed its pipe and still runs
    if status in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        return Outcome("timeout", f"used {seconds} s of CPU")
    return Outcome("failed", f"ended before its end, with status {status}")


def _pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return stack.enter_context(os.fdopen(read, "rb", 0)), stack.enter_context(os.fdopen(write, "wb", 0))


def _as_file(data: bytes) -> IO[bytes]:
    """Return a nameless file that holds the data: unlike a pipe, it takes any length at once."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return open(file.name, "rb")


def _start(
    stack: ExitStack, isolated: bool, stdin: IO[bytes], stdout: IO[bytes], pass_fds: Sequence[IO[bytes]] = ()
) -> subprocess.Popen:
    """Start an interpreter that waits for its task; closing the stack kills it."""
    with _command(_CHILD, isolated) as (command, descriptors):
        process = subprocess.Popen(
            command,
            cwd="/",
            env={},
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            pass_fds=[*descriptors, *(end.fileno() for end in pass_fds)],
            start_new_session=True,
        )
    stack.callback(_kill, process)
    return process


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_line(pipe: IO[bytes], seconds: float) -> bytes | None:
    """Return a line; None if it does not arrive in time, b"" if the pipe is closed before."""
    deadline, line = time.monotonic() + seconds, b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        part = os.read(pipe.fileno(), 1)  # what follows the line stays in the pipe
        if not part:
            return b""
        line += part
    return line


_PACKAGES = "python*/*-packages"  # site-packages, and Debian's dist-packages


@contextmanager
def _command(code: str, isolated: bool) -> Iterator[tuple[list[str], list[int]]]:
    """Yield the command that runs Python code, and the descriptors that it must inherit.

    Isolated, the code sees Python and the system's libraries and can write nothing. Installed packages are hidden: one
    of them may contain the answers to the tests.
    """
    interpreter = os.path.realpath(sys.executable)  # not that of a virtual environment, which finds packages
    python = [interpreter, "-I", "-S", "-B", "-c", code]
    if not isolated:
        yield python, []
        return
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
    libraries += [os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")]
    command = [str(shutil.which("bwrap")), "--unshare-all", "--cap-drop", "ALL", "--new-session", "--die-with-parent"]
    command += ["--hostname", "sandbox"]
    for path in dict.fromkeys([*libraries, interpreter, "/etc/ld.so.cache"]):
        command += ["--ro-bind-try", path, path]
    for packages in (str(path) for library in dict.fromkeys(libraries) for path in Path(library).glob(_PACKAGES)):
        command += ["--tmpfs", packages, "--remount-ro", packages]
    for device in ("null", "zero", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    # even empty files cost memory, and nothing limits their number: nothing is writable
    command += ["--dir", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    with ExitStack() as stack:
        read, write = _pipe(stack)
        with write:
            write.write(_seccomp_filter())  # smaller than a pipe's buffer: does not block
        yield [*command, "--seccomp", str(read.fileno()), *python], [read.fileno()]


_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""The column of the tables below, and the kernel's constant for the machine (AUDIT_ARCH_*)."""

_CLONE, _CLONE3 = (56, 220), (435, 435)
_NONE = 0xFFFFFFFF  # not a system call: aarch64 forks by clone
_REFUSED: dict[str, tuple[int, int]] = {
    # another process, whose memory escapes the limit of the first; for root, their number is not limited
    **{"fork": (57, _NONE), "vfork": (58, _NONE)},
    # sockets: some families ignore namespaces, such as that to the host of a virtual machine
    "socket": (41, 198),
    # memory that counts towards no process
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190)},
    **{"msgget": (68, 186), "mq_open": (240, 180)},
    # keys of the session that started this process
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    # new namespaces, and parts of the kernel that programs do not need
    **{"unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51)},
    **{"pivot_root": (155, 41), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430)},
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"io_uring_setup": (425, 425), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282)},
    **{"open_by_handle_at": (304, 265), "syslog": (103, 116)},
}  # fmt: skip
"""System calls that fail with EPERM: their numbers on x86_64 and on aarch64."""


@functools.cache
def _seccomp_filter() -> bytes:
    """Return the filter in the kernel's format (seccomp(2), classic BPF): 8 bytes per instruction.

    Raises:
        KeyError: the tables lack this machine.
    """
    column, machine = _MACHINES[platform.machine()]

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    def load(offset: int) -> bytes:  # offsets in struct seccomp_data: number 0, machine 4, first argument 16
        return instruction(0x20, offset)

    def leave(action: int) -> bytes:
        return instruction(0x06, action)

    equal, at_least, any_bit = 0x15, 0x35, 0x45
    kill, allow, eperm, enosys = 0x80000000, 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38
    program = [load(4), instruction(equal, machine, 1, 0), leave(kill), load(0)]
    program += [instruction(at_least, 0x40000000, 0, 1), leave(kill)]  # the same calls by x32's numbers
    for numbers in _REFUSED.values():
        program += [instruction(equal, numbers[column], 0, 1), leave(eperm)]
    # clone3's flags lie in memory, which a filter cannot read; refused, the C library uses clone
    program += [instruction(equal, _CLONE3[column], 0, 1), leave(enosys)]
    clone_thread = 0x00010000
    program += [
        instruction(equal, _CLONE[column], 0, 3),
        load(16),
        instruction(any_bit, clone_thread, 1, 0),
        leave(eperm),
    ]
    return b"".join([*program, leave(allow)])


# exits with 0 only if the filter works
_TRIAL = "import os\ntry: os.fork()\nexcept PermissionError: os._exit(0)\nos._exit(1)"


@functools.cache
def _isolation_problem(bubblewrap: str | None) -> str:
    """Return why programs cannot be isolated here, or ""; determined by isolating one."""
    if bubblewrap is None:
        return "bwrap is not on the PATH"
    if platform.machine() not in _MACHINES:
        return f"no system call filter for {platform.machine()}"
    with _command(_TRIAL, isolated=True) as (command, descriptors):
        try:
            trial = subprocess.run(
                command, cwd="/", env={}, stdin=subprocess.DEVNULL, capture_output=True, timeout=_START,
                pass_fds=descriptors,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"bwrap: {error}"
    said = trial.stderr.decode(errors="replace").strip().splitlines()
    return "" if trial.returncode == 0 else " ".join([f"bwrap ended with status {trial.returncode}", *said[-1:]])


# Both child processes run this code. It holds no secret, so the program may read it.
_CHILD = r"""
import json, os, secrets, sys, types

def main():
    task = json.loads(sys.stdin.buffer.readline())
    said, asked = os.dup(1), os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)

    def say(what):
        data = json.dumps(what).encode() + b"\n"
        while data:
            data = data[os.write(said, data):]

    set_limits(task)
    if "ask" in task:
        judge(task, say)
    else:
        die_with_parent_and_guard(task, say)
        say("ready")
        serve(asked, say)
    os._exit(0)

def set_limits(task):
    import resource
    for name, value in task["limits"].items():
        try:
            limit = getattr(resource, "RLIMIT_" + name)
            hard = value + (name == "CPU")  # the soft limit sends SIGXCPU, which names the cause; the hard one kills
            ours = resource.getrlimit(limit)[1]
            if ours != resource.RLIM_INFINITY:
                hard = min(hard, ours)
            resource.setrlimit(limit, (min(value, hard), hard))
        except Exception:
            if task["strict"]:
                raise

CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}

def pack(value):
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        return value if -2**63 < value < 2**63 else {"int": hex(value)}  # decimal digits are limited
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return {name: [pack(item) for item in value]}
    raise TypeError("got a value of type " + type(value).__name__ + ", expected plain data")

def unpack(packed):
    if not isinstance(packed, dict):
        if isinstance(packed, list):
            raise ValueError("a list without a kind")
        return packed
    (kind, inner), = packed.items()
    if kind == "int":
        return int(inner, 16)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in inner}
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "complex":
        return complex(*inner)
    return CONTAINERS[kind](unpack(item) for item in inner)

def described(error):
    return (type(error).__name__ + ": " + str(error))[:4000]

# ---- the program's process

def serve(asked, say):
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    for line in asked:
        request = json.loads(line)
        try:
            value = None
            if "source" in request:
                exec(compile(request["source"], "program", "exec"), module.__dict__)
            elif "call" in request:
                value = getattr(module, request["call"])(*unpack(request["args"]), **unpack(request["kwargs"]))
            else:
                value = request["echo"]
            say({"value": pack(value)})
        except MemoryError:
            say({"memory": "MemoryError"})
        except BaseException as error:
            say({"failed": described(error)})

def die_with_parent_and_guard(task, say):
    if task["strict"]:
        return  # isolated: bubblewrap ends it with its parent, and no guard is needed
    try:
        import ctypes
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: Linux has it
    except Exception:
        pass
    forbidden = ("socket.", "subprocess.", "ctypes.", "shutil.", "webbrowser.", "urllib.", "ftplib.", "http.",
                 "smtplib.", "syslog.", "sqlite3.", "resource.", "pty.")
    events = {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill",
              "os.killpg", "signal.pthread_kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod",
              "os.chown", "os.link", "os.symlink", "os.truncate", "os.utime", "os.chflags", "os.setxattr",
              "os.removexattr", "os.putenv"}
    modules = {"_posixsubprocess", "multiprocessing", "_multiprocessing", "sqlite3", "_sqlite3", "readline",
               "_posixshmem", "ctypes", "_ctypes"}
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC

    def guard(event, arguments):
        bad = event.startswith(forbidden) or event in events or (event == "import" and arguments[0] in modules)
        if event == "open":
            mode, flags = arguments[1], arguments[2]
            bad = (isinstance(mode, str) and bool(set(mode) & set("wax+"))) or bool((flags or 0) & writes)
        if bad:
            say({"forbidden": event + " " + repr(arguments)[:200]})
            os._exit(1)

    sys.addaudithook(guard)

# ---- the judge's process

class Verdict(BaseException):  # the tests' own handlers do not catch it
    pass

def judge(task, say):
    say(verdict(task, say))

def verdict(task, say):
    ask, answers = os.fdopen(task["ask"], "wb"), os.fdopen(task["answers"], "rb")

    def exchange(request):
        try:
            ask.write(json.dumps(request).encode() + b"\n")
            ask.flush()
        except BrokenPipeError:
            pass  # the program is gone; its last answer can still be read
        line = answers.readline(2**22)
        if not line:
            raise Verdict("ended", "")
        try:
            answer = json.loads(line)
            if answer == "ready":
                return answer
            (kind, value), = answer.items()
            if kind == "value":
                return unpack(value)
            if kind not in ("failed", "memory", "forbidden") or not isinstance(value, str):
                raise ValueError(kind)
        except Exception as error:
            raise Verdict("failed", "its answer is no plain data: " + described(error))
        raise Verdict(kind, value)

    def candidate(*args, **kwargs):
        try:
            packed = {"call": task["name"], "args": pack(list(args)), "kwargs": pack(kwargs)}
        except TypeError as error:
            raise Verdict("tests", "candidate: " + str(error))
        return exchange(packed)

    import random
    random.seed(0)  # tests with random inputs use the same ones for every program
    try:
        exchange({"limits": task["limits"], "strict": task["strict"]})
        say("ready")
        try:
            tests = compile(task["tests"], "tests", "exec")
        except (SyntaxError, ValueError) as error:
            return "tests", described(error)
        exchange({"source": task["source"]})
        # a number that did not exist before the program reached its end
        number = secrets.token_hex()
        if exchange({"echo": number}) != number:
            raise Verdict("failed", "it answered for itself")
        exec(tests, {"__name__": "tests", "candidate": candidate})
    except Verdict as found:
        return found.args
    except MemoryError:
        return "memory", "MemoryError in the tests"
    except BaseException as error:
        return "failed", described(error)
    return "passed", ""

main()
"""
