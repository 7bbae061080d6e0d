"""The site of `make docs`: built without a warning, with every page, module and link in it."""

import datetime
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from support.launches import REPOSITORY, run_command

pytest.importorskip("sphinx", reason="the extra [docs] is not installed")
DOCS = REPOSITORY / "docs"


def test_every_page_and_module_is_in_the_site(tmp_path: Path):
    """As `make docs` builds it."""
    said = run_command(["make", "-n", "docs", f"HTML={tmp_path}"]).stdout
    (line,) = (line for line in said.splitlines() if "-m sphinx" in line)
    _, *argv = shlex.split(line)
    run_command([sys.executable, *argv])
    pages = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    assert len(pages) > 70
    assert {page for page in pages if not (tmp_path / page).is_file()} == set()
    for part in ("layers", "routers", "ops", "plugins", "hf"):
        page = (tmp_path / "reference" / f"{part}.html").read_text(encoding="utf-8")
        path = REPOSITORY / "megatron_smlp" / part
        files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            module = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
            assert file.stem == "__init__" or f'id="module-{module}"' in page, module


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


def test_a_release_cites_its_version_date_and_address(tmp_path: Path):
    flow = yaml.safe_load((REPOSITORY / ".github/workflows/release.yml").read_text("utf-8"))
    [step] = (s for s in flow["jobs"]["release"]["steps"] if s.get("name") == "cite")
    shutil.copy(REPOSITORY / "CITATION.cff", tmp_path)
    variables = {
        "GITHUB_REF_NAME": "v1.2.3",
        "GITHUB_SERVER_URL": "https://example.org",
        "GITHUB_REPOSITORY": "us/ours",
        "GIT_DIR": str(REPOSITORY / ".git"),
    }
    run_command(["bash", "-e", "-c", step["run"]], cwd=tmp_path, **variables)
    cited = yaml.safe_load((tmp_path / "CITATION.cff").read_text("utf-8"))
    assert cited["version"] == "1.2.3"
    assert cited["repository-code"] == "https://example.org/us/ours"
    assert datetime.date.fromisoformat(cited["date-released"])
