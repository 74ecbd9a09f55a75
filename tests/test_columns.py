"""Public sets' layouts, three rows each: whole with at most the task's name; what would be lost is refused by name."""

import gzip
import json

import pytest
from datasets import Dataset

from dpoviz.data import records
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
    """Three rows of two answers and a label: the answers' columns, and the label's for whether the first is better."""

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


PAIR = {"chosen": "It is Paris.", "rejected": "It is Rome.", "task": "t"}
ROW = {"prompt": "Capital of France?", **PAIR}
TWO = {"prompt": "Capital of France?", "task": "t"}
FUNCTION = {"name": "weather", "arguments": {"city": "Paris"}}


def load(*records, **options):
    return load_pairs(Dataset.from_list(list(records)), **options)


class TestPrompt:
    @pytest.mark.parametrize("name", ["question", "query", "input", "instruction", "problem", "userInput", "passage"])
    def test_a_text_under_another_name_is_asked_for_and_never_replaced(self, name):
        record = {name: "Name the capital of France.", **PAIR}
        with pytest.raises(ValueError, match=rf"column '{name}': .*--columns {name}=prompt"):
            load(record)
        assert load(record, columns={name: "prompt"})["prompt"][:] == ["Name the capital of France."]

    def test_any_longer_text_may_be_the_prompt_where_there_is_none(self):
        with pytest.raises(ValueError, match=r"column 'ask': may hold the prompt.*--columns ask=prompt"):
            load({"ask": "Name the capital.", **PAIR})
        assert load({"origin": "a forum", **PAIR})["prompt"][:] == ["It is"]  # two words are no prompt

    def test_several_parts_are_refused(self):
        with pytest.raises(ValueError, match="columns 'question', 'context': look like parts of the prompt"):
            load({"question": "Which city?", "context": "France is a country.", **PAIR})

    @pytest.mark.parametrize(
        ("chosen", "rejected", "prompt"),
        [
            ("It costs 3.50 now", "It costs 3.75 now", "It costs"),
            ("He don't", "He donates", "He"),
            ("x = f.append(1)", "x = f.apply(1)", "x ="),
            ("天空是蓝色", "天空是绿色", "天空是"),
            ("Q: blue\nA: yes", "Q: blue\nA: no", "Q: blue\nA:"),
            ("नमस्ते नमकीन", "नमस्ते नमकपारे", "नमस्ते"),
        ],
    )
    def test_what_answers_share_ends_with_a_word(self, chosen, rejected, prompt):
        (pair,) = load({"chosen": chosen, "rejected": rejected}, task="t")
        assert pair["prompt"] == prompt and prompt + pair["chosen"] == chosen and prompt + pair["rejected"] == rejected

    def test_one_answer_that_begins_the_other(self):
        with pytest.raises(ValueError, match="one answer begins with the whole other"):
            load({"chosen": "Sky? blue", "rejected": "Sky? blue and vast"}, task="t")
        with pytest.raises(ValueError, match="one answer begins with the whole other"):
            load({"chosen": chat(0, "a"), "rejected": [*chat(0, "a"), user("b"), assistant("c")]}, task="t")

    @pytest.mark.parametrize(
        "answer", [lambda text: [assistant(text)], assistant, lambda text: json.dumps([assistant(text)])]
    )
    def test_answers_that_are_messages_make_a_text_a_users_message(self, answer):
        (pair,) = load(ROW | {"chosen": answer("Paris."), "rejected": answer("Rome.")})
        assert pair["messages"] == [user("Capital of France?")] and (pair["chosen"], pair["rejected"]) == (
            "Paris.",
            "Rome.",
        )

    def test_a_chat_in_json(self):
        (pair,) = load(ROW | {"prompt": json.dumps([user("Hi")])})
        assert pair["messages"] == [user("Hi")]
        with pytest.raises(ValueError, match="field 'prompt': begins like a chat in JSON and is none"):
            load(ROW | {"prompt": str([user("Hi")])})

    @pytest.mark.parametrize(("prompt", "begin"), [("What is the capital? ", ""), ([user("What is the capital?")], "")])
    def test_answers_that_repeat_the_prompt_are_cut(self, prompt, begin, caplog):
        answers = {name: f"What is the capital? {city}" for name, city in (("chosen", "Paris"), ("rejected", "Rome"))}
        (pair,) = load({"prompt": prompt, **answers}, task="t")
        assert (pair["chosen"], pair["rejected"]) == ("Paris", "Rome")
        assert "1 of 1 pairs have answers that both repeat the prompt" in caplog.text
        (pair,) = load({"prompt": prompt, **answers, "rejected": "Rome"}, task="t")
        assert pair["chosen"] == answers["chosen"] and "one answer that begins with the prompt" in caplog.text
        (pair,) = load({"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"}, task="t")
        assert pair["chosen"] == "Hi there"  # a greeting is no repeated prompt

    def test_a_saved_record_of_ours_is_the_same_again(self):
        first = load(ROW | {"prompt": [user("Hi")], "tools": [{"name": "f"}]})
        again = load(*first)
        assert all(again[name][:] == first[name][:] for name in ("prompt", "messages", "tools", "chosen", "rejected"))


