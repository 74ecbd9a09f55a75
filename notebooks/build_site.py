"""Build the static site of README, derivation, notebooks and gallery, in both languages.

    pip install -e ".[site]" && python notebooks/build_site.py [FOLDER]

The site opens from the file system, without a network or a server; formulas and search are in the folder. A link that
leads nowhere ends the build.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path, PurePosixPath

import jupyter_server_mathjax
import nbformat
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
SITE = ROOT / "notebooks" / "site"

README_PICTURES = ("beta_by_task.png", "with_and_without_entropy.png", "which_order_by_margin.png")

PICTURES = {
    "which-way": ("02", "cell-05"),
    "gallery-beta": ("05", "cell-09"),
    "gallery-training": ("04", "cell-18"),
    "gallery-pulls": ("04", "cell-23"),
    "gallery-frontier": ("01", "cell-05"),
    "gallery-forms": ("02", "cell-05"),
    "gallery-terms": ("03", "cell-13"),
}
"""The pictures of the gallery, each an output of a notebook: number and id of the cell."""

TITLES = {
    "en": ("English", "Start", "Which way does β point?", "The derivation", "Notebooks", "Gallery", "Data"),
    "zh": ("中文", "开始", "β 指向哪一边？", "推导", "Notebook", "图库", "数据"),
}


def pages() -> dict[str, str]:
    """Return the page of the site that each source becomes: path in the project -> path in the site."""
    found = {
        "README.md": "index.md",
        "README.zh.md": "zh/index.md",
        "data/README.md": "data.md",
        "notebooks/derivation.md": "derivation.md",
        "notebooks/derivation.zh.md": "zh/derivation.md",
        "notebooks/site/which-way.md": "which-way.md",
        "notebooks/site/which-way.zh.md": "zh/which-way.md",
        "notebooks/site/gallery.md": "gallery.md",
        "notebooks/site/gallery.zh.md": "zh/gallery.md",
    }
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        found[f"notebooks/{path.name}"] = f"{path.stem}.md"
    for path in sorted((ROOT / "notebooks" / "zh").glob("*.ipynb")):
        found[f"notebooks/zh/{path.name}"] = f"zh/{path.stem}.md"
    return found


def relinked(text: str, source: str, page: str, known: dict[str, str]) -> str:
    """Return Markdown whose links between sources lead to pages; a link to a file outside the site becomes text.

    Raises:
        ValueError: a link to a file that is not in the project.
    """
    home = PurePosixPath(source).parent
    if home.name == "site":  # written as if it lay beside the derivation
        home = home.parent

    def new(match: re.Match) -> str:
        bang, words, path, anchor = match.groups()
        if bang or not path or re.match(r"\w+:", path):
            return match.group()
        target = os.path.normpath(home / path)
        if target == "notebooks/zh":
            target = next(name for name in known if name.startswith("notebooks/zh/"))
        if not (ROOT / target).exists():
            raise ValueError(f"{source}: got a link to {path}, which is not there; correct it")
        if target not in known:
            return words
        return f"[{words}]({os.path.relpath(known[target], PurePosixPath(page).parent)}{anchor or ''})"

    blocks = re.split(r"(^```.*?^```|`[^`\n]+`)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith("`") else re.sub(r"(!?)\[([^]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", new, part)
        for part in blocks
    )


def plain(heading: str) -> str:
    """Return a heading without links and with letters for its formulas."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)|[$\\]", lambda match: match.group(1) or "", heading)
    for name, letter in {"beta": "β", "pi": "π", "^": "", "kappa": "κ"}.items():
        text = text.replace(name, letter)
    return text


def labelled(text: str) -> str:
    """Return Markdown whose headings have plain text in the table of contents, which sets no formulas."""

    def label(match: re.Match) -> str:
        return f"{match.group()} {{ data-toc-label='{plain(match.group(1))}' }}"

    blocks = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith("```") else re.sub(r"^#+ (.*\$.*)$", label, part, flags=re.MULTILINE) for part in blocks
    )


def of_notebook(path: Path, page: str, docs: Path) -> str:
    """Return a notebook as Markdown, and write its pictures beside the page."""
    notebook = nbformat.read(path, as_version=4)
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    folder = docs / Path(page).with_suffix("")
    for name, content in resources["outputs"].items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        text = text.replace(f"({name})", f"({folder.name}/{name})")
    return text.replace("<details>", '<details markdown="1">')


