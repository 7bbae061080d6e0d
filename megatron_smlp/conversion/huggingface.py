"""Our Hugging Face model's side of a conversion: its configuration, its tensors, its folder."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_smlp import plugin_files, plugin_texts
from megatron_smlp.checkpoints.tensors import Source, Spec, main_dtype
from megatron_smlp.command_line import flag_of
from megatron_smlp.conversion import names
from megatron_smlp.conversion.safetensors_files import (
    INDEX,
    SINGLE,
    SafetensorsFolder,
    write_folder,
)
from megatron_smlp.conversion.streamed_weights import weights_from
from megatron_smlp.data.tokenizers.factory import read_tokenizer
from megatron_smlp.data.tokenizers.folder import tokenizer_in
from megatron_smlp.data.tokenizers.spec import TokenizerSpec, adds_nothing
from megatron_smlp.durable import naming_errors
from megatron_smlp.errors import DataError, UsageError
from megatron_smlp.flag_facts import MEGATRON_FLAGS
from megatron_smlp.hf import modeling_smlp
from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM
from megatron_smlp.options import DEFAULTS, MODEL_FLAGS, PLUGIN_OPTIONS, model_defaults
from megatron_smlp.systems import ARCHITECTURES, POSITIONS, TOKEN_ROUTERS, experts_of_a_token

# Megatron's flag -> the configuration's name.
NAMES = {name: facts.hf for name, facts in MODEL_FLAGS.items() if facts.hf}
# Flags that the model does not have, each with the only value that can be exported.
UNSUPPORTED = {
    name: default for name, default in model_defaults().items() if MODEL_FLAGS[name].hf_default_only
}
TENSORS = names.OURS
import_plan = TENSORS.import_plan
MODEL_TYPE = SMLPConfig.model_type
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def config_of(flags: Mapping[str, Any]) -> SMLPConfig:
    """Return the Hugging Face configuration for the model flags of a checkpoint.

    Raises:
        UsageError: a flag has no equivalent in the Hugging Face model.
    """
    architecture = ARCHITECTURES[flags["architecture"]]
    only_ones = dict(UNSUPPORTED)
    plain = flags["position_embedding_type"] in ("none", "learned_absolute")
    if architecture.attends:
        only_ones["kv_channels"] = flags["hidden_size"] // flags["num_attention_heads"]
    if architecture.layers and plain:
        pass  # a plugin's, with or without learned positions
    elif not architecture.attends:
        if not (architecture.rotates and flags["position_embedding_type"] == "rope"):
            only_ones["position_embedding_type"] = architecture.positions
    elif flags["position_embedding_type"] not in POSITIONS:
        only_ones["position_embedding_type"] = " or ".join(POSITIONS)
    for name, only in only_ones.items():
        if flags[name] != only:
            raise UsageError(
                f"{flag_of(name)} {flags[name]} is not supported by the Hugging Face "
                f"model; only {only} can be exported."
            )
    if flags["seq_length"] != flags["max_position_embeddings"]:
        raise UsageError(
            f"--max-position-embeddings {flags['max_position_embeddings']} and --seq-length "
            f"{flags['seq_length']} must be equal for export: they are one setting in the "
            "Hugging Face model."
        )
    rule = TOKEN_ROUTERS.get(flags["token_router"])
    with impossible("the model's flags"):
        return SMLPConfig(
            **{theirs: flags[ours] for ours, theirs in NAMES.items()},
            plugin=plugin_files.described(flags),
            num_query_groups=flags["num_query_groups"] if flags["group_query_attention"] else None,
            moe_router_topk=flags["moe_router_topk"] if rule and rule.takes_topk else None,
            moe_eval_capacity_factor=None,  # a score must not depend on the rest of its batch
            hidden_act="gelu_new" if flags["openai_gelu"] else "gelu",
            tie_word_embeddings=not flags["untie_embeddings_and_output_weights"],
        )


def flags_of(config: SMLPConfig) -> dict[str, Any]:
    """Return a Megatron checkpoint's model flags for the configuration of an exported folder."""
    has_experts = config.token_router != "none"
    return {
        **{name: DEFAULTS[name] for name in PLUGIN_OPTIONS},
        **UNSUPPORTED,
        **{ours: getattr(config, theirs) for ours, theirs in NAMES.items()},
        **(config.plugin or {}).get("options", {}),
        "plugins": (config.plugin or {}).get("files", {}),
        "vocab_size": config.unpadded_vocab_size or config.vocab_size,
        "hash_table": None,
        # A zero can only mean that there is no such loss.
        "moe_router_load_balancing_type": "aux_loss" if config.moe_aux_loss_coeff else "none",
        "moe_eval_capacity_factor": config.moe_eval_capacity_factor,
        "kv_channels": _head_width(config),
        "group_query_attention": config.num_query_groups is not None,
        "num_query_groups": config.num_query_groups,
        "max_position_embeddings": config.max_position_embeddings,
        "num_experts": config.num_experts if has_experts else None,
        "moe_ffn_hidden_size": config.expert_width if has_experts else None,
        # Without experts it is unused, and has Megatron's default.
        "moe_router_topk": experts_of_a_token(config.token_router, config.moe_router_topk or 1)
        if has_experts
        else MEGATRON_FLAGS["moe_router_topk"].default,
        "openai_gelu": config.hidden_act == "gelu_new",
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
    }


