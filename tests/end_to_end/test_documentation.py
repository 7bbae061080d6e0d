"""Every command block of README.md and docs/ runs as it stands, in a copy of the checkout.

A page's blocks run in order, each in bash, and find what a reader would have: texts, a tokenizer,
datasets, runs. Only `SHORTER` and `NAMED` are changed: trainings take a few steps, and what a page
leaves to the reader (`...`) is filled in.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.launches import REPOSITORY, clean_environment, run_command
from support.ranks import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the first case makes what all use
PAGES = [
    "README.md",
    *sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)

NOT_HERE = {
    "make test": "this is it",
    "make study": "tests/end_to_end/test_study.py",
    "tools/study.py": "the same, with a study that ends in minutes",
    "make first-gpu": "tests/unit/test_first_gpu.py",
    "pip install": "the environment has the extras",
}
"""Text of lines, or of Python blocks, that do not run here -> why, or where they do."""
STEPS = (
    "--train-iters 2 --eval-iters 1 --eval-interval 2 --global-batch-size 4 --micro-batch-size 2"
)
SIZES = "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --seq-length 64"
TOKENIZER = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer"
DATA = f"--data-path data/text_text_document {TOKENIZER} --split 90,10,0"
NAMED = {
    "make quickstart": "PYTHON_BIN=.venv/bin/python examples/quickstart.sh",
    "configs/paper/...": f"configs/cpu/gmlp.yaml {STEPS}",
    "--data-path ... --lr 1e-4 ...": f"{DATA} --lr 1e-4 {STEPS}",
    "--bf16 ...": f"--bf16 {DATA} {STEPS}",
    "pretrain_smlp.py ... --eval-tasks": f"pretrain_smlp.py --config configs/cpu/gmlp.yaml {DATA} "
    f"{STEPS} --save runs/tasks --eval-tasks",
    "CONFIG=...": "CONFIG=configs/cpu/gmlp.yaml",
    "--save runs/first ...": f"--save runs/launched {DATA} {STEPS}",
    "...": "",
}
"""Parts that a page leaves out, and what `make` runs once there is an environment."""
SHORTER = {
    "--train-iters 200 --eval-interval 50": STEPS,
    "--vocab-size 2048": "--vocab-size 300",
    "--megabytes 2": "--megabytes 0.2",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--expert-model-parallel-size 2 ": "",  # eight processes on two cores take minutes
    "--pipeline-model-parallel-size 2": "",
    "NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1": "NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1",
    "--vocab-size 32000": "--vocab-size 300",
    "--workers 8": "--workers 2",
    "iter_0000100": "iter_0000002",
    "--max-new-tokens 60": "--max-new-tokens 4",
    "--train-iters 20000 --lr 5e-4": "--train-iters 4 --lr 5e-4",
    "--eval-tasks-interval 1000": "--eval-tasks-interval 2",
    "smlp_toeplitz.yaml --data-path": f"smlp_toeplitz.yaml {STEPS} --data-path",
    "--tasks hellaswag": "--tasks copa --data-dir tasks",  # the others are downloaded
    "--tasks piqa\n": "--tasks copa --include_path megatron_smlp/evaluation/tasks "
    '--metadata \'{"data_dir": "tasks"}\'\n',
    "--tasks piqa --model_args": "--tasks copa --include_path megatron_smlp/evaluation/tasks "
    '--metadata \'{"data_dir": "tasks"}\' --model_args',
    "--tasks copa\n": "--tasks copa --data-dir tasks\n",
}


def blocks(page: str) -> list[tuple[str, str]]:
    """Return language and text of each block, without what is NOT_HERE."""
    found = []
    for kind, body in BLOCK.findall((REPOSITORY / page).read_text(encoding="utf-8")):
        parts = [body] if kind == "python" else body.splitlines(keepends=True)
        found.append((kind, "".join(part for part in parts if not elsewhere(part))))
    return [(kind, body) for kind, body in found if body.strip()]


def elsewhere(text: str) -> bool:
    return any(word in text for word in NOT_HERE)


WITH_BLOCKS = [page for page in PAGES[1:] if blocks(page)]
"""Pages with something to run; tests/unit/test_documented_commands.py lists them."""


VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "P": ".venv/bin/python",
}


def as_it_runs(body: str) -> str:
    for given, taken in (*NAMED.items(), *SHORTER.items()):
        body = body.replace(given, taken)
    return body


def shell(command: str, folder: Path, *, stdin: str = "") -> str:
    """Run lines of bash; the first that fails fails the test."""
    bash = ["bash", "-eo", "pipefail", "-c", command]
    return run_command(bash, cwd=folder, stdin=stdin, seconds=1800, **VARIABLES).stdout


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder as README.md leaves it, with the files that other pages start from."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "examples", "megatron_smlp", "plugins", "tools", "pretrain_smlp.py"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
    (folder / "my.yaml").write_text("include: configs/cpu/smlp_deterministic.yaml\n")
    write_texts(folder)
    for kind, body in blocks("README.md"):
        assert kind == "bash"
        shell(as_it_runs(body), folder)
    more_runs(folder)
    return folder


def write_texts(folder: Path) -> None:
    draw = random.Random(0)
    words = [
        f"{a}{b}" for a in ("one", "seven", "thir", "four") for b in ("ty", "teen", "th", "fold")
    ]

    def text(count: int) -> str:
        return " ".join(draw.choices(words, k=count))

    def jsonl(path: Path, rows: list[dict[str, object]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    jsonl(folder / "text.jsonl", [{"text": text(200)} for _ in range(200)])
    for name in ("books", "web"):
        jsonl(folder / "corpus" / name / "part.jsonl", [{"text": text(200)} for _ in range(100)])
    (folder / "folder").mkdir()
    (folder / "folder" / "a.txt").write_text(text(50), encoding="utf-8")
    (folder / "prompts.txt").write_text("seventy\nfourth\n", encoding="utf-8")
    sides = {"premise": text(3), "choice1": text(2), "choice2": text(2), "question": "cause"}
    jsonl(folder / "tasks" / "copa.jsonl", [{**sides, "label": n % 2} for n in range(4)])
    piqa = {"goal": text(3), "sol1": text(2), "sol2": text(2)}
    jsonl(folder / "tasks" / "piqa.jsonl", [{**piqa, "label": n % 2} for n in range(4)])


def more_runs(folder: Path) -> None:
    """Make small runs with the names that pages use, more pairs, a folder of pairs, a GPT-2."""
    train = "$P pretrain_smlp.py --config configs/cpu/{}.yaml --save runs/{}"
    train += f" {SIZES} {DATA} {STEPS}"
    models = {
        "dense": "transformer", "switch": "switch", "base": "base", "smlp": "smlp_deterministic",
    }  # fmt: skip
    few = "--num-layers 2 --moe-layer-freq [0,1]"
    for name, config in models.items():
        extra = {"switch": few, "base": few, "smlp": "--num-dense-layers 1"}.get(name, "")
        shell(f"{train.format(config, name)} {extra}", folder)
    shell(f"{train.format('gmlp', 'gmlp')} --num-layers 8 --ffn-hidden-size 64", folder)
    shell("cp -r runs/first runs/b", folder)
    for name in ("a", "b"):
        shell(
            f"$P tools/preprocess_data.py --input text.jsonl --output-prefix data/{name} "
            f"--append-eod {TOKENIZER}",
            folder,
        )
    shell("mkdir shards; cp data/a_text_document* data/a.json shards/", folder)
    gpt2(folder)


def gpt2(folder: Path) -> None:
    """Save a small GPT-2 of transformers, with the README's tokenizer."""
    program = """
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
tokenizer = AutoTokenizer.from_pretrained("tokenizer")
end = tokenizer.eos_token_id
sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
config = GPT2Config(
    **sizes, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end
)
GPT2LMHeadModel(config).save_pretrained("gpt2")
tokenizer.save_pretrained("gpt2")
"""
    run_command([sys.executable, "-c", program], cwd=folder, **VARIABLES)


@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_a_page_runs_as_it_is_printed(page: str, reader: Path) -> None:
    for kind, body in blocks(page):
        if kind == "python":
            script = reader / "block.py"
            script.write_text(body, encoding="utf-8")
            shell("$P block.py", reader)
        elif "tools/serve.py" in body:
            with_a_server(as_it_runs(body), reader)
        else:
            shell(as_it_runs(body), reader, stdin="seventy\n")


def with_a_server(body: str, folder: Path) -> None:
    """Run a block whose first command serves, on a free port, while the others query it."""
    port = str(free_port())
    first, *rest = re.sub(r"\\\n", " ", body).replace("8000", port).splitlines()
    server = subprocess.Popen(
        ["bash", "-c", f"exec {first}"], cwd=folder, env=clean_environment(**VARIABLES)
    )
    try:
        asking = f"curl -s 127.0.0.1:{port}/v1/models && break; sleep 1"
        shell("\n".join([f"for i in $(seq 120); do {asking}; done", *rest]), folder)
    finally:
        server.terminate()
        server.wait(timeout=60)
