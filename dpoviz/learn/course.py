"""Find the notebooks and the derivation, in a checkout or an installed wheel, and copy them out."""

from __future__ import annotations

import shutil
from pathlib import Path

PATTERNS = ("[0-9]*.ipynb", "zh/*.ipynb", "derivation*.md", "compare/*.csv", "*.png")
"""What is copied of the folder of notebooks: both languages, the derivation, and what they read and show."""


def course_files() -> dict[str, Path]:
    """Return the files of the course, by their path within the folder of notebooks.

    Raises:
        FileNotFoundError: neither a checkout nor an installed wheel has them.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "notebooks", package.parent / "notebooks"):  # of a wheel, of a checkout
        if (folder / "derivation.md").is_file():
            found = [path for pattern in PATTERNS for path in sorted(folder.glob(pattern))]
            return {path.relative_to(folder).as_posix(): path for path in found}
    raise FileNotFoundError("notebooks: found none beside dpoviz; install it again, or use a checkout")


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
