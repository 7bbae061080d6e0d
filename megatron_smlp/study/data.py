"""The data of a study: one folder, made by `examples/study_data.sh`, and its checksums.

tokenizer/                        a Hugging Face tokenizer
train_text_document.bin, .idx     the training data
valid_text_document.bin, .idx     read by every evaluation; has no document of the training data
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
    """The data folder, whose files are read lazily."""

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
        """Check that the tokenizer has the vocabulary size that the study counts FLOPs for.

        Raises:
            UsageError: they differ; the message has both numbers.
        """
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / TOKENIZER / "tokenizer.json"))
        if (own := tokenizer.get_vocab_size()) != size:
            raise UsageError(
                f"vocab-size {size:,} of the study, but the tokenizer of --data {self.folder} has "
                f"{own:,} entries: make data with VOCABULARY={size} examples/study_data.sh."
            )

    def contents(self) -> dict[str, str]:
        """Return the checksum of each dataset and of the tokenizer.

        Raises:
            UsageError: a file is missing or cannot be read.
        """
        try:
            content = {split: content_of(self.prefix(split)) for split in SPLITS}
            files = sorted(path for path in (self.folder / TOKENIZER).iterdir() if path.is_file())
            digest = hashlib.sha256()
            for file in files:
                digest.update(file.name.encode() + file.read_bytes())
        except OSError as error:
            raise UsageError(
                f"--data {self.folder}: {error.filename}: {error.strerror}: give a folder made "
                "by examples/study_data.sh."
            ) from error
        return content | {TOKENIZER: digest.hexdigest()}
