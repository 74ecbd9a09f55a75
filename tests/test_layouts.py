"""Public sets' layouts, three rows each: whole with at most the task's name; what would be lost is refused by name."""

import bz2
import gzip
import json
import logging
import lzma

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from dpoviz.data.layouts import Reader, words
from dpoviz.data.records import load_pairs


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def chat(i, answer):
    return [user(f"Question {i}?"), assistant(answer)]


def rows(make):
    """Three rows from (number, better answer, worse answer)."""
    return [make(i, f"Good {i}.", f"Poor {i}.") for i in range(3)]


def swapped(i, good, poor):
    """The two answers in an order that changes from row to row, and whether the first is the better one."""
    return (good, poor, True) if i % 2 == 0 else (poor, good, False)


def labelled(names, label):
    """A row of two answers and a label: names of the answers' columns, and the label's columns for "first is better"."""

    def make(i, good, poor):
        first, second, first_is_better = swapped(i, good, poor)
        return {names[0]: first, names[1]: second, **label(first_is_better)}

    return rows(make)


def with_prompts(made, name="prompt", prompt="Question {}?"):
    return [{name: prompt.format(i), **row} for i, row in enumerate(made)]


ASKED = "user: Question {}?"
SYSTEM = "system: Be brief.\n\nuser: Question {}?"
SHP_TITLE = {"domain": "askphysics_test", "upvote_ratio": 0.9, "seconds_difference": 12.0, "score_ratio": 2.0}
JSON_LISTS = {
    name: [json.dumps([text]) for text in texts]
    for name, texts in {
        "prompt": [f"Question {i}?" for i in range(3)],
        "good": [f"Good {i}." for i in range(3)],
        "poor": [f"Poor {i}." for i in range(3)],
    }.items()
}