def picture(number: str, cell_id: str, language: str) -> bytes:
    """Return a picture that a notebook shows, of the notebook in this language if there is one."""
    folders = [ROOT / "notebooks" / "zh", ROOT / "notebooks"][0 if language == "zh" else 1 :]
    path = next(path for folder in folders for path in folder.glob(f"{number}_*.ipynb"))
    (cell,) = (cell for cell in nbformat.read(path, as_version=4).cells if cell.id == cell_id)
    data = next(out["data"]["image/png"] for out in cell.outputs if "image/png" in out.get("data", {}))
    return base64.b64decode(data)


def write_sources(docs: Path) -> None:
    """Write the Markdown and the pictures from which the site is built."""
    known = pages()
    for source, page in known.items():
        path, target = ROOT / source, docs / page
        target.parent.mkdir(parents=True, exist_ok=True)
        text = of_notebook(path, page, docs) if source.endswith(".ipynb") else path.read_text(encoding="utf-8")
        for name in README_PICTURES:
            text = text.replace(f"](notebooks/{name})", f"]({'../' * page.count('/')}{name})")
        target.write_text(labelled(relinked(text, source, page, known)), encoding="utf-8")
    for language in TITLES:
        for name, (number, cell_id) in PICTURES.items():
            folder = docs / "zh" if language == "zh" else docs
            (folder / f"{name}.png").write_bytes(picture(number, cell_id, language))
    for name in README_PICTURES:
        shutil.copy(ROOT / "notebooks" / name, docs)
    (docs / "scripts").mkdir()
    for path in SITE.glob("*.js"):
        shutil.copy(path, docs / "scripts")
    mathjax = Path(jupyter_server_mathjax.__file__).parent / "static"
    shutil.copytree(mathjax, docs / "mathjax", ignore=shutil.ignore_patterns("localization"))


def navigation(language: str) -> dict[str, list]:
    """Return a language's part of the navigation."""
    name, start, which, derivation, notebooks, gallery, data = TITLES[language]
    folder = "zh/" if language == "zh" else ""
    sources = {source: page for source, page in pages().items() if source.endswith(".ipynb")}
    of_language = [
        {plain(nbformat.read(ROOT / source, as_version=4).cells[0].source.splitlines()[0].removeprefix("# ")): page}
        for source, page in sources.items()
        if page.startswith("zh/") == (language == "zh")
    ]
    entries = [
        {start: f"{folder}index.md"},
        {which: f"{folder}which-way.md"},
        {derivation: f"{folder}derivation.md"},
        {notebooks: of_language},
        {gallery: f"{folder}gallery.md"},
    ]
    return {name: entries + [{data: "data.md"}] * (language == "en")}


def config(docs: Path, out: Path) -> dict[str, object]:
    """Return the settings of mkdocs."""
    separators = r"[\s\u200b\-,:!=\[\]()\"`/、。，．？！；：]+"
    return {
        "site_name": "dpoviz",
        "docs_dir": str(docs),
        "site_dir": str(out),
        "use_directory_urls": False,
        "theme": {
            "name": "material",
            "font": False,
            "features": ["navigation.tabs", "navigation.footer", "toc.follow"],
            "palette": {"primary": "indigo"},
        },
        "plugins": [{"search": {"lang": ["en", "zh"], "separator": separators}}, "offline"],
        "markdown_extensions": [
            "tables", "attr_list", "md_in_html", "pymdownx.superfences", {"toc": {"permalink": False}},
            {"pymdownx.arithmatex": {"generic": True}},
        ],
        "extra": {"polyfills": ["scripts/iframe-worker.js"]},
        "extra_javascript": ["scripts/formulas.js"],
        "validation": {"links": {"not_found": "warn", "anchors": "warn", "unrecognized_links": "warn"}},
        "nav": [navigation(language) for language in TITLES],
    }  # fmt: skip


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "site").resolve()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory() as scratch:
        docs = Path(scratch) / "docs"
        docs.mkdir()
        write_sources(docs)
        settings = Path(scratch) / "mkdocs.yml"
        settings.write_text(yaml.safe_dump(config(docs, out), allow_unicode=True, sort_keys=False), encoding="utf-8")
        build(load_config(str(settings), strict=True))
    print(f"the site: {out / 'index.html'}")


if __name__ == "__main__":
    main()
