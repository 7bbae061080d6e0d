"""Our dispatcher of tokens with one expert each is bitwise Megatron's, on gloo and where the CPU
stands in for a CUDA device, whose operators and waits are counted."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cover import selected, slow_unless_in
from support.dispatches import LAYOUTS, compare
from support.launches import REPOSITORY, launch_calls, run_command

Answers = dict[str, list[dict[str, dict[str, Any]]]]
SPLIT = "tp2_ep2_split_experts"
MOST_OPERATORS, MOST_WAITS = 12, 1


@pytest.fixture(scope="module", params=["gloo", pytest.param("stand-in", marks=pytest.mark.slow)])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Map each layout to each rank's answers: case -> what `compare` writes."""
    folder: Path = tmp_path_factory.mktemp("dispatches")
    asked = [layout for layout in LAYOUTS if (layout,) in selected(request, "layout")] or [*LAYOUTS]
    if request.param == "gloo":
        for layout in asked:
            ranks = LAYOUTS[layout][0]
            launch_calls(compare, str(folder), layout, processes=ranks, log=folder / "log")
    else:
        script = str(REPOSITORY / "tests" / "support" / "dispatches.py")
        run_command([sys.executable, script, str(folder), *asked], CUDA_VISIBLE_DEVICES="")
    return {
        layout: [
            json.loads((folder / f"{layout}-{rank}.json").read_text(encoding="utf-8"))
            for rank in range(LAYOUTS[layout][0])
        ]
        for layout in asked
    }


@pytest.mark.parametrize("layout", slow_unless_in(["ep2", SPLIT], LAYOUTS))
def test_results_are_megatrons_to_the_bit(answers: Answers, layout: str):
    """Outputs, and gradients of tokens, routers and experts, also if an expert has no token, or a
    rank has none or all."""
    expected = "MoEAlltoAllTokenDispatcher" if layout == SPLIT else "TopOneDispatcher"
    for rank, cases in enumerate(answers[layout]):
        for case, answer in cases.items():
            assert answer["kind"] == expected
            assert answer["same"], f"{layout}, rank {rank}, {case}"
            assert min(answer["norms"]) > 0, f"{layout}, rank {rank}, {case}"


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["stand-in"], indirect=True)
def test_a_layer_asks_for_few_operators_and_one_number(answers: Answers):
    """In a forward pass, from the router's choices to the layer's output, without the experts."""
    counted = {
        layout: [case["sorted"] for cases in ranks for case in cases.values()]
        for layout, ranks in answers.items()
        if layout != SPLIT
    }
    megatrons = [case["megatron"] for case in answers["ep2"][0].values()]
    for pairs in counted.values():
        assert all(
            operators <= MOST_OPERATORS and waits <= MOST_WAITS for operators, waits in pairs
        )
    assert min(operators for operators, _ in megatrons) > MOST_OPERATORS
