"""Folders with a small model and a tokenizer, as the text tools take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.conversions import save_exported
from support.smlp_systems import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_smlp.generation.language_model import LanguageModel

END = "<|endoftext|>"


def save_tokenizer(folder: Path, *, entries: int = 257) -> int:
    """Save a Hugging Face tokenizer of bytes and an end-of-document token; return its size.

    Args:
        entries: 257 or more; the additional ones are names that no text is tokenized into.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet += [f"<{number}>" for number in range(len(alphabet), entries - 1)]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return int(backend.get_vocab_size())


def strings(folder: Path) -> str:
    """Return flags of such a tokenizer, which the input that hashes tokens' strings needs."""
    save_tokenizer(folder)
    return f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}"


@torch.no_grad()
def greedy(lm: LanguageModel, ids: Sequence[int], count: int) -> list[int]:
    """Return the likeliest tokens after `ids`, up to an end, by a full forward pass for each."""
    new: list[int] = []
    while len(new) < count and lm.end not in new:
        logits = lm.model(torch.tensor([[*ids, *new]])).logits[0, -1]
        logits[lm.padding_ids] = -torch.inf
        new.append(int(logits.argmax()))
    return new


def save_language_model(folder: Path, system: str, **changes: Any) -> Path:
    """Save an exported folder of a system of support/smlp_systems.py, with a padded vocabulary."""
    entries = save_tokenizer(folder / "tokenizer")
    model = make_model(system, vocab_size=entries + 7, unpadded_vocab_size=entries, **changes)
    save_exported(model, folder / "hf")
    save_tokenizer(folder / "hf")
    return folder / "hf"
