"""Generating token by token with the cache, against doing without it and against GPT-2's.

`recompute`: a forward over everything so far for each new token. Some steps are timed, at evenly
spaced lengths, and their mean is taken for all: the whole would take minutes.
`GPT-2`: transformers' own of the same width, depth and vocabulary, with its key-value cache, the
same loop and the same lengths.

Both sides are one greedy loop over `forward`, so that `generate`'s own work per token, which is the
same for both, does not hide the difference. A figure is milliseconds per new token.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from timing import Record, compare, report
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM

VOCABULARY = 8192
LONGEST, NEW = 1024, 512
SMLP = {
    "architecture": "smlp",
    "num_feature_experts": 4,
    "num_experts": 4,
    "token_router": "base",
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "gmlp": {"architecture": "gmlp"},
    "amlp": {"architecture": "amlp", "tiny_attention_width": 64},
    "smlp deterministic": {**SMLP, "feature_router": "deterministic"},
    "smlp partial": {**SMLP, "feature_router": "partial", "num_feature_chunks": 4},
}


def build(changes: dict[str, Any], *, hidden: int, layers: int) -> SMLPForCausalLM:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LONGEST,
        "hidden_size": hidden,
        "ffn_hidden_size": 4 * hidden,
        "num_layers": layers,
        "num_attention_heads": hidden // 64,
        "moe_ffn_hidden_size": 4 * hidden,
    }
    if changes["architecture"] == "smlp":
        sizes["num_dense_layers"] = layers // 2
    return SMLPForCausalLM(SMLPConfig(**{**sizes, **changes})).eval()


def build_gpt2(*, hidden: int, layers: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LONGEST,
        n_embd=hidden,
        n_layer=layers,
        n_head=hidden // 64,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


@torch.inference_mode()
def generate(model: Any, prompt: Tensor, *, steps: int, cache: str) -> list[int]:
    """Greedy, with the cache of earlier calls. prompt: <int64>[1, n]."""
    output = model(prompt, use_cache=True)
    tokens = []
    for _ in range(steps):
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens.append(int(token))
        output = model(token, use_cache=True, **{cache: output[cache]})
    return tokens


@torch.inference_mode()
def recompute(model: SMLPForCausalLM, ids: Tensor, lengths: range) -> None:
    """One forward per length, of which the last position's logits are made alone."""
    for length in lengths:
        model(ids[:, :length], use_cache=False, logits_to_keep=1).logits.argmax()


def per_token(record: Record, *, ours: int, peer: int) -> Record:
    """From milliseconds of so many tokens to those of one."""
    ours_ms, peer_ms = record["ours_ms"] / ours, record["peer_ms"] / peer
    return Record(case=record["case"], ours_ms=ours_ms, peer_ms=peer_ms, ratio=peer_ms / ours_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--repeats", type=int, default=3, help="calls per case and side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--hidden", type=int, default=512, help="width of all models")
    parser.add_argument("--layers", type=int, default=8, help="depth of all models")
    parser.add_argument("--samples", type=int, default=4, help="lengths at which to recompute")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sizes = {"hidden": arguments.hidden, "layers": arguments.layers}
    ids = torch.randint(VOCABULARY, (1, LONGEST))
    prompt = ids[:, : LONGEST - NEW]
    lengths = range(LONGEST - NEW, LONGEST, NEW // arguments.samples)
    gpt2 = build_gpt2(**sizes)
    steps = NEW - 1  # the last token needs no further forward
    records = []
    for name, changes in SYSTEMS.items():
        model = build(changes, **sizes)
        name = f"{name} D={arguments.hidden} L={arguments.layers} T={LONGEST}"
        against_gpt2 = compare(
            f"{name}, GPT-2",
            lambda model=model: generate(model, prompt, steps=steps, cache="cache"),
            lambda: generate(gpt2, prompt, steps=steps, cache="cache"),
            repeats=arguments.repeats,
        )
        again = compare(
            f"{name}, recompute",
            lambda model=model: generate(model, prompt, steps=steps, cache="cache"),
            lambda model=model: recompute(model, ids, lengths),
            repeats=arguments.repeats,
        )
        records.append(per_token(against_gpt2, ours=NEW, peer=NEW))
        records.append(per_token(again, ours=NEW, peer=len(lengths)))
    report(records, arguments.json)


if __name__ == "__main__":
    main()
