"""Bad pairs are refused by name before any time is spent; a split keeps together what belongs together."""

import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

import dpoviz.data.records as module
from dpoviz.data.columns import Reader
from dpoviz.data.records import as_chat, load_pairs, split_by_group

GOOD = {"prompt": "1 + 1 =", "chosen": "2", "rejected": "3", "task": "math"}


@pytest.fixture
def write(tmp_path):
    def to_file(*lines):
        """Records as JSON, text and bytes as they are, one a line."""
        path = tmp_path / "pairs.jsonl"
        raw = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
               for line in lines]  # fmt: skip
        path.write_bytes(b"\n".join(raw) + b"\n")
        return path

    return to_file


def without(field):
    return {name: value for name, value in GOOD.items() if name != field}


class TestLoadPairs:
    def test_good_lines_keep_their_fields_and_know_their_line(self, write):
        other = {**GOOD, "prompt": "讲个笑话 🙂", "task": "dialogue", "group": "g"}
        pairs = load_pairs(write(GOOD, "", "  ", other), tasks=["math", "dialogue"])
        assert [pairs[i] for i in range(2)] == [{**GOOD, "group": None, "line": 1}, {**other, "line": 4}]

    def test_a_field_that_only_a_later_line_has_is_kept(self, write):
        pairs = load_pairs(write(GOOD, {**GOOD, "prompt": "q", "source": "book"}, {**GOOD, "prompt": "r", "level": 2}))
        assert pairs["source"][:] == [None, "book", None]
        assert pairs["level"][:] == [None, None, 2]

    def test_a_byte_order_mark_and_windows_line_ends(self, tmp_path):
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(GOOD).encode())
        assert load_pairs(path)["line"][:] == [1, 3]

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ('{"prompt" "a"}', r"not JSON \(Expecting ':' delimiter at character 10\)"),
            (b'{"prompt": "\xff"}', r"not UTF-8 \(invalid start byte at byte 12\)"),
            ("[1, 2]", "got a JSON list, expected an object with prompt, chosen, rejected, task"),
            ("3", "got a JSON int, expected an object"),
            ("{}", "field 'prompt' is missing; the line has none"),
            *((without(f), f"field '{f}' is missing; the line has '") for f in GOOD),
            *(({**GOOD, f: 5}, f"field '{f}': got int, expected text") for f in GOOD),
            *(({**GOOD, f: None}, f"field '{f}': got NoneType, expected text") for f in GOOD),
            *(({**GOOD, f: " \n\t"}, f"field '{f}' is empty") for f in GOOD),
            (
                {**GOOD, "chosen": [{"role": "user", "content": "a"}]},
                "field 'chosen': got the user's message, expected",
            ),
            ({**GOOD, "group": 7}, "field 'group': got int, expected text"),
            ({**GOOD, "rejected": "2"}, "fields 'chosen' and 'rejected' are identical"),
            ({**GOOD, "task": "poetry"}, "field 'task': got 'poetry', expected one of math, code"),
        ],
    )
    def test_a_bad_line_is_named_by_file_line_and_field(self, write, bad, message):
        path = write(GOOD, "", bad, GOOD)
        with pytest.raises(ValueError, match=f"^{path}, line 3: {message}"):
            load_pairs(path, tasks=("math", "code"))

    def test_any_task_goes_where_none_is_expected(self, write):
        assert load_pairs(write({**GOOD, "task": "poetry"}))["task"][:] == ["poetry"]

    def test_all_problems_of_all_lines_are_listed(self, write):
        path = write({**without("task"), "prompt": ""}, GOOD, "{")
        with pytest.raises(ValueError) as error:
            load_pairs(path)
        lines = str(error.value).splitlines()
        assert [line.split(":")[0] for line in lines] == [f"{path}, line {n}" for n in (1, 1, 3)]
        assert "'prompt' is empty" in lines[0]
        assert "'task' is missing" in lines[1]

    @pytest.mark.parametrize(("count", "last"), [(10, "line 10"), (13, "... and 3 more")])
    def test_ten_are_listed_and_the_rest_counted(self, write, count, last):
        with pytest.raises(ValueError) as error:
            load_pairs(write(*[without("task")] * count))
        lines = str(error.value).splitlines()
        assert len(lines) == min(count, 11)
        assert last in lines[-1]

    @pytest.mark.parametrize("at_once", [1, 1000])
    def test_a_further_field_of_two_types_is_kept_as_json_and_named(self, write, caplog, monkeypatch, at_once):
        monkeypatch.setattr(module, "_ROWS_AT_ONCE", at_once)
        values = [1, "hard", None, {"a": [0.5, "x"]}, 10**30, "\ud83d"]
        pairs = load_pairs(write(*({**GOOD, "prompt": f"q{i}", "level": own} for i, own in enumerate(values))))
        assert [text and json.loads(text) for text in pairs["level"]] == values
        assert "columns 'level' hold values of several types" in caplog.text

    def test_parts_of_a_file_make_one_set(self, write, monkeypatch):
        """What the columns of one part lack, or hold in whole numbers, another part may have, or in broken ones."""
        chat = {**GOOD, "prompt": [{"role": "user", "content": "a"}]}
        lines = [{**GOOD, "level": 1}, {**GOOD, "seen": ["x"]}, {**GOOD, "level": 0.5}, GOOD, {**chat, "level": 2}]
        whole = load_pairs(write(*lines))
        monkeypatch.setattr(module, "_ROWS_AT_ONCE", 2)
        parts = load_pairs(write(*lines))
        assert parts.features == whole.features and parts[:] == whole[:]
        assert parts["level"][:] == [1, None, 0.5, None, 2] and parts["seen"][:] == [None, ["x"], None, None, None]
        assert parts["messages"][:] == [None] * 4 + [chat["prompt"]]

    @pytest.mark.slow
    def test_memory_holds_a_thousand_records_whatever_their_number(self, write, monkeypatch):
        """Python's objects; Arrow's columns take a tenth."""

        def peak(count):
            path = write(*({**GOOD, "prompt": f"{i} + 1 ="} for i in range(count)))
            tracemalloc.start()
            load_pairs(path)
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return most

        peak(10)
        few = peak(2000)
        assert peak(6000) < 1.5 * few
        monkeypatch.setattr(module, "_ROWS_AT_ONCE", 10**6)
        assert peak(6000) > 3 * few  # the control

    def test_text_that_no_encoding_holds_is_named(self, write):
        # half of a surrogate pair: legal JSON, no legal text
        path = write(r'{"prompt": "\ud83d", "chosen": "2", "rejected": "3", "task": "math"}')
        with pytest.raises(ValueError, match=rf"{path}, line 1: field 'prompt': half of a surrogate pair \('.ud83d'"):
            load_pairs(path)

    def test_an_empty_file(self, write):
        path = write("", " ")
        with pytest.raises(ValueError, match=f"{path}: holds no pairs"):
            load_pairs(path)

    @pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.parquet", "none"])
    def test_no_file(self, name, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"^data: there is no file or folder {tmp_path / name}$"):
            load_pairs(tmp_path / name)


