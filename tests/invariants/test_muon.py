"""Muon (`--optimizer muon`, decision 87): every layout trains the same, saves and resumes.

All runs of a system start from one checkpoint, or from its optimizer's state after two steps.
"""

import re
from pathlib import Path

import pytest
import torch
from support.checkpoints import checkpoint_tensors
from support.cover import selected, slow_unless_in
from support.in_process import layer_config
from support.launches import Step, launch, steps

from megatron_smlp.architectures import SlottedLayer

SAVED, LAST = 2, 4
TOLERANCE = 1e-4  # relative, as Adam's in test_layouts.py

MODEL = f"""
    --mock-data --num-layers 4 --hidden-size 64 --ffn-hidden-size 256 --seq-length 32
    --tokenizer-type NullTokenizer --vocab-size 500
    --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 8
    --num-workers 0 --lr 3e-3 --lr-decay-style constant --log-interval 1
    --eval-iters 0 --train-iters {LAST}
    --optimizer muon --muon-momentum 0.9 --muon-nesterov --muon-extra-scale-factor 0.2
"""
EXACT = "--muon-fp32-matmul-prec high"  # for the Newton-Schulz products; the default is bf16
EXPERTS = "--num-experts 4 --moe-token-dispatcher-type alltoall"
SYSTEMS = {
    "llama": f"""--num-attention-heads 4 --group-query-attention --num-query-groups 2
        --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
        --qk-layernorm {EXACT}""",
    "smlp": f"""--architecture smlp --num-dense-layers 2 --spatial-heads 2 --num-feature-experts 4
        --feature-router partial --token-router switch {EXPERTS} {EXACT}""",
    "bf16": "--architecture gmlp --spatial-heads 4 --bf16",
    "toeplitz": f"""--architecture amlp --toeplitz --tiny-attention-width 16 --muon-no-split-qkv
        --muon-scale-mode unit_rms_norm --muon-coefficient-type polar_express
        --muon-num-ns-steps 6 --decoupled-lr 1e-3 {EXACT}""",
}
TP = "--tensor-model-parallel-size 2"
PP = "--pipeline-model-parallel-size 2"
EP = "--expert-model-parallel-size 2"
DISTRIBUTED = "--use-distributed-optimizer"
LAYOUTS = {
    "one": (1, ""),
    "tp": (2, TP),
    "tp_distributed_products": (2, f"{TP} --muon-tp-mode distributed"),
    "pp": (2, PP),
    "ep": (2, EP),
    "dp": (2, ""),
    "dp_by_layers": (2, DISTRIBUTED),
    "tp_dp_by_layers": (4, f"{TP} {DISTRIBUTED}"),
}
# (system, saved under, continued under)
CASES = [
    ("llama", "tp", "pp"),
    ("llama", "dp", "tp_distributed_products"),
    ("smlp", "tp", "ep"),
    ("smlp", "pp", "dp"),
    ("toeplitz", "one", "tp"),
    ("bf16", "dp_by_layers", "one"),
    ("bf16", "tp_dp_by_layers", "dp"),
]
SOURCES = list(dict.fromkeys((system, source) for system, source, _ in CASES))
FAST = [("smlp", "tp", "ep"), ("bf16", "dp_by_layers", "one")]
FAST_SOURCES = [case[:2] for case in FAST]
FAST_SYSTEMS = [case[0] for case in FAST]


