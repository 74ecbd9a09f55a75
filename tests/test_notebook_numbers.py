"""Every decimal number in a notebook's prose can be traced to a source or an output above it."""

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9]*.ipynb"))

# numbers that nothing above them can hold, by notebook: number -> reason
ALLOWED = {
    "02": {
        "0.1": "the beta that the literature calls usual",
        "0.5": "of an example that the next cell computes",
        "0.7": "of an example that the next cell computes",
        "1.0": "of an example that the next cell computes",
    },
}
NOT_PROSE = re.compile(r"```.*?```|`[^`]*`|§[\d.]+|arXiv:\S+|\(http[^)]*\)", re.DOTALL)
LAST = "How much of this is the training's rounding?"  # a table of earlier runs, which is its own source


def decimals(prose: str) -> list[str]:
    return re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)(?:\s?%)?", NOT_PROSE.sub(" ", prose))


def untraced(cells: list) -> list[str]:
    """Return the decimals of the prose that no number above rounds to, a percentage being one of a fraction, too."""
    above, missing = set(), []
    for cell in cells:
        if cell.cell_type == "markdown" and LAST not in cell.source:
            for text in decimals(cell.source):
                number = text.rstrip(" %")
                half = 0.5 * 10.0 ** -len(number.split(".")[1]) * (1 + 1e-6)
                factors = (1, 100) if text.endswith("%") else (1,)
                if not any(abs(value * factor - float(number)) <= half for value in above for factor in factors):
                    missing.append(text)
        shown = [
            out.get("text", "") + "".join(map(str, out.get("data", {}).values())) for out in cell.get("outputs", [])
        ]
        texts = [cell.source, *shown] if cell.cell_type == "code" else []
        above |= {float(n) for text in texts for n in re.findall(r"\d+\.?\d*(?:e[-+]?\d+)?", text[:100_000])}
    return missing


def without_pictures(notebook):
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind in [kind for kind in output.get("data", {}) if not kind.startswith("text/")]:
                del output.data[kind]
    return notebook.cells


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_numbers_of_the_prose_stand_above_it(path):
    allowed = ALLOWED.get(path.stem[:2], {})
    missing = untraced(without_pictures(nbformat.read(path, as_version=4)))
    assert sorted({number for number in missing if number not in allowed}) == []
    assert set(allowed) <= set(missing), "numbers that are allowed and need it no more"


@pytest.mark.parametrize(
    ("prose", "expected"),
    [
        ("0.17, 17.5 %, 12 and −0.1749", []),
        ("0.18", ["0.18"]),
        ("0.1748", ["0.1748"]),
        ("§5.1.2, arXiv:2305.18290 and `x = 0.4`", []),
    ],
)
def test_what_counts_as_traced(prose, expected):
    output = nbformat.v4.new_output("stream", text="loss 0.1749")
    code = nbformat.v4.new_code_cell("print(loss)", outputs=[output])
    assert untraced([code, nbformat.v4.new_markdown_cell(prose)]) == expected
    before = untraced([nbformat.v4.new_markdown_cell(prose), code])
    assert before == decimals(prose)  # what stands below does not count
