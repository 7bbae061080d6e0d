"""Local files of the six tasks are found, checked, and turned into the harness's own documents."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import write_task
from lm_eval.api.model import LM

from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.harness import run_tasks
from megatron_smlp.evaluation.selection import Selection, select_tasks

ROWS: dict[str, Any] = {
    "copa.jsonl": {
        "premise": "The man broke his toe.", "choice1": "He got a hole in his sock.",
        "choice2": "He dropped a hammer on his foot.", "question": "cause", "label": 1,
    },
    "piqa.jsonl": {"goal": "dresser", "sol1": "a bobby pin", "sol2": "finish it", "label": 1},
    "winogrande.jsonl": {
        "sentence": "The trophy does not fit into the case because the _ is too big.",
        "option1": "trophy", "option2": "case", "answer": "1",
    },
    "hellaswag.jsonl": {
        "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "endings": ["is [laughing].", "starts pulling up roofing."], "label": 1,
    },
    "record.jsonl": {
        "passage": {
            "text": "Ada met Bob.\n@highlight\nThey talked",
            "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 0, "end": 2}],
        },
        "qas": [
            {"query": "@placeholder was met.", "answers": [{"start": 8, "end": 10, "text": "Bob"}]},
            {"query": "@placeholder came.", "answers": [{"start": 0, "end": 2, "text": "Ada"}]},
        ],
    },
}  # fmt: skip
STORY = (
    "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
    "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding\n"
    'x,"Ann, 9, ran.",She fell.,It hurt.,She cried.,She laughed.,Mum came.,2\n'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("tasks")
    for name, row in ROWS.items():
        (made / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    (made / "storycloze.csv").write_text(STORY, encoding="utf-8")
    return made


def requests(selection: Selection) -> dict[str, list[list[tuple[str, str]]]]:
    """Map each task to its documents' (context, option) pairs, as a model gets them."""
    made = {}
    for task in selection.tasks:
        task.build_all_requests()
        documents: dict[int, list[tuple[str, str]]] = {}
        for instance in task.instances:
            documents.setdefault(instance.doc_id, []).append(instance.args)
        made[task.config.task] = list(documents.values())
    return made


def test_prompts_are_those_of_the_harness(folder: Path):
    names = ["copa", "piqa", "storycloze", "winogrande", "hellaswag", "record"]
    made = requests(select_tasks(names, data_dir=str(folder)))
    assert made["copa"] == [
        [
            ("The man broke his toe because", f"  {choice}")  # two spaces, as in the harness
            for choice in ("he got a hole in his sock.", "he dropped a hammer on his foot.")
        ]
    ]
    assert made["piqa"][0][1] == ("Question: dresser\nAnswer:", " finish it")
    story = "Ann, 9, ran. She fell. It hurt. She cried."
    assert made["storycloze"] == [[(story, " She laughed."), (story, " Mum came.")]]
    assert made["winogrande"][0] == [
        (f"The trophy does not fit into the case because the {word}", " is too big.")
        for word in ("trophy", "case")
    ]
    context = "Roof shingle removal: A man is sitting on a roof. He"
    assert made["hellaswag"] == [[(context, " is ."), (context, " starts pulling up roofing.")]]
    assert len(made["record"]) == 2
    assert made["record"][0] == [
        ("Ada met Bob.\n\n  - They talked.\n", f"   - {name} was met.") for name in ("Ada", "Bob")
    ]


def test_copa_asks_in_the_papers_words(folder: Path):
    made = requests(select_tasks(["copa"], data_dir=str(folder), prompt_style="paper"))
    context = "The man broke his toe. What was the CAUSE of this?"
    assert made["copa_paper"][0][1] == (context, " He dropped a hammer on his foot.")


@pytest.mark.parametrize(
    ("name", "right"),
    [
        *(("copa", 1), ("copa_paper", 1), ("piqa", 1)),
        *(("storycloze", 1), ("winogrande", 0), ("hellaswag", 1)),
    ],
)
def test_the_right_option_counts(folder: Path, name: str, right: int):
    """And only that one: a document scores 1 if its right option is the likeliest, else 0."""
    plain, _, style = name.partition("_")
    [task] = select_tasks([plain], data_dir=str(folder), prompt_style=style or "harness").tasks
    assert task.config.task == name
    [doc] = task.eval_docs
    for likeliest in (0, 1):
        scores = [(-1.0 if option == likeliest else -2.0, False) for option in (0, 1)]
        assert task.process_results(doc, scores)["acc"] == (likeliest == right)


