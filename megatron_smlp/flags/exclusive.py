"""Mutually exclusive flags.

A later flag removes those that it replaces; the command line comes after YAML files.
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
"""Pairs of sets: if a flag of the first is given, those of the second are dropped."""


def replaced_by(given: Iterable[str]) -> set[str]:
    """Return the destinations of the flags that the given ones replace."""
    given = set(given)
    replaced = {name for group in GROUPS if given & group for name in group}
    replaced |= {name for those, others in IN_PLACE_OF if given & those for name in others}
    return replaced - given
