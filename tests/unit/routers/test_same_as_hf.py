"""With the same weights, megatron_smlp/hf/, the plain reference, has the same logits and gradients.

In evaluation, and in training with capacity limits, where losses and drops are the same too. The
tests replace the reference's simpler BASE assignment and GShard draws with ours.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.in_process import build_model
from torch import Tensor
from torch.nn import functional

from megatron_smlp.checkpoints.model_record import model_flags
from megatron_smlp.conversion.huggingface import config_of
from megatron_smlp.conversion.names import OURS
from megatron_smlp.hf.modeling_smlp import SMLPBaseRouter, SMLPForCausalLM, SMLPGShardRouter
from megatron_smlp.ops.balanced_assignment import priced_assignment
from megatron_smlp.routers.draws import uniform
from megatron_smlp.systems import TOKEN_ROUTERS
from megatron_smlp.training.forward import ForwardStep

pytestmark = pytest.mark.usefixtures("megatron")

LENGTH = 13  # odd, and shorter than the model's 16
LONG = {"toeplitz": 23}  # its matrices go on behind it
LAYERS = {
    "transformer": "--architecture transformer --num-attention-heads 4 --moe-layer-freq 2",
    "smlp": "--architecture smlp --num-dense-layers 2 --feature-router deterministic "
    "--num-feature-experts 4",
}
MODERN = (
    "--architecture transformer --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --position-embedding-type rope --rotary-base 500 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
    "--qk-layernorm"
)
# These differ from LAYERS in other parts than the token router: one router, or none, will do.
MIXERS = {
    "gmlp": "--architecture gmlp --spatial-heads 2",
    "amlp": "--architecture amlp --tiny-attention-width 8",
    "amlp_rope": "--architecture amlp --tiny-attention-width 8 --position-embedding-type rope "
    "--rotary-base 500",
    "partial": "--architecture smlp --num-dense-layers 1 --feature-router partial "
    "--num-feature-experts 4 --prefix-fraction 0.3 --feature-aux-loss-coeff 0.5",
    "partial_more_chunks": "--architecture smlp --feature-router partial --num-feature-experts 3 "
    "--num-feature-chunks 8 --prefix-fraction 0.3",
    "partial_few_tokens": "--architecture smlp --feature-router partial --num-feature-experts 4 "
    "--prefix-fraction 0.85",
    "modern": MODERN,
    "gmlp_rms_norm": "--architecture gmlp --spatial-heads 2 --normalization RMSNorm",
    "mixer": "--architecture mixer --spatial-heads 2 --mixer-expansion",
    "toeplitz": "--architecture gmlp --spatial-heads 2 --toeplitz",
    "partial_toeplitz": "--architecture smlp --feature-router partial --num-feature-experts 4 "
    "--toeplitz",
    "no_positions": "--architecture transformer --num-attention-heads 4 "
    "--position-embedding-type none --group-query-attention --num-query-groups 1 --qk-layernorm",
}
CAPACITY = "--moe-train-capacity-factor 0.75 --moe-eval-capacity-factor 1"
ROUTERS = {
    "switch": "--token-router switch",
    "switch_limited": f"--token-router switch {CAPACITY} --moe-token-drop-policy position "
    "--moe-z-loss-coeff 0.3",
    "switch_limited_shared": f"--token-router switch {CAPACITY} "
    "--moe-shared-expert-intermediate-size 24",
    "switch_limited_by_probability": f"--token-router switch {CAPACITY}",
    "gshard": "--token-router gshard",
    "gshard_all": "--token-router gshard --gshard-second-expert all --moe-z-loss-coeff 0.3",
    "gshard_raw": "--token-router gshard --gshard-second-expert raw",
    "gshard_limited": f"--token-router gshard {CAPACITY}",
    "base": "--token-router base --moe-z-loss-coeff 0.3",
    "base_shared": "--token-router base --moe-shared-expert-intermediate-size 24",
    "base_on_the_norm": "--token-router base --base-routing-input norm --moe-z-loss-coeff 0.3",
    "base_with_priced_gates": "--token-router base --base-gate price",
    "hash": "--token-router hash --hash-seed 5",
    "topk": "--token-router topk",
    "topk_of_one": "--token-router topk --moe-router-topk 1 --moe-router-topk-scaling-factor 2.5 "
    "--moe-z-loss-coeff 0.3",
    "topk_sigmoid_shared": "--token-router topk --moe-router-topk 3 "
    "--moe-router-score-function sigmoid --moe-shared-expert-intermediate-size 24",
    "topk_of_groups": "--token-router topk --moe-router-num-groups 2 --moe-router-group-topk 1",
    "topk_by_bias": "--token-router topk --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-topk-scaling-factor 1.5",
}


def by_global_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors as its checkpoint names them: local experts become one tensor."""
    whole: dict[str, Any] = {}
    for name, tensor in tensors.items():
        before, found, after = name.partition(".local_experts.")
        if found:
            rest = after.partition(".")[2]
            whole.setdefault(f"{before}.experts.{rest}", []).append(tensor)
        else:
            whole[name] = tensor
    return {n: torch.stack(t) if isinstance(t, list) else t for n, t in whole.items()}


def in_reference_names(tensors: dict[str, Tensor], args: Any) -> dict[str, Tensor]:
    whole = by_global_name(tensors)
    plan = OURS.export_plan(whole, model_flags(args))
    return {target: recipe.make(whole[recipe.sources[0]]) for target, recipe in plan.items()}


