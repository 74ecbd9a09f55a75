"""The settings of each command: from the command line, from a file, and what is refused by name."""

import json
from dataclasses import asdict, fields, is_dataclass, replace

import pytest
import yaml
from helpers.launch import flat

from dpoviz import cli
from dpoviz.cli import COMMANDS, main
from dpoviz.experiments.config import DemoConfig, RealConfig
from dpoviz.experiments.options import read_settings, with_settings

WITH_SETTINGS = [name for name, command in COMMANDS.items() if command.settings(False) is not None]

# a value that differs from the default and is accepted, for the fields whose default does not suggest one
OTHER = {
    "data": ("a.jsonl", "b.jsonl"),
    "model": "my-model",
    "preset": "shp",
    "task": "math",
    "columns": {"question": "prompt"},
    "ignore_columns": ("system",),
    "chat": ("math", "code"),
    "pairs_per_task": 7,
    "rule": "beta-dpo",
    "strength": 0.25,
    "tasks": ("code",),
    "dtype": "bfloat16",
    "precision": "bfloat16",
    "contenders": ("constant", "lsc"),
    "tuned": ("constant", "lsc"),
    "conditions": ("uniform noise",),
    "scales": (0.3, 0.5),
    "learning_rates": (1e-3, 2e-3),
    "scale_min": 0.05,
    "scale_max": 0.5,
    "alpha": 0.7,
    "stage1_steps": 11,
    "stage2_steps": 12,
    "batch_size": 13,
    "warmup_steps": 3,
    "log_every": 4,
    "checkpoint_every": 6,
    "policy_learning_rate": 3e-5,
    "lambda_consistency": 0.5,
    "rescore_reference": True,
    "a": (0.0, 0.5),
    "reward": "module:function",
    "variants": ("inverse",),
    "prompts": 5,
    "kl": 0.4,
    "max_new_tokens": 47,
    "device": "cpu",
    "tables": ("steps",),
    "arms": ("constant", "slopes"),
    "epochs": (1, 3),
}
OPEN = {"rescore-reference"}
"""Yes, no or None: said by a word."""

BESIDE = {"strength": {"rule": "lsc"}}
APART = ("strength", "gradient_accumulation")  # they do not go with the other values

"""What a value needs beside it."""


def other(name, value):
    if name in OTHER and (value is None or isinstance(OTHER[name], type(value))):  # two commands may share a name
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 0.9


