"""A flag that would do nothing here is refused; one that works is not."""

import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from support.in_process import MINIMAL, forget_arguments, pretrained

from megatron_smlp.arguments import build_parser, parse_arguments
from megatron_smlp.errors import UsageError
from megatron_smlp.foreign_flags import (
    OF_ATTENTION,
    OF_DOCUMENTS,
    OF_OTHER_LAYERS,
    OF_TRANSFORMER_ENGINE,
)
from megatron_smlp.platform import cpu

TRANSFORMER = "--architecture transformer --num-attention-heads 4"
type Parse = Callable[[str], Any]


@pytest.fixture
def parse() -> Iterator[Parse]:
    def parsed(words: str) -> Any:
        return parse_arguments([*MINIMAL.split(), *words.split()])

    yield parsed
    forget_arguments()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{TRANSFORMER} --multi-latent-attention", "--multi-latent-attention builds layers of "),
        ("--architecture gmlp --mtp-num-layers 1", "--mtp-num-layers builds layers of other "),
        ("--architecture gmlp --qk-layernorm", "--qk-layernorm is for the attention of "),
        ("--architecture amlp --group-query-attention --num-query-groups 2", "not for amlp"),
        ("--architecture smlp --window-size 4,0", "--window-size is for the attention of "),
        ("--architecture gmlp --reset-attention-mask", "--reset-attention-mask: samples are read "),
        (f"{TRANSFORMER} --reset-position-ids", "--reset-position-ids: samples are read whole"),
        (
            "--architecture gmlp --position-embedding-type rope",
            "--position-embedding-type rope acts on .* give none or learned_absolute, or leave",
        ),
        ("--architecture gmlp --use-te-activation-func", "--use-te-activation-func puts the tanh"),
    ],
)
def test_other_layers_flags(parse: Parse, words: str, message: str):
    with pytest.raises(UsageError, match=message):
        parse(words)


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is installed")
@pytest.mark.parametrize(
    "flag",
    [
        *("--apply-layernorm-1p", "--qk-layernorm", "--window-size 4,0"),
        *("--fused-residual-rmsnorm", "--moe-grouped-gemm"),
    ],
)
def test_transformer_engines_flags(parse: Parse, flag: str):
    with pytest.raises(UsageError, match=re.escape(flag.split()[0]) + " needs Transformer Engine"):
        parse(f"{TRANSFORMER} {flag}")


def test_every_name_is_one_of_megatrons_flags():
    destinations = {action.dest for action in build_parser()._actions}
    ours = {*OF_OTHER_LAYERS, *OF_ATTENTION, *OF_DOCUMENTS, *OF_TRANSFORMER_ENGINE}
    assert ours <= destinations


@pytest.mark.parametrize(
    "words",
    [
        f"{TRANSFORMER} --softmax-type vanilla",
        f"{TRANSFORMER} --group-query-attention --num-query-groups 2",
        "--architecture gmlp --position-embedding-type learned_absolute",
    ],
)
def test_what_works_is_allowed(parse: Parse, words: str):
    assert parse(words)


@pytest.mark.parametrize("kind", ["rope", "rope --rotary-percent 0.5 --rotary-base 5000", "none"])
def test_positions_of_a_transformer_train(kind: str):
    """Megatron would fuse RoPE by Transformer Engine, and stop where there is none."""
    with pretrained(f"{TRANSFORMER} --position-embedding-type {kind}"):
        pass


@pytest.mark.parametrize("flag", ["--cuda-graph-impl local", "--enable-cuda-graph"])
def test_a_cpu_has_no_cuda_graphs(parse: Parse, flag: str):
    with pytest.raises(UsageError, match=re.escape(f"{flag} needs a CUDA device and none was")):
        parse(f"{TRANSFORMER} {flag}")


@pytest.mark.parametrize(
    ("system", "graph", "message"),
    [
        ("gmlp --token-router hash --num-experts 2", "local", "cannot capture layers that route"),
        ("smlp --feature-router partial --num-feature-experts 2", "local", "layers that route"),
        ("gmlp", "full_iteration", "reads every step's losses.*--cuda-graph-impl local"),
    ],
)
def test_graphs_that_the_host_would_have_to_enter(
    parse: Parse, system: str, graph: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cpu, "needed", lambda: False)
    with pytest.raises(UsageError, match=f"--cuda-graph-impl {graph}.*{message}"):
        parse(f"--architecture {system} --cuda-graph-impl {graph}")