def reference_of(model: Any, args: Any) -> SMLPForCausalLM:
    config = config_of(model_flags(args))
    config.moe_eval_capacity_factor = args.moe_eval_capacity_factor  # an export drops nothing
    reference = SMLPForCausalLM(config)
    tensors = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    if not args.untie_embeddings_and_output_weights:
        tensors.pop("output_layer.weight", None)
    weights = in_reference_names(tensors, args)
    loaded = reference.load_state_dict(weights, strict=False)
    assert not loaded.unexpected_keys
    assert loaded.missing_keys in ([], ["lm_head.weight"]), "tied to the embedding"
    for number, layer in enumerate(reference.model.layers, start=1):
        router = getattr(layer.channel, "router", None)
        if isinstance(router, SMLPBaseRouter):
            router.assign = priced_assignment
        if isinstance(router, SMLPGShardRouter):
            router.draw = partial(drawn, number)
    return reference


def drawn(layer: int, gates: Tensor) -> Tensor:
    """Return the draws of a model without sample keys."""
    return uniform(torch.zeros(1, dtype=torch.int64), layer=layer, positions=len(gates))


STARTS = {
    **{rule: f"{LAYERS['transformer']} {ROUTERS[rule]}" for rule in TOKEN_ROUTERS},
    **{mixer: f"{MIXERS[mixer]} --token-router base" for mixer in MIXERS},
    "modern": f"{MIXERS['modern']} {ROUTERS['topk_sigmoid_shared']}",
}
CASES = [("transformer", router) for router in ROUTERS]
CASES += [("smlp", router) for router in ("switch_limited", "gshard", "base", "hash", "topk")]
CASES += [(mixer, "base") for mixer in MIXERS]
CASES += [(mixer, "none") for mixer in ("gmlp", "modern")]  # an empty channel slot, a dense FFN
CASES += [("modern", router) for router in ROUTERS if router.startswith("topk")]


def both(args: Any) -> tuple[Any, SMLPForCausalLM]:
    """Return our model, stirred, and the reference with its weights."""
    model = build_model(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("router.expert_bias"):
                buffer.normal_(std=0.1)
    return model, reference_of(model, args)


def batch(vocab_size: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocab_size, (3, length))
    return tokens, torch.arange(length).expand_as(tokens)


def gradient_of(parameter: Tensor) -> Tensor:
    """Return zeros if unused, as is the prefix router of a sequence that ends within the prefix."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@pytest.mark.parametrize(("layers", "router"), CASES)
def test_logits_and_then_losses_and_gradients(layers: str, router: str, parse: Callable[..., Any]):
    """Logits in evaluation; losses and gradients in training."""
    experts = "" if router == "none" else f"--num-experts 4 {ROUTERS[router]}"
    args = parse(f"{(LAYERS | MIXERS)[layers]} {experts}")
    model, reference = both(args)
    tokens, positions = batch(args.padded_vocab_size, LONG.get(layers, LENGTH))
    with torch.no_grad():
        expected = reference.eval()(tokens).logits
        torch.testing.assert_close(model(tokens, positions, None), expected, rtol=0, atol=1e-5)
    labels = tokens.roll(-1, dims=1)
    loss = model.train()(tokens, positions, None, labels=labels).mean()
    loss.backward()
    outputs = reference.train()(tokens)
    expected = functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    (expected + (0 if outputs.aux_loss is None else outputs.aux_loss)).backward()
    gradients = {name: gradient_of(p) for name, p in model.named_parameters()}
    theirs = {name: gradient_of(p) for name, p in reference.named_parameters()}
    ours = in_reference_names(gradients, args)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-5, msg=name)


def test_both_train_on_the_same_targets(parse: Callable[..., Any]):
    """Partial prediction's suffix: by the step's mask, and by the one inside the reference."""
    args = parse(MIXERS["partial"])
    model = build_model(args).train()
    reference = reference_of(model, args).train()
    tokens, positions = batch(args.padded_vocab_size)
    losses = model(tokens, positions, None, labels=tokens.roll(-1, dims=1))
    mask = torch.ones_like(losses)
    mask[:, -1] = 0  # no token follows the last one
    total, count, _ = ForwardStep()._loss(mask, losses)
    outputs = reference(tokens, labels=tokens)
    torch.testing.assert_close(total / count, outputs.loss - outputs.aux_loss, rtol=0, atol=1e-5)


def spread_and_mean(values: Tensor) -> tuple[float, float]:
    return values.std(unbiased=False).item(), values.mean().item()


@pytest.mark.parametrize("case", STARTS)
def test_both_start_alike(case: str, parse: Callable[..., Any]):
    """Every kind of parameter is initialized with the same standard deviation and mean."""
    sizes = "--hidden-size 64 --ffn-hidden-size 128 --seq-length 48 --num-experts 4"
    args = parse(f"{STARTS[case]} {sizes}")
    model = build_model(args)
    ours = in_reference_names(dict(model.named_parameters()), args)
    theirs = dict(SMLPForCausalLM(config_of(model_flags(args))).named_parameters())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if ".spatial" in name and tensor.shape[-2:] == (48, 48):
            # What lies above the diagonal is read by neither, and zero in ours alone.
            rows, columns = torch.tril_indices(*tensor.shape[-2:])
            tensor, theirs[name] = (w[..., rows, columns] for w in (tensor, theirs[name]))
        spread, mean = spread_and_mean(theirs[name])
        assert spread_and_mean(tensor) == (
            pytest.approx(spread, rel=min(0.35, 5 / tensor.numel() ** 0.5)),
            pytest.approx(mean, abs=0.5 * spread + 1e-6),
        ), name
