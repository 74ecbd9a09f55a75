"""The synthetic tasks: rewards worked by hand, the restricted evaluator, the labeller."""

import math
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from dpoviz.data import tasks
from dpoviz.data.tasks import (
    FAMILIES,
    TASKS,
    Problem,
    corpus,
    evaluate_expression,
    label_pairs,
    last_integer,
    preference_probability,
    reward,
    sample_problems,
)


class TestMath:
    @pytest.mark.parametrize(
        ("answer", "expected"),
        [("3 * 4 = 12, 12 + 2 = 14", 1), ("14", 1), ("3 * 4 = 14, 14 + 2 = 16", 0), ("fourteen", 0), ("", 0)],
    )
    def test_the_last_number_decides(self, answer, expected):
        problem = Problem("math", "Tom fills 3 boxes with 4 books each and finds 2 more.\n", "3 * 4 = 12, 12 + 2 = 14")
        assert reward(problem, answer) == expected

    def test_keys_are_right(self):
        # an independent reading of the prompt's numbers, without the family's own arithmetic
        for problem in sample_problems("math", 200, seed=3):
            n = [int(found) for found in re.findall(r"\d+", problem.prompt)]
            text = problem.prompt
            if "fills" in text:
                expected = n[0] * n[1] - n[2] if "loses" in text else n[0] * n[1] + n[2]
            elif "boxes" in text or "*" in text:
                expected = n[0] * n[1]
            else:
                expected = n[0] - n[1] if " - " in text or "gives" in text else n[0] + n[1]
            assert last_integer(problem.key) == expected, problem

    def test_last_integer(self):
        assert last_integer("a 3 b -17.") == -17
        assert last_integer("none") is None


class TestCode:
    def test_demonstrations_are_right_and_differ(self):
        rng = random.Random(0)
        for problem in sample_problems("code", 100, seed=1):
            answers = {FAMILIES["code"].demonstrate(problem, rng) for _ in range(40)}
            assert all(reward(problem, answer) == 1 for answer in answers), problem
            assert len(answers) > 1, problem

    def test_keys_agree_with_python(self):
        # the oracle is Python itself, on expressions that this module wrote
        for problem in sample_problems("code", 100, seed=2):
            for inputs in ({"x": 4, "xs": [4, -1, 9]}, {"x": -3, "xs": [0, 2]}):
                namespace = {"__builtins__": {}, "sum": sum, "max": max, "min": min, "sorted": sorted, "len": len}
                expected = eval(problem.key, {**namespace, **inputs})
                assert evaluate_expression(problem.key, inputs) == expected

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ("2 * x + 3", 1),
            ("3 + x + x", 1),
            ("x + 3 * 2", 0),
            ("2 * x + 3.0", 0),
            ("[2 * x + 3]", 0),
            ("2 * x +", 0),
            ("", 0),
        ],
    )
    def test_judged_by_running(self, answer, expected):
        assert reward(Problem("code", "In Python: take x, double it, then add 3.\n", "(2 * x) + 3"), answer) == expected

    @pytest.mark.parametrize(
        "source",
        [
            "__import__('os').system('true')",
            "().__class__.__bases__",
            "open('f')",
            "x.real",
            "exec('1')",
            "(lambda: 1)()",
            "'a' * 9",
            "x if y else 1",
            "sum(x for x in xs for y in xs)",
            "10 ** 8 ** 8",
            "9 ** 9 ** 9",
            "x ** 60",
            "x ** -1",
            "[0] * 100000",
            "xs + xs",
            "1 // 0",
            "xs[9]",
            "max(5)",
            "sorted(xs, reverse=-1)",
            "f'{x}'",
            "(x := 3)",
            "1_0.0",
            "1if x else 2, 3",
            "9" * 100,
            "(" * 150 + "x" + ")" * 150,
            "-" * 190 + "x" * 20,
            "sum([sum([sum([z for z in xs]) for y in xs]) for w in xs])" + "+ 0" * 90,
            "import os",
            "x\x00",
            "",
        ],
    )
    def test_refuses_all_else(self, source):
        with pytest.raises(ValueError):
            evaluate_expression(source, {"x": 3, "xs": [1, 2, 3]})

    def test_work_is_bounded(self):
        nested = "sum([sum([sum([sum([sum([1 for a in v]) for b in v]) for c in v]) for d in v]) for e in v])"
        with pytest.raises(ValueError, match="steps"):
            evaluate_expression(nested, {"v": list(range(100))})

    @settings(max_examples=300)
    @given(st.text(alphabet="x s()[]+-*/%<>=0123456789,forinlemaxsum'\"\\._", max_size=60))
    def test_any_text_ends_in_a_value_or_a_value_error(self, text):
        try:
            evaluate_expression(text, {"x": 3, "xs": [1, 2, 3]})
        except ValueError:
            pass