@pytest.mark.skipif("DPOVIZ_DATA" not in os.environ, reason="DPOVIZ_DATA names no folder with the real pairs")
class TestRealPairs:
    @pytest.mark.parametrize(("name", "count"), [("math", 366), ("code", 135)])
    def test_loads(self, name, count):
        pairs = load_pairs(Path(os.environ["DPOVIZ_DATA"]) / f"{name}.jsonl", tasks=[name])
        assert len(pairs) == count

    def test_the_folder_loads_as_one_set_of_texts_and_chats(self):
        folder = Path(os.environ["DPOVIZ_DATA"])
        pairs = load_pairs(folder)
        assert Counter(pairs["task"]) == {"math": 366, "code": 135, "dialogue": 150}
        assert set(pairs["file"]) == {"math.jsonl", "code.jsonl", "dialogue.jsonl"}
        raw = [json.loads(line) for line in (folder / "dialogue.jsonl").read_text().splitlines()]
        chats = [row for row in pairs if row["messages"]]
        assert [row["messages"] for row in chats] == [record["prompt"] for record in raw]
        assert [row["rejected"] for row in chats] == [record["rejected"][0]["content"] for record in raw]
        assert {row["task"] for row in chats} == {"dialogue"}
        assert any(message["role"] == "system" for row in chats for message in row["messages"])


