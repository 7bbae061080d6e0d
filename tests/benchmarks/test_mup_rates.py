"""benchmarks/mup.py: which trials are trained."""

from collections.abc import Callable
from typing import Any

import mup


def test_trials_differ_in_what_is_compared(parse: Callable[..., Any]):
    scaled, plain = (parse(mup.flags((uses_mup, 128, 0.004)), base=BASE) for uses_mup in (1, 0))
    assert (scaled.use_mup, scaled.mup_base_hidden_size, scaled.mup_base_head_dim) == (True, 64, 32)
    assert (scaled.hidden_size, scaled.num_attention_heads, scaled.lr) == (128, 4, 0.004)
    names = {name for name in vars(plain) if getattr(plain, name) != getattr(scaled, name)}
    assert names - GIVEN == {"use_mup", "mup_base_hidden_size", "mup_base_head_dim"}


GIVEN = {"command_line", "explicit_flags", "places"}
BASE = "--mock-data --tokenizer-type NullTokenizer --vocab-size 100"
