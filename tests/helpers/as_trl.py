"""Pairs tokenised by us, and by TRL's own preparation of a data set."""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from dpoviz.data.records import load_pairs
from dpoviz.data.tokens import IDS, tokenize_pairs


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


ANSWERS = [
    ("Paris.", "Rome."),
    (" Paris and Rome", "\n\nParis"),
    ("Paris.\n", "42 "),
    ("42", "4"),
    ("<think>\nhm\n</think>\n\nParis", "Rome"),
    ("巴黎 🙂", "P"),
]
QUESTIONS = [
    [user("What is the capital of France?")],
    [user("one"), assistant("two"), user("three\n")],
    [user(" 12 + 30?")],
]


def by_trl(tokenizer, rows):
    """The ids that TRL's own preparation of a data set gives."""
    trainer = pytest.importorskip("trl").DPOTrainer
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    found = trainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(rows), tokenizer, settings, "train"
    )
    return [[found[name][i] for name in IDS] for i in range(len(rows))]


def by_us(tokenizer, rows):
    kept = [name for name in ("tools", "chat_template_kwargs") if name in rows[0]]
    pairs = load_pairs(Dataset.from_list([{k: v for k, v in row.items() if k not in kept} for row in rows]), task="t")
    for name in kept:
        pairs = pairs.add_column(name, [row[name] for row in rows])
    found = tokenize_pairs(pairs, tokenizer, 1000)
    return [[found[name][i] for name in IDS] for i in range(len(rows))]
