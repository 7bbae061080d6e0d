"""Our flags, one field each: its type, its default, a docstring with the unit, and in its metadata
what the rest of the program needs to know. Every other list of flags is derived from these.

`Facts` (flag_facts.py) defines the metadata. Nothing heavy is imported: the accounting and the
tools read these fields without torch or Megatron. Annotations stay real types (no `from __future__
import annotations`), because flags/our_flags.py builds the parser from them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from megatron_smlp.flag_facts import MEGATRON_FLAGS, SAME, Facts, named, option
from megatron_smlp.partial_prediction import prefix_length
from megatron_smlp.systems import (
    ARCHITECTURES,
    BY_PREFIX,
    FEATURE_ROUTERS,
    LIMITED,
    SPATIAL,
    TOKEN_ROUTERS,
)


@dataclass
class ModelOptions:
    """Flags of the model, beyond Megatron's own."""

    architecture: str = option("transformer", choices=ARCHITECTURES, hf=SAME, upcycling=True)
    """The pair of mixers of each layer, from the table in megatron_smlp/systems.py."""

    spatial_heads: int = option(1, architectures=SPATIAL, hf=SAME)
    """Heads of a dense layer, each with a T x T matrix and bias. Must divide ffn_hidden_size / 2
    (for architecture mixer: hidden_size)."""

    toeplitz: bool = option(False, architectures=SPATIAL, hf=SAME)
    """One weight per distance, M[t, s] = m[t - s], and one bias per head or spatial expert, instead
    of a T x T matrix and T biases. Evaluation may then exceed --seq-length: each token reads the
    last T. Not in the paper."""

    mixer_expansion: bool = option(False, architectures=("mixer",), hf=SAME)
    """mixer: two T x T matrices per head with a GELU between them, as in MLP-Mixer's token MLP,
    instead of one."""

    tiny_attention_width: int = option(64, architectures=("amlp",), least=1, hf=SAME)
    """amlp: width, in features, of the single attention head next to the gate."""

    input_projection: Literal["embedding", "minhash"] = option("embedding", hf=SAME)
    """What maps input tokens to vectors. embedding: a table. minhash: pNLP-Mixer's projection of
    counted hashes of a token's characters, which needs the tokenizer's strings; the output layer
    then has a table of its own."""

    hash_count: int = option(64, input_projections=("minhash",), least=1, hf=SAME)
    """minhash: number of hash functions, i.e. of values in a token's fingerprint."""

    filter_size: int = option(1024, input_projections=("minhash",), least=1, hf=SAME)
    """minhash: number of counters over which a token's fingerprint values are counted."""

    window: int = option(1, input_projections=("minhash",), least=0, hf=SAME)
    """minhash: number of preceding tokens whose counters are read along with a token's own."""

    feature_router: str = option(
        "none", choices=FEATURE_ROUTERS, architectures=("smlp",), hf=SAME, upcycling=True
    )
    """smlp: how chunks of the hidden dimension choose their spatial expert in a sparse layer.
    deterministic: chunk i goes to expert i. partial: the sample's prefix decides (see
    --prefix-fraction)."""

    num_feature_experts: int = option(1, architectures=("smlp",), hf=SAME, upcycling=True)
    """smlp: number of spatial experts in a sparse layer. Must divide ffn_hidden_size / 2, unless
    --num-feature-chunks is given."""

    num_feature_chunks: int | None = option(
        None, architectures=("smlp",), least=1, hf=SAME, upcycling=True
    )
    """smlp: number of chunks into which a sparse layer splits its gate features; must divide
    ffn_hidden_size / 2. If omitted: one per spatial expert, as deterministic routing requires."""

    prefix_fraction: float = option(
        0.2, architectures=("smlp",), feature_routers=BY_PREFIX, hf=SAME, upcycling=True
    )
    """partial: the prefix that routes a sample's chunks, as a fraction of --seq-length."""

    partial_loss: Literal["suffix", "all"] = option(
        "suffix", architectures=("smlp",), feature_routers=BY_PREFIX, may_change=True, hf=SAME
    )
    """partial: train only on targets after the prefix, as the paper does, or on all of them."""

    feature_aux_loss_coeff: float = option(
        0.01,
        architectures=("smlp",),
        feature_routers=BY_PREFIX,
        least=0,
        may_change=True,
        hf=SAME,
    )
    """partial: weight of the balance loss over the spatial experts."""

    num_dense_layers: int = option(0, architectures=("smlp",), hf=SAME, upcycling=True)
    """smlp: number of dense spatial gating layers before the sparse ones (the paper's N1); the
    remaining layers are sparse (N2)."""

    token_router: str = option("none", choices=TOKEN_ROUTERS, hf=SAME, upcycling=True)
    """The rule by which tokens choose among the --num-experts FFN experts; megatron_smlp/routers/
    has one file per rule. none: there are no token experts."""

    moe_train_capacity_factor: float | None = option(
        None, token_routers=LIMITED, may_change=True, hf=SAME
    )
    """switch, gshard: choices that an expert serves in training, as a multiple of an even share of
    the micro-batch; the rest are dropped (--moe-token-drop-policy). If omitted, none are."""

    moe_eval_capacity_factor: float | None = option(None, token_routers=LIMITED, may_change=True)
    """switch, gshard: the same for evaluation, where it is often larger or omitted."""

    base_routing_input: Literal["residual", "norm"] = option(
        "residual", token_routers=("base",), hf=SAME
    )
    """base: the input by which tokens are scored and weighted. residual: the residual stream as it
    is, as in BASE's source; norm: its LayerNorm, which the experts read either way."""

    base_gate: Literal["score", "price"] = option("score", token_routers=("base",), hf=SAME)
    """base: an expert's weight. score: the sigmoid of its score, as in BASE's source, which in sMLP
    closes most gates. price: the sigmoid of its score minus its price, less the mean of this
    difference over the experts (not in the paper); evaluation then uses prices."""

    base_eval: Literal["greedy", "prices"] = option(
        "greedy", token_routers=("base",), may_change=True, evaluates=True, hf=SAME
    )
    """base: the expert that a token chooses in evaluation. greedy: the one with the highest score,
    as in BASE's source; prices: the one with the highest score minus mean price, which evens out
    the load (not in the paper)."""

    gshard_second_expert: Literal["paper", "all", "raw"] = option(
        "paper", token_routers=("gshard",), may_change=True, hf=SAME
    )
    """gshard: when training uses the second expert. paper: with probability 2 g2 / (g1 + g2), at
    most 1, as in GShard's algorithm 1; all: always, as in fairseq's recipes; raw: with 2 g2."""

    hash_seed: int = option(0, token_routers=("hash",), may_change=True, hf=SAME)
    """hash: seed of a new model's random table of token ids."""

    hash_table: Literal["balanced"] | None = option(None, token_routers=("hash",), may_change=True)
    """hash: the table of a new model (default: a random one). balanced: by the token counts of the
    run's data (with --split, of the whole dataset); random if there is no data, as with
    --mock-data. A checkpoint's own table takes precedence."""

    @property
    def num_chunks(self) -> int:
        """C, the number of feature chunks in a sparse layer."""
        return self.num_feature_chunks or self.num_feature_experts

    def prefix_length(self, seq_length: int) -> int:
        """Return P, in tokens, at this sequence length; 0 without partial prediction."""
        return prefix_length(self, seq_length=seq_length)


