#!/usr/bin/env bash
# From text to a trained sparse all-MLP, on two processes of this machine, or one for its only GPU.
# Under five minutes on two cores.
#
#   make quickstart                      on prose from this Python installation, no download
#   make quickstart CORPUS=corpus.jsonl  on your own: JSON lines with a "text" key, or .gz, .zst, ...
#
# Results: runs/quickstart/ (tokenizer, dataset, checkpoints, metrics.jsonl, an exported model in hf/).
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/common.sh

python=${PYTHON_BIN:-.venv/bin/python}
run=runs/quickstart
config=configs/cpu/smlp_toeplitz.yaml
vocabulary=4096
processes=2
gpus=$(count_gpus)
if ((gpus == 1)); then processes=1; fi
cores=$("$python" -c 'import os; print(os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count())')
export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
# Matrix products in bf16 are faster where there are instructions for them, and slower elsewhere.
precision=
if ((gpus)) || grep -qwsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then precision=--bf16; fi

keep_caches_local

step() { printf '\n== %s\n' "$*"; }

corpus=${CORPUS:-}
allowed="give a file or a folder of JSON lines"
if [[ -n $corpus ]]; then
  [[ -e $corpus ]] || fail "CORPUS=$corpus does not exist: $allowed"
  [[ ! -d $run || $(realpath "$corpus")/ != "$(realpath "$run")"/* ]] \
    || fail "CORPUS=$corpus lies in $run, which is made anew: $allowed"
fi

rm -rf "$run"
mkdir -p "$run"

step "1/6 corpus"
if [[ -z $corpus ]]; then
  corpus=$run/corpus.jsonl
  "$python" examples/quickstart_corpus.py --output "$corpus" --megabytes 4
fi

step "2/6 tokenizer: byte-level BPE with $vocabulary entries"
"$python" tools/train_tokenizer.py --input "$corpus" --vocab-size $vocabulary \
  --output "$run/tokenizer" --overwrite

step "3/6 dataset"
tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$run/tokenizer")
"$python" tools/preprocess_data.py --input "$corpus" --output-prefix "$run/corpus" \
  "${tokenizer[@]}" --append-eod --workers 2 --overwrite

# Half the configuration's steps: enough to be far better than a unigram model.
flags=(--train-iters 150 --eval-interval 75 --save-interval 75)
train() {
  # This machine's name need not resolve to it.
  "$python" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node $processes pretrain_smlp.py \
    --config $config ${precision:+$precision} "${flags[@]}" "${tokenizer[@]}" \
    --data-path "$run/corpus_text_document" \
    --save "$run/checkpoints" --log-dir "$run" "$@"
}

step "4/6 pretraining on $processes processes, first half; it saves and stops"
train --exit-interval 75

step "5/6 pretraining, second half, from the checkpoint"
train

step "6/6 result"
"$python" tools/convert_checkpoint.py --load "$run/checkpoints" --save "$run/hf" \
  --from torch_dist --to hf --tokenizer-model "$run/tokenizer" --overwrite
"$python" examples/quickstart_report.py --run "$run" --split 95,5,0
printf '\nA sample ("The function returns" is the prompt):\n'
"$python" tools/generate.py --hf "$run/hf" --prompt "The function returns" --max-new-tokens 60 \
  --seed 1
