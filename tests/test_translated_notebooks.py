"""The Chinese notebooks and pages say what the English ones say; code stands once."""

import ast
import importlib.util
import re
from collections import Counter
from pathlib import Path

import nbformat
import pytest
import yaml

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NUMBERS = [path.stem for path in sorted((NOTEBOOKS / "zh").glob("*.yaml"))]
CHINESE = re.compile(r"[\u4e00-\u9fff]")

spec = importlib.util.spec_from_file_location("notebooks_translate", NOTEBOOKS / "translate.py")
translate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(translate)


@pytest.fixture(params=NUMBERS)
def number(request):
    return request.param


@pytest.fixture
def english(number):
    return nbformat.read(translate.english(number), as_version=4)


@pytest.fixture
def chinese(number):
    return nbformat.read(translate.FOLDER / translate.english(number).name, as_version=4)


def without_strings(source: str) -> str:
    """Return code with every text in it emptied, those of f-strings too; what they format remains."""
    tree = ast.parse(re.sub(r"^%.*$", "", source, flags=re.MULTILINE))
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):  # another language may have another order of the values
            node.values = sorted((v for v in node.values if isinstance(v, ast.FormattedValue)), key=ast.dump)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)


def numbers(text: str) -> Counter:
    """Return the numbers and the code of a text; Chinese words are no part of a number."""
    return Counter(
        re.findall(r"`[^`\n]+`|(?<![A-Za-z_\d.])\d+(?:\.\d+)?(?:e-?\d+)?", re.sub(r"```.*?```", "", text, flags=re.S))
    )


class TestCatalogues:
    def test_there_are_some(self):
        assert {"01", "02", "03", "08"} <= set(NUMBERS)

    def test_every_cell_is_translated_from_the_english_as_it_is(self, number, english):
        assert translate.stale(english, translate.read_catalogue(number)) == []

    def test_changed_missing_and_left_over_cells_are_named(self, english):
        catalogue = translate.read_catalogue(NUMBERS[0])
        english = nbformat.read(translate.english(NUMBERS[0]), as_version=4)
        english.cells[0].source += " More."
        removed = english.cells.pop(2)
        english.cells.append(nbformat.v4.new_markdown_cell("New.", id="new"))
        first = english.cells[0].id
        assert translate.stale(english, catalogue) == [
            f"{removed.id}: translated, but not in the notebook",
            f"{first}: the English cell has changed since it was translated",
            "new: not translated",
        ]

    def test_words_that_are_not_in_the_cell_are_refused(self):
        cell = nbformat.v4.new_code_cell("print('a')", id="c")
        notebook = nbformat.v4.new_notebook(cells=[cell])
        with pytest.raises(ValueError, match="c: got no 'b' in the cell"):
            translate.translated(notebook, {"c": {"english": "", "strings": [["b", "x"]]}})

    def test_revised_marks_the_present_cells(self, tmp_path, monkeypatch):
        text = 'cell-00:\n  english: "00000000"\n  text: |\n    # 问？\n'
        (tmp_path / "01.yaml").write_text(text, encoding="utf-8")
        monkeypatch.setattr(translate, "FOLDER", tmp_path)
        translate.mark_revised("01")
        first = nbformat.read(translate.english("01"), as_version=4).cells[0]
        assert yaml.safe_load((tmp_path / "01.yaml").read_text(encoding="utf-8"))["cell-00"] == {
            "english": translate.fingerprint(first.source),
            "text": "# 问？\n",
        }


class TestNotebooks:
    def test_are_made_from_the_english_ones_and_executed(self, number, english, chinese):
        made = translate.translated(english, translate.read_catalogue(number))
        assert [(cell.id, cell.source) for cell in chinese.cells] == [(cell.id, cell.source) for cell in made.cells]
        code = [cell for cell in chinese.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]

    def test_run_the_same_code(self, english, chinese):
        code = {cell.id: cell.source for cell in chinese.cells if cell.cell_type == "code"}
        assert code.pop("language") == translate.SWITCH
        for cell in english.cells:
            if cell.cell_type == "code":
                assert without_strings(code.pop(cell.id)) == without_strings(cell.source), cell.id
        assert not code

    def test_show_as_many_pictures(self, english, chinese):
        def pictures(notebook):
            return [
                cell.id
                for cell in notebook.cells
                for out in cell.get("outputs", [])
                if "image/png" in out.get("data", {})
            ]

        assert pictures(english) == pictures(chinese)

    def test_have_the_numbers_and_code_of_the_english_text(self, english, chinese):
        texts = {cell.id: cell.source for cell in chinese.cells}
        for cell in english.cells:
            if cell.cell_type == "markdown":
                assert numbers(texts[cell.id]) == numbers(cell.source), cell.id

    def test_speak_chinese(self, chinese):
        for cell in chinese.cells:
            if cell.cell_type == "markdown":
                assert CHINESE.search(cell.source), cell.id
        verdicts = [
            out["data"]["text/markdown"] for cell in chinese.cells if cell.cell_type == "code" for out in cell.outputs
            if "text/markdown" in out.get("data", {})
        ]  # fmt: skip
        assert verdicts and all(map(CHINESE.search, verdicts))

    def test_links_lead_somewhere(self, chinese):
        for cell in chinese.cells:
            for path in re.findall(r"\]\((?!http)([^)#]+)", cell.source if cell.cell_type == "markdown" else ""):
                assert (translate.FOLDER / path).is_file(), (cell.id, path)


DERIVATIONS = [(NOTEBOOKS / f"derivation{suffix}.md").read_text(encoding="utf-8") for suffix in ("", ".zh")]


class TestDerivation:
    def test_has_the_same_formulas_and_sections_in_both_languages(self):
        formulas = [re.findall(r"\$\$.*?\$\$", page, flags=re.DOTALL) for page in DERIVATIONS]
        sections = [re.findall(r'<a id="s([\d.]+)">', page) for page in DERIVATIONS]
        assert formulas[0] == formulas[1] and len(formulas[0]) > 15
        assert sections[0] == sections[1] and len(set(sections[0])) == len(sections[0])

    def test_its_links_lead_somewhere(self):
        for page in DERIVATIONS:
            for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page):
                assert not path or (NOTEBOOKS / path).is_file(), path
                assert not anchor or f'<a id="{anchor}">' in page, anchor

    @pytest.mark.parametrize(
        "path", sorted([*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("zh/*.ipynb")]), ids=lambda p: p.stem
    )
    def test_every_section_that_a_notebook_names_is_a_link_to_it(self, path):
        for cell in nbformat.read(path, as_version=4).cells:
            text = cell.source if cell.cell_type == "markdown" else ""
            for section in re.findall(r"§(\d[\d.]*)", text):
                page = "../derivation.zh.md" if path.parent.name == "zh" else "derivation.md"
                assert re.search(
                    rf"\[§{re.escape(section)}(?:-\d)?\]\({re.escape(page)}#s{re.escape(section)}\)", text
                ), (cell.id, section)
                assert f'<a id="s{section}">' in DERIVATIONS[0]
