"""Formats the routers' numbers for the console, metrics.jsonl, TensorBoard and W&B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_smlp.routers.statistics import RouterKey, RouterLoad

Loads = Mapping[RouterKey, RouterLoad]

NOUNS = {"token": "experts", "feature": "chunks"}
SCALARS = (
    "load_share_min", "load_share_max", "entropy", "drop_rate", "mean_gate", "closed_rate",
    "aux_loss", "z_loss",
)  # fmt: skip
DIGITS = 6


def router_records(loads: Loads) -> list[dict[str, Any]]:
    """Return `routers` of a line of metrics.jsonl: one object per router, in layer order."""
    return [
        {
            "layer": key.layer,
            "kind": key.kind,
            **{name: round(value, DIGITS) for name, value in scalars(load)},
            "choices": round(load.choices),
            "load_share": [round(share, DIGITS) for share in load.load_share],
        }
        for key, load in loads.items()
    ]


def scalars(load: RouterLoad) -> Iterator[tuple[str, float]]:
    """Yield the name and value of each number that the router has."""
    for name in SCALARS:
        value = getattr(load, name)
        if value is not None:
            yield name, value


def router_texts(loads: Loads) -> list[str]:
    """Return a text per kind of router: the extremes over its layers, and the total drop rate.

    `experts 0.8-1.3x, entropy 0.98, dropped 2.1%`: loads are multiples of an even share.
    """
    texts = []
    for kind, noun in NOUNS.items():
        routers = [load for key, load in loads.items() if key.kind == kind]
        if not routers:
            continue
        least = min(load.load_share_min * len(load.load_share) for load in routers)
        most = max(load.load_share_max * len(load.load_share) for load in routers)
        entropy = min(load.entropy for load in routers)
        choices = sum(load.choices for load in routers)
        dropped = sum(load.drop_rate * load.choices for load in routers) / choices
        text = f"{noun} {least:.1f}-{most:.1f}x, entropy {entropy:.2f}"
        texts.append(f"{text}, dropped {dropped:.1%}" if kind == "token" else text)
    return texts


def router_curves(loads: Loads, *, title: str) -> dict[str, float]:
    """Return scalars for TensorBoard and W&B: `router/layer 2 token/entropy`.

    title: title of the evaluation, which prefixes the names; empty in training.
    """
    prefix = f"{title} " if title else ""
    return {
        f"{prefix}router/layer {key.layer} {key.kind}/{name}": value
        for key, load in loads.items()
        for name, value in scalars(load)
    }
