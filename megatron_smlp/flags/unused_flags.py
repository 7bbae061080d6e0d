"""Flags that would change nothing here: each is refused, with what to do instead.

Megatron's parser has the flags of all its models and of all its layers. A layer here comes from
--architecture, so that a flag of another layer would be accepted and do nothing.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.check_model import slots_of
from megatron_smlp.options import DEFAULTS, OUR_FLAGS, model_defaults
from megatron_smlp.systems import ARCHITECTURES, MIXERS, POSITIONS, SPECS, mixer_of

OTHER_LAYER_FLAGS = (
    "multi_latent_attention",
    "experimental_attention_variant",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "is_hybrid_model",
)
OTHER_LAYERS = (
    *("mamba_", "dsa_", "linear_", "mtp_"),
    *("mla_", "q_lora_", "kv_lora_", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
)
"""How other flags of such layers begin."""
OTHER_PROGRAMS = ("rl", "biencoder", "vision", "Logits Distillation", "inference", "sft")
"""Groups of flags in Megatron's help that pretraining does not read."""
READ_HERE = frozenset({"cuda_graph_scope_deprecated", "cuda_graph_modules"})
"""Flags of these groups that pretraining does read."""
READ_NOWHERE = {
    "rampup_batch_size": "give --step-batch-size-schedule",
    "check_for_spiky_loss": "--nonfinite-loss looks at every loss",
    "use_flash_attn": "give --attention-backend",
    "sample_rate": "leave it out",
    "decoder_num_layers": "give --num-layers",
    "exit_signal_handler_for_dataloader": "leave it out",
    "dist_ckpt_save_pre_mcore_014": "leave it out",
    "per_dataset_sequences_path": "an index is opened in no time",
    "dataloader_fast_cache_load": "every cache is looked at before it is used",
    "dataloader_defer_npy_index_mmap": "every cache is looked at before it is used",
    "object_storage_cache_path": "data is read from files",
    "allow_ambiguous_pad_tokens": "leave it out",
    "fim_data": "leave it out",
    "mask_prob": "leave it out",
    "short_seq_prob": "leave it out",
    "vocab_extra_ids": "leave it out",
    "onnx_safe": "leave it out",
    "apply_residual_connection_post_layernorm": "leave it out",
}
"""Flags of Megatron's parser that neither Megatron's loop nor this repository reads, and what to do
instead."""
USELESS = {
    "test_mode": "compares the LayerNorms of attention over ranks in each step",
    "attention_output_gate": "adds parameters that nothing here describes (FLOPs, export)",
    "freeze_all_layers": "freezes nothing: the builder of models does not read it",
    "adlr_autoresume": "is for NVIDIA's own cluster: examples/slurm.sh queues a job again",
    "exit_signal": "would take the place of the signals that end a run (docs/checkpoints.md): "
    "SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save and end it",
    "exit_signal_handler_for_training": "would end a run without saving: SIGTERM, SIGUSR1, SIGHUP "
    "and Ctrl-C save and end it",
    "init_method_xavier_uniform": "stops Megatron 0.19, whose configuration has no such field",
    "hybrid_context_parallel": "is for samples of packed documents, and samples are read whole",
    "lazy_mpu_init": "leaves out the process groups that the model is built with",
    "tensor_parallel_num_weight_shards": "shards weights in a way that mixers here do not know",
    "fake_process_group": "lets ranks exchange nothing, and they agree on each step here",
    "log_straggler": "times parts of Megatron's own step, which this is not: each log line here "
    "looks for machines that compute or send slowly",
    "log_throughput": "counts a Transformer's FLOPs, whatever the model is: metrics.jsonl and the "
    "log lines have tflops_per_device of this one",
    "log_progress": "counts a Transformer's FLOPs, whatever the model is: metrics.jsonl has "
    "consumed_tokens and consumed_flops",
    **dict.fromkeys(
        ("error_injection_rate", "error_injection_type"),
        "tests Megatron's own rerunning of steps, which is switched off",
    ),
    **dict.fromkeys(
        (
            "use_mp_args_from_checkpoint_args",
            "create_all_gather_group",
            "disable_jit_fuser",
            "fp16_lm_cross_entropy",
            "moe_upcycling_granularity",
            "decrease_batch_size_if_needed",
        ),
        "changes nothing here",
    ),
    "use_mup": "has no rule for spatial matrices, experts and routers",
    "use_te_activation_func": "puts the tanh approximation of GELU into the experts, where every "
    "other layer has the exact one",
    "overlap_moe_expert_parallel_comm": "runs layers in parts by a plan of Megatron's own, past "
    "what hands routers their inputs",
    "delay_wgrad_compute": "is for --overlap-moe-expert-parallel-comm, which is not available",
    "use_persistent_ckpt_worker": "hands saves to a process that ends by the signal that tells a "
    "run to save: one is forked for each save",
    "fused_residual_rmsnorm": "fuses nothing: norms here give no residual back",
    "use_grouped_gemm_for_dense_mlp": "is read where Megatron builds dense FFNs, which it does not "
    "build here",
    "optimizer_cuda_graph": "would replay updates without looking whether the loss is finite",
}
"""Flags that do not work with what is here, and why: they are to be left out."""
OF_MEGATRONS_LOOP = (
    *("log_energy", "run_workload_inspector_server", "gpu_sniff_test_interval"),
    *("moe_routing_trace_path", "moe_expert_rank_capacity_factor", "qk_clip"),
    *("log_max_attention_logit", "reuse_grad_buf_for_mxfp8_param_ag", "moe_use_upcycling"),
    *("phase_transition_iterations", "override_ckpt_iteration", "auto_detect_ckpt_format"),
    *("load_main_params_from_ckpt", "exit_on_missing_checkpoint", "stream_ckpt_dequant"),
    *("pytorch_profiler_collect_chakra", "use_megatron_fsdp", "use_torch_fsdp2", "enable_msc"),
    *("save_params_interval", "save_activations_interval", "save_wgrads_interval"),
    *("save_dgrads_interval", "save_tokens_per_expert_interval", "async_ckpt_use_cpu_shm"),
    *("fault_injector_ranks", "fault_injector_num_ranks", "fine_grained_activation_offloading"),
    *("one_logger_project", "one_logger_run_name", "one_logger_async", "check_for_large_grads"),
)
"""Flags that Megatron's training loop and its saves read, and training/loop.py does not."""
REFUSED = {
    **{name: f"is not read by this program: {instead}" for name, instead in READ_NOWHERE.items()},
    **{name: f"{why}. Leave it out" for name, why in USELESS.items()},
    **dict.fromkeys(
        OF_MEGATRONS_LOOP,
        "is read by Megatron's own training loop alone, and changes nothing here: leave it out",
    ),
    **dict.fromkeys(
        ("reset_attention_mask", "reset_position_ids", "dataloader_inter_document_masking"),
        "looks at documents, and samples are read whole, as every system here is trained and "
        "compared: a spatial matrix has one row for each position of the sample, wherever its "
        "documents begin (docs/data.md). Leave it out",
    ),
    "inprocess_restart": "wraps the entry of Megatron's own programs, and would do nothing here: "
    "leave it out; examples/*.sh start a run that failed from its newest checkpoint",
    "enable_ft_package": "reads the command line once more by itself, without the keys of "
    "--config, and its monitor is ft_launcher's: leave it out; examples/*.sh start a run that "
    "failed from its newest checkpoint",
    "checkpoint_activations": "is gone from Megatron: give --recompute-granularity full "
    "--recompute-method uniform --recompute-num-layers 1",
    "pretrained_checkpoint": "is loaded without a look at what made it: give --load DIR --finetune",
    "decoder_seq_length": "is for models with an encoder: give --seq-length",
    **dict.fromkeys(
        ("ckpt_convert_format", "ckpt_convert_save", "ckpt_convert_update_legacy_dist_opt_format"),
        "is not this program's: tools/convert_checkpoint.py converts",
    ),
    **dict.fromkeys(
        (
            "non_persistent_save_interval",
            "non_persistent_ckpt_type",
            "non_persistent_global_ckpt_dir",
            "non_persistent_local_ckpt_dir",
            "non_persistent_local_ckpt_algo",
        ),
        "makes checkpoints of another kind, which no start looks for: give --save-interval, and "
        "--keep-last for how many are kept",
    ),
}
"""Flags of Megatron's that are refused whatever else is given: why, and what to do."""
VALUES_NOT_HERE: dict[tuple[str, Any], str] = {
    **{
        ("rerun_mode", value): "repeats steps, which --nonfinite-loss does without: leave it out"
        for value in ("report_stats", "validate_results")
    },
    **{
        ("ckpt_format", value): "is not saved or loaded here: leave it out, for torch_dist"
        for value in ("torch", "torch_dcp", "fsdp_dtensor", "zarr")
    },
    ("dataloader_type", "external"): "needs a data loader of another program: give single or "
    "cyclic, or leave it out",
    ("pad_vocab_size", False): "stops Megatron 0.19: give --make-vocab-size-divisible-by 1",
}
"""Values of flags that do not work, why, and what to do."""
ROTARY_FLAGS = (
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "no_rope_freq",
)
ATTENTION_FLAGS = (
    "group_query_attention",
    "num_query_groups",
    "add_qkv_bias",
    "qk_layernorm",
    "qk_l2_norm",
    "softmax_type",
    "window_size",
    "apply_query_key_layer_scaling",
    "use_rotary_position_embeddings",
    "window_attn_skip_freq",
    "attention_backend",
    "flash_attention_version",
    *ROTARY_FLAGS,
)
OTHER_POSITIONS = ("yarn_", "mscale", "relative_attention_", "rotary_scaling_factor", "mrope_")
"""How flags begin that are for other kinds of positions."""
FFN_FLAGS = ("swiglu", "quick_geglu", "glu_linear_offset", "activation_func_clamp_value")
POSITIONS_WITHOUT_ATTENTION = ("none", "learned_absolute")
TRANSFORMER_ENGINE_FLAGS = (
    "layernorm_zero_centered_gamma",
    "qk_layernorm",
    "softmax_type",
    "window_size",
    "moe_permute_fusion",
    "moe_grouped_gemm",
    "attention_backend",
    "flash_attention_version",
    "te_precision_config_file",
    "use_transformer_engine_op_fuser",
    "tp_comm_overlap",
    "cpu_offloading_num_layers",
    "fp32_residual_connection",
    "fp8",
    "fp4",
)
CORE = "core_attn"
"""What Megatron calls the part of a token mixer that recomputes, where one does."""
CUDA_GRAPH_FLAGS = (
    "cuda_graph_impl",
    "cuda_graph_modules",
    "cuda_graph_scope_deprecated",
    "enable_cuda_graph",
    "external_cuda_graph",
)
SPELLINGS = {
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "cuda_graph_scope_deprecated": "--cuda-graph-scope",
    "pad_vocab_size": "--no-pad-vocab-size",
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
}
"""Spellings of flags that set something of another name."""


