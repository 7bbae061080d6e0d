"""What `make first-gpu` tries on a machine's first day, each case in a process of its own.

tests/gpu asserts the same cases. Torch is imported inside them: a conversion hides GPUs before.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from support.first_gpu.notes import Notes, Place
from support.first_gpu.training import (
    NUM_STEPS,
    Watching,
    interrupted,
    on_ranks,
    synchronisations,
    train,
    words,
)
from support.launches import REPOSITORY, steps
from support.systems import SYSTEMS

ROUNDING = 0.02
"""Relative: bf16 has three digits, and other devices and implementations add in another order."""
RECOMPUTED = 1e-3
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "ep2": "--expert-model-parallel-size 2",
    "dp2": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
}
SPARSE = "smlp_deterministic"
"""The system of the cases that need one: gating, chunks and token experts."""


@dataclass(frozen=True)
class Case:
    """A name, what runs, and the cases whose files it reads."""

    name: str
    run: Callable[[Place, Notes], None]
    needs: tuple[str, ...] = ()
    limit: int = 120
    """Seconds; the process is ended after that."""


def environment(place: Place, notes: Notes) -> None:
    """What is installed, for the report."""
    import torch

    packages = ("torch", "megatron-core", "transformer-engine", "apex", "flash-attn", "triton")
    notes.data = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
    notes.data["CUDA of torch"] = str(torch.version.cuda)
    if place.on_cpu:
        notes.not_run("devices: --device cpu, the CPU stands in for a GPU")
        return
    notes.data["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    for number in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(number)
        memory = f"{of.total_memory / 2**30:.0f} GiB, capability {of.major}.{of.minor}"
        notes.data[f"device {number}"] = f"{of.name}, {memory}"
    notes.data["driver"] = driver()
    notes.passed(f"{torch.cuda.device_count()} devices")


def version(package: str) -> str:
    """Of an installed distribution."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(package)
    except PackageNotFoundError:
        return "not installed"


def driver() -> str:
    """Its version, as nvidia-smi says it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return done.stdout.split("\n")[0]


def cpu_losses(place: Place, notes: Notes) -> None:
    """Every system on the CPU, which the suite holds: what the GPU has to give."""
    if place.on_cpu:
        notes.not_run("losses of a CPU: it stands in for the GPU, and would be its own reference")
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for system in SYSTEMS:
        train(words(place, system), place.folder / "cpu" / system)
        notes.passed(f"{system}: {NUM_STEPS} steps")


def trains(place: Place, notes: Notes, *, system: str) -> None:
    """Steps, host synchronisations, memory, save and resume; against the CPU's losses."""
    folder, flags = place.folder / system, words(place, system)
    straight = train(flags, folder / "straight", observe=lambda own: _watching(place, own))
    notes.check(len(straight) == NUM_STEPS, f"{len(straight)} steps in {precision_of(flags)}")
    if place.on_cpu:
        notes.not_run("host synchronisations: torch counts them on CUDA alone")
        notes.not_run("peak memory: torch measures that of CUDA alone")
        notes.not_run("against the CPU's losses: they are these")
    else:
        _say_synchronisations(notes, folder / "straight")
        _compare_memory(notes, flags)
        reference = place.folder / "cpu" / system
        if (reference / "metrics.jsonl").is_file():
            expected = steps(reference)
            notes.same_steps("against the CPU", straight, expected, tolerance=ROUNDING)
        else:
            notes.not_run("against the CPU's losses: case cpu_losses left none")
    resumed = interrupted(flags, folder)
    notes.same_steps("saved and resumed", resumed, straight, tolerance=RECOMPUTED)


def _watching(place: Place, reporter: Any) -> Any:
    return reporter if place.on_cpu else Watching(reporter)


def precision_of(flags: str) -> str:
    return next((word.strip("-") for word in flags.split() if word in ("--bf16", "--fp16")), "fp32")


def _say_synchronisations(notes: Notes, folder: Path) -> None:
    counted = synchronisations(folder)
    notes.data["synchronisations"] = dict(counted)
    # All steps but the first are watched.
    per_step = sum(counted.values()) / (NUM_STEPS - 1)
    most = ", ".join(f"{line} ({count})" for line, count in counted.most_common(4))
    notes.passed(f"host synchronisations: {per_step:.1f} a step: {most or 'none'}")


