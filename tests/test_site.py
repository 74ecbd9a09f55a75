"""The pages of the site are equal in both languages; the site is built without a broken link and without a network."""

import importlib.util
import re
import subprocess
import sys

import pytest
from helpers.readme import ROOT

SITE = ROOT / "notebooks" / "site"
PAGES = {
    name: [(SITE / f"{name}{suffix}.md").read_text(encoding="utf-8") for suffix in ("", ".zh")]
    for name in ("gallery", "which-way")
}
INSTALLED = all(map(importlib.util.find_spec, ("mkdocs", "material", "jupyter_server_mathjax", "jieba")))
needs_site = pytest.mark.skipif(not INSTALLED, reason="pip install dpoviz[site]")


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(
    "pattern", [r"```.*?```", r"\$\$.*?\$\$", r"!\[[^]]*\](\([^)]*\))", r"(?<![\w.])\d+(?:\.\d+)?"]
)
def test_both_languages_have_the_same_code_formulas_pictures_and_numbers(name, pattern):
    found = [re.findall(pattern, page, flags=re.DOTALL | re.ASCII) for page in PAGES[name]]
    assert sorted(found[0]) == sorted(found[1])


def test_the_answer_is_short_and_comes_first():
    english, chinese = (re.sub(r"\$\$.*?\$\$", "", page, flags=re.DOTALL) for page in PAGES["which-way"])
    assert 200 < len(english.split()) < 360 and 400 < len(chinese) < 1100
    assert (
        "large β keeps the policy near" in english.split("\n\n")[1]
        and "β 大则策略贴近参考策略" in chinese.split("\n\n")[1]
    )


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGES["gallery"][0], flags=re.DOTALL))
def test_the_gallerys_lines_run(block, tmp_path, monkeypatch):
    lines = [line for line in block.splitlines() if line]
    assert len(lines) <= 5
    compile(block, "gallery", "exec")
    monkeypatch.chdir(tmp_path)
    if "dpoviz-demo" in block:  # a run's folder: its imports alone
        exec("\n".join(line for line in lines if line.startswith("from")), {})
    else:
        exec(block, {})
        assert [path.suffix for path in tmp_path.iterdir()] == [".png"]


@pytest.fixture(scope="module")
def build_site():
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "notebooks" / "build_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_site
class TestSite:
    def test_links_between_sources_lead_to_pages_and_others_become_text(self, build_site):
        text = "[a](../derivation.md#s1) [b](../../pyproject.toml) [c](https://x.y) ![d](e.png) `[f](g)`\n"
        code = "```\n[h](i.md)\n```"
        made = build_site.relinked(text + code, "notebooks/zh/01.ipynb", "zh/01.md", build_site.pages())
        assert made == "[a](../derivation.md#s1) b [c](https://x.y) ![d](e.png) `[f](g)`\n" + code

    def test_a_link_to_nothing_ends_the_build(self, build_site):
        with pytest.raises(ValueError, match=r"README.md: got a link to nowhere.md"):
            build_site.relinked("[a](nowhere.md)", "README.md", "index.md", build_site.pages())

    def test_formulas_in_headings_are_plain_in_the_contents(self, build_site):
        assert build_site.labelled("## [§5](a.md#s5) From $\\beta$ to $\\beta(x)$") == (
            "## [§5](a.md#s5) From $\\beta$ to $\\beta(x)$ { data-toc-label='§5 From β to β(x)' }"
        )

    @pytest.mark.parametrize(("language", "name"), [("en", "English"), ("zh", "中文")])
    def test_no_formula_stands_raw_in_the_navigation(self, build_site, language, name):
        titles = [next(iter(page)) for entry in build_site.navigation(language)[name] for page in entry.values()
                  if isinstance(page, list) for page in page]  # fmt: skip
        assert len(titles) >= 4 and not [title for title in titles if "$" in title or "\\" in title]

    @pytest.mark.slow
    def test_is_built_and_asks_for_nothing_outside(self, tmp_path):
        done = subprocess.run(
            [sys.executable, ROOT / "notebooks" / "build_site.py", tmp_path / "site"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        pages = list((tmp_path / "site").rglob("*.html"))
        assert len(pages) > 15
        for page in pages:
            html = page.read_text(encoding="utf-8")
            loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]*)\"", html)
            assert not [url for url in loaded if "mkdocs" not in url], page
