"""Bad pairs are refused by name before any time is spent; a split keeps together what belongs together."""

import json
import logging
import os
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from dpoviz.data import load_pairs, split_by_group, tokenize_pairs

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
            ("[1, 2]", "came a JSON list, expected an object with prompt, chosen, rejected, task"),
            ("3", "came a JSON int, expected an object"),
            ("{}", "field 'prompt' is missing; the line has none"),
            *((without(f), f"field '{f}' is missing; the line has '") for f in GOOD),
            *(({**GOOD, f: 5}, f"field '{f}': came int, expected text") for f in GOOD),
            *(({**GOOD, f: None}, f"field '{f}': came NoneType, expected text") for f in GOOD),
            *(({**GOOD, f: " \n\t"}, f"field '{f}' is empty") for f in GOOD),
            ({**GOOD, "chosen": [{"role": "user", "content": "a"}]}, "field 'chosen': came list, expected text"),
            ({**GOOD, "group": 7}, "field 'group': came int, expected text"),
            ({**GOOD, "rejected": "2"}, "fields 'chosen' and 'rejected' are identical"),
            ({**GOOD, "task": "poetry"}, "field 'task': came 'poetry', expected one of math, code"),
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

    def test_a_further_field_of_two_types_is_named(self, write):
        path = write({**GOOD, "level": 1}, {**GOOD, "level": "hard"})
        with pytest.raises(ValueError, match=f"{path}, field 'level': the lines' values do not make one column"):
            load_pairs(path)

    def test_text_that_no_encoding_holds_is_named(self, write):
        # half of a surrogate pair: legal JSON, no legal text
        path = write(r'{"prompt": "\ud83d", "chosen": "2", "rejected": "3", "task": "math"}')
        with pytest.raises(ValueError, match=f"{path}, field 'prompt'"):
            load_pairs(path)

    def test_an_empty_file(self, write):
        path = write("", " ")
        with pytest.raises(ValueError, match=f"{path}: holds no pairs"):
            load_pairs(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_pairs(tmp_path / "none.jsonl")


@pytest.mark.skipif("DPOVIZ_DATA" not in os.environ, reason="DPOVIZ_DATA names no folder with the real pairs")
class TestRealPairs:
    @pytest.mark.parametrize(("name", "count"), [("math", 366), ("code", 135)])
    def test_loads(self, name, count):
        pairs = load_pairs(Path(os.environ["DPOVIZ_DATA"]) / f"{name}.jsonl", tasks=[name])
        assert len(pairs) == count

    def test_chat_messages_are_refused_by_name(self):
        path = Path(os.environ["DPOVIZ_DATA"]) / "dialogue.jsonl"
        with pytest.raises(ValueError, match=f"^{path}, line 1: field 'prompt': came list, expected text"):
            load_pairs(path)


def dataset(rows):
    """Pairs from (prompt, group, task)."""
    return Dataset.from_list(
        [
            {"prompt": prompt, "chosen": "a", "rejected": "b", "task": task, "group": group, "line": i}
            for i, (prompt, group, task) in enumerate(rows)
        ]
    )


class TestSplitByGroup:
    @settings(max_examples=50, deadline=None)
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
        with pytest.raises(ValueError, match=f"held_out: came {held_out}, expected a share between 0 and 1"):
            split_by_group(dataset([("a", None, "t"), ("b", None, "t")]), held_out, 0)

    def test_a_task_of_one_group(self):
        with pytest.raises(ValueError, match="task 'code': all its pairs are of one prompt or group"):
            split_by_group(dataset([("a", None, "t"), ("b", None, "t"), ("c", None, "code")]), 0.5, 0)


def pair(prompt, chosen, rejected, line):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "task": "t", "line": line}


