"""A flipped bit, a cut or an emptied file in anything that is kept: always noticed, and mended or set aside."""

import random
import resource
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.worlds import COMMON, CONFIG, TINY_WORLD, adapted, network, small_model, small_pairs, text_pairs, weights
from helpers.worlds import REFERENCE_SETTINGS as SETTINGS

from dpoviz.experiments import small
from dpoviz.experiments.small import small_world
from dpoviz.lm import cache, reference
from dpoviz.lm.cache import (
    Journal,
    lock_folder,
    open_entry,
    read_json,
    read_result,
    require_writable,
    write_entry,
    write_result,
)
from dpoviz.lm.reference import default_cache_dir, reference_pass
from dpoviz.training.checkpoint import Checkpoint
from dpoviz.training.loop import train

FLIPS = 12
"""Of each file, at random places."""


class ComputedAgain(Exception):
    """Raised where the real thing would compute: what was kept was not used."""


def compute_again(*args, **kwargs):
    raise ComputedAgain


def flipped(data, rng):
    """The bytes with one bit turned, at a random place."""
    place = rng.randrange(len(data) * 8)
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def damages(data, seed=0):
    """Ways in which a file goes wrong: flipped bits, 64 zeros, cut by a byte and by half, and emptied."""
    rng = random.Random(seed)
    ways = [flipped(data, rng) for _ in range(FLIPS)]
    start = rng.randrange(len(data))
    ways += [data[:start] + bytes(64) + data[start + 64 :], data[:-1], data[: len(data) // 2], b""]
    return [way for way in ways if way != data]


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def damaged(entry, tmp_path):
    """Yield, for every file of a kept folder and every damage, the file's name; the folder is then as it was."""
    good = tmp_path / "good"
    shutil.copytree(entry, good)

    def each():
        for file in files(good):
            for number, data in enumerate(damages(file.read_bytes())):
                shutil.rmtree(entry, ignore_errors=True)
                shutil.copytree(good, entry)
                (entry / file.relative_to(good)).write_bytes(data)
                yield f"{file.relative_to(good)} {number}"

    yield each()
    shutil.rmtree(entry, ignore_errors=True)
    shutil.copytree(good, entry)


class TestCaches:
    @pytest.mark.slow
    def test_reference(self, make_model, tokenizer, tmp_path, monkeypatch, caplog):
        model, kept = make_model("llama"), tmp_path / "cache"
        whole = reference_pass(model, tokenizer, text_pairs(), cache_dir=kept, **SETTINGS)[:]
        (entry,) = kept.glob("reference-*")
        monkeypatch.setattr(reference, "_compute", compute_again)
        with damaged(entry, tmp_path) as each:
            for name in each:
                caplog.clear()
                with pytest.raises(ComputedAgain):
                    reference_pass(model, tokenizer, text_pairs(), cache_dir=kept, **SETTINGS)
                    pytest.fail(f"{name}: nothing was noticed")
                (line,) = caplog.messages
                assert str(entry) in line and (name.split()[0] in line or "checksums" in name or "is missing" in line)
        assert reference_pass(model, tokenizer, text_pairs(), cache_dir=kept, **SETTINGS)[:] == whole  # the control

    @pytest.mark.slow
    def test_small_world(self, tmp_path, monkeypatch):
        kept = tmp_path / "cache"
        world = small_world(TINY_WORLD, cache_dir=kept, progress=False)
        (entry,) = kept.glob("small-world-*")
        monkeypatch.setattr(small, "_build", compute_again)
        with damaged(entry, tmp_path) as each:
            for name in each:
                with pytest.raises(ComputedAgain):
                    small_world(TINY_WORLD, cache_dir=kept, progress=False)
                    pytest.fail(f"{name}: nothing was noticed")
        again = small_world(TINY_WORLD, cache_dir=kept, progress=False)  # the control
        assert torch.equal(weights(again.reference), weights(world.reference))

    def test_journal(self, tmp_path):
        batch = {"numbers": np.linspace(0, 1, 50), "lengths": np.arange(7)}
        Journal(tmp_path).add("a", batch)
        (file,) = files(tmp_path)
        data = file.read_bytes()
        rng = random.Random(0)
        for way in [*damages(data), *(flipped(data, rng) for _ in range(500))]:
            file.write_bytes(way)
            found = Journal(tmp_path).get("a")
            # some bits of a zip archive, as the time of a file, say nothing of what it holds
            assert found is None or {k: v.tobytes() for k, v in found.items()} == {
                k: v.tobytes() for k, v in batch.items()
            }

    def test_an_entry_without_checksums_is_none(self, tmp_path, caplog):
        write_entry(tmp_path / "entry", lambda place: (place / "a").write_text("1"))
        assert open_entry(tmp_path / "entry", lambda place: (place / "a").read_text()) == "1"
        (tmp_path / "entry" / cache.CHECKSUMS).unlink()
        assert open_entry(tmp_path / "entry", lambda place: (place / "a").read_text()) is None
        assert "checksums.json is missing" in caplog.text
        assert not (tmp_path / "entry").exists()

    def test_an_entry_that_another_process_finished_stays(self, tmp_path):
        def write(place):
            (place / "a").write_text("mine")
            write_entry(tmp_path / "entry", lambda other: (other / "a").write_text("theirs"))

        write_entry(tmp_path / "entry", write)
        assert open_entry(tmp_path / "entry", lambda place: (place / "a").read_text()) == "theirs"
        assert [path.name for path in tmp_path.iterdir()] == ["entry"]

    def test_an_interrupted_write_leaves_nothing(self, tmp_path):
        def killed(place):
            (place / "a").write_text("half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_entry(tmp_path / "entry", killed)
        assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, pairs, the folder of a finished run, and what that ended with."""
    model = small_model()
    pairs, out = small_pairs(model), tmp_path_factory.mktemp("run")
    policy, beta = adapted(model), network()
    history = train(policy, beta, pairs, CONFIG, out=out, **COMMON).history
    return model, pairs, out, weights(policy, beta), history


class TestCheckpoints:
    """CONFIG keeps those of steps 6 and 7. The policy has adapters with dropout: its random state counts."""

    def resumed(self, whole, out):
        model, pairs, _, expected, history = whole
        policy, beta = adapted(model), network()
        again = train(policy, beta, pairs, CONFIG, out=out, **COMMON).history
        assert torch.equal(weights(policy, beta), expected)
        pd.testing.assert_frame_equal(again, history, check_exact=True)

    def test_two_are_kept(self, whole):
        assert [path.name for path in sorted(whole[2].iterdir())] == ["checkpoint-6", "checkpoint-7"]

    @pytest.mark.slow
    def test_any_damage_is_noticed_and_the_one_before_is_used(self, whole, tmp_path, caplog):
        """By what `load` hands on to accelerate; the tests below go on from it."""
        out, loaded = tmp_path / "run", []
        shutil.copytree(whole[2], out)
        alone = {"is_main_process": True, "process_index": 0, "wait_for_everyone": lambda: None}
        accelerator = SimpleNamespace(**alone, load_state=loaded.append)
        identity = read_json(out / "checkpoint-7" / "run.json")["identity"]
        seen = set()
        with damaged(out / "checkpoint-7", tmp_path) as each:
            for name in each:
                caplog.clear()
                assert Checkpoint(accelerator, out, identity).load()[0] == 6, name
                (line,) = caplog.messages
                assert "goes on from checkpoint-6" in line
                assert name.split()[0] in line or "checksums" in name
                assert (out / "checkpoint-7.damaged").is_dir()
                seen.add(name.split()[0])
        assert len(seen) == 10  # weights, beta, betas, two optimizers, two schedules, random state, run.json, sums
        assert Checkpoint(accelerator, out, identity).load()[0] == 7  # the control
        assert loaded == [str(out / "checkpoint-6")] * (len(loaded) - 1) + [str(out / "checkpoint-7")]

    @pytest.mark.parametrize(
        "name", ["model.safetensors", "random_states_0.pkl", "run.json", "custom_checkpoint_0.pkl"]
    )
    def test_it_ends_as_if_nothing_had_been(self, whole, tmp_path, name):
        out = tmp_path / "run"
        shutil.copytree(whole[2], out)
        file = out / "checkpoint-7" / name
        file.write_bytes(file.read_bytes()[:-1])
        self.resumed(whole, out)
        assert sorted(path.name for path in out.iterdir()) == ["checkpoint-6", "checkpoint-7", "checkpoint-7.damaged"]

    def test_where_none_is_left_it_starts_anew(self, whole, tmp_path, caplog):
        out = tmp_path / "run"
        shutil.copytree(whole[2], out)
        for step in (6, 7):
            (out / f"checkpoint-{step}" / "run.json").write_text("{")
        self.resumed(whole, out)
        lines = [line for line in caplog.messages if "cannot be used" in line]
        assert "the run goes on from checkpoint-6" in lines[0] and "the run starts anew" in lines[1]

    def test_a_full_disk_leaves_the_ones_before(self, whole, tmp_path):
        model, pairs = whole[:2]
        out = tmp_path / "run"
        shutil.copytree(whole[2], out)
        shutil.rmtree(out / "checkpoint-7")
        before = {path: path.read_bytes() for path in files(out)}
        with (
            limited(2000),
            pytest.raises(OSError, match=rf"{out} cannot be written, with [\d,]+ bytes free there \(.+\)"),
        ):
            train(adapted(model), network(), pairs, CONFIG, out=out, **COMMON)
        assert {path: path.read_bytes() for path in files(out)} == before
        self.resumed(whole, out)


@contextmanager
def limited(size):
    """No file grows beyond some bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFullDisk:
    def test_reference(self, make_model, tokenizer, tmp_path):
        model = make_model("llama")
        whole = reference_pass(model, tokenizer, text_pairs(), **SETTINGS)[:]
        with (
            limited(1000),
            pytest.raises(OSError, match=rf"{tmp_path}/.* cannot be written, with [\d,]+ bytes free there \(.+\)"),
        ):
            reference_pass(model, tokenizer, text_pairs(), cache_dir=tmp_path, **SETTINGS)
        assert reference_pass(model, tokenizer, text_pairs(), cache_dir=tmp_path, **SETTINGS)[:] == whole

    @pytest.mark.slow
    def test_small_world(self, tmp_path):
        with limited(1000), pytest.raises(OSError, match=rf"{tmp_path}/small-world-.* cannot be written"):
            small_world(TINY_WORLD, cache_dir=tmp_path, progress=False)
        assert list(tmp_path.iterdir()) == []


class TestFolders:
    def test_what_cannot_be_written_is_refused_before_anything_is_computed(
        self, make_model, tokenizer, tmp_path, monkeypatch
    ):
        place = tmp_path / "file"
        place.write_text("")
        monkeypatch.setattr(reference, "_compute", compute_again)
        monkeypatch.setattr(small, "_build", compute_again)
        with pytest.raises(OSError, match=rf"cache: got {place}.*, which cannot be written \(.+\); give another"):
            reference_pass(make_model("llama"), tokenizer, text_pairs(), cache_dir=place, **SETTINGS)
        with pytest.raises(OSError, match=rf"cache: got {place}, which cannot be written"):
            small_world(TINY_WORLD, cache_dir=place, progress=False)

    def test_require_writable(self, tmp_path):
        require_writable(tmp_path / "a" / "b", "out")
        assert list((tmp_path / "a" / "b").iterdir()) == []
        with pytest.raises(OSError, match=r"out: got /proc/nowhere, which cannot be written \(No such file"):
            require_writable(type(tmp_path)("/proc/nowhere"), "out")

    def test_no_home(self, monkeypatch):
        monkeypatch.delenv("DPOVIZ_CACHE", raising=False)
        monkeypatch.setattr("pathlib.Path.home", compute_home)
        with pytest.raises(OSError, match="DPOVIZ_CACHE: got nothing, and this user has no home"):
            default_cache_dir()

    @pytest.mark.parametrize("text", ["", "{", "[1, 2", "[" * 200_000, '{"a": "\\x"}', "\udcff"])
    def test_a_file_that_is_no_json_is_named(self, tmp_path, text):
        path = tmp_path / "config.json"
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match=rf"{path}: not JSON \(.+\); delete it"):
            read_json(path)

    def test_a_folder_is_held_by_one(self, tmp_path):
        with lock_folder(tmp_path / "run"):
            with pytest.raises(OSError, match=r"out: .*run is in use by process \d+ on .+; wait for its end"):
                with lock_folder(tmp_path / "run"):
                    pass
            with lock_folder(tmp_path / "other"):
                pass
        with lock_folder(tmp_path / "run"):
            pass


def compute_home():
    raise RuntimeError("Could not determine home directory.")


def test_damage_to_the_result_of_a_job_is_noticed(tmp_path):
    file, result = tmp_path / "runs" / "a job.json", {"h": {"1": [0.125, -3.5]}, "arm": "β", "rows": [3, 1]}
    write_result(file, result)
    assert read_result(file) == result
    assert [path.name for path in file.parent.iterdir()] == ["a job.json"]
    sound = file.read_bytes()
    for i in range(8 * len(sound)):
        changed = bytearray(sound)
        changed[i // 8] ^= 1 << i % 8
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="delete it and give the command again"):
            read_result(file)
    for damaged in damages(sound):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a job\.json"):
            read_result(file)
