"""Megatron's flags that are read here and tested; all others are refused.

Megatron's parser has 806 flags, for all its models, programs and loops. One that nothing here reads
would be accepted and do nothing, and one that nobody has tried could silently do harm. A flag that
a new Megatron adds is refused until a test uses it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from megatron_smlp.command_line import flag_of
from megatron_smlp.errors import UsageError
from megatron_smlp.options import OUR_FLAGS

TESTED: dict[str, str] = {
    "Layers": """
        num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels
        group-query-attention num-query-groups add-qkv-bias qk-layernorm qk-l2-norm softmax-type
        window-size attention-backend attention-softmax-in-fp32 no-masked-softmax-fusion
        disable-bias-linear normalization norm-epsilon apply-layernorm-1p no-persist-layer-norm
        swiglu quick-geglu squared-relu openai-gelu glu-linear-offset activation-func-clamp-value
        no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion
        hidden-dropout attention-dropout init-method-std embedding-init-method-std
        untie-embeddings-and-output-weights use-cpu-initialization transformer-impl spec
        use-mcore-models""",
    "Width": "use-mup mup-base-hidden-size mup-base-head-dim",
    "Positions": """
        max-position-embeddings position-embedding-type no-position-embedding rotary-base
        rotary-percent rotary-interleaved rotary-seq-len-interpolation-factor use-rope-scaling
        rope-scaling-factor no-rope-freq no-rope-fusion use-rotary-position-embeddings""",
    "Experts": """
        num-experts moe-ffn-hidden-size moe-layer-freq moe-token-dispatcher-type moe-grouped-gemm
        moe-aux-loss-coeff moe-z-loss-coeff moe-router-dtype moe-token-drop-policy
        moe-per-layer-logging moe-router-topk moe-router-load-balancing-type
        moe-router-score-function moe-router-enable-expert-bias moe-router-bias-update-rate
        moe-router-num-groups moe-router-group-topk moe-router-topk-scaling-factor
        moe-shared-expert-intermediate-size""",
    "Batches and length": """
        micro-batch-size global-batch-size step-batch-size-schedule seq-length train-iters
        train-samples exit-interval exit-duration-in-mins exit-signal-handler skip-train
        iterations-to-skip calculate-per-token-loss eod-mask-loss""",
    "Optimizer": """
        optimizer lr min-lr lr-decay-style lr-decay-iters lr-decay-samples lr-warmup-iters
        lr-warmup-samples lr-warmup-fraction lr-warmup-init lr-wsd-decay-style lr-wsd-decay-iters
        lr-wsd-decay-samples decoupled-lr weight-decay clip-grad adam-beta1 adam-beta2 adam-eps
        muon-momentum muon-nesterov muon-scale-mode muon-extra-scale-factor
        muon-num-ns-steps muon-coefficient-type muon-fp32-matmul-prec muon-no-split-qkv
        muon-tp-mode override-opt_param-scheduler use-checkpoint-opt_param-scheduler""",
    "Precision": """
        bf16 fp16 initial-loss-scale accumulate-allreduce-grads-in-fp32 grad-reduce-in-bf16
        cross-entropy-loss-fusion no-gradient-accumulation-fusion
        no-check-for-nan-in-loss-and-grad""",
    "Layout": """
        tensor-model-parallel-size pipeline-model-parallel-size expert-model-parallel-size
        expert-tensor-parallel-size context-parallel-size sequence-parallel
        num-layers-per-virtual-pipeline-stage use-distributed-optimizer overlap-grad-reduce
        overlap-param-gather no-align-grad-reduce no-align-param-gather ddp-bucket-size
        tp-comm-overlap distributed-backend distributed-timeout-minutes
        distributed-timeout-seconds-after-init disable-gloo-process-groups
        check-weight-hash-across-dp-replicas-interval""",
    "Memory and speed": """
        recompute-activations recompute-granularity recompute-method recompute-num-layers
        recompute-modules manual-gc manual-gc-interval no-manual-gc-eval
        empty-unused-memory-level train-sync-interval""",
    "Data and tokenizer": """
        reset-attention-mask reset-position-ids
        data-path split train-data-path valid-data-path test-data-path data-args-path
        per-split-data-args-path data-cache-path mock-data num-workers dataloader-type
        no-mmap-bin-files num-dataset-builder-threads mid-level-dataset-surplus
        no-create-attention-mask-in-dataloader tokenizer-type tokenizer-model vocab-size
        padded-vocab-size make-vocab-size-divisible-by vocab-file merge-file trust-remote-code
        tokenizer-special-tokens tokenizer-hf-no-include-special-tokens tiktoken-pattern
        tiktoken-num-special-tokens null-tokenizer-eod-id""",
    "Validation": """
        eval-iters eval-interval start-eval-at-iter eval-micro-batch-size eval-global-batch-size
        full-validation multiple-validation-sets validation-set-names""",
    "Checkpoints": """
        save save-interval save-retain-interval load ckpt-step finetune use-checkpoint-args
        exit-on-missing-checkpoint no-save-optim no-save-rng no-load-optim no-load-rng ckpt-format
        async-save async-strategy ckpt-fully-parallel-save no-ckpt-fully-parallel-save
        ckpt-fully-parallel-load ckpt-fully-parallel-load-exchange-algo
        ckpt-fully-parallel-save-process-group ckpt-fully-parallel-load-process-group
        ckpt-assume-constant-structure no-ckpt-load-validate-sharding-integrity
        dist-ckpt-workers dist-ckpt-optim-fully-reshardable
        distrib-optim-fully-reshardable-mem-efficient rerun-mode""",
    "Reports": """
        log-interval log-params-norm log-num-zeros-in-grad timing-log-level timing-log-option
        no-barrier-with-level-1-timing tensorboard-dir tensorboard-log-interval
        log-timers-to-tensorboard no-log-loss-scale-to-tensorboard
        log-validation-ppl-to-tensorboard log-memory-to-tensorboard log-memory-interval
        log-world-size-to-tensorboard dump-param-to-param-group-map wandb-project wandb-entity
        wandb-exp-name wandb-save-dir profile profile-ranks profile-step-start profile-step-end
        use-pytorch-profiler pytorch-profiler-collect-shapes pytorch-profiler-collect-callstack
        record-shapes nvtx-ranges record-memory-history memory-snapshot-path""",
    "Random numbers": "seed",
}
"""Flags by subject, without the leading hyphens; a flag's other spellings are included."""
RENAMED = {
    "--use-flash-attn": "--attention-backend",
    "--rampup-batch-size": "--step-batch-size-schedule",
    "--checkpoint-activations": "--recompute-granularity",
    "--pretrained-checkpoint": "--load DIR --finetune",
    "--decoder-seq-length": "--seq-length",
    "--yaml-cfg": "--config",
    # Megatron's own drops tokens rank by rank, so that the result depends on the layout.
    "--moe-expert-capacity-factor": "--moe-train-capacity-factor with --token-router switch",
}
"""Replacements to suggest for flags that recipes use."""
ALLOW = "--allow-untested-flag"