class TestSystemAndTools:
    @pytest.mark.parametrize("name", ["system", "system_prompt", "sys", "systemMessage"])
    def test_a_system_column_is_the_first_message(self, name):
        pairs = load(ROW | {name: "Be brief."}, {**ROW, "prompt": "Other?", name: ""})
        assert pairs["messages"][:] == [
            [{"role": "system", "content": "Be brief."}, user("Capital of France?")],
            [user("Other?")],
        ]

    def test_two_systems(self):
        own = [{"role": "system", "content": "Be brief."}, user("Hi")]
        assert load(ROW | {"prompt": own, "system": "Be brief."})["messages"][0] == own
        with pytest.raises(ValueError, match=r"column 'system': .*another system message"):
            load(ROW | {"prompt": own, "system": "Be long."})
        assert load(ROW | {"prompt": own, "system": "Be long."}, ignore_columns=["system"])["messages"][0] == own
        with pytest.raises(ValueError, match="column 'system': there is no prompt"):
            load({"system": "Be brief.", "chosen": "yes", "rejected": "no"}, task="t")

    @pytest.mark.parametrize("given", [[{"name": "f", "parameters": None}], '[{"name": "f"}]'])
    def test_tools_are_json_beside_a_chat(self, given):
        (pair,) = load(ROW | {"prompt": [user("Hi")], "tools": given})
        assert json.loads(pair["tools"]) == [{"name": "f"}] and pair["prompt"].startswith("tools: ")

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"tools": [{"name": "f"}]}, "column 'tools': got a prompt that is a text"),
            ({"prompt": [user("Hi")], "tools": "weather"}, "column 'tools': not JSON"),
            ({"prompt": [user("Hi")], "tools": '{"name": "f"}'}, "column 'tools': got dict, expected a list"),
        ],
    )
    def test_tools_that_cannot_be_used(self, changed, message):
        with pytest.raises(ValueError, match=message):
            load(ROW | changed)

    def test_no_tools(self):
        assert "tools" not in load(ROW | {"tools": []}, ROW | {"prompt": "q", "tools": None}).column_names


