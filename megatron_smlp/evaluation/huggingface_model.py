"""lm-evaluation-harness's own `hf` model on an exported folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing

from megatron_smlp.data.tokenizers.huggingface import probe, surroundings
from megatron_smlp.evaluation.harness import Request
from megatron_smlp.generation.language_model import check_with_tokenizer


class ExportedModel(HFLM):
    """`--model hf` on a local folder.

    Args:
        dtype: the compute dtype; "auto": the dtype of the stored weights.

    Raises:
        UsageError: the folder contains no model or no tokenizer.
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
        start = _without_end(self.tokenizer)
        # Training documents followed an end of document, not a BOS that is merely defined.
        self.custom_prefix_token_id = start[-1] if start else self.tokenizer.eos_token_id

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm or not sys.stderr.isatty())

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return super().generate_until(requests, disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: list[Request], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Truncate options, then score as the base class does, which truncates only contexts."""
        most = int(self.max_length)
        cut = [
            (key, context, option)
            if len(option) <= most
            else (key, option[-most - 1 : -most], option[-most:])
            for key, context, option in requests
        ]
        return super()._loglikelihood_tokens(cut, *args, **kwargs)


def _without_end(tokenizer: Any) -> list[int]:
    """Let a tokenizer put nothing after a text, which is to be continued; return the ids that it
    puts before one."""
    text = probe(tokenizer.get_vocab())
    bare, whole = (tokenizer.encode(text, add_special_tokens=adds) for adds in (False, True))
    start, end = surroundings(bare, whole)
    if end:
        tokens = tokenizer.convert_ids_to_tokens(start)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*tokens, "$A"], special_tokens=list(zip(tokens, start, strict=True))
        )
    return start
