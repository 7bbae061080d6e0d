"""Record trainings to the last bit: every system, layout, ending and kind of save.

    PYTHONPATH=tests:. python tests/golden/trainings.py --write FILE    before a change
    PYTHONPATH=tests:. python tests/golden/trainings.py --compare FILE  after it, here

prints what differs and exits with 1. Each run's record has metrics.jsonl without times,
TensorBoard's names and values, and a hash of every tensor of the last checkpoint, including
optimizer state; on another machine the last bits differ.
`trainings.json` next to this file has the losses and gradient norms of one machine, which
test_trainings.py compares within the rounding of processors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from support.checkpoints import checkpoint_tensors
from support.launches import REPOSITORY, launch, launch_on_the_stand_in, records
from support.systems import ATTENTION, EXPERTS, MODEL, SYSTEMS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_smlp.checkpoints.folders import tracked_iteration

FILE = Path(__file__).with_name("trainings.json")
STEPS = 20
OF_TIME = ("seconds", "per_second", "tflops", "mfu", "data_wait", "waiting", "hosts")
"""Parts of names whose values depend on the clock or the machine."""
TIMES_OF_TENSORBOARD = ("time", *OF_TIME, "mem-", "energy", "power")

BASE = f"""{MODEL} --seq-length 32 --seed 7 --weight-decay 0.1 --clip-grad 1
    --lr-decay-style cosine --min-lr 1e-4 --save-interval 1000"""
BATCH = "--global-batch-size 4"
VALIDATED = "--eval-iters 2 --eval-interval 8"
TOPK = f"""{ATTENTION} --token-router topk {EXPERTS} --moe-layer-freq 2 --moe-router-topk 2
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear"""
ALL = {
    **SYSTEMS,
    "topk": TOPK,
    "mixer": "--architecture mixer",
    **{
        name: f"--plugin {REPOSITORY}/plugins/{name}.py --architecture {name}"
        for name in ("aft", "causal_rn")
    },
}

GMLP, SMLP = SYSTEMS["gmlp"], SYSTEMS["smlp_deterministic"]
PARTIAL, SWITCH = SYSTEMS["smlp_partial"], SYSTEMS["switch"]
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
TP, PP = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
OVERLAPS = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
LOGS = "--log-params-norm --log-num-zeros-in-grad --tensorboard-log-interval 3 --log-interval 3"

ONE = {
    **{f"{name}_{kind}": f"{flags} {BATCH} {precision}" for name, flags in ALL.items()
       for kind, precision in (("fp32", ""), ("bf16", "--bf16"))},
    "dropout": f"{SYSTEMS['amlp']} {BATCH} {DROPOUT}",
    "validated": f"{SMLP} {BATCH} {VALIDATED}",
    "per_token": f"{SMLP} {BATCH} --calculate-per-token-loss {VALIDATED}",
    "logged": f"{SWITCH} {BATCH} {LOGS} --moe-z-loss-coeff 1e-3 --moe-per-layer-logging",
    "nonfinite": f"{GMLP} {BATCH} --lr 1e30 --nonfinite-loss skip",
    "skipped_data": f"{SMLP} {BATCH} --iterations-to-skip 3 4 11",
    "samples": f"{GMLP} {BATCH} --train-samples 80 --lr-warmup-samples 8 {VALIDATED}",
    "ramped": f"{GMLP} --step-batch-size-schedule 0:2,512:4,1024:8 "
    "--train-samples 80",
    "accumulated": f"{SMLP} --global-batch-size 8",
    "by_interval": f"{SMLP} {BATCH} --exit-interval 7 {VALIDATED}",
    "background": f"{SMLP} {BATCH} --async-save --save-interval 6 --keep-last 2",
    "manual_gc": f"{GMLP} {BATCH} --manual-gc --manual-gc-interval 5 {VALIDATED}",
}  # fmt: skip
RESUMED = {
    "base": f"{SYSTEMS['base']} {BATCH} {VALIDATED}",
    "partial": f"{PARTIAL} {BATCH} {DROPOUT}",
    "topk": f"{TOPK} {BATCH} --bf16",
}
TWO = {
    "tp2_sp": f"{SMLP} {BATCH} {TP} --sequence-parallel {VALIDATED}",
    "tp2_bf16": f"{SYSTEMS['amlp']} {BATCH} {TP} --bf16",
    "pp2": f"{SYSTEMS['hash']} --global-batch-size 8 {PP} {VALIDATED}",
    "interleaved": f"{SMLP} --global-batch-size 8 {PP} --num-layers-per-virtual-pipeline-stage 1",
    "ep2": f"{SMLP} --global-batch-size 8 --expert-model-parallel-size 2 {VALIDATED}",
    "dp2": f"{PARTIAL} --global-batch-size 8",
    "overlaps": f"{GMLP} --global-batch-size 8 {OVERLAPS} --bf16 {VALIDATED} --save-interval 9 "
    "--check-weight-hash-across-dp-replicas-interval 5",
    "overlaps_experts": f"{SWITCH} --global-batch-size 8 {OVERLAPS} --async-save --save-interval 6",
}
ON_THE_STAND_IN = {
    1: {"fp16": f"{GMLP} {BATCH} --fp16 --initial-loss-scale 4294967296 {VALIDATED}",
        "device_bf16": f"{SMLP} {BATCH} --bf16 {VALIDATED}"},
    2: {"fp16_overlaps": f"{PARTIAL} --global-batch-size 8 --fp16 --initial-loss-scale 65536 "
        f"{OVERLAPS} {VALIDATED}",
        "device_ep2": f"{SMLP} --global-batch-size 8 --expert-model-parallel-size 2 --bf16"},
}  # fmt: skip


def _flags(name: str, flags: str, folder: Path) -> str:
    length = "" if "--train-samples" in flags else f"--train-iters {STEPS} --lr-warmup-iters 2"
    base = BASE.replace("--mock-data", "") if "data-path" in flags else BASE
    folders = f"--save {folder}/saved/{name} --tensorboard-dir {folder}/curves/{name}"
    return f"{base} {length} {flags} {folders}"


def train(folder: Path, only: Sequence[str] = ()) -> None:
    """Make the runs; each one's metrics go to `folder`/name."""

    one = {name: _flags(name, flags, folder) for name, flags in ONE.items()}
    for name, flags in RESUMED.items():
        whole = _flags(f"resumed_{name}", flags, folder)
        one |= {f"resumed_{name}": f"{whole} --exit-interval 9", f"resumed_{name} ": whole}
    sets = ("books", "letters")
    one["several_sets"] = _flags("several_sets", f"{SMLP} {BATCH} {_validation_sets(folder, sets)}",
                                 folder)  # fmt: skip
    chosen = only or [
        *(n.strip() for n in one),
        *TWO,
        *(n for d in ON_THE_STAND_IN.values() for n in d),
    ]
    launch({k: v for k, v in one.items() if k.strip() in chosen}, processes=1, folder=folder)
    two = {name: _flags(name, flags, folder) for name, flags in TWO.items() if name in chosen}
    launch(two, processes=2, folder=folder)
    device = {
        count: {name: _flags(name, flags, folder) for name, flags in runs.items() if name in chosen}
        for count, runs in ON_THE_STAND_IN.items()
    }
    launch_on_the_stand_in(device, folder=folder)