USER, SYSTEM = {"role": "user", "content": "Hi?"}, {"role": "system", "content": "Be kind."}


def assistant(content):
    return {"role": "assistant", "content": content}


class TestLayouts:
    """The layouts that TRL's documentation shows, in each kind of file: always the same pairs."""

    CHAT: ClassVar = {
        "prompt": "system: Be kind.\n\nuser: Hi?",
        "chosen": "Yes.",
        "rejected": "No.",
        "task": "dialogue",
    }

    @pytest.mark.parametrize(
        "record",
        [
            {"prompt": [SYSTEM, USER], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
            {"prompt": [SYSTEM, USER], "chosen": "Yes.", "rejected": "No."},
            {"chosen": [SYSTEM, USER, assistant("Yes.")], "rejected": [SYSTEM, USER, assistant("No.")]},
            # as in UltraFeedback's binarized set: the prompt once more, as a text
            {
                "prompt": "Hi?",
                "chosen": [SYSTEM, USER, assistant("Yes.")],
                "rejected": [SYSTEM, USER, assistant("No.")],
            },
        ],
        ids=["explicit", "texts for answers", "implicit", "both"],
    )
    def test_chats(self, write, record):
        (pair,) = load_pairs(write({**record, "task": "dialogue"}))
        assert pair == {**self.CHAT, "messages": [SYSTEM, USER], "group": None, "line": 1}

    @pytest.mark.parametrize(
        ("chosen", "rejected", "prompt", "answers"),
        [
            ("The sky is blue.", "The sky is green.", "The sky is", (" blue.", " green.")),
            ("2+2=4", "2+2=5", "2+2=", ("4", "5")),
            ("a b", "a c", "a", (" b", " c")),
        ],
    )
    def test_texts_that_begin_alike(self, write, chosen, rejected, prompt, answers):
        (pair,) = load_pairs(write({"chosen": chosen, "rejected": rejected, "task": "math"}))
        assert (pair["prompt"], (pair["chosen"], pair["rejected"])) == (prompt, answers)

    @settings(max_examples=200)
    @given(st.text(alphabet="ab ", min_size=1), st.text(alphabet="ab "), st.text(alphabet="ab "))
    def test_what_texts_share_is_cut_as_trl_cuts_it_but_not_inside_a_word(self, shared, one, other):
        """The rule of TRL's `extract_prompt`, written out again, and a walk back to where a word begins."""
        chosen, rejected = shared + one + "x", shared + other + "y"
        i = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        while i and any(text[i - 1] != " " != text[i] for text in (chosen, rejected)):
            i -= 1
        i -= i > 0 and chosen[i - 1] == " "
        found = Reader({}, ()).read({"chosen": chosen, "rejected": rejected})
        if chosen[:i].strip():
            assert found == {"prompt": chosen[:i], "chosen": chosen[i:], "rejected": rejected[i:]}
        else:
            assert "prompt" not in found

    @pytest.mark.parametrize("kind", [".jsonl", ".json", "data.json", ".parquet", "Dataset", "DatasetDict", "list"])
    def test_every_kind_of_source_gives_the_same(self, tmp_path, kind):
        records = [
            {"prompt": [USER], "chosen": [assistant("Yes.")], "rejected": [assistant(f"No {i}.")], "task": "dialogue"}
            for i in range(3)
        ]
        path = tmp_path / f"pairs{kind if kind.startswith('.') else '.json'}"
        if kind == ".parquet":
            Dataset.from_list(records).to_parquet(path)
            source = path
        elif kind in (".json", "data.json"):
            path.write_text(json.dumps(records if kind == ".json" else {"data": records}))
            source = str(path)
        elif kind == ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
            source = path
        elif kind == "list":
            parts = [tmp_path / f"{i}.jsonl" for i in range(3)]
            for part, record in zip(parts, records, strict=True):
                part.write_text(json.dumps(record))
            source = parts
        else:
            source = Dataset.from_list(records)
            source = source if kind == "Dataset" else DatasetDict(train=source)
        pairs = load_pairs(source)
        assert pairs["rejected"][:] == ["No 0.", "No 1.", "No 2."]
        assert pairs["messages"][:] == [[USER]] * 3
        assert pairs["line"][:] == ([1, 1, 1] if kind == "list" else [1, 2, 3])
        assert ("file" in pairs.column_names) == (kind == "list")

    def test_texts_and_chats_in_one_set(self, write):
        chat = {"prompt": [USER], "chosen": [assistant("a")], "rejected": [assistant("b")], "task": "dialogue"}
        assert load_pairs(write(GOOD, chat))["messages"][:] == [None, [USER]]

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"prompt": []}, "field 'prompt': got no messages"),
            (
                {"prompt": [{"content": "a"}]},
                "field 'prompt': message 1: got .*expected an object with role and content",
            ),
            (
                {"prompt": [{"role": "narrator", "content": "a"}]},
                "message 1: got the role 'narrator', expected one of",
            ),
            ({"prompt": [{"role": "user", "content": " "}]}, "message 1: its content is empty"),
            ({"prompt": [{"role": "user", "content": None}]}, "message 1: its content is no text"),
            (
                {"prompt": [USER, assistant("a")]},
                "field 'prompt': ends with the assistant's message, expected the user",
            ),
            ({"chosen": [USER]}, "field 'chosen': got the user's message, expected an answer"),
            (
                {"chosen": [assistant("a"), assistant("b")]},
                "field 'chosen': got 2 messages, expected an answer of one",
            ),
            ({"rejected": [assistant("Yes.")]}, "are identical"),
        ],
    )
    def test_bad_chats_are_named_by_line_and_field(self, write, changed, message):
        chat = {"prompt": [USER], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")], "task": "dialogue"}
        path = write(GOOD, {**chat, **changed})
        with pytest.raises(ValueError, match=f"^{path}, line 2: .*{message}"):
            load_pairs(path)


class TestNames:
    def test_other_peoples_columns_and_a_task_for_all(self, write):
        record = {"question": "1+1", "good": "2", "bad": "3", "prompt": "not this", "level": 5}
        columns = {"question": "prompt", "good": "chosen", "bad": "rejected"}
        with pytest.raises(ValueError, match=r"column 'prompt': .* beside 'question'.*--ignore-columns prompt"):
            load_pairs(write(record), columns=columns, task="math")
        (pair,) = load_pairs(write(record), columns=columns, task="math", ignore_columns=["prompt"])
        assert pair == {"prompt": "1+1", "chosen": "2", "rejected": "3", "task": "math", "level": 5, "group": None,
                        "line": 1}  # fmt: skip

    def test_refused(self, write):
        path = write(GOOD)
        with pytest.raises(ValueError, match="columns: got \\['answer'\\] as our names, expected some of prompt"):
            load_pairs(path, columns={"a": "answer"})
        with pytest.raises(ValueError, match=r"two of .* become one"):
            load_pairs(path, columns={"a": "prompt", "b": "prompt"})
        with pytest.raises(ValueError, match=f"{path}, line 1: .*question; the record has prompt"):
            load_pairs(path, columns={"question": "prompt"})
        with pytest.raises(ValueError, match="line 1: field 'task': got 'math', but task='code' names the whole"):
            load_pairs(path, task="code")
        with pytest.raises(ValueError, match=r"'task' is missing.*the whole source with task= \(--task\)$"):
            load_pairs(write(without("task")))
        with pytest.raises(ValueError, match=r"'prompt' is missing.*other columns with columns= \(--columns\)$"):
            load_pairs(write(without("prompt")))
        with pytest.raises(ValueError, match="preset: got 'none', expected one of gsm8k-solutions"):
            load_pairs(path, preset="none")
        with pytest.raises(ValueError, match="columns: given together with a preset"):
            load_pairs(path, preset="orca", columns={"a": "prompt"})

    def test_files_that_are_not_what_their_name_says(self, tmp_path):
        for name, content, message in [
            ("a.json", '{"prompt": {"0": "q"}, "chosen": {"0": "x"}}', "got one JSON value, expected a list"),
            ("b.json", '[{"a": 1}, {"a": 2]', "not JSON .*at line 1, character 19"),
            ("c.parquet", "PAR", "not Parquet"),
            ("d.jsonl.gz", "PK\x03\x04", "is a zip archive"),
            ("e.txt", "prompt", "got the suffix '.txt', expected one of .jsonl, .json"),
            ("f.csv", "a,a\n1,2", "names a column twice"),
            ("g.csv", 'a,b\n1,"2', "line 2: not CSV"),
        ]:
            (tmp_path / name).write_text(content)
            with pytest.raises(ValueError, match=message):
                load_pairs(tmp_path / name)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"holds no file named .jsonl, .json, .ndjson"):
            load_pairs(tmp_path / "empty")
        with pytest.raises(ValueError, match="split: got 'test', expected one of train"):
            load_pairs(DatasetDict(train=Dataset.from_list([GOOD])), split="test")

    @pytest.mark.slow
    @pytest.mark.parametrize("setting", ["1", ""])
    def test_a_hub_name_without_network_is_refused_at_once(self, setting, tmp_path):
        """In a process of its own, because the hub's client reads its setting when it is imported."""
        program = (
            "import time; from dpoviz import load_pairs\n"
            "begin = time.perf_counter()\n"
            "try: load_pairs('nobody/no-such-set')\n"
            "except ValueError as error: print(time.perf_counter() - begin, error)"
        )
        # an address that nobody listens at stands for a network that is not there
        environment = {**os.environ, "HF_HUB_OFFLINE": setting, "HF_ENDPOINT": "http://127.0.0.1:9"}
        environment["HF_HOME"] = str(tmp_path)
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        seconds, message = done.stdout.split(maxsplit=1)
        assert float(seconds) < 10
        assert "nobody/no-such-set" in message and "give a file, a folder" in message


