"""Spatial gating whose weights depend only on distance, in place of spatial_gating.py's M and b:

    M[t, s] = m[t - s]   for 0 <= t - s < T, else 0        one vector m of T and one bias b per head

It is not in the papers. A head has T + 1 parameters instead of T (T + 1), and knows no absolute
positions: a token reads itself and the T - 1 before it, wherever it is, so a sequence may be longer
than T, the training length. Init as there: m ~ U(-1e-3/T, 1e-3/T), b = 1.

Letters: T training sequence, T' tokens of this call, h heads, N columns.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_smlp.layers.spatial_gating import SpatialProjection
from megatron_smlp.ops.toeplitz_mix import toeplitz_mix


class ToeplitzProjection(SpatialProjection):
    """g = M v + b with weight [h', T] and bias [h', 1]; any T'."""

    is_dense = False

    def _shapes(self, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (length,), (1,)

    def _causal(self, matrix: Tensor) -> Tensor:
        return matrix

    def first(self, weight: Tensor, tokens: int) -> Tensor:
        """See the base class, as for the methods below."""
        return weight[:, :tokens]

    def mix(self, weight: Tensor, columns: Tensor) -> Tensor:
        return toeplitz_mix(weight, columns)

    def rows_from(self, weight: Tensor, first: int, tokens: int) -> Callable[..., Tensor]:
        vectors = self.first(weight, tokens).unbind()

        def mix(head: int, columns: Tensor) -> Tensor:
            # The rows before `first` are few, and all rows share one panel of weights.
            return toeplitz_mix(vectors[head][None], columns[None])[0, first:]

        return mix

    def check_length(self, tokens: int) -> None:
        """Accept any length."""
