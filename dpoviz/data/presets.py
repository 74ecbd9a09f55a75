"""Public preference data sets of known layout: their source, size and licence, and how a row becomes pairs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Preset:
    """A public preference data set.

    Attributes:
        hub: its name on the Hugging Face Hub; None if it is not loaded from there.
        page: URL of its description.
        task: task of all pairs; None if the rows name it.
        pairs: approximate number of pairs.
        licence: as stated on its page; check again before use.
        preferred_by: the source of the preferences.
        convert: yields the pairs of a row; none if the row has no preference.
        split: split on the hub.
        columns: a combination of columns that identifies its files; empty if there is none.
    """

    hub: str | None
    page: str
    task: str | None
    pairs: int
    licence: str
    preferred_by: str
    convert: Callable[[dict], Iterator[dict]]
    split: str = "train"
    columns: tuple[str, ...] = ()


def recognised(row: Mapping[str, object]) -> str | None:
    """Return the name of the data set that a row's columns identify; None if they identify none."""
    chosen = row.get("chosen")
    if (
        set(row) - {"task", "group"} == {"chosen", "rejected"}
        and isinstance(chosen, str)
        and _TURN.match("\n\n" + chosen.lstrip("\n"))
    ):
        return "hh-rlhf"
    return next((name for name, own in PRESETS.items() if own.columns and set(own.columns) <= set(row)), None)


def _renamed(**names: str) -> Callable[[dict], Iterator[dict]]:
    """Return a converter that only renames columns: new name = old name."""

    def convert(row: dict) -> Iterator[dict]:
        yield {ours: row[theirs] for ours, theirs in names.items()}

    return convert


def _gsm8k_solutions(row: dict) -> Iterator[dict]:
    """Yield every correct solution with every wrong one, without calculator annotations such as <<3+4=7>>."""
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    solutions = [row[name] for name in models]
    texts = {right: [s["solution"] for s in solutions if s["is_correct"] == right] for right in (True, False)}
    for chosen, rejected in product(texts[True], texts[False]):
        answers = {"chosen": _plain(chosen), "rejected": _plain(rejected)}
        yield {"prompt": row["question"], "group": row["question"], **answers}


def _plain(solution: str) -> str:
    return re.sub(r"<<[^<>]*>>", "", solution)


def _orca(row: dict) -> Iterator[dict]:
    system = [{"role": "system", "content": row["system"]}] if (row["system"] or "").strip() else []
    messages = [*system, {"role": "user", "content": row["question"]}]
    yield {"prompt": messages, "chosen": row["chosen"], "rejected": row["rejected"]}


_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _hh(row: dict) -> Iterator[dict]:
    """Yield the pair of two dialogues, each one string whose turns begin with an empty line and a speaker."""
    yield {name: _turns(row[name]) for name in ("chosen", "rejected")}