@dataclass
class RunOptions:
    """Flags of the run: saving, resuming, reports."""

    config: str | None = option(None, of_one_start=True)
    """YAML file of flags, with hyphens or underscores; the command line overrides it. If repeated,
    later files override earlier ones; `include: FILE` or [A, B] in one adds the keys of others."""

    plugin: str | None = option(None, of_one_start=True)
    """A file of your own, or the name of an installed plugin, with mixers, routers or architectures
    (docs/own-mixer.md); may be repeated. In a --config file: a path relative to its folder."""

    allow_other_plugin: bool = option(False, of_one_start=True)
    """Resume from, or read, a checkpoint that was made with another version of a plugin's file."""

    dry_run: bool = option(False, of_one_start=True)
    """Print the resolved configuration, where each value comes from, the layer table, parameters
    and FLOPs, then exit. No data is read."""

    platform: Literal["auto", "cpu"] = option("auto", of_one_start=True)
    """auto: CUDA devices if torch finds any, else the CPU; an NVIDIA device that torch cannot use
    is an error. cpu: always the CPU."""

    no_resume: bool = option(False, of_one_start=True)
    """Start from scratch even if the --save folder holds a checkpoint. By default, --load is the
    --save folder if it holds one, so that the same command resumes after an interruption."""

    strict_load: bool = option(False, of_one_start=True)
    """Stop if the checkpoint to be loaded is damaged. By default the newest intact one in the
    folder is loaded instead, and the run says so."""

    branch_from: int | None = option(None, least=1)
    """Decay a run with --lr-decay-style constant from this iteration of --load to --min-lr over
    --lr-wsd-decay-iters (default: a quarter of the iteration), then end. Give the run's other flags
    and another --save."""

    keep_last: int | None = option(None, least=1)
    """Keep this many of the latest checkpoints in --save, deleting older ones whenever a new one is
    complete (default: keep all)."""

    keep_every: int | None = option(None, least=1)
    """With --keep-last: also keep checkpoints saved at multiples of this many iterations."""

    on_save_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be saved, as on a full disk: end the run, or continue until the next
    one. Earlier checkpoints stay intact."""

    log_dir: str | None = option(None, of_one_start=True)
    """Folder of metrics.jsonl and megatron.log (default: the --save folder)."""

    nonfinite_loss: Literal["stop", "skip"] = "stop"
    """When a loss or the gradient norm is NaN or infinite: stop the run, or skip that step's
    update."""

    optimizer_checkpoint: Literal["any_layout", "data_parallel"] = "any_layout"
    """The format of a distributed optimizer's state. any_layout: whole tensors, gathered over the
    data parallel ranks; a resume may change the layout. data_parallel: Megatron's default, written
    without communication; a resume may change only the data parallel size."""

    token_dispatch: Literal["sorted", "megatron"] = "sorted"
    """How tokens reach their experts. sorted: the same results with fewer operators, if each token
    has one expert and none is dropped; otherwise the same as megatron. megatron: Megatron's
    all-to-all dispatcher."""

    allow_untested_flag: list[str] | None = None
    """Names of Megatron flags to accept although no test here uses them (docs/flags.md lists the
    tested ones). They may do nothing, or harm: a run may fail at its first save."""

    allow_tokenizer_mismatch: bool = False
    """Train on data whose manifest names a vocabulary other than this run's tokenizer's."""

    allow_data_mismatch: bool = option(False, of_one_start=True)
    """Resume from a checkpoint even if a dataset of the same name now holds other data."""

    eval_tasks: str | None = None
    """Zero-shot tasks to score during training, as copa,piqa: accuracies go to metrics.jsonl and
    TensorBoard. Needs the extra [eval]; see docs/evaluation.md."""

    eval_tasks_interval: int | None = option(None, least=1)
    """With --eval-tasks: iterations between evaluations (default: after the last one only)."""

    eval_tasks_data_dir: str | None = None
    """With --eval-tasks: folder of the tasks' local files; if omitted, the hub is queried."""

    eval_tasks_limit: int | None = option(None, least=1)
    """With --eval-tasks: score only the first N examples of each task."""

    suffix_from: float | None = None
    """Also report the loss and perplexity of the targets predicted at this position and later ones,
    in training and validation: what partial prediction is trained on, for any system. Under 1: a
    fraction of --seq-length (default: partial prediction's prefix, else nothing is reported)."""

    strict_accounting: bool = False
    """Stop if the built model's number of parameters differs from what its description
    (accounting/costs.py) counts. By default the run warns and continues."""

    peak_tflops: float | None = None
    """Dense peak of one device in TFLOP/s, for MFU (default: that of known GPUs, else n/a)."""


