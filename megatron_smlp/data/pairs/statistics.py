"""Document lengths of a pair: quantiles, a histogram for the terminal and as PNG."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.pairs.indexed import Index
from megatron_smlp.durable import write_durably
from megatron_smlp.errors import require_package

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BAR_WIDTH = 40


@dataclass(frozen=True)
class LengthStatistics:
    """Tokens a document, end-of-document id included."""

    num_documents: int
    num_tokens: int
    num_empty: int
    quantiles: dict[float, int]
    edges: NDArray[np.int64]
    """<int64>[bins + 1], powers of two; a bin holds its lower edge."""
    counts: NDArray[np.int64]
    """<int64>[bins], documents."""
    tokens: NDArray[np.int64]
    """<int64>[bins], tokens in these documents."""

    @property
    def mean(self) -> float:
        return self.num_tokens / max(self.num_documents, 1)


def document_lengths(index: Index) -> NDArray[np.int64]:
    """Return <int64>[documents], tokens of each."""
    sums = np.concatenate(([0], np.cumsum(index.lengths, dtype=np.int64)))
    return np.diff(sums[index.documents])


def length_statistics(index: Index) -> LengthStatistics:
    """Return statistics over all documents of `index`."""
    lengths = document_lengths(index)
    longest = int(lengths.max(initial=1))
    edges = np.concatenate(([0], 1 << np.arange(longest.bit_length() + 1, dtype=np.int64)))
    counts, _ = np.histogram(lengths, bins=edges)
    tokens, _ = np.histogram(lengths, bins=edges, weights=lengths.astype(np.float64))
    ranks = np.quantile(lengths, QUANTILES, method="lower") if len(lengths) else [0] * 7
    return LengthStatistics(
        num_documents=len(lengths),
        num_tokens=int(lengths.sum()),
        num_empty=int((lengths == 0).sum()),
        quantiles=dict(zip(QUANTILES, map(int, ranks), strict=True)),
        edges=edges,
        counts=counts.astype(np.int64),
        tokens=tokens.astype(np.int64),
    )


def histogram_lines(statistics: LengthStatistics) -> list[str]:
    """Return one line for each bin that holds documents."""
    most = max(int(statistics.counts.max(initial=0)), 1)
    lines = [f"{'tokens a document':>24}  {'documents':>12}  {'tokens':>15}"]
    for number in np.flatnonzero(statistics.counts):
        low, high = statistics.edges[number], statistics.edges[number + 1] - 1
        count, tokens = int(statistics.counts[number]), int(statistics.tokens[number])
        bar = "#" * -(-BAR_WIDTH * count // most)
        lines.append(f"{f'{low:,} to {high:,}':>24}  {count:>12,}  {tokens:>15,}  {bar}")
    return lines


def save_histogram(statistics: LengthStatistics, path: Path, *, title: str) -> None:
    """Draw the histogram into a PNG.

    Raises:
        DataError: matplotlib is not there.
    """
    require_package("matplotlib", purpose="--png", extra="matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    labels = [f"{edge:,}" for edge in statistics.edges[:-1]]
    axes.bar(labels, statistics.counts)
    axes.set(title=title, xlabel="tokens a document (from)", ylabel="documents")
    axes.tick_params("x", rotation=45)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_durably(path, image.getvalue())
