"""Megatron's model in a program that does not train."""

import signal

from evaluation_helpers import Run, loaded


def test_a_program_that_loaded_a_model_is_ended_by_sigterm(run: Run) -> None:
    """Megatron's handler notes the signal for a training loop, which is not there to look."""
    before = signal.getsignal(signal.SIGTERM)
    with loaded(run.checkpoint):
        assert signal.getsignal(signal.SIGTERM) == before
