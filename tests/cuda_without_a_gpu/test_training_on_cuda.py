"""Every system trains, saves and resumes on the code path of a CUDA device as it does on a CPU.

The CPU stands in for the device (support/cuda_stand_in.py): the real `megatron.training` loop, MoE
dispatch, backward pass, optimizer and checkpoints, and nothing of the CPU platform. Each run starts
from a checkpoint that a CPU saved, saves its own after a step, and resumes from that.
"""

import itertools
from pathlib import Path

import pytest
from support.cover import selected, slow_unless_in
from support.launches import REPOSITORY, Step, launch, launch_on_the_stand_in, steps
from support.systems import SYSTEMS as FLAGS

MODEL = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 500 --num-layers 4 --hidden-size 64
    --ffn-hidden-size 256 --seq-length 64 --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 2 --global-batch-size 4 --num-workers 0 --lr 1e-3 --lr-decay-style constant
    --log-interval 1
"""
SILENT, EVALUATES = "--eval-iters 0", "--eval-iters 1 --eval-interval 1000"
SYSTEMS = {
    **FLAGS,
    "gshard": f"{FLAGS['gshard']} --moe-train-capacity-factor 1.25",
    "switch": f"{FLAGS['switch']} --moe-token-drop-policy probs",
    "gmlp": "--architecture gmlp --spatial-heads 2",
    "gmlp_toeplitz": "--architecture gmlp --toeplitz",
    "aft": f"--plugin {REPOSITORY}/plugins/aft.py --architecture aft",
    "mixed": f"--plugin {REPOSITORY}/tests/support/mixed_plugin.py --architecture mixed "
    "--num-attention-heads 4",
}
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective"
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
# fp16 needs a CUDA device: it is compared with the CPU's bf16, from whose checkpoint it starts.
VARIANTS = {
    "bf16": f"--bf16 --cross-entropy-loss-fusion {RECOMPUTE}",
    "fp16": f"--fp16 --initial-loss-scale 4096 {DISTRIBUTED} {SELECTIVE}",
}
CASES = list(itertools.product(SYSTEMS, VARIANTS))


# Attention next to a gate, and both kinds of experts; one in each precision.
FAST = [("amlp", "fp16"), ("smlp_deterministic", "bf16")]
TP = "--tensor-model-parallel-size 2 --sequence-parallel"
PP = "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "tp2": ("gmlp", TP),
    "tp2_partial": ("smlp_partial", TP),
    "tp2_gshard": ("gshard", TP),
    "pp2_hash": ("hash", f"{PP} {RECOMPUTE}"),
    "pp2_interleaved": ("amlp", f"{PP} --num-layers-per-virtual-pipeline-stage 1"),
    "ep2": (
        "smlp_deterministic",
        f"--expert-model-parallel-size 2 {DISTRIBUTED} {RECOMPUTE}",
    ),
    "dp2": ("smlp_partial", DISTRIBUTED),
}
LAYOUTS_FAST = ("ep2",)
IN_LAYOUTS = sorted({system for system, _ in LAYOUTS.values()})
DRAWN = "smlp_deterministic"
"""Also trained from weights that the CPU draws."""
SAVED, RESUMED, END = 1, 2, 3
# Relative tolerances of loss and gradient norm. Two processes add in a different order; bf16 and
# fp16 round in other places, so that a token between two experts may switch.
EXACT, ROUNDED = (1e-4, 1e-4), (5e-4, 1e-2)

# The first test waits for all runs.
pytestmark = pytest.mark.timeout(1800)


def _until(iteration: int, flags: str) -> str:
    evaluation = "" if EVALUATES in flags else SILENT
    return f"{MODEL} {flags} {evaluation} --train-iters {iteration}"


def _systems_in_layouts(request: pytest.FixtureRequest) -> set[str]:
    """Return the systems of the selected layouts, and those selected only in fp32."""
    layouts = {LAYOUTS[layout][0] for (layout,) in selected(request, "layout")}
    return layouts | {system for (system,) in selected(request, "fp32_system")}


@pytest.fixture(scope="module")
def cpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train each system on the CPU platform; each run logs into the folder of its checkpoints."""
    folder: Path = tmp_path_factory.mktemp("cpu")
    runs = {}
    bf16 = {system for system, _ in selected(request, "system", "variant")} | {DRAWN}
    for precision, systems in {"--bf16": bf16, "": _systems_in_layouts(request)}.items():
        for system in sorted(systems):
            name = f"{system}{precision}"
            saving = f"--save {folder / name} --save-interval 1"
            runs[name] = _until(END, f"{SYSTEMS[system]} {precision} {saving}")
    # Plugins last: in this one process, a checkpoint records those that any earlier run named.
    in_order = dict(sorted(runs.items(), key=lambda run: "--plugin" in run[1]))
    launch(in_order, processes=1, folder=folder)
    return folder