def facts_of(options: type) -> dict[str, Facts]:
    """Return the facts of each field of ModelOptions or RunOptions, by field name."""
    fields = dataclasses.fields(options)
    return named({field.name: field.metadata.get("facts", Facts()) for field in fields})


OUR_FLAGS: dict[str, Facts] = {**facts_of(ModelOptions), **facts_of(RunOptions)}
DEFAULTS: dict[str, Any] = {
    field.name: field.default
    for kind in (ModelOptions, RunOptions)
    for field in dataclasses.fields(kind)
}
MODEL_FLAGS: dict[str, Facts] = {**facts_of(ModelOptions), **MEGATRON_FLAGS}
"""All flags that define the model, in the order of model.json."""
PLUGIN_OPTIONS: dict[str, Any] = {}
"""Options of this process's plugins (plugins.Option); the tables above contain them too."""


def model_defaults() -> dict[str, Any]:
    """Return the default of each of MODEL_FLAGS."""
    megatrons = {name: flag.default for name, flag in MEGATRON_FLAGS.items()}
    return {name: megatrons.get(name, DEFAULTS.get(name)) for name in MODEL_FLAGS}


def choices_of(field: dataclasses.Field[Any]) -> tuple[str, ...] | None:
    """Return a flag's allowed values, from its type or its metadata; None: any."""
    for kind in (field.type, *get_args(field.type)):
        if get_origin(kind) is Literal:
            return get_args(kind)
    choices = field.metadata.get("choices")
    return choices and tuple(dict.fromkeys((field.default, *choices)))


def argument_of(name: str) -> dict[str, Any]:
    """Return argparse keywords for a model flag, for a tool that takes it."""
    fields = {field.name: field for field in dataclasses.fields(ModelOptions)}
    if name not in fields:
        return {"type": int, "metavar": "N"}
    if choices := choices_of(fields[name]):
        return {"choices": [choice for choice in choices if choice != "none"]}
    return {"type": float if fields[name].type is float else int, "metavar": "N"}


def options_of(values: Any) -> ModelOptions:
    """Return our part of a namespace or model config; what it lacks keeps its default."""
    names = (field.name for field in dataclasses.fields(ModelOptions))
    return ModelOptions(**{name: getattr(values, name) for name in names if hasattr(values, name)})
