"""Render chats with a tokenizer's chat template, in a separate process.

A template is a program that comes with a model's files. It can loop forever or exhaust the memory where no Python
exception stops it, but a process can be limited from outside. The process also fixes today's date, so that a run can
be repeated.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = datetime(2024, 7, 26)
"""Date given to templates that ask for today's: the fallback of Llama 3.1's template where no clock is available."""

_SECONDS = 5.0  # CPU time, plus an allowance per chat; a chat takes about 0.1 ms
_SECONDS_PER_CHAT = 0.01
_MEMORY = 2 << 30  # bytes of address space
_CHARACTERS = 10**8  # per chat


class Chat(NamedTuple):
    """A chat to render.

    Attributes:
        messages: dicts with role, content and further fields that the template reads.
        tools: schemas of the functions that may be called.
        prompt: append the header of an answer (`add_generation_prompt`).
        options: further variables of the template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: list[dict[str, Any]] | None = None
    prompt: bool = False
    options: Mapping[str, Any] | None = None


class Rendered(NamedTuple):
    """The result of rendering a chat.

    Attributes:
        text: the rendered chat; empty if refused.
        refusal: error message of the template if it refuses the chat.
        dated: the template asked for the date.
    """

    text: str
    refusal: str | None
    dated: bool


def render(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> list[Rendered]:
    """Render each chat as the tokenizer's `apply_chat_template` does, with `DATE` as today's date.

    Raises:
        ValueError: the template takes too much time or memory.
    """
    if _overrides(tokenizer):
        return [_by_its_own_code(tokenizer, chat) for chat in chats]
    jobs = [
        {
            "conversations": [[{k: v for k, v in message.items() if v is not None} for message in chat.messages]],
            "tools": chat.tools,
            "chat_template": tokenizer.get_chat_template(None, chat.tools),
            "add_generation_prompt": chat.prompt,
            **tokenizer.special_tokens_map,
            **(chat.options or {}),
        }
        for chat in chats
    ]
    return [Rendered(*answer) for answer in _PROCESS.ask(jobs)]


def _overrides(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer's class overrides `apply_chat_template`."""
    from transformers import PreTrainedTokenizerBase as Base

    return type(tokenizer).apply_chat_template is not Base.apply_chat_template


def _by_its_own_code(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Rendered:
    tools: dict[str, Any] = {"tools": chat.tools} if chat.tools else {}
    try:
        text: Any = tokenizer.apply_chat_template(
            [dict(message) for message in chat.messages],
            add_generation_prompt=chat.prompt,
            tokenize=False,
            **tools,
            **(chat.options or {}),
        )
    except Exception as error:  # the class may raise anything to refuse a chat
        return Rendered("", _words(error), False)
    return Rendered(text, None, False)


class _Process:
    """The rendering process: started on first use, ended with this process or by its limits."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: subprocess.Popen[bytes] | None = None
        self.owner: int | None = None

    def ask(self, jobs: Sequence[dict]) -> list[list]:
        with self.lock:
            running = self._started()
            to_it, from_it = _pipes(running)
            try:
                pickle.dump(jobs, to_it)
                to_it.flush()
                return [json.loads(from_it.readline()) for _ in jobs]
            except (BrokenPipeError, json.JSONDecodeError):  # the process has ended, perhaps in the middle of a line
                raise ValueError(f"tokenizer: its chat template {self._end()}; give another one") from None
            except BaseException:  # such as Ctrl-C: the remaining output must not be read as the next answer
                running.kill()
                self._end()
                raise

    def _started(self) -> subprocess.Popen[bytes]:
        # a fork inherits the pipes, but they belong to its parent
        if self.running is None or self.owner != os.getpid():
            program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
            self.running = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C reaches only this process; the other one ends at the end of its input
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            self.owner = os.getpid()
            atexit.register(self._stop, self.running, self.owner)
        return self.running

    def _end(self) -> str:
        """End the process and return the reason why it ended."""
        running, self.running = self.running, None
        assert running is not None
        self._stop(running, self.owner)
        code = running.returncode
        if code == -signal.SIGXCPU:
            return f"does not end within {_SECONDS:.0f} s"
        return f"ended its process with {signal.Signals(-code).name if code < 0 else f'status {code}'}"

    @staticmethod
    def _stop(running: subprocess.Popen[bytes], owner: int | None) -> None:
        if owner == os.getpid():
            to_it, from_it = _pipes(running)
            with suppress(BrokenPipeError):
                to_it.close()
            from_it.close()
            running.wait()


def _pipes(running: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert running.stdin is not None and running.stdout is not None
    return running.stdin, running.stdout


_PROCESS = _Process()


def serve() -> None:
    """Render the chats read from standard input until it ends; the main function of the rendering process."""
    from transformers.utils import chat_template_utils

    asked = SimpleNamespace(date=False)

    def now() -> datetime:
        asked.date = True
        return DATE

    vars(chat_template_utils)["datetime"] = SimpleNamespace(now=now)
    source, out = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    _limit_memory()
    while True:
        try:
            jobs = pickle.load(source)
        except EOFError:
            return
        _limit_time(_SECONDS + _SECONDS_PER_CHAT * len(jobs))
        for job in jobs:
            asked.date = False
            try:
                rendered: Any = chat_template_utils.render_jinja_template(**job)
                (text,), _ = rendered
                if len(text) > _CHARACTERS:
                    raise ValueError(f"it writes {len(text)} characters")
                found = [text, None, asked.date]
            except Exception as error:  # a template may raise anything
                found = ["", _words(error), asked.date]
            out.write(json.dumps(found).encode() + b"\n")
        out.flush()


def _words(error: Exception) -> str:
    """Return the message of a template's error, or the name and message of another one, in one short line."""
    text = " ".join(str(error).split())[:300]
    if type(error).__name__ == "TemplateError" and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # this system has no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _limit_time(seconds: float) -> None:
    """Limit the further CPU time of this process; CPU time, so that a busy machine does not shorten it."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + seconds + 1)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
