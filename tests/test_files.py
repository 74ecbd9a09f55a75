"""Files of every kind give the same rows, or are named for what they are with what to do."""

import bz2
import csv
import gzip
import json
import lzma

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from dpoviz.data.records import load_pairs

ROWS = [{"prompt": f"Question {i}, \u2028Zoë?", "chosen": f"yes\n{i}", "rejected": "NA", "task": "t"} for i in range(3)]
NAMES = ("prompt", "chosen", "rejected", "task")
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
LIST = json.dumps(ROWS, indent=1)
PACKINGS = {
    "gz": lambda data: gzip.compress(data, mtime=0),  # the time would give each process another name of the test
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda raw: pa.compress(raw, codec="zstd", asbytes=True),
}


def table(delimiter=","):
    lines = [NAMES, *(tuple(row[name] for name in NAMES) for row in ROWS)]
    quoted = (delimiter.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines)
    return "\r\n".join(quoted)


def assert_whole(pairs):
    assert [{name: pair[name] for name in NAMES} for pair in pairs] == ROWS


@pytest.mark.parametrize(
    ("name", "raw", "lines"),
    [
        ("a.jsonl", LINES.encode(), [1, 2, 3]),
        ("a.NDJSON", LINES.encode(), [1, 2, 3]),
        ("a.json", LINES.encode(), [1, 2, 3]),
        ("a.jsonl", LIST.encode(), [1, 2, 3]),
        ("a.JSON", LIST.encode(), [1, 2, 3]),
        ("a.json", json.dumps({"data": ROWS}).encode(), [1, 2, 3]),
        ("a.jsonl", LINES.replace("\n", "\r").encode(), [1, 2, 3]),
        ("a.jsonl", LINES.replace("\n", "\r\n\r\n").encode("utf-8-sig"), [1, 3, 5]),
        ("a.jsonl", LINES.encode("utf-16"), [1, 2, 3]),
        ("a.jsonl", LINES.encode("utf-16-be"), [1, 2, 3]),
        ("a.json", LIST.encode("utf-16"), [1, 2, 3]),
        ("a.csv", table().encode(), [2, 4, 6]),  # a record begins where its first cell does
        ("a.csv", table(";").encode("utf-8-sig"), [2, 4, 6]),
        ("a.TSV", table("\t").encode(), [2, 4, 6]),
        ("a.csv", table().encode("utf-16"), [2, 4, 6]),
        *((f"a.jsonl.{kind}", pack(LINES.encode()), [1, 2, 3]) for kind, pack in PACKINGS.items()),
        ("a.json.gz", gzip.compress(LIST.encode(), mtime=0), [1, 2, 3]),
        ("a.csv.zst", PACKINGS["zst"](table().encode()), [2, 4, 6]),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0), [1, 2, 3]),  # whatever its name says
    ],
)
def test_a_files_rows_and_lines(tmp_path, name, raw, lines):
    (tmp_path / name).write_bytes(raw)
    pairs = load_pairs(tmp_path / name)
    assert_whole(pairs)
    assert pairs["line"][:] == lines


