"""Measure how the cost of training grows with T, experts, layers and processes.

A point is a real run of `pretrain_smlp.py` on a small model in bf16, always with the same number of
tokens per step; its figure is the median step time after a few steps. The expected time is that of
the sweep's first point, scaled by the FLOPs that the model needs; two processes with one thread
each are expected to take as long as one process with two. A ratio over 1 is better than expected.
The FLOPs leave out the optimizer, which updates a T x T matrix however few tokens there are.
Exponents p are least squares over logarithms, cost per token = a x^p.

`memory`: bytes that autograd saves per layer and token (all storages that a forward pass saves,
except weights); expected: the accounting of tools/estimate.py.

The figures go to --plots as PNG.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timing import Record, benchmark_parser, report

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megatron_smlp.accounting.costs import (  # noqa: E402
    ModelShape,
    model_cost,
    training_flops_per_token,
)
from megatron_smlp.accounting.estimate import resolve  # noqa: E402

TOKENS = 4096
"""Tokens per step."""
WARM_UP = 1
VOCABULARY = 512
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "ffn_hidden_size": 1024,
    "num_layers": 4,
    "seq_length": 512,
    "vocab_size": VOCABULARY - 1,
}
ROUTED = {"token_router": "base", "moe_token_dispatcher_type": "alltoall"}
Values = Mapping[str, Any]


def gmlp(_: int) -> Values:
    return {"architecture": "gmlp"}


def toeplitz(_: int) -> Values:
    return {**gmlp(0), "toeplitz": True}


def transformer(_: int) -> Values:
    return {"architecture": "transformer", "num_attention_heads": 4}


def smlp(experts: int) -> Values:
    """Return sMLP's flags: half of the layers dense, as many spatial experts as token experts."""
    features = {"feature_router": "deterministic", "num_feature_experts": experts}
    return {
        "architecture": "smlp",
        **(features if experts > 1 else {}),  # one spatial expert is a dense layer
        **ROUTED,
        "num_experts": experts,
        "moe_ffn_hidden_size": 512,
    }


def base(experts: int) -> Values:
    """Return the flags of a Transformer with token experts in every second layer."""
    values = {"moe_layer_freq": 2, "num_experts": experts, "moe_ffn_hidden_size": 1024}
    return {**transformer(0), **ROUTED, **values}


SYSTEMS = {
    "gmlp": gmlp,
    "gmlp toeplitz": toeplitz,
    "transformer": transformer,
    "smlp deterministic": smlp,
    "base": base,
}
DENSE_AND_SPARSE = ("gmlp", "transformer", "smlp deterministic")
SWEEPS: dict[str, tuple[str, Sequence[str], Sequence[int]]] = {
    "T": (
        "tokens in a sequence, T",
        (*DENSE_AND_SPARSE, "gmlp toeplitz"),
        (256, 512, 1024, 2048, 4096),
    ),
    "experts": ("experts", ("smlp deterministic", "base"), (1, 4, 16, 64)),
    "depth": ("layers", DENSE_AND_SPARSE, (2, 4, 8)),
    "processes": ("processes", DENSE_AND_SPARSE, (1, 2)),
}
MEMORY_LENGTHS = (256, 1024, 2048)


@dataclass(frozen=True)
class Point:
    """One run."""

    sweep: str
    system: str
    size: int

    @property
    def name(self) -> str:
        return f"{self.system} {self.sweep}={self.size}"

    @property
    def values(self) -> dict[str, Any]:
        """Flags of the model and its batch, by name."""
        experts = self.size if self.sweep == "experts" else 4
        values = SIZES | dict(SYSTEMS[self.system](experts))
        if self.sweep == "T":
            values["seq_length"] = self.size
        if self.sweep == "experts":
            values["seq_length"] = 256
        if self.sweep == "depth":
            values["num_layers"] = self.size
        if values["architecture"] == "smlp":
            values["num_dense_layers"] = values["num_layers"] // 2
        batch = TOKENS // values["seq_length"]
        processes = self.size if self.sweep == "processes" else 1
        return values | {"micro_batch_size": batch // processes, "global_batch_size": batch}

    def flops_per_token(self) -> float:
        shape = ModelShape.from_args(resolve(self.values))
        return training_flops_per_token(model_cost(shape), shape)[1]

    def flags(self, *, steps: int) -> str:
        parts = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            for name, value in self.values.items()
        ]
        return " ".join([*parts, f"--train-iters {steps}", FLAGS])


FLAGS = f"""
    --bf16 --mock-data --tokenizer-type NullTokenizer --num-workers 0 --no-resume
    --make-vocab-size-divisible-by {VOCABULARY} --attention-dropout 0 --hidden-dropout 0
    --lr 1e-3 --eval-iters 0 --log-interval 1
"""


def points(sweeps: Sequence[str]) -> list[Point]:
    return [
        Point(name, system, size)
        for name in sweeps
        for system in SWEEPS[name][1]
        for size in SWEEPS[name][2]
    ]