def _head_width(config: SMLPConfig) -> int:
    """Return --kv-channels: for aMLP with RoPE, that of its small head (flags/defaults.py)."""
    if config.architecture == "amlp" and config.turning_base:
        return int(config.tiny_attention_width)
    return int(config.hidden_size // config.num_attention_heads)


def special_ids(config: SMLPConfig) -> dict[str, Any]:
    """Return the ids of special tokens, which no flag of a run holds, as plain JSON."""
    return {name: getattr(config, name) for name in SPECIAL_IDS}


def set_special_ids(config: SMLPConfig, ids: Mapping[str, Any] | None) -> None:
    """Give a configuration the ids that `special_ids` returned for an imported model."""
    with impossible("special_token_ids of run.json"):
        for name in SPECIAL_IDS:
            setattr(config, name, (ids or {}).get(name))


def config_in(values: Mapping[str, Any], folder: Path) -> SMLPConfig:
    """Return the configuration that `config.json` of an exported folder describes, without running
    any code in the folder.

    Raises:
        UsageError: it is of another model, or of a plugin that was not given, or has an impossible
            value.
    """
    if values["model_type"] != MODEL_TYPE:
        raise UsageError(
            f"{folder}/config.json has model type {values['model_type']!r}; supported are "
            f"{MODEL_TYPE!r}, which this tool writes, 'llama' and 'gpt2'."
        )
    plugin_texts.require((values.get("plugin") or {}).get("files", {}), str(folder))
    with impossible(f"{folder}/config.json"):
        return SMLPConfig.from_dict(dict(values))


@contextlib.contextmanager
def impossible(what: str) -> Iterator[None]:
    """Turn what transformers raises for a value into a UsageError that begins with `what`."""
    try:
        yield
    except Exception as error:  # each of transformers' classes raises its own
        raise UsageError(f"{what}: {' '.join(str(error).split())[:300]}") from error


def read_config_json(folder: Path) -> dict[str, Any]:
    """Read `config.json` as it is.

    Raises:
        UsageError: it is missing, or not a JSON object that says the model's type.
    """
    path = folder / "config.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        says_type = isinstance(values["model_type"], str)
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing: give the folder of a Hugging Face model.") from error
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise UsageError(f"{path} has no valid model type ({error}).") from error
    if not says_type:
        raise UsageError(f"{path} has no valid model type: model_type is not a string.")
    return values


def check_folder(folder: Path) -> None:
    """Check a folder before transformers loads it; for a model of ours, without running its code.

    Raises:
        UsageError: the configuration is damaged, or is not that of the weights.
        DamagedCheckpointError: a weights file is missing or damaged.
    """
    values, specs = read_config_json(folder), None
    if any((folder / name).is_file() for name in (INDEX, SINGLE)):
        specs = SafetensorsFolder(folder).specs
    if values["model_type"] != MODEL_TYPE:
        return
    model = build(config_in(values, folder))
    missing = [name for name in expected_shapes(model) if specs and name not in specs]
    if missing:  # transformers would initialize them at random
        raise UsageError(
            f"{folder} has no weights for {missing[0]}, one of {len(missing)} missing tensors "
            "that config.json needs: the two do not match."
        )


def build(config: SMLPConfig) -> SMLPForCausalLM:
    """Build the model in evaluation mode, its parameters on the meta device.

    Raises:
        UsageError: its sizes are beyond what a tensor can have.
    """
    with impossible("this model cannot be built"), torch.device("meta"):
        model = model_class(config)(config).eval()
    if config.plugin is not None:
        from megatron_smlp.plugins import compute_tables

        compute_tables(model)
    return model


def theirs_of(values: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the configuration of a model that transformers implements, ignoring folder code."""
    kept = {name: value for name, value in values.items() if name != "auto_map"}
    return CONFIG_MAPPING[values["model_type"]].from_dict(kept)


def build_theirs(config: PreTrainedConfig) -> Any:
    """Build a model that transformers implements, as `build` does.

    Raises:
        UsageError: its sizes are beyond what a tensor can have.
    """
    with impossible("this model cannot be built"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).float().eval()
        if rotary := getattr(model.base_model, "rotary_emb", None):
            model.base_model.rotary_emb = type(rotary)(config)  # a table that no file holds
    return model


def model_class(config: SMLPConfig) -> type[SMLPForCausalLM]:
    """Return the class of a configuration's model, and register it with transformers."""
    kind = SMLPForCausalLM
    if config.plugin is not None:
        from megatron_smlp.hf.modeling_plugin import SMLPPluginForCausalLM

        kind = SMLPPluginForCausalLM
    AutoModelForCausalLM.register(SMLPConfig, kind, exist_ok=True)
    return kind


def expected_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in an exported folder; a tied output layer is not saved."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = model.state_dict().keys()  # without computed tables, such as rotary ones
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name in saved}


def write(
    folder: Path,
    config: PreTrainedConfig,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    shard_limit: int,
    tokenizer: str | None,
    recorded: TokenizerSpec | None = None,
) -> None:
    """Write a folder that needs only torch and transformers.

    Args:
        config: ours, whose code is written too, or that of a model that transformers implements.
        specs: of `tensors`, in their order.
        shard_limit: maximum bytes of one weights file.
        tokenizer: folder of a Hugging Face tokenizer to put beside the model.
        recorded: the tokenizer of the run that trained the model, as its flags name it.
    """
    if isinstance(config, SMLPConfig):
        _add_code(config, folder)
    else:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = main_dtype(specs)
    if tokenizer:
        _add_tokenizer(config, tokenizer, folder, recorded)
    generation_config(config).save_pretrained(folder)
    if not isinstance(config, SMLPConfig):
        config.pad_token_id = None  # else transformers' embedding never trains that row
    config.save_pretrained(folder)
    write_folder(folder, specs, tensors, limit=shard_limit)


def _add_code(config: SMLPConfig, folder: Path) -> None:
    """Add the model's code; `save_pretrained` of its configuration adds the latter's."""
    kind = model_class(config)
    config.architectures = [kind.__name__]
    config.auto_map = dict(kind.auto_map)
    shutil.copy(modeling_smlp.__file__, folder)
    if config.plugin is None:
        return
    from megatron_smlp import plugins
    from megatron_smlp.hf import modeling_plugin

    shutil.copy(plugins.__file__, folder)
    host = plugin_texts.exported(Path(modeling_plugin.__file__).read_text(encoding="utf-8"))
    for name in config.plugin["files"]:
        text = plugin_texts.LOADED[name].exported()
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        host += f"\nfrom .{name} import __name__ as _{name}  # registers what it holds"
    (folder / f"{modeling_plugin.__name__.rpartition('.')[2]}.py").write_text(
        f"{host}\n", encoding="utf-8"
    )


def _add_tokenizer(
    config: PreTrainedConfig, tokenizer: str, folder: Path, recorded: TokenizerSpec | None = None
) -> None:
    from transformers import AutoTokenizer

    try:
        # Any code in the folder is a model's, as in an exported folder, and not needed here.
        loaded = AutoTokenizer.from_pretrained(
            tokenizer, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--tokenizer-model {tokenizer} is not a Hugging Face tokenizer folder ({reason})."
        ) from error
    for name in ("local_files_only", "is_local"):  # arguments of this call, which would be saved
        loaded.init_kwargs.pop(name, None)
    if recorded is not None:
        _as_recorded(loaded, recorded)
    if loaded.eos_token is None and loaded.sep_token is not None:
        loaded.eos_token = loaded.sep_token  # which Megatron then ends documents with
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token  # as the model's configuration says
    loaded.model_max_length = config.max_position_embeddings
    with naming_errors(folder):
        loaded.save_pretrained(folder)
    ends = config.eos_token_id
    if not (isinstance(ends, list) and loaded.eos_token_id in ends):  # several, if it was imported
        config.eos_token_id = loaded.eos_token_id
    config.bos_token_id = loaded.bos_token_id
    config.pad_token_id = loaded.pad_token_id


def _as_recorded(loaded: Any, spec: TokenizerSpec) -> None:
    """Apply to a tokenizer of transformers what the run's flags changed about its files."""
    if spec.tokenizer_type not in ("HuggingFaceTokenizer", "GPT2BPETokenizer"):
        # The folder's tokenizer is of another type; the run's own says what ended documents.
        with contextlib.suppress(DataError):
            own = read_tokenizer(spec)
            if own.eod is not None and own.identity is not None:
                loaded.eos_token = loaded.convert_ids_to_tokens(own.eod)
    elif spec.tokenizer_special_tokens:
        loaded.add_special_tokens({"extra_special_tokens": list(spec.tokenizer_special_tokens)})
    if adds_nothing(spec):
        for name in ("add_bos_token", "add_eos_token"):
            setattr(loaded, name, False)
            loaded.init_kwargs[name] = False  # this is saved: some classes add them by default


def generation_config(config: PreTrainedConfig) -> Any:
    """Return a configuration that keeps `generate` from drawing padding of our model's vocabulary.

    In another model it would also suppress tokens that later take the place of padding; ours
    updates it when the vocabulary is resized.
    """
    from transformers import GenerationConfig

    padding: list[int] = []
    if isinstance(config, SMLPConfig):
        padding = padding_of(config)
    return GenerationConfig(
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        suppress_tokens=padding or None,
    )


def find_padding(config: PreTrainedConfig, folder: Path, noted: int | None = None) -> None:
    """Take the rows that the tokenizer of a model's folder has no token for as padding.

    Args:
        noted: the tokens that config.json counts. Transformers does not count those that are added
            to a Llama later, and ours does.
    """
    if spec := tokenizer_in(folder):
        with contextlib.suppress(DataError):  # without one, each row may be a token's
            tokens = max(read_tokenizer(spec).vocab_size, noted or 0)
            config.unpadded_vocab_size = min(tokens, config.vocab_size)


def padding_of(config: PreTrainedConfig) -> list[int]:
    """Return the ids that pad the vocabulary, which occur in no text."""
    first = getattr(config, "unpadded_vocab_size", None) or config.vocab_size
    return list(range(first, config.vocab_size))


@torch.no_grad()
def logits(build: Callable[[], Any], source: Source, tokens: Tensor) -> Tensor:
    """Compute logits of a transformers model, with one weight in memory at a time.

    build: builds it on the meta device; tokens: <int64>[B, T]. Returns <fp32>[B, T, V].
    """
    model = build()
    with weights_from(source.read, model):
        output: Tensor = model(tokens, use_cache=False).logits
    return output
