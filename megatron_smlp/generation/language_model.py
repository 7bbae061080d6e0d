"""Load a model with its tokenizer, ready to generate: from a checkpoint or an exported folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smlp.data.tokenizers.factory import bare, resolve_for, start_of
from megatron_smlp.data.tokenizers.folder import recorded_tokenizer, tokenizer_in
from megatron_smlp.data.tokenizers.spec import Encoder, Tokenizer, TokenizerSpec, named_or_moved
from megatron_smlp.errors import UsageError

COLDEST = 1e-30
"""Lowest temperature: logits divided by less than this overflow, and so close to 0 the likeliest
token is drawn anyway."""


@dataclass(frozen=True)
class LanguageModel:
    """Text in, text out."""

    model: Any
    """A transformers model with `generate`, in evaluation mode."""
    tokenizer: Encoder
    end: int | None
    """Id of the end-of-document token."""
    name: str
    start: tuple[int, ...] = ()
    """Ids to prepend to each text, as in training."""

    @property
    def longest(self) -> int:
        """T, the number of positions that the model has."""
        return int(self.model.config.max_position_embeddings)

    @property
    def ends(self) -> list[int]:
        """Ids that end generation: `end`, and any others that the model's folder names."""
        named = self.model.generation_config.eos_token_id
        others = named if isinstance(named, list) else [named]
        return sorted({number for number in (self.end, *others) if number is not None})

    @property
    def vocab_size(self) -> int:
        """V, padding included."""
        return int(self.model.config.vocab_size)

    @property
    def padding_ids(self) -> list[int]:
        """Ids of the vocabulary's padding, which occur in no text."""
        from megatron_smlp.conversion.huggingface import padding_of

        suppressed = self.model.generation_config.suppress_tokens or []
        return sorted({*padding_of(self.model.config), *suppressed})

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, preceded by `start`."""
        return [*self.start, *self.tokenizer.encode_batch([text])[0].tolist()]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def continuation(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """Return the text of `new` after `prompt`; some tokenizers put a space between them."""
        return self.decode([*prompt, *new])[len(self.decode(prompt)) :]


def load(options: argparse.Namespace) -> LanguageModel:
    """Load the model that --checkpoint or --hf names, on --device and in --dtype.

    Raises:
        UsageError: the folder is neither, or the tokenizer is missing or not the model's.
    """
    model, tokenizer, start = model_and_tokenizer(options)
    folder = Path(options.hf or options.checkpoint)
    name = getattr(options, "model_name", None) or folder.resolve().name
    return LanguageModel(model, tokenizer.build(), tokenizer.eod, name, start)


def model_and_tokenizer(options: argparse.Namespace) -> tuple[Any, Tokenizer, tuple[int, ...]]:
    """Load as `load` does: the model, a tokenizer not yet built, and the ids before a text."""
    device = usable_device(options.device)
    model, spec, source = _exported(options) if options.hf else _trained(options)
    spec = named_or_moved(options, spec)
    if spec is None:
        raise UsageError(f"{source} has no tokenizer: give --tokenizer-model FOLDER")
    own_entries = getattr(model.config, "unpadded_vocab_size", None)
    if getattr(options, "tokenizer_hf_no_include_special_tokens", False):
        spec = bare(spec)
    tokenizer = resolve_for(
        spec, source=source, entries=own_entries or model.config.vocab_size,
        may_be_smaller=own_entries is None,
    )  # fmt: skip
    return model.to(device), tokenizer, tuple(start_of(tokenizer, spec))


def _trained(options: argparse.Namespace) -> tuple[Any, TokenizerSpec | None, str]:
    from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint

    checkpoint = TorchDistCheckpoint(options.checkpoint, iteration=options.ckpt_step)
    spec = recorded_tokenizer(checkpoint.args, trusts=options.trust_remote_code)
    model = model_of(checkpoint)
    if options.dtype != "auto":
        import torch

        model = model.to(getattr(torch, options.dtype))
    return model, spec, f"--checkpoint {options.checkpoint}"


def model_of(checkpoint: Any) -> Any:
    """Convert a `TorchDistCheckpoint` of any layout to a Hugging Face model, in memory."""
    from megatron_smlp.checkpoints.tensors import main_dtype
    from megatron_smlp.conversion import huggingface
    from megatron_smlp.conversion.recipes import Converted

    config = huggingface.config_of(checkpoint.flags)
    model = huggingface.build(config)
    plan = huggingface.TENSORS.export_plan(checkpoint.specs, checkpoint.flags)
    expected = huggingface.expected_shapes(model)
    converted = Converted(plan, checkpoint, expected, where=str(checkpoint.folder))
    # `Converted` has checked the names; only a tied output layer is not among them.
    tensors = {name: converted.read(name) for name in converted.specs}
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    model.generation_config = huggingface.generation_config(config)
    return model.to(main_dtype(converted.specs)).eval()


def _exported(options: argparse.Namespace) -> tuple[Any, TokenizerSpec | None, str]:
    from transformers import AutoModelForCausalLM, GenerationConfig

    from megatron_smlp.conversion.huggingface import (
        MODEL_TYPE,
        check_folder,
        find_padding,
        impossible,
    )

    folder = Path(options.hf)
    check_folder(folder)
    with impossible(f"--hf {folder} cannot be loaded"):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=options.dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if missing := sorted(loaded["missing_keys"]):
        raise UsageError(f"--hf {folder} lacks weights for {missing[0]}, which its model has.")
    noted = getattr(model.config, "unpadded_vocab_size", None)
    if noted and model.config.model_type != MODEL_TYPE:
        find_padding(model.config, folder, noted)
    # Its other settings, such as a repetition penalty, would apply without being asked for.
    names = ("eos_token_id", "suppress_tokens")
    model.generation_config = GenerationConfig(
        **{name: getattr(model.generation_config, name) for name in names}
    )
    return model.eval(), tokenizer_in(folder), f"--hf {folder}"


def check_with_tokenizer(folder: Path) -> None:
    """Check an exported folder that must provide its own tokenizer.

    Raises:
        UsageError: it contains no model or no tokenizer.
    """
    from megatron_smlp.conversion.huggingface import check_folder

    check_folder(folder)
    if tokenizer_in(folder) is None:
        raise UsageError(
            f"--hf {folder} has no tokenizer: convert with --tokenizer-model, or copy the "
            "tokenizer's files into it"
        )


def usable_device(name: str | None) -> str:
    """Return --device, or the GPU if there is one, after checking that it can hold a tensor.

    Raises:
        UsageError: it cannot.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0).to(name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return name
