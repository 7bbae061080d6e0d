"""The tokenizer of an exported folder pads, and its model names the padding id."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import tokenizers
from support.beginning import begin_texts
from support.conversions import from_hf, run
from support.language_models import END, save_tokenizer
from support.smlp_systems import make_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from megatron_smlp.checkpoints.tensors import Spec
from megatron_smlp.checkpoints.torch_dist import TorchDistCheckpoint
from megatron_smlp.conversion import convert, llama
from megatron_smlp.conversion.huggingface import _add_tokenizer, write
from megatron_smlp.data.tokenizers.factory import read_tokenizer
from megatron_smlp.data.tokenizers.folder import recorded_tokenizer
from megatron_smlp.data.tokenizers.spec import TokenizerSpec, named_or_moved
from megatron_smlp.evaluation.huggingface_model import _without_end
from megatron_smlp.generation.cli import build_parser
from megatron_smlp.generation.language_model import load
from megatron_smlp.hf import SMLPConfig

PADDING = "<pad>"


@pytest.mark.parametrize("own", [False, True], ids=["end", "own"])
def test_texts_of_unlike_lengths_make_a_batch(tmp_path: Path, own: bool):
    """They are padded with the tokenizer's own padding token, or else with the end of document."""
    entries = save_tokenizer(tmp_path / "tokenizer")
    if own:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        tokenizer.add_special_tokens({"pad_token": PADDING})
        tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = SMLPConfig(vocab_size=entries + 8, max_position_embeddings=32)
    _add_tokenizer(config, str(tmp_path / "tokenizer"), tmp_path / "hf")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    batch = exported(["one", "a longer text"], padding=True, return_tensors="pt")
    expected = exported.convert_tokens_to_ids(PADDING if own else END)
    assert batch["input_ids"][0, -1] == expected == config.pad_token_id
    assert exported.eos_token_id == config.eos_token_id == exported.convert_tokens_to_ids(END)


def save_begins(folder: Path, **changes: str | None) -> None:
    """Save a tokenizer that puts <s> before each text; `changes` go to tokenizer_config.json."""
    begin = save_tokenizer(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<s>"])
    backend.save(str(folder / "tokenizer.json"))
    begin_texts(folder, begin)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"bos_token": "<s>"} | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value}))


@pytest.mark.parametrize(("is_bare", "special"), [(True, ()), (False, ("<user>", "<bot>"))])
def test_ids_are_those_of_the_run(tmp_path: Path, is_bare: bool, special: tuple[str, ...]):
    """Whatever the run's flags changed in the tokenizer, here and after another save."""
    save_begins(tmp_path / "tokenizer")
    flags = Namespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tmp_path / "tokenizer"),
        special_tokens=list(special),
        tokenizer_hf_no_include_special_tokens=is_bare,
    )
    spec = recorded_tokenizer(flags)
    assert spec is not None
    own = read_tokenizer(spec)
    config = SMLPConfig(vocab_size=own.vocab_size, max_position_embeddings=32)
    _add_tokenizer(config, str(tmp_path / "tokenizer"), tmp_path / "hf", spec)
    AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    text = "<user>a question<bot>an answer"
    for folder in ("hf", "again"):
        exported = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert len(exported) == own.vocab_size
        assert exported(text)["input_ids"] == own.build().encode_batch([text])[0].tolist()
        named = TokenizerSpec(
            tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / folder)
        )
        assert read_tokenizer(named).identity == own.identity
        assert exported.eos_token_id == own.eod == config.eos_token_id


def test_what_ends_documents_ends_them_in_the_export(tmp_path: Path):
    """Megatron uses the separator if a tokenizer has no end; a run on bytes ends with 0."""
    save_begins(tmp_path / "tokenizer", eos_token=None, sep_token=END)
    for kind, end in (("HuggingFaceTokenizer", END), ("ByteLevelTokenizer", "!")):
        spec = TokenizerSpec(
            tokenizer_type=kind, tokenizer_model=str(tmp_path / "tokenizer"), vocab_size=512
        )
        config = SMLPConfig(vocab_size=264, max_position_embeddings=32)
        _add_tokenizer(config, str(tmp_path / "tokenizer"), tmp_path / kind, spec)
        assert config.eos_token_id == config.pad_token_id == read_tokenizer(spec).eod
        assert AutoTokenizer.from_pretrained(tmp_path / kind).eos_token == end