class TestNothingIsLost:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("input", "some text"), ("context", "some text"), ("supporting_documents", ["some text"]),
            ("history", [["a", "b"]]), ("functions", [{"name": "f"}]), ("thinking", "hm"),
            ("few_shot_examples", "x: y"),
            ("image", {"bytes": b"x", "path": None}),
            ("picture_of_it", {"bytes": b"x", "path": "a.png"}),
            ("messages", [user("another thing")]), ("background", "some text"),
        ],
    )  # fmt: skip
    def test_what_a_model_would_read_is_refused_unless_ignored(self, name, value):
        with pytest.raises(ValueError, match=rf"row 1: column '{name}': .*--ignore-columns {name}"):
            load(ROW | {name: value})
        pairs = load(ROW | {name: value}, ignore_columns=[name])
        assert name not in pairs.column_names and pairs["prompt"][:] == [ROW["prompt"]]

    @pytest.mark.parametrize(
        ("name", "value"),
        [("id", "a1"), ("source", "a long text on a web page"), ("question", "Capital of France?"), ("context", ""),
         ("input", None), ("turns", 1), ("prompt_id", "x"), ("question_source", "a forum of people"), ("images", [])],
    )  # fmt: skip
    def test_the_rest_is_kept_and_not_used(self, name, value):
        pairs = load(ROW | {name: value})
        assert pairs["prompt"][:] == [ROW["prompt"]] and pairs[name][:] == [value]

    def test_a_messages_further_fields(self):
        turns = [user("a"), {**assistant("b"), "thinking": "hm", "id": 7}, user("c")]
        (pair,) = load(ROW | {"prompt": turns})
        assert pair["messages"] == [user("a"), {**assistant("b"), "thinking": "hm"}, user("c")]
        assert load(ROW | {"prompt": turns}, ignore_columns=["thinking"])["messages"][0][1] == assistant("b")
        with pytest.raises(ValueError, match=r"a message has 'mood'.*--ignore-columns mood"):
            load(ROW | {"prompt": [{**user("a"), "mood": "good"}]})
        with pytest.raises(ValueError, match="field 'chosen': its message has 'thinking'"):
            load(ROW | {"prompt": [user("a")], "chosen": [{**assistant("x"), "thinking": "hm"}]})

    def test_tool_calls_in_both_spellings(self):
        calls = [{"type": "function", "function": FUNCTION}]
        openai = [
            user("a"),
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "7"},
        ]
        sharegpt = [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(FUNCTION)},
                    {"from": "observation", "value": "7"}]  # fmt: skip
        expected = [user("a"), {**assistant(""), "tool_calls": calls}, {"role": "tool", "content": "7"}]
        # another conversation beside it, whose objects Arrow would fill with None
        other = [user("b"), {**assistant(""), "tool_calls": [{"function": {"name": "g", "arguments": {"n": 1}}}]},
                 {"role": "tool", "content": "8"}]  # fmt: skip
        for turns in (openai, sharegpt):
            pairs = load_pairs(Dataset.from_list([ROW | {"prompt": json.dumps(own)} for own in (turns, other)]))
            assert pairs["messages"][:] == [expected, other]

    @pytest.mark.parametrize("at_once", [1, 2, 1000])
    def test_objects_of_messages_in_chunks_of_any_size(self, at_once, monkeypatch):
        monkeypatch.setattr(records, "_ROWS_AT_ONCE", at_once)
        calls = [{"function": {"name": "g", "arguments": {"city": "巴黎", "n": [1, None]}}}]
        rich = [user("a"), {**assistant(""), "tool_calls": calls}, {"role": "tool", "content": "7"}]
        prompts = ["a text", [user("plain")], rich, [user("last")]]
        given = [ROW | {"prompt": p if isinstance(p, str) else json.dumps(p)} for p in prompts]
        pairs = load_pairs(Dataset.from_list(given))
        assert pairs["messages"][:] == [None, *prompts[1:]]
        assert pairs[2]["messages"] == rich and pairs.select([3, 2])["messages"][:] == [prompts[3], rich]

    def test_a_mistyped_name(self):
        with pytest.raises(ValueError, match="ignore_columns: got sytem, which no row has"):
            load(ROW, ignore_columns=["sytem"])
        with pytest.raises(ValueError, match="ignore_columns: got the text 'system'"):
            load(ROW, ignore_columns="system")

    @pytest.mark.parametrize("name", ["ref_chosen_logps", "ref_entropy", "prompt_ids", "line", "file"])
    def test_names_that_are_written_later_are_set_aside(self, name, caplog):
        pairs = load(ROW | {name: -3})
        assert pairs[f"own_{name}"][:] == [-3] and (name not in pairs.column_names or pairs[name][0] != -3)
        assert f"have a column '{name}'" in caplog.text


