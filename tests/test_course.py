"""The notebooks can be copied out, from a checkout and from a wheel."""

import fnmatch
import tomllib

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


def test_the_wheel_gets_the_files_that_a_checkout_gives_and_every_room():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packed = {
        path for pattern in settings["package-data"]["dpoviz.notebooks"] for path in (ROOT / "notebooks").glob(pattern)
    }
    assert packed == set(course_files().values())
    rooms = {f"dpoviz.{path.parent.name}" for path in (ROOT / "dpoviz").glob("*/__init__.py")}
    assert set(settings["packages"]) == {"dpoviz", "dpoviz.notebooks", *rooms}
    assert settings["package-dir"] == {"dpoviz.notebooks": "notebooks"}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_pattern_finds_something(pattern):
    assert fnmatch.filter(course_files(), pattern)
