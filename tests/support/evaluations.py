"""Run several evaluations, one after another, in one set of processes."""


def evaluate_all(command_lines: list[list[str]]) -> None:
    """Call tools/evaluate.py with each of these command lines."""
    from support.runs import forget_run

    from megatron_smlp.evaluation.cli import evaluate, parse
    from megatron_smlp.training.captured_output import CapturedOutput

    for argv in command_lines:
        with CapturedOutput() as output:
            output.open(None, rank=0)
            evaluate(*parse(argv))
        forget_run()