def _compare_memory(notes: Notes, flags: str) -> None:
    """The peak of this process against tools/estimate.py, which counts no temporary tensors."""
    import torch

    peak = torch.cuda.max_memory_allocated()
    estimated = estimated_memory(flags)
    notes.data["memory"] = {"peak": peak, "estimated": estimated}
    words = f"peak memory {peak / 2**20:.0f} MiB, estimated {estimated / 2**20:.0f} MiB"
    notes.passed(f"{words}: {peak / estimated:.2f} times")


def estimated_memory(flags: str) -> int:
    """Bytes, by tools/estimate.py's arithmetic for the same flags on one GPU."""
    from support.in_process import forget_arguments

    from megatron_smlp.accounting import ModelShape
    from megatron_smlp.arguments import parse_arguments
    from megatron_smlp.footprint import ParallelLayout, footprint

    try:
        args = parse_arguments([word for word in flags.split() if word not in _OWN_WORDS])
        return footprint(ModelShape.from_args(args), ParallelLayout.from_args(args)).memory_bytes
    finally:
        forget_arguments()


_OWN_WORDS = {"--gshard-always-uses-the-second-expert"}


def operators(place: Place, notes: Notes) -> None:
    """The products of spatial gating and their gradients against fp64, and the assignment."""
    import torch

    from megatron_smlp.ops import causal_mix, toeplitz_mix

    lengths = (63, 300) if place.on_cpu else (63, 1000, 2047)
    for length in lengths:
        for dtype, rounding in ((torch.float32, 2e-3), (torch.bfloat16, 2e-2)):
            for product, reference, shape in (
                (causal_mix.causal_mix, causal_mix.causal_mix_reference, (length, length)),
                (toeplitz_mix.toeplitz_mix, toeplitz_mix.toeplitz_mix_reference, (length,)),
            ):
                worst = _rounding(place, product, reference, shape, dtype)
                what = f"{product.__name__}, T = {length}, {str(dtype).removeprefix('torch.')}"
                notes.check(worst <= rounding, f"{what}: {worst:.1e} of the largest value")
    _check_assignment(place, notes)


def _rounding(place: Place, product: Any, reference: Any, shape: Any, dtype: Any) -> float:
    """The largest error of output and gradients, relative to the largest value of each."""
    import torch

    length = shape[0]
    weight = torch.randn(2, *shape, dtype=torch.float64) / length**0.5
    values, upstream = (torch.randn(2, length, 48, dtype=torch.float64) for _ in range(2))
    exact = _with_gradients(reference, weight, values, upstream)
    moved = (tensor.to(place.device, dtype) for tensor in (weight, values, upstream))
    pairs = zip(_with_gradients(product, *moved), exact, strict=True)
    return max(float((one.double().cpu() - e).abs().max() / e.abs().max()) for one, e in pairs)


def _with_gradients(product: Any, weight: Any, values: Any, upstream: Any) -> tuple[Any, ...]:
    import torch

    weight, values = weight.requires_grad_(), values.requires_grad_()
    output = product(weight, values)
    return output.detach(), *torch.autograd.grad(output, (weight, values), upstream)


def _check_assignment(place: Place, notes: Notes) -> None:
    import torch

    from megatron_smlp.ops.balanced_assignment import balanced_assignment

    scores = torch.randn(1000, 8)
    experts = balanced_assignment(scores.to(place.device))
    notes.check(experts.device.type == place.device, f"balanced assignment on {experts.device}")
    chosen = experts.cpu()
    notes.check(bool((chosen.bincount(minlength=8) == 125).all()), "125 tokens to each expert")
    best = scores.gather(1, balanced_assignment(scores)[:, None]).sum()
    share = float(scores.gather(1, chosen[:, None]).sum() / best)
    notes.check(share >= 0.995, f"its sum is {share:.4f} of the CPU's")