def refuse_unused(args: argparse.Namespace) -> None:
    """Check what the user gave, on the command line or in a YAML file.

    Raises:
        UsageError: with the flag, whose it is, and what to do.
    """
    for name in _given(args, tuple(REFUSED)):
        raise UsageError(f"{_flag(name)} {REFUSED[name]}.")
    # A checkpoint may have recorded those that do nothing.
    others = (name for name in args.explicit_flags if name.startswith(OTHER_LAYERS))
    for name in _given(args, (*OTHER_LAYER_FLAGS, *(() if args.load else others))):
        raise UsageError(
            f"{_flag(name)} builds layers of other models than --architecture {args.architecture}: "
            "leave it out."
        )
    spec = args.explicit_flags.get("spec")
    if spec in SPECS and spec[1] != args.architecture:
        raise UsageError(
            f"--spec {' '.join(spec)} contradicts --architecture {args.architecture}: leave one of "
            "them out."
        )
    if spec and spec not in SPECS:
        raise UsageError(
            f"--spec {' '.join(spec)} builds layers that are not described here (parameters, "
            f"FLOPs, export): give {SPECS[0][0]} with {', '.join(name for _, name in SPECS)}, or "
            "--architecture."
        )
    for (name, value), why in VALUES_NOT_HERE.items():
        if args.explicit_flags.get(name) == value:
            raise UsageError(f"{_flag(name)}{f' {value}' if value else ''} {why}.")
    _refuse_recomputing(args)
    if _given(args, ("add_qkv_bias",)) and not args.add_bias_linear:
        raise UsageError(
            "--add-qkv-bias without other biases adds parameters that nothing here describes "
            "(FLOPs, export): leave it out, or --disable-bias-linear."
        )
    for name in args.explicit_flags:
        if name.startswith(OTHER_POSITIONS):
            raise UsageError(
                f"{_flag(name)} is for other positions than --position-embedding-type "
                f"{one_of(POSITIONS)}, of which a model is made here: leave it out."
            )
    if not ARCHITECTURES[args.architecture].attends:
        _refuse_attentions(args)
    elif args.position_embedding_type not in POSITIONS:
        raise UsageError(
            f"--position-embedding-type {args.position_embedding_type} is not available: give "
            f"{one_of(POSITIONS)}."
        )
    if all(slots.channel == "none" for slots in slots_of(args)):
        for name in _given(args, FFN_FLAGS):
            raise UsageError(
                f"{_flag(name)} is for FFNs, and no layer of this --architecture "
                f"{args.architecture} has one: leave it out."
            )
    if not args.load:  # a checkpoint may have recorded them
        _refuse_inert(args)
    _refuse_cuda_graphs(args)
    for name in _given(args, TRANSFORMER_ENGINE_FLAGS):
        if args.transformer_impl == "local":
            raise UsageError(
                f"{_flag(name)} needs Transformer Engine, which is not in use "
                "(--transformer-impl local): leave it out."
            )
    if _given(args, ("use_transformer_engine_op_fuser",)) and not args.moe_grouped_gemm:
        raise UsageError(
            "--use-transformer-engine-op-fuser does nothing without --moe-grouped-gemm: give both, "
            "or leave it out."
        )