class TestDialogue:
    opener = Problem("dialogue", "Do you like chess?\n", "chess")

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ("Thank you for asking! I am glad to talk about chess.", 0.4 + 0.4 + 0.2),
            ("Thank you for asking! I like tea very much.", 0.2 + 0.0 + 0.2),
            ("I find chess calm and quiet today.", 0.0 + 0.4 + 0.2),
            ("Chess.", 0.0 + 0.4 + 0.2 * (1 - 5 / 6)),
            ("No.", 0.0 + 0.0 + 0.2 * (1 - 5 / 6)),
            (" ".join(["chess"] * 19), 0.0 + 0.4 + 0.2 * 0.5),
            (" ".join(["word"] * 40), 0.0),
        ],
    )
    def test_worked_by_hand(self, answer, expected):
        assert reward(self.opener, answer) == pytest.approx(expected, abs=1e-12)


class TestProblems:
    @pytest.mark.parametrize("task", TASKS)
    def test_different_prompts_and_repeatable(self, task):
        problems = sample_problems(task, 200, seed=5)
        assert len({problem.prompt for problem in problems}) == 200
        assert problems == sample_problems(task, 200, seed=5)
        assert problems != sample_problems(task, 200, seed=6)

    def test_too_many_is_refused(self):
        with pytest.raises(ValueError, match="n: got 100000, but the dialogue family"):
            sample_problems("dialogue", 100_000, seed=0)

    def test_unknown_task(self):
        with pytest.raises(ValueError, match="task: got 'poetry', expected one of math, code, dialogue"):
            sample_problems("poetry", 1, seed=0)

    def test_corpus_takes_the_families_in_turn(self):
        rows = corpus(30, seed=0)
        assert rows == corpus(30, seed=0)
        for i, (prompt, answer) in enumerate(rows):
            assert prompt.endswith("\n") and answer
            assert ("expression" in prompt or "Python" in prompt or "code" in prompt) == (i % 3 == 1)


class TestLabels:
    def test_probability_by_hand(self):
        assert preference_probability("math", 1, 0) == pytest.approx(1 / (1 + math.exp(-6)), rel=1e-12)
        assert preference_probability("dialogue", 0.2, 0.6) == pytest.approx(1 / (1 + math.exp(0.6)), rel=1e-12)

    def test_reliability_falls_from_math_to_dialogue(self):
        assert FAMILIES["math"].reliability > FAMILIES["code"].reliability > FAMILIES["dialogue"].reliability

    def test_draws_follow_bradley_terry(self):
        problem, answers = Problem("dialogue", "Do you like chess?\n", "chess"), ["I find chess calm and old.", "No."]
        p = preference_probability("dialogue", reward(problem, answers[0]), reward(problem, answers[1]))
        rng = random.Random(0)
        wins = sum(label_pairs(problem, answers, 1, rng)[0]["chosen"] == answers[0] for _ in range(2000))
        assert binomtest(wins, 2000, p).pvalue > 1e-3
        # the control: draws at the math family's reliability would be told apart from these
        assert binomtest(wins, 2000, preference_probability("math", 0.6, 1 / 30)).pvalue < 1e-3

    def test_ties_repeats_and_empty_answers_make_no_pair(self):
        problem = Problem("math", "What is 1 + 1?\n", "1 + 1 = 2")
        assert label_pairs(problem, ["3", "4", "5"], 5, random.Random(0)) == []
        assert label_pairs(problem, ["2", "2", ""], 5, random.Random(0)) == []
        records = label_pairs(problem, ["2", "2", "3", " "], 5, random.Random(0))
        assert len(records) == 1
        assert {records[0]["chosen"], records[0]["rejected"]} == {"2", "3"}
        assert {records[0]["reward_chosen"], records[0]["reward_rejected"]} == {0.0, 1.0}

    def test_at_most_n(self):
        problem = Problem("math", "What is 1 + 1?\n", "1 + 1 = 2")
        assert len(label_pairs(problem, ["2", "3", "4", "5", "= 2"], 3, random.Random(0))) == 3


def test_code_openings_can_be_read_back():
    for problem in sample_problems("code", 300, seed=9):
        assert tasks.FAMILIES["code"].demonstrate(problem, random.Random(0))
