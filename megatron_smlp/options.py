"""Our flags, as two frozen-by-use dataclasses: one field, one docstring, one unit.

Nothing heavy is imported here: the accounting and the tools read these without torch or Megatron.
Annotations stay real types (no `from __future__ import annotations`): Megatron's argument factory
builds the parser from them.
"""

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

Mixer = Literal["attention", "spatial_gating", "gating_and_attention", "feature_moe"]
Channel = Literal["mlp", "token_moe", "none"]
ArchitectureName = Literal["transformer", "gmlp", "amlp", "smlp"]
TokenRouterName = Literal["none", "switch", "gshard", "base", "hash"]
EXPERTS_PER_TOKEN = {"switch": 1, "gshard": 2, "base": 1, "hash": 1}


@dataclass
class ModelOptions:
    """What the model is, beyond Megatron's own flags."""

    architecture: ArchitectureName = "transformer"
    """Which pair of mixers each layer gets; megatron_smlp/architectures.py is the table."""

    spatial_heads: int = 1
    """Spatial gating: number of heads in a dense layer; each has its own T x T matrix, bias and
    LayerNorm over gate_width / heads features. Must divide ffn_hidden_size / 2."""

    toeplitz: bool = False
    """Spatial gating: one weight per distance, M[t, s] = m[t - s], and one bias, for each head or
    spatial expert, in place of a T x T matrix and T biases. Such a model can be evaluated on
    sequences longer than --seq-length, of which each token reads the last T. Not in the paper."""

    tiny_attention_width: int = 64
    """amlp: width of the one attention head beside the gate, in features."""

    feature_router: Literal["none", "deterministic", "partial"] = "none"
    """smlp: how chunks of the hidden dimension choose their spatial expert in a sparse layer.
    deterministic: chunk i goes to expert i. partial: a sample's prefix decides (see
    --prefix-fraction)."""

    num_feature_experts: int = 1
    """smlp: number of spatial experts in a sparse layer. Must divide ffn_hidden_size / 2."""

    num_feature_chunks: int | None = None
    """smlp: number of chunks that a sparse layer cuts its gate features into; must divide
    ffn_hidden_size / 2. Left out: one per spatial expert, as deterministic routing needs it."""

    prefix_fraction: float = 0.2
    """partial: fraction of --seq-length, the tokens from which a sample's chunks are routed."""

    partial_loss: Literal["suffix", "all"] = "suffix"
    """partial: train on targets behind the prefix only, as the paper does, or on all of them."""

    feature_aux_loss_coeff: float = 0.01
    """partial: weight of the balance loss over the spatial experts."""

    num_dense_layers: int = 0
    """smlp: how many dense spatial gating layers come before the sparse ones (N1 of the paper);
    the other --num-layers minus this many are sparse (N2)."""

    token_router: TokenRouterName = "none"
    """How tokens choose among the --num-experts FFN experts of a token MoE; one file a rule in
    megatron_smlp/routers/. none: there are no token experts."""

    moe_train_capacity_factor: float | None = None
    """switch, gshard: choices that an expert serves in training, as a multiple of an even share of
    the micro-batch; the others pass by the residual (see --moe-token-drop-policy). Left out:
    nothing is dropped."""

    moe_eval_capacity_factor: float | None = None
    """switch, gshard: the same in evaluation, where it often is larger or left out."""

    base_routing_input: Literal["residual", "norm"] = "residual"
    """base: what tokens are scored and weighted by. residual: the residual stream as it is, as in
    BASE's source; norm: its LayerNorm, which the experts read either way. A checkpoint keeps its
    own, and one that is older than this flag has norm."""

    base_prices: Literal["mean", "none"] = "mean"
    """base: mean: keep, with the model, the running mean of the prices of the experts that balance
    the micro-batches of the training, for --base-eval prices. A checkpoint keeps its own choice,
    and one that is older than this flag has none."""

    base_eval: Literal["greedy", "prices"] = "greedy"
    """base: the expert of a token in evaluation. greedy: that of its highest score, as in BASE's
    source; prices: that of its highest score minus the expert's mean price, which evens the load
    (not in the paper)."""

    gshard_second_expert: Literal["paper", "all", "raw"] = "paper"
    """gshard: which second experts training uses. paper: with probability 2 g2 / (g1 + g2), at
    most 1, as in GShard's algorithm 1; all: always, as in fairseq's recipes; raw: 2 g2. A
    checkpoint keeps its own, and one that is older than this flag has raw."""

    hash_seed: int = 0
    """hash: seed of the random table of token ids with which a new model starts."""

    hash_table: str | None = None
    """hash: with which table a new model starts instead: balanced, by the counts of the run's own
    training data, or a file that tools/build_hash_table.py made from those of a corpus. A
    checkpoint's own table wins over both."""

    @property
    def num_chunks(self) -> int:
        """C, chunks of features in a sparse layer."""
        return self.num_feature_chunks or self.num_feature_experts


