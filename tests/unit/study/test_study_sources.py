"""Which sources made a study's runs, and which runs from other sources a report compares."""

import json
import shutil
from pathlib import Path

import pandas
import pytest
from support.launches import REPOSITORY
from support.studies import page_of, pretend, state_of, write_study

from megatron_smlp import plugin_files, provenance
from megatron_smlp.study.made_by import FINGERPRINT_COLUMNS, alike, note
from megatron_smlp.study.plan import identity_of
from megatron_smlp.study.process import made_by_next
from megatron_smlp.study.state import State

MIXER = "megatron_smlp/layers/spatial_gating.py"


def add_a_line(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8") + "\nCHANGED = True\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "counts"),
    [(MIXER, True), ("pretrain_smlp.py", True), ("megatron_smlp/study/report.py", False)],
)
def test_sources_are_what_decides_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, counts: bool
):
    before = provenance.sources()
    shutil.copytree(
        REPOSITORY / "megatron_smlp", tmp_path / "megatron_smlp",
        ignore=shutil.ignore_patterns("__pycache__"),
    )  # fmt: skip
    shutil.copy(REPOSITORY / "pretrain_smlp.py", tmp_path)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "megatron_smlp" / "provenance.py"))
    assert provenance.sources() == before
    add_a_line(tmp_path / file)
    assert (provenance.sources() != before) == counts


@pytest.mark.parametrize("begun", sorted((REPOSITORY / "studies/results").glob("*/*/study.json")))
def test_keys_of_committed_results_stay(begun: Path):
    """Whatever the project's version is now."""
    number, versions, contents = json.loads(begun.read_text(encoding="utf-8"))["identity"]
    now, packages, same = json.loads(identity_of(contents))
    assert (now, packages["megatron-smlp"], same) == (number, versions["megatron-smlp"], contents)


def table(*lines: tuple[str, str, str, str]) -> pandas.DataFrame:
    columns = ["system", "sources", "machine", "fingerprint"]
    return pandas.DataFrame(lines, columns=columns).reindex(columns=list(FINGERPRINT_COLUMNS))


def test_sources_are_alike_by_fingerprints_of_one_machine():
    known = table(
        ("gmlp", "a", "cpu", "1"), ("gmlp", "b", "cpu", "1"),  # alike
        ("gmlp", "b", "gpu", "2"), ("gmlp", "c", "gpu", "2"),  # also alike, elsewhere
        ("gmlp", "d", "cpu", "2"), ("gmlp", "e", "gpu", "1"),  # the same hash on another machine
        ("switch", "a", "cpu", "3"), ("switch", "d", "cpu", "3"),
    )  # fmt: skip
    assert alike(known, "gmlp", "a") == {"a", "b", "c"}
    assert alike(known, "switch", "a") == {"a", "d"}
    assert alike(known, "gmlp", "never seen") == {"never seen"}


@pytest.fixture
def known(tmp_path: Path) -> State:
    """Return a study that is fully trained, without recorded sources."""
    state = state_of(write_study(tmp_path, horizons=["100K"]), runs=tmp_path / "runs")
    pretend(state, lambda run: 5.0 + run.seed / 100 + len(run.system) / 100)
    return state


def made(known: State, sources: dict[str, str]) -> None:
    for run in known.plan().runs:
        if run.system in sources:
            made_by = {"commit": f"of-{sources[run.system]}", "sources": sources[run.system]}
            note(known.folder_of(run), made_by)


def fingerprinted(folder: Path, *lines: tuple[str, str, str, str]) -> None:
    (folder / "results").mkdir()
    table(*lines).to_csv(folder / "results" / "fingerprints.csv", index=False)


def report(known: State, folder: Path, **how: bool) -> str:
    return page_of(known, folder, **how).text()


OTHERS = "3 of switch, of sources new (commit of-new)"


def test_runs_of_other_sources_are_left_out(known: State, tmp_path: Path):
    made(known, {"transformer": "old", "switch": "new", "smlp_deterministic": "old"})
    text = report(known, tmp_path)
    assert f"left out; --accept-other-sources takes them in: {OTHERS}." in text
    assert "| switch | missing |" in text
    text = report(known, tmp_path, accept_other_sources=True)
    assert f"count by --accept-other-sources: {OTHERS}." in text
    assert "missing" not in text


def test_they_are_compared_where_the_first_steps_are_the_same(known: State, tmp_path: Path):
    """The system that both trained decides: the others' runs then count as of one state."""
    made(known, {"transformer": "old", "switch": "new", "smlp_deterministic": "old"})
    fingerprinted(tmp_path, ("switch", "new", "cpu", "1"), ("switch", "old", "cpu", "1"))
    assert "| switch | missing |" not in report(known, tmp_path)


def test_a_branch_is_of_the_sources_of_its_trunk_too(tmp_path: Path):
    known = state_of(write_study(tmp_path), runs=tmp_path / "runs")
    pretend(known, lambda run: 5.0 + run.seed / 100)
    made(known, dict.fromkeys(known.systems, "old"))
    first = known.plan().runs[0]
    note(known.folder_of(first), {"commit": "x", "sources": "new"})
    text = report(known, tmp_path)
    assert "1 of transformer, of sources old new" in text
    assert "4 of transformer, of sources old (commit of-old)" in text  # its branches


def test_a_plugin_that_is_edited_meanwhile_is_another_source(tmp_path: Path):
    """Each training reads its file anew, a forked one too."""
    path = tmp_path / "mine.py"
    path.write_text("A = 1\n", encoding="utf-8")
    plugin_files.load(str(path))
    before = [made_by_next(processes)["sources"] for processes in (1, 2)]
    path.write_text("A = 2\n", encoding="utf-8")
    after = [made_by_next(processes)["sources"] for processes in (1, 2)]
    assert len({*before}) == len({*after}) == 1
    assert before != after
