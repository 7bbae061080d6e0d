"""Command line and YAML -> checked arguments.

Order: the YAML file's keys become flags, the command line comes after them and so wins; then the
platform sets what the machine needs; then our checks, which name flag, value, what is allowed and
what to do; then Megatron's own validation.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_smlp.checkpoints.model_record import (
    check_against_checkpoint,
    keep_router,
    settle_load,
)
from megatron_smlp.command_line import flag_of
from megatron_smlp.data.blending import blends_from_arguments
from megatron_smlp.data.tokenizers.folder import local_gpt2_files
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.absolute_paths import with_absolute_paths
from megatron_smlp.flags.check_routers import (
    check_prices,
    settle_feature_router,
    settle_token_router,
)
from megatron_smlp.flags.check_run import (
    check_layout,
    check_machine,
    check_names,
    check_ranges,
    check_schedule,
)
from megatron_smlp.flags.config_file import read_yaml
from megatron_smlp.flags.exclusive import PER_SPLIT, replaced_by
from megatron_smlp.flags.from_checkpoint import with_checkpoint_flags
from megatron_smlp.flags.unused_flags import refuse_foreign, refuse_other_programs
from megatron_smlp.megatron_patches import (
    async_saving,
    compiled_helpers,
    gradient_scale,
    optimizer_state,
    safe_loading,
    tensorboard,
    torch_adam,
)
from megatron_smlp.options import ModelOptions, RunOptions
from megatron_smlp.platform import choice, cpu, cross_entropy
from megatron_smlp.training.vocabulary import keep_padding


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The whole way from a command line to arguments that Megatron has validated.

    Returns:
        Megatron's namespace with our flags in it.

    Raises:
        UsageError: with the flag, its value, what is allowed, and what to do.
    """
    cpu.apply()
    compiled_helpers.apply()
    torch_adam.apply()
    gradient_scale.apply()
    cross_entropy.apply()
    safe_loading.apply()
    optimizer_state.apply()
    parser = build_parser()
    argv = with_checkpoint_flags(parser, expand_config(parser, argv))
    argv = with_absolute_paths(_options(parser), argv)
    _refuse_unknown(parser, argv)
    args = _parse_like_megatron(argv)
    args.explicit_flags = {name: getattr(args, name) for name in given_flags(parser, argv)}
    args.command_line = argv
    _limit_cuda_connections(args)
    args.data_contents = {}  # by prefix; training/data.py looks
    refuse_other_programs(parser, args)
    check_ranges(args)
    _settle_defaults(args)
    check_model(args)
    check_schedule(args)
    check_layout(args)
    check_names(args)
    check_machine(args, is_cpu=cpu.needed())
    with local_gpt2_files(args):
        _validate(args)
    _check_hash_table(args)
    check_against_checkpoint(args)
    return args


def _limit_cuda_connections(args: argparse.Namespace) -> None:
    """Megatron insists on one connection under tensor and context parallelism, FSDP refuses it.

    CUDA reads it when it starts, which importing Megatron may do: the launchers export it.
    """
    parallel = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
    sharded = args.use_torch_fsdp2 or args.use_megatron_fsdp
    if parallel and not sharded:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def build_parser() -> argparse.ArgumentParser:
    """Megatron's parser with our two groups of flags."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(
        prog="pretrain_smlp.py",
        usage="%(prog)s --config FILE.yaml [--flag value ...]",
        description="Pretrain sparse all-MLP language models and their baselines.",
        allow_abbrev=False,
    )
    return _with_readable_help(_add_options(add_megatron_arguments(parser)))


def _with_readable_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron 0.19 has a bare percent sign in a flag's help, at which argparse stops."""
    for action in parser._actions:
        try:
            (action.help or "") % vars(action)
        except ValueError:
            action.help = (action.help or "").replace("%", "%%")
    return parser


def _add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    from megatron.training.argument_utils import ArgumentGroupFactory

    ArgumentGroupFactory(ModelOptions).build_group(parser, "sparse all-MLP model")
    ArgumentGroupFactory(RunOptions).build_group(parser, "run")
    parser.error = _raise_usage  # type: ignore[method-assign]
    return parser


def _raise_usage(message: str) -> NoReturn:
    """argparse would print some hundred lines of usage before the one that matters."""
    raise UsageError(message)