class TestLabels:
    """Whatever names the columns have, the label is heeded or refused."""

    @pytest.mark.parametrize(
        ("names", "label"),
        [
            (("response_0", "response_1"), lambda first: {"better_response_id": int(not first)}),
            (("response_0", "response_1"), lambda first: {"safer_response_id": float(not first)}),
            (("output_1", "output_2"), lambda first: {"preference": 1 if first else 2}),
            (("answer_a", "answer_b"), lambda first: {"winner": "a" if first else "b"}),
            (("responseA", "responseB"), lambda first: {"label": "response_A" if first else "response_B"}),
            (("completion_a", "completion_b"), lambda first: {"winner": "model_a" if first else "model_b"}),
            (("answer_left", "answer_right"), lambda first: {"choice": "left" if first else "right"}),
            (("first_reply", "second_reply"), lambda first: {"preferred": "first" if first else "second"}),
            (("text_a", "text_b"), lambda first: {"score_a": 3 - 2 * (not first), "score_b": 2.5}),
            (("text_a", "text_b"), lambda first: {"rank_a": 1 + (not first), "rank_b": 1.5}),
            (("candidate0", "candidate1"), lambda first: {"candidate0_score": int(first), "candidate1_score": 0.5}),
            (("answer_1", "answer_2"), lambda first: {"is_answer_1_better": first}),
            (
                ("answer_1", "answer_2"),
                lambda first: {"winner_1": int(first), "winner_2": int(not first), "winner_tie": 0},
            ),
        ],
    )
    def test_two_answers_and_a_label_that_names_one(self, names, label):
        records = [{"prompt": f"p{i}", **row, "task": "t"} for i, row in enumerate(labelled(names, label))]
        assert load(*records)["chosen"][:] == ["Good 0.", "Good 1.", "Good 2."]
        # renaming them would turn the second row round
        with pytest.raises(ValueError, match=r"looks like a label, got"):
            load(*records, columns={names[0]: "chosen", names[1]: "rejected"})

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"answer_a": "x", "answer_b": "y", "label": 1}, "column 'label': got 1, expected the name of"),
            ({"answer_a": "x", "answer_b": "y", "winner": "gpt-4"}, "column 'winner': got 'gpt-4'"),
            ({"response_0": "x", "response_1": "y", "preference": -1}, "column 'preference': got -1"),
            ({"response_1": "x", "response_2": "y", "label": "0"}, "column 'label': got '0'"),
            ({"answer_a": "x", "answer_b": "y"}, "no column says which is better.*--columns answer_a=chosen"),
            (
                {"answer_a": "x", "answer_b": "y", "winner": "a", "score_a": 1, "score_b": 2},
                "labels disagree: 'winner'",
            ),
            ({"answer_1": "x", "answer_2": "y", "answer_3": "z", "best": 1}, "got 3 answers, expected two"),
            ({**PAIR, "label": 0}, "column 'label': looks like a label, got 0"),
            ({**PAIR, "winner": "model_b"}, "column 'winner': looks like a label"),
            ({**PAIR, "chosen_score": 1.0, "rejected_score": 2.0}, "they prefer the rejected answer"),
            ({**PAIR, "rating-chosen": "1", "rating-rejected": "2"}, "they prefer the rejected answer"),
        ],
    )
    def test_a_label_that_is_not_certain_is_refused(self, row, message):
        with pytest.raises(ValueError, match=message):
            load(TWO | row)

    @pytest.mark.parametrize(
        "label",
        [{"upvotes_a": 1, "upvotes_b": 7}, {"gold": 1}, {"annotator_says": "model_b"}, {"selected": "second"},
         {"chosen_index": 1}, {"result": "B wins"}, {"len_score_a": 2.5, "len_score_b": 0.5}],
    )  # fmt: skip
    def test_no_advice_leads_to_a_label_the_wrong_way_round(self, label):
        row = {**TWO, "answer_a": "x", "answer_b": "y", **label}
        columns = {"answer_a": "chosen", "answer_b": "rejected"}
        with pytest.raises(ValueError, match=f"column '{next(iter(label))}'"):
            load(row, columns=columns)
        try:
            assert load(row)["chosen"][:] == ["x" if "len_score_a" in label else "y"]
        except ValueError as error:
            assert next(iter(label)) in str(error) and "--columns" not in str(error)

    def test_ties_are_left_out_and_counted(self, caplog):
        row = {**TWO, "answer_a": "x", "answer_b": "y"}
        pairs = load({**row, "winner": "tie (bothbad)"}, {**row, "winner": "b"})
        assert pairs["chosen"][:] == ["y"] and pairs["line"][:] == [2] and "1 pairs are left out" in caplog.text
        assert len(load(ROW | {"chosen_score": 2, "rejected_score": 2})) == 1
        assert "have two equal scores" in caplog.text

    def test_an_ordered_pair_and_an_ignored_label(self):
        pairs = load({**TWO, "answer_a": "x", "answer_b": "y", "winner": "b"}, ignore_columns=["winner"],
                     columns={"answer_a": "chosen", "answer_b": "rejected"})  # fmt: skip
        assert pairs["chosen"][:] == ["x"]

    def test_repeated_and_contradictory_pairs_are_counted(self, caplog):
        other = ROW | {"chosen": ROW["rejected"], "rejected": ROW["chosen"]}
        load(ROW, other, ROW, ROW | {"prompt": "Another?"})
        assert "1 of 4 pairs say the same as one before" in caplog.text
        assert "3 of 4 pairs say the contrary of another" in caplog.text

    def test_a_set_with_two_labels_is_read_by_the_one_that_its_page_names(self, caplog):
        row = {"response_0": "x", "response_1": "y", "better_response_id": 1, "safer_response_id": 0}
        assert load(TWO | row)["chosen"][:] == ["y"]
        assert "the public set pku-saferlhf" in caplog.text and "by helpfulness" in caplog.text


