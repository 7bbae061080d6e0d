#!/usr/bin/env bash
# Pretrain on several machines: start it on each of them, with that machine's NODE_RANK.
#
#   CONFIG=... NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 \
#     examples/several_nodes.sh [pretrain_smlp.py flags]
#
#   CONFIG           YAML file with the sizes of the model and of the run; flags win over it
#   NNODES           number of machines
#   NODE_RANK        number of this machine, from 0 to NNODES - 1
#   MASTER_ADDR      name or address of machine 0, as the others see it
#   MASTER_PORT      a free port on machine 0
#   RUN_ID           name of the run, the same on all machines (default: smlp)
#   NPROC_PER_NODE   processes on this machine (default: the number of GPUs, or 1 without any)
#   PYTHON           interpreter (default: the project's .venv, else python3)
#   CUDA_DEVICE_MAX_CONNECTIONS   set to 1 where tensor or context parallelism needs it
#
# Data, --save and the configuration must be readable under the same paths on every machine.

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

if [[ "${1:-}" == "--help" ]]; then
  usage
  exit 0
fi
check_common
require_number NNODES "the number of machines"
require_number NODE_RANK "the number of this machine, from 0"
require MASTER_ADDR "the name or address of machine 0"
require_number MASTER_PORT "a free port on machine 0"
((NODE_RANK < NNODES)) || fail "NODE_RANK=$NODE_RANK must be below NNODES=$NNODES: count from 0"

# Said outright, since a machine does not always know itself by the name that MASTER_ADDR has.
if ((NODE_RANK == 0)); then is_host=true; else is_host=false; fi

launch --nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
  --rdzv-id "${RUN_ID:-smlp}" --rdzv-conf "is_host=$is_host" -- "$@"