class TestAsChat:
    def test_plain_prompts_of_a_task_become_a_users_message(self, write):
        chat = {"prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b", "task": "math"}
        pairs = load_pairs(write(GOOD, {**GOOD, "task": "code"}, chat))
        turned = as_chat(pairs, ["math"])
        assert turned["messages"][:] == [[{"role": "user", "content": GOOD["prompt"]}], None, [SYSTEM, USER]]
        assert turned["prompt"][:] == pairs["prompt"][:]
        assert as_chat(load_pairs(write(GOOD)), ["math"])["messages"][0][0]["content"] == GOOD["prompt"]

    def test_a_chat_whose_messages_have_further_fields(self, write):
        turns = [USER, {**assistant("a"), "thinking": "hm"}, USER]
        turned = as_chat(load_pairs(write({**GOOD, "prompt": turns}, GOOD)), ["math"])
        assert turned["messages"][:] == [turns, [{"role": "user", "content": GOOD["prompt"]}]]

    def test_refuses_a_task_that_is_not_there(self, write):
        with pytest.raises(ValueError, match="chat: got poetry, expected tasks of the pairs: math"):
            as_chat(load_pairs(write(GOOD)), ["poetry", "math"])


def dataset(rows):
    """Pairs from (prompt, group, task)."""
    return Dataset.from_list(
        [
            {"prompt": prompt, "chosen": "a", "rejected": "b", "task": task, "group": group, "line": i}
            for i, (prompt, group, task) in enumerate(rows)
        ]
    )


