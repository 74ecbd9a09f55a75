"""Find the notebooks and the derivation, in a checkout or an installed wheel, and copy them out."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

PATTERNS = ("[0-9]*.ipynb", "zh/*.ipynb", "derivation*.md", "compare/*.csv", "*.png")
"""What is copied of the folder of notebooks: both languages, the derivation, and what they read and show."""

_INSTALLED = "share/dpoviz/notebooks/"


def course_files() -> dict[str, Path]:
    """Return the files of the course, by their path within the folder of notebooks.

    Raises:
        FileNotFoundError: neither a checkout nor an installed wheel has them.
    """
    checkout = Path(__file__).parents[2] / "notebooks"
    if (checkout / "derivation.md").is_file():
        found = [path for pattern in PATTERNS for path in sorted(checkout.glob(pattern))]
        return {path.relative_to(checkout).as_posix(): path for path in found}
    try:
        installed = files("dpoviz") or []
    except PackageNotFoundError:
        installed = []
    shared = {str(file.as_posix()).partition(_INSTALLED)[2]: Path(str(file.locate())) for file in installed}
    if not (course := {name: path for name, path in shared.items() if name}):
        raise FileNotFoundError("notebooks: found none beside dpoviz; install it again, or use a checkout")
    return course


def copy_course(folder: Path) -> list[str]:
    """Copy the files of the course into a folder, and return their names.

    Raises:
        ValueError: the folder holds a file of the same name with other content, such as a notebook with answers;
            nothing is copied.
    """
    course = course_files()
    changed = [name for name, path in course.items() if _differs(folder / name, path)]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ValueError(f"DIR: got {folder}, whose {changed[0]}{more} would be overwritten; give another folder")
    for name, path in course.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return list(course)


def _differs(there: Path, path: Path) -> bool:
    return there.exists() and (not there.is_file() or there.read_bytes() != path.read_bytes())
