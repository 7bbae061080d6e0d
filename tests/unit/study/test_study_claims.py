"""Which claims a study tests, by which comparisons, and why some stay undecided."""

import json
from pathlib import Path

import pytest
from support.studies import (
    NOISE,
    claims_and_text,
    loss_of,
    page_of,
    page_of_study,
    pretend,
    state_of,
    write_study,
)

from megatron_smlp.study.measured import Measured
from megatron_smlp.study.plan import PlannedRun
from megatron_smlp.study.results import Results
from megatron_smlp.study.verdicts import primary_looks


def test_one_lucky_seed_is_not_the_best_system(tmp_path: Path):
    systems = ["switch", "hash", "smlp_deterministic"]
    seeds = {"switch": [11], "others": [11, 12, 13]}
    path = write_study(tmp_path, systems=systems, seeds=seeds)
    known = state_of(path, runs=tmp_path / "runs")
    pretend(known, lambda run: loss_of(run) - 0.1 * (run.system == "switch"))
    claims, _ = claims_and_text(known, tmp_path)
    [comparison] = claims["C2"]["comparisons"]
    assert (comparison["rival"], comparison["difference"]["n"]) == ("hash", 3)


def test_a_better_rival_that_is_still_in_training_is_named(tmp_path: Path):
    path = write_study(tmp_path, systems=["switch", "hash", "smlp_deterministic"])
    known = state_of(path, runs=tmp_path / "runs")
    pretend(known, lambda run: loss_of(run) - 0.1 * (run.system == "hash"))
    last = [run for run in known.plan().runs if run.system == "hash"][-1]
    (known.folder_of(last) / "ended.json").unlink()
    [claim] = [claim for claim in page_of(known, tmp_path).claims if claim.name == "C2"]
    assert [comparison.rival for comparison in claim.comparisons] == ["switch"]
    assert "hash: seed 13 is missing" in claim.notes


def test_token_experts_without_attention_are_no_sparse_transformer(tmp_path: Path):
    """They have the lowest loss of all rivals, but C2 and C4 compare with Switch only."""
    experts = {"num-experts": 4, "token-router": "switch", "moe-token-dispatcher-type": "alltoall"}
    path = write_study(
        tmp_path, systems=["switch", "gmlp_experts", "amlp_experts", "smlp_deterministic"],
        variants={f"{name}_experts": {"from": name, **experts} for name in ("gmlp", "amlp")},
        **{"flops-tolerance": 0.9, "needed-flops-tolerance": 0.9},
    )  # fmt: skip
    known = state_of(path, runs=tmp_path / "runs")
    pretend(known, lambda run: loss_of(run) - 0.1 * run.system.endswith("experts"))
    results = Results(tmp_path / "results")
    results.collect(known)
    results.add_evaluations([
        {"key": run.key, "system": run.system, "seed": run.seed, "kind": "task", "label": "copa",
         "value": 0.5 + NOISE[run.seed], "count": 100, "stderr": 0.01}
        for run in known.plan().runs if run.horizon == known.study.longest
    ])  # fmt: skip
    claims = {claim.name: claim for claim in page_of(known, tmp_path).claims}
    for name in ("C2", "C4"):
        assert [each.rival for each in claims[name].comparisons] == ["switch"]


def test_a_claim_that_ends_level_names_its_rivals(tmp_path: Path):
    made = page_of_study(tmp_path, lambda run: 5.0 + NOISE[run.seed] * (1 + len(run.system) / 40))
    [claim] = [claim for claim in made.claims if claim.name == "C1"]
    assert claim.verdict == "level"
    rivals = ", ".join(f"*{comparison.rival}*" for comparison in claim.comparisons)
    assert f"| **level** | level against {rivals} |" in made.text()


