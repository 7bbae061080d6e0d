"""Runs several evaluations, one after the other, in one set of processes; see runs.py.

    python -m torch.distributed.run --nproc-per-node 2 tests/support/evaluations.py plan.json

`plan.json` is a list of command lines for tools/evaluate.py.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]


def evaluate_all(command_lines: list[list[str]]) -> None:
    from support.runs import forget_run

    from megatron_smlp.evaluation.cli import evaluate, parse
    from megatron_smlp.training.captured_output import CapturedOutput

    for argv in command_lines:
        with CapturedOutput() as output:
            output.open(None, rank=0)
            evaluate(*parse(argv))
        forget_run()


if __name__ == "__main__":
    evaluate_all(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
