"""A Megatron checkpoint -> a Hugging Face folder that loads with torch and transformers alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from megatron_smlp.conversion.names import HeadShape, to_huggingface
from megatron_smlp.conversion.torch_dist import TorchDistCheckpoint
from megatron_smlp.errors import UsageError
from megatron_smlp.hf import configuration_smlp
from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM

SAME_NAME = (
    "architecture",
    "spatial_heads",
    "feature_router",
    "num_feature_experts",
    "num_feature_chunks",
    "prefix_fraction",
    "partial_loss",
    "feature_aux_loss_coeff",
    "tiny_attention_width",
    "num_dense_layers",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "token_router",
    "moe_train_capacity_factor",
    "moe_aux_loss_coeff",
    "hash_seed",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "add_bias_linear",
)
UNSUPPORTED = {"swiglu": False, "group_query_attention": False, "normalization": "LayerNorm"}


def export(load: str | Path, save: str | Path, *, tokenizer: str | None = None) -> Path:
    """Write config, weights, code and tokenizer of the newest checkpoint in `load` to `save`.

    Args:
        tokenizer: folder of a Hugging Face tokenizer to go with the model.

    Raises:
        UsageError: what the checkpoint holds has no equal in the Hugging Face model, or a tensor
            is unknown, missing or of another shape.
    """
    disable_progress_bar()  # one bar a file says nothing where there is one file
    checkpoint = TorchDistCheckpoint(load)
    config = huggingface_config(checkpoint.flags)
    model = SMLPForCausalLM(config)
    fill(model, checkpoint)
    for auto in ("AutoConfig", "AutoModelForCausalLM"):
        type_ = SMLPConfig if auto == "AutoConfig" else SMLPForCausalLM
        type_.register_for_auto_class(auto)
    target = Path(save)
    if tokenizer:
        _add_tokenizer(model, tokenizer, target)
    model.save_pretrained(target)
    source = Path(configuration_smlp.__file__).parent
    for file in ("configuration_smlp.py", "modeling_smlp.py"):
        shutil.copy(source / file, target / file)
    return target


def huggingface_config(flags: dict[str, Any]) -> SMLPConfig:
    """The model flags of a checkpoint, in Hugging Face's words.

    Raises:
        UsageError: a flag that the Hugging Face model has no equal for.
    """
    for name, only in UNSUPPORTED.items():
        if flags[name] != only:
            raise UsageError(
                f"--{name.replace('_', '-')} {flags[name]} has no equal in the Hugging Face "
                f"model; it can be exported with {only} only."
            )
    return SMLPConfig(
        **{name: flags[name] for name in SAME_NAME},
        moe_drop_policy=flags["moe_token_drop_policy"],
        moe_eval_capacity_factor=None,  # a score must not depend on what else is in its batch
        vocab_size=flags["padded_vocab_size"],
        max_position_embeddings=flags["seq_length"],
        layer_norm_epsilon=flags["layernorm_epsilon"],
        tie_word_embeddings=not flags["untie_embeddings_and_output_weights"],
    )


@torch.no_grad()
def fill(model: SMLPForCausalLM, checkpoint: TorchDistCheckpoint) -> None:
    """Copy every weight and buffer of the checkpoint into the model, and account for each one.

    Raises:
        UsageError: with the name of a tensor that is unknown, missing, or of another shape.
    """
    heads = HeadShape.of(checkpoint.flags)
    targets: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing = set(targets)
    for name, tensor in checkpoint.tensors():
        try:
            pieces = list(to_huggingface(name, tensor, heads))
        except KeyError as error:
            raise UsageError(f"the checkpoint's tensor {name} is unknown to this model") from error
        for target, piece in pieces:
            _copy(targets, target, piece, name)
            missing.discard(target)
    if missing:
        raise UsageError(f"the checkpoint lacks {', '.join(sorted(missing))}")


def _copy(targets: dict[str, Tensor], target: str, piece: Tensor, name: str) -> None:
    if target not in targets:
        raise UsageError(f"the checkpoint's tensor {name} has no place in this model ({target})")
    if targets[target].shape != piece.shape:
        raise UsageError(
            f"the checkpoint's tensor {name} is {list(piece.shape)}, the model's {target} is "
            f"{list(targets[target].shape)}"
        )
    targets[target].copy_(piece)


def _add_tokenizer(model: SMLPForCausalLM, tokenizer: str, target: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.model_max_length = model.config.max_position_embeddings
    loaded.save_pretrained(target)
    for owner in (model.config, model.generation_config):
        owner.eos_token_id = loaded.eos_token_id
        owner.pad_token_id = loaded.eos_token_id
