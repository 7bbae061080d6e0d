"""A token mixer that reads later positions ends a run before its first step."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from support.in_process import MINIMAL, pretrained
from support.launches import launch_calls, records

from megatron_smlp import plugin_files
from megatron_smlp.errors import UsageError
from megatron_smlp.layers.spatial_gating import SpatialGating

GMLP = "--architecture gmlp --log-interval 1"
MESSAGE = r"layer {} \({}\) reads later positions: changing inputs from position 9 on"


def peeking(forward: Any, *, layer: int, by: float = 0.1) -> Any:
    """Add a share of the next position's output to `forward`'s, in one layer only."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        mixed, *rest = forward(self, *args, **kwargs)
        if self.layer_number == layer:
            every, tp = mixed, self.tp_group
            if self.config.sequence_parallel:
                every = gather_from_sequence_parallel_region(mixed, group=tp)
            parts = torch.roll(every, -1, dims=0).chunk(len(every) // len(mixed))
            mixed = mixed + by * parts[tp.rank() if len(parts) > 1 else 0]
        return (mixed, *rest)

    return wrapped


def test_a_look_at_the_next_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SpatialGating, "forward", peeking(SpatialGating.forward, layer=3))
    message = MESSAGE.format(3, "SpatialGating")
    with (
        pytest.raises(UsageError, match=message) as error,
        pretrained(f"{GMLP} --bf16 --log-dir {tmp_path}"),
    ):
        pass
    assert "\n" not in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.usefixtures("registry")
def test_a_plugin_that_works_in_chunks(tmp_path: Path):
    """Each token reads the sum of its chunk of eight, a later one's included. The plugin is called
    by its own name."""
    path = tmp_path / "chunks.py"
    path.write_text(
        "from megatron_smlp.plugins import TokenMixer, register\n@register('chunks')\n"
        "class Chunks(TokenMixer):\n    def forward(self, value):\n"
        "        sums = value.unflatten(1, (-1, 8)).sum(2).repeat_interleave(8, 1)\n"
        "        return sums if value.shape[1] > 64 else value\n"
        "register.architecture('chunks', mixer='chunks')\n"
    )
    plugin_files.load(str(path))
    base = MINIMAL.replace("--seq-length 16", "--seq-length 128")
    leaks = pytest.raises(UsageError, match=r"layer 1 \(Chunks\) reads later positions")
    with leaks, pretrained("--architecture chunks --train-iters 1", base=base):
        pass


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("init", ["ones", "zeros"])
def test_a_parameter_of_which_a_plugin_takes_the_logarithm(tmp_path: Path, init: str):
    """With ones it starts where the logarithm is finite; with zeros it does not."""
    path = tmp_path / "decays.py"
    path.write_text(
        f"from megatron_smlp.plugins import TokenMixer, {init}, register\n@register('decays')\n"
        "class Decays(TokenMixer):\n    def build(self, width, length):\n"
        f"        self.rate = self.parameter(width, cut=0, init={init})\n"
        "    def forward(self, value):\n        return value * (1 + self.rate().log())\n"
        "register.architecture('decays', mixer='decays')\n"
    )
    plugin_files.load(str(path))
    refused = pytest.raises(UsageError, match=r"layer 1 \(Decays\) returns non-finite values")
    with (
        refused if init == "zeros" else nullcontext(),
        pretrained("--architecture decays --train-iters 1"),
    ):
        pass


def test_a_run_that_goes_on_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its first start was; what it loads does not tell one mixer from another."""
    flags = f"{GMLP} --save {tmp_path} --train-iters 4"
    with pretrained(f"{flags} --exit-interval 2"):
        pass
    monkeypatch.setattr(SpatialGating, "forward", peeking(SpatialGating.forward, layer=1))
    with pretrained(flags):
        assert [line["iteration"] for line in records(tmp_path) if "loss" in line] == [1, 2, 3, 4]


def test_ranks_that_hold_parts_of_the_positions(tmp_path: Path):
    """Sequence parallelism shards them: each mixer gathers, and both ranks end alike."""
    launch_calls(_refused, str(tmp_path), processes=2, log=tmp_path / "log")
    texts = {(tmp_path / f"{rank}").read_text() for rank in range(2)}
    assert len(texts) == 1
    assert "layer 2 (SpatialGating) reads later positions" in texts.pop()


def _refused(folder: str) -> None:
    import os

    from support.in_process import MINIMAL

    from pretrain_smlp import main

    forward = SpatialGating.forward
    SpatialGating.forward = peeking(forward, layer=2)
    flags = f"{MINIMAL} {GMLP} --tensor-model-parallel-size 2 --sequence-parallel"
    with pytest.raises(UsageError) as error:
        main(flags.split())
    Path(folder, os.environ["RANK"]).write_text(str(error.value))