def listed() -> frozenset[str]:
    """Return the flags of TESTED, spelled like `--num-layers`."""
    return frozenset(f"--{name}" for names in TESTED.values() for name in names.split())


def usable(parser: argparse.ArgumentParser) -> set[str]:
    """Return the destinations of the flags that can be given: ours, and the tested ones."""
    actions = parser._option_string_actions
    return {actions[flag].dest for flag in listed() if flag in actions} | {*OUR_FLAGS, "help"}


def refuse_untested(
    parser: argparse.ArgumentParser, argv: Sequence[str], *, allowed: Iterable[str]
) -> None:
    """Refuse flags of Megatron's that are not in TESTED.

    Args:
        argv: the command line, with the keys of --config as flags.
        allowed: the names that --allow-untested-flag gives, with or without hyphens.

    Raises:
        UsageError: with all refused flags, and what to do.
    """
    let_through = {flag_of(name) for name in allowed}
    names = usable(parser)
    refused = []
    for flag in dict.fromkeys(word.split("=")[0] for word in argv):
        action = parser._option_string_actions.get(flag)
        if action is None or action.dest in names:
            continue
        if not let_through.intersection((*action.option_strings, flag_of(action.dest))):
            refused.append(flag)
    if refused:
        instead = [f"give {RENAMED[flag]} instead of {flag}" for flag in refused if flag in RENAMED]
        if len(instead) < len(refused):
            rest = "the others" if instead else "them" if refused[1:] else "it"
            instead.append(f"leave {rest} out")
        raise UsageError(
            f"{', '.join(refused)} {'are' if refused[1:] else 'is'} not among the flags of "
            f"Megatron that are tested here (docs/flags.md): {', '.join(instead)}, or give {ALLOW} "
            f"{' '.join(flag.lstrip('-') for flag in refused)}."
        )
