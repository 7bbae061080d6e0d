#!/usr/bin/env bash
#SBATCH --job-name=smlp-study
#SBATCH --ntasks=1
#SBATCH --output=%x-%A-%a.log
# Work on a study under Slurm: each task of a job array is a worker, as many as you like, added or
# cancelled at any time. Submit it from the project's folder, which all nodes share:
#
#   STUDY=studies/paper.yaml sbatch --array 0-15 --gpus 8 --cpus-per-task 32 --time 24:00:00 \
#     examples/study_slurm.sh [tools/study.py run flags, such as --data FOLDER]
#
#   STUDY            the study file
#   NPROC_PER_NODE   processes of one run (default: the GPUs that Slurm gave)
#   PYTHON           interpreter (default: the project's .venv, else python3)
#   SITE             a shell file that is sourced first (docs/gpus.md)
#
# A run whose worker is ended continues from its last checkpoint in another.

set -euo pipefail
examples="${SLURM_SUBMIT_DIR:-$PWD}/examples"
if [[ ! -f "$examples/common.sh" ]]; then
  echo "study_slurm.sh: error: no $examples/common.sh. Submit the job from the project's folder" >&2
  exit 2
fi
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$examples/common.sh"

answer_help "$@"
require STUDY "the study file, for example STUDY=studies/cpu.yaml"
[[ -f "$STUDY" ]] || fail "STUDY=$STUDY: no such file; ready ones lie in $REPOSITORY/studies"
NPROC_PER_NODE="${NPROC_PER_NODE:-$(default_processes)}"
require_number NPROC_PER_NODE "the number of processes of a run"
PYTHON="${PYTHON:-$(default_python)}"
keep_caches_local
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" "$REPOSITORY/tools/study.py" run "$STUDY" --processes "$NPROC_PER_NODE" "$@"
