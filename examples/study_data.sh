#!/usr/bin/env bash
# The data of a study: a tokenizer, what is trained on, and what every evaluation reads.
#
#   examples/study_data.sh                     prose from this Python installation, no download
#   CORPUS="train.jsonl" VALIDATION="valid.jsonl" examples/study_data.sh
#
#   CORPUS       JSON lines with a "text" key, one document (for example a book) per line, or .gz, .zst
#   VALIDATION   the same, of other documents (default: every twentieth document of CORPUS)
#   VOCABULARY   entries of the byte-level BPE tokenizer (default: 4096)
#   OUTPUT       folder (default: runs/study-data); an existing one is left as it is
#   PYTHON_BIN   interpreter (default: the project's .venv)

set -euo pipefail
cd "$(dirname "$0")/.."
source examples/common.sh

answer_help "$@"
python=${PYTHON_BIN:-.venv/bin/python}
output=${OUTPUT:-runs/study-data}
output=${output%/}
if [[ -e $output ]]; then
  echo "study_data.sh: $output is there; remove it to make it again" >&2
  exit 0
fi

work=$output.partial
rm -rf "$work"
mkdir -p "$work"
corpus=${CORPUS:-}
if [[ -z $corpus ]]; then
  corpus=$work/corpus.jsonl
  "$python" examples/quickstart_corpus.py --output "$corpus" --megabytes "${MEGABYTES:-8}"
fi
validation=${VALIDATION:-}
if [[ -z $validation ]]; then
  "$python" examples/study_split.py --input "$corpus" --train "$work/train.jsonl" \
    --valid "$work/valid.jsonl"
  corpus=$work/train.jsonl
  validation=$work/valid.jsonl
fi

"$python" tools/train_tokenizer.py --input "$corpus" --vocab-size "${VOCABULARY:-4096}" \
  --output "$work/tokenizer"
for split in train valid; do
  input=$corpus
  if [[ $split == valid ]]; then input=$validation; fi
  "$python" tools/preprocess_data.py --input "$input" --output-prefix "$work/$split" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$work/tokenizer" --append-eod \
    --workers 2
done
rm -f "$work"/*.jsonl
mv "$work" "$output"
