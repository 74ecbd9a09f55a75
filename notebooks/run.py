"""Run notebooks in fresh kernels and write them back with their outputs: `python notebooks/run.py [04 05 ...]`.

What is written holds no timing, no widget state and no progress bars, so that a rerun that changes nothing
changes no byte but the pictures'.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run all cells in a fresh kernel that works in `folder`, and clean the outputs."""
    NotebookClient(notebook, timeout=3600, startup_timeout=300, kernel_name="python3", record_timing=False,
                   coalesce_streams=True, store_widget_state=False,
                   resources={"metadata": {"path": str(folder)}}).execute()  # fmt: skip
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            for output in cell.outputs:
                # a view without its state is an error where no kernel runs; the picture beside it is not
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return notebook


def _is_progress(output: NotebookNode) -> bool:
    """A progress bar's last state, which says nothing once it is over; warnings are kept, to be seen."""
    if output.output_type == "display_data":
        text = output.data.get("text/plain", "")  # a bar as a widget, whose picture is frozen at its beginning
    elif output.output_type == "stream" and output.name == "stderr":
        text = output.text
    else:
        return False
    lines = [part for line in text.splitlines() for part in line.split("\r")]
    if not any(line.strip() for line in lines):
        return False
    return all("it/s]" in line or "/s" in line or "s/" in line for line in lines if line.strip())


def main() -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        if len(sys.argv) == 1 or path.name.startswith(tuple(sys.argv[1:])):
            print(path.name, flush=True)
            nbformat.write(execute(nbformat.read(path, as_version=4), HERE), path)


if __name__ == "__main__":
    main()