class TestOtherLayouts:
    @pytest.mark.parametrize(
        ("row", "messages"),
        [
            ({"system": "S", "question": "Q", **PAIR}, [{"role": "system", "content": "S"}, user("Q")]),
            ({"messages": [user("Q")], "chosen": assistant("x"), "rejected": assistant("y")}, [user("Q")]),
            (
                {"input": {"messages": [user("Q")], "tools": [], "parallel_tool_calls": True},
                 "preferred_output": [assistant("x")], "non_preferred_output": [assistant("y")]},
                [user("Q")],
            ),
            (
                {"instruction": "I", "input": "Q", "system": "S", "history": [["a", "b"]], **PAIR},
                [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("I\nQ")],
            ),
            ({"conversation": [user("Q")], "chosen_response": "x", "rejected_response": "y"}, [user("Q")]),
            ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}], **PAIR}, [user("Q")]),
        ],
        ids=["axolotl's texts", "axolotl's messages", "OpenAI", "Alpaca with all", "other names", "parts"],
    )  # fmt: skip
    def test_reads(self, row, messages):
        assert load({**row, "task": "t"})["messages"][:] == [messages]

    def test_an_image_part_is_refused(self):
        with pytest.raises(ValueError, match="message 1: its content is no text"):
            load(ROW | {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]})


class TestTextStaysText:
    NAMES = ("1", "NA", "None", "nan", "null", "", " x", "=1+1", "inf", "1e5", "True")

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_odd_names_of_tasks_and_prompts(self, tmp_path, kind):
        names = [name for name in self.NAMES if name]
        path = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(ROW | {"task": name, "prompt": name}) + "\n" for name in names))
        else:
            path.write_text("prompt,chosen,rejected,task\n" + "".join(f"{name},x,y,{name}\n" for name in names))
        pairs = load_pairs(path)
        assert pairs["task"][:] == names and pairs["prompt"][:] == names

    def test_the_name_of_all_tasks_is_refused(self):
        with pytest.raises(ValueError, match="row 1: field 'task': got 'all'"):
            load(ROW | {"task": "all"})
        with pytest.raises(ValueError, match="task: got 'all'"):
            load(ROW, task="all")
