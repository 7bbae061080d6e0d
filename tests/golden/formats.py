"""Write one file of each format that later releases promise to read.

    PYTHONPATH=tests:. python tests/golden/formats.py

makes written_by_0.1.0/: a tokenizer, a dataset with its manifest, a checkpoint with optimizer
state, its export, and expected.json with the results of these. From that release on the folder
stays, and a release that changes a format adds a folder of its own.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.launches import REPOSITORY, run_command, steps

from megatron_smlp import __version__ as VERSION

HERE = Path(__file__).parent
WRITTEN = HERE / f"written_by_{VERSION}"
TOKENIZER = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer"
TRAINING = """
    --architecture smlp --num-layers 2 --num-dense-layers 1 --feature-router deterministic
    --num-feature-experts 2 --token-router base --num-experts 2 --moe-ffn-hidden-size 16
    --moe-token-dispatcher-type alltoall --hidden-size 16 --ffn-hidden-size 32 --seq-length 16
    --make-vocab-size-divisible-by 2 --micro-batch-size 2 --global-batch-size 2 --lr 1e-2
    --lr-decay-style constant --split 80,20,0 --eval-iters 0 --num-workers 0 --platform cpu
    --log-interval 1 --data-path pair_text_document
"""


def run(tool: str, flags: str, *, folder: Path) -> None:
    """Run a command of the project in a folder, so that what it writes names no other path."""
    run_command([sys.executable, str(REPOSITORY / tool), *flags.split()], cwd=folder)


def training(*, iterations: int) -> str:
    """Return flags that train or resume up to this many iterations, in a folder of formats."""
    return f"{TRAINING} {TOKENIZER} --train-iters {iterations} --save run --log-dir log"


def trained(folder: Path, *, iterations: int) -> list[float]:
    """Return the losses of the iterations run."""
    shutil.rmtree(folder / "log", ignore_errors=True)
    run("pretrain_smlp.py", training(iterations=iterations), folder=folder)
    return [step.loss for step in steps(folder / "log")]


def logits(exported: Path) -> Any:
    """Return logits <fp32>[V] of the token after a text of all ids below 10."""
    import torch

    from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM

    model = SMLPForCausalLM.from_pretrained(exported)
    return model.eval()(torch.arange(10)[None]).logits[0, -1].detach()


def write(folder: Path) -> None:
    """Make all formats in an empty folder."""
    parts = [f"{a}{b}" for a in ("one", "seven", "thir") for b in ("ty", "teen", "th", "fold")]
    texts = [" ".join(parts[i:] + parts[:i]) for i in range(len(parts))] * 3
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    for tool, flags in (
        ("train_tokenizer", "--input text.jsonl --vocab-size 270 --output tokenizer"),
        ("preprocess_data", f"--input text.jsonl --output-prefix pair --append-eod {TOKENIZER}"),
    ):
        run(f"tools/{tool}.py", flags, folder=folder)
    first = trained(folder, iterations=2)
    run("tools/convert_checkpoint.py", "--load run --save exported --to hf", folder=folder)
    shutil.copytree(folder, folder / "again")
    resumed = trained(folder / "again", iterations=4)
    expected = {
        "first": first,
        "resumed": resumed,
        "logits": logits(folder / "exported")[:8].tolist(),
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Write the folder anew, in a temporary place so that no file names a lasting path."""
    # Leave out traces of running, and the code, which is the package's.
    beside = shutil.ignore_patterns("again", "cache", "log", ".lease*", "*.py", "text.jsonl")
    shutil.rmtree(WRITTEN, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        shutil.copytree(folder, WRITTEN, ignore=beside)


if __name__ == "__main__":
    main()
