#!/usr/bin/env bash
# Pretrain on one machine, one process a GPU.
#
#   CONFIG=configs/cpu/smlp_deterministic.yaml examples/one_node.sh [pretrain_smlp.py flags]
#
#   CONFIG           YAML file with the sizes of the model and of the run; flags win over it
#   NPROC_PER_NODE   processes (default: the number of GPUs, or 1 without any)
#   PYTHON           interpreter (default: the project's .venv, else python3)
#   CUDA_DEVICE_MAX_CONNECTIONS   set to 1 where tensor or context parallelism needs it
#
# For example, two processes on a laptop, each with half of the model:
#
#   CONFIG=configs/cpu/gmlp.yaml NPROC_PER_NODE=2 examples/one_node.sh \
#     --tensor-model-parallel-size 2 --data-path corpus_text_document --save runs/gmlp

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

if [[ "${1:-}" == "--help" ]]; then
  usage
  exit 0
fi
check_common
launch --standalone -- "$@"