@pytest.mark.parametrize(
    "kind", ["parquet", "arrow", "save_to_disk", "saved splits", "clone", "clone of splits", "beside"]
)
def test_folders_and_tables(tmp_path, kind, caplog):
    rows, other = Dataset.from_list(ROWS), Dataset.from_list([{**ROWS[0], "prompt": "not this"}])
    if kind == "parquet":
        rows.to_parquet(tmp_path / "a.parquet")
    elif kind in ("arrow", "save_to_disk"):
        rows.save_to_disk(tmp_path / "saved")
    elif kind == "saved splits":
        DatasetDict(train=rows, test=other).save_to_disk(tmp_path / "saved")
    elif kind == "clone":
        (tmp_path / "data").mkdir()
        rows.to_parquet(tmp_path / "data" / "train_prefs-00000-of-00001.parquet")
        other.to_parquet(tmp_path / "data" / "train_sft-00000-of-00001.parquet")
        splits = "".join(f"  - split: {s}\n    path: data/{s}-*\n" for s in ("train_prefs", "train_sft"))
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
    elif kind == "clone of splits":
        for part, own in (("train", LINES), ("test", LINES.replace("Question", "Other"))):
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / f"{part}.jsonl.gz").write_bytes(gzip.compress(own.encode(), mtime=0))
        (tmp_path / "README.md").write_text("# A set")
    else:
        (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-8")
        (tmp_path / "dataset_infos.json").write_text("{}")
        (tmp_path / ".cache.json").write_text("{")
    source = {"arrow": tmp_path / "saved" / "data-00000-of-00001.arrow"}.get(kind, tmp_path)
    source = tmp_path / "saved" if kind in ("save_to_disk", "saved splits") else source
    pairs = load_pairs(source, split="train_prefs" if kind == "clone" else "train")
    assert_whole(pairs)
    assert "file" not in pairs.column_names
    assert str(tmp_path) not in caplog.text  # a warning in a notebook shows no path of the machine
    if kind == "clone of splits":
        assert f"{tmp_path.name}: data/train.jsonl.gz is read; not data/test.jsonl.gz" in caplog.text
    if kind == "clone":
        with pytest.raises(ValueError, match="split: got 'train', expected one of train_prefs, train_sft"):
            load_pairs(source)


def test_files_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text(LINES, encoding="utf-8")
    expected = ["a/train.jsonl"] * 3 + ["b/train.jsonl"] * 3
    assert load_pairs(tmp_path)["file"][:] == expected
    assert load_pairs([tmp_path / "a" / "train.jsonl", str(tmp_path / "b" / "train.jsonl")])["file"][:] == expected


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", LINES + '{"prompt": ' + "[" * 5_000 + "]" * 5_000 + "}", "line 4: not JSON .nested too deeply"),
        ("a.jsonl", LINES + '{"prompt": ' + "[" * 300 + "]" * 300 + "}", "line 4: .*nested over 25 levels"),
        ("a.json", "[" + "[" * 5_000 + "]" * 5_000 + "]", "a.json: not JSON .nested too deeply"),
        ("a.jsonl", LINES + '{"prompt": "a", "prompt": "b"}', "line 4: the key 'prompt' stands twice"),
        ("a.json", '[{"a": 1}, {"prompt": {"b": 1, "b": 2}}]', "record 2: the key 'b' stands twice"),
        ("a.jsonl", LINES + '{"prompt": ' + "9" * 5_000 + "}", "line 4: not JSON .Exceeds the limit"),
        ("a.jsonl", LINES + '{"\\ud83d": 1, ' + json.dumps(ROWS[0])[1:], "line 4: field .*half of a surrogate pair"),
        ("a.csv", "prompt,chosen,rejected,task\nq,x,y\nr,x,y,t", "line 2: got 3 cells, expected 4"),
        ("a.csv", "prompt,chosen,rejected,task\n,x,y,t", "line 2: field 'prompt': got NoneType, expected text"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "not whole gzip"),
        ("a.jsonl.zst", PACKINGS["zst"](LINES.encode())[:-9], "not whole zstd"),
        ("a.csv", b"prompt,chosen\n\xff\xfe,x", "not UTF-8"),
        ("a.xlsx", b"PK\x03\x04", "is a zip archive or an Excel sheet"),
        ("a.pkl", b"\x80\x04x", "is a Python pickle"),
        ("a.txt", "What?", "got the suffix '.txt', expected one of .jsonl"),
        ("state.json", "{}", "not a whole folder of Dataset.save_to_disk"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_place(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(ValueError, match=message):
        load_pairs(tmp_path if name == "state.json" else tmp_path / name)


def test_the_deepest_nest_that_is_taken(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0])[:-1] + ', "m": ' + '{"a":' * 23 + "[1]" + "}" * 23 + "}")
    assert json.dumps(load_pairs(path)["m"][0]).count("a") == 23


def test_extreme_numbers_and_long_cells(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({**row, "n": n}) + "\n" for row, n in zip(ROWS, (1e308, 10**40, -0.0), strict=True))
    )
    assert [json.loads(n) for n in load_pairs(path)["n"]] == [1e308, 10**40, 0.0]
    path.write_text(LINES.replace("}", ', "n": 1e999}'))
    assert load_pairs(path)["n"][:] == [float("inf")] * 3
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([NAMES, ("q" * 300_000, "x", "y", "t")])
    assert len(load_pairs(tmp_path / "a.csv")["prompt"][0]) == 300_000


def test_folders_of_several_sets_are_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(LINES, encoding="utf-8")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(ValueError, match=r"got files in several folders \(one/a.jsonl, two/a.jsonl\)"):
        load_pairs(tmp_path)
    assert len(load_pairs(tmp_path / "one")) == 3


def test_another_object_is_no_source():
    with pytest.raises(ValueError, match=r"data: got dict, expected a file, a folder or a datasets.Dataset"):
        load_pairs(ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.parquet"])
def test_an_empty_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}: (holds no pairs|not JSON|not Parquet)"):
        load_pairs(tmp_path / name)
