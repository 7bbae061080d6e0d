#!/usr/bin/env python3
"""Is the best learning rate the same at every width, with Megatron's muP and without it?

    .venv/bin/python benchmarks/mup.py --data runs/study-data --csv mup.csv --figure mup.png

trains dense Transformers of 4 layers and heads of 32 features at D = 64, 128 and 256, each at five
rates, with --use-mup (whose base is D = 64) and without: 60 steps of 4 samples of 256 tokens in
fp32. Trials that the file has are not trained again. The data are those of examples/study_data.sh.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from megatron_smlp.errors import NonFiniteLossError  # noqa: E402
from megatron_smlp.study.metrics import VALIDATION_LOSS, validation_at  # noqa: E402
from megatron_smlp.study.process import OUTPUT, run_command  # noqa: E402

WIDTHS = (64, 128, 256)
RATES = (0.002, 0.004, 0.008, 0.016, 0.032)
COLUMNS = ("mup", "width", "lr", "loss")
HEAD = 32
ITERATIONS = 60
RECIPE = f"""
    --num-layers 4 --position-embedding-type rope --seq-length 256 --attention-dropout 0
    --hidden-dropout 0 --micro-batch-size 4 --global-batch-size 4 --train-iters {ITERATIONS}
    --lr-warmup-iters 10 --lr-decay-style cosine --weight-decay 0 --adam-beta2 0.95 --seed 1
    --eval-interval {ITERATIONS} --eval-iters 10 --log-interval 20 --num-workers 0
"""
DATA = """
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model {0}/tokenizer
    --train-data-path {0}/train_text_document --valid-data-path {0}/valid_text_document
"""

type Trial = tuple[bool, int, float]
"""Whether it uses muP, D, and the learning rate."""


def flags(trial: Trial) -> str:
    """Return the flags of pretrain_smlp.py for a trial."""
    uses_mup, width, rate = trial
    sizes = f"--hidden-size {width} --ffn-hidden-size {4 * width} --lr {rate}"
    heads = f"--num-attention-heads {width // HEAD}"
    base = f"--use-mup --mup-base-hidden-size {WIDTHS[0]} --mup-base-head-dim {HEAD}"
    return f"{RECIPE} {sizes} {heads} {base if uses_mup else ''}"


def loss_of(trial: Trial, data: str) -> float:
    """Train, and return the validation loss at the end; infinite where the training diverged."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, str(ROOT / "pretrain_smlp.py"), *flags(trial).split()]
        command += [*data.split(), "--log-dir", name]
        code = run_command(command, folder=folder, stop=threading.Event(), watch=lambda: None)
        if code == NonFiniteLossError.exit_code:
            return math.inf
        if code:
            raise SystemExit((folder / OUTPUT).read_text(encoding="utf-8")[-2000:])
        last = validation_at(folder, ITERATIONS)
    assert last, "it is evaluated at its end"
    return float(last[VALIDATION_LOSS])


def read(path: Path) -> dict[Trial, float]:
    """Return the losses that a file has."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (row["mup"] == "yes", int(row["width"]), float(row["lr"])): float(row["loss"])
            for row in csv.DictReader(file)
        }


def write(path: Path, losses: Mapping[Trial, float]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for (uses_mup, width, rate), loss in sorted(losses.items()):
            writer.writerow(["yes" if uses_mup else "no", width, rate, f"{loss:.4f}"])


def curves(losses: Mapping[Trial, float]) -> dict[tuple[bool, int], list[tuple[float, float]]]:
    """Return (rate, loss) in the order of the rates, by muP and width."""
    found = defaultdict(list)
    for (uses_mup, width, rate), loss in sorted(losses.items()):
        found[uses_mup, width].append((rate, loss))
    return dict(found)


def best(curve: Sequence[tuple[float, float]]) -> float:
    """Return the minimum of the parabola in log2(rate) through the lowest point and its two
    neighbors; at an edge, the edge."""
    place = min(range(len(curve)), key=lambda index: curve[index][1])
    if place in (0, len(curve) - 1):
        return curve[place][0]
    (left, below), (middle, low), (right, above) = (
        (math.log2(rate), loss) for rate, loss in curve[place - 1 : place + 2]
    )
    falls, rises = (low - below) / (middle - left), (above - low) / (right - middle)
    return float(2 ** ((left + middle) / 2 - falls * (right - left) / 2 / (rises - falls)))


def plot(losses: Mapping[Trial, float], path: Path) -> None:
    """Draw loss against rate, one curve per width, and a line at each width's best rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for (uses_mup, width), curve in curves(losses).items():
        panel = panels[int(uses_mup)]
        (line,) = panel.plot(*zip(*curve, strict=True), "o-", label=f"D = {width}")
        panel.axvline(best(curve), color=line.get_color(), linestyle=":")
    for panel, title in zip(panels, ("without muP", "--use-mup, of D = 64"), strict=True):
        panel.set(xscale="log", xlabel="--lr", title=title)
        panel.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        panel.minorticks_off()
    panels[0].set(ylabel="validation loss (nats per token)")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of study_data.sh")
    parser.add_argument("--csv", type=Path, required=True, help="rows are added here")
    parser.add_argument("--figure", type=Path, required=True)
    options = parser.parse_args()
    losses = read(options.csv)
    for width in WIDTHS:
        for rate in RATES:
            for uses_mup in (False, True):
                trial = (uses_mup, width, rate)
                if trial not in losses:
                    losses[trial] = loss_of(trial, DATA.format(options.data.resolve()))
                    write(options.csv, losses)
    for (uses_mup, width), curve in curves(losses).items():
        print(f"{'muP' if uses_mup else 'no muP'}, D = {width}: best rate {best(curve):.2g}")
    plot(losses, options.figure)


if __name__ == "__main__":
    main()
