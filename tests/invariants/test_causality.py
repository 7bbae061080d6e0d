"""In evaluation, a token changes no logit before it, whatever else is in the batch.

Bitwise, except for models whose router chooses by what the tokens are (token experts, and feature
experts by partial prediction): there the size of an expert's group depends on the rest of the
batch, and a GEMM library may round a product of another size differently.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.cover import slow_unless_in
from support.in_process import build_model
from support.language_models import save_tokenizer
from torch import Tensor

from megatron_smlp.systems import ARCHITECTURES, TOKEN_ROUTERS

pytestmark = pytest.mark.usefixtures("megatron")

BATCH, LENGTH = 4, 16
FEATURE_RULES = ("deterministic", "partial")
EXPERTS = "--num-experts 4"
SPARSE = "--num-dense-layers 2 --spatial-heads 2 --num-feature-experts 4"
# For each architecture of systems.py, the flags that its models are tested with.
VARIANTS = {
    "transformer": {
        "": "--num-attention-heads 4",
        "_modern": "--num-attention-heads 4 --group-query-attention --num-query-groups 2 "
        "--position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear",
    },
    "gmlp": {"": "", "_4_heads": "--spatial-heads 4"},
    "amlp": {
        "": "--tiny-attention-width 8",
        "_rope": "--tiny-attention-width 8 --position-embedding-type rope",
    },
    "mixer": {"": "", "_expansion": "--spatial-heads 4 --mixer-expansion"},
    "smlp": {f"_{rule}": f"{SPARSE} --feature-router {rule}" for rule in FEATURE_RULES},
}
LAYERS = {
    f"{name}{variant}": f"--architecture {name} {flags}"
    for name, variants in VARIANTS.items()
    for variant, flags in variants.items()
}
TOKENIZER = "TOKENIZER"
"""Placeholder for a folder."""
MINHASH = (
    "--input-projection minhash --filter-size 64 --tokenizer-type HuggingFaceTokenizer "
    f"--tokenizer-model {TOKENIZER}"
)
ROUTERS = {"none": ""} | {name: f"--token-router {name} {EXPERTS}" for name in TOKEN_ROUTERS}
MODELS = {
    f"{layers}-{router}": f"{LAYERS[layers]} {ROUTERS[router]}"
    for layers in LAYERS
    for router in ROUTERS
} | {
    "gmlp-base_by_prices": f"{LAYERS['gmlp']} {ROUTERS['base']} --base-eval prices",
    "gmlp-base_with_priced_gates": f"{LAYERS['gmlp']} {ROUTERS['base']} --base-gate price",
    "transformer_modern-topk_shared": f"{LAYERS['transformer_modern']} {ROUTERS['topk']} "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-shared-expert-intermediate-size 24",
    "gmlp-toeplitz": f"{LAYERS['gmlp_4_heads']} --toeplitz",
    "mixer-toeplitz": f"{LAYERS['mixer_expansion']} --toeplitz",
    "mixer-minhash": f"{LAYERS['mixer']} {MINHASH} --window 3",
    "transformer-minhash": f"{LAYERS['transformer']} {ROUTERS['base']} {MINHASH} --window 0",
    "smlp_partial-toeplitz": f"{LAYERS['smlp_partial']} --toeplitz",
}
ROUTED = {
    name
    for name, flags in MODELS.items()
    if EXPERTS in flags or "--feature-router partial" in flags
}
# Not slow: each mixer alone and with BASE, each router with two mixers, and those named above.
FAST = [
    name
    for name in MODELS
    for layers, _, router in [name.partition("-")]
    if router not in TOKEN_ROUTERS or router == "base" or layers in ("transformer", "smlp_partial")
]


@pytest.fixture(scope="module", params=slow_unless_in(FAST, MODELS))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Any]]:
    """Return (name, GPTModel in evaluation mode), with weights far from the initial ones."""
    from support.in_process import base_for, forget_arguments, prepare_megatron

    from megatron_smlp.flags.parse import parse_arguments

    prepare_megatron()
    flags = MODELS[request.param]
    if TOKENIZER in flags:  # without padding: every id has its own string
        folder = tmp_path_factory.mktemp("tokenizer")
        save_tokenizer(folder, entries=260)
        flags = flags.replace(TOKENIZER, str(folder))
    args = parse_arguments(f"{base_for(flags)} {flags} --seq-length {LENGTH}".split())
    torch.manual_seed(3)
    model = build_model(args)
    with torch.no_grad():
        for parameter in model.parameters():
            # The initial spatial matrices are so small that a leak could vanish in rounding.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("router.prices", "router.expert_bias")):
                buffer.normal_()
    yield request.param, model
    forget_arguments()


def logits(model: Any, tokens: Tensor) -> Tensor:
    """tokens: <int64>[B, T] -> <float32>[B, T, V]"""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, None)


def other_tokens(tokens: Tensor, vocabulary: int) -> Tensor:
    """Return a different token at every position."""
    return (tokens + torch.randint(1, vocabulary, tokens.shape)) % vocabulary


def assert_unchanged(name: str, after: Tensor, before: Tensor) -> None:
    if name in ROUTED:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    else:
        assert torch.equal(after, before)


def test_a_token_changes_nothing_before_it(model: tuple[str, Any]):
    """One token of one sequence changes, and every token of the other sequences.

    Position 3 is the first after the prefix of partial prediction.
    """
    name, network = model
    vocabulary = network.vocab_size
    for position in (0, 2, 3, 7, 15):
        before = torch.randint(vocabulary, (BATCH, LENGTH))
        after = other_tokens(before, vocabulary)
        after[1] = before[1]
        after[1, position] = (before[1, position] + 1) % vocabulary
        old, new = logits(network, before), logits(network, after)
        assert_unchanged(name, new[1, :position], old[1, :position])
        # The change does reach the model: its position and, through the mixer, every later one.
        assert (new[1, position:] != old[1, position:]).any(-1).all(), position


def test_every_architecture_is_tried():
    missing = set(ARCHITECTURES) - set(VARIANTS)
    assert not missing, f"VARIANTS lacks {', '.join(sorted(missing))}: give its flags"


def test_a_prefix_has_the_logits_of_the_whole(model: tuple[str, Any]):
    """Else token-by-token generation would not see the model trained on whole sequences."""
    _, network = model
    tokens = torch.randint(network.vocab_size, (BATCH, LENGTH))
    whole = logits(network, tokens)
    for length in (1, 5, 15):
        prefix = logits(network, tokens[:, :length])
        torch.testing.assert_close(prefix, whole[:, :length], rtol=0, atol=1e-5)


# Routers that look across the micro-batch by design, and those that do not although they drop.
LIMITED = "--token-router switch --moe-train-capacity-factor 0.5 --moe-token-drop-policy"
IN_TRAINING = {
    "drops_by_position": (f"{LIMITED} position", False),
    "drops_by_probability": (f"{LIMITED} probs", True),
    "base": ("--token-router base", True),
    "hash": ("--token-router hash", False),
}


@pytest.mark.parametrize("case", IN_TRAINING)
def test_what_sees_later_tokens_in_training(case: str, parse: Callable[..., Any]):
    flags, looks_ahead = IN_TRAINING[case]
    network = build_model(parse(f"--num-attention-heads 4 {EXPERTS} {flags}")).train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    position, changes = 8, []
    for _ in range(10):
        before = torch.randint(network.vocab_size, (BATCH, LENGTH))
        after = torch.cat([before[:, :position], other_tokens(before, 100)[:, position:]], dim=1)
        old, new = logits(network, before), logits(network, after)
        changes.append((old - new)[:, :position].abs().max().item())
    assert (max(changes) > 1e-3) == looks_ahead
    assert looks_ahead or max(changes) < 1e-5
