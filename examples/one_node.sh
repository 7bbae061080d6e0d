#!/usr/bin/env bash
# Pretrain on one machine, one process per GPU.
#
#   CONFIG=configs/cpu/smlp_deterministic.yaml examples/one_node.sh [pretrain_smlp.py flags]
#
#   CONFIG            YAML file with the model and run sizes; flags override it
#   NPROC_PER_NODE    processes (default: the number of GPUs, or 1 without any)
#   PYTHON            interpreter (default: the project's .venv, else python3)
#   SITE              a shell file that is sourced first: modules, NCCL, UCX (docs/gpus.md)
#   TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR, CUDA_CACHE_PATH   default: in TMPDIR, else /tmp
#   LOCAL_ADDR        address of this machine by which its processes meet (default: 127.0.0.1)
#   MAX_RESTARTS      restarts of the processes by one agent (default: 3)
#   SHUTDOWN_TIMEOUT  seconds to save after a signal (default: 600)
#   CUDA_DEVICE_MAX_CONNECTIONS   set to 1 where tensor parallelism needs it
#
# With --save a failed run continues from its newest checkpoint; after three failures without a
# newer one it ends with 93. Wrong flags (2) and a loss or gradient that is not finite (3) end it at
# once. SIGTERM, SIGUSR1 and Ctrl-C save, and end it with 0.
#
# For example, two processes on a laptop, each with half of the model:
#
#   CONFIG=configs/cpu/gmlp.yaml NPROC_PER_NODE=2 examples/one_node.sh \
#     --tensor-model-parallel-size 2 --data-path corpus_text_document --save runs/gmlp \
#     --tokenizer-type HuggingFaceTokenizer --tokenizer-model data/tokenizer

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

start one-node "$@"
