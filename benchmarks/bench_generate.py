"""Time token-by-token generation with the cache, against doing without it and against GPT-2's.

`GPT-2`: transformers' own of the same width, depth and vocabulary, with its key-value cache.
`recompute`: a forward over everything so far for each new token. All of these would take minutes,
so one is timed at the end of every second block of --block tokens, and counts for 2 x --block.

After a prompt of half the length, the sides take turns generating the other half, one block each in
alternating order, so that a slow phase of the machine affects all of them. Both models run in the
same greedy loop over `forward`, so that `generate`'s own work per token, the same for both, does
not hide the difference. Figures are milliseconds per new token, without the prompt.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import Record, benchmark_parser, report
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM

VOCABULARY = 8192
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
    "transformer switch": {
        "architecture": "transformer",
        "num_experts": 4,
        "token_router": "switch",
    },
}


def build(changes: dict[str, Any], *, hidden: int, layers: int, length: int) -> SMLPForCausalLM:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": length,
        "hidden_size": hidden,
        "ffn_hidden_size": 4 * hidden,
        "num_layers": layers,
        "num_attention_heads": hidden // 64,
        "moe_ffn_hidden_size": 4 * hidden,
    }
    if changes["architecture"] == "smlp":
        sizes["num_dense_layers"] = layers // 2
    return SMLPForCausalLM(SMLPConfig(**{**sizes, **changes})).eval()


def build_gpt2(*, hidden: int, layers: int, length: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=length,
        n_embd=hidden,
        n_layer=layers,
        n_head=hidden // 64,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


class Greedy:
    """Generates greedily after a prompt, one token at a time."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model = model
        self.output = model(prompt, use_cache=True)

    def generate(self, steps: int) -> None:
        for _ in range(steps):
            token = self.output.logits[:, -1].argmax(dim=-1, keepdim=True)
            self.output = self.model(token, use_cache=True, cache=self.output.cache)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(ours: Any, gpt2: Any, ids: Tensor, *, block: int) -> dict[str, float]:
    """Return milliseconds per new token of each side; ids: <int64>[1, T], half the prompt."""
    length = ids.shape[1]
    prompt = ids[:, : length // 2]
    for model in (ours, gpt2):
        Greedy(model, prompt).generate(4)  # the first calls of a process are slow
    sides = {"ours": Greedy(ours, prompt), "gpt2": Greedy(gpt2, prompt)}
    total = dict.fromkeys((*sides, "recompute"), 0.0)
    order = list(sides)
    for _ in range(length // 2, length, block):
        for name in order:
            total[name] += seconds(lambda name=name: sides[name].generate(block))
        order.reverse()
    for start in range(length // 2, length, 2 * block):
        seen = ids[:, : start + block]
        once = seconds(lambda seen=seen: ours(seen, use_cache=False, logits_to_keep=1))
        total["recompute"] += 2 * block * once
    return {name: 1e3 * spent / (length - length // 2) for name, spent in total.items()}


def record(case: str, ours_ms: float, peer_ms: float) -> Record:
    return Record(case=case, ours_ms=ours_ms, peer_ms=peer_ms, ratio=peer_ms / ours_ms)


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=1, of="runs per system; their median")
    parser.add_argument("--hidden", type=int, default=512, help="width of all models")
    parser.add_argument("--layers", type=int, default=8, help="depth of all models")
    parser.add_argument("--length", type=int, default=1024, help="T; half of it is the prompt")
    parser.add_argument(
        "--block", type=int, default=64, help="tokens a turn; T is a multiple of 4 x this"
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sizes = {name: getattr(arguments, name) for name in ("hidden", "layers", "length")}
    ids = torch.randint(VOCABULARY, (1, arguments.length))
    gpt2 = build_gpt2(**sizes)
    records = []
    for name in arguments.systems:
        model = build(SYSTEMS[name], **sizes)
        runs = [measure(model, gpt2, ids, block=arguments.block) for _ in range(arguments.repeats)]
        ours, peer, without = (
            statistics.median(run[side] for run in runs) for side in ("ours", "gpt2", "recompute")
        )
        about = f"D={arguments.hidden} L={arguments.layers} T={arguments.length}"
        case = f"{name} {about} {arguments.threads} threads"
        records += [
            record(f"{case}, GPT-2", ours, peer),
            record(f"{case}, recompute", ours, without),
        ]
    report(records, arguments.json)


if __name__ == "__main__":
    main()
