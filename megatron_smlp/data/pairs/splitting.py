"""Split one pair into train, valid and test, between documents."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.pairs.combining import copy_documents, origin_of, scratch_folder
from megatron_smlp.data.pairs.full_check import require_sound_index
from megatron_smlp.data.pairs.indexed import Index, idx_path, open_index
from megatron_smlp.data.pairs.manifest import check_manifest_path
from megatron_smlp.data.pairs.statistics import document_lengths
from megatron_smlp.data.pairs.writer import PairWriter, publish, withdraw
from megatron_smlp.errors import DataError

NAMES = ("train", "valid", "test")


def split(
    prefix: str, *, output_prefix: str, weights: Sequence[float], by: str, seed: int | None = None
) -> dict[str, int]:
    """Write `OUTPUT_train`, `OUTPUT_valid` and `OUTPUT_test`; return the document count of each.

    Args:
        weights: shares of the three, with any sum; 0 leaves one out.
        by: what the shares count, "documents" or "tokens".
        seed: None cuts the documents in order; a number picks them at random, but keeps their
            order within each part.

    Raises:
        DataError: bad weights, a pair that is damaged or not what its manifest describes, or too
            few documents.
    """
    index = open_index(prefix)
    require_sound_index(index)
    shares = _shares(weights)
    part_of = _assign(index, shares, by=by, seed=seed)
    counts = np.bincount(part_of, minlength=len(NAMES))
    for name, share, count in zip(NAMES, shares, counts, strict=True):
        if share > 0 and count == 0:
            raise DataError(
                f"--weights: {name} gets none of {index.num_documents} documents; raise it"
            )
        if not share and (left := idx_path(f"{output_prefix}_{name}")).exists():
            raise DataError(
                f"--weights omits {name}, but {left} exists from another split, whose "
                f"documents may be in the new parts; delete it, or give another --output-prefix"
            )
    _write_parts(index, part_of, output_prefix)
    return dict(zip(NAMES, counts.tolist(), strict=True))


def _shares(weights: Sequence[float]) -> list[float]:
    is_sound = all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0
    if not 1 <= len(weights) <= len(NAMES) or not is_sound:
        raise DataError(
            f"--weights {' '.join(map(str, weights))}: give one to three numbers of 0 or more, "
            f"for {', '.join(NAMES)}, at least one above 0"
        )
    padded = [*weights, 0.0, 0.0][: len(NAMES)]
    return [weight / sum(padded) for weight in padded]


def _assign(index: Index, shares: list[float], *, by: str, seed: int | None) -> NDArray[np.int8]:
    """Return <int8>[documents], the part of each."""
    count = index.num_documents
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    sizes = np.ones(count, dtype=np.int64) if by == "documents" else document_lengths(index)
    # A document belongs to the part in which its middle lies.
    middles = np.cumsum(sizes[order]) - sizes[order] / 2
    borders = np.cumsum(shares)[:-1] * sizes.sum()
    part_of = np.empty(count, dtype=np.int8)
    # Empty documents at the end must not fall into a part without a share, beyond the last border.
    last = np.flatnonzero(shares)[-1]
    part_of[order] = np.minimum(np.searchsorted(borders, middles, side="right"), last)
    return part_of


def _write_parts(index: Index, part_of: NDArray[np.int8], output_prefix: str) -> None:
    """Write all parts before replacing those of an older split: a mix of both could have documents
    twice, in training and in validation."""
    origin = origin_of(index.prefix)
    with scratch_folder(output_prefix) as folder:
        finished = {}
        for number in np.unique(part_of).tolist():
            target = f"{output_prefix}_{NAMES[number]}"
            check_manifest_path(Path(target + ".json"), pairs=[Path(target).name])
            writer = PairWriter(Path(folder, NAMES[number]), dtype=index.dtype)
            chosen = np.concatenate(([0], (part_of == number).astype(np.int8), [0]))
            edges = np.flatnonzero(np.diff(chosen)).tolist()
            for first, last in zip(edges[::2], edges[1::2], strict=True):
                copy_documents(index, writer, first, last)
            record = writer.finish(
                key=origin.pair.key if origin else "text",
                level=origin.pair.level if origin else "document",
            )
            manifest = origin and replace(
                origin.manifest,
                pairs={Path(target).name: record},
                sources=[{"pair": index.prefix}],
                counts={"documents": record.documents, "tokens": record.tokens},
            )
            finished[target] = writer, manifest or None
        for target in finished:
            withdraw([target], manifest_path=Path(target + ".json"))
        for target, (writer, manifest) in finished.items():
            publish({target: writer}, manifest=manifest, manifest_path=Path(target + ".json"))