class TestTokenizePairs:
    PAIRS = (pair("a b", "c", "d e", 1), pair("f", "g h i j", "k", 5))

    def test_ids_by_hand(self, tokenizer):
        pairs = Dataset.from_list(list(self.PAIRS))
        out = tokenize_pairs(pairs, tokenizer, max_length=6)
        a, end = 4, 2  # the tokenizer's numbers of "a" and of the end
        assert out["prompt_ids"][:] == [[a, a + 1], [a + 5]]
        assert out["chosen_ids"][:] == [[a + 2, end], [a + 6, a + 7, a + 8, a + 9, end]]
        assert out["rejected_ids"][:] == [[a + 3, a + 4, end], [a + 10, end]]
        assert [out[i]["prompt"] for i in range(2)] == pairs["prompt"][:]
        assert out["line"][:] == [1, 5]

    def test_special_tokens_open_the_prompt_and_never_an_answer(self, tokenizer):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
        row = tokenize_pairs(Dataset.from_list([self.PAIRS[0]]), tokenizer, max_length=9)[0]
        assert (row["prompt_ids"], row["chosen_ids"]) == ([1, 4, 5], [6, 2])

    @pytest.mark.parametrize(("limit", "fits"), [(6, True), (5, False)])
    def test_the_limit_holds_prompt_answer_and_end(self, tokenizer, limit, fits):
        pairs = Dataset.from_list([self.PAIRS[1]])  # 1 + 4 + the end
        if fits:
            assert len(tokenize_pairs(pairs, tokenizer, limit)) == 1
        else:
            with pytest.raises(ValueError, match="1 of 1 pairs"):
                tokenize_pairs(pairs, tokenizer, limit)

    def test_too_long_is_refused_by_line_and_lengths(self, tokenizer):
        with pytest.raises(ValueError) as error:
            tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=5)
        message = str(error.value)
        assert "1 of 2 pairs are over max_length = 5 tokens" in message
        assert "line 5: prompt 1 + longer answer 5" in message
        assert "too_long='drop'" in message

    def test_the_rejected_answer_counts_as_well(self, tokenizer):
        with pytest.raises(ValueError, match="line 1: prompt 2 + longer answer 3".replace("+", r"\+")):
            tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=4)

    def test_too_long_is_dropped_counted_and_named(self, tokenizer, caplog):
        with caplog.at_level(logging.WARNING, logger="dpoviz.data"):
            out = tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=5, too_long="drop")
        assert out["line"][:] == [1]
        (record,) = caplog.records
        assert "1 of 2 pairs" in record.getMessage()
        assert "line 5" in record.getMessage()

    def test_nothing_is_said_where_nothing_is_dropped(self, tokenizer, caplog):
        tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=6, too_long="drop")
        assert not caplog.records

    def test_not_all_are_dropped(self, tokenizer):
        with pytest.raises(ValueError, match=r"2 of 2 pairs are over max_length = 3(.|\n)*raise max_length$"):
            tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=3, too_long="drop")

    def test_rows_are_numbered_where_lines_are_not_known(self, tokenizer):
        pairs = Dataset.from_list(list(self.PAIRS)).remove_columns("line")
        with pytest.raises(ValueError, match="row 1: prompt 1"):
            tokenize_pairs(pairs, tokenizer, max_length=5)

    def test_a_tokenizer_without_an_end(self, tokenizer):
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="tokenizer: has no end token"):
            tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=9)

    def test_a_prompt_of_no_tokens(self, tokenizer):
        pairs = Dataset.from_list([*self.PAIRS, pair(" ", "a", "b", 9)])
        with pytest.raises(ValueError, match="prompt: line 9 gives no token"):
            tokenize_pairs(pairs, tokenizer, max_length=9)

    def test_an_unknown_policy_for_long_pairs(self, tokenizer):
        with pytest.raises(ValueError, match="too_long: came 'cut', expected 'refuse' or 'drop'"):
            tokenize_pairs(Dataset.from_list(list(self.PAIRS)), tokenizer, max_length=9, too_long="cut")
