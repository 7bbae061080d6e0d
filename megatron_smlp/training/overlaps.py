"""Parameters that the distributed optimizer gathers during the forward pass (Megatron's hooks).

With --overlap-param-gather a parameter is whole only where a hook of a forward pass has waited for
it. What reads parameters otherwise (evaluation, a save, a comparison of replicas) needs them all.
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
    """Switches the hooks of a run. Every call is collective; without overlap all do nothing.

    They stay off until the first update: an error in what was loaded or drawn would otherwise
    spread to all ranks by the first gathering.
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
        """Switch them on: after the first update, and where they were off for a while."""
        if self.overlaps and not self.is_on:
            enable_forward_pre_hook(self.parts.model)
            self.parts.config.param_sync_func = self.waits
            self.is_on = True

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Hold all parameters whole within a `with` block."""
        if not self.is_on:
            yield
            return
        self.end()
        yield
        self.begin()

    def gather(self) -> None:
        """Make them whole for a save, and free what the gathering holds beside them."""
        if self.overlaps:
            force_param_sync(self.parts.model, optimizer=self.parts.optimizer)
        for chunk in self.parts.model:
            if hasattr(chunk, "free_overlap_buffers"):
                chunk.free_overlap_buffers()

    def end(self) -> None:
        """Make them whole for good."""
        if self.is_on:
            disable_forward_pre_hook(self.parts.model, optimizer=self.parts.optimizer)
            self.is_on = False
