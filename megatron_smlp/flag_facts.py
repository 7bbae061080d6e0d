"""What the rest of the program needs to know about a flag, and the records of Megatron's own flags
that define the model. Ours are in options.py, which derives its lists from both.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_smlp.systems import LIMITED, SCORING, TOP_K, WITH_BALANCE_LOSS

SAME = "under the same name"
"""Placeholder in `Facts.hf`; in OUR_FLAGS and MODEL_FLAGS the flag's name replaces it."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about a flag, from which the rest of the program derives its lists."""

    architectures: tuple[str, ...] = ()
    """Architectures it is for; empty: all. With any other, setting it is refused."""
    token_routers: Sequence[str] = ()
    """Token router rules it is for; empty: all."""
    feature_routers: Sequence[str] = ()
    """Feature router rules it is for; empty: all."""
    input_projections: tuple[str, ...] = ()
    """Input projections it is for; empty: all."""
    least: float | None = None
    """The smallest allowed value."""
    may_change: bool = False
    """Whether a run that resumes from a checkpoint may use another value than the checkpoint's."""
    filled_in: bool = False
    """Whether its default here differs from Megatron's."""
    derived: bool = False
    """Whether it follows from other flags or from the tokenizer."""
    of_one_start: bool = False
    """Whether it concerns only one start of a run, so that --use-checkpoint-args omits it."""
    evaluates: bool = False
    """Whether an evaluation reads it, although it may change."""
    hf: str | None = None
    """Its name in the Hugging Face configuration; None: not in there."""
    hf_default_only: bool = False
    """Whether a model can be exported only if the flag has its default value."""
    upcycling: bool = False
    """Whether tools/convert_checkpoint.py --upcycle accepts it for the sparse model."""


def option(default: Any, *, choices: Mapping[str, Any] | None = None, **facts: Any) -> Any:
    """Make a dataclass field with its facts.

    Args:
        choices: the table whose names are allowed besides the default; plugins may add to it.
    """
    metadata = {"facts": Facts(**facts), "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def named[F: Facts](records: dict[str, F]) -> dict[str, F]:
    """Replace SAME in the records by their names."""
    return {
        name: dataclasses.replace(facts, hf=name) if facts.hf is SAME else facts
        for name, facts in records.items()
    }


@dataclass(frozen=True, kw_only=True)
class MegatronFlag(Facts):
    """A Megatron flag that defines the model, and so is recorded in model.json."""

    default: Any = None
    """Megatron's own default; tests/unit/test_options.py compares them."""


# Flags that make another function of the same weights.
_FUNCTIONS = {
    "openai_gelu": False,
    "squared_relu": False,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "no_rope_freq": None,
    "qk_l2_norm": False,
    "softmax_type": "vanilla",
    "window_size": None,
    "window_attn_skip_freq": None,
    "layernorm_zero_centered_gamma": False,
    "moe_mlp_glu_interleave_size": None,
    "use_mup": False,
    "mup_base_hidden_size": None,
    "mup_base_head_dim": None,
}
MEGATRON_FLAGS = named(
    {
        **{
            name: MegatronFlag(default=default, hf_default_only=name != "openai_gelu")
            for name, default in _FUNCTIONS.items()
        },
        "num_layers": MegatronFlag(hf=SAME),
        "hidden_size": MegatronFlag(hf=SAME),
        "ffn_hidden_size": MegatronFlag(hf=SAME),
        "num_attention_heads": MegatronFlag(hf=SAME),
        "kv_channels": MegatronFlag(),
        "group_query_attention": MegatronFlag(default=False),
        "num_query_groups": MegatronFlag(default=1),
        "seq_length": MegatronFlag(hf="max_position_embeddings"),
        "max_position_embeddings": MegatronFlag(),
        "position_embedding_type": MegatronFlag(default="learned_absolute", hf=SAME),
        "rotary_base": MegatronFlag(default=10000, hf=SAME),
        "num_experts": MegatronFlag(hf=SAME, upcycling=True),
        "moe_ffn_hidden_size": MegatronFlag(hf=SAME, upcycling=True),
        "moe_layer_freq": MegatronFlag(default=1, hf=SAME, upcycling=True),
        "moe_router_topk": MegatronFlag(default=2, token_routers=TOP_K),
        "moe_router_score_function": MegatronFlag(default="softmax", token_routers=TOP_K, hf=SAME),
        "moe_router_enable_expert_bias": MegatronFlag(default=False, token_routers=TOP_K, hf=SAME),
        "moe_router_num_groups": MegatronFlag(token_routers=TOP_K, hf=SAME),
        "moe_router_group_topk": MegatronFlag(token_routers=TOP_K, hf=SAME),
        "moe_router_topk_scaling_factor": MegatronFlag(token_routers=TOP_K, hf=SAME),
        "moe_shared_expert_intermediate_size": MegatronFlag(hf=SAME),
        "moe_router_load_balancing_type": MegatronFlag(
            default="aux_loss", may_change=True, filled_in=True, token_routers=TOP_K
        ),
        "moe_aux_loss_coeff": MegatronFlag(
            default=0.0, may_change=True, filled_in=True, token_routers=WITH_BALANCE_LOSS, hf=SAME
        ),
        "moe_z_loss_coeff": MegatronFlag(may_change=True, token_routers=SCORING, hf=SAME),
        "moe_router_bias_update_rate": MegatronFlag(
            default=1e-3, may_change=True, token_routers=TOP_K, hf=SAME
        ),
        "hidden_dropout": MegatronFlag(default=0.1, may_change=True, hf=SAME),
        "attention_dropout": MegatronFlag(default=0.1, may_change=True, hf=SAME),
        "moe_token_drop_policy": MegatronFlag(
            default="probs",
            may_change=True,
            filled_in=True,
            token_routers=LIMITED,
            hf="moe_drop_policy",
        ),
        "normalization": MegatronFlag(default="LayerNorm", hf=SAME),
        "qk_layernorm": MegatronFlag(default=False, hf=SAME),
        "layernorm_epsilon": MegatronFlag(default=1e-5, hf="layer_norm_epsilon"),
        "add_bias_linear": MegatronFlag(default=True, hf=SAME),
        "swiglu": MegatronFlag(default=False, hf=SAME),
        "untie_embeddings_and_output_weights": MegatronFlag(default=False),
        # The padding grows with the tensor parallel size; Megatron loads across it.
        "padded_vocab_size": MegatronFlag(may_change=True, derived=True, hf="vocab_size"),
        "vocab_size": MegatronFlag(derived=True, hf="unpadded_vocab_size"),
    }
)
