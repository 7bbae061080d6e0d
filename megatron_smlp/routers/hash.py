"""HASH: a token's id determines its expert (Roller et al. 2021, arXiv 2106.04426).

    e = table[id]        y = f_e(h)        no parameters, no loss, nothing dropped

table <int64>[V], V the padded vocabulary, the same in every layer: random by --hash-seed, or
balanced by the counts of the training data (--hash-table balanced; routers/hash_table.py). It is a
buffer, saved with the model, so a checkpoint's table overrides both.

The ids are those of the model's input, on every pipeline stage: `attach_token_ids` hands them over
whenever the model is called, and a recomputed layer gets those of its own forward pass again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_smlp.routers.handed import Handed
from megatron_smlp.routers.hash_table import random_table
from megatron_smlp.routers.token_router import Choices, MegatronTokenRouter, as_megatron


def _first_table(config: Any) -> Tensor:
    """Return <int64>[V]; padding ids, which occur in no text, stay random."""
    table = random_table(
        num_experts=config.num_moe_experts, vocab_size=config.hash_vocab_size, seed=config.hash_seed
    )
    if (experts := config.balanced_experts) is not None:
        table[: len(experts)] = experts
    return table


class HashRouter(MegatronTokenRouter):
    """See the top of the file."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.weight = None  # Megatron's base class makes one
        self.register_buffer("table", _first_table(config))
        self.token_ids = Handed()
        """<int64>[B, T] of the micro-batch."""

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See MegatronTokenRouter.forward.

        Raises:
            ValueError: the model was called without token ids.
        """
        ids = self.token_ids.take()
        if ids is None:
            raise ValueError("--token-router hash routes by token ids: call the model with them")
        wanted = self.table[ids.T.flatten()][:, None]
        every = torch.ones_like(wanted, dtype=torch.bool)
        self.count(Choices(wanted, every, every), every.float())
        rows = self.own_rows(input.shape[0] * input.shape[1])
        weights = self.weigh(every[rows].float(), wanted[rows])
        return as_megatron(weights, wanted[rows], every[rows], self.num_experts)

    def weigh(self, scores: Tensor, wanted: Tensor) -> Tensor:
        """Return 1; there are no scores."""
        return torch.ones_like(wanted, dtype=torch.float32)

    @property
    def has_z_loss(self) -> bool:
        return False

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Allow another layout to pad the table to another length: no id lies in the padding."""
        state = super().sharded_state_dict(*args, **kwargs)
        for entry in state.values():
            entry.allow_shape_mismatch = True
        return state


def attach_token_ids(model: nn.Module) -> None:
    """Hand the input of each call to every router of this model, or pipeline stage, that has
    `token_ids`."""
    readers = [
        module.token_ids
        for module in model.modules()
        if isinstance(getattr(module, "token_ids", None), Handed)
    ]

    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for token_ids in readers:
            token_ids.hand(args[0] if args else kwargs["input_ids"])

    if readers:
        model.register_forward_pre_hook(give, with_kwargs=True)
