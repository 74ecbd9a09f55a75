"""Chats written out by a tokenizer's chat template, in a process of its own.

A template is a program that comes with a model's files. It can loop without end, or ask for more memory than there is,
in places where no exception of Python reaches it; a process can be limited from outside. The same process writes one
date on all days, so that a run can be repeated.
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
"""What a template that asks for today's date is told: the one that Llama 3.1's falls back to where it has no clock."""

_SECONDS = 5.0  # of processor time, and for each chat a little more: one takes a tenth of a millisecond
_SECONDS_PER_CHAT = 0.01
_MEMORY = 2 << 30  # bytes of address space
_CHARACTERS = 10**8  # of one chat


class Chat(NamedTuple):
    """A chat to be written out.

    Attributes:
        messages: dicts with a role, a content and what else the template reads.
        tools: descriptions of the functions that may be called.
        prompt: whether the place where an answer begins is opened (`add_generation_prompt`).
        options: other variables of the template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: list[dict[str, Any]] | None = None
    prompt: bool = False
    options: Mapping[str, Any] | None = None


class Rendered(NamedTuple):
    """What became of a chat.

    Attributes:
        text: the chat as the template writes it; empty where it was refused.
        refusal: the template's own words where it refuses the chat.
        dated: whether it asked for the date.
    """

    text: str
    refusal: str | None
    dated: bool


def render(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> list[Rendered]:
    """Return each chat as the tokenizer's `apply_chat_template` writes it, on the day `DATE`.

    Raises:
        ValueError: the template takes too long, or too much memory.
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
    """Say whether a class of tokenizers writes chats by code of its own."""
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
    except Exception as error:  # whatever the class raises where it refuses a chat
        return Rendered("", _words(error), False)
    return Rendered(text, None, False)


class _Process:
    """The process that renders: started when first asked, ended with this one, or by its limits."""

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
            except (BrokenPipeError, json.JSONDecodeError):  # it ended, in the middle of a line or before
                raise ValueError(f"tokenizer: its chat template {self._end()}; give another one") from None
            except BaseException:  # Ctrl-C: what it still writes must not be taken for the next answer
                running.kill()
                self._end()
                raise

    def _started(self) -> subprocess.Popen[bytes]:
        # a fork of this process has its pipes, which are not its own
        if self.running is None or self.owner != os.getpid():
            program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
            self.running = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for this process; the other ends when its input does
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            self.owner = os.getpid()
            atexit.register(self._stop, self.running, self.owner)
        return self.running

    def _end(self) -> str:
        """End the process and return why it had ended, if it had."""
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
    """Render the chats that standard input brings, until it ends: what the process of `render` does."""
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
            except Exception as error:  # whatever a program may raise
                found = ["", _words(error), asked.date]
            out.write(json.dumps(found).encode() + b"\n")
        out.flush()


def _words(error: Exception) -> str:
    """Return the template's own words, or Python's behind the name of the error, in one short line."""
    text = " ".join(str(error).split())[:300]
    if type(error).__name__ == "TemplateError" and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # a system without such a limit
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _limit_time(seconds: float) -> None:
    """Let the kernel end this process after so much more processor time: on a busy machine it waits longer."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + seconds + 1)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
