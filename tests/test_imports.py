"""Each room imports only what the design lets it import; read from the source."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers.launch import python

import dpoviz

PACKAGE = Path(dpoviz.__file__).parent
MATHEMATICS = {"forms", "validation", "regularizers", "beta", "losses", "rules"}
WORLDS = {"tabular", "allocation"}
ALLOWED = {
    "forms": {"validation"},
    "validation": set(),
    "old_names": set(),
    "translation": set(),
    "regularizers": {"validation"},
    "beta": {"validation"},
    "losses": {"forms", "regularizers", "validation"},
    "rules": {"forms", "losses", "beta", "validation"},
    "tabular": {"forms", "losses", "validation"},
    "allocation": {"forms", "losses", "validation", "translation"},
    "data": {"validation"},
    "lm": {"data", "validation"},
    "training": {*MATHEMATICS, "data", "lm"},
    "trl": {*MATHEMATICS, "data", "lm", "training", "trl_held_out"},
    "trl_held_out": {*MATHEMATICS, "data", "lm", "training", "analysis"},
    "analysis": {"forms", "allocation", "validation", "translation"},
    "experiments": {*MATHEMATICS, *WORLDS, "data", "lm", "training", "analysis", "trl", "translation"},
    "learn": {*MATHEMATICS, *WORLDS, "data", "lm", "training", "analysis", "experiments", "translation"},
    "learn.trl_run": {"forms", "beta", "lm", "training", "analysis", "experiments", "translation", "trl_held_out"},
    "cli": {"experiments", "analysis", "learn", "lm", "translation"},
    "__main__": {"cli"},
}
"""What the modules of a room may import beside their own room; a module named here has a row of its own."""

NO_TORCH = (
    "analysis/diagnose.py",
    "analysis/plots.py",
    "analysis/plots_comparison.py",
    "analysis/plots_runs.py",
    "analysis/report.py",
    "cli.py",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """The modules of dpoviz that a file imports, without the leading "dpoviz."."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            # the module itself, and what is a module among the names taken from a room
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if is_module(node.module, alias.name)}
    return {m.removeprefix("dpoviz.") for m in found if m.startswith("dpoviz.")}


def is_module(package: str, attribute: str) -> bool:
    if package.split(".")[0] != "dpoviz":
        return False
    place = PACKAGE.joinpath(*package.split(".")[1:], attribute)
    return place.with_suffix(".py").is_file() or place.is_dir()


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent != PACKAGE or path.stem != "__init__"], ids=name
)
def test_a_room_imports_only_what_it_may(path):
    own = name(path)
    row = ALLOWED.get(own, ALLOWED.get(room(own)))
    assert row is not None, f"{own}: a new room; say here what it may import"
    assert {room(m) for m in imported(path)} - {room(own)} <= row


def test_the_reader_of_imports_sees_them():
    assert {"lm.scoring", "lm.entropy", "data.tokens"} <= imported(PACKAGE / "lm" / "reference.py")
    assert "data.tasks" in imported(PACKAGE / "experiments" / "small.py")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nobody_imports_the_underscore_name_of_another_module(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpoviz"):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")], path


@pytest.mark.slow
@pytest.mark.parametrize("path", NO_TORCH)
def test_drawing_and_printing_import_no_heavy_library(path):
    heavy = {"torch", "transformers", "datasets", "accelerate"}
    found = set()
    for node in ast.parse(
        (PACKAGE / path).read_text(encoding="utf-8")
    ).body:  # inside a function it is paid for when used
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert not found & heavy


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_pyplot(path):
    modules = [
        n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom | ast.Import)
    ]
    assert "pyplot" not in ast.unparse(ast.Module(modules, []))


HEAVY = ("torch", "transformers", "datasets", "matplotlib", "accelerate")


def loaded_after(*steps):
    """The heavy libraries that one fresh Python has loaded after each of some pieces of code."""
    lines = ["import sys"]
    for step in steps:
        lines += [step, f"print('loaded:', *(name for name in {HEAVY!r} if name in sys.modules))"]
    said = python("\n".join(lines)).splitlines()
    return [set(line.split()[1:]) for line in said if line.startswith("loaded:")]


COMMANDS = (
    (["--help"], 0),
    (["--version"], 0),
    ([], 0),
    (["demo", "--help"], 0),
    (["train", "--help"], 0),
    (["compare", "--help"], 0),
    (["dmeo"], 2),
    (["demo", "--bath-size", "3"], 2),
    (["train", "--batch-size", "many"], 2),
    (["train", "--batch-size", "0"], 2),
    (["demo", "--config", "no-such-file.json"], 2),
)


def test_help_version_and_a_typo_load_nothing_heavy():
    """One after the other in one process: what any of them loads is there after it."""
    steps = [f"from dpoviz.cli import main; assert main({words!r}) == {status}" for words, status in COMMANDS]
    loaded = loaded_after(*steps)
    assert dict(zip(map(str, COMMANDS), loaded, strict=True)) == {str(command): set() for command in COMMANDS}


@pytest.mark.slow
def test_the_package_loads_what_is_used():
    nothing, settings, loss, models = loaded_after(
        "import dpoviz; dpoviz.__version__",
        "from dpoviz import TrainConfig",
        "from dpoviz import dpo_loss",
        "from dpoviz import load_lm",
    )
    assert nothing == settings == set()
    assert loss == {"torch"}
    assert "transformers" in models  # the control: it would be seen


def test_version():
    assert dpoviz.__version__ == version("dpoviz")


def test_public_names():
    """What notebooks and other people's code use, each the object of its module."""
    names = """dpo_loss total_loss range_penalty smoothness_penalty entropy_penalty task_consistency_penalty
        gradients_on_beta Beta BetaNetwork ConstantBeta EntropyBeta TaskBeta load_pairs tokenize_pairs split_by_group
        load_lm add_lora tiny_lm tiny_tokenizer score_answers sample_answers estimate_entropy reference_pass TrainConfig
        train beta_table summarize plot_beta_by_task plot_beta_vs_entropy plot_beta_gradients plot_training"""
    assert set(names.split()) <= set(dpoviz.__all__) <= set(dir(dpoviz))
    for own in dpoviz.__all__:
        found = getattr(dpoviz, own)
        assert found.__name__ == own and found.__module__.startswith("dpoviz."), own
        assert found.__doc__, own
    with pytest.raises(AttributeError, match="no attribute 'dpo_los'"):
        dpoviz.dpo_los  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {own: f"dpoviz.{module}" for module, names in dpoviz._HOMES.items() for own in names}


@pytest.mark.slow
def test_mypy_sees_a_wrong_type(tmp_path):
    """The control of `mypy` in .ci/run: with the project's settings, a planted error is found."""
    pytest.importorskip("mypy")
    planted = tmp_path / "planted.py"
    planted.write_text("def planted(x: int) -> str:\n    return x\n")
    settings = PACKAGE.parent / "pyproject.toml"
    line = [sys.executable, "-m", "mypy", "--config-file", settings, "--cache-dir", tmp_path / "cache", planted]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "planted.py:2: error" in done.stdout and "[return-value]" in done.stdout