def _refuse_inert(args: argparse.Namespace) -> None:
    """Refuse flags of the model that are read only beside others, or that nothing describes."""
    if args.explicit_flags.get("softmax_type") == "learnable":
        raise UsageError(
            "--softmax-type learnable adds parameters that nothing here describes (FLOPs, export): "
            "give vanilla or off-by-one, or leave it out."
        )
    rotates = args.position_embedding_type == "rope" or args.use_rotary_position_embeddings
    readers = {} if rotates else dict.fromkeys(ROTARY_FLAGS, "--position-embedding-type rope")
    if not args.use_rope_scaling:
        readers["rope_scaling_factor"] = "--use-rope-scaling"
    if not args.group_query_attention:
        readers["num_query_groups"] = "--group-query-attention"
    if "feature_router" not in args.explicit_flags:  # "none" there takes one back
        readers["num_feature_experts"] = "--feature-router"
    if not args.moe_grouped_gemm:
        readers["moe_mlp_glu_interleave_size"] = "--moe-grouped-gemm"
    defaults = model_defaults()
    for name, reader in readers.items():
        value = args.explicit_flags.get(name, defaults[name])
        if value != defaults[name]:
            said = _flag(name) if value is True else f"{_flag(name)} {value}"
            raise UsageError(f"{said} does nothing without {reader}: give both, or leave it out.")


