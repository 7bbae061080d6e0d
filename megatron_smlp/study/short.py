"""Short trainings of a system that are no runs of the study: for its speed, and its first steps."""

from __future__ import annotations

import threading
from pathlib import Path

from megatron_smlp.metrics_records import FILE_NAME, Record
from megatron_smlp.study.data import StudyData
from megatron_smlp.study.metrics import read_records
from megatron_smlp.study.process import run_command, training_command
from megatron_smlp.study.systems import System


def train_shortly(
    system: System,
    data: StudyData,
    *,
    folder: Path,
    processes: int,
    stop: threading.Event,
    **flags: int,
) -> tuple[int, list[Record]]:
    """Train a system anew, without its schedule of the learning rate and without a checkpoint;
    return the exit code, and what was logged.

    Args:
        flags: of the training, over the system's.
    """
    (folder / FILE_NAME).unlink(missing_ok=True)
    own = {name: value for name, value in system.flags.items() if not name.startswith("lr_")}
    command = training_command(
        folder, own | {"seed": 1} | flags, paths=[*data.flags, "--log-dir", str(folder)],
        processes=processes,
    )  # fmt: skip
    code = run_command(command, folder=folder, stop=stop, watch=lambda: None)
    return code, read_records(folder)
