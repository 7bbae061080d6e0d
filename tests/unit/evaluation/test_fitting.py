"""Examples that do not fit a model are left out or cut, counted and named; the rest is scored."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import EXAMPLES, LENGTH, TEXT, Run, loaded, write_task

from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation import cli
from megatron_smlp.evaluation.harness import ScorerModel, run_tasks
from megatron_smlp.evaluation.huggingface_model import ExportedModel
from megatron_smlp.evaluation.megatron_scorer import MegatronScorer
from megatron_smlp.evaluation.reports import as_markdown, as_record, task_texts
from megatron_smlp.evaluation.rows import Row
from megatron_smlp.evaluation.selection import select_tasks
from megatron_smlp.library_logging import quiet_libraries

WRITING = """
output_type: generate_until
doc_to_target: " every"
generation_kwargs: {{max_gen_toks: {count}, until: ["absent"]}}
metric_list: [{{metric: exact_match}}]
"""
LONG = f" {TEXT} {TEXT}"
DOCUMENTS = [
    ("the model", [" mixes", " nothing"]),
    ("the model", [" mixes", LONG]),
    ("the model ", ["every token", "nothing"]),
    ("a", ["", "twice"]),
    ("", [" the model", " twice"]),
]
TOO_LONG, WITHOUT_TOKENS = 1, 3


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write custom tasks: some examples do not fit, none does, or no text to generate does."""
    folder: Path = tmp_path_factory.mktemp("own")
    write_task(folder, "some", DOCUMENTS)
    write_task(folder, "rest", [d for n, d in enumerate(DOCUMENTS) if n not in (1, 3)])
    write_task(folder, "never", [DOCUMENTS[1]] * 2)
    write_task(folder, "short", DOCUMENTS[:2], WRITING.format(count=3))
    write_task(folder, "endless", DOCUMENTS[:2], WRITING.format(count=LENGTH))
    (folder / "both.yaml").write_text(
        "group: both\ntask: [never, rest]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n",
        encoding="utf-8",
    )
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


def test_what_fits_is_scored_as_without_the_rest(model: Any, own: Path, tasks: Path):
    found = scored(model, own, tasks, "some", "rest", "copa")
    assert found["copa"].examples == EXAMPLES
    some, rest = found["some"], found["rest"]
    assert (some.examples, rest.examples) == (3, 3)
    assert list(loglikelihoods(some)) == [0, 2, 4]
    assert [*loglikelihoods(some).values()] == [*loglikelihoods(rest).values()]
    assert some.scores == rest.scores
    assert [*some.unfit] == [TOO_LONG, WITHOUT_TOKENS]
    assert some.unfit[TOO_LONG].startswith(f"left out: the option ' {TEXT[:20]}")
    assert f"tokens; the model's limit is {LENGTH}" in some.unfit[TOO_LONG]
    assert "'' has no tokens of its own" in some.unfit[WITHOUT_TOKENS]
    assert rest.unfit == {}
    assert as_record([some])["some"]["unfit"] == 2
    assert task_texts([some])[0].endswith("(2 do not fit)")
    assert "some: 2 of 5 examples do not fit: 1, 3. Example 1 left out" in as_markdown(
        [some], model="m"
    )
    first_two = scored(model, own, tasks, "some", limit=2)["some"]
    assert (first_two.examples, [*first_two.unfit]) == (1, [TOO_LONG])


def test_an_option_that_is_cut_keeps_its_end(model: Any, own: Path, tasks: Path):
    some = scored(model, own, tasks, "some", too_long="truncate")["some"]
    assert some.examples == 4
    assert some.unfit[TOO_LONG].startswith("cut: the option")
    assert some.unfit[WITHOUT_TOKENS].startswith("left out: the option")
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


def test_asked_to_stop_nothing_is_scored(model: Any, own: Path, tasks: Path):
    selection = select_tasks(["copa", "some"], data_dir=str(tasks), include_path=str(own))
    results = run_tasks(model, selection, limit=None, too_long="stop")
    with pytest.raises(UsageError, match=rf"--tasks some, example {TOO_LONG}: the option '"):
        next(results)


def test_a_task_of_which_nothing_fits_keeps_no_other_from_its_score(
    model: Any, own: Path, tasks: Path
):
    """Nor the other task of its group; the group's own score would mislead, and is left out."""
    found = scored(model, own, tasks, "both", "copa")
    examples = {name: result.examples for name, result in found.items()}
    assert examples == {"never": 0, "rest": 3, "copa": EXAMPLES}
    assert [*found["never"].unfit] == [0, 1]
    assert not found["never"].scores


def test_only_exported_models_write(model: Any, own: Path, tasks: Path):
    """Others are refused before the first task is scored."""
    names = ("copa", "endless", "short")
    if isinstance(model, ScorerModel):
        with pytest.raises(UsageError, match="tasks that generate text require an exported model"):
            scored(model, own, tasks, *names)
        return
    found = scored(model, own, tasks, *names)
    assert [result.examples for result in found.values()] == [EXAMPLES, 0, 2]
    assert f"{LENGTH} new tokens (max_gen_toks)" in found["endless"].unfit[0]
    assert math.isfinite(found["short"].scores["exact_match"].value)


def evaluate(words: str) -> None:
    cli.evaluate(*cli.parse(words.split()))


def test_files_have_what_was_scored_before_a_failure(
    run: Run, own: Path, tasks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
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
    files = {kind: tmp_path / f"results.{kind}" for kind in ("json", "jsonl", "md")}
    files["json"].write_text("of an earlier evaluation", encoding="utf-8")
    words = (
        f"--hf {run.exported} --data-dir {tasks} --output {files['json']} "
        f"--samples {files['jsonl']} --markdown {files['md']} --device cpu"
    )
    with pytest.raises(ZeroDivisionError):
        evaluate(f"{words} --include-path {tmp_path} --tasks copa,some,fails")
    written = json.loads(files["json"].read_text(encoding="utf-8"))
    assert [*written["results"]] == ["copa", "some"]
    assert [*written["unfit"]["some"]] == ["1", "3"]
    assert written["model"]["too_long"] == "skip"
    assert len(files["jsonl"].read_text(encoding="utf-8").splitlines()) == EXAMPLES + 3
    assert "| some | acc |" in files["md"].read_text(encoding="utf-8")
    assert "some: 2 of 5 examples do not fit: 1, 3." in capfd.readouterr().out
    with pytest.raises(UsageError, match="--tasks never: no example fits into the model of"):
        evaluate(f"{words} --include-path {own} --tasks never")
