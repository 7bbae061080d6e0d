"""`make bench`: run this folder's benchmarks into benchmarks/results/<hardware>.md and .json.

A figure is the ratio of two sides measured in one run, medians of alternating calls; figures of
different runs or machines are not comparable. Each table states the load average at the time: above
the number of threads, the machine was busy with something else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from timing import quartiles

from megatron_smlp.study.hardware import hardware

HERE = Path(__file__).resolve().parent
BENCHMARKS = {
    "bench_causal_mix": "The triangular product against masked dense ones",
    "bench_mixers": "Masked mixers",
    "bench_assignment": "Balanced assignment",
    "bench_step": "The whole training step against its peers",
    "bench_systems": "All systems: share of the machine's GEMM speed",
    "bench_generate": "Incremental generation",
    "bench_scaling": "Growth with T, experts, layers and processes",
    "bench_startup": "Start-up",
}
DRAWS = ("bench_scaling",)
"""Benchmarks that draw figures, which the report shows."""
PACKAGES = ("torch", "megatron-core", "transformers", "g-mlp-pytorch", "scipy")


def environment() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "hardware": f"{hardware()}-{len(os.sched_getaffinity(0))}-cores",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
    }


def measure(name: str, *, plots: Path) -> dict[str, Any]:
    """Run one benchmark; return its records, and the load of the machine before and after.

    Args:
        plots: the folder for its figures.
    """
    variables = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(path)]
        if name in DRAWS:
            command += ["--plots", str(plots)]
        start = time.monotonic()
        subprocess.run(command, check=True, env=variables)
        records = json.loads(path.read_text())
    return {
        "records": records,
        "load_average": [round(before, 2), round(os.getloadavg()[0], 2)],
        "seconds": round(time.monotonic() - start),
    }


def as_markdown(about: dict[str, Any], results: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items())
    lines = [
        f"# Benchmarks on {about['hardware']}",
        "",
        f"{about['date']}, Python {about['python']}, {packages}.",
        "Written by `make bench`; a ratio is peer / ours, over 1 is faster.",
    ]
    for name, result in results.items():
        lines += ["", f"## {BENCHMARKS[name]}", "", *_table(name, result)]
        lines += [f"\n![{figure}]({figure})" for figure in result.get("figures", ())]
    return "\n".join(lines) + "\n"


def _table(name: str, result: dict[str, Any]) -> Iterator[str]:
    load = " to ".join(map(str, result["load_average"]))
    yield f"`benchmarks/{name}.py`, {result['seconds']} s, load average {load}."
    yield ""
    yield "| case | ours, ms | peer, ms | ratio | quartiles of the ratio |"
    yield "|---|---:|---:|---:|---:|"
    for record in result["records"]:
        unit = f" {record['unit']}" if "unit" in record else ""
        ours, peer = (f"{record[side]:.2f}{unit}" for side in ("ours_ms", "peer_ms"))
        ratio = f"{record['ratio']:.2f} | {quartiles(record)}"
        yield f"| {record['case']} | {ours} | {peer} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), help=", ".join(BENCHMARKS))
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(
            f"no benchmark {', '.join(sorted(unknown))}: choose of {', '.join(BENCHMARKS)}"
        )
    about = environment()
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = arguments.output / about["hardware"]
    results = {name: measure(name, plots=stem) for name in arguments.names}
    for name in set(DRAWS) & set(results):
        drawn = sorted(stem.glob("*.png"))
        results[name]["figures"] = [str(path.relative_to(arguments.output)) for path in drawn]
    stem.with_suffix(".json").write_text(json.dumps(about | {"results": results}, indent=2) + "\n")
    stem.with_suffix(".md").write_text(as_markdown(about, results))
    print(f"wrote {stem}.md and .json")


if __name__ == "__main__":
    main()