def _parse_like_megatron(argv: Sequence[str]) -> argparse.Namespace:
    from megatron.training.arguments import parse_args

    before = sys.argv
    sys.argv = [before[0], *argv]  # Megatron reads sys.argv itself, and rank and world size
    try:
        return parse_args(extra_args_provider=_add_options)
    finally:
        sys.argv = before


def expand_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Put the flags of `--config FILE.yaml` before those of the command line.

    A key of the file is left out where `--no-KEY` is on the command line, and where a flag is that
    stands in for it; of the file's own keys, paths for each split stand in for `split`.

    Raises:
        UsageError: the file is missing or is not a mapping, or a key is unknown.
    """
    path = _config_path(argv)
    if path is None:
        return list(argv)
    rest = list(argv)
    flags: list[str] = []
    keys = {key: (_action_of(parser, key, path), v) for key, v in read_yaml(path).items()}
    replaced = replaced_by(given_flags(parser, argv))
    if PER_SPLIT & {action.dest for action, _ in keys.values()}:
        replaced.add("split")
    for key, (action, value) in keys.items():
        negation = f"--no-{key.replace('_', '-')}"
        if negation in rest and negation not in _options(parser):
            rest.remove(negation)
        elif action.dest not in replaced:
            flags += _as_flags(action, key, value, path)
    return flags + rest


def _config_path(argv: Sequence[str]) -> Path | None:
    paths = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    paths += [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    if len(paths) > 1:
        raise UsageError(
            f"--config {' and --config '.join(sorted(paths))}: give one; a line `include: FILE` in "
            "it takes the keys of another."
        )
    return Path(paths[0]) if paths else None


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return parser._option_string_actions


def _action_of(parser: argparse.ArgumentParser, key: str, path: Path) -> argparse.Action:
    action = _options(parser).get(flag_of(key))
    if action is None:
        raise UsageError(f"--config {path}: unknown key '{key}'. {nearest(parser, key)}")
    return action


def nearest(parser: argparse.ArgumentParser, name: str) -> str:
    """`Did you mean ...?` for a flag or key that does not exist."""
    known = [option.removeprefix("--") for option in _options(parser)]
    close = difflib.get_close_matches(name.lstrip("-").replace("_", "-"), known, n=3, cutoff=0.5)
    if not close:
        return "`pretrain_smlp.py --help` lists every flag."
    return f"Did you mean {' or '.join(repr(option) for option in close)}?"


def _as_flags(action: argparse.Action, key: str, value: Any, path: Path) -> list[str]:
    flag = flag_of(key)
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"--config {path}: '{key}' is a switch: true or false, not {value!r}.")
        if isinstance(action, argparse.BooleanOptionalAction):
            return [flag if value else flag.replace("--", "--no-", 1)]
        return [flag] if value else []
    if value is None:
        return []
    values = value if isinstance(value, list) and action.nargs else [value]
    words = [str(item).replace(", ", ",") for item in values]  # [0,1]: Megatron takes no blanks
    return [f"{flag}={words[0]}"] if len(words) == 1 else [flag, *words]


def _refuse_unknown(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    known, unknown = parser.parse_known_args(list(argv))
    if known.yaml_cfg:
        raise UsageError(
            f"--yaml-cfg {known.yaml_cfg} is Megatron's file of another form: give --config."
        )
    for word in unknown:
        if word.startswith("-"):
            flag = word.split("=")[0]
            raise UsageError(f"{flag} is not a flag. {nearest(parser, flag)}")
    if unknown:
        raise UsageError(f"'{unknown[0]}' belongs to no flag.")


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> frozenset[str]:
    """Destinations of the flags that the command line or the YAML file names."""
    options = _options(parser)
    words = (word.split("=")[0] for word in argv)
    return frozenset(options[word].dest for word in words if word in options)


def _settle_defaults(args: argparse.Namespace) -> None:
    """Defaults that depend on other flags or on the machine; an explicit flag is kept."""
    given = args.explicit_flags
    if "transformer_impl" not in given and not _has("transformer_engine"):
        args.transformer_impl = "local"
    # Apex's extension; without it Megatron's output layer stops, whatever the layers are made of.
    args.gradient_accumulation_fusion &= _has("fused_weight_gradient_mlp_cuda")
    if args.transformer_impl == "local":
        # These need Apex or Transformer Engine, which the local implementation does without.
        args.no_persist_layer_norm = args.no_persist_layer_norm or not _has("apex")
        args.masked_softmax_fusion = False
        args.apply_rope_fusion &= _has("transformer_engine")
    if "position_embedding_type" not in given and args.architecture != "transformer":
        args.position_embedding_type = "none"  # rows of the spatial matrix are positions
    if "max_position_embeddings" not in given:
        args.max_position_embeddings = args.seq_length
    if args.num_experts and args.tensor_model_parallel_size > 1:
        args.sequence_parallel = True  # Megatron's MoELayer dispatches slices of the tokens
    settle_token_router(args)
    if "bias_gelu_fusion" not in given:
        # Megatron's fused GELU is the tanh approximation; here GELU is exact on every device.
        args.bias_gelu_fusion = False
    if "ckpt_format" not in given:
        args.ckpt_format = "torch_dist"
    args.dist_ckpt_optim_fully_reshardable |= args.optimizer_checkpoint == "any_layout"
    # Ours does the same in lockstep over the ranks, and can skip the step: --nonfinite-loss.
    args.check_for_nan_in_loss_and_grad = False
    args.exit_signal_handler = True
    args.log_dir = args.log_dir or args.save
    _settle_saving(args)
    if not args.use_checkpoint_opt_param_scheduler:
        # Megatron would stop with a traceback where a checkpoint has another --lr or --train-iters.
        args.override_opt_param_scheduler = True
    _check_eval_tasks(args)
    settle_load(args)
    keep_padding(args)
    keep_router(args)
    check_prices(args)
    try:
        choice.check(args.platform)
        args.platform_changes = cpu.set_flags(args)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _settle_saving(args: argparse.Namespace) -> None:
    if args.save_retain_interval:
        # Megatron's own way deletes before the new checkpoint is on the disk.
        args.keep_last = args.keep_last or 1
        args.keep_every = args.keep_every or args.save_retain_interval
        args.save_retain_interval = None
    if args.async_save:
        async_saving.settle(args)
    for name in ("keep_last", "keep_every"):
        value, flag = getattr(args, name), flag_of(name)
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value}: give 1 or more, or leave it out to keep all.")
    if args.keep_every and not args.keep_last:
        raise UsageError(
            f"--keep-every {args.keep_every} without --keep-last deletes nothing: give both."
        )


def _check_eval_tasks(args: argparse.Namespace) -> None:
    for name in ("eval_tasks_interval", "eval_tasks_limit", "eval_tasks_data_dir"):
        value, flag = getattr(args, name), flag_of(name)
        if value is None:
            continue
        if not args.eval_tasks:
            raise UsageError(f"{flag} {value} without --eval-tasks evaluates nothing: give both.")
        if isinstance(value, int) and value < 1:
            raise UsageError(f"{flag} {value}: give 1 or more, or leave it out.")


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def check_model(args: argparse.Namespace) -> None:
    """Our own checks of shapes and layouts, each with flag, value, allowed, remedy.

    Raises:
        UsageError: see the messages.
    """
    for name in ("num_layers", "hidden_size", "seq_length", "micro_batch_size"):
        value = getattr(args, name)
        if value is None or value < 1:
            raise UsageError(
                f"{flag_of(name)} {value}: give a positive number (or a --config that has it)."
            )
    if args.tiny_attention_width < 1:
        raise UsageError(
            f"--tiny-attention-width {args.tiny_attention_width}: give a positive number of "
            "features."
        )
    if args.architecture == "transformer":
        _check_attention(args)
        if args.toeplitz:
            raise UsageError(
                "--toeplitz is for the spatial matrices of --architecture gmlp, amlp and smlp, and "
                "a transformer has none: leave it out."
            )
    else:
        _check_spatial(args)
    if args.architecture == "smlp":
        _check_sparse(args)
    refuse_foreign(args)
    _check_experts(args)


def _check_attention(args: argparse.Namespace) -> None:
    heads, tp = args.num_attention_heads, args.tensor_model_parallel_size
    if not heads or args.hidden_size % heads:
        raise UsageError(
            f"--num-attention-heads {heads} does not divide --hidden-size {args.hidden_size}: "
            "choose a divisor."
        )
    if heads % tp:
        raise UsageError(
            f"--tensor-model-parallel-size {tp} does not divide --num-attention-heads {heads}: "
            "choose a divisor."
        )


def _check_spatial(args: argparse.Namespace) -> None:
    from megatron_smlp.layers.spatial_gating import check_gate

    if args.num_attention_heads is None:
        # Megatron wants a number that every parallel size divides; nothing attends.
        args.num_attention_heads = args.hidden_size
    heads = {"--spatial-heads": args.spatial_heads}
    if args.architecture == "smlp" and args.feature_router != "none":
        flag = "--num-feature-chunks" if args.num_feature_chunks else "--num-feature-experts"
        heads[flag] = args.num_feature_chunks or args.num_feature_experts
    args.ffn_hidden_size = args.ffn_hidden_size or 4 * args.hidden_size
    for flag, count in heads.items():
        try:
            check_gate(
                flag,
                num_heads=count,
                ffn_hidden_size=args.ffn_hidden_size,
                tensor_parallel=args.tensor_model_parallel_size,
                context_parallel=args.context_parallel_size,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error


def _check_sparse(args: argparse.Namespace) -> None:
    if not 0 <= args.num_dense_layers <= args.num_layers:
        raise UsageError(
            f"--num-dense-layers {args.num_dense_layers} must lie between 0 and --num-layers "
            f"{args.num_layers}: it says how many of them are dense."
        )
    if args.feature_router != "none" and args.num_feature_experts < 2:
        raise UsageError(
            f"--num-feature-experts {args.num_feature_experts} with --feature-router "
            f"{args.feature_router} is no mixture: give 2 or more, or --feature-router none."
        )
    settle_feature_router(args)


def _check_experts(args: argparse.Namespace) -> None:
    experts, ep = args.num_experts, args.expert_model_parallel_size
    if experts is None:
        if ep > 1:
            raise UsageError(
                f"--expert-model-parallel-size {ep} without --num-experts: there is nothing to "
                "spread. Give --num-experts, or leave it out."
            )
        return
    if experts < 1 or experts % ep:
        raise UsageError(
            f"--num-experts {experts} is not a multiple of --expert-model-parallel-size {ep}: "
            "choose a multiple."
        )
    freq, layers = args.moe_layer_freq, args.num_layers
    is_number = isinstance(freq, int)
    if freq < 1 if is_number else len(freq) != layers or not set(freq) <= {0, 1}:
        raise UsageError(
            f"--moe-layer-freq {freq}: give a number of 1 or more, or a list with 0 or 1 for each "
            f"of the --num-layers {layers} layers, as [0,1]*{layers // 2 or 1}."
        )


def _validate(args: argparse.Namespace) -> None:
    """Megatron's own validation and global state.

    Raises:
        UsageError: with Megatron's reason, or with the check that failed where it gives none.
    """
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    try:
        validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
        async_saving.after_validation(args)
        set_global_variables(args)
        tensorboard.tolerate_losses(args.tensorboard_dir)
    except (AssertionError, ValueError, RuntimeError, FileNotFoundError, OSError) as error:
        raise UsageError(f"Megatron refuses these arguments: {_reason(error)}") from error


def _check_hash_table(args: argparse.Namespace) -> None:
    if args.hash_table is None:
        return
    if args.token_router != "hash":
        raise UsageError(
            f"--hash-table {args.hash_table} is for --token-router hash, not {args.token_router}: "
            "leave it out."
        )
    from megatron.training import get_tokenizer

    from megatron_smlp.routers.hash_table import BALANCED, read_table

    if args.hash_table == BALANCED:
        if args.load or not blends_from_arguments(args).prefixes:
            args.hash_table = None  # the checkpoint has one; or there is nothing to count
        return
    size = get_tokenizer().vocab_size
    try:
        read_table(args.hash_table, num_experts=args.num_experts, vocab_size=size)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _reason(error: BaseException) -> str:
    words = " ".join(str(error).split())
    if words:
        return words
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"`{frame.line}` ({Path(frame.filename).name}, line {frame.lineno})"
