#!/usr/bin/env bash
#SBATCH --job-name=smlp
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
# Pretrain under Slurm. Submit it from the project's folder, with the size of the job:
#
#   CONFIG=configs/... sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 32 --time 4:00:00 \
#     examples/slurm.sh --save runs/smlp --exit-duration-in-mins 230 [pretrain_smlp.py flags]
#
#   CONFIG           YAML file with the sizes of the model and of the run; flags win over it
#   MASTER_PORT      a free port on the first node (default: one made from the job's number)
#   NPROC_PER_NODE   processes on a node (default: the GPUs that Slurm gave)
#   PYTHON           interpreter (default: the project's .venv, else python3)
#
# --exit-duration-in-mins saves and ends before --time does; the same command then goes on from
# there.

set -euo pipefail
# Slurm runs a copy of this file from elsewhere, so the launchers are found from where it was
# submitted.
examples="${SLURM_SUBMIT_DIR:-$PWD}/examples"
if [[ ! -f "$examples/common.sh" ]]; then
  echo "slurm.sh: error: no $examples/common.sh. Submit the job from the project's folder" >&2
  exit 2
fi
source "$examples/common.sh"

if [[ "${1:-}" == "--help" ]]; then
  usage
  exit 0
fi
require SLURM_JOB_ID "it by starting this script with sbatch"
check_common

NNODES="$SLURM_NNODES"
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER_ADDR="${hosts%%$'\n'*}"  # not through `head`: it may end before scontrol has written
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
RUN_ID="smlp-$SLURM_JOB_ID"
export CONFIG NNODES MASTER_ADDR MASTER_PORT RUN_ID NPROC_PER_NODE PYTHON

# From Slurm 22.05 on srun does not take the job's CPUs over by itself: a task would have one core.
cpus="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-}}"
# One task a node; each learns its number only there.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --kill-on-bad-exit=1 ${cpus:+--cpus-per-task="$cpus"} \
  bash -c 'NODE_RANK="$SLURM_NODEID" exec "$0" "$@"' "$examples/several_nodes.sh" "$@"