class TestSplitByGroup:
    @pytest.mark.slow
    @settings(max_examples=50)
    @given(
        rows=st.lists(
            st.tuples(
                st.integers(0, 12).map("p{}".format),
                st.none() | st.integers(0, 8).map("g{}".format),
                st.sampled_from(["math", "code"]),
            ),
            min_size=2,
            max_size=30,
        ),
        held_out=st.floats(0.05, 0.95),
        seed=st.integers(0, 5),
    )
    def test_nothing_stands_on_both_sides_and_nothing_is_lost(self, rows, held_out, seed):
        # one free pair more than needed of each task, so that there is something to split
        rows = [*rows, *((f"{task} {i}", None, task) for task in ("math", "code") for i in range(2))]
        parts = split_by_group(dataset(rows), held_out, seed)
        for field in ("prompt", "group"):
            train, test = ({value for value in part[field] if value is not None} for part in parts)
            assert not train & test
        assert sorted([*parts[0]["line"], *parts[1]["line"]]) == list(range(len(rows)))
        assert all(len(part) for part in parts)

    def test_ties_reach_through_prompts_and_groups(self):
        # 0 and 1 share a group, 1 and 2 a prompt, 2 and 3 a group: one block, whatever the seed
        rows = [("a", "g", "t"), ("b", "g", "t"), ("b", "h", "t"), ("c", "h", "t"), ("d", None, "t"), ("e", None, "t")]
        seen = set()
        for seed in range(12):
            sides = [set(part["line"]) for part in split_by_group(dataset(rows), 0.34, seed)]
            assert {0, 1, 2, 3} <= sides[0] or {0, 1, 2, 3} <= sides[1]
            seen.add(frozenset(sides[1]))
        assert len(seen) == 3  # each of the three blocks is held out by some seed

    def test_without_a_group_the_prompt_decides(self):
        pairs = dataset([(f"p{i // 3}", None, "t") for i in range(12)]).remove_columns("group")
        train, test = split_by_group(pairs, 0.25, 0)
        assert (len(train), len(test)) == (9, 3)
        assert len(set(test["prompt"])) == 1

    def test_each_task_gives_its_share(self):
        rows = [(f"{task} {i}", None, task) for task, n in (("math", 40), ("code", 10), ("talk", 2)) for i in range(n)]
        train, test = split_by_group(dataset(rows), 0.2, 0)
        counts = {task: test["task"][:].count(task) for task in ("math", "code", "talk")}
        assert counts == {"math": 8, "code": 2, "talk": 1}  # of two groups one goes, however small the share
        assert train["task"][:].count("talk") == 1

    @pytest.mark.parametrize("seed", range(8))
    def test_tasks_that_share_prompts_leave_something_on_both_sides(self, seed):
        rows = [(prompt, None, task) for prompt in ("a", "b") for task in ("math", "code")]
        assert [len(part) for part in split_by_group(dataset(rows), 0.5, seed)] == [2, 2]

    def test_repeatable_and_the_seed_matters(self):
        pairs = dataset([(f"p{i}", None, "t") for i in range(40)])
        first, again, other = (split_by_group(pairs, 0.25, seed)[1]["line"][:] for seed in (0, 0, 1))
        assert first == again
        assert first != other

    @pytest.mark.parametrize("held_out", [0, 1, -0.1, 1.5, float("nan")])
    def test_no_share(self, held_out):
        with pytest.raises(ValueError, match=f"held_out: got {held_out}, expected a fraction between 0 and 1"):
            split_by_group(dataset([("a", None, "t"), ("b", None, "t")]), held_out, 0)

    def test_a_task_of_one_group(self):
        with pytest.raises(ValueError, match="task 'code': all its pairs are of one prompt or group"):
            split_by_group(dataset([("a", None, "t"), ("b", None, "t"), ("c", None, "code")]), 0.5, 0)
