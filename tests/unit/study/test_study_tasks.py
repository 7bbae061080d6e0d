"""Final checkpoints: what is scored, and the claim on zero-shot tasks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
from support.studies import (
    NOISE,
    claims_and_text,
    drawing,
    loss_of,
    page_of,
    pretend,
    state_of,
    study_argv,
    write_study,
)

from megatron_smlp.checkpoints.folders import iteration_folder
from megatron_smlp.conversion import cli as convert
from megatron_smlp.errors import UsageError
from megatron_smlp.study import cli
from megatron_smlp.study.final import _accuracy, what_is_missing
from megatron_smlp.study.measured import Measured
from megatron_smlp.study.results import Results
from megatron_smlp.study.sections import document_lines
from megatron_smlp.study.state import CHECKPOINTS, State
from megatron_smlp.study.tables import Tables


def test_what_was_looked_at_is_not_looked_at_again(tmp_path: Path):
    """Tasks may be added to checkpoints with scored text, and vice versa."""
    results = Results(tmp_path)
    lines = [("text", "routing", "greedy"), ("text", "position", "0"), ("tasks", "task", "copa")]
    for key, kind, label in lines:
        one = {"key": key, "system": "gmlp", "seed": 1, "kind": kind, "label": label, "value": 1.0}
        results.add_evaluations([one])
    tasks = ["copa", "piqa"]
    assert what_is_missing(results.evaluations, "text", ()) == (False, [])
    assert what_is_missing(results.evaluations, "text", tasks) == (False, tasks)
    assert what_is_missing(results.evaluations, "tasks", tasks) == (True, ["piqa"])
    assert what_is_missing(results.evaluations, "neither", tasks) == (True, tasks)
    results.add_evaluations([one | {"value": 0.5}])  # as when a group of tasks is scored again
    assert list(results.evaluations["value"]) == [1.0, 1.0, 0.5]


def test_a_perplexity_is_no_accuracy():
    """lm-evaluation-harness puts lambada's before its accuracy."""
    assert _accuracy("lambada_openai", {"perplexity": 40.0, "acc": 0.3}) == 0.3
    assert _accuracy("hellaswag", {"acc": 0.3, "acc_norm": 0.4}) == 0.4
    with pytest.raises(UsageError, match="--tasks wikitext has word_perplexity, none of acc"):
        _accuracy("wikitext", {"word_perplexity": 40.0})