@pytest.mark.parametrize(
    ("likeliest", "f1", "em"),
    [("Ada", 1, 1), ("Ada Byron", 1, 1), ("Ada King", 2 / 3, 0), ("Eve", 0, 0)],
)
def test_records_likeliest_entity_counts_by_the_nearest_answer(
    tmp_path: Path, likeliest: str, f1: float, em: float
):
    entities = ["Ada King", "Eve", "Ada Byron", "Ada"]
    passage = {"text": ", ".join(entities), "entities": []}
    for entity in entities:
        start = passage["text"].rindex(entity) if entity == "Ada" else passage["text"].index(entity)
        passage["entities"].append({"start": start, "end": start + len(entity) - 1})
    answers = [{"text": text} for text in ("Ada Byron", "ADA")]
    row = {"passage": passage, "qas": [{"query": "@placeholder came.", "answers": answers}]}
    (tmp_path / "record.jsonl").write_text(json.dumps(row), encoding="utf-8")
    [task] = select_tasks(["record"], data_dir=str(tmp_path)).tasks
    [doc] = task.eval_docs
    assert task.doc_to_target(doc) == "  - ADA came."
    scores = [(-float(likeliest != entity), False) for entity in sorted(entities)]
    found = task.process_results(doc, scores)
    assert found == {"f1": pytest.approx(f1), "em": em}


CAPITALS = [("The capital of France is", [" Paris", " Rome"])]


def test_a_task_of_ones_own(folder: Path, tmp_path: Path):
    write_task(tmp_path, "capitals", CAPITALS)
    include = {"data_dir": str(folder), "include_path": str(tmp_path)}
    made = requests(select_tasks(["capitals", "copa"], **include))
    [(context, options)] = CAPITALS
    assert made["capitals"] == [[(context, option) for option in options]]
    assert set(made) == {"capitals", "copa"}
    with pytest.raises(UsageError, match=r"^capital is not a task: did you mean capitals"):
        select_tasks(["capital"], **include)
    with pytest.raises(UsageError, match=r"--include-path .*absent is not a folder"):
        select_tasks(["copa"], data_dir=None, include_path=str(tmp_path / "absent"))


SHUFFLING = """
import random
from datasets import Dataset


def shuffled(doc):
    return {"question": doc["question"], "options": random.sample(doc["options"], 9)}


def load(**metadata):
    doc = {"question": "Which?", "options": [*"abcdefghi"]}
    return {"train": Dataset.from_list([shuffled(doc)])}


def process(dataset):
    return dataset.map(shuffled)
"""


class Recorder(LM):
    """A model that keeps what it is asked."""

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        self.asked = [request.args for request in requests]
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Any) -> list[str]:
        raise NotImplementedError


@pytest.mark.parametrize("how", ["as they are loaded", "as they are asked"])
def test_every_process_asks_options_in_the_same_order(folder: Path, tmp_path: Path, how: str):
    """Tasks such as GPQA shuffle them. Ranks whose texts differ would wait for each other, and a
    score would be another one on each machine."""
    write_task(tmp_path, "shuffling", [("Which?", [*"abcdefghi"])])
    (tmp_path / "draws.py").write_text(SHUFFLING, encoding="utf-8")
    path = tmp_path / "shuffling.yaml"
    text = path.read_text(encoding="utf-8").replace(
        "dataset_path", "custom_dataset: !function draws.load\n#"
    )
    text = text.replace("dataset_kwargs", "#")
    if how == "as they are asked":
        text += "process_docs: !function draws.process\n"
    path.write_text(text, encoding="utf-8")
    asked = []
    for process in range(2):
        random.seed(process)
        selection = select_tasks(["shuffling"], data_dir=str(folder), include_path=str(tmp_path))
        random.seed(process)
        model = Recorder()
        list(run_tasks(model, selection, limit=None))
        asked.append(model.asked)
    assert asked[0] == asked[1]
    assert len(asked[0]) == 9


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
@pytest.mark.slow
def test_no_network_is_one_line():
    """Without --data-dir the harness downloads from the hub."""
    with pytest.raises(UsageError, match=r"task copa cannot be loaded .* --data-dir"):
        select_tasks(["copa"], data_dir=None)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "wrong",
    [
        ("dataset_path: json", "dataset_path: nobody/nothing"),
        ('"{{question}}"', "!function absent.text"),
        ("test_split: train", "test_split: none"),
        ("{{question}}", "{{question"),
    ],
)
def test_a_mistake_in_a_task_of_ones_own_is_named_with_its_file(
    folder: Path, tmp_path: Path, wrong: tuple[str, str]
):
    write_task(tmp_path, "capitals", CAPITALS)
    path = tmp_path / "capitals.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace(*wrong), encoding="utf-8")
    with pytest.raises(UsageError, match=rf"task capitals .*{path}"):
        select_tasks(["copa", "capitals"], data_dir=str(folder), include_path=str(tmp_path))


