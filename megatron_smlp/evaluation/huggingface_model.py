"""lm-evaluation-harness's own `hf` model over an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from megatron_smlp.evaluation.harness import Request
from megatron_smlp.generation.language_model import check_with_tokenizer


class ExportedModel(HFLM):
    """`--model hf` on a local folder.

    Args:
        dtype: to compute in; "auto": what the weights are stored in.

    Raises:
        UsageError: the folder is not a model, or has no tokenizer.
    """

    def __init__(
        self, folder: str | Path, *, batch_size: int, device: str, dtype: str = "auto"
    ) -> None:
        folder = Path(folder)
        check_with_tokenizer(folder)
        super().__init__(
            pretrained=str(folder),
            trust_remote_code=False,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
        )
        if not self.tokenizer.encode(""):
            # Documents of the training began behind an end, not behind a token that is only named.
            self.custom_prefix_token_id = self.tokenizer.eos_token_id

    @property
    def longest(self) -> int:
        return int(self.max_length)

    def _loglikelihood_tokens(
        self, requests: list[Request], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score as the base class does, which cuts contexts, but no options."""
        most = self.longest
        cut = [
            (key, context, option)
            if len(option) <= most
            else (key, option[-most - 1 : -most], option[-most:])
            for key, context, option in requests
        ]
        return super()._loglikelihood_tokens(cut, *args, **kwargs)
