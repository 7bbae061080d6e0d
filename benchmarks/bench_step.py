"""The whole training step against what a user would pick instead, in tokens per second.

`gmlp`         pretrain_smlp.py                  the gMLP of g-mlp-pytorch in a plain torch loop
`transformer`  pretrain_smlp.py                  transformers' GPT-2 with SDPA in a plain torch loop

Ours is everything that `megatron.training` does for a step: batch, forward, backward, clipping,
Adam, learning rate, logging. The peer has a batch ready, and a fused AdamW. Same shapes (about 10M
parameters), same tokens a step, steps in turns; bf16 is Megatron's --bf16 and, for the peers,
autocast. A case is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import Record, report

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = ("gmlp", "transformer")
PRECISIONS = ("fp32", "bf16")
LENGTHS = (512, 1024)
TOKENS_PER_STEP = 2048
VOCABULARY, WIDTH = 4096, 384
LAYERS = {"gmlp": 8, "transformer": 5}
WARM_UP = 3
FLAGS = f"""
    --mock-data --tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1} --num-workers 0
    --make-vocab-size-divisible-by 128 --hidden-size {WIDTH} --ffn-hidden-size {4 * WIDTH}
    --attention-dropout 0 --hidden-dropout 0 --lr 1e-3 --clip-grad 1 --weight-decay 0.01
    --eval-iters 0 --log-interval 10 --no-resume
"""
OURS = {
    "gmlp": "--architecture gmlp --untie-embeddings-and-output-weights",
    "transformer": f"--architecture transformer --num-attention-heads {WIDTH // 64}",
}


class TakingTurns:
    """An observer of our training loop that makes a step of the peer after each of ours."""

    def __init__(self, reporter: Any, peer: Callable[[], None]) -> None:
        self.reporter, self.peer = reporter, peer
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.started = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reporter, name)

    def stepped(self, *args: Any, **kwargs: Any) -> None:
        self.reporter.stepped(*args, **kwargs)
        now = time.perf_counter()
        self.ours.append(now - self.started)
        self.peer()
        self.started = time.perf_counter()
        self.theirs.append(self.started - now)


def peer_step(system: str, *, length: int, precision: str) -> Callable[[], None]:
    """A training step of the peer on random tokens."""
    import torch
    from torch.nn import functional

    model = _PEERS[system](length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    ids = torch.randint(VOCABULARY, (TOKENS_PER_STEP // length, length + 1))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(ids[:, :-1])
            logits = getattr(output, "logits", output)
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _gmlp(length: int) -> Any:
    from g_mlp_pytorch import gMLP

    sizes = {"num_tokens": VOCABULARY, "dim": WIDTH, "depth": LAYERS["gmlp"], "seq_len": length}
    return gMLP(**sizes, ff_mult=4, causal=True)


def _gpt2(length: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=length,
        n_embd=WIDTH,
        n_layer=LAYERS["transformer"],
        n_head=WIDTH // 64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config).train()


_PEERS: dict[str, Callable[[int], Any]] = {"gmlp": _gmlp, "transformer": _gpt2}


def run_case(system: str, *, length: int, precision: str, repeats: int, threads: int) -> Record:
    """Both sides of one case, in this process."""
    import torch

    from megatron_smlp.training.transcript import Transcript

    sys.path.insert(0, str(ROOT))  # pretrain_smlp.py is no part of the package
    torch.set_num_threads(threads)
    batch = TOKENS_PER_STEP // length
    words = f"""
        {FLAGS} {OURS[system]} --num-layers {LAYERS[system]} --seq-length {length}
        --micro-batch-size {batch} --global-batch-size {batch} --train-iters {WARM_UP + repeats}
        {"--bf16" if precision == "bf16" else ""}
    """
    with Transcript():
        from megatron_smlp.arguments import parse_arguments
        from pretrain_smlp import train

        args = parse_arguments(words.split())
        turns: list[TakingTurns] = []

        def observe(reporter: Any) -> TakingTurns:
            peer = peer_step(system, length=length, precision=precision)
            turns.append(TakingTurns(reporter, peer))
            return turns[0]

        train(args, observe=observe)
    ours, theirs = (
        1e3 * statistics.median(times[WARM_UP:]) for times in (turns[0].ours, turns[0].theirs)
    )
    name = f"{system} {precision} T={length}"
    return Record(case=name, ours_ms=ours, peer_ms=theirs, ratio=theirs / ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--repeats", type=int, default=10, help="steps per case and side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        system, precision, length = arguments.case.split("/")
        sizes = {"repeats": arguments.repeats, "threads": arguments.threads}
        record = run_case(system, length=int(length), precision=precision, **sizes)
        arguments.json.write_text(json.dumps(record))
        return
    cases = [f"{s}/{p}/{t}" for s in SYSTEMS for p in PRECISIONS for t in LENGTHS]
    records = [_in_a_process(case, arguments) for case in cases]
    report(records, arguments.json)
    print(f"tokens a step: {TOKENS_PER_STEP}; a tokens/s is {TOKENS_PER_STEP} / ms * 1000")


def _in_a_process(case: str, arguments: argparse.Namespace) -> Record:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        command = [sys.executable, __file__, "--case", case, "--json", str(path)]
        command += ["--repeats", str(arguments.repeats), "--threads", str(arguments.threads)]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        record: Record = json.loads(path.read_text())
    print(f"{record['case']}: ratio {record['ratio']:.2f}", flush=True)
    return record


if __name__ == "__main__":
    main()
