"""Package metadata. Tool settings live in pyproject.toml, exact versions in requirements.lock."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# What Megatron's training loop needs is in its own `training` extra. One minor is pinned: the seams
# that we plug into are held by tests/contract, which fail first when this line moves.
REQUIREMENTS = [
    "megatron-core[training]>=0.19.2,<0.20",
    "torch>=2.13.0a0",  # that of NVIDIA's image 26.06; torchrun has --shutdown-timeout
    "numpy>=2.0",
    "transformers>=5.24",  # `cache` in outputs and in generate
    "tokenizers>=0.22",
    "safetensors>=0.6",
    "tensorboard>=2.18",  # Megatron's --tensorboard-dir
    "nltk>=3.9",  # --split-sentences
    "psutil>=6.0",  # addresses of this machine, for the launchers
    "pyyaml>=6.0",
    "rich>=14.0",  # tables and progress bars
    "zstandard>=0.23",  # .zst corpora
]

EXTRAS = {
    "parquet": ["pyarrow>=18"],
    "fast-tokenizer": ["gigatoken"],
    "plots": ["matplotlib>=3.9"],
    "study": ["matplotlib>=3.9", "pandas>=2.2", "scipy>=1.14"],
    "eval": ["lm_eval>=0.4.12,<0.5"],  # TaskManager.load
    "muon": ["emerging-optimizers>=0.3,<0.4"],  # --optimizer muon, by Megatron's own code
    "serve": ["fastapi>=0.115", "pydantic>=2.9", "uvicorn>=0.32"],
    "docs": ["sphinx>=9.1", "myst-parser>=5.0", "furo>=2025.12.19"],
    "dev": [
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.115",
        "scipy>=1.14",
        "g-mlp-pytorch>=0.1.5",
        "lm_eval[api]>=0.4.12,<0.5",  # its local-completions, against tools/serve.py
        "openai>=1.50",
        "peft>=0.17",  # docs/library.md fine-tunes with it
        "ruff>=0.14",
        "mypy>=1.18",
        "types-PyYAML",
        "pre-commit>=4.0",
    ],
}

# `smlp-preprocess` is tools/preprocess_data.py, and so on.
COMMANDS = ["smlp-pretrain = pretrain_smlp:run"] + [
    f"smlp-{name.replace('_', '-')} = megatron_smlp.commands:{name}"
    for name in (
        *("preprocess", "inspect_dataset", "merge_datasets", "train_tokenizer"),
        *("convert", "inspect_checkpoint", "estimate", "evaluate", "generate", "serve", "plot"),
        *("study", "launch", "check", "new"),
    )
]

# `--config configs/cpu/gmlp.yaml` and `--config plugins/aft.yaml` work outside of a checkout too,
PRESETS = {f"megatron_smlp_presets.{name}": name for name in ("configs", "plugins")}
# and `--plugin aft` is plugins/aft.py.
PLUGINS = [
    f"{path.stem} = megatron_smlp_presets.plugins.{path.stem}"
    for path in sorted(Path(__file__).with_name("plugins").glob("*.py"))
]

SOURCE = Path(__file__).with_name("megatron_smlp") / "__init__.py"
(VERSION,) = re.findall('__version__ = "(.+)"', SOURCE.read_text(encoding="utf-8"))

setup(
    name="megatron-smlp",
    version=VERSION,
    description="Sparse all-MLP language models (arXiv 2203.06850) on Megatron",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12,<3.14",
    py_modules=["pretrain_smlp"],
    packages=[*find_packages(include=["megatron_smlp", "megatron_smlp.*"]), *PRESETS],
    package_dir=PRESETS,
    package_data={
        "megatron_smlp": [
            "py.typed",
            "ops/tiles.json",
            "evaluation/tasks/*.yaml",
        ],
        **{package: ["**/*.yaml"] for package in PRESETS},
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": COMMANDS,
        "megatron_smlp.plugins": PLUGINS,
    },
)
