"""Hugging Face's byte-pair tokenizers: folders, and GPT-2's `vocab.json`/`merges.txt`.

Both become the text of a `tokenizer.json`. `gigatoken` encodes with it if it supports the tokenizer
and agrees with `tokenizers` on a probe; otherwise `tokenizers` does.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_smlp.data.tokenizers.gigatoken_encoder import gigatoken_in_place_of
from megatron_smlp.data.tokenizers.ids import join_ids
from megatron_smlp.data.tokenizers.spec import (
    Encoder,
    TokenizerSpec,
    UnencodableTextError,
    WithTexts,
)
from megatron_smlp.errors import DataError
from megatron_smlp.signals import is_interruption

if TYPE_CHECKING:
    import tokenizers

# Classes that `transformers` loads from tokenizer.json as it is; every other class may rebuild the
# pipeline in its own Python code, which only `transformers` itself knows.
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Settings with which `transformers` overrides tokenizer.json.
PIPELINE_KEYS = ("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens")
GPT2_EOD = "<|endoftext|>"


@dataclass(frozen=True)
class HuggingFaceTokenizer(WithTexts):
    """A tokenizer as the text of its `tokenizer.json`."""

    tokenizer_json: str
    eod: int | None
    add_special_tokens: bool
    description: str = field(default="tokenizers", repr=False)

    @cached_property
    def backend(self) -> "tokenizers.Tokenizer":
        return _load(self.tokenizer_json)

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def entries(self) -> list[tuple[int, bytes]]:
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return [(number, token.encode()) for token, number in vocabulary.items()]

    @property
    def start(self) -> list[int]:
        """Special ids that it puts before a text, whether or not `add_special_tokens` is set."""
        return _surrounding_ids(self.backend)[0]

    def build(self) -> Encoder:
        prefix, suffix = _surrounding_ids(self.backend) if self.add_special_tokens else ([], [])
        return gigatoken_in_place_of(
            self,
            lambda gigatoken: gigatoken.Tokenizer.from_json(self.tokenizer_json),
            pieces=[token.content for token in self.backend.get_added_tokens_decoder().values()],
            prefix=prefix,
            suffix=suffix,
        )

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        try:
            encodings = self.backend.encode_batch_fast(
                list(texts), add_special_tokens=self.add_special_tokens
            )
        except Exception as error:  # of no class of its own: no unknown token, for one
            if is_interruption(error):
                raise KeyboardInterrupt from error
            raise UnencodableTextError(str(error)) from error
        return join_ids([encoding.ids for encoding in encodings])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=False))


def _surrounding_ids(backend: "tokenizers.Tokenizer") -> tuple[list[int], list[int]]:
    """Return the special ids that the tokenizer's template puts before and after each text."""
    text = probe(backend.get_vocab())
    bare, whole = (backend.encode(text, add_special_tokens=adds).ids for adds in (False, True))
    return surroundings(bare, whole)


def probe(vocabulary: Iterable[str]) -> str:
    """Return a text that a tokenizer of this vocabulary encodes to something."""
    return next((text for text in vocabulary if text.isalnum()), "a")


def surroundings(bare: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """Return the ids before and after a text's own; without any of its own, all stand before.

    Args:
        bare: ids of a text alone.
        whole: ids of the text with those that a template adds.

    Raises:
        DataError: `bare` is not in `whole`.
    """
    if not bare:
        return whole, []
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise DataError("the tokenizer's template rewrites the text itself")


def _load(tokenizer_json: str) -> "tokenizers.Tokenizer":
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    # The library raises plain `Exception` for every fault.
    except Exception as error:
        raise DataError(f"the tokenizer.json is not readable: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def from_gpt2_files(spec: TokenizerSpec) -> HuggingFaceTokenizer:
    """Return GPT-2's byte-level BPE, as Megatron's `GPT2BPETokenizer` builds it."""
    import tokenizers

    vocab, merges = spec.existing_file("vocab_file"), spec.existing_file("merge_file")
    try:
        model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:
        raise DataError(f"--vocab-file {vocab} and --merge-file {merges}: {error}") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([GPT2_EOD, *spec.tokenizer_special_tokens])
    return HuggingFaceTokenizer(backend.to_str(), backend.token_to_id(GPT2_EOD), False)


def from_hub_or_folder(spec: TokenizerSpec) -> HuggingFaceTokenizer:
    """Read `--tokenizer-model`: a folder, or a name in `transformers`' cache or on the Hub."""
    name = spec.tokenizer_model
    if name is None:
        raise DataError("--tokenizer-type HuggingFaceTokenizer needs --tokenizer-model FOLDER")
    folder = Path(name)
    include = not spec.tokenizer_hf_no_include_special_tokens
    if folder.is_dir() and not spec.tokenizer_special_tokens:
        direct = _read_generic_folder(folder)
        if direct is not None:
            return HuggingFaceTokenizer(*direct, include)
    return HuggingFaceTokenizer(*_ask_transformers(spec), include)


def _read_generic_folder(folder: Path) -> tuple[str, int | None] | None:
    """Return (tokenizer.json, eod), or None if only `transformers` knows them."""
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if "added_tokens_decoder" not in config and (folder / "special_tokens_map.json").is_file():
        return None  # which may override the configuration
    changes_pipeline = any(config.get(name) for name in PIPELINE_KEYS)
    if config.get("tokenizer_class") not in GENERIC_CLASSES or changes_pipeline:
        return None
    backend = _load(text)
    if any(backend.token_to_id(token) is None for token in _named_tokens(config)):
        return None  # They would be appended to the vocabulary.
    # Megatron falls back to sep_token if eos_token is missing.
    eos = config.get("eos_token") or config.get("sep_token")
    return text, backend.token_to_id(_content(eos)) if eos else None


def _named_tokens(config: dict[str, Any]) -> list[str]:
    """Return every token that the configuration names."""
    named = [value for name, value in config.items() if name.endswith("_token") and value]
    lists = (config.get(f"{kind}_special_tokens") or () for kind in ("additional", "extra"))
    listed = itertools.chain.from_iterable(lists)
    added = (config.get("added_tokens_decoder") or {}).values()
    return [_content(token) for token in (*named, *listed, *added)]


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


# In a separate process, with torch hidden: importing torch takes longer than the tokenizer, and
# in this process `transformers` would go on believing that there is no torch.
_TRANSFORMERS_PROGRAM = """
import json, sys
sys.modules["torch"] = None
from transformers import AutoTokenizer
name, trust, special = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=trust)
if special:
    tokenizer.add_special_tokens({"additional_special_tokens": special})
eos = tokenizer.eos_token or tokenizer.sep_token
answer = {
    "json": tokenizer.backend_tokenizer.to_str(),
    "eod": None if eos is None else tokenizer.convert_tokens_to_ids(eos),
}
json.dump(answer, sys.stdout)
"""


def _ask_transformers(spec: TokenizerSpec) -> tuple[str, int | None]:
    name = spec.tokenizer_model
    request = json.dumps([name, spec.trust_remote_code, list(spec.tokenizer_special_tokens)])
    done = subprocess.run(
        [sys.executable, "-c", _TRANSFORMERS_PROGRAM],
        input=request,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no reason given"
        place = "" if Path(str(name)).exists() else "no such folder exists, and "
        raise DataError(
            f"--tokenizer-model {name}: {place}transformers cannot load it ({reason}); give a "
            f"folder with tokenizer.json and tokenizer_config.json"
        )
    answer = json.loads(done.stdout)
    return answer["json"], answer["eod"]
