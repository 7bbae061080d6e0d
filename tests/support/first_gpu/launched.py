"""Count kernel launches, and check that a GPU made those that it should."""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from support.first_gpu.notes import Notes

KERNELS = {
    "gate": (
        "gated_mix",
        *("gated_mix", "gradients_of_gate", "gradients_of_values", "gradients_of_weights"),
    ),
    "parts of dM": ("gated_mix", "sums_of_parts"),
    "norm": ("gelu_norm", "normed_gelu", "gradients"),
    "assignment": ("assignment", "extent", "spread", "balance", "choose", "accept", "fill"),
    "exchange": ("exchange", "exchange"),
}
"""Purpose -> a file of megatron_smlp/ops/kernels, and its kernels."""
GATE = ("gate", "norm")
BASE = ("assignment", "exchange", "grouped")
OF_SYSTEMS = {
    "gmlp": GATE,
    "amlp": GATE,
    "smlp_deterministic": (*GATE, *BASE),
    "smlp_partial": (*GATE, *BASE),
    "base": BASE,
    **dict.fromkeys(("gshard", "switch", "hash"), ("grouped",)),
}
"""System -> what its layers compute with kernels; "grouped" is torch's product for experts."""


class _Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any, counts: Counter[str], name: str) -> None:
        self.kernel, self.counts, self.name = kernel, counts, name

    def __getitem__(self, grid: Any) -> Any:
        self.counts[self.name] += 1
        return self.kernel[grid]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count launches by the kernels' purpose and name, as in "gate: gated_mix"."""
    from torch.nn import functional

    from megatron_smlp.megatron_patches.wrapping import wrapped_in

    counts: Counter[str] = Counter()
    wrappers: list[tuple[Any, str, Callable[[Any], Any]]] = []
    for kind, (file, *names) in KERNELS.items():
        module = importlib.import_module(f"megatron_smlp.ops.kernels.{file}")
        for name in names:
            label = f"{kind}: {name}"
            wrappers.append(
                (module, name, lambda kernel, label=label: _Counted(kernel, counts, label))
            )

    def counting(product: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts["grouped: grouped_mm"] += 1
            return product(*args, **kwargs)

        return wrapped

    with wrapped_in(*wrappers, (functional, "grouped_mm", counting)):
        yield counts


def check_launches(notes: Notes, counts: Counter[str], kinds: tuple[str, ...]) -> None:
    """Fail for kernels that this GPU can run and did not; note those that it cannot run."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    for kind in kinds:
        if kind == "grouped":
            can, needed = major in (9, 10), "9 or 10"
            names = ["grouped: grouped_mm"]
        else:
            can, needed = major >= 8, "8.0 or more"
            names = [f"{kind}: {name}" for name in KERNELS[kind][1:]]
        if not can:
            notes.not_run(f"kernels of {kind}: they need capability {needed}, not {major}.{minor}")
            continue
        missing = ", ".join(name for name in names if not counts[name])
        launches = sum(counts[name] for name in names)
        text = f"kernels of {kind}: {launches} launches"
        notes.check(not missing, f"{text}, and none of {missing}" if missing else text)
