"""Study files: what is read, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cover import slow_unless_in
from support.launches import REPOSITORY
from support.studies import state_of, write_study

from megatron_smlp.errors import UsageError
from megatron_smlp.study.fairness import check_fair
from megatron_smlp.study.plan import make_plan
from megatron_smlp.study.process import training_command
from megatron_smlp.study.study_file import read_studies
from megatron_smlp.study.systems import read_systems

FILES = sorted((REPOSITORY / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_study_of_the_project_is_fair(path: Path):
    name, studies = read_studies(path)
    assert name == path.stem
    for study in studies:
        systems = read_systems(study, folder=path.parent)
        check_fair(study, systems)
        assert list(systems) == list(study.systems)


# The other studies have systems of these alone, some at other sizes.
FAST = ("micro", "mixers", "muon", "paper", "recipe", "routers")


@pytest.mark.parametrize("name", slow_unless_in(FAST, [path.stem for path in FILES]))
def test_training_takes_the_flags_of_every_system(
    parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
):
    """As its runs start: what a layer's sizes must divide is only checked there."""
    path = REPOSITORY / "studies" / f"{name}.yaml"
    monkeypatch.setenv("WORLD_SIZE", {"paper": "8", "paper_large": "128"}.get(name, "1"))
    for study in read_studies(path)[1]:
        systems = read_systems(study, folder=path.parent)
        plan = make_plan(study, systems, identity="", losses={}, failed=())
        data = f"--mock-data --tokenizer-type NullTokenizer --vocab-size {study.vocab_size}"
        paths = [*data.split(), "--save", str(tmp_path)]
        flags = {run.system: run.flags for run in (*plan.runs, *plan.pending)}
        assert flags.keys() == systems.keys()
        for own in flags.values():
            command = training_command(tmp_path, own, paths=paths, processes=1)
            parse(" ".join(command[2:]), base="")


DESIGN = {"lr": [0.5, 1, 2], "seeds": [1, 2, 3]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": [1]}, "unknown key 'horizon': did you mean horizons?"),
        ({"primary": ["smlp_deterministic", "gmlp"]}, "'gmlp' is not in `systems`"),
        ({"design": DESIGN}, "cannot be combined with tuning or seeds"),
        ({"seeds": None, "design": DESIGN | {"seeds": [1, 2]}}, "as many rates as there are seeds"),
        ({"seeds": [11, 11]}, "an item is repeated"),
        ({"horizons": ["12 miles"]}, "give a number of tokens"),
        ({"seeds": {"transformer": [1]}}, "none for 'switch'"),
        ({"tuning": {"seed": 11, "horizon": 1000, "lr": [1]}}, "also the tuning's"),
        ({"decay": 1.5}, "between 0 and 1"),
        ({"subject": None}, "missing .* 'subject'"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        read_studies(write_study(tmp_path, **changes))


def test_what_is_compared_may_differ(tmp_path: Path):
    """Nothing else of the optimizer may."""
    variants = {"switch": {"from": "switch", "weight-decay": 0.0, "clip-grad": 2.0}}

    def check(*names: str) -> None:
        path = write_study(tmp_path, variants=variants, **{"may-differ": list(names)})
        state_of(path, runs=tmp_path)

    check("weight-decay", "clip_grad")
    with pytest.raises(UsageError, match="--clip-grad differs"):
        check("weight-decay")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"variants": {"switch": {"from": "switch", "ffn-hidden-size": 64}}},
            "small: FLOPs per token, full squares .* differ by",
        ),
        *(
            ({"variants": {"switch": {"from": "switch", flag: value}}}, f"--{flag} differs")
            for flag, value in {
                "global-batch-size": 16,
                "min-lr": 5.0e-4,
                "adam-beta2": 0.5,
                "eval-iters": 3,
                "adam-eps": 1.0e-3,
            }.items()
        ),
        ({"fixed": {"seed": 3}}, "the study sets it for each run"),
        (
            {
                "may-differ": ["seq-length"],
                "variants": {"switch": {"from": "switch", "seq-length": 128}},
            },
            "--seq-length differs",
        ),
        ({"variants": {"switch": {"plugin": "mine.py"}}}, "system's own .*switch.yaml"),
    ],
)
def test_what_is_not_fair_is_refused_with_a_table(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    path = write_study(tmp_path, **changes)
    _, [study] = read_studies(path)
    with pytest.raises(UsageError, match=message) as refusal:
        check_fair(study, read_systems(study, folder=tmp_path))
    table = str(refusal.value).splitlines()[1:]
    assert bool(table) == message.startswith(("small:", "--"))
    assert not table or any(line.split()[0] == "smlp_deterministic" for line in table)


def test_the_needed_convention_is_held_too(tmp_path: Path):
    systems = ["transformer", "gmlp", "smlp_deterministic"]
    _, [study] = read_studies(write_study(tmp_path, systems=systems))
    systems = read_systems(study, folder=tmp_path)
    with pytest.raises(UsageError, match=r"needed \(triangles\), differ by 5"):
        check_fair(study, systems)


def test_evaluation_drops_nothing(tmp_path: Path):
    systems = read_systems(read_studies(write_study(tmp_path))[1][0], folder=tmp_path)
    assert "moe_eval_capacity_factor" not in systems["switch"].flags
    assert "nothing is dropped" in systems["switch"].evaluation
