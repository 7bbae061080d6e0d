"""GPT-2 as transformers keeps it, read as a `--architecture transformer` model.

The two models compute the same. What differs: GPT-2's `Conv1D` keeps its weights as [in, out]; its
queries, keys and values are one after the other, where Megatron has them head by head; older files
leave out the prefix `transformer.`, hold the causal mask as a tensor, or the tied output layer.

Letters: D hidden, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_smlp.conversion.names import HeadShape, join_qkv
from megatron_smlp.conversion.safetensors_files import SafetensorsFolder
from megatron_smlp.conversion.streamed_layers import weights_from
from megatron_smlp.conversion.tensors import Recipe, Spec, same
from megatron_smlp.errors import UsageError
from megatron_smlp.hf.configuration_smlp import SMLPConfig

MODEL_TYPE = "gpt2"
PREFIX = "transformer."
HEAD = "lm_head.weight"
EMBEDDING = "transformer.wte.weight"
FINAL_BIAS = "transformer.ln_f.bias"
MASK = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")

OUTSIDE = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "embedding.position_embeddings.weight": "transformer.wpe.weight",
    "decoder.final_layernorm.weight": "transformer.ln_f.weight",
    "decoder.final_layernorm.bias": FINAL_BIAS,
    "output_layer.weight": HEAD,
}
# Within one layer: `decoder.layers.N.` and `transformer.h.N.` are left out.
IN_LAYER = {
    "input_layernorm": "ln_1",
    "self_attention.linear_qkv": "attn.c_attn",
    "self_attention.linear_proj": "attn.c_proj",
    "pre_mlp_layernorm": "ln_2",
    "mlp.linear_fc1": "mlp.c_fc",
    "mlp.linear_fc2": "mlp.c_proj",
}
# GPT-2's activation -> ours; the first two are one function.
ACTIVATIONS = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu": "gelu"}
# What our model does not have, with the only value that can be imported.
UNSUPPORTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def config_of(values: Mapping[str, Any], folder: Path, *, divisible_by: int = 1) -> SMLPConfig:
    """The contents of GPT-2's `config.json`, in the words of our model.

    Args:
        divisible_by: the vocabulary is padded to a multiple of this.

    Raises:
        UsageError: another model, or one that computes what ours cannot.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import GPT2Config

    if values.get("model_type") != MODEL_TYPE:
        raise UsageError(
            f"{folder}/config.json is of a model of type {values.get('model_type')!r}, not "
            f"{MODEL_TYPE!r}."
        )
    try:
        theirs = GPT2Config(**{name: v for name, v in values.items() if name != "model_type"})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UsageError(f"{folder}/config.json: {' '.join(str(error).split())}") from error
    for name, only in UNSUPPORTED.items():
        if getattr(theirs, name) != only:
            raise UsageError(
                f"{folder}/config.json: {name}={getattr(theirs, name)} has no equal in Megatron's "
                f"attention; a model with {only} can be imported."
            )
    if theirs.activation_function not in ACTIVATIONS:
        raise UsageError(
            f"{folder}/config.json: activation_function={theirs.activation_function!r} cannot be "
            f"imported; what can are {', '.join(ACTIVATIONS)}."
        )
    try:
        return SMLPConfig(
            architecture="transformer",
            vocab_size=-(-theirs.vocab_size // divisible_by) * divisible_by,
            unpadded_vocab_size=theirs.vocab_size,
            hidden_size=theirs.n_embd,
            ffn_hidden_size=theirs.n_inner or 4 * theirs.n_embd,
            num_layers=theirs.n_layer,
            num_attention_heads=theirs.n_head,
            max_position_embeddings=theirs.n_positions,
            layer_norm_epsilon=theirs.layer_norm_epsilon,
            hidden_act=ACTIVATIONS[theirs.activation_function],
            tie_word_embeddings=theirs.tie_word_embeddings,
        )
    except ValueError as error:
        raise UsageError(f"{folder}/config.json: {error}") from error


class GPT2Folder:
    """The tensors that count of a GPT-2 folder, all under names with the prefix.

    Raises:
        UsageError: a name twice, or a tied output layer that is not the embedding.
    """

    def __init__(self, folder: Path, config: SMLPConfig) -> None:
        self.files = SafetensorsFolder(folder)
        self.names: dict[str, str] = {}
        for name in self.files.specs:
            whole = name if name == HEAD or name.startswith(PREFIX) else PREFIX + name
            if whole in self.names:
                raise UsageError(f"{folder} holds both {name} and {self.names[whole]}.")
            if not MASK.fullmatch(whole):
                self.names[whole] = name
        if config.tie_word_embeddings and HEAD in self.names:
            self._leave_out_tied()

    def _leave_out_tied(self) -> None:
        embedding = self.names.get(EMBEDDING)
        if embedding is not None and not self.files.are_same(embedding, HEAD):
            raise UsageError(
                f"{self.files.folder} holds {HEAD}, which is not {embedding} although "
                'config.json ties them: say "tie_word_embeddings": false there to keep both.'
            )
        del self.names[HEAD]

    @property
    def specs(self) -> dict[str, Spec]:
        return {whole: self.files.specs[name] for whole, name in self.names.items()}

    def read(self, name: str) -> Tensor:
        return self.files.read(self.names[name])


def import_plan(names: Iterable[str], flags: Mapping[str, Any]) -> dict[str, Recipe]:
    """How a Megatron checkpoint's `names` are made of GPT-2's tensors."""
    heads = HeadShape.of(flags)
    plan = {name: _recipe(name, heads) for name in names}
    vocabulary = {"rows": flags["padded_vocab_size"]}
    embedding, output = (name for name, source in OUTSIDE.items() if source in (EMBEDDING, HEAD))
    last = output if output in plan else embedding
    if last != embedding:
        plan[embedding] = Recipe((EMBEDDING,), partial(_with_zeros, **vocabulary))
    plan[last] = Recipe((OUTSIDE[last], FINAL_BIAS), partial(padded, **vocabulary))
    return plan


def _with_zeros(embedding: Tensor, *, rows: int) -> Tensor:
    """Rows that no token has, and that no softmax counts."""
    return functional.pad(embedding, (0, 0, 0, max(0, rows - len(embedding))))


def padded(output: Tensor, bias: Tensor, *, rows: int) -> Tensor:
    """Pad the output layer with copies of the row that is least likely in the mean.

    Softmax counts padding, and logits of zero would be far above those of most tokens.

    output: <float>[V, D]; bias: <float>[D] of the final norm. Returns <float>[rows, D].
    """
    missing = rows - len(output)
    if missing <= 0:
        return output
    if output.is_meta or output.shape[1:] != bias.shape:
        return _with_zeros(output, rows=rows)
    least = int((output.float() @ bias.float()).argmin())
    return torch.cat([output, output[least].expand(missing, -1)])


def _recipe(name: str, heads: HeadShape) -> Recipe:
    if name in OUTSIDE:
        return Recipe((OUTSIDE[name],), same)
    number, _, rest = name.removeprefix("decoder.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    source = f"{PREFIX}h.{number}.{IN_LAYER[module]}.{kind}"
    if module == "self_attention.linear_qkv":
        return Recipe((source,), partial(_head_by_head, heads=heads))
    is_matrix = kind == "weight" and not module.endswith("layernorm")
    return Recipe((source,), _transposed if is_matrix else same)


def _transposed(weight: Tensor) -> Tensor:
    return weight.T.contiguous()


def _head_by_head(fused: Tensor, *, heads: HeadShape) -> Tensor:
    """[D, 3 D] or [3 D], queries, keys, values -> [3 D, D] or [3 D] in Megatron's order."""
    queries, keys, values = (fused.T if fused.dim() == 2 else fused).chunk(3)
    return join_qkv(queries, keys, values, heads)


@torch.no_grad()
def logits(values: Mapping[str, Any], source: GPT2Folder, tokens: Tensor) -> Tensor:
    """What transformers' own GPT-2 computes of a folder's weights, a layer in memory at a time.

    values: of `config.json`; tokens: <int64>[B, T]. Returns <fp32>[B, T, V].
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**{name: v for name, v in values.items() if name != "model_type"})
    with torch.device("meta"):
        model = GPT2LMHeadModel(config).float().eval()
    layers = model.transformer.h
    with weights_from(source, model, layers, prefix="transformer.h"):
        output: Tensor = model(tokens, use_cache=False).logits
    return output