def test_the_lowest_of_the_longest_runs_is_exported(
    known: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pretend(known, loss_of)  # the lowest of switch is seed 11's
    argv = ["--systems", "switch", "--save", str(tmp_path / "models"), "--license", "cc0-1.0"]
    with pytest.raises(UsageError, match="switch has no checkpoint at the longest horizon"):
        cli.main(study_argv("export", tmp_path, *argv))
    for run in known.plan().runs:
        iteration_folder(known.folder_of(run) / CHECKPOINTS, run.end).mkdir(parents=True)
    asked: list[list[str]] = []
    monkeypatch.setattr(convert, "main", asked.append)
    assert cli.main(study_argv("export", tmp_path, *argv)) == 0
    [[_, load, _, save, *rest]] = asked
    [best] = [r for r in known.plan().runs if known.folder_of(r) / CHECKPOINTS == Path(load)]
    assert (best.system, best.seed, best.horizon) == ("switch", 11, known.study.longest)
    assert Path(save) == tmp_path / "models" / "small-switch"
    assert rest == ["--to", "hf", "--license", "cc0-1.0"]


def test_what_final_checkpoints_were_found_to_do(known: State, tmp_path: Path):
    """C4 by hand: two tasks, 3 % more right answers, and seeds that differ by less."""
    pretend(known, loss_of)
    results = Results(tmp_path / "results")
    results.collect(known)
    ahead = {"smlp_deterministic": 0.03}
    finals = results.runs[results.runs["horizon"] == known.study.longest]
    keys = {(run.system, run.seed): run.key for run in finals.itertuples()}
    for name in known.systems:
        for seed, wobble in NOISE.items():
            right = 0.5 + ahead.get(name, 0.0) + wobble
            common = {"key": keys[name, seed], "system": name, "seed": seed, "stderr": 0.01}
            numbers = [
                ("task", "copa", right), ("task", "piqa", right + 0.1), ("repeat", "new", 6.0),
                ("repeat", "after 3+", 2.0 - right), ("position", "0", 7.0),
            ]  # fmt: skip
            results.add_evaluations([
                common | {"kind": kind, "label": label, "value": value, "count": 100}
                for kind, label, value in numbers
            ])  # fmt: skip
    claims, text = claims_and_text(known, tmp_path)
    assert claims["C4"]["verdict"] == "confirmed"
    [comparison] = claims["C4"]["comparisons"]
    assert comparison["rival"] == "switch"
    assert comparison["difference"]["mean"] == pytest.approx(-3.0)
    assert "| smlp_deterministic | 53.0 ± 1.0 | 63.0 ± 1.0 |" in text
    assert "| smlp_deterministic | 6 | 1.47 |" in text
    figures = dict(drawing(made := page_of(known, tmp_path)).figures(made.times))
    figures["where-the-loss-lies"].savefig(tmp_path / "lies.png")
    assert (tmp_path / "lies.png").stat().st_size > 10_000


BOOKS = 10


def by_book(
    known: State, rng: np.random.Generator, *, seeds: float, books: float
) -> tuple[str, ...]:
    """Return the cells of Switch's row, which is 0.05 behind sMLP in bits per byte of ten books.

    Books differ in difficulty, and in Switch's gap with deviation `books`; runs differ with
    deviation `seeds`, by the same amount in all books."""
    hard, behind = rng.normal(2.0, 0.3, BOOKS), rng.normal(0.05, books, BOOKS)
    lines = [
        {"system": name, "seed": seed, "kind": "document", "label": str(book + 1), "value": value}
        for name in known.systems
        for seed in known.study.seeds_of(name)
        for book, value in enumerate(hard + rng.normal(0, seeds) + behind * (name == "switch"))
    ]
    tables = replace(Tables.of(Results(Path("none"))), evaluations=pandas.DataFrame(lines))
    made = Measured(known.study, known.systems, tables)
    [row] = [line for line in document_lines(made) if line.startswith("| switch")]
    return tuple(cell.strip() for cell in row.strip("|").split("|"))


@pytest.mark.parametrize(
    ("seeds", "books", "too_narrow"), [(0.002, 0.04, "seeds"), (0.03, 0.02, "books")]
)
def test_bits_per_byte_are_compared_over_seeds_and_over_books(
    tmp_path: Path, seeds: float, books: float, too_narrow: str
):
    """An interval over only one of the two does not hold for other seeds and other books."""
    path = write_study(tmp_path, systems=["switch", "smlp_deterministic"])
    known = state_of(path, runs=tmp_path)
    rng, covered = np.random.default_rng(1), {"seeds": [], "books": [], "both": []}
    for _ in range(30):
        cells = by_book(known, rng, seeds=seeds, books=books)
        for own, cell in zip(covered.values(), cells[3:6], strict=True):
            low, high = map(float, cell.partition(" (")[0].split(" to "))
            own.append(low < 0.05 < high)
    shares = {name: np.mean(own) for name, own in covered.items()}
    assert shares[too_narrow] < 0.75
    assert shares["both"] > 0.87
    assert (cells[4].endswith("(9)"), cells[-1]) == (True, "3")
    assert float(cells[2]) == pytest.approx(0.05, abs=0.1)


def test_few_questions_decide_nothing_however_the_seeds_agree(known: State, tmp_path: Path):
    """Five more of a hundred are right, and three seeds agree: by the questions that is luck."""
    pretend(known, loss_of)
    ahead = {"smlp_deterministic": 0.05}
    Results(tmp_path / "results").add_evaluations([
        {"key": run.key, "system": run.system, "seed": run.seed, "kind": "task", "label": "copa",
         "value": 0.55 + ahead.get(run.system, 0.0) + NOISE[run.seed], "stderr": 0.05}
        for run in known.plan().runs
        if run.horizon == known.study.longest
    ])  # fmt: skip
    claims, _ = claims_and_text(known, tmp_path)
    [comparison] = claims["C4"]["comparisons"]
    assert comparison["difference"]["mean"] == pytest.approx(-5)
    half = 1.96 * 5 * 2**0.5
    assert comparison["difference"]["high"] == pytest.approx(-5 + half, rel=0.01)
    assert claims["C4"]["verdict"] == "undecided"