# name: (rows, the task given, the prompts expected)
SETS = {
    "Anthropic/hh-rlhf": (
        rows(
            lambda i, good, poor: {
                "chosen": f"\n\nHuman: Question {i}?\n\nAssistant: {good}",
                "rejected": f"\n\nHuman: Question {i}?\n\nAssistant: {poor}",
            }
        ),
        None,
        ASKED,
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        rows(
            lambda i, good, poor: {
                "prompt": f"Question {i}?",
                "prompt_id": f"{i:032x}",
                "chosen": chat(i, good),
                "rejected": chat(i, poor),
                "messages": chat(i, good),
                "score_chosen": 8.5,
                "score_rejected": 5.0,
            }
        ),
        None,
        ASKED,
    ),
    "Intel/orca_dpo_pairs": (
        rows(
            lambda i, good, poor: {
                "system": "Be brief.",
                "question": f"Question {i}?",
                "chosen": good,
                "rejected": poor,
            }
        ),
        "dialogue",
        SYSTEM,
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        rows(
            lambda i, good, poor: {
                "system": "Be brief.",
                "input": f"Question {i}?",
                "chosen": f"The answer is: {good}",
                "rejected": f"The answer is: {poor}",
                "generations": [good, poor],
                "order": ["chosen", "rejected"],
                "labelling_model": "gpt-4-1106-preview",
                "labelling_prompt": [{"role": "system", "content": "You are a judge."}, user("Compare the two.")],
                "raw_labelling_response": "10\n3",
                "rating": [10.0, 3.0],
                "rationale": "The first is better.",
                "status": "unchanged",
                "original_chosen": good,
                "original_rejected": poor,
                "chosen_score": 10.0,
                "in_gsm8k_train": False,
            }
        ),
        "dialogue",
        SYSTEM,
    ),
    "stanfordnlp/SHP": (
        with_prompts(
            [
                {"post_id": "a1", "c_root_id_A": "x", "score_A": 9 if first else 2, "score_B": 2 if first else 9}
                | {**SHP_TITLE, "labels": int(first), "human_ref_A": a, "human_ref_B": b}
                for a, b, first in (swapped(i, f"Good {i}.", f"Poor {i}.") for i in range(3))
            ],
            "history",
        ),
        None,
        ASKED,
    ),
    "nvidia/HelpSteer2 preference": (
        with_prompts(
            [
                row | {"split": "train", "preference_statement": "It is better.", "preference_elaboration": "Clear."}
                for row in labelled(
                    ("response_1", "response_2"), lambda first: {"preference_strength": -2 if first else 1}
                )
            ]
        ),
        None,
        ASKED,
    ),
    "nvidia/HelpSteer3": (
        [
            {"domain": "general", "language": "english", "context": [user(f"Question {i}?")], **row}
            | {"individual_preference": [{"score": -1, "reasoning": "Clear.", "feedback1": "f", "feedback2": "g"}]}
            for i, row in enumerate(
                labelled(("response1", "response2"), lambda first: {"overall_preference": -2 if first else 3})
            )
        ],
        None,
        ASKED,
    ),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": (
        rows(
            lambda i, good, poor: {
                "id": f"t{i}",
                "source": "ultrafeedback",
                "prompt": f"Question {i}?",
                "chosen": chat(i, good),
                "rejected": chat(i, poor),
            }
        ),
        "dialogue",
        ASKED,
    ),
    "mlabonne/orpo-dpo-mix-40k": (
        rows(
            lambda i, good, poor: {
                "source": "toxic-dpo-v0.2",
                "chosen": chat(i, good),
                "rejected": chat(i, poor),
                "prompt": f"Question {i}?",
                "question": None if i else f"Question {i}?",
            }
        ),
        "dialogue",
        ASKED,
    ),
    "argilla/dpo-mix-7k": (
        rows(
            lambda i, good, poor: {
                "dataset": "argilla/distilabel-capybara-dpo-7k-binarized",
                "chosen": chat(i, good),
                "rejected": chat(i, poor),
                "chosen_rating": 5.0,
                "rejected_rating": 4.0,
            }
        ),
        "dialogue",
        ASKED,
    ),
    "dpo-mix-7k-singleturn": (
        rows(
            lambda i, good, poor: {
                "system": "Be brief.",
                "prompt": f"Question {i}?",
                "chosen": good,
                "rejected": poor,
                "chosen_rating": 5.0,
                "rejected_rating": 4.0,
            }
        ),
        "dialogue",
        SYSTEM,
    ),
    "hiyouga/LLaMA-Factory dpo_en_demo": (
        rows(
            lambda i, good, poor: {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": f"Question {i}?"},
                ],
                "chosen": {"from": "gpt", "value": good},
                "rejected": {"from": "gpt", "value": poor},
            }
        ),
        "dialogue",
        SYSTEM,
    ),
    "hiyouga/LLaMA-Factory dpo_zh_demo": (
        rows(
            lambda i, good, poor: {
                "conversations": [{"from": "human", "value": f"第{i}个问题？"}],
                "chosen": {"from": "gpt", "value": good},
                "rejected": {"from": "gpt", "value": poor},
            }
        ),
        "dialogue",
        "user: 第{}个问题？",
    ),
    "LLaMA-Factory's Alpaca ranking": (
        rows(
            lambda i, good, poor: {
                "instruction": "Translate into French.",
                "input": f"Question {i}?",
                "chosen": good,
                "rejected": poor,
            }
        ),
        "dialogue",
        "Translate into French.\nQuestion {}?",
    ),
    "Skywork/Skywork-Reward-Preference-80K-v0.2": (
        rows(lambda i, good, poor: {"chosen": chat(i, good), "rejected": chat(i, poor), "source": "magpie_ultra"}),
        "dialogue",
        ASKED,
    ),
    "jondurbin/py-dpo-v0.1": (
        rows(lambda i, good, poor: {"prompt": f"Question {i}?", "chosen": good, "rejected": poor, "id": f"{i:032x}"}),
        "code",
        "Question {}?",
    ),
    "openai/grade-school-math example_model_solutions": (
        rows(
            lambda i, good, poor: {
                "question": f"Question {i}?",
                "ground_truth": f"#### {i}",
                "6b_finetuning": {"solution": good, "is_correct": True},
                "6b_verification": {"solution": good, "is_correct": True},
                "175b_finetuning": {"solution": good, "is_correct": True},
                "175b_verification": {"solution": poor, "is_correct": False},
            }
        ),
        None,
        "Question {}?",
    ),
    "Vezora/Code-Preference-Pairs": (
        rows(lambda i, good, poor: {"input": f"Question {i}?", "accepted": good, "rejected": poor, "ID": i}),
        None,
        "Question {}?",
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        with_prompts(
            labelled(
                ("response_0", "response_1"),
                lambda first: {
                    "prompt_source": "Alpaca3-70B",
                    "is_response_0_safe": True,
                    "is_response_1_safe": False,
                    "response_0_severity_level": 0,
                    "response_1_severity_level": 2,
                    "better_response_id": int(not first),
                    "safer_response_id": 0,
                    "response_0_sha256": "a0",
                    "response_1_sha256": "b1",
                },
            )
        ),
        None,
        ASKED,
    ),
    "lmsys/chatbot_arena_conversations": (
        [
            {"question_id": f"q{i}", "model_a": "m1", "model_b": "m2", "winner": "model_a" if first else "model_b"}
            | {"judge": "arena_user_1", "conversation_a": chat(i, a), "conversation_b": chat(i, b), "turn": 1}
            | {"anony": True, "language": "English", "tstamp": 1.5, "toxic_chat_tag": {"roberta": {"flagged": False}}}
            for i, (a, b, first) in enumerate(swapped(i, f"Good {i}.", f"Poor {i}.") for i in range(3))
        ],
        None,
        ASKED,
    ),
    "lmarena-ai/arena-human-preference-55k": (
        [
            {"id": i, "model_a": "m1", "model_b": "m2", "prompt": JSON_LISTS["prompt"][i]}
            | {"response_a": JSON_LISTS["good" if first else "poor"][i]}
            | {"response_b": JSON_LISTS["poor" if first else "good"][i]}
            | {"winner_model_a": int(first), "winner_model_b": int(not first), "winner_tie": 0}
            for i, first in enumerate((True, False, True))
        ],
        None,
        ASKED,
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        rows(
            lambda i, good, poor: {
                "source": "Airoboros",
                "conversation": [{"input": f"Question {i}?", "output": good}],
                "original_response": good,
                "generation_prompt": ["<|im_start|>system\n<|im_end|>"],
                "raw_generation_responses": [poor],
                "new_generations": [poor],
                "prompt": f"Question {i}?",
                "chosen": chat(i, good),
                "rejected": chat(i, poor),
                "rating_chosen": 5,
                "rating_rejected": 4,
                "chosen_model": "original",
                "rejected_model": "OpenHermes",
                "turns": 1,
            }
        ),
        "dialogue",
        ASKED,
    ),
    "lvwerra/stack-exchange-paired": (
        with_prompts(
            rows(
                lambda i, good, poor: {
                    "qid": i,
                    "date": "2011/01/10",
                    "metadata": ["https://askubuntu.com"],
                    "response_j": good,
                    "response_k": poor,
                }
            ),
            "question",
        ),
        "dialogue",
        ASKED,
    ),
    "jondurbin/truthy-dpo-v0.1": (
        rows(
            lambda i, good, poor: {
                "id": f"{i:032x}",
                "source": "truthy_dpo",
                "system": "Be brief.",
                "prompt": f"Question {i}?",
                "chosen": good,
                "rejected": poor,
            }
        ),
        "dialogue",
        SYSTEM,
    ),
}


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "Dataset"])
@pytest.mark.parametrize("name", SETS)
def test_a_public_sets_rows_are_what_its_card_says(tmp_path, name, kind):
    records, task, prompt = SETS[name]
    if kind == "jsonl.gz":
        source = tmp_path / "rows.jsonl.gz"
        source.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in records).encode()))
    else:
        source = Dataset.from_list(records)
        if kind == "parquet":
            source.to_parquet(tmp_path / "rows.parquet")
            source = tmp_path / "rows.parquet"
    pairs = load_pairs(source, task=task)
    repeats = len(pairs) // 3  # GSM8K has each right solution with each wrong one
    assert pairs["prompt"][::repeats] == [prompt.format(i) for i in range(3)]
    answers = [(row["chosen"].removeprefix("The answer is: "), row["rejected"].removeprefix("The answer is: "))
               for row in pairs]  # fmt: skip
    assert answers == [(f"Good {i}.", f"Poor {i}.") for i in range(3) for _ in range(repeats)]


def test_there_are_24():
    assert len(SETS) == 24
