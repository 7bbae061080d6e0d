"""Read what a launcher needs from the training's command line. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_smlp.errors import UsageError
from megatron_smlp.flags.yaml_file import read_yaml, spelling


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """Return the last value of `--flag VALUE` or `--flag=VALUE`; None if it is not given."""
    value = None
    for at, word in enumerate(words):
        if word == flag and at + 1 < len(words):
            value = words[at + 1]
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def given(flag: str, words: Sequence[str]) -> Any:
    """Return a flag's value from the command line or from the file of --config.

    Raises:
        UsageError: that file cannot be read.
    """
    value = value_of(flag, words)
    config = value_of("--config", words)
    if value is None and config:
        name = spelling(flag.removeprefix("--"))
        keys = {spelling(key): entry for key, entry in read_yaml(Path(config)).items()}
        return keys.get(name)
    return value


def check_counts(words: Sequence[str], *, machines: range, processes: int) -> None:
    """Check that a run can go on with each number of machines that NNODES=MIN:MAX lets it have.

    Args:
        processes: on a machine.

    Raises:
        UsageError: it cannot, or the batch would change with their number.
    """
    if len(machines) == 1:
        return
    nodes = f"NNODES={machines[0]}:{machines[-1]}"
    batch = given("--global-batch-size", words)
    if batch is None:
        raise UsageError(f"{nodes} changes the batch with the machines: give --global-batch-size.")
    tensor, pipeline, expert = (
        int(given(f"--{name}-parallel-size", words) or 1)
        for name in ("tensor-model", "pipeline-model", "expert-model")
    )
    expert *= int(given("--expert-tensor-parallel-size", words) or tensor)
    model, experts = tensor * pipeline, expert * pipeline
    step = int(given("--micro-batch-size", words) or 1)
    for count in machines:
        total = count * processes
        if total % model or int(batch) % (step * (total // model)):
            of_model = f", {model} a model" if model > 1 else ""
            raise UsageError(
                f"{nodes}: {count} machines have {total} processes{of_model}, among which "
                f"--global-batch-size {batch} cannot be shared in micro-batches of {step}: give a "
                "batch that suits every number of machines, or another NNODES."
            )
        if total % experts:
            raise UsageError(
                f"{nodes}: {count} machines have {total} processes, over which experts of "
                f"{experts} cannot be spread: give another NNODES, or lower "
                "--expert-model-parallel-size."
            )
