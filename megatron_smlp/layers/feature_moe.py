"""Feature MoE (sMoE): chunks of the hidden dimension, not tokens, are routed to spatial experts.

    g_i = s_i * (M_e(i) LN(u2_i)) + b_e(i)           i = 1..C chunks of F/C features, E experts

Deterministic routing (Yu et al., arXiv 2203.06850, section 3): C = E, e(i) = i, s_i = 1. Nothing is
learned and no token is looked at, so it is causal; parameters grow by E T T a layer, FLOPs do not
grow with E, and where tp divides E it needs no communication.
"""

from __future__ import annotations

from megatron_smlp.layers.spatial_gating import SpatialGating


class DeterministicFeatureMoE(SpatialGating):
    """Chunk i goes to expert i: spatial gating whose heads are the experts, and the same code."""