@pytest.fixture(scope="module")
def device(
    cpu: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Make the same steps with the CPU standing in for a CUDA device, resumed midway."""
    folder: Path = tmp_path_factory.mktemp("device")
    one: dict[str, str] = {}
    asked = selected(request, "system", "variant")
    for system, variant in (case for case in CASES if case in asked):
        flags, seed = f"{SYSTEMS[system]} {VARIANTS[variant]}", cpu / f"{system}--bf16"
        if system == "aft":  # Megatron knows no part of it to recompute
            flags = flags.replace(SELECTIVE, "")
        _add_resumed(one, f"{system}_{variant}", flags, seed, folder)
    for system in sorted(_systems_in_layouts(request)):
        _add_resumed(one, f"{system}_fp32", SYSTEMS[system], cpu / system, folder)
    drawn = f"{SYSTEMS[DRAWN]} --bf16 --use-cpu-initialization"
    one["drawn_on_the_cpu"] = _until(SAVED, drawn)
    two: dict[str, str] = {}
    for (name,) in sorted(selected(request, "layout")):
        system, layout = LAYOUTS[name]
        _add_resumed(two, name, f"{SYSTEMS[system]} {layout}", cpu / system, folder)
    launch_on_the_stand_in({1: one, 2: two}, folder=folder)
    return folder


def _add_resumed(runs: dict[str, str], name: str, flags: str, seed: Path, folder: Path) -> None:
    own = folder / f"checkpoint_{name}"
    saving = f"--save {own} {'--async-save' if DISTRIBUTED in flags else ''}"
    start = f"--load {seed} --ckpt-step {SAVED}"
    runs[f"first_{name}"] = _until(RESUMED, f"{flags} {start} {saving}")
    runs[f"second_{name}"] = _until(END, f"{flags} --load {own} {EVALUATES}")


def _resumed(folder: Path, name: str) -> list[Step]:
    return steps(folder / f"first_{name}") + steps(folder / f"second_{name}")


def _assert_alike(ours: list[Step], expected: list[Step], tolerances: tuple[float, float]) -> None:
    assert len(ours) == len(expected) == END - SAVED
    for one, other in zip(ours, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=tolerances[0])
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=tolerances[1])


@pytest.mark.parametrize(("system", "variant"), slow_unless_in(FAST, CASES))
def test_it_trains_and_resumes_as_on_a_cpu(system: str, variant: str, cpu: Path, device: Path):
    ours = _resumed(device, f"{system}_{variant}")
    _assert_alike(ours, steps(cpu / f"{system}--bf16")[SAVED:], ROUNDED)


def test_weights_drawn_on_the_cpu_are_a_cpus(cpu: Path, device: Path):
    (ours,), (expected, *_) = steps(device / "drawn_on_the_cpu"), steps(cpu / f"{DRAWN}--bf16")
    assert ours.loss == pytest.approx(expected.loss, rel=ROUNDED[0])


@pytest.mark.parametrize("layout", slow_unless_in(LAYOUTS_FAST, LAYOUTS))
def test_layouts_train_and_resume_as_one_process(layout: str, device: Path):
    system, _ = LAYOUTS[layout]
    _assert_alike(_resumed(device, layout), _resumed(device, f"{system}_fp32"), EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("fp32_system", IN_LAYOUTS)
def test_fp32_is_as_on_a_cpu(fp32_system: str, cpu: Path, device: Path):
    """BASE's assignment differs there, though it is as good: device_assignment.py."""
    tolerances = ROUNDED if "base" in SYSTEMS[fp32_system] else EXACT
    ours, expected = _resumed(device, f"{fp32_system}_fp32"), steps(cpu / fp32_system)[SAVED:]
    _assert_alike(ours, expected, tolerances)