def _refuse_recomputing(args: argparse.Namespace) -> None:
    """Refuse selective recomputation of what no layer has."""
    if args.recompute_granularity != "selective" and not _given(args, ("recompute_activations",)):
        return
    modules = args.recompute_modules or [CORE]
    slots = slots_of(args)
    channels = {each.channel for each in slots}
    is_there = {
        CORE: any(mixer_of(each).recomputes for each in slots),
        "mlp": "mlp" in channels,
        "moe": "token_moe" in channels,
        "shared_experts": bool(args.moe_shared_expert_intermediate_size),
    }
    if not any(is_there.get(module, True) for module in modules):
        default = "" if args.recompute_modules else " (the default)"
        raise UsageError(
            f"--recompute-modules {' '.join(modules)}{default}: no layer of this --architecture "
            f"{args.architecture} has that. Give --recompute-granularity full, or other modules."
        )
    attends = ARCHITECTURES[args.architecture].attends
    if "layernorm" in modules and (args.fp8 or args.fp4) and not attends:
        raise UsageError(
            "--recompute-modules layernorm with FP8 or FP4 is for attention, not for "
            f"--architecture {args.architecture}: give other modules."
        )


def _refuse_cuda_graphs(args: argparse.Namespace) -> None:
    """Refuse CUDA graphs of layers that route: a graph replays kernels, not the Python beside them.

    Layers that route are left out of it (architectures.SlottedLayer).
    """
    given = {name: args.explicit_flags[name] for name in _given(args, CUDA_GRAPH_FLAGS)}
    if not given:
        return
    from megatron_smlp.platform import cpu  # with torch, which early.py does without

    name, value = next(iter(given.items()))
    for older in ("cuda_graph_modules", "cuda_graph_scope_deprecated"):
        if "full_iteration" in given.get(older, ()):
            name, value = older, "full_iteration"
    flag = _flag(name) if value is True else f"{_flag(name)} {value}"
    if cpu.needed():
        raise UsageError(f"{flag} needs a CUDA device and none was found: leave it out.")
    if value == "full_iteration":
        raise UsageError(
            f"{flag}: a graph of whole steps runs none of the Python that counts samples, routers' "
            "loads and losses that are not finite. Give --cuda-graph-impl local, or leave it out."
        )
    if value == "transformer_engine" or name == "external_cuda_graph":
        raise UsageError(
            f"{flag}: graphs of Transformer Engine are not made here. Give --cuda-graph-impl "
            "local, or leave it out."
        )
    if all(slots.routes for slots in slots_of(args)):
        raise UsageError(
            f"{flag} cannot capture layers that route, and every layer of this model would be "
            "such: a graph runs no Python, which hands routers their inputs. Leave it out."
        )
    _refuse_evaluating_in_graphs(args, flag)
    if MIXERS[ARCHITECTURES[args.architecture].mixer].host_reads:
        raise UsageError(
            f"{flag} cannot capture the layers of --architecture {args.architecture}, of which the "
            "host reads how large some numbers are. Leave it out."
        )


