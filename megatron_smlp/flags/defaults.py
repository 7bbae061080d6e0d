"""Second phase: defaults that depend on other flags, on the machine or on the checkpoint.

Constant defaults are in options.py, beside their flags. A flag that was given keeps its value;
values that cannot be kept are refused in the third phase, never here. What a CPU needs is set by
platform's cpu.set_flags.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec

from megatron_smlp.checkpoints.folders import check_listing, is_same_folder, tracked_folder
from megatron_smlp.checkpoints.model_record import read_model_flags
from megatron_smlp.checkpoints.run_record import read_run_record
from megatron_smlp.data.blending import MEGATRONS_SPLIT, PER_SPLIT_FLAGS, WHOLE_FLAGS
from megatron_smlp.platform import choice, cpu
from megatron_smlp.restart_note import RESTART
from megatron_smlp.systems import ARCHITECTURES, SPECS, TOKEN_ROUTERS, weighs_all_experts

AUX_LOSS_COEFF = 0.01


def fill_in(args: argparse.Namespace) -> None:
    """Set every default that is not a constant."""
    _fill_in_layers(args)
    _fill_in_token_router(args)
    _fill_in_branch(args)
    _fill_in_schedule(args)
    _fill_in_optimizer(args)
    _fill_in_saving(args)
    _fill_in_from_checkpoint(args)
    if args.tokenizer_type is None and args.vocab_file and args.merge_file:
        args.tokenizer_type = "GPT2BPETokenizer"  # Megatron's default
    if args.data_args_path and args.split is None:
        args.split = MEGATRONS_SPLIT  # Megatron fills it in with --data-path only
    if sys.platform == "darwin":
        args.num_workers = 0  # they are spawned, and Megatron's worker function cannot be pickled
    choice.limit_connections(args.tensor_model_parallel_size, os.environ)
    cpu.set_flags(args)


def _has(module: str) -> bool:
    return find_spec(module) is not None


def _fill_in_layers(args: argparse.Namespace) -> None:
    given = args.explicit_flags
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"
    if args.spec in SPECS and "architecture" not in given:
        args.architecture = args.spec[1]
    # Samples carry no mask, and a step of --iterations-to-skip would wait for one.
    args.create_attention_mask_in_dataloader = False
    if "transformer_impl" not in given and not _has("transformer_engine"):
        args.transformer_impl = "local"
    # Without Apex's extension Megatron's output layer fails, whatever implements the layers.
    args.gradient_accumulation_fusion &= _has("fused_weight_gradient_mlp_cuda")
    if args.transformer_impl == "local":
        # These need Apex or Transformer Engine, which the local implementation does without.
        args.no_persist_layer_norm = args.no_persist_layer_norm or not _has("apex")
        args.masked_softmax_fusion = False
        args.apply_rope_fusion &= _has("transformer_engine")
    if not ARCHITECTURES[args.architecture].attends:
        if "position_embedding_type" not in given:
            args.position_embedding_type = ARCHITECTURES[args.architecture].positions
        if args.num_attention_heads is None:
            # No layer attends, but Megatron wants a number that every parallel size divides.
            args.num_attention_heads = args.hidden_size
        if args.position_embedding_type == "rope" and "kv_channels" not in given:
            args.kv_channels = args.tiny_attention_width  # of the head that Megatron's RoPE rotates
        if args.hidden_size:
            args.ffn_hidden_size = args.ffn_hidden_size or 4 * args.hidden_size
    # Without a table at the input there is nothing for the output layer to share.
    args.untie_embeddings_and_output_weights |= args.input_projection == "minhash"
    if "max_position_embeddings" not in given:
        args.max_position_embeddings = args.seq_length
    # Megatron's fused GELU is the tanh approximation; here GELU is exact on every device.
    args.bias_gelu_fusion = False
    if args.activation_func_clamp_value is not None or args.glu_linear_offset:
        args.bias_swiglu_fusion = False  # it supports neither


def _fill_in_token_router(args: argparse.Namespace) -> None:
    if args.num_experts and args.tensor_model_parallel_size > 1:
        args.sequence_parallel = True  # Megatron's MoELayer dispatches slices of the tokens
    rule = TOKEN_ROUTERS.get(args.token_router)
    if rule is None:
        return
    given = args.explicit_flags
    if not (rule.takes_topk and "moe_router_topk" in given):
        args.moe_router_topk = rule.experts_per_token
    has_loss = rule.has_balance_loss and not args.moe_router_enable_expert_bias
    if not (rule.takes_topk and "moe_router_load_balancing_type" in given):
        args.moe_router_load_balancing_type = "aux_loss" if has_loss else "none"
    if args.moe_router_load_balancing_type in (["aux_loss"], ["none"]):
        args.moe_router_load_balancing_type = args.moe_router_load_balancing_type[0]
    if args.moe_router_load_balancing_type == "none":
        args.moe_aux_loss_coeff = 0.0
    elif "moe_aux_loss_coeff" not in args.explicit_flags:
        args.moe_aux_loss_coeff = AUX_LOSS_COEFF
    elif isinstance(args.moe_aux_loss_coeff, list) and len(args.moe_aux_loss_coeff) == 1:
        # Megatron parses a list, for its several balance losses; here there is one.
        args.moe_aux_loss_coeff = float(args.moe_aux_loss_coeff[0])
    args.moe_router_pre_softmax = weighs_all_experts(args.token_router, args.moe_router_topk)
    if "moe_token_dispatcher_type" not in given:
        args.moe_token_dispatcher_type = "alltoall"  # all-gather sends every token to every rank
    if "moe_token_drop_policy" not in args.explicit_flags:
        # Dropping by probability lets later tokens push out earlier ones.
        args.moe_token_drop_policy = "position"


def _fill_in_branch(args: argparse.Namespace) -> None:
    if args.branch_from and args.train_iters:
        args.lr_decay_style = "WSD"
        args.lr_wsd_decay_iters = args.lr_wsd_decay_iters or max(1, args.branch_from // 4)
        args.train_iters = args.lr_decay_iters = args.branch_from + args.lr_wsd_decay_iters
        if "lr_wsd_decay_style" not in args.explicit_flags:
            args.lr_wsd_decay_style = "minus_sqrt"


def _fill_in_schedule(args: argparse.Namespace) -> None:
    # An upper bound on the number of steps, since each reads at least one sample.
    last_step = args.train_iters or args.train_samples
    if args.eval_iters and not args.eval_interval and "eval_iters" not in args.explicit_flags:
        args.eval_iters = 0  # Megatron's default without an interval to use it at
    if not args.eval_iters:
        args.eval_interval = args.eval_interval or last_step  # Megatron divides by it
    if args.save and not args.save_interval:
        args.save_interval = last_step  # once, at the end; Megatron insists on a number
    if not args.use_checkpoint_opt_param_scheduler:
        # Else Megatron stops with a traceback if the checkpoint has another --lr or --train-iters.
        args.override_opt_param_scheduler = True
    # --nonfinite-loss replaces it: it checks losses and the gradient norm, in lockstep over the
    # ranks, and can skip the step.
    args.check_for_nan_in_loss_and_grad = False
    # Megatron would keep the batches and RNG states of each step, and have all ranks agree that
    # no step is to be rerun.
    args.rerun_mode = "disabled"
    args.exit_signal_handler = True


def _fill_in_optimizer(args: argparse.Namespace) -> None:
    if args.optimizer == "muon" and "muon_tp_mode" not in args.explicit_flags:
        args.muon_tp_mode = "duplicated"  # with Megatron's default TP size changes the update


def _fill_in_saving(args: argparse.Namespace) -> None:
    if "ckpt_format" not in args.explicit_flags:
        args.ckpt_format = "torch_dist"
    args.dist_ckpt_optim_fully_reshardable |= args.optimizer_checkpoint == "any_layout"
    args.log_dir = args.log_dir or args.save
    # Megatron sends W&B what it sends to TensorBoard, and writes profiles next to that folder.
    needs_folder = args.wandb_project or (args.profile and args.use_pytorch_profiler)
    if needs_folder and (folder := args.log_dir or args.wandb_save_dir):
        args.tensorboard_dir = args.tensorboard_dir or f"{folder}/tensorboard"
    if args.save_retain_interval:
        # Megatron itself would delete the old checkpoint before the new one is on the disk.
        args.keep_last = args.keep_last or 1
        args.keep_every = args.keep_every or args.save_retain_interval
        args.save_retain_interval = None
    if args.async_save:
        # Without these Megatron switches --async-save off.
        args.use_persistent_ckpt_worker = True
        args.async_strategy = "mcore"


FIRST_START = {
    "finetune": False,
    "no_load_optim": None,
    "no_load_rng": None,
    "load_main_params_from_ckpt": False,
    "ckpt_step": None,
    "override_ckpt_iteration": None,
    "no_resume": False,
}
"""Flags that apply to the first start of a command, and the values that replace them once --save
has a checkpoint of its own."""


def _fill_in_from_checkpoint(args: argparse.Namespace) -> None:
    """Choose the checkpoint, and take from it what the command line leaves out."""
    _choose_checkpoint(args)
    recorded = read_model_flags(args.load, args.ckpt_step) if args.load else {}
    _keep_padding(args, recorded.get("padded_vocab_size"))
    has_data = any(getattr(args, name) for name in (*WHOLE_FLAGS, *PER_SPLIT_FLAGS))
    if args.hash_table and (args.load or not has_data):
        args.hash_table = None  # the checkpoint has one; or there is nothing to count


def _choose_checkpoint(args: argparse.Namespace) -> None:
    for folder in filter(None, (args.load, args.save)):
        check_listing(folder)
    own = tracked_folder(args.save) if args.save else None
    if args.branch_from and (args.no_resume or not own):
        args.ckpt_step = args.branch_from
    if _is_automatic_restart(args):
        vars(args).update(FIRST_START)
        args.load = args.save
    elif not is_same_folder(args.load, args.save):
        if own and not args.no_resume:
            if args.load:  # another run's, from which this one began
                vars(args).update(FIRST_START)
            args.load = args.save
    elif args.no_resume and not args.finetune:
        args.load = None
    elif not own and not args.exit_on_missing_checkpoint:
        args.load = None  # launchers give it at every start, and this is the first


def _is_automatic_restart(args: argparse.Namespace) -> bool:
    """Return whether a launcher or Slurm has restarted this command after its first save.

    By then, flags of one start (--ckpt-step 4000, --no-resume) have been obeyed; obeyed again, they
    would discard at each restart what the run has done since.
    """
    is_again = os.environ.get(RESTART) or int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    newest = tracked_folder(args.save) if args.save and is_again else None
    record = (read_run_record(newest) if newest else None) or {}
    lines = (record.get("command_line", []), args.command_line)
    # Machines may have paths of their own, and the record is of one of them.
    told, own = ([word for word in line if os.sep not in word] for line in lines)
    return bool(record) and told == own


def _keep_padding(args: argparse.Namespace, padded: int | None) -> None:
    """Keep the checkpoint's padded vocabulary size if the tensor parallel size divides it.

    Megatron pads to a multiple of --make-vocab-size-divisible-by times the tensor parallel size.
    Padding rows take part in the softmax and start at random, so a run that resumed with another
    number of them would see its loss jump. Megatron's padding applies if the tensor parallel size
    does not divide the checkpoint's, and to a --finetune run that says how it pads.
    """
    given = args.explicit_flags
    if padded is None or "padded_vocab_size" in given:
        return
    if args.finetune and "make_vocab_size_divisible_by" in given:
        return
    if padded % args.tensor_model_parallel_size == 0:
        args.padded_vocab_size = padded