def recompute(place: Place, notes: Notes) -> None:
    """Activations that are computed twice are the same ones."""
    for system in ("smlp_partial", "switch"):
        folder, flags = place.folder / "recompute" / system, words(place, system)
        plain = train(flags, folder / "none")
        for kind, flag in {"full": FULL, "selective": "--recompute-granularity selective"}.items():
            again = train(f"{flags} {flag}", folder / kind)
            notes.same_steps(f"{system}, {kind}", again, plain, tolerance=RECOMPUTED)


def dropout(place: Place, notes: Notes) -> None:
    """The device's random numbers are resumed too."""
    flags = f"{words(place, 'amlp')} --hidden-dropout 0.1 --attention-dropout 0.1"
    straight = train(flags, place.folder / "dropout" / "straight")
    resumed = interrupted(flags, place.folder / "dropout")
    notes.same_steps("saved and resumed with dropout", resumed, straight, tolerance=RECOMPUTED)


def async_save(place: Place, notes: Notes) -> None:
    """A checkpoint that is written in the background is the same."""
    folder, flags = place.folder / "async_save", words(place, SPARSE)
    straight = train(flags, folder / "straight")
    resumed = interrupted(f"{flags} --async-save", folder)
    notes.same_steps("--async-save and resumed", resumed, straight, tolerance=RECOMPUTED)


def fp16(place: Place, notes: Notes) -> None:
    """The loss scale comes down within a few steps and the losses are those of bf16."""
    if place.on_cpu:
        notes.not_run("--fp16: it needs a CUDA device")
        return
    folder = place.folder / "fp16"
    expected = train(words(place, SPARSE), folder / "bf16")
    scale = "--initial-loss-scale 1024"  # the default would skip the updates of the first steps
    ours = train(f"{words(place, SPARSE, precision='--fp16')} {scale}", folder / "fp16")
    notes.same_steps("against bf16", ours, expected, tolerance=ROUNDING)


def transformer_engine(place: Place, notes: Notes) -> None:
    """Its layers against Megatron's own."""
    if place.on_cpu:
        notes.not_run("Transformer Engine: it needs a CUDA device")
        return
    if find_spec("transformer_engine") is None:
        notes.not_run("Transformer Engine: it is not installed")
        return
    for system in SYSTEMS:
        folder, flags = place.folder / "transformer_engine" / system, words(place, system)
        local = train(f"{flags} --transformer-impl local", folder / "local")
        ours = train(f"{flags} --transformer-impl transformer_engine", folder / "te")
        notes.same_steps(f"{system} against local", ours, local, tolerance=ROUNDING)


def text(place: Place, notes: Notes) -> None:
    """Prose into a dataset, and a model trained on it, which the tools below take."""
    from support.language_models import save_tokenizer

    from megatron_smlp.data.preprocess_cli import main as preprocess

    folder = place.folder / "text"
    save_tokenizer(folder / "tokenizer")
    prose = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))
    (folder / "prose.txt").write_text(prose, encoding="utf-8")
    _write_records(folder / "prose.jsonl", prose.split("\n\n"))
    tokenizer = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder / 'tokenizer'}"
    prefix = folder / "prose"
    files = f"--input {folder / 'prose.jsonl'} --output-prefix {prefix}"
    preprocess(f"{files} --append-eod {tokenizer}".split())
    mock = "--mock-data --tokenizer-type NullTokenizer --vocab-size 500"
    flags = " ".join(words(place, SPARSE).split())
    flags = flags.replace(mock, f"--data-path {prefix}_text_document --split 90,10,0 {tokenizer}")
    found = train(f"{flags} --save {folder / 'run'}", folder / "log")
    notes.check(len(found) == NUM_STEPS, f"{len(found)} steps on {len(prose):,} characters")


DOCS = REPOSITORY / "docs"


def _write_records(path: Path, texts: list[str]) -> None:
    import json

    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")


def evaluate(place: Place, notes: Notes) -> None:
    """tools/evaluate.py: perplexity of the trained model over its own data."""
    from megatron_smlp.evaluation.cli import main

    run, data = place.folder / "text" / "run", place.folder / "text" / "prose_text_document"
    main(["--checkpoint", str(run), "--data-path", str(data)])
    notes.passed("perplexity of the checkpoint")


