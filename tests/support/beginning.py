"""Tokenizers that prepend an id to each text."""

from pathlib import Path

import tokenizers


def begin_texts(folder: Path, number: int) -> None:
    """Make a folder's tokenizer prepend this id to each text, as Llama's prepends `<s>`."""
    path = str(folder / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(path)
    begin = backend.id_to_token(number)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, number)]
    )
    backend.save(path)