@dataclass
class RunOptions:
    """What our command line adds around Megatron's training loop."""

    config: str | None = None
    """YAML file of flags, with hyphens or underscores; flags on the command line win over it."""

    dry_run: bool = False
    """Print the resolved configuration, the layer table, parameters and FLOPs, then exit."""

    platform: Literal["auto", "cpu"] = "auto"
    """auto: CUDA devices where torch finds them, else the CPU, unless the machine has an NVIDIA
    device that torch cannot use. cpu: the CPU in any case (on the command line, not in a file)."""

    no_resume: bool = False
    """Start from scratch although the --save folder holds a checkpoint. By default --load is the
    --save folder where it holds one, so that the same command goes on after an interruption."""

    strict_load: bool = False
    """Stop where the checkpoint to be loaded is damaged. By default the newest good one in the
    folder is loaded instead, and the run says so."""

    keep_last: int | None = None
    """Keep this many of the last checkpoints in --save and delete older ones, each time that a new
    one is there (default: keep all)."""

    keep_every: int | None = None
    """With --keep-last: keep also what was saved at a multiple of this many iterations."""

    on_save_failure: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be saved does, as on a full disk: end the run, or let it go on
    to the next one. What was saved before stays intact."""

    log_dir: str | None = None
    """Folder of metrics.jsonl and of the start-up record (default: the --save folder)."""

    nonfinite_loss: Literal["stop", "skip"] = "stop"
    """What a loss that is NaN or infinite does: stop the run, or skip that step's update."""

    optimizer_checkpoint: Literal["any_layout", "data_parallel"] = "any_layout"
    """How a distributed optimizer saves its state. any_layout: whole tensors, gathered over the
    data parallel ranks, for a resume under any layout. data_parallel: Megatron's own default,
    written without communication, for a resume with another data parallel size only."""

    allow_tokenizer_mismatch: bool = False
    """Train on data whose manifest names another vocabulary than this run's tokenizer has."""

    allow_data_mismatch: bool = False
    """Go on from a checkpoint on other data than it was trained on, under the same name."""

    eval_tasks: str | None = None
    """Zero-shot tasks to score during training, as copa,piqa: accuracies go to metrics.jsonl and
    TensorBoard. Needs the extra [eval]; docs/evaluation.md."""

    eval_tasks_interval: int | None = None
    """With --eval-tasks: iterations between evaluations (default: after the last one only)."""

    eval_tasks_data_dir: str | None = None
    """With --eval-tasks: folder of the tasks' local files; left out, the hub is asked."""

    eval_tasks_limit: int | None = None
    """With --eval-tasks: only the first so many examples of each task."""

    base_eval_both: bool = False
    """base: validate and test a second time, the other way of --base-eval, and report those losses
    and loads beside the others."""

    suffix_from: float | None = None
    """Report loss and perplexity of the targets that this position and later ones predict, beside
    those of all, in training and validation: what partial prediction is trained on, for any system.
    A number under 1 is a fraction of --seq-length (default: partial prediction's prefix, else
    nothing)."""

    peak_tflops: float | None = None
    """Dense peak of one device for the MFU figure, in TFLOP/s (default: known GPUs, else n/a)."""