def _refuse_evaluating_in_graphs(args: argparse.Namespace, flag: str) -> None:
    """Refuse what would be replayed as it was captured, in training and in training's shapes."""
    drops = MIXERS[ARCHITECTURES[args.architecture].mixer].drops_attention
    dropout = max(args.hidden_dropout, args.attention_dropout if drops else 0.0)
    if dropout and args.eval_iters:
        raise UsageError(
            f"{flag} with dropout replays it in evaluations: give --hidden-dropout 0 and "
            "--attention-dropout 0, or --eval-iters 0, or leave it out."
        )
    if args.eval_micro_batch_size not in (None, args.micro_batch_size):
        raise UsageError(
            f"{flag} captures micro-batches of --micro-batch-size {args.micro_batch_size}, and "
            f"--eval-micro-batch-size {args.eval_micro_batch_size} is another: leave one of them "
            "out."
        )
    if args.eval_tasks:
        raise UsageError(
            f"{flag} captures sequences of one length, and --eval-tasks scores others: leave one "
            "of them out; tools/evaluate.py scores checkpoints."
        )


def refuse_other_programs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check that no flag is of reinforcement learning, retrieval, vision or inference servers.

    Raises:
        UsageError: with the flag.
    """
    for group in parser._action_groups:
        names = [action.dest for action in group._group_actions if action.dest not in READ_HERE]
        for name in _given(args, tuple(names)) if group.title in OTHER_PROGRAMS else ():
            raise UsageError(
                f"{_flag(name)} is for another program of Megatron's ({group.title}), and changes "
                "nothing here: leave it out."
            )


def refuse_unless(args: argparse.Namespace, choice: str) -> None:
    """Refuse our flags that are for another `choice` than the one that was made.

    A default that is spelt out asks for nothing.

    Args:
        choice: destination of the flag that chooses; options.Facts has its plural.

    Raises:
        UsageError: with the flag, and what it is for.
    """
    chosen = getattr(args, choice)
    for name, facts in OUR_FLAGS.items():
        allowed, default = getattr(facts, f"{choice}s"), DEFAULTS[name]
        value = args.explicit_flags.get(name, default)
        if value == default or not allowed or chosen in allowed:
            continue
        said = flag_of(name) if value is True else f"{flag_of(name)} {value}"
        raise UsageError(
            f"{said} is for {flag_of(choice)} {one_of(allowed)}, not {chosen}: leave it out."
        )


def one_of(names: tuple[str, ...]) -> str:
    """Return `a`, `a or b`, `a, b or c`, for a message."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _refuse_attentions(args: argparse.Namespace) -> None:
    for name in _given(args, ATTENTION_FLAGS):
        raise UsageError(
            f"{_flag(name)} is for the attention of --architecture transformer, not for "
            f"{args.architecture}: leave it out."
        )
    if args.position_embedding_type not in POSITIONS_WITHOUT_ATTENTION:
        raise UsageError(
            f"--position-embedding-type {args.position_embedding_type} acts on the queries and "
            f"keys of attention, which --architecture {args.architecture} does not have: give "
            f"{one_of(POSITIONS_WITHOUT_ATTENTION)}, or leave it out."
        )


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """Return those of the flags that were requested; spelling out a default requests nothing."""
    off = (None, False, "vanilla", "none", "auto")
    given = {name: args.explicit_flags.get(name) for name in names}
    return [name for name, value in given.items() if getattr(value, "name", value) not in off]


def _flag(name: str) -> str:
    return SPELLINGS.get(name) or flag_of(name)
