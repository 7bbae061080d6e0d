"""Compares the quickstart's validation perplexity with what knows nothing of order.

    unigram perplexity = exp( - mean over validation tokens of log p(token) )

p is the share of the training tokens, with one count added to every entry of the vocabulary.
Exits with 1 where the model is not clearly better.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from megatron_smlp.data.pairs.indexed import open_index


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the quickstart")
    parser.add_argument("--split", required=True, help="train,valid,test as for the training")
    options = parser.parse_args()
    manifest = json.loads((options.run / "corpus.json").read_text(encoding="utf-8"))
    vocabulary = manifest["tokenizer"]["vocab_size"]
    shares = [float(share) for share in options.split.split(",")]
    unigram = unigram_perplexity(options.run / "corpus_text_document", vocabulary, shares)
    model = last_validation_perplexity(options.run / "metrics.jsonl")
    limit = vocabulary / 10
    print(f"\nvalidation perplexity {model:8.1f}   sparse all-MLP")
    print(f"                      {unigram:8.1f}   unigram model of the same training tokens")
    print(f"                      {vocabulary:8.1f}   uniform guess")
    return 0 if model < min(limit, unigram) else 1


def unigram_perplexity(prefix: Path, vocabulary: int, shares: list[float]) -> float:
    """On the documents that Megatron's --split gives to validation, from those for training."""
    index = open_index(str(prefix))
    ids = np.fromfile(f"{prefix}.bin", dtype=index.dtype)
    starts = np.concatenate([[0], np.cumsum(index.lengths)])
    edges = np.cumsum([0.0, *shares]) / sum(shares) * index.num_sequences
    first, middle, last = (int(starts[round(edge)]) for edge in edges[:3])
    counts = np.bincount(ids[first:middle], minlength=vocabulary) + 1
    log_shares = np.log(counts / counts.sum())
    return float(np.exp(-log_shares[ids[middle:last]].mean()))


def last_validation_perplexity(metrics: Path) -> float:
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [line["validation_perplexity"] for line in lines if "validation_perplexity" in line][-1]


if __name__ == "__main__":
    sys.exit(main())