def _turns(dialogue: str) -> list[dict]:
    before, *parts = _TURN.split("\n\n" + dialogue.lstrip("\n"))
    if before.strip() or not parts:
        raise ValueError("expected turns that begin with an empty line and 'Human:' or 'Assistant:'")
    return [
        {"role": _ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


_DOMAINS = {"general": "dialogue", "stem": "math", "code": "code", "multilingual": "dialogue"}


def _helpsteer3(row: dict) -> Iterator[dict]:
    """Yield the pair of a row; the preference runs from -3 (first much better) to 3 (second), and 0 yields none."""
    preference = row["overall_preference"]
    if preference == 0:
        return
    first, second = row["response1"], row["response2"]
    chosen, rejected = (first, second) if preference < 0 else (second, first)
    task = _DOMAINS.get(row["domain"].lower(), row["domain"])
    yield {"prompt": row["context"], "chosen": chosen, "rejected": rejected, "task": task}


def _ultrafeedback(row: dict) -> Iterator[dict]:
    if row.get("score_chosen") is None or row["score_chosen"] != row["score_rejected"]:
        yield {"chosen": row["chosen"], "rejected": row["rejected"]}


def _user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _ordered(prompt: object, first: object, second: object, better: int) -> Iterator[dict]:
    """Yield the pair of two answers, given the better one, 1 or 2; none if `better` is 0."""
    if better:
        chosen, rejected = (first, second) if better == 1 else (second, first)
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _helpsteer2(row: dict) -> Iterator[dict]:
    """Yield the pair of a row, as `_helpsteer3`; turns are marked in the text."""
    first, *parts = _HELPSTEER_TURN.split(row["prompt"])
    said = zip(parts[::2], parts[1::2], strict=True)
    chat = [*_user(first), *({"role": speaker.lower(), "content": text} for speaker, text in said)]
    strength = row["preference_strength"]
    yield from _ordered(chat, row["response_1"], row["response_2"], (strength < 0) + 2 * (strength > 0))


def _shp(row: dict) -> Iterator[dict]:
    """Yield the pair of a row; label 1 prefers A, 0 prefers B, and the scores, readers' votes, must agree."""
    better = {1: 1, 0: 2}[int(row["labels"])]
    if (int(row["score_A"]) > int(row["score_B"])) != (better == 1):
        raise ValueError(f"labels: got {row['labels']}, against the scores {row['score_A']} and {row['score_B']}")
    yield from _ordered(_user(row["history"]), row["human_ref_A"], row["human_ref_B"], better)


def _pku(row: dict) -> Iterator[dict]:
    """Yield the pair ordered by helpfulness; the safety label is not used."""
    better = int(row["better_response_id"]) + 1
    yield from _ordered(_user(row["prompt"]), row["response_0"], row["response_1"], better)


def _arena(row: dict) -> Iterator[dict]:
    """Yield two whole conversations, ordered by the winner's name."""
    better = {"model_a": 1, "model_b": 2}.get(row["winner"], 0)
    for pair in _ordered(None, row["conversation_a"], row["conversation_b"], better):
        yield {name: pair[name] for name in ("chosen", "rejected")}


def _arena_55k(row: dict) -> Iterator[dict]:
    """Yield two whole conversations; turns are JSON lists of texts, and each outcome has a column."""
    asked, first, second = (json.loads(row[name]) for name in ("prompt", "response_a", "response_b"))
    better = 1 if int(row["winner_model_a"]) else 2 if int(row["winner_model_b"]) else 0
    for pair in _ordered(None, _dialogue(asked, first), _dialogue(asked, second), better):
        yield {name: pair[name] for name in ("chosen", "rejected")}


def _dialogue(asked: list[str], answered: list[str]) -> list[dict]:
    return [
        {"role": role, "content": text}
        for turn in zip(asked, answered, strict=True)
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _stack_exchange(row: dict) -> Iterator[dict]:
    """Yield the pair of a row; answer j has more votes than answer k."""
    yield from _ordered(_user(row["question"]), row["response_j"], row["response_k"], 1)


_HUB = "https://huggingface.co/datasets/"

PRESETS = {
    "gsm8k-solutions": Preset(
        None,
        "https://github.com/openai/grade-school-math",
        "math",
        2_429,
        "MIT",
        "the final number",
        _gsm8k_solutions,
        columns=("question", "ground_truth", "6b_finetuning", "175b_verification"),
    ),
    "code-preference-pairs": Preset(
        "Vezora/Code-Preference-Pairs",
        _HUB + "Vezora/Code-Preference-Pairs",
        "code",
        53_000,
        "Apache-2.0",
        "bugs put into a right program",
        _renamed(prompt="input", chosen="accepted", rejected="rejected"),
        columns=("input", "accepted", "rejected", "ID"),
    ),
    "py-dpo": Preset(
        "jondurbin/py-dpo-v0.1",
        _HUB + "jondurbin/py-dpo-v0.1",
        "code",
        9_500,
        "CC BY 4.0",
        "a stronger model's answer over a weaker one's",
        _renamed(prompt="prompt", chosen="chosen", rejected="rejected"),
    ),
    "ultrafeedback": Preset(
        "HuggingFaceH4/ultrafeedback_binarized",
        _HUB + "HuggingFaceH4/ultrafeedback_binarized",
        "dialogue",
        61_000,
        "MIT",
        "GPT-4",
        _ultrafeedback,
        split="train_prefs",
        columns=("prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"),
    ),
    "hh-rlhf": Preset("Anthropic/hh-rlhf", _HUB + "Anthropic/hh-rlhf", "dialogue", 161_000, "MIT", "people", _hh),
    "orca": Preset(
        "Intel/orca_dpo_pairs",
        _HUB + "Intel/orca_dpo_pairs",
        "dialogue",
        12_900,
        "Apache-2.0",
        "a stronger model's answer over a weaker one's",
        _orca,
    ),
    "helpsteer3": Preset(
        "nvidia/HelpSteer3",
        _HUB + "nvidia/HelpSteer3",
        None,
        38_000,
        "CC BY 4.0",
        "people",
        _helpsteer3,
        columns=("domain", "context", "response1", "response2", "overall_preference"),
    ),
    "helpsteer2": Preset(
        None,
        _HUB + "nvidia/HelpSteer2/tree/main/preference",
        "dialogue",
        7_100,
        "CC BY 4.0",
        "people",
        _helpsteer2,
        columns=("prompt", "response_1", "response_2", "preference_strength"),
    ),
    "shp": Preset(
        "stanfordnlp/SHP",
        _HUB + "stanfordnlp/SHP",
        "dialogue",
        349_000,
        "see its page",
        "votes of readers",
        _shp,
        columns=("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"),
    ),
    "pku-saferlhf": Preset(
        "PKU-Alignment/PKU-SafeRLHF",
        _HUB + "PKU-Alignment/PKU-SafeRLHF",
        "dialogue",
        74_000,
        "CC BY-NC 4.0",
        "people, by helpfulness",
        _pku,
        columns=("prompt", "response_0", "response_1", "better_response_id", "safer_response_id"),
    ),
    "chatbot-arena": Preset(
        "lmsys/chatbot_arena_conversations",
        _HUB + "lmsys/chatbot_arena_conversations",
        "dialogue",
        33_000,
        "see its page",
        "people",
        _arena,
        columns=("model_a", "model_b", "winner", "conversation_a", "conversation_b"),
    ),
    "arena-55k": Preset(
        "lmarena-ai/arena-human-preference-55k",
        _HUB + "lmarena-ai/arena-human-preference-55k",
        "dialogue",
        55_000,
        "Apache-2.0",
        "people",
        _arena_55k,
        columns=("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
    ),
    "stack-exchange-paired": Preset(
        "lvwerra/stack-exchange-paired",
        _HUB + "lvwerra/stack-exchange-paired",
        None,
        31_000_000,
        "CC BY-SA",
        "votes of readers",
        _stack_exchange,
        columns=("question", "response_j", "response_k"),
    ),
}
"""Presets by the name that `load_pairs` takes."""