def _validation_sets(folder: Path, names: tuple[str, ...]) -> str:
    from megatron_smlp.data.prepare.preprocess_cli import main

    prefixes = []
    for number, name in enumerate(("train", *names)):
        text = [{"text": " ".join(str((7 * n + (3 + number) * k) % 400) for k in range(40))}
                for n in range(24)]  # fmt: skip
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in text), encoding="utf-8")
        main(f"--input {source} --output-prefix {folder / name} --append-eod "
             "--tokenizer-type NullTokenizer --vocab-size 500".split())  # fmt: skip
        prefixes.append(str(folder / f"{name}_text_document"))
    return (
        f"--train-data-path {prefixes[0]} --valid-data-path {' '.join(prefixes[1:])} "
        f"--multiple-validation-sets --full-validation --validation-set-names {' '.join(names)} "
        "--eval-interval 8 --eval-iters 2"
    )


def recorded(folder: Path) -> dict[str, Any]:
    """Return everything that is recorded of each run under `folder`."""
    found = {}
    for log in sorted(folder.glob("*/metrics.jsonl")):
        name = log.parent.name
        saved, curves = folder / "saved" / name.strip(), folder / "curves" / name.strip()
        iteration = tracked_iteration(str(saved))
        found[name] = {
            "records": [_timeless(record) for record in records(log.parent)],
            "curves": _curves(curves),
            "saved": iteration,
            "tensors": _hashes(saved, iteration) if iteration else {},
        }
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items()
                if not any(part in key for part in OF_TIME)}  # fmt: skip
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def _curves(folder: Path) -> dict[str, Any]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [[event.step, event.value] for event in events.Scalars(tag)]
        for tag in sorted(events.Tags()["scalars"])
        if not any(part in tag for part in TIMES_OF_TENSORBOARD)
    }


def _hashes(folder: Path, iteration: int) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.double().numpy().tobytes()).hexdigest()[:16]
        for name, tensor in checkpoint_tensors(folder, iteration).items()
    }


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Yield a line for each place at which two records differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            if key not in before or key not in after:
                yield f"{place}/{key}: only {'after' if key in after else 'before'}"
            else:
                yield from differences(before[key], after[key], f"{place}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{place}/{number}")
    elif before != after and before == before:  # NaN is no difference
        yield f"{place}: {str(before)[:120]} -> {str(after)[:120]}"


def losses(found: dict[str, Any]) -> dict[str, Any]:
    """Return loss and gradient norm of each step, and the names of all that was recorded."""
    return {
        name: {
            "steps": [[r["iteration"], _short(r["loss"]), _short(r["grad_norm"])]
                      for r in run["records"] if "loss" in r],
            "fields": sorted({key for record in run["records"] for key in record}),
            "curves": sorted(run["curves"]),
            "saved": run["saved"],
        }
        for name, run in found.items()
    }  # fmt: skip


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="runs to make")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="write the small file as well")
    words = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), words.only)
        found = json.loads(json.dumps(recorded(Path(folder))))
    if words.write:
        words.write.write_text(json.dumps(found), encoding="utf-8")
    if words.losses:
        lines = [f"{json.dumps(name)}: {json.dumps(run)}" for name, run in losses(found).items()]
        text = ",\n".join(lines)
        words.losses.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    different: list[str] = []
    if words.compare:
        known = json.loads(words.compare.read_text(encoding="utf-8"))
        known = {name: run for name, run in known.items() if name in found or not words.only}
        different = list(differences(known, found))
        print("\n".join(different) or f"{len(found)} runs: nothing differs")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