def step_milliseconds(cases: Sequence[Point], *, repeats: int, threads: int) -> dict[Point, float]:
    """Return every run's median step time. Runs of equally many processes share one launch."""
    from support.launches import launch, records

    milliseconds = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for processes in (1, 2):
            here = [c for c in cases if (c.size if c.sweep == "processes" else 1) == processes]
            if not here:
                continue
            runs = {case.name: case.flags(steps=WARM_UP + repeats) for case in here}
            share = str(max(1, threads // processes))
            launch(runs, processes=processes, folder=folder, OMP_NUM_THREADS=share)
            for case in here:
                steps = [r for r in records(folder / case.name) if "loss" in r][WARM_UP:]
                seconds = statistics.median(step["seconds_per_iteration"] for step in steps)
                milliseconds[case] = 1e3 * seconds
    return milliseconds


def as_records(measured: Mapping[Point, float]) -> Iterator[Record]:
    """Yield each point with the expectation from the first point of its sweep and system."""
    for point, ours in measured.items():
        first = next(p for p in measured if (p.sweep, p.system) == (point.sweep, point.system))
        growth = 1.0
        if point.sweep != "processes":
            growth = point.flops_per_token() / first.flops_per_token()
        peer = measured[first] * growth
        yield Record(case=point.name, ours_ms=ours, peer_ms=peer, ratio=peer / ours)


def memory_records() -> Iterator[Record]:
    """Yield saved bytes per token of the second half's layers, which are sparse in an sMLP."""
    import torch
    from support.in_process import layer_config
    from support.parallel_models import kept_by

    from megatron_smlp.accounting.footprint import activation_elements
    from megatron_smlp.accounting.ranks import ParallelLayout
    from megatron_smlp.architectures import SlottedLayer
    from megatron_smlp.platform.one_process import one_process

    with one_process():
        for system in DENSE_AND_SPARSE:
            for length in MEMORY_LENGTHS:
                values = Point("T", system, length).values | {"num_dense_layers": 0}
                shape = ModelShape.from_args(resolve(values))
                expected = activation_elements(shape, ParallelLayout(), shape.slots[0]) * 2
                layer = SlottedLayer(layer_config(spatial_length=length, **_layer_flags(values)))
                hidden = torch.randn(length, 2, SIZES["hidden_size"], dtype=torch.bfloat16)
                hidden.requires_grad_()
                with kept_by(layer) as bytes_kept:
                    output = layer(hidden, attention_mask=None)
                kept = bytes_kept.peak / (2 * length)
                del output
                yield Record(
                    case=f"{system} memory T={length}",
                    ours_ms=kept,
                    peer_ms=expected,
                    ratio=expected / kept,
                    unit="B",
                )


def _layer_flags(values: Values) -> dict[str, Any]:
    """Return model flags as fields of Megatron's layer config."""
    import torch

    skipped = {"seq_length", "vocab_size", "micro_batch_size", "global_batch_size", "num_experts"}
    config = {name: value for name, value in values.items() if name not in skipped}
    if "num_experts" in values:
        config |= {"num_moe_experts": values["num_experts"], "moe_router_topk": 1}
        config |= {"moe_router_pre_softmax": True, "moe_aux_loss_coeff": 0.0}
        config["add_bias_linear"] = False
    return {"params_dtype": torch.bfloat16, **config}


def growths(records: Sequence[Record], sweep: str, *, divisor: float) -> dict[str, Any]:
    """Return the lines of one panel, by system, with costs divided by `divisor`."""
    from scaling_figure import Growth

    lines: dict[str, Any] = {}
    for system in SYSTEMS:
        own = [r for r in records if r["case"].startswith(f"{system} {sweep}=")]
        if own:
            lines[system] = Growth(
                sizes=[int(r["case"].split("=")[1]) for r in own],
                measured=[r["ours_ms"] / divisor for r in own],
                expected=[r["peer_ms"] / divisor for r in own],
            )
    return lines


def exponents(lines: Mapping[str, Any], sweep: str) -> Iterator[str]:
    for system, line in lines.items():
        p, expected = (round(line.exponent(expected=side), 2) + 0.0 for side in (False, True))
        yield f"{sweep:12}{system:22}{p:10.2f}{expected:10.2f}"


def summarise(records: Sequence[Record], sweeps: Sequence[str], plots: Path | None) -> None:
    """Print the exponents; draw the sweeps if a folder is given."""
    from scaling_figure import Sweep, scaling_figure

    panels: dict[str, list[Sweep]] = {"time": [], "memory": []}
    print(f"\n{'sweep':12}{'system':22}{'exponent':>10}{'expected':>10}")
    for sweep in sweeps:
        is_memory = sweep == "memory"
        key = "memory T" if is_memory else sweep
        lines = growths(records, key, divisor=1024 if is_memory else TOKENS / 1e3)
        print("\n".join(exponents(lines, sweep)))
        size = "tokens in a sequence, T" if is_memory else SWEEPS[sweep][0]
        cost = "kept KiB per token and layer" if is_memory else "µs per token"
        panels["memory" if is_memory else "time"].append(Sweep(size, cost, lines))
    for name, panel in panels.items():
        if panel and plots is not None:
            plots.mkdir(parents=True, exist_ok=True)
            path = plots / f"scaling_{name}.png"
            scaling_figure(panel).savefig(path)
            print(f"wrote {path}")


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=3, of="steps per point")
    names = [*SWEEPS, "memory"]
    parser.add_argument("sweeps", nargs="*", default=names, metavar="SWEEP", help=", ".join(names))
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the sweeps here")
    arguments = parser.parse_args()
    unknown = set(arguments.sweeps) - set(names)
    if unknown:
        parser.error(f"no sweep {', '.join(sorted(unknown))}: choose of {', '.join(names)}")
    timed = [name for name in arguments.sweeps if name in SWEEPS]
    measured = step_milliseconds(
        points(timed), repeats=arguments.repeats, threads=arguments.threads
    )
    records = list(as_records(measured))
    if "memory" in arguments.sweeps:
        records += memory_records()
    report(records, arguments.json)
    summarise(records, arguments.sweeps, arguments.plots)


if __name__ == "__main__":
    main()
