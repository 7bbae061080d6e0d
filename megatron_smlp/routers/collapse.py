"""When a router is said to collapse: few experts do all the work, the others learn nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_smlp.routers.statistics import RouterKey, RouterLoad

COLLAPSED = 0.8
"""A router has collapsed where the entropy of its load is under this share of log E."""
CLOSED_GATE = 0.01
"""Under this weight a token gets next to nothing of its expert, and the expert no gradient."""
EARLY = 20
"""Steps in which a router may still be as it was drawn."""
CLOSED = 0.5
"""A router has collapsed, too, where more than this share of its choices weigh less than that."""


class CollapseWatch:
    """Says once of each router, and of each sign of a collapse, that it shows.

    Args:
        fixed: kinds of routers whose load they do not choose (HASH).
    """

    def __init__(self, *, fixed: Collection[str] = ()) -> None:
        self.fixed = fixed
        self.warned: set[tuple[RouterKey, str]] = set()

    def warnings(
        self, loads: Mapping[RouterKey, RouterLoad], *, iteration: int, title: str = ""
    ) -> Iterator[str]:
        """Return a line for each router and sign since the last call.

        title: of an evaluation; empty in training.
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
    """Yield each sign of a collapse, and what shows it."""
    if load.entropy < COLLAPSED:
        busiest = load.load_share.index(load.load_share_max)
        what = f"entropy {load.entropy:.2f} of log E is under {COLLAPSED}, expert {busiest} gets"
        yield "load", f"{what} {load.load_share_max:.0%} of the choices"
    if load.closed_rate is not None and load.closed_rate > CLOSED:
        what = f"{load.closed_rate:.0%} of the choices are weighed by less than {CLOSED_GATE}"
        yield "gates", f"{what}, so that their experts neither do nor learn anything"
