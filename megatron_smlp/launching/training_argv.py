"""Read what a launcher needs from the training's command line. No torch."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import MutableMapping, Sequence
from typing import Any

from megatron_smlp.command_line import flag_of, negation_of
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.layout import check_layout
from megatron_smlp.flags.yaml_file import config_paths, read_yaml, spelling
from megatron_smlp.platform import choice

SIZES = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "micro_batch_size": 1,
    "global_batch_size": None,
}
"""What decides whether a number of processes is possible, with Megatron's defaults."""
FROM_CHECKPOINT = "--use-checkpoint-args"
"""Takes flags that are not given from the checkpoint."""


def given(flag: str, argv: Sequence[str]) -> Any:
    """Return a flag's last value on the command line (`--flag VALUE` or `--flag=VALUE`) or, unless
    `--no-FLAG` is given, in the --config file.

    Raises:
        UsageError: that file cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value", nargs="?")
    value = parser.parse_known_args(list(argv))[0].value
    if value is None and negation_of(flag) not in argv:
        name = spelling(flag.removeprefix("--"))
        keys = {spelling(key): entry for key, entry in read_yaml(*config_paths(argv)).items()}
        return keys.get(name)
    return value


def is_on(switch: str, argv: Sequence[str]) -> bool:
    """Return whether a flag without a value is given, on the command line or in the --config file.

    Raises:
        UsageError: that file cannot be read.
    """
    return switch in argv or bool(given(switch, argv))


def limit_connections(argv: Sequence[str], environment: MutableMapping[str, str]) -> None:
    """Apply `choice.limit_connections` for the tensor parallel size that a command line gives.

    Raises:
        UsageError: that is not a number, or the --config file cannot be read.
    """
    choice.limit_connections(_number("--tensor-model-parallel-size", argv) or 1, environment)


def check_counts(argv: Sequence[str], *, machines: range, processes: int) -> None:
    """Check that a run can go on with each number of machines that NNODES=MIN:MAX allows.

    Args:
        processes: per machine.

    Raises:
        UsageError: it cannot, or the batch would change with the number of machines.
    """
    if len(machines) == 1:
        return
    nodes = f"NNODES={machines[0]}:{machines[-1]}"
    sizes = {name: _number(flag_of(name), argv) or default for name, default in SIZES.items()}
    batches = [sizes.pop("global_batch_size")]
    if schedule := given("--step-batch-size-schedule", argv):  # 0:32,64:64
        batches = [int(batch) for batch in re.findall(r":\s*(\d+)", str(schedule))]
    if batches == [None] and not is_on(FROM_CHECKPOINT, argv):
        raise UsageError(f"{nodes} makes the batch size vary: give --global-batch-size.")
    for count, batch in itertools.product(machines, batches):
        layout = argparse.Namespace(**sizes, global_batch_size=batch, world_size=count * processes)
        try:
            check_layout(layout)
        except UsageError as error:
            raise UsageError(
                f"{nodes}: with {count} machines, {error} Or give another NNODES."
            ) from error


def _number(flag: str, argv: Sequence[str]) -> int | None:
    value = given(flag, argv)
    if value is not None and not re.fullmatch(r"0*[1-9]\d*", str(value)):
        raise UsageError(f"{flag} {value}: give a whole number of 1 or more.")
    return None if value is None else int(value)