def leaves(settings, prefix=""):
    """(option without dashes, path of names, value) of each field, by the options' rule: training's stand flat."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            for option, path, own in leaves(value, "" if field.name == "training" else f"{field.name}."):
                yield option, (field.name, *path), own
        else:
            yield prefix + field.name.replace("_", "-"), (field.name,), value


def words(option, value):
    """A value as the words of a command line."""
    if isinstance(value, bool) and option not in OPEN:
        return [f"--{option}" if value else f"--no-{option}"]
    if isinstance(value, tuple):
        return [f"--{option}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{option}", *(f"{theirs}={ours}" for theirs, ours in value.items())]
    return [f"--{option}", str(value)]


PLACE = {"retilt": ["a-run"]}
"""What a command takes without the name of an option."""


def parsed(name, *arguments):
    return cli._parse(name, COMMANDS[name], [*PLACE.get(name, []), *map(str, arguments)]).settings


def at(settings, path):
    for name in path:
        settings = getattr(settings, name)
    return settings


FIELDS = [(name, *leaf) for name in WITH_SETTINGS for leaf in leaves(COMMANDS[name].settings(False))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "option", "path", "value"), FIELDS, ids=[f"{n} {o}" for n, o, *_ in FIELDS])
def test_every_setting_by_an_option_and_by_a_file(name, option, path, value, tmp_path):
    new = other(path[-1], value)
    assert new != value
    beside = BESIDE.get(path[-1], {})
    by_option = parsed(name, *words(option, new), *(word for own in beside.items() for word in words(*own)))
    assert at(by_option, path) == new
    nested = {path[-1]: new}
    for group in path[-2::-1]:
        nested = {group: nested}
    for suffix, write in (("json", json.dumps), ("yaml", lambda own: yaml.safe_dump(json.loads(json.dumps(own))))):
        file = tmp_path / f"settings.{suffix}"
        file.write_text(write({**nested, **beside}))
        by_file = parsed(name, "--config", file)
        assert at(by_file, path) == new and by_file == by_option
    # nothing else has moved, but the seed of the demo, which is that of its world too
    if option == "fast":  # it is a set of settings
        return
    moved = {path, *((key,) for key in beside), *([("world", "seed")] if (name, option) == ("demo", "seed") else [])}
    default = COMMANDS[name].settings(False)
    assert {p for _, p, own in leaves(default) if at(by_option, p) != own} == moved


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_what_a_run_saves_gives_its_settings_again(name, tmp_path):
    options = [word for _, option, path, value in FIELDS if _ == name and path[-1] not in APART
               for word in words(option, other(path[-1], value))]  # fmt: skip
    settings = parsed(name, *options)
    assert settings != COMMANDS[name].settings(False)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"command": name, **asdict(settings)}))
    assert parsed(name, "--config", file) == settings == parsed(name, f"--config={file}")


@pytest.mark.parametrize("name", ["demo", "compare"])
def test_a_first_look_leaves_the_folder_of_the_full_run_free(name, tmp_path):
    def out(*options):
        return str(cli._parse(name, COMMANDS[name], list(map(str, options))).out)

    assert (out(), out("--fast")) == (f"dpoviz-{name}", f"dpoviz-{name}-fast")
    assert out("--fast", "--out", "here") == "here"
    if name == "demo":  # whose settings say whether they are those of --fast
        (tmp_path / "s.json").write_text('{"fast": true}')
        assert out("--config", tmp_path / "s.json") == "dpoviz-demo-fast"


class TestPrecedence:
    def test_an_option_stands_above_the_file_and_the_file_above_the_default(self, tmp_path):
        file = tmp_path / "s.yaml"
        file.write_text("batch_size: 5\nlambda_range: 2\nworld:\n  layers: 1\n")
        found = parsed("demo", "--fast", "--config", file, "--batch-size", 9)
        assert (found.training.batch_size, found.training.lambda_range, found.world.layers) == (9, 2.0, 1)
        assert found.world.problems == DemoConfig.default(fast=True).world.problems

    @pytest.mark.parametrize("seeds", [(0, 3), (3, 3), (3, 5), (5, 3)])
    def test_a_saved_pair_of_seeds_comes_back(self, tmp_path, seeds):
        training, world = seeds
        first = parsed("demo", "--seed", training, "--world.seed", world)
        assert (first.training.seed, first.world.seed) == seeds
        file = tmp_path / "s.json"
        file.write_text(json.dumps(asdict(first)))
        assert parsed("demo", "--config", file) == first

    def test_a_new_seed_is_that_of_the_world_too_where_both_were_one(self, tmp_path):
        file = tmp_path / "s.yaml"
        file.write_text("seed: 4")
        assert parsed("demo", "--config", file).world.seed == 4
        assert parsed("demo", "--config", file, "--seed", 6).world.seed == 6


def refusal(capsys, *arguments):
    assert main(list(map(str, arguments))) == 2
    return flat(capsys.readouterr().err)


class TestRefusedFiles:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("bath_size: 3", "bath_size: no such setting; did you mean batch_size?"),
            ("training:\n  sed: 3", "sed: no such setting; did you mean seed?"),
            ("world: 3", "world: got 3, expected settings by name"),
            ("batch_size: many", "batch_size: got 'many', expected a value of type int"),
            ("batch_size: 2.5", "batch_size: got 2.5, expected a value of type int"),
            ("batch_size: true", "batch_size: got True, expected a value of type int"),
            ("batch_size: [3]", "batch_size: got [3], expected a value of type int"),
            ("seed: null", "seed: got None, expected a value of type int"),
            ("alpha: much", "alpha: got 'much', expected a value of type float"),
            ("dropout: 1", "dropout: got 1, expected a value of type bool"),
            ("stage1_steps: -3", "stage1_steps: got -3, expected"),
            ("initial_scale: 0", "initial_scale: got 0.0, expected"),
            ("command: train", "settings of dpoviz train, expected those of dpoviz demo"),
            ("- 1", "holds a list, expected settings by name"),
            ("", "expected settings by name"),
            ("a: [", "is not YAML or JSON"),
        ],
    )
    def test_by_name_and_value(self, tmp_path, capsys, text, said):
        file, out = tmp_path / "s.yaml", tmp_path / "out"
        file.write_text(text)
        error = refusal(capsys, "demo", "--config", file, "--out", out)
        assert said in error and str(file) in error
        assert not out.exists()

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [("train", "data: 3", "data: got 3, expected a list"), ("train", "columns: prompt", "columns: got 'prompt'"),
         ("train", "data: [3]", "data: got 3, expected"), ("train", "strength: x\nrule: lsc", "strength: got 'x'"),
         ("compare", "scales: [a]", "scales: got 'a', expected"), ("bench", "dtype: float64", "dtype: got 'float64'"),
         ("sample", "tasks: [poetry]", "tasks: got ['poetry']")],
    )  # fmt: skip
    def test_of_other_commands(self, tmp_path, capsys, name, text, said):
        (tmp_path / "s.yaml").write_text(text)
        assert said in refusal(capsys, name, "--config", tmp_path / "s.yaml", "--out", tmp_path / "out")

    def test_no_file(self, tmp_path, capsys):
        assert "no file" in refusal(capsys, "demo", "--config", tmp_path / "nothing.json")

    def test_a_number_that_yaml_reads_as_text(self, tmp_path):
        (tmp_path / "s.yaml").write_text("policy_learning_rate: 1e-4")  # YAML asks for 1.0e-4
        assert read_settings(tmp_path / "s.yaml", RealConfig(), "train").training.policy_learning_rate == 1e-4


def test_a_name_of_two_groups_stands_for_training():
    found = with_settings(DemoConfig(), {"max_new_tokens": 7})
    assert (found.training.max_new_tokens, found.world.max_new_tokens) == (7, DemoConfig().world.max_new_tokens)
    assert found == replace(DemoConfig(), training=replace(DemoConfig().training, max_new_tokens=7))


class TestRefusedOptions:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["demo", "--bath-size", "3"], "--batch-size"),
            (["demo", "--batch-size", "many"], "many"),
            (["demo", "--batch-size"], "--batch-size"),
            (["train", "--columns", "prompt"], "columns: got 'prompt'"),
            (["bench", "--dtype", "float64"], "float64"),
            (["dmeo"], "got the command 'dmeo', expected one of demo, train"),
            (["dmeo"], "did you mean demo?"),
            (["report"], "FOLDER"),
        ],
    )
    def test_status_2_and_the_name(self, capsys, arguments, said):
        assert said.lower() in refusal(capsys, *arguments).lower()
