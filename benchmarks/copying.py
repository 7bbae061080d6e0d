"""The copying task: which mixers can repeat what they read, and up to what length.

A sample is n random symbols, a delimiter and the same symbols again, n random in every batch; the
model is trained on the second half, and never sees a sample twice. Accuracy is the share of correct
symbols in fresh samples, at every n up to the longest in training, as the positions of all systems
here end at T.

CausalRN is made for this (Cui et al., arXiv 2406.16168). It is compared with gMLP, whose weights
depend on positions alone, and with the Transformer. The width of their FFN or gate gives all of
them the Transformer's number of parameters within 2 %. The models are those of an export
(megatron_smlp/hf), trained with AdamW on one thread.

    python benchmarks/copying.py --output runs/copying
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from megatron_smlp.hf.configuration_smlp import SMLPConfig  # noqa: E402
from megatron_smlp.hf.modeling_plugin import SMLPPluginForCausalLM as SMLPForCausalLM  # noqa: E402
from megatron_smlp.plugin_files import load  # noqa: E402

SYMBOLS = 16
DELIMITER = SYMBOLS
WIDTH, LAYERS = 64, 2
PLUGIN = ROOT / "plugins" / "causal_rn.py"


def causal_rn(kind: str) -> dict[str, Any]:
    options = {"causal_rn_kind": kind, "relation_width": 0}
    plugin = {"files": {}, "options": options, "layers": [["causal_rn", "mlp"]] * LAYERS}
    return {"architecture": "causal_rn", "plugin": plugin}


SYSTEMS: dict[str, dict[str, Any]] = {
    "transformer": {"architecture": "transformer", "num_attention_heads": 2},
    "gmlp": {"architecture": "gmlp"},
    "causal_rn_linear": causal_rn("linear"),
    "causal_rn_quadratic": causal_rn("quadratic"),
}


def sample(batch: int, length: int) -> Tensor:
    """Return <int64>[B, 2 n + 1]: n symbols, the delimiter, the symbols again."""
    symbols = torch.randint(SYMBOLS, (batch, length))
    return torch.cat([symbols, torch.full((batch, 1), DELIMITER), symbols], dim=1)


def config(system: str, *, longest: int, width: int) -> SMLPConfig:
    """Return the config of a model with `width` features in its FFN, or in its gate's halves."""
    if "plugin" in SYSTEMS[system]:
        load(str(PLUGIN))
    return SMLPConfig(
        vocab_size=SYMBOLS + 1,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        ffn_hidden_size=width,
        max_position_embeddings=2 * longest + 1,
        **SYSTEMS[system],
    )


def num_parameters(settings: SMLPConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in SMLPForCausalLM(settings).parameters())


def equal_config(system: str, *, longest: int) -> SMLPConfig:
    """Return the config of the width with as many parameters as the Transformer of width 4 D."""
    wanted = num_parameters(config("transformer", longest=longest, width=4 * WIDTH))
    small, large = (config(system, longest=longest, width=width) for width in (2, 102))
    per_unit = (num_parameters(large) - num_parameters(small)) / 100
    units = (wanted - num_parameters(small)) / per_unit
    return config(system, longest=longest, width=2 + 2 * round(units / 2))


def copied(model: SMLPForCausalLM, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of the second half, <fp32>[B, n, V], and its symbols, <int64>[B, n]."""
    length = samples.shape[1] // 2
    return model(samples[:, :-1]).logits[:, length:], samples[:, length + 1 :]


def train(
    settings: SMLPConfig, *, steps: int, batch: int, longest: int, lr: float
) -> SMLPForCausalLM:
    """Train on fresh samples of every length, with a linear warm-up and cosine decay."""
    torch.manual_seed(1)
    lengths = random.Random(1)
    model = SMLPForCausalLM(settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up)),
        ],
        milestones=[warm_up],
    )
    for _ in range(steps):
        logits, targets = copied(model, sample(batch, lengths.randint(1, longest)))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: SMLPForCausalLM, length: int) -> float:
    """Return the share of correct symbols over 256 samples of one length."""
    torch.manual_seed(length)
    logits, targets = copied(model, sample(256, length))
    return float((logits[..., :SYMBOLS].argmax(-1) == targets).float().mean())


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against length, one line per system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot(
        xlabel="symbols to copy", ylabel="accuracy", ylim=(0, 1.03), title="The copying task"
    )
    for system, result in results.items():
        lengths = sorted(map(int, result["accuracy"]))
        axes.plot(lengths, [result["accuracy"][str(n)] for n in lengths], label=system)
    axes.axhline(1 / SYMBOLS, color="grey", linestyle=":", label="chance")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--longest", type=int, default=16, help="symbols (default 16)")
    parser.add_argument("--steps", type=int, default=4000, help="(default 4000)")
    parser.add_argument("--batch", type=int, default=32, help="samples a step (default 32)")
    parser.add_argument("--lr", type=float, default=2e-3, help="(default 2e-3)")
    parser.add_argument("--output", type=Path, default=Path("runs/copying"), help="folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for system in options.systems:
        settings = equal_config(system, longest=options.longest)
        start = time.process_time()
        model = train(
            settings,
            steps=options.steps,
            batch=options.batch,
            longest=options.longest,
            lr=options.lr,
        )
        results[system] = {
            "parameters": num_parameters(settings),
            "width": settings.ffn_hidden_size,
            "cpu_seconds": round(time.process_time() - start, 1),
            "accuracy": {
                str(length): round(accuracy(model, length), 4)
                for length in range(1, options.longest + 1)
            },
        }
        shown = {n: f"{a:.3f}" for n, a in results[system]["accuracy"].items()}
        print(system, results[system]["parameters"], results[system]["cpu_seconds"], shown)
        (options.output / "copying.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, options.output / "copying.png")


if __name__ == "__main__":
    main()
