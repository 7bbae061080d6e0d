"""lm-evaluation-harness's own `hf` model over an exported folder, with readable refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from megatron_smlp.errors import UsageError

Request = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation), and the token ids of both."""


def check_requests(requests: Sequence[Request], *, longest: int) -> None:
    """The continuation of every request must fit into the model; its context is cut to fit.

    Raises:
        UsageError: with the text, its tokens, and the model's length.
    """
    for (_, text), _, continuation in requests:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        if len(continuation) > longest:
            raise UsageError(
                f"the option {shown!r} has {len(continuation)} tokens and the model's sequences "
                f"end at {longest}: leave the example out, or evaluate a model with a longer "
                "--seq-length"
            )
        if not continuation:
            raise UsageError(
                f"the option {shown!r} has no tokens of its own: there is nothing to score"
            )


class ExportedModel(HFLM):
    """`--model hf` on a local folder.

    Raises:
        UsageError: the folder is no model, has no tokenizer, or one of another vocabulary.
    """

    def __init__(self, folder: str | Path, *, batch_size: int, device: str) -> None:
        _check_folder(Path(folder))
        super().__init__(
            pretrained=str(folder),
            trust_remote_code=True,
            batch_size=batch_size,
            device=device,
            dtype="auto",
        )
        entries, rows = len(self.tokenizer), self.model.config.vocab_size
        if entries > rows:
            raise UsageError(
                f"--hf {folder}: the tokenizer has {entries} entries and the model {rows}: they do "
                "not belong together"
            )

    def _loglikelihood_tokens(
        self, requests: list[Request], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        check_requests(requests, longest=self.max_length)
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return answers


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--hf {folder} has no config.json: give a folder that "
            "tools/convert_checkpoint.py wrote"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise UsageError(
            f"--hf {folder} has no tokenizer: convert with --tokenizer-model, or copy the "
            "tokenizer's files into it"
        )
