"""Write a dataset, a checkpoint and an exported model, for later versions to read.

    PYTHONPATH=tests:. python tests/golden/artifacts.py

writes them to written_by_0_1/ beside this file, which is done once: what reads them must go on
reading them. A new version's files get a folder of their own.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from support.in_process import pretrained

HERE = Path(__file__).parent
FOLDER = HERE / "written_by_0_1"
TEXT = [{"text": " ".join(str((7 * n + 3 * k) % 60) for k in range(40))} for n in range(24)]
TOKENIZER = "--tokenizer-type NullTokenizer --vocab-size 60"
MODEL = f"""
    {TOKENIZER} --make-vocab-size-divisible-by 4 --num-layers 3 --hidden-size 16
    --ffn-hidden-size 32 --seq-length 12 --micro-batch-size 2 --global-batch-size 4 --num-workers 0
    --architecture smlp --num-dense-layers 1 --feature-router partial --num-feature-experts 2
    --token-router base --num-experts 2 --lr 1e-2 --lr-decay-style constant --log-interval 1
    --attention-dropout 0 --hidden-dropout 0 --eval-iters 0 --split 100,0,0
"""
SAVED, END = 3, 5


def preprocess(folder: Path) -> Path:
    """The dataset's prefix."""
    from megatron_smlp.data.prepare.preprocess_cli import main

    lines = [json.dumps(record) + "\n" for record in TEXT]
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    words = f"--input {folder / 'text.jsonl'} --output-prefix {folder / 'data'} --append-eod"
    main(f"{words} {TOKENIZER}".split())
    return folder / "data_text_document"


def train(flags: str, *, data: Path, log: Path) -> list[float]:
    """Losses of the steps of a run in this process."""
    words = f"--data-path {data} --log-dir {log} {flags}"
    with pretrained(words, base=MODEL):
        lines = (log / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def convert(load: Path, save: Path, to: str) -> None:
    from megatron_smlp.conversion.cli import main

    main(["--load", str(load), "--save", str(save), "--to", to])


def write(folder: Path) -> None:
    """folder: new; a checkpoint records where its data lay."""
    folder.mkdir()
    data, run, log = preprocess(folder), folder / "run", folder / "log"
    train(f"--train-iters {SAVED} --save {run}", data=data, log=log)
    losses = train(f"--train-iters {END} --load {run}", data=data, log=folder / "later")
    convert(run, folder / "hf", "hf")
    (folder / "losses.json").write_text(json.dumps(losses[-(END - SAVED) :]) + "\n")
    for code in (folder / "hf").glob("*.py"):
        code.unlink()  # a copy of megatron_smlp/hf
    for unneeded in (log, folder / "later", data):  # data: the folder of Megatron's index cache
        shutil.rmtree(unneeded)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "written")
        shutil.copytree(Path(folder) / "written", FOLDER)