def test_a_run_on_sentencepiece_has_nothing_before_its_texts_in_the_export(tmp_path: Path):
    """Megatron's other tokenizers add nothing, unlike the folder of the same vocabulary."""
    save_begins(tmp_path / "tokenizer")
    config = SMLPConfig(vocab_size=264, max_position_embeddings=32)
    spec = TokenizerSpec(tokenizer_type="SentencePieceTokenizer", tokenizer_model="absent")
    _add_tokenizer(config, str(tmp_path / "tokenizer"), tmp_path / "hf", spec)
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert exported.bos_token_id not in exported("a text")["input_ids"]
    moved = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="x")
    assert named_or_moved(moved, spec) == TokenizerSpec(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model="x",
        tokenizer_hf_no_include_special_tokens=True,
    )


def test_what_a_tokenizer_puts_after_a_text_is_not_scored(tmp_path: Path):
    """A text is continued: `[CLS] context option`, not `[CLS] context [SEP]`."""
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    bare = tokenizer.encode("a text", add_special_tokens=False)
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    for single, start in (("[CLS] $A [SEP]", [begin]), ("$A [SEP]", []), ("[CLS] $A", [begin])):
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[("[CLS]", begin), ("[SEP]", end)]
        )
        assert _without_end(tokenizer) == start
        assert tokenizer.encode("a text") == [*start, *bare]
        assert tokenizer(["a text"])["input_ids"] == [[*start, *bare]]


def save_llama(tmp_path: Path) -> tuple[Path, int]:
    """Write a Llama of 264 rows as `--to hf` does; return its folder and its tokenizer's size."""
    entries = save_tokenizer(tmp_path / "tokenizer")
    ours = make_model("modern", normalization="RMSNorm", vocab_size=264).config
    ours.unpadded_vocab_size = entries
    config = llama.exported(ours)
    state = LlamaForCausalLM(config).state_dict()
    tensors = {name: state[name] for name in state if name != "lm_head.weight"}
    specs = {name: Spec.of(tensor) for name, tensor in tensors.items()}
    folder = tmp_path / "hf"
    folder.mkdir()
    tokenizer = str(tmp_path / "tokenizer")
    write(folder, config, specs, tensors.items(), shard_limit=10**9, tokenizer=tokenizer)
    return folder, entries


def test_a_llama_trains_the_end_of_documents(tmp_path: Path):
    """A Llama's embedding never trains the row of the configuration's padding id."""
    folder, entries = save_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    assert model.model.embed_tokens.padding_idx is None
    assert model.config.eos_token_id == model.generation_config.pad_token_id == end
    # A model that is not ours would not notice a token in the place of padding.
    assert model.generation_config.suppress_tokens is None
    lm = load(build_parser().parse_args(["--hf", str(folder)]))
    assert lm.padding_ids == list(range(entries, 264))


@pytest.mark.parametrize("multiple", [None, 8])
def test_tokens_added_to_a_llama_are_no_padding(tmp_path: Path, multiple: int | None):
    """Its configuration still says how many there were before."""
    folder, entries = save_llama(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<user>", "<bot>"]})
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = model.resize_token_embeddings(entries + 2, multiple, mean_resizing=False).num_embeddings
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "tuned")
    lm = load(build_parser().parse_args(["--hf", str(tmp_path / "tuned")]))
    assert lm.padding_ids == list(range(entries + 2, rows))
    run(from_hf, tmp_path / "tuned", tmp_path / "run", checks=False)
    assert TorchDistCheckpoint(tmp_path / "run").flags["vocab_size"] == entries + 2


def test_special_ids_go_there_and_back(tmp_path: Path):
    """Also the list of a Llama with several end tokens, with and without a tokenizer."""
    ids = {"bos_token_id": 1, "eos_token_id": [2, 256], "pad_token_id": 4}
    theirs = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=16, **ids,
    )  # fmt: skip
    LlamaForCausalLM(theirs).save_pretrained(tmp_path / "llama")
    run(from_hf, tmp_path / "llama", tmp_path / "run", checks=False)
    run(convert.to_torch_dist, tmp_path / "run", tmp_path / "again", checks=False)
    run(convert.torch_dist_to_hf, tmp_path / "again", tmp_path / "back", checks=False)
    save_tokenizer(tmp_path / "tokenizer")
    named = {"tokenizer_model": str(tmp_path / "tokenizer"), "checks": False}
    run(convert.torch_dist_to_hf, tmp_path / "again", tmp_path / "named", **named)
    asked = GenerationConfig.from_pretrained(tmp_path / "back")
    assert {name: getattr(asked, name) for name in ids} == ids
    for folder in ("back", "named"):
        config = AutoConfig.from_pretrained(tmp_path / folder)
        assert config.eos_token_id == [2, 256]
        assert config.pad_token_id is None
