"""Checks by real runs of a tiny model on mock data: layouts, resumes, export.

Each run is a command that a user could type. One process writes a seed checkpoint; all layouts
continue from it, and their losses and gradient norms are compared.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_smlp.checking.rows import Check, Row, close
from megatron_smlp.launching.settings import ALONE
from megatron_smlp.plugin_texts import FLAG

SIZES = """
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32
    --micro-batch-size 2 --global-batch-size 8 --lr 2e-3 --lr-decay-style constant --seed 3
    --mock-data --tokenizer-type NullTokenizer --vocab-size 255 --split 9,1,0
    --eval-iters 0 --log-interval 1 --hidden-dropout 0 --attention-dropout 0 --num-workers 0
"""
MODELS = {
    "architecture": "--architecture {name}",
    "token router": """
        --architecture transformer --token-router {name} --num-experts 4 --moe-ffn-hidden-size 32
        --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.01
    """,
    "feature router": """
        --architecture smlp --feature-router {name} --num-dense-layers 2 --num-feature-experts 4
        --num-feature-chunks 8 --prefix-fraction 0.25
    """,
}
"""Flags of a model that uses a plugin's entry, by its kind (plugins.Registry.tables)."""
STEPS, SAVED = 4, 2
LAYOUTS = {
    "TP 2, sequence parallel": "--tensor-model-parallel-size 2 --sequence-parallel",
    "PP 2, interleaved": "--pipeline-model-parallel-size 2 "
    "--num-layers-per-virtual-pipeline-stage 1",
    "DP 2, overlapped gathers": "--use-distributed-optimizer --overlap-param-gather "
    "--overlap-grad-reduce",
    "recomputed activations": "--recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1",
}
OF_EXPERTS = {"EP 2": "--expert-model-parallel-size 2"}
LIMITS = {"loss": 2e-5, "grad_norm": 2e-4}
"""Relative tolerances in fp32: another layout sums in another order."""
ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception): |error: ")
"""Matches the line of a traceback, or of a program's refusal, that says what is wrong."""
LOST = re.compile(r"Connection (closed|reset) by peer")
"""What the other ranks say when one has failed."""


class Runs:
    """The runs of one architecture or router.

    Args:
        plugins: the plugin files, each passed by --plugin.
        model: flags of the model.
    """

    def __init__(
        self, name: str, *, plugins: Sequence[str], model: Sequence[str], folder: Path
    ) -> None:
        self.name, self.folder = name, folder
        self.plugins = [f"{FLAG}={plugin}" for plugin in plugins]
        self.model = list(model)
        self.has_experts = "--num-experts" in self.model
        self.metrics: dict[str, list[dict[str, float]]] = {}

    def checks(self) -> Iterator[Check]:
        """Yield the checks, each after the one whose checkpoint it continues from."""
        yield self._seed
        yield partial(self._layout, "exact resume", "", exact=True)
        layouts = LAYOUTS | (OF_EXPERTS if self.has_experts else {})
        for title, flags in layouts.items():
            yield partial(self._layout, title, flags)
        yield self._export
        yield self._import

    def _train(self, title: str, flags: Sequence[str]) -> str:
        """Run a training and record its metrics; return its error, empty if it succeeded."""
        text = " ".join(flags)
        count = 2 if "parallel-size 2" in text or "distributed-optimizer" in text else 1
        logs = self.folder / title.replace(" ", "_").replace(",", "")
        run = ["-m", "pretrain_smlp"]
        if count > 1:
            run = ["-m", "torch.distributed.run", *ALONE, f"--nproc-per-node={count}", *run]
        said = self._command([
            *run, *self.plugins, *SIZES.split(), *self.model, *flags,
            "--log-dir", str(logs), "--platform", "cpu",
        ])  # fmt: skip
        path = logs / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines]
        self.metrics[title] = [record for record in records if "grad_norm" in record]
        return said

    def _command(self, argv: Sequence[str]) -> str:
        """Run a command; return its last error line, empty if it succeeded."""
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)
        if not done.returncode:
            return ""
        lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines()]
        errors = [line for line in lines if ERROR.match(line)] or [line for line in lines if line]
        errors = [line for line in errors if not LOST.search(line)] or errors
        return errors[-1] if errors else f"exit code {done.returncode}"

    def _seed(self) -> Row:
        saves = ["--save", str(self.folder / "seed"), "--save-interval", str(SAVED)]
        said = self._train(
            "one process", ["--train-iters", str(STEPS), *saves, "--strict-accounting"]
        )
        losses = [record["loss"] for record in self.metrics["one process"]]
        return Row(
            subject=self.name,
            compared=f"{STEPS} steps in one process; parameter counts match",
            apart=f"loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else "-",
            advice=said and f"the run fails: {said}",
        )

    def _layout(self, title: str, flags: str, *, exact: bool = False) -> Row:
        seed = ["--load", str(self.folder / "seed"), "--ckpt-step", str(SAVED)]
        said = self._train(title, ["--train-iters", str(STEPS), *seed, *flags.split()])
        compared = f"{title}: losses and gradient norms of steps {SAVED + 1} to {STEPS}"
        there, here = self.metrics["one process"][SAVED:], self.metrics[title]
        if said or len(there) != len(here):
            advice = f"fails: {said or 'no steps were logged'}"
            return Row(subject=self.name, compared=compared, apart="-", advice=advice)
        worst = max(
            abs(b[key] - a[key]) / abs(a[key]) / (limit if not exact else 1)
            for a, b in zip(there, here, strict=True)
            for key, limit in LIMITS.items()
        )
        if exact:
            advice = "a resumed run computes differently: not all that it reads is saved"
            return close(self.name, compared, worst, 0.0, advice)
        advice = (
            "results depend on the layout: read parameters by a call, mark what is split by "
            "cut=, and compute nothing over features that another rank has (or whole = True)"
        )
        return close(self.name, f"{compared}, of what rounding allows", worst, 1.0, advice)

    def _export(self) -> Row:
        said = self._convert("seed", "exported", "--to", "hf")
        return Row(
            subject=self.name,
            compared="logits of the exported model",
            apart="as trained" if not said else "-",
            advice=said and f"export fails: {said}",
        )

    def _import(self) -> Row:
        said = self._convert("exported", "again", "--from", "hf", "--to", "torch_dist")
        said = said or self._command(["-m", GENERATION, str(self.folder / "exported")])
        return Row(
            subject=self.name,
            compared="converted back to Megatron; generation with and without a cache",
            apart="the same" if not said else "-",
            advice=said and f"the exported model: {said}",
        )

    def _convert(self, source: str, target: str, *flags: str) -> str:
        folders = ["--load", str(self.folder / source), "--save", str(self.folder / target)]
        program = "from megatron_smlp.commands import convert; convert()"
        return self._command(["-c", program, *self.plugins, *folders, *flags])


GENERATION = "megatron_smlp.checking.generation"
