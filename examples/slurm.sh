#!/usr/bin/env bash
#SBATCH --job-name=smlp
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@600
# Pretrain under Slurm. Submit it from the project's folder, with the size of the job:
#
#   CONFIG=configs/... sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 32 --time 4:00:00 \
#     examples/slurm.sh --save runs/smlp [pretrain_smlp.py flags]
#
#   CONFIG           YAML file with the model and run sizes; flags override it
#   SPARES           how many of the nodes wait to take over (default: 0)
#   MASTER_ADDR      name or address of the store's machine (default: the first node)
#   MASTER_PORT      a free port there (default: one made from the job's number)
#   NPROC_PER_NODE   processes on a node (default: the GPUs that Slurm gave)
#   PYTHON           interpreter (default: the project's .venv, else python3)
#   SITE             a shell file that is sourced first, here and by the tasks: modules,
#                    NCCL, UCX (docs/gpus.md)
#   SRUN_FLAGS       more flags of srun, such as --container-image=... (docs/gpus.md): PYTHON is then
#                    looked for by the tasks alone
#   RENDEZVOUS, MAX_RESTARTS, SHUTDOWN_TIMEOUT, START_TIMEOUT, REJOIN_TIMEOUT   as in
#                    several_nodes.sh
#
# Ten minutes before --time is over the run saves, and the job is requeued, under the same
# number, until the run is over. So is a job that fails, also where a machine is gone for good (75),
# if it has saved a newer checkpoint or has been requeued less than three times; but not for
# wrong flags (2), a loss or gradient that is not finite (3), or where no newer checkpoint came of
# three starts or of the whole job (93). `scancel` ends it, and it is not requeued; it saves if
# the cluster's KillWait (30 s by default) is enough for a step and a save.
# Where --requeue is not allowed, a chain of jobs, each after the other, however it ended:
#
#   for i in 1 2 3; do CONFIG=... sbatch --dependency=singleton ... examples/slurm.sh ...; done

set -euo pipefail
# Slurm runs a copy of this file from elsewhere, so the launchers are found from where it was
# submitted.
examples="${SLURM_SUBMIT_DIR:-$PWD}/examples"
if [[ ! -f "$examples/common.sh" ]]; then
  echo "slurm.sh: error: no $examples/common.sh. Submit the job from the project's folder" >&2
  exit 2
fi
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$examples/common.sh"

answer_help "$@"
require SLURM_JOB_ID "it by starting this script with sbatch"
check_sizes
[[ -n "${SRUN_FLAGS:-}" ]] || check_python # else it is that of the tasks, in a container

SPARES="${SPARES:-0}"
require_number SPARES "the number of nodes that wait"
NNODES=$((SLURM_NNODES - SPARES))
((NNODES > 0)) || fail "SPARES=$SPARES leaves none of $SLURM_NNODES nodes to train: lower it"
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
first="${hosts%%$'\n'*}" # not through `head`: it may end before scontrol has written
MASTER_ADDR="${MASTER_ADDR:-$first}"
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
RUN_ID="smlp-$SLURM_JOB_ID"
export CONFIG NNODES SPARES MASTER_ADDR MASTER_PORT RUN_ID NPROC_PER_NODE PYTHON

# Prints the iteration of the newest checkpoint, as a task of the first node sees it; 0 without any.
newest() {
  # shellcheck disable=SC2016,SC2086
  ${SRUN_FLAGS:+srun --nodes=1 --ntasks=1 --nodelist="$first" $SRUN_FLAGS} \
    bash -c 'source "$0" >&2; exec "${PYTHON:-$(default_python)}" -c "
import sys
sys.path.insert(0, sys.argv[1])
from megatron_smlp.launching.failures import Failures
print(Failures(sys.argv[2:]).newest or 0)" "$REPOSITORY" "$@"' \
    "$examples/common.sh" --config "$CONFIG" "$@"
}
before="$(newest "$@")" || before=

# From Slurm 22.05 on srun does not take the job's CPUs over by itself: a task would have one core.
cpus="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-}}"
# One task a node; each learns its number only there. A task or node that fails, or ends long before
# the others (--wait), leaves them: they wait for it or go on with a spare. SIGTERM comes to srun's
# tasks from Slurm itself, the warning before the time is over (USR1) to this script alone, which
# hands it on.
# shellcheck disable=SC2016,SC2086
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --no-kill --wait=0 ${SRUN_FLAGS:-} \
  ${cpus:+--cpus-per-task="$cpus"} \
  bash -c 'NODE_RANK="$SLURM_NODEID" exec "$0" "$@"' "$examples/several_nodes.sh" "$@" &
tasks=$!
warned=false
trap 'warned=true; kill -USR1 "$tasks" || true' USR1
code=0
wait "$tasks" || code=$?
if $warned; then # which has ended that wait, not the tasks
  code=0
  wait "$tasks" || code=$?
fi
got_on() {
  local now
  if [[ -z "$before" ]] || ! now="$(newest "$@")"; then
    echo "slurm.sh: cannot see where the checkpoints are: takes it for no progress" >&2
    return 1
  fi
  ((now > before))
}
# The codes: megatron_smlp/launching/exit_codes.py. This is the highest of all tasks: one that was
# refused early may have left a run that went on.
goes_on() {
  case "$code" in
    0) $warned ;; # without a newer checkpoint it would be 93
    3 | 93) false ;;
    # 76: another machine has ended with one of these; 1: nothing is saved, or the launcher failed
    1 | 2 | 76) $warned && got_on "$@" ;;
    *) ((${SLURM_RESTART_COUNT:-0} < 3)) || got_on "$@" ;;
  esac
}
if goes_on "$@"; then
  scontrol requeue "$SLURM_JOB_ID" || true
elif ((code)); then
  echo "slurm.sh: the tasks ended with $code: not queued again" >&2
fi
exit "$code"
