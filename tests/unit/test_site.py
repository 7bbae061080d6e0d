"""The site of `make docs`: built without a warning, with every page, module and link in it."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.launches import REPOSITORY, run_command

pytest.importorskip("sphinx", reason="the extra [docs] is not installed")
DOCS = REPOSITORY / "docs"


def built(source: Path, html: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs, on another folder of pages."""
    said = run_command(["make", "-n", "docs", f"HTML={html}"]).stdout
    (line,) = (line for line in said.splitlines() if "-m sphinx" in line)
    _, *words = shlex.split(line)
    command = [sys.executable, *(str(source) if word == "docs" else word for word in words)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    html = tmp_path_factory.mktemp("site")
    done = built(DOCS, html)
    assert done.returncode == 0, done.stderr
    return html


def test_every_page_is_in_the_site(site: Path):
    pages = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    assert len(pages) > 70
    assert {page for page in pages if not (site / page).is_file()} == set()


def test_the_start_is_the_readme(site: Path):
    start = (site / "index.html").read_text(encoding="utf-8")
    assert "<h1>megatron_smlp" in start
    assert 'href="training.html"' in start


@pytest.mark.parametrize("part", ["layers", "routers", "ops", "plugins", "hf"])
def test_a_page_of_the_reference_has_every_module(site: Path, part: str):
    page = (site / "reference" / f"{part}.html").read_text(encoding="utf-8")
    path = REPOSITORY / "megatron_smlp" / part
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    for file in files:
        module = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
        assert file.stem == "__init__" or f'id="module-{module}"' in page, module


def test_docstrings_are_read_as_they_are_written(site: Path):
    """Formulas stand in blocks, and arguments in lists: nothing is lost to markup."""
    page = (site / "reference" / "layers.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    assert "g  = M_k LN_k(u2_k) + b_k      per head k" in text
    assert "system-message" not in page


def test_what_leads_nowhere_fails(tmp_path: Path):
    """A link's page, its heading, a picture and a module: each is said, and fails the build."""
    source = tmp_path / "docs"
    source.mkdir()
    (tmp_path / "README.md").write_text("# Start\n", encoding="utf-8")
    for name in ("conf.py", "site.css"):
        shutil.copy(DOCS / name, source)
    (source / "index.md").write_text("```{toctree}\npage\n```\n", encoding="utf-8")
    lines = "[](no-page.md) [](index.md#no-heading) ![](no-picture.svg)"
    module = "```{eval-rst}\n.. automodule:: megatron_smlp.no_module\n```"
    (source / "page.md").write_text(f"# A page\n\n{lines}\n\n{module}\n", encoding="utf-8")
    done = built(source, tmp_path / "html")
    assert done.returncode == 1
    for name in ("no-page", "no-heading", "no-picture", "no_module"):
        assert name in done.stderr, name


def test_workflows_call_targets_of_the_makefile():
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    called = set()
    for file in (REPOSITORY / ".github" / "workflows").glob("*.yml"):
        flow = yaml.safe_load(file.read_text(encoding="utf-8"))
        for job in flow["jobs"].values():
            lines = [step["run"] for step in job["steps"] if "run" in step]
            called |= {word for line in lines for word in re.findall(r"\bmake ([\w-]+)", line)}
    assert called == {"test", "docs", "dist"}
    assert called <= set(targets)
