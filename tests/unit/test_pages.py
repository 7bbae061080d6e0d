"""Pages and pictures agree with the sources that they repeat, and no link is broken."""

import ast
import importlib
import json
import re
import statistics
from pathlib import Path

import pytest
from support.launches import REPOSITORY

DOCS = REPOSITORY / "docs"
SYSTEMS = sorted((DOCS / "models").glob("*.md"))
STUDIES = {"micro": "micro/intel-xeon", "cpu": "cpu/amd-epyc"}
RESULT = re.compile(r"([\d.]+)\s+in\s+`(\w+)`\s+\((\d+)M\s+tokens,\s+(one|three)\s+seed")
TITLE = re.compile(r"# (.+)")
PICTURES = DOCS / "pictures"
LINKING = sorted(
    page.relative_to(REPOSITORY).as_posix()
    for folder in ("*.md", "docs/**/*.md", "examples/*.md", "studies/**/*.md")
    for page in REPOSITORY.glob(folder)
)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", SYSTEMS, ids=lambda page: page.stem)
def test_a_systems_formula_is_that_of_its_code(page: Path):
    text = text_of(page)
    (formula,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    files = [page.parent / link for link in re.findall(r"\]\((\S+/megatron_smlp/\S+\.py)\)", text)]
    docstrings = "".join(ast.get_docstring(ast.parse(text_of(file))) or "" for file in files)
    for line in formula.splitlines():
        assert line in docstrings
    references = re.findall(r"`(SMLP\w+)`", text)
    modelling = text_of(REPOSITORY / "megatron_smlp" / "hf" / "modeling_smlp.py")
    assert references
    assert all(f"class {name}(" in modelling for name in references)


@pytest.mark.parametrize("page", SYSTEMS, ids=lambda page: page.stem)
def test_a_systems_results_are_those_of_the_studies(page: Path):
    results = RESULT.findall(text_of(page))
    assert len(results) == (0 if page.stem == "llama" else len(STUDIES))
    for loss, study, tokens, seeds in results:
        folder = REPOSITORY / "studies" / "results" / STUDIES[study]
        losses = json.loads(text_of(folder / "report.json"))["losses"][page.stem]
        last = max(losses, key=int)
        assert int(last) == int(tokens) * 10**6
        assert len(losses[last]) == {"one": 1, "three": 3}[seeds]
        assert f"{statistics.mean(losses[last].values()):.3f}" == loss


def test_every_decision_is_under_one_subject_by_its_title():
    folder = DOCS / "decisions"
    listed = re.findall(r"^\* \[(.+?)\]\((0\S+)\)", text_of(folder / "README.md"), re.MULTILINE)
    records = {path.name: TITLE.match(text_of(path)) for path in folder.glob("0*.md")}
    assert sorted(listed) == sorted((title[1], name) for name, title in records.items() if title)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = HEADING.findall(FENCED.sub("", text))
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def broken(page: Path) -> list[str]:
    """Return the broken links of `page`; links to other sites are not checked."""
    text = text_of(page)
    lost = []
    for link in LINK.findall(FENCED.sub("", text)):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(text_of(target))):
            lost.append(link)
    return lost


@pytest.mark.parametrize("page", LINKING)
def test_links_lead_somewhere(page: str):
    assert broken(REPOSITORY / page) == []


def test_pictures_are_of_the_tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(PICTURES)
    drawn = importlib.import_module("draw").pictures()
    assert {path.name for path in PICTURES.glob("*.svg")} == set(drawn)
    for name, picture in drawn.items():
        text = (PICTURES / name).read_text(encoding="utf-8")
        assert text == picture, f"{name}: python docs/pictures/draw.py"


def test_the_readme_shows_what_the_quickstart_printed():
    printed = (PICTURES / "quickstart.txt").read_text(encoding="utf-8")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = readme.split("```text\n")[1].split("```")[0]
    assert shown in printed, "python docs/pictures/console.py"
