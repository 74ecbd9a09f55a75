"""Make the Chinese notebooks from the English ones: `python notebooks/translate.py [01 02 ...]`.

zh/NN.yaml holds, for each cell that says something, its translation and a fingerprint of the English cell it was made
from: `text` replaces a Markdown cell, `strings` replaces words within a code cell. Code stands once, in the English
notebook; the Chinese one runs it after `dpoviz.language("zh")`, so that figures, sliders and checkers speak Chinese.

When an English cell has changed, revise its translation, then run `python notebooks/translate.py --revised NN`.
`--text` replaces the text and runs nothing, if the code is still that of the Chinese notebook.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbformat import NotebookNode

HERE = Path(__file__).parent
FOLDER = HERE / "zh"
SWITCH = 'import dpoviz\n\ndpoviz.language("zh")'
"""The first code cell of a Chinese notebook."""


def english(number: str) -> Path:
    """Return the path of an English notebook by its number, such as "01"."""
    (path,) = HERE.glob(f"{number}_*.ipynb")
    return path


def read_catalogue(number: str) -> dict[str, dict[str, Any]]:
    """Return the translations of a notebook by cell id."""
    return yaml.safe_load((FOLDER / f"{number}.yaml").read_text(encoding="utf-8"))


def fingerprint(source: str) -> str:
    """Return eight characters that change with the source of a cell."""
    return hashlib.sha256(source.encode()).hexdigest()[:8]


def stale(notebook: NotebookNode, catalogue: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line per cell whose translation is missing, left over, or made from another English text."""
    cells = {cell.id: cell for cell in notebook.cells}
    lines = [f"{name}: translated, but not in the notebook" for name in catalogue if name not in cells]
    for name, cell in cells.items():
        if name not in catalogue:
            lines += [f"{name}: not translated"] * (cell.cell_type == "markdown")
        elif catalogue[name]["english"] != fingerprint(cell.source):
            lines.append(f"{name}: the English cell has changed since it was translated")
    return lines


def translated(notebook: NotebookNode, catalogue: dict[str, dict[str, Any]]) -> NotebookNode:
    """Return the Chinese notebook, not yet run.

    Raises:
        ValueError: words to be replaced are not in their code cell.
    """
    cells = []
    for cell in notebook.cells:
        entry = catalogue.get(cell.id, {})
        source = entry.get("text", cell.source).rstrip("\n")
        for words, chinese in entry.get("strings", []):
            if words not in source:
                raise ValueError(f"{cell.id}: got no {words!r} in the cell, expected it")
            source = source.replace(words, chinese)
        if cell.cell_type == "markdown":
            cells.append(nbformat.v4.new_markdown_cell(source, id=cell.id, metadata=cell.metadata))
        else:
            if not any(made.cell_type == "code" for made in cells):
                cells.append(nbformat.v4.new_code_cell(SWITCH, id="language"))
            cells.append(nbformat.v4.new_code_cell(source, id=cell.id, metadata=cell.metadata))
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def with_outputs(made: NotebookNode, before: NotebookNode) -> NotebookNode:
    """Return a notebook with the outputs of another one.

    Raises:
        ValueError: the two have different code.
    """
    code = [[cell for cell in notebook.cells if cell.cell_type == "code"] for notebook in (made, before)]
    if [cell.source for cell in code[0]] != [cell.source for cell in code[1]]:
        raise ValueError("--text: the code has changed, expected that of the Chinese notebook; run it without --text")
    for new, old in zip(*code, strict=True):
        new.outputs, new.execution_count = old.outputs, old.execution_count
    made.metadata = before.metadata
    return made


def mark_revised(number: str) -> None:
    """Write the fingerprints of the present English cells into a catalogue."""
    cells = {cell.id: cell for cell in nbformat.read(english(number), as_version=4).cells}
    path = FOLDER / f"{number}.yaml"
    lines, name = path.read_text(encoding="utf-8").splitlines(), ""
    for i, line in enumerate(lines):
        if line and not line.startswith((" ", "#")):
            name = line.rstrip(":")
        elif line.startswith("  english:") and name in cells:
            lines[i] = f'  english: "{fingerprint(cells[name].source)}"'
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    sys.path.insert(0, str(HERE))
    from run import execute

    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    for number in arguments or [path.stem for path in sorted(FOLDER.glob("*.yaml"))]:
        if "--revised" in sys.argv:
            mark_revised(number)
            continue
        source, catalogue = english(number), read_catalogue(number)
        notebook = nbformat.read(source, as_version=4)
        if lines := stale(notebook, catalogue):
            sys.exit("\n".join([f"{source.name}: revise zh/{number}.yaml, then --revised {number}", *lines]))
        print(f"zh/{source.name}", flush=True)
        path, made = FOLDER / source.name, translated(notebook, catalogue)
        done = with_outputs(made, nbformat.read(path, as_version=4)) if "--text" in sys.argv else execute(made, FOLDER)
        nbformat.write(done, path)


if __name__ == "__main__":
    main()
