"""Tables of HASH: token id -> expert (Roller et al. 2021, arXiv 2106.04426).

    random      uniform numbers in [0, E), by a seed
    balanced    the most frequent token first, each to the expert with the fewest tokens so far

Equal loads are told apart by the number of ids, then by the expert's number, so that tokens which
the corpus lacks are spread evenly too. Letters: V vocabulary without padding, E experts.
"""

from __future__ import annotations

import heapq
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FORMAT = "megatron_smlp.hash_table"
BALANCED = "balanced"
"""Given instead of a file: balance by the token counts of the training data."""


def random_table(*, num_experts: int, vocab_size: int, seed: int) -> Tensor:
    """<int64>[V] of numbers in [0, E)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_experts, (vocab_size,), generator=generator)


def balanced_table(counts: NDArray[np.int64], *, num_experts: int) -> NDArray[np.int64]:
    """Map counts: <int64>[V], how often the corpus holds each id, to experts: <int64>[V]."""
    table = np.empty(len(counts), dtype=np.int64)
    experts = [(0, 0, expert) for expert in range(num_experts)]
    for token in np.argsort(-counts, kind="stable").tolist():
        load, num_ids, expert = experts[0]
        table[token] = expert
        heapq.heapreplace(experts, (load + int(counts[token]), num_ids + 1, expert))
    return table


def table_as_json(table: NDArray[np.int64], *, num_experts: int) -> str:
    """Write the file that `read_table` reads."""
    body = {"format": FORMAT, "num_experts": num_experts, "vocab_size": len(table)}
    return json.dumps(body | {"experts": table.tolist()}) + "\n"


def read_table(path: str | Path, *, num_experts: int, vocab_size: int) -> Tensor:
    """Read a table file.

    Returns:
        <int64>[V].

    Raises:
        ValueError: no such file, not a table, or one for other experts or another vocabulary.
    """
    flag, remedy = f"--hash-table {path}", "tools/build_hash_table.py makes one that fits."
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
        experts = torch.tensor(body["experts"], dtype=torch.int64)
        is_table = body["format"] == FORMAT and experts.dim() == 1
    except OSError as error:
        raise ValueError(f"{flag} cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{flag} is not a hash table: {remedy}") from error
    if not is_table or body["num_experts"] != num_experts:
        raise ValueError(
            f"{flag} is for {body['num_experts']} experts, not for --num-experts {num_experts}: "
            f"{remedy}"
        )
    if len(experts) != vocab_size:
        raise ValueError(
            f"{flag} is for a vocabulary of {len(experts):,} ids, but the tokenizer has "
            f"{vocab_size:,}: {remedy}"
        )
    if len(experts) and not 0 <= int(experts.min()) <= int(experts.max()) < num_experts:
        raise ValueError(f"{flag} names experts outside 0..{num_experts - 1}: {remedy}")
    return experts
