"""Document lengths of a pair: quantiles, a histogram for the terminal and as PNG."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.pairs.indexed import Index
from megatron_smlp.durable import write_durably
from megatron_smlp.errors import require_package

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BAR_WIDTH = 40
Lengths = NDArray[np.int64]


def document_lengths(index: Index) -> Lengths:
    """Return <int64>[documents], tokens of each, end-of-document id included."""
    sums = np.concatenate(([0], np.cumsum(index.lengths, dtype=np.int64)))
    return np.diff(sums[index.documents])


def histogram(lengths: Lengths) -> tuple[Lengths, NDArray[Any], NDArray[Any]]:
    """Return the edges of power-of-two bins, and the documents and tokens in each bin.

    Returns:
        <int64>[bins + 1] (a bin includes its lower edge), <int64>[bins], <float64>[bins].
    """
    longest = int(lengths.max(initial=1))
    edges = np.concatenate(([0], 1 << np.arange(longest.bit_length() + 1, dtype=np.int64)))
    counts, _ = np.histogram(lengths, bins=edges)
    tokens, _ = np.histogram(lengths, bins=edges, weights=lengths.astype(np.float64))
    return edges, counts, tokens


def statistics_lines(lengths: Lengths) -> Iterator[str]:
    """Yield a summary, quantiles, and a line for each bin that contains documents."""
    yield (
        f"{len(lengths):,} documents, {lengths.sum():,} tokens, "
        f"{lengths.sum() / max(len(lengths), 1):,.1f} a document, {(lengths == 0).sum():,} empty"
    )
    ranks = np.quantile(lengths, QUANTILES, method="lower") if len(lengths) else [0] * 7
    texts = [f"{share:.0%} {int(rank):,}" for share, rank in zip(QUANTILES, ranks, strict=True)]
    yield f"quantiles of tokens a document: {', '.join(texts)}"
    yield f"{'tokens a document':>24}  {'documents':>12}  {'tokens':>15}"
    edges, counts, tokens = histogram(lengths)
    for number in np.flatnonzero(counts):
        bar = "#" * -int(-BAR_WIDTH * counts[number] // counts.max())
        span = f"{edges[number]:,} to {edges[number + 1] - 1:,}"
        yield f"{span:>24}  {counts[number]:>12,}  {int(tokens[number]):>15,}  {bar}"


def save_histogram(lengths: Lengths, path: Path, *, title: str) -> None:
    """Draw the histogram into a PNG.

    Raises:
        UsageError: matplotlib is not installed.
    """
    require_package("matplotlib", purpose="--png", extra="matplotlib")
    from matplotlib.figure import Figure

    edges, counts, _ = histogram(lengths)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.bar([f"{edge:,}" for edge in edges[:-1]], counts)
    axes.set(title=title, xlabel="tokens a document (from)", ylabel="documents")
    axes.tick_params("x", rotation=45)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_durably(path, image.getvalue())