class Runs:
    """Runs from a seed of each system under each layout, and resumes from those under others."""

    def __init__(
        self,
        folder: Path,
        systems: set[str],
        sources: set[tuple[str, str]],
        cases: set[tuple[str, str, str]],
    ) -> None:
        self.folder = folder
        self.planned: dict[int, dict[str, str]] = {}
        for name in sorted(systems):
            self.plan(name, "seed", "--no-save-optim --no-save-rng --train-iters 1")
        self.launch()
        weights = "--finetune --no-load-optim --no-load-rng"
        for name, layout in sorted(sources | {(name, "one") for name in systems}):
            self.plan(name, layout, f"{self.load(name, 'seed')} {weights} --save-interval {SAVED}")
        self.launch()
        for name, source, target in sorted(cases):
            more = f"{self.load(name, source)} --ckpt-step {SAVED}"
            self.plan(f"{name}/{source}", target, more)
        self.launch()

    def plan(self, name: str, layout: str, more: str) -> None:
        """Plan a run, named by its layout, below the run that it resumes."""
        processes, flags = LAYOUTS.get(layout, (1, ""))
        run = f"{name}/{layout}"
        model = f"{MODEL} {SYSTEMS[name.split('/')[0]]} --save {self.folder / run / 'saved'}"
        self.planned.setdefault(processes, {})[run] = f"{model} {flags} {more}"

    def launch(self) -> None:
        for processes, runs in self.planned.items():
            launch(runs, processes=processes, folder=self.folder)
        self.planned.clear()

    def load(self, *names: str) -> str:
        return f"--load {self.folder.joinpath(*names)}/saved"

    def tensors(self, *names: str) -> dict[str, torch.Tensor]:
        return checkpoint_tensors(self.folder.joinpath(*names, "saved"), LAST)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    systems = {system for (system,) in selected(request, "system")}
    cases = selected(request, "system", "source", "target")
    cases |= {(*again, again[1]) for again in selected(request, "system", "again")}
    sources = selected(request, "system", "layout") | {case[:2] for case in cases}
    return Runs(tmp_path_factory.mktemp("muon"), systems, sources, cases)


def assert_same(ours: list[Step], plain: list[Step], system: str) -> None:
    """Compare losses and gradient norms; some bf16 weights round differently."""
    tolerance = 2e-3 if system == "bf16" else TOLERANCE
    assert len(ours) == len(plain) > 0
    for here, there in zip(ours, plain, strict=True):
        assert here.loss == pytest.approx(there.loss, rel=tolerance)
        assert here.grad_norm == pytest.approx(there.grad_norm, rel=tolerance)


@pytest.mark.parametrize(("system", "layout"), slow_unless_in(FAST_SOURCES, SOURCES))
def test_a_layout_trains_as_one_process(runs: Runs, system: str, layout: str) -> None:
    folder = runs.folder / system
    assert_same(steps(folder / layout), steps(folder / "one"), system)


@pytest.mark.parametrize(("system", "source", "target"), slow_unless_in(FAST, CASES))
def test_another_layout_goes_on(runs: Runs, system: str, source: str, target: str) -> None:
    folder = runs.folder / system / source
    assert_same(steps(folder / target), steps(folder)[SAVED:], system)


@pytest.mark.parametrize(("system", "again"), slow_unless_in([("bf16", "dp_by_layers")], SOURCES))
def test_the_same_layout_goes_on_in_the_same_bits(runs: Runs, system: str, again: str) -> None:
    whole, parts = runs.tensors(system, again), runs.tensors(system, again, again)
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


@pytest.mark.parametrize("system", slow_unless_in(FAST_SYSTEMS, SYSTEMS))
def test_muon_takes_linear_layers_and_adam_the_rest(runs: Runs, system: str) -> None:
    names = runs.tensors(system, "one").keys()
    start = "optimizer.state.momentum_buffer."
    taken = {name.removeprefix(start) for name in names if name.startswith(start)}
    linear = {name for name in names if re.search(r"linear_(qkv|proj|fc1|fc2)\.weight$", name)}
    linear = {name for name in linear if not re.match("optimizer|.*tiny_attention", name)}
    assert taken == linear != set()
    has_spatial = any("spatial.weight" in name for name in names)
    assert has_spatial == any(re.search(r"exp_avg\..*spatial\.weight", name) for name in names)


@pytest.mark.parametrize("system", ["smlp", "bf16"])
def test_nothing_above_a_diagonal_moves(runs: Runs, system: str) -> None:
    tensors = runs.tensors(system, "one")
    matrices = [it for name, it in tensors.items() if re.match(r"decoder.*spatial\.weight", name)]
    for matrix in matrices:
        assert matrix.triu(1).abs().max() == 0
        assert matrix.tril().abs().max() > 0
    assert matrices


@pytest.mark.usefixtures("megatron")
def test_what_adam_updates_is_marked_for_its_rate() -> None:
    """--decoupled-lr must reach the biases of linear layers too."""
    from megatron_smlp.training.parts import leave_to_adam

    layer = SlottedLayer(layer_config(architecture="gmlp"))
    leave_to_adam([layer])
    unmarked = {
        name
        for name, parameter in layer.named_parameters()
        if not getattr(parameter, "is_embedding_or_output_parameter", False)
    }
    assert unmarked == {f"self_attention.linear_fc{i}.weight" for i in (1, 2)}
