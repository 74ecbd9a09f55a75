"""The notebooks can be copied out, from a checkout and from a wheel."""

import fnmatch
import tomllib
from pathlib import Path

import pytest
from helpers.readme import ROOT

from dpoviz.cli import main
from dpoviz.learn.course import PATTERNS, course_files


def test_notebooks_in_both_languages_and_what_they_link_to(tmp_path, capsys):
    assert main(["notebooks", str(tmp_path / "course")]) == 0
    for name, path in course_files().items():
        assert (tmp_path / "course" / name).read_bytes() == path.read_bytes()
    assert {"01_from_constraint_to_loss.ipynb", "zh/01_from_constraint_to_loss.ipynb", "derivation.zh.md"} <= set(
        course_files()
    )
    assert f"jupyter lab {tmp_path / 'course'}" in capsys.readouterr().out
    assert main(["notebooks", str(tmp_path / "course")]) == 0  # the same files again


def test_a_notebook_with_answers_is_not_overwritten(tmp_path, capsys):
    own = tmp_path / "zh" / "02_two_readings_of_beta.ipynb"
    own.parent.mkdir()
    own.write_text("mine", encoding="utf-8")
    assert main(["notebooks", str(tmp_path)]) == 2
    assert own.read_text(encoding="utf-8") == "mine" and list(tmp_path.iterdir()) == [own.parent]
    assert "zh/02_two_readings_of_beta.ipynb would be overwritten" in capsys.readouterr().err


def test_the_wheel_gets_the_files_that_a_checkout_gives():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["data-files"]
    packed = {path for patterns in data.values() for pattern in patterns for path in ROOT.glob(pattern)}
    assert packed == set(course_files().values())
    for target, patterns in data.items():  # a file keeps its folder
        assert all(
            Path(pattern).parent == Path("notebooks") / Path(target).relative_to("share/dpoviz/notebooks")
            for pattern in patterns
        )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_pattern_finds_something(pattern):
    assert fnmatch.filter(course_files(), pattern)
