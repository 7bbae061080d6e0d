"""Parameters that the distributed optimizer gathers during the forward pass (Megatron's hooks).

With --overlap-param-gather a parameter is complete only after a forward pre-hook has waited for it.
Whatever else reads parameters (evaluation, a save, a comparison of replicas) needs all complete.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron.training.training import (
    disable_forward_pre_hook,
    enable_forward_pre_hook,
    force_param_sync,
    should_disable_forward_pre_hook,
)

from megatron_smlp.training.parts import Parts


class ParameterGathering:
    """Switches the hooks of a run. Every call is collective; without overlap all are no-ops.

    The hooks stay off until the first update: otherwise the first gather would spread an error in
    loaded or initial weights to all ranks.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.overlaps = should_disable_forward_pre_hook(parts.args)
        self.is_on = False
        self.waits = parts.config.param_sync_func
        if self.overlaps:
            disable_forward_pre_hook(parts.model, param_sync=False)
            parts.config.param_sync_func = None

    def begin(self) -> None:
        """Switch the hooks on: after the first update, and after they were off for a while."""
        if self.overlaps and not self.is_on:
            enable_forward_pre_hook(self.parts.model)
            self.parts.config.param_sync_func = self.waits
            self.is_on = True

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Keep all parameters complete within a `with` block."""
        if not self.is_on:
            yield
            return
        self.end()
        yield
        self.begin()

    def gather(self) -> None:
        """Gather all parameters for a save, and free the buffers of the overlapped gather."""
        if self.overlaps:
            force_param_sync(self.parts.model, optimizer=self.parts.optimizer)
        for chunk in self.parts.model:
            chunk.free_overlap_buffers()

    def end(self) -> None:
        """Gather all parameters and switch the hooks off."""
        if self.is_on:
            disable_forward_pre_hook(self.parts.model, optimizer=self.parts.optimizer)
            self.is_on = False
