"""The command line of `tools/train_tokenizer.py`: a byte-level BPE tokenizer from text."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_smlp.command_line import Parser
from megatron_smlp.durable import write_durably
from megatron_smlp.errors import DataError

if TYPE_CHECKING:
    import tokenizers

EOD = "<|endoftext|>"
PIECE_CHARACTERS = 1 << 16


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Train a byte-level BPE tokenizer (GPT-2's kind) on text.", allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY")
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="ENTRIES", help=f"with {EOD}; 257 or more"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    parser.add_argument(
        "--max-bytes",
        type=float,
        default=1e9,
        metavar="BYTES",
        help="text to learn from; more costs memory for little gain (default 1e9)",
    )
    parser.add_argument("--on-error", choices=["raise", "skip"], default="raise")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train on the texts of --input, and write the folder --output.

    Raises:
        DataError: bad input, text for another size only, or a tokenizer that already exists.
    """
    args = build_parser().parse_args(argv)
    if (Path(args.output) / "tokenizer.json").exists() and not args.overwrite:
        raise DataError(
            f"--output {args.output} already has a tokenizer; give --overwrite to replace it, or "
            "another folder"
        )
    tokenizer = _train(_pieces(args), args.vocab_size)
    learned = tokenizer.get_vocab_size()
    if learned != args.vocab_size:
        raise DataError(
            f"--vocab-size {args.vocab_size}: the input yields {learned} entries; give more text "
            f"or --vocab-size {learned}"
        )
    _write_folder(tokenizer, Path(args.output))
    end = f"end of document {EOD!r} = {tokenizer.token_to_id(EOD)}"
    print(f"{args.output}: {learned:,} entries, {end}")


def _train(texts: Iterator[str], vocab_size: int) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stdout.isatty(),  # in a log file its bars are blank lines
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def _pieces(args: argparse.Namespace) -> Iterator[str]:
    """Yield --max-bytes of text from the start of the input, cut at line ends: the trainer works in
    parallel over small pieces, but not within one book."""
    from megatron_smlp.data.prepare.inputs import find_inputs
    from megatron_smlp.data.prepare.records import Rejection, parse_chunk, remedy
    from megatron_smlp.data.prepare.sources import read_chunks

    size, most, keys = 0, int(args.max_bytes), args.json_keys
    for chunk in read_chunks(find_inputs(args.input), keys=keys):
        for record in parse_chunk(chunk, keys):
            if isinstance(record, Rejection):
                if args.on_error == "raise":
                    raise DataError(f"{record} [{record.reason}] ({remedy(keys)})")
                continue
            for piece in (piece for text in record[1] for piece in _cut(text)):
                raw = piece.encode()[: most - size]
                yield raw.decode(errors="ignore")
                size += len(raw)
                if size >= most:
                    return


def _cut(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARACTERS)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end


def _write_folder(tokenizer: "tokenizers.Tokenizer", folder: Path) -> None:
    """Write the files that `transformers.AutoTokenizer.from_pretrained` reads offline."""
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOD,
        "eos_token": EOD,
        "unk_token": EOD,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        # The training data cuts documents, not the tokenizer.
        "model_max_length": int(1e30),
    }
    text = json.dumps(config, indent=2) + "\n"
    write_durably(folder / "tokenizer_config.json", text)