def generate(place: Place, notes: Notes) -> None:
    """tools/generate.py from the checkpoint."""
    from megatron_smlp.generation.cli import main

    run = place.folder / "text" / "run"
    main(["--checkpoint", str(run), *_device(place), *SAMPLED])
    notes.passed("a prompt continued from the checkpoint")


SAMPLED = ["--prompt", "The model", "--max-new-tokens", "8", "--temperature", "0"]


def _device(place: Place) -> list[str]:
    return ["--device", place.device]


def convert(place: Place, notes: Notes) -> None:
    """tools/convert_checkpoint.py --to hf, with its check of the logits."""
    from megatron_smlp.conversion.cli import main

    folder = place.folder / "text"
    main(["--load", str(folder / "run"), "--save", str(folder / "hf"), "--to", "hf"])
    notes.check((folder / "hf" / "config.json").is_file(), "the forward check agreed")


def exported(place: Place, notes: Notes) -> None:
    """tools/generate.py from the exported folder."""
    from megatron_smlp.generation.cli import main

    main(["--hf", str(place.folder / "text" / "hf"), *_device(place), *SAMPLED])
    notes.passed("a prompt continued from the exported model")


def serve(place: Place, notes: Notes) -> None:
    """tools/serve.py answers a completion."""
    if find_spec("uvicorn") is None or find_spec("fastapi") is None:
        notes.not_run("serving: pip install 'megatron-smlp[serve]' brings what it needs")
        return
    from fastapi.testclient import TestClient

    from megatron_smlp.generation.cli import build_parser
    from megatron_smlp.generation.language_model import load
    from megatron_smlp.serving.app import build_app

    model = ["--hf", str(place.folder / "text" / "hf"), *_device(place)]
    lm = load(build_parser().parse_args(model))
    with TestClient(build_app(lm, max_body_bytes=10_000, max_waiting=4)) as client:
        body = {"model": lm.name, "prompt": "The model", "max_tokens": 8, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
    notes.check(answer.status_code == 200, f"a completion answered with {answer.status_code}")


def one_process(place: Place, notes: Notes) -> None:
    """Where the layouts start from, and what they have to give."""
    folder, flags = place.folder / "layouts", words(place, SPARSE)
    short = f"--train-iters 1 --lr-decay-iters {NUM_STEPS} --no-save-optim --no-save-rng"
    seed = flags.replace(f"--train-iters {NUM_STEPS}", short)
    train(f"{seed} --save {folder / 'seed'}", folder / "seed_log")
    found = train(_from_seed(place), folder / "one")
    notes.check(len(found) == NUM_STEPS, f"{len(found)} steps from a seed checkpoint")


def _from_seed(place: Place) -> str:
    load = f"--load {place.folder / 'layouts' / 'seed'}"
    return f"{words(place, SPARSE)} {load} --finetune --no-load-optim --no-load-rng"


def layout(place: Place, notes: Notes, *, name: str) -> None:
    """Two processes against one."""
    if not place.on_cpu:
        import torch

        if torch.cuda.device_count() < 2:
            notes.not_run(f"{name}: it needs two GPUs, and here is one")
            return
    folder = place.folder / "layouts"
    ours = on_ranks(place, 2, f"{_from_seed(place)} {LAYOUTS[name]}", folder / name, notes)
    notes.same_steps("against one process", ours, steps(folder / "one"), tolerance=ROUNDING)


def _all() -> dict[str, Case]:
    cases = [Case("environment", environment), Case("cpu_losses", cpu_losses, limit=240)]
    cases += [Case(f"train_{name}", partial(trains, system=name)) for name in SYSTEMS]
    cases += [Case(f.__name__, f) for f in (operators, recompute, dropout, async_save, fp16)]
    cases += [Case("transformer_engine", transformer_engine, limit=300), Case("text", text)]
    cases += [Case(f.__name__, f, needs=("text",)) for f in (evaluate, generate, convert)]
    cases += [Case(f.__name__, f, needs=("convert",)) for f in (exported, serve)]
    cases += [Case("one_process", one_process)]
    cases += [
        Case(name, partial(layout, name=name), needs=("one_process",), limit=180)
        for name in LAYOUTS
    ]
    return {case.name: case for case in cases}


CASES = _all()
