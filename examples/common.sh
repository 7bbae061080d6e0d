# shellcheck shell=bash
# What the launchers and the quickstart share. Sourced by them, not run.

EXAMPLES="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
REPOSITORY="$(dirname -- "$EXAMPLES")"

fail() {
  echo "$(basename -- "$0"): error: $*" >&2
  exit 2
}

# SITE: what a cluster needs. Modules' own functions read unset variables.
if [[ -n "${SITE:-}" ]]; then
  [[ -f "$SITE" ]] || fail "SITE=$SITE: no such file: give a file of shell lines (docs/gpus.md)"
  SITE="$(realpath -- "$SITE")"
  export SITE # to the tasks of Slurm
  set +u
  # shellcheck source=/dev/null
  source "$SITE"
  set -u
fi

# Keep compiled kernels on this node's own disk: in an NFS home a stale file handle ends one rank,
# and the others wait for it. Called where the ranks run; TMPDIR is the node's.
keep_caches_local() {
  local folder="${TMPDIR:-/tmp}/megatron_smlp-$(id -u)"
  mkdir -p -m 700 -- "$folder" 2> /dev/null || true
  [[ -O "$folder" && -w "$folder" ]] || return 0 # somebody else's, or no such disk
  export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$folder/triton}"
  export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$folder/inductor}"
  export CUDA_CACHE_PATH="${CUDA_CACHE_PATH:-$folder/cuda}"
}

# The comment at the top of the calling script.
usage() {
  sed -n '2,/^$/{/^#SBATCH/d;s/^# \{0,1\}//p;}' "$0"
}

# require NAME "what it is": stop unless the environment has a value for it.
require() {
  [[ -n "${!1:-}" ]] || fail "$1 is not set: give $2. For all variables: $0 --help"
}

# require_number NAME "what it is"
require_number() {
  require "$1" "$2"
  [[ "${!1}" =~ ^[0-9]+$ ]] || fail "$1 is '${!1}', but $2 is a whole number"
}

# GPUs that processes on this node see.
count_gpus() {
  local gpus="${SLURM_GPUS_ON_NODE:-}"
  if [[ "${CUDA_VISIBLE_DEVICES--}" == "" || "${CUDA_VISIBLE_DEVICES:-}" == -1 ]]; then # hidden
    gpus=0
  elif [[ -z "$gpus" && -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    gpus="$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true)"
  elif [[ -z "$gpus" ]] && command -v nvidia-smi > /dev/null; then
    gpus="$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU' || true)"  # no MIG slices
  fi
  echo "${gpus:-0}"
}

# Processes on this node: one per GPU, or one without any.
default_processes() {
  local gpus
  gpus="$(count_gpus)"
  echo "$((gpus > 0 ? gpus : 1))"
}

# The project's own Python where `make env` made it.
default_python() {
  local own="$REPOSITORY/.venv/bin/python"
  if [[ -x "$own" ]]; then echo "$own"; else echo python3; fi
}

check_sizes() {
  require CONFIG "the YAML file of the model, for example CONFIG=configs/cpu/gmlp.yaml"
  [[ -f "$CONFIG" ]] || fail "CONFIG=$CONFIG: no such file; ready ones lie in $REPOSITORY/configs"
  NPROC_PER_NODE="${NPROC_PER_NODE:-$(default_processes)}"
  require_number NPROC_PER_NODE "the number of processes (GPUs) on this node"
}

check_python() {
  PYTHON="${PYTHON:-$(default_python)}"
  command -v "$PYTHON" > /dev/null || fail "PYTHON=$PYTHON: no such program. Run \`make env\` first"
  "$PYTHON" -c 'from importlib.util import find_spec; raise SystemExit(find_spec("torch") is None)' \
    || fail "PYTHON=$PYTHON has no torch: run \`make env\`, or give an interpreter with the packages"
}

# answer_help [--help]: print the usage if asked for, and exit.
answer_help() {
  if [[ "${1:-}" == "--help" ]]; then
    usage
    exit 0
  fi
}

# start one-node|several-nodes [TRAINING_FLAG...]: megatron_smlp/launching/ reads the variables.
start() {
  local machines="$1"
  shift
  answer_help "$@"
  check_sizes
  check_python
  keep_caches_local
  export NPROC_PER_NODE
  exec "$PYTHON" "$REPOSITORY/tools/launch.py" "$machines" \
    "$REPOSITORY/pretrain_smlp.py" --config "$CONFIG" "$@"
}