def test_that_each_part_helps_is_of_parts_alone(tmp_path: Path):
    """Both MoEs help; one rule of the feature MoE being worse than the other refutes nothing."""
    systems = ["gmlp", "gmlp_token_moe", "smlp_deterministic", "smlp_partial"]
    no_features = {"from": "smlp_deterministic", "feature-router": "none", "num-feature-experts": 1}
    ablations = [
        ["smlp_deterministic", "gmlp_token_moe"], ["gmlp_token_moe", "gmlp"],
        ["smlp_deterministic", "smlp_partial"],
    ]  # fmt: skip
    path = write_study(
        tmp_path, systems=systems, ablations=ablations, variants={"gmlp_token_moe": no_features},
        **{"flops-tolerance": 0.1, "needed-flops-tolerance": 0.1},
    )  # fmt: skip
    known = state_of(path, runs=tmp_path / "runs")
    losses = dict(zip(systems, (5.0, 4.9, 4.8, 4.0), strict=True))
    pretend(known, lambda run: losses[run.system] + NOISE[run.seed] * (1 + len(run.system) / 40))
    made = page_of(known, tmp_path)
    [claim] = [claim for claim in made.claims if claim.name == "C5"]
    assert claim.verdict == "confirmed"
    assert [(each.system, each.rival) for each in claim.comparisons] == [
        ("smlp_deterministic", "gmlp_token_moe"), ("gmlp_token_moe", "gmlp"),
    ]  # fmt: skip
    [other] = made.others.comparisons
    assert (other.rival, other.verdict, made.others.verdict) == ("smlp_partial", "refuted", "")
    assert other.difference.p == other.difference.holm  # Holm's steps are over these only
    assert "| other | loss behind the prefix: smlp_deterministic - smlp_partial |" in made.text()
    assert len(json.loads(made.json())["others"]) == 1


@pytest.mark.parametrize(
    ("systems", "ablations", "against"),
    [
        (["transformer", "gmlp", "mixer"], [["gmlp", "mixer"], ["transformer", "mixer"]],
         ["transformer", "mixer"]),
        (["gmlp", "mixer"], [["gmlp", "mixer"]], []),  # which is among the other comparisons
    ],
)  # fmt: skip
def test_claims_are_those_that_the_systems_can_decide(
    tmp_path: Path, systems: list[str], ablations: list[list[str]], against: list[str]
):
    """Only dense systems, and a subject that is no sMLP, which is not its own rival."""
    path = write_study(
        tmp_path, systems=systems, subject="gmlp", ablations=ablations,
        **{"needed-flops-tolerance": 0.1},
    )  # fmt: skip
    known = state_of(path, runs=tmp_path / "runs")
    pretend(known, loss_of)
    claims, text = claims_and_text(known, tmp_path)
    assert {
        name: [each["rival"] for each in claim["comparisons"]] for name, claim in claims.items()
    } == ({"C1": against} if against else {})
    for pair in ablations:
        assert f"| other | loss: {' - '.join(pair)} |" in text


def test_a_study_of_ones_own_is_not_about_the_paper(tmp_path: Path):
    """A pair that would belong to C5, and a rival that is an sMLP, are treated like any other."""
    pair = ["smlp_deterministic", "smlp_partial"]
    systems = ["transformer", "switch", *pair]
    for is_papers, claims in ((True, ["C1", "C2", "C3", "C4"]), (False, ["lowest"])):
        folder = tmp_path / str(is_papers)
        folder.mkdir()
        made = page_of_study(folder, loss_of, systems=systems, paper=is_papers, ablations=[pair])
        assert [claim.name for claim in made.claims] == claims
        assert ("paper" in made.text()) == is_papers
    # A claim already has the pair.
    assert [each.rival for each in made.claims[0].comparisons] == [
        "transformer", "switch", "smlp_partial"
    ]  # fmt: skip


def test_the_primary_comparison_is_looked_at_as_seeds_come_in(tmp_path: Path):
    """Looks follow the file's order: without the second of five seeds there is none yet."""
    pair = ["smlp_deterministic", "switch"]
    wobble = {11: 0.0, 12: 0.01, 13: -0.01, 14: 0.005, 15: -0.005}

    def loss_of(run: PlannedRun) -> float:
        return 5.0 + wobble[run.seed] + 0.04 * (run.system == "switch")

    made = page_of_study(tmp_path, loss_of, seeds=[*wobble], primary=pair)
    assert [(each.difference.n, each.verdict) for each in made.looks] == [
        (3, "undecided"), (5, "confirmed"),
    ]  # fmt: skip
    rows = made.text().split("## Primary comparison")[1].split("## Claims")[0]
    assert "| 3 | 0.0005 | 0.0005 | -0.04 |" in rows
    assert "| 5 | 0.0087 | 0.0092 | -0.04 |" in rows
    assert len(json.loads(made.json())["primary"]) == 2
    keys = {
        run.key for run in made.plan.runs
        if (run.system, run.horizon, run.seed) != ("switch", made.study.longest, 12)
    }  # fmt: skip
    fewer = Measured(made.study, made.measured.systems, made.measured.tables.of_runs(keys))
    assert primary_looks(fewer) == []