@dataclass(frozen=True)
class LayerSlots:
    """What fills the two slots of one layer."""

    mixer: Mixer
    channel: Channel
    heads: int
    """Attention heads, spatial heads or spatial experts, whichever the mixer has."""


def prefix_length(options: Any, *, seq_length: int) -> int:
    """P = floor(fraction x T), the tokens from which partial prediction routes; 0 without it.

    The fraction is the decimal number that was written: in binary, 0.29 of 100 would be 28.

    Args:
        options: ModelOptions, or a namespace with its names.
    """
    is_partial = options.feature_router == "partial"
    return int(Fraction(str(options.prefix_fraction)) * seq_length) if is_partial else 0


def suffix_start(options: Any, *, seq_length: int) -> int:
    """P of --suffix-from, or partial prediction's; 0 where no suffix is reported.

    Args:
        options: a namespace with the names of ModelOptions and RunOptions.

    Raises:
        ValueError: it is no position of a sample that has something on both sides.
    """
    given = options.suffix_from
    if given is None:
        return prefix_length(options, seq_length=seq_length)
    inside = 0 < given < seq_length
    position = Fraction(str(given)) * (seq_length if given < 1 else 1) if inside else Fraction(0)
    if position < 1 or (given >= 1 and position.denominator != 1):
        raise ValueError(
            f"--suffix-from {given:g}: give a whole position over 0 and under --seq-length "
            f"{seq_length}, or a fraction of it that is one, as 0.2; or leave it out."
        )
    return int(position)


def is_moe_layer(index: int, moe_layer_freq: int | list[int]) -> bool:
    """Megatron's rule: every freq-th layer from the first, or a pattern of zeros and ones."""
    if isinstance(moe_layer_freq, list):
        return bool(moe_layer_freq[index])
    return index % moe_layer_freq == 0


def layer_slots(
    options: ModelOptions,
    *,
    num_layers: int,
    num_experts: int | None,
    moe_layer_freq: int | list[int],
    num_attention_heads: int,
) -> list[LayerSlots]:
    """The table of architectures: the slots of every layer, first to last.

    | architecture | mixer | channel |
    |---|---|---|
    | transformer | attention | mlp; token MoE in MoE layers |
    | gmlp | spatial gating | none (it is inside the block); token MoE in MoE layers |
    | amlp | spatial gating and a small attention head | the same |
    | smlp, first N1 | spatial gating | none |
    | smlp, then N2 | feature MoE | token MoE if --num-experts is given |
    """
    slots = []
    for index in range(num_layers):
        routed = num_experts is not None and is_moe_layer(index, moe_layer_freq)
        if options.architecture == "transformer":
            channel: Channel = "token_moe" if routed else "mlp"
            slots.append(LayerSlots("attention", channel, num_attention_heads))
        elif options.architecture in ("gmlp", "amlp"):
            is_amlp = options.architecture == "amlp"
            mixer: Mixer = "gating_and_attention" if is_amlp else "spatial_gating"
            channel = "token_moe" if routed else "none"
            slots.append(LayerSlots(mixer, channel, options.spatial_heads))
        elif index < options.num_dense_layers:
            slots.append(LayerSlots("spatial_gating", "none", options.spatial_heads))
        else:
            channel = "none" if num_experts is None else "token_moe"
            if options.feature_router == "none":
                slots.append(LayerSlots("spatial_gating", channel, options.spatial_heads))
            else:
                slots.append(LayerSlots("feature_moe", channel, options.num_feature_experts))
    return slots


def model_option_names() -> list[str]:
    return [field.name for field in dataclasses.fields(ModelOptions)]
