"""Tasks of one's own: options longer than the model, texts to generate, and code that fails."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import (
    EXAMPLES,
    LENGTH,
    TEXT,
    WRITING,
    Run,
    instances,
    loaded,
    write_task,
)

from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation import cli
from megatron_smlp.evaluation.harness import ScorerModel, run_tasks
from megatron_smlp.evaluation.huggingface_model import ExportedModel
from megatron_smlp.evaluation.megatron_scorer import MegatronScorer
from megatron_smlp.evaluation.rows import Row
from megatron_smlp.evaluation.selection import select_tasks
from megatron_smlp.library_logging import quiet_libraries

# What a token costs is compared over systems in test_scores.py.
pytestmark = pytest.mark.parametrize("run", ["partial"], indirect=True)

LONG = f" {TEXT} {TEXT}"
DOCUMENTS = [
    ("the model", [" mixes", " nothing"]),
    ("the model", [" mixes", LONG]),
    ("the model ", ["every token", "nothing"]),
    ("", [" the model", " twice"]),
]
TOO_LONG = 1


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write tasks with an option that is too long, and with texts to generate."""
    folder: Path = tmp_path_factory.mktemp("own")
    write_task(folder, "some", DOCUMENTS)
    write_task(folder, "writing", DOCUMENTS[:2], WRITING)
    write_task(folder, "endless", DOCUMENTS[:2], WRITING.replace("3", f"{LENGTH}"))
    return folder


@pytest.fixture(scope="module", params=["ours", "exported"])
def model(request: pytest.FixtureRequest, run: Run) -> Iterator[Any]:
    if request.param == "exported":
        yield ExportedModel(run.exported, batch_size=1, device="cpu")
        return
    with loaded(run.checkpoint) as (_, stages, tokenizer):
        scorer = MegatronScorer(stages, longest=LENGTH, batch_size=8)
        yield ScorerModel(scorer, tokenizer)


def scored(model: Any, own: Path, tasks: Path, *names: str, **how: Any) -> dict[str, Any]:
    with quiet_libraries():
        selection = select_tasks(names, data_dir=str(tasks), include_path=str(own))
        return {r.task: r for r in run_tasks(model, selection, **({"limit": None} | how))}


def loglikelihoods(result: Any) -> dict[int, list[float]]:
    return {sample["doc_id"]: sample["loglikelihoods"] for sample in result.samples}


def test_an_option_that_is_cut_keeps_its_end(model: Any, own: Path, tasks: Path):
    some = scored(model, own, tasks, "some")["some"]
    assert some.examples == len(DOCUMENTS)
    tokens = tuple(model.tok_encode(LONG))[-LENGTH - 1 :]
    cut = loglikelihoods(some)[TOO_LONG][1]
    if isinstance(model, ScorerModel):
        assert cut == pytest.approx(sum(model.scorer.score([Row(tokens, LENGTH)])[0].logprobs))
    else:
        ids = model.model.dummy_inputs["input_ids"].new_tensor([tokens[:-1]])
        logits = model.model(ids).logits.detach()
        targets = logits.new_tensor(tokens[1:]).long()
        assert cut == pytest.approx(
            float(logits[0].log_softmax(-1).gather(1, targets[:, None]).sum()), abs=1e-3
        )


def test_an_option_without_tokens_is_never_chosen(run: Run):
    with loaded(run.checkpoint) as (_, stages, tokenizer):
        model = ScorerModel(MegatronScorer(stages, longest=LENGTH, batch_size=8), tokenizer)
        cases = instances([("the model", ""), ("the model", " mixes")])
        (empty, chosen), (score, _) = model.loglikelihood(cases)
        assert model.loglikelihood(cases[1:])[0][0] == pytest.approx(score)
    assert (empty, chosen) == (-math.inf, False)
    assert math.isfinite(score)


def test_only_exported_models_write(model: Any, own: Path, tasks: Path):
    """Others are refused before the first task is scored."""
    names = ("copa", "writing")
    if isinstance(model, ScorerModel):
        with pytest.raises(UsageError, match="tasks that generate text require an exported model"):
            scored(model, own, tasks, *names)
        return
    found = scored(model, own, tasks, *names)
    assert [result.examples for result in found.values()] == [EXAMPLES, 2]
    assert math.isfinite(found["writing"].scores["exact_match"].value)
    with pytest.raises(UsageError, match=f"--tasks endless asks for {LENGTH} new tokens"):
        scored(model, own, tasks, "copa", "endless")


def evaluate(flags: str) -> None:
    cli.evaluate(*cli.parse(flags.split()))


def test_files_have_what_was_scored_before_a_failure(
    run: Run, tasks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """The failure is in a task's own code, after the model has scored it."""
    write_task(tmp_path, "fails", DOCUMENTS[:1])
    with (tmp_path / "fails.yaml").open("a", encoding="utf-8") as file:
        file.write("process_results: !function failing.results\n")
    (tmp_path / "failing.py").write_text(
        "def results(doc, answers):\n    return {'acc': 1} if doc.get('absent') else 1 / 0\n",
        encoding="utf-8",
    )
    write_task(tmp_path, "some", DOCUMENTS)
    files = {kind: tmp_path / f"results.{kind}" for kind in ("json", "jsonl")}
    files["json"].write_text("of an earlier evaluation", encoding="utf-8")
    flags = (
        f"--hf {run.exported} --data-dir {tasks} --output {files['json']} "
        f"--samples {files['jsonl']} --device cpu"
    )
    with pytest.raises(ZeroDivisionError):
        evaluate(f"{flags} --include-path {tmp_path} --tasks copa,some,fails")
    written = json.loads(files["json"].read_text(encoding="utf-8"))
    assert [*written["results"]] == ["copa", "some"]
    assert len(files["jsonl"].read_text(encoding="utf-8").splitlines()) == EXAMPLES + len(DOCUMENTS)
    assert "some" in capfd.readouterr().out
