"""Flags of which one is given in place of another.

What comes later, as a command line after a YAML file, drops what it stands in for.
"""

from collections.abc import Iterable

WHOLE = frozenset({"data_path", "data_args_path", "mock_data"})
PER_SPLIT = frozenset(
    {"train_data_path", "valid_data_path", "test_data_path", "per_split_data_args_path"}
)
GROUPS = (
    frozenset({"train_iters", "train_samples"}),
    frozenset({"lr_decay_iters", "lr_decay_samples"}),
    frozenset({"lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples"}),
    WHOLE,
)
IN_PLACE_OF = (
    (WHOLE, PER_SPLIT),
    (PER_SPLIT, WHOLE | {"split"}),
    ({"recompute_activations"}, {"recompute_granularity", "recompute_method"}),
)
"""The second are dropped where one of the first is given."""


def replaced_by(given: Iterable[str]) -> set[str]:
    """Destinations of flags that these stand in for."""
    given = set(given)
    replaced = {name for group in GROUPS if given & group for name in group}
    replaced |= {name for those, others in IN_PLACE_OF if given & those for name in others}
    return replaced - given
