"""Public preference sets whose layout is known: where they are, what they weigh, and how a row becomes pairs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Preset:
    """A public set.

    Attributes:
        hub: its name on Hugging Face's hub; None where it is a file elsewhere.
        page: where it is described.
        task: what its pairs are; None where the rows say.
        pairs: about how many.
        licence: as its page gives it; look again before you use one.
        preferred_by: who or what made one answer the better one.
        split: of the hub's set.
        convert: gives the pairs of a row, none where it carries no preference.
    """

    hub: str | None
    page: str
    task: str | None
    pairs: int
    licence: str
    preferred_by: str
    convert: Callable[[dict], Iterator[dict]]
    split: str = "train"


def _renamed(**names: str) -> Callable[[dict], Iterator[dict]]:
    """Rows that need other names alone: ours = theirs."""

    def convert(row: dict) -> Iterator[dict]:
        yield {ours: row[theirs] for ours, theirs in names.items()}

    return convert


def _gsm8k_solutions(row: dict) -> Iterator[dict]:
    """Each right solution with each wrong one; calculator annotations, <<3+4=7>>, are taken out."""
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
    """Dialogues as one string, whose turns begin with an empty line and a speaker."""
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
    """Preference from -3 (the first is much better) to 3 (the second is); 0 is none."""
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
    ),
    "code-preference-pairs": Preset(
        "Vezora/Code-Preference-Pairs",
        _HUB + "Vezora/Code-Preference-Pairs",
        "code",
        53_000,
        "Apache-2.0",
        "bugs put into a right program",
        _renamed(prompt="input", chosen="accepted", rejected="rejected"),
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
        "nvidia/HelpSteer3", _HUB + "nvidia/HelpSteer3", None, 38_000, "CC BY 4.0", "people", _helpsteer3
    ),
}
"""By the name that `load_pairs` takes."""
