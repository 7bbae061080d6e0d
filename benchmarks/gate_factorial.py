#!/usr/bin/env python3
"""Study why BASE's gates close: sMLP by width, experts' width and rate, expert by expert.

    .venv/bin/python benchmarks/gate_factorial.py --data runs/study-data --csv gates.csv \\
        --run D256-Z1536-0.004 -- --hidden-size 256 --moe-ffn-hidden-size 1536 --lr 0.004

trains configs/cpu's deterministic sMLP by the recipe of studies/cpu.yaml, overridden by the flags
after `--`, and appends rows to the file, one per expert of each token router every 25 steps:

    tokens    number of the micro-batch's tokens that came to the expert
    shift     c_e = w_e . mean of x over the micro-batch, part of the score of every token
    closed    share of the tokens whose gate is under 0.01
    pull      mean over its tokens of <g_i, f_e(h_i)> = dL/dgate_i, in nats: above 0 it closes gates
    tug       mean over its tokens of |<g_i, f_e(h_i)>|: |pull| / tug is how far they agree
    w_norm    |w_e|
    x_norm    root of the mean of |x|^2 over the micro-batch; mean_norm: |mean of x|

x is what the router reads. The data are those of examples/study_data.sh.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron_smlp.routers.collapse import CLOSED_GATE
from megatron_smlp.training.events import Listener, Outcome

if TYPE_CHECKING:
    from megatron_smlp.training.parts import Parts

ROOT = Path(__file__).resolve().parents[1]
EVERY = 25
RECIPE = (
    "--config {root}/configs/cpu/smlp_deterministic.yaml --bf16 --micro-batch-size 16 --lr 0.004 "
    "--seed 11 --train-iters 305 --lr-warmup-iters 100 --lr-decay-style constant "
    "--eval-iters 20 --eval-interval 305 --log-interval 25 --tokenizer-type HuggingFaceTokenizer "
    "--tokenizer-model {data}/tokenizer --train-data-path {data}/train_text_document "
    "--valid-data-path {data}/valid_text_document --save-interval 100000"
)


class Looking(Listener):
    """A listener of the training loop that records what the token routers do."""

    def __init__(self, run: str, path: Path) -> None:
        self.run, self.path = run, path
        self.iteration = 1
        self.rows: list[dict[str, Any]] = []

    def built(self, parts: Parts) -> None:
        for module in parts.model[0].modules():
            if getattr(module, "router_kind", "") == "token":
                module.register_forward_hook(self.look)

    def stepped(self, outcome: Outcome) -> None:
        self.iteration = outcome.iteration + 1
        self.write()

    def look(self, router: Any, inputs: Any, outputs: Any) -> None:
        """After a router's forward, keep what is known; read the pull once the backward has it."""
        if router.training and self.iteration % EVERY == 0:
            x = inputs[0].detach().flatten(0, 1).float()
            probs, routing_map = outputs
            values = probs.detach()  # a hook that holds its own tensor is never collected
            probs.register_hook(
                lambda gradient: self.keep(router, x, values, routing_map, gradient)
            )

    def keep(
        self, router: Any, x: torch.Tensor, probs: torch.Tensor, sent: Any, pull: torch.Tensor
    ) -> None:
        """x: <fp32>[N, D]; probs, pull: <fp32>[N, E]; sent: <bool>[N, E]."""
        mean, weight = x.mean(dim=0), router.weight.detach().float()
        pull = pull.double() * len(x)  # of a token's own loss: the batch's loss is the mean
        for expert in range(router.num_experts):
            mine = sent[:, expert]
            gates, pulls = probs[mine, expert], pull[mine, expert]
            self.rows.append(
                {
                    "run": self.run,
                    "iteration": self.iteration,
                    "layer": router.layer_number,
                    "expert": expert,
                    "tokens": int(mine.sum()),
                    "shift": float(weight[expert] @ mean),
                    "closed": float((gates < CLOSED_GATE).float().mean()),
                    "pull": float(pulls.mean()),
                    "tug": float(pulls.abs().mean()),
                    "w_norm": float(weight[expert].norm()),
                    "x_norm": float(x.square().sum(dim=1).mean().sqrt()),
                    "mean_norm": float(mean.norm()),
                }
            )

    def write(self) -> None:
        if not self.rows:
            return
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0], lineterminator="\n")
            if is_new:
                writer.writeheader()
            for row in self.rows:
                values = row.items()
                writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values})
        self.rows.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of study_data.sh")
    parser.add_argument("--csv", type=Path, required=True, help="rows are added here")
    parser.add_argument("--run", required=True, help="its name in the rows, and of its folder")
    parser.add_argument("flags", nargs="*", help="of pretrain_smlp.py, after --")
    arguments = parser.parse_args()

    from megatron_smlp import plugin_files
    from megatron_smlp.training.captured_output import CapturedOutput
    from pretrain_smlp import patched_arguments, train

    recipe = RECIPE.format(root=ROOT, data=arguments.data.resolve()).split()
    folder = ROOT / "runs/gates" / arguments.run
    with CapturedOutput() as output:
        flags = plugin_files.load_named([*recipe, "--log-dir", str(folder), *arguments.flags])
        args = patched_arguments(flags)
        output.open(args.log_dir, rank=args.rank)
        train(args, listeners=[Looking(arguments.run, arguments.csv)])


if __name__ == "__main__":
    main()
