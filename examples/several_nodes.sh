#!/usr/bin/env bash
# Pretrain on several machines: start it on each of them, with that machine's NODE_RANK.
#
#   CONFIG=... NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 \
#     examples/several_nodes.sh [pretrain_smlp.py flags]
#
#   CONFIG            YAML file with the model and run sizes; flags override it
#   NNODES            number of machines; MIN:MAX lets it vary, which changes rounding
#   SPARES            extra machines that wait to take over (default: 0)
#   NODE_RANK         number of this machine, from 0; needed only by RENDEZVOUS=host
#   RENDEZVOUS        how they meet, the same on all: host (default: machine 0 keeps the store),
#                     server (MASTER_ADDR:MASTER_PORT does, `tools/launch.py serve PORT`: the others
#                     then survive any of them) or file:FOLDER (one that all of them share, with
#                     flock between machines, as Lustre has it with -o flock)
#   MASTER_ADDR       name or address of machine 0 or of the server, as the others see it
#   MASTER_PORT       a free port there
#   LOCAL_ADDR        address of this machine (default: that of the route to MASTER_ADDR)
#   RUN_ID            name of the run, the same on all machines (default: smlp)
#   MAX_RESTARTS      restarts of the processes by one agent (default: 3)
#   SHUTDOWN_TIMEOUT  seconds to save after a signal (default: 600)
#   START_TIMEOUT     seconds to reach the store or the folder in at first (default: 180)
#   REJOIN_TIMEOUT    seconds for all machines to come together again (default: 600)
#   NPROC_PER_NODE    processes on this machine (default: the number of GPUs, or 1 without any)
#   PYTHON            interpreter (default: the project's .venv, else python3)
#   SITE              a shell file that is sourced first: modules, NCCL, UCX (docs/gpus.md)
#   TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR, CUDA_CACHE_PATH   default: in TMPDIR, else /tmp
#   GLOO_SOCKET_IFNAME, CUDA_DEVICE_MAX_CONNECTIONS   are set if unset
#
# Data, --save and the configuration must be readable under the same paths on every machine. With
# --save a failed run continues from its newest checkpoint; it ends with 93 after three failures
# without a newer one, with 75 where a machine is not back within REJOIN_TIMEOUT of the others, with
# 2 where flags or variables are wrong, with 3 where a loss or gradient is not finite, and with 0
# when it is over or was signalled (SIGTERM, SIGUSR1). A machine that ends for good tells the others,
# which end with 76; where its launcher is killed, they wait for REJOIN_TIMEOUT: see
# docs/resilience.md.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

start several-nodes "$@"
