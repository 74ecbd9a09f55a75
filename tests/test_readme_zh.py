"""The Chinese README has the commands, numbers, tables and links of the English one, section by section.

Its commands may end in --lang zh.
"""

import re
from collections import Counter

import pytest
from helpers.readme import README, ROOT

CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")
TRANSLATED = (
    "which-way.md",
    "derivation.md",
    "01_from_constraint_to_loss.ipynb",
    "02_two_readings_of_beta.ipynb",
    "03_beta_network.ipynb",
    "08_which_beta_is_right.ipynb",
)


def sections(text: str) -> list[str]:
    """Return the text before the first heading of level 2, then each section with its heading."""
    outside = re.sub(r"^```.*?^```", lambda block: block.group().replace("\n#", "\n\\#"), text, flags=re.M | re.S)
    return [part.replace("\n\\#", "\n#") for part in re.split(r"^(?=## )", outside, flags=re.M)]


PAIRS = list(zip(sections(README), sections(CHINESE), strict=False))
NAMES = [english.splitlines()[0].lstrip("# ") for english, _ in PAIRS]


def blocks(text: str) -> list[str]:
    """Return the blocks of code; of the tree of modules, which has no language, the names alone."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text.replace(" --lang zh", ""), flags=re.M | re.S)
    return [code if language else "\n".join(re.findall(r"[\w*./]+\.py|\w+/", code)) for language, code in found]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def numbers(text: str) -> Counter:
    text = re.sub(r"\]\([^)]*\)|<[^>]*>|`[^`]*`", "", prose(text))
    return Counter(re.findall(r"(?<![A-Za-z_\d.])[−+]?\d+(?:[.,]\d+)*(?:e[−-]?\d+)?", text))


def words_of_code(text: str) -> Counter:
    return Counter(re.findall(r"`([^`\n]+)`", prose(text.replace(" --lang zh", ""))))


def tables(text: str) -> list[list[list[str]]]:
    rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in prose(text).splitlines() if line.startswith("|")]
    return [[re.findall(r"[−+]?\d+(?:[.,]\d+)*", re.sub(r"\([^)]*\)", "", cell)) for cell in row] for row in rows]


def links(text: str) -> list[str]:
    found = re.findall(r"\]\(([^)]*)\)", text)
    found = [re.sub(r"^README(\.zh)?\.md$", "the other", link) for link in found]
    return sorted("an anchor" if link.startswith("#") else link for link in found)


def in_chinese(link: str) -> str:
    folder, _, name = link.partition("#")[0].rpartition("/")
    if name not in TRANSLATED:
        return link
    return link.replace(".md", ".zh.md") if name.endswith(".md") else f"{folder}/zh/{name}"


def test_each_links_to_the_other_in_its_first_line():
    assert "(README.zh.md)" in README.splitlines()[0] and "(README.md)" in CHINESE.splitlines()[0]


@pytest.mark.parametrize("command", ["demo", "train"])
def test_the_first_command_speaks_chinese(command):
    first = re.search(rf"^pip .*&& dpoviz {command} .*$", CHINESE, flags=re.M)
    assert first.group().endswith(" --lang zh")


def test_has_as_many_sections():
    assert len(sections(README)) == len(sections(CHINESE)) > 10


@pytest.mark.parametrize("read", [blocks, numbers, words_of_code, tables])
@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=NAMES)
def test_a_section_has_the_same(read, english, chinese):
    assert read(chinese) == read(english)


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=NAMES)
def test_a_section_has_the_same_links(english, chinese):
    assert links(chinese) == sorted(map(in_chinese, links(english)))


def test_its_links_lead_somewhere():
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", CHINESE):
        target = ROOT / path if path else ROOT / "README.zh.md"
        assert target.exists(), path
        assert not anchor or f'<a id="{anchor}">' in target.read_text(encoding="utf-8"), anchor


def test_differences_are_seen():
    changed = (
        README.replace("0.146", "0.147")
        .replace("pip install -e . &&", "pip install . &&")
        .replace("`--alpha`", "`--alfa`")
    )
    pairs = list(zip(sections(README), sections(changed), strict=True))
    for read in (blocks, numbers, words_of_code, tables):
        assert any(read(one) != read(other) for one, other in pairs), read.__name__


def test_marks_in_chinese_are_full_width():
    half = re.compile(r"[\u4e00-\u9fff）]\s?[,;:(]|[\u4e00-\u9fff]\)|[,;](?=[\u4e00-\u9fff])|[`)\]][,;:(](?!https?|\w)")
    text = re.sub(r"\]\([^)\n]*\)", "]", prose(CHINESE))
    assert [line for line in text.splitlines() if half.search(re.sub(r"`[^`\n]*`", "``", line))] == []


def test_is_chinese():
    for line in prose(CHINESE).splitlines():
        if len(line) > 60 and not line.startswith(("|", "!", "<")):
            assert len(re.findall(r"[\u4e00-\u9fff]", line)) > 8, line
