"""Running a program that a model wrote, with little to break and not for long.

It stops accidents: endless loops, memory, files, processes, the network. It is no prison: a program that is out to
fool it runs in the same interpreter as the guard. Run programs of people you do not trust in a container.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from typing import Literal, NamedTuple

Kind = Literal["passed", "failed", "timeout", "memory", "forbidden"]

_MESSAGE = 500  # characters of a failure that are kept


class Outcome(NamedTuple):
    """What became of a program.

    Attributes:
        kind: "passed" if it ran to its end; "failed" if it raised, or ended before its end; "timeout"; "memory";
            "forbidden" if it asked for the network, a process, or a file to write.
        message: of the exception, or what was forbidden.
    """

    kind: Kind
    message: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.kind == "passed"


def run_program(source: str, *, timeout: float = 5.0, memory_mib: int = 512) -> Outcome:
    """Run Python source in a process of its own, in an empty folder, without environment or input.

    Its memory, CPU time and open files are limited; what it prints is dropped; it cannot use a socket, start a
    process, load a C library or write a file, and where the system lets an ordinary user have one, it has a network
    of its own, with nothing in it. At the time limit it is killed with whatever it started.

    Args:
        source: the program. It has passed if it comes to its end: `sys.exit` and `os._exit` before that have not.
        timeout: seconds.
        memory_mib: limit of its address space; not every system has such a limit.
    """
    token = secrets.token_hex(16)
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _CHILD, str(write)],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[write],
            start_new_session=True,
        )
        os.close(write)
        task = {"token": token, "source": source, "seconds": int(timeout) + 1, "bytes": memory_mib * 2**20}
        try:
            process.communicate(json.dumps(task).encode(), timeout=timeout)
        except subprocess.TimeoutExpired:
            return Outcome("timeout", f"ran for {timeout:g} s")
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
            with os.fdopen(read, "rb") as pipe:
                said = pipe.read(64 * 1024).decode(errors="replace")
    kind, _, message = said.partition(" ")
    if kind == token:
        return Outcome("passed")
    if kind in ("failed", "memory", "forbidden"):
        return Outcome(kind, message[:_MESSAGE])
    if process.returncode == -signal.SIGXCPU:
        return Outcome("timeout", f"used {int(timeout) + 1} s of CPU")
    return Outcome("failed", f"ended before its end, with status {process.returncode}")


# What the child runs first. The guard is an audit hook, which nothing can remove; it ends the process itself, so that
# a program that catches every exception does not run on.
_CHILD = r"""
import json, os, sys

report = int(sys.argv[1])
task = json.load(sys.stdin)
sys.stdin.close()

try:
    import resource
    limits = {"CPU": task["seconds"], "CORE": 0, "NOFILE": 64, "AS": task["bytes"]}
    for limit, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
        except (AttributeError, ValueError, OSError):
            pass
except ImportError:
    pass
try:  # a network namespace without a network, where an ordinary user may have one
    import ctypes
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)
    del ctypes
except Exception:
    pass

def say(text, write=os.write, report=report):
    write(report, text.encode("utf-8", "replace")[:60000])

FORBIDDEN = ("socket.", "subprocess.", "ctypes.", "shutil.", "webbrowser.", "urllib.", "ftplib.", "http.", "smtplib.")
PROCESSES = {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill",
             "os.killpg", "pty.spawn", "signal.pthread_kill"}
FILES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink",
         "os.truncate", "os.utime", "os.chflags", "os.setxattr", "os.removexattr", "os.putenv"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC

def guard(event, arguments, say=say, leave=os._exit):
    bad = event.startswith(FORBIDDEN) or event in PROCESSES or event in FILES
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        bad = (isinstance(mode, str) and bool(set(mode) & set("wax+"))) or bool((flags or 0) & WRITES)
    if bad:
        say("forbidden " + event + " " + repr(arguments)[:200])
        leave(1)

token, source = task["token"], task["source"]
del task, sys.argv[1:]
sys.addaudithook(guard)
try:
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})
except MemoryError:
    say("memory MemoryError")
except SystemExit as error:
    say("failed SystemExit: " + str(error))
except BaseException as error:
    say("failed " + type(error).__name__ + ": " + str(error))
else:
    say(token)
os._exit(0)
"""
