"""What `test_killed.py` runs: forks of a process that has imported everything once; killed, or side by side.

Arguments: a folder, a function below, and how many times. Prints a line of JSON.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from datasets import Dataset
from helpers.worlds import SMALL, TINY_WORLD, adapted, weights

from dpoviz.beta import BetaNetwork
from dpoviz.data import tasks
from dpoviz.experiments.small import small_world
from dpoviz.lm.cache import lock_folder
from dpoviz.lm.models import tiny_lm, tiny_tokenizer
from dpoviz.lm.processes import Terminated, end_on_sigterm
from dpoviz.lm.reference import reference_pass
from dpoviz.training.config import TrainConfig
from dpoviz.training.loop import train

PROBLEMS = [problem for task in tasks.TASKS for problem in tasks.sample_problems(task, 8, 0)]
TOKENIZER = tiny_tokenizer([problem.prompt for problem in PROBLEMS], 300)
MODEL = tiny_lm(TOKENIZER, hidden_size=16, layers=2, heads=2, max_length=96).eval()
ANSWERS = ("yes", "no, 12", "perhaps 7 or so")
PAIRS = [
    {"prompt": problem.prompt, "chosen": ANSWERS[i % 3], "rejected": ANSWERS[(i + 1) % 3], "task": problem.task,
     "group": problem.prompt} for i, problem in enumerate(PROBLEMS)
]  # fmt: skip
CONFIG = TrainConfig.around(0.1, "inverse", **{**SMALL, "stage2_steps": 12, "checkpoint_every": 1})


def scored(place, rows=PAIRS):
    return reference_pass(
        MODEL, TOKENIZER, Dataset.from_list(rows), max_length=90, max_new_tokens=6, entropy_samples=4, batch_size=4,
        cache_dir=place / "cache", progress=False,
    )  # fmt: skip


def work(place):
    """A pass of the reference, then stage 2 of a policy with dropout; leaves all numbers in result.json."""
    pairs = scored(place)
    torch.manual_seed(0)
    policy, beta = adapted(MODEL), BetaNetwork(16, beta0=10.0, hidden=(8,))
    ids = {"pad_id": TOKENIZER.pad_token_id, "eos_id": TOKENIZER.eos_token_id}
    history = train(policy, beta, pairs, CONFIG, stage=2, out=place / "run", progress=False, **ids).history
    found = {"pairs": pairs.to_dict(), "history": history.to_dict("list"), "weights": weights(policy, beta).tolist()}
    (place / "result.json").write_text(json.dumps(found))


def reference(place):
    (place / f"{os.getpid()}.json").write_text(json.dumps(scored(place).to_dict()))


def world(place):
    found = small_world(TINY_WORLD, cache_dir=place / "cache", progress=False)
    numbers = {"train": found.train.to_dict(), "held_out": found.held_out.to_dict(), "rewards": dict(found.rewards)}
    (place / f"{os.getpid()}.json").write_text(json.dumps(numbers))


def fork(function, place):
    """The id of a process that does it, and ends with 0; with 143 where SIGTERM ended it."""
    place.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(place)
            status = 0
        except Terminated:
            status = 143
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return child


def status(child, seconds=None, number=signal.SIGKILL):
    """Its exit status, at most some seconds from now: then it is sent a signal, and negative where that killed it."""
    end = None if seconds is None else time.monotonic() + seconds
    while end is None or time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.002)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def once(place):
    """The numbers of a run that nothing happened to, and how many seconds it takes."""
    start = time.monotonic()
    assert status(fork(work, place / "whole")) == 0
    return (place / "whole" / "result.json").read_bytes(), time.monotonic() - start


def killed(place, times, between=lambda place: None, number=signal.SIGKILL, function=work):
    """Each run killed up to three times at random moments, then left to its end."""
    whole, seconds = once(place)
    draw, codes, equal = random.Random(), [], 0
    for run in range(times):
        folder = place / str(run)
        for _ in range(3):
            codes.append(status(fork(function, folder), draw.uniform(0, seconds), number))
            between(folder)
        codes.append(status(fork(function, folder)))
        equal += (folder / "result.json").read_bytes() == whole
    left = [str(path) for path in place.rglob("*") if path.name == "damaged" or path.suffix == ".damaged"]
    return {"equal": equal, "codes": codes, "left": left}


def overlap(place, times):
    """Also with another run over some of the prompts in between, in the same cache."""
    return killed(place, times, between=lambda folder: scored(folder, PAIRS[5:14]))


def terminated(place, times):
    def function(folder):
        end_on_sigterm()
        work(folder)

    found = killed(place, times, number=signal.SIGTERM, function=function)
    return {**found, "scratch": [str(path) for path in place.rglob(".*") if path.is_dir()]}


def together(function, place, processes, times):
    """Several processes at once on one cold cache: how many ended well, and with the numbers of one alone."""
    assert status(fork(function, place / "alone")) == 0
    (file,) = (place / "alone").glob("*.json")
    well, equal = 0, 0
    for run in range(times):
        folder = place / str(run)
        well += sum(status(child) == 0 for child in [fork(function, folder) for _ in range(processes)])
        equal += sum(path.read_bytes() == file.read_bytes() for path in folder.glob("*.json"))
    return {"well": well, "equal": equal}


def worlds(place, times):
    return together(world, place, 2, times)


def references(place, times):
    return together(reference, place, 4, times)


def locked(place, times):
    """A folder that a killed process held is free at once."""
    told = []

    def hold(folder):
        with lock_folder(folder / "run"):
            (folder / "held").write_text("")
            time.sleep(600)

    for run in range(times):
        folder = place / str(run)
        child = fork(hold, folder)
        while not (folder / "held").exists():
            time.sleep(0.01)
        try:
            with lock_folder(folder / "run"):
                told.append("not refused")
        except OSError as error:
            told.append(str(error).replace(f"process {child} ", "its process "))
        status(child, 0)
        with lock_folder(folder / "run"):
            pass
    return {"told": told}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[2]](Path(sys.argv[1]), int(sys.argv[3]))))
