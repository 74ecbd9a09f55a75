"""Each public set's own layout, in small files: what becomes of a row."""

import json
import logging

import pytest

from dpoviz.data.presets import PRESETS
from dpoviz.data.records import load_pairs


@pytest.fixture
def write(tmp_path):
    def to_file(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return to_file


def solution(text, right):
    return {"solution": text, "is_correct": right}


def test_gsm8k_solutions_right_with_wrong(write):
    row = {
        "question": "How many?",
        "ground_truth": "3+4 = <<3+4=7>>7\n#### 7",
        "6b_finetuning": solution("3+4 = <<3+4=7>>7\nA: 7", True),
        "6b_verification": solution("3+4 = 8\nA: 8", False),
        "175b_finetuning": solution("A: 9", False),
        "175b_verification": solution("It is 7.\nA: 7", True),
    }
    all_right = {**row, **{name: solution("A: 7", True) for name in row if name.startswith(("6b", "175b"))}}
    pairs = load_pairs(write(row, all_right), preset="gsm8k-solutions")
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [
        ("3+4 = 7\nA: 7", "3+4 = 8\nA: 8"),
        ("3+4 = 7\nA: 7", "A: 9"),
        ("It is 7.\nA: 7", "3+4 = 8\nA: 8"),
        ("It is 7.\nA: 7", "A: 9"),
    ]
    assert set(pairs["task"]) == {"math"} and set(pairs["group"]) == {"How many?"} and set(pairs["line"]) == {1}


def test_code_preference_pairs(write):
    row = {"input": "Write f.", "accepted": "def f(): return 1", "rejected": "def f(): return", "ID": 7}
    (pair,) = load_pairs(write(row), preset="code-preference-pairs")
    assert (pair["prompt"], pair["chosen"], pair["rejected"], pair["task"]) == (
        "Write f.", "def f(): return 1", "def f(): return", "code"
    )  # fmt: skip


def test_a_reward_margin_is_that_of_one_pair(write):
    """It is kept beside a layout; of a row that becomes several pairs nobody knows whose it is."""
    row = {"prompt": "Write f.", "chosen": "a", "rejected": "b", "id": "x", "reward_margin": 0.5}
    (pair,) = load_pairs(write(row), preset="py-dpo")
    assert pair["reward_margin"] == 0.5
    solutions = [{"solution": f"so it is {n}\nA: {n}", "is_correct": n < 2} for n in range(4)]
    names = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    row = {
        "question": "How many?",
        "ground_truth": "1",
        **dict(zip(names, solutions, strict=True)),
        "reward_margin": 0.5,
    }
    several = load_pairs(write(row), preset="gsm8k-solutions")
    assert len(several) == 4 and "reward_margin" not in several.column_names


def test_py_dpo(write):
    (pair,) = load_pairs(write({"prompt": "Write f.", "chosen": "a", "rejected": "b", "id": "x"}), preset="py-dpo")
    assert (pair["prompt"], pair["chosen"], pair["rejected"], pair["task"]) == ("Write f.", "a", "b", "code")


def chat(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def test_ultrafeedback_without_ties(write, caplog):
    rows = [
        {"prompt": "Hi", "prompt_id": str(i), "chosen": chat("Hi", "good"), "rejected": chat("Hi", "bad"),
         "messages": chat("Hi", "good"), "score_chosen": 8.0, "score_rejected": score}
        for i, score in enumerate([8.0, 5.0])
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        (pair,) = load_pairs(write(*rows), preset="ultrafeedback")
    assert pair["messages"] == chat("Hi", "good")[:1] and (pair["chosen"], pair["rejected"]) == ("good", "bad")
    assert pair["line"] == 2 and "1 pairs are left out, such as" in caplog.text and "line 1: no pref" in caplog.text
    assert not [record for record in caplog.records if "/" in record.getMessage()]  # no path of the machine


def test_hh_rlhf_turns(write):
    shared = "\n\nHuman: Hi there\n\nwith a gap\n\nAssistant: Hello!\n\nHuman: A joke?"
    row = {"chosen": shared + "\n\nAssistant: Knock.", "rejected": shared + "\n\nAssistant: No."}
    (pair,) = load_pairs(write(row), preset="hh-rlhf")
    assert pair["messages"] == [
        {"role": "user", "content": "Hi there\n\nwith a gap"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "A joke?"},
    ]
    assert (pair["chosen"], pair["rejected"], pair["task"]) == ("Knock.", "No.", "dialogue")


def test_hh_rlhf_dialogues_that_part_early_are_left_out(write, caplog):
    good = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    early = {"chosen": good["chosen"] + "\n\nHuman: x\n\nAssistant: y", "rejected": good["rejected"]}
    with caplog.at_level(logging.WARNING):
        assert len(load_pairs(write(early, good), preset="hh-rlhf")) == 1
    assert "line 1: field 'chosen'" in caplog.text


def test_orca_with_and_without_a_system_line(write):
    row = {"system": "Be brief.", "question": "Why?", "chosen": "a", "rejected": "b"}
    pairs = load_pairs(write(row, {**row, "system": ""}), preset="orca")
    assert [[m["role"] for m in chat] for chat in pairs["messages"]] == [["system", "user"], ["user"]]


def test_helpsteer3_sign_of_the_preference_and_domain(write):
    context = [{"role": "user", "content": "Q"}]
    rows = [
        {"domain": domain, "language": "english", "context": context, "response1": "one", "response2": "two",
         "overall_preference": preference}
        for domain, preference in [("general", -3), ("code", 2), ("stem", 0), ("stem", 1)]
    ]  # fmt: skip
    pairs = load_pairs(write(*rows), preset="helpsteer3")
    assert [(p["task"], p["chosen"]) for p in pairs] == [("dialogue", "one"), ("code", "two"), ("math", "two")]


def test_helpsteer2_turns_and_sign(write):
    rows = [
        {"prompt": "A?\n<extra_id_1>Assistant\nB.\n<extra_id_1>User\nC?", "response_1": "one", "response_2": "two",
         "preference_strength": strength}
        for strength in (-3, 0, 1)
    ]  # fmt: skip
    pairs = load_pairs(write(*rows))
    assert pairs["messages"][0] == [*chat("A?", "B."), {"role": "user", "content": "C?"}]
    assert pairs["chosen"][:] == ["one", "two"] and pairs["line"][:] == [1, 3]


def test_shp_label_1_prefers_a(write, caplog):
    row = {"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 9, "score_B": 2}
    pairs = load_pairs(write(row, {**row, "labels": 0, "score_A": 1}))
    assert pairs["chosen"][:] == ["a", "b"] and "read as the public set shp" in caplog.text
    with pytest.raises(ValueError, match=r"line 1: not in the layout of shp .*against the scores"):
        load_pairs(write({**row, "labels": 0}))


def test_arena_winners_and_ties(write):
    row = {"model_a": "m", "model_b": "n", "conversation_a": chat("Q", "a"), "conversation_b": chat("Q", "b")}
    pairs = load_pairs(write(*({**row, "winner": winner} for winner in ("model_b", "tie", "tie (bothbad)", "model_a"))))
    assert pairs["chosen"][:] == ["b", "a"] and pairs["line"][:] == [1, 4]
    row = {"prompt": '["Q", "R"]', "response_a": '["x", "a"]', "response_b": '["x", "b"]'}
    outcomes = [dict(zip(("winner_model_a", "winner_model_b", "winner_tie"), own, strict=True))
                for own in ((0, 1, 0), (0, 0, 1), (1, 0, 0))]  # fmt: skip
    pairs = load_pairs(write(*({**row, **own} for own in outcomes)))
    assert pairs["chosen"][:] == ["b", "a"] and [len(own) for own in pairs["messages"]] == [3, 3]


def test_a_set_is_recognised_only_where_no_column_would_be_lost(write, caplog):
    row = {"prompt": "Hi", "prompt_id": "1", "chosen": chat("Hi", "good"), "rejected": chat("Hi", "bad"),
           "messages": chat("Hi", "good"), "score_chosen": 8.0, "score_rejected": 5.0}  # fmt: skip
    assert load_pairs(write(row))["task"][:] == ["dialogue"] and "public set ultrafeedback" in caplog.text
    (pair,) = load_pairs(write({**row, "system": "Be kind."}), task="dialogue")
    assert pair["messages"][0] == {"role": "system", "content": "Be kind."}
    assert load_pairs(write({**row, "task": "math"}))["task"][:] == ["math"]
    assert load_pairs(write(row), task="code")["task"][:] == ["code"]


@pytest.mark.parametrize("preset", PRESETS)
def test_another_layout_is_refused_by_name(write, preset):
    with pytest.raises(ValueError, match=rf"line 1: not in the layout of {preset} \("):
        load_pairs(write({"something": "else"}), preset=preset)


def test_a_preset_that_is_on_no_hub_says_where_it_is():
    with pytest.raises(ValueError, match=r"gsm8k-solutions is on no hub; get its file from https://github.com/openai"):
        load_pairs("gsm8k-solutions")
