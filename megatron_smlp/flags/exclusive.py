"""Flags that exclude one another.

One that comes later, as the command line comes after a YAML file, removes those that it replaces.
"""

from collections.abc import Iterable

from megatron_smlp.data.blending import PER_SPLIT_FLAGS, WHOLE_FLAGS

WHOLE = frozenset({*WHOLE_FLAGS, "mock_data"})
PER_SPLIT = frozenset(PER_SPLIT_FLAGS)
GROUPS = (
    frozenset({"train_iters", "train_samples"}),
    frozenset({"lr_decay_iters", "lr_decay_samples"}),
    frozenset({"lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples"}),
    WHOLE,
    frozenset({"global_batch_size", "step_batch_size_schedule"}),
    frozenset({"fp16", "bf16"}),
)
IN_PLACE_OF = (
    (WHOLE, PER_SPLIT),
    (PER_SPLIT, WHOLE | {"split"}),
    (
        {"recompute_activations"},
        {"recompute_granularity", "recompute_method", "recompute_num_layers"},
    ),
    ({"recompute_granularity"}, {"recompute_activations"}),
)
"""The second are dropped where one of the first is given."""


def replaced_by(given: Iterable[str]) -> set[str]:
    """Destinations of flags that these stand in for."""
    given = set(given)
    replaced = {name for group in GROUPS if given & group for name in group}
    replaced |= {name for those, others in IN_PLACE_OF if given & those for name in others}
    return replaced - given
