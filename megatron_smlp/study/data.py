"""The data of a study: one folder that `examples/study_data.sh` makes, and its checksums.

tokenizer/                        of Hugging Face's kind
train_text_document.bin, .idx     what is trained on
valid_text_document.bin, .idx     what every evaluation reads; no document of it is in the other
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from megatron_smlp.data.pairs.content import content_of
from megatron_smlp.errors import UsageError

SPLITS = ("train", "valid")
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class StudyData:
    """The folder; its files are looked at when they are asked for."""

    folder: Path

    def prefix(self, split: str) -> str:
        return str(self.folder.absolute() / f"{split}_text_document")

    @property
    def flags(self) -> list[str]:
        named = [word for split in SPLITS for word in (f"--{split}-data-path", self.prefix(split))]
        tokenizer = str(self.folder.absolute() / TOKENIZER)
        kind = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
        return [*named, *kind]

    def check_vocabulary(self, size: int) -> None:
        """Check that the tokenizer has as many entries as the study counts FLOPs for.

        Raises:
            UsageError: with both numbers.
        """
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / TOKENIZER / "tokenizer.json"))
        if (own := tokenizer.get_vocab_size()) != size:
            raise UsageError(
                f"vocab-size {size:,} of the study, and the tokenizer of --data {self.folder} has "
                f"{own:,} entries: make data with VOCABULARY={size} examples/study_data.sh."
            )

    def contents(self) -> dict[str, str]:
        """Return the checksum of each dataset and of the tokenizer.

        Raises:
            UsageError: something is missing.
        """
        try:
            content = {split: content_of(self.prefix(split)) for split in SPLITS}
            files = sorted(path for path in (self.folder / TOKENIZER).iterdir() if path.is_file())
            digest = hashlib.sha256()
            for file in files:
                digest.update(file.name.encode() + file.read_bytes())
        except OSError as error:
            raise UsageError(
                f"--data {self.folder}: {error.filename}: {error.strerror}: give a folder that "
                "examples/study_data.sh made."
            ) from error
        return content | {TOKENIZER: digest.hexdigest()}