@pytest.mark.parametrize(
    ("task", "name", "value"),
    [
        *(("copa", "label", value) for value in ("one", 2, -1, True, 1.0, None)),
        *(("copa", "question", "why"), ("copa", "choice1", ""), ("copa", "choice2", ["a"])),
        *(("piqa", "sol1", " "), ("winogrande", "answer", "3"), ("winogrande", "option2", None)),
        *(("hellaswag", name, value) for name, value in (("label", 2), ("endings", []))),
        *(("record", "passage", value) for value in ("text", {"text": "Ada"})),
        ("record", "qas", [{"query": "a"}]),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_its_line(
    tmp_path: Path, task: str, name: str, value: Any
):
    good = ROWS[f"{task}.jsonl"]
    lines = [json.dumps(good), json.dumps(good | {name: value})]
    (tmp_path / f"{task}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UsageError, match=rf"^{tmp_path / task}\.jsonl:2 is invalid for task"):
        select_tasks([task], data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("copa.jsonl", b'{"premise": "a"}\n', ":1"),
        ("copa.jsonl", b'\n{"premise": \n', ":2"),
        ("copa.jsonl", b"[1]\n", ":1"),
        ("copa.jsonl", b"", ""),
        ("copa.jsonl", b"\xff\xfe{}", ""),
        ("storycloze.csv", STORY.replace(",2\n", ",3\n").encode(), ":2"),
        ("storycloze.csv", STORY.replace(",Mum came.,2", "").encode(), ":2"),
        ("storycloze.csv", STORY.replace('ran."', "ran.").encode(), ""),
    ],
)
def test_a_malformed_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, line: str
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"^{tmp_path / name}{line} "):
        select_tasks([Path(name).stem], data_dir=str(tmp_path))


def test_numbers_as_text_and_ends_of_lines_within_a_string(tmp_path: Path):
    """Also a byte order mark. Two characters at which Python ends lines do not end JSON's."""
    copa = {**ROWS["copa.jsonl"], "premise": "A\u2028man\u0085ran.", "label": "1"}
    text = "\ufeff" + json.dumps(copa, ensure_ascii=False) + "\r\n"
    (tmp_path / "copa.jsonl").write_text(text, encoding="utf-8", newline="")
    wino = {**ROWS["winogrande.jsonl"], "answer": 1}
    (tmp_path / "winogrande.jsonl").write_text(json.dumps(wino), encoding="utf-8")
    selection = select_tasks(["copa", "winogrande"], data_dir=str(tmp_path))
    made = requests(selection)
    assert made["copa"][0][0][0] == "A\u2028man\u0085ran because"
    copa_task, wino_task = selection.tasks
    assert [doc["label"] for doc in copa_task.validation_docs()] == [1]
    assert [doc["answer"] for doc in wino_task.validation_docs()] == ["1"]


def test_a_task_has_one_file(tmp_path: Path):
    with pytest.raises(UsageError, match=r"has no copa\*\.jsonl .*superglue/data/v2/COPA\.zip"):
        select_tasks(["copa"], data_dir=str(tmp_path))
    for name in ("copa_a.jsonl", "copa_b.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROWS["copa.jsonl"]), encoding="utf-8")
    with pytest.raises(UsageError, match=r"several files for copa: copa_a\.jsonl, copa_b\.jsonl"):
        select_tasks(["copa"], data_dir=str(tmp_path))
