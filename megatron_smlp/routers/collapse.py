"""When a router counts as collapsed: few experts do all the work, the others learn nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_smlp.routers.statistics import RouterKey, RouterLoad

COLLAPSED = 0.8
"""A router has collapsed if the entropy of its load is below this fraction of log E."""
CLOSED_GATE = 0.01
"""Below this weight a token gets almost nothing from its expert, and the expert no gradient."""
EARLY = 20
"""Number of first steps in which a router may still be as initialized."""
CLOSED = 0.5
"""A router has also collapsed if more than this share of its choices weighs under CLOSED_GATE."""


class CollapseWatch:
    """Warns once per router and sign of collapse.

    Args:
        fixed: kinds of routers that do not choose their load (HASH).
    """

    def __init__(self, *, fixed: Collection[str] = ()) -> None:
        self.fixed = fixed
        self.warned: set[tuple[RouterKey, str]] = set()

    def warnings(
        self, loads: Mapping[RouterKey, RouterLoad], *, iteration: int, title: str = ""
    ) -> Iterator[str]:
        """Yield a line for each new router and sign since the last call.

        title: names an evaluation; empty in training.
        """
        if iteration < EARLY:
            return
        when = f"{iteration} {title}".rstrip()
        for key, load in loads.items():
            if key.kind in self.fixed:
                continue
            for sign, what in _signs(load):
                if (key, sign) in self.warned:
                    continue
                self.warned.add((key, sign))
                yield (
                    f"warning: iteration {when}: the {key.kind} router of layer {key.layer} "
                    f"collapses: {what} (docs/metrics.md)"
                )


def _signs(load: RouterLoad) -> Iterator[tuple[str, str]]:
    """Yield each sign of collapse and the evidence for it."""
    if load.entropy < COLLAPSED:
        busiest = load.load_share.index(load.load_share_max)
        what = f"entropy {load.entropy:.2f} of log E is under {COLLAPSED}, expert {busiest} gets"
        yield "load", f"{what} {load.load_share_max:.0%} of the choices"
    if load.closed_rate is not None and load.closed_rate > CLOSED:
        what = f"{load.closed_rate:.0%} of the choices are weighted below {CLOSED_GATE}"
        yield "gates", f"{what}, so their experts neither do nor learn anything"
