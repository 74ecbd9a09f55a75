"""Who may import whom, as the README's table of modules says; read from the source."""

import ast
from pathlib import Path

import pytest

import dpoviz

PACKAGE = Path(dpoviz.__file__).parent
ALLOWED = {
    "__init__": None,
    "__main__": {"cli"},
    "losses": {"regularizers"},  # the total objective sums the penalties
    "regularizers": set(),
    "beta": set(),
    "tabular": set(),
    "logprobs": set(),
    "presets": set(),
    "data": {"presets"},
    "tasks": set(),
    "models": set(),
    "journal": set(),
    "processes": set(),
    "entropy": {"logprobs", "journal", "processes"},
    "reference": {"logprobs", "entropy", "data", "journal", "processes"},
    "rules": {"losses", "beta"},
    "perturbed": {"logprobs"},
    "train": {"losses", "regularizers", "beta", "rules", "perturbed", "logprobs", "data"},
    "methods": {"beta", "losses", "rules", "train"},
    "stages": {"beta", "data", "methods", "rules", "logprobs", "losses", "processes", "table", "train"},
    "trl": {"beta", "losses", "regularizers", "train"},
    "sandbox": set(),
    "onpolicy": {"logprobs", "tasks", "data", "journal", "sandbox"},
    "evaluate": {"logprobs", "processes", "tasks"},
    "frontier": set(),
    "table": {"losses"},
    "plots": set(),
    "plots_compare": {"plots"},
    "report": {"plots", "table"},
    "explore": {"plots", "tabular", "losses", "regularizers", "beta"},
    "checks": {"losses"},
    "forecast": {"data", "logprobs"},
    "results": {"entropy", "plots", "report", "table"},
    "real": None,
    "bench": None,
    "compare": None,
    "results_compare": {"compare", "plots_compare"},
    "demo": None,
    "cli": None,
}


def imported(path: Path) -> set[str]:
    """The modules of dpoviz that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "dpoviz" else set()
            found.add(node.module)
    return {name.split(".")[1] for name in found if name.startswith("dpoviz.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_module_imports_only_what_it_may(path):
    assert path.stem in ALLOWED, "a new module: say here what it may import"
    allowed = ALLOWED[path.stem]
    if allowed is not None:
        assert imported(path) <= allowed


def test_the_reader_of_imports_sees_them():
    assert {"logprobs", "entropy", "data"} <= imported(PACKAGE / "reference.py")


def test_plots_know_no_torch():
    source = (PACKAGE / "plots.py").read_text(encoding="utf-8")
    assert "torch" not in source


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_no_pyplot(path):
    modules = [
        n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom | ast.Import)
    ]
    assert "pyplot" not in ast.unparse(ast.Module(modules, []))
