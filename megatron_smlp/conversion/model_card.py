"""README.md of an exported folder: a model card, as the Hugging Face Hub reads it.

It says only what the checkpoint knows: no license that nobody chose, no training facts of imported
weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from megatron_smlp.checkpoints.tensors import Spec, main_dtype
from megatron_smlp.errors import UserError
from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.metrics_records import FILE_NAME, read_records

NAME = "README.md"
TASK = "text-generation"
TRUSTS = "trust_remote_code=True"


def write_card(
    folder: Path,
    model: PreTrainedModel,
    specs: Mapping[str, Spec],
    options: argparse.Namespace,
    *,
    of: SMLPConfig,
    training: Mapping[str, str],
    has_tokenizer: bool,
) -> None:
    """Write the card of an exported folder, whose final name is --save.

    Args:
        model: the one in the folder, ours or one of transformers.
        specs: of its weights.
        of: our configuration of the model.
        training: what `training_facts` returned.
    """
    config = model.config
    is_ours = isinstance(config, SMLPConfig)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kinds = {of.architecture, of.token_router, of.feature_router} - {"none"}
    about = ModelCardData(
        license=options.license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["megatron-smlp", config.model_type, *sorted(kinds - {config.model_type})],
    )
    parts = [
        f"---\n{about.to_yaml()}\n---",
        f"# {options.save.resolve().name}",
        "A causal language model of megatron_smlp, exported for transformers.",
        _table({**_model_facts(of, specs, parameters), **training}),
        "## Loading",
        _loading(is_ours=is_ours, has_tokenizer=has_tokenizer),
    ]
    if is_ours:
        parts.append(
            f"The model's code is `modeling_smlp.py` in this folder, which `{TRUSTS}` lets "
            "transformers run."
        )
    (folder / NAME).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def training_facts(
    checkpoint: Path, record: Mapping[str, Any] | None, *, average: int | None = None
) -> dict[str, str]:
    """Return what is known about the training that a checkpoint comes from, in words.

    Args:
        checkpoint: its `iter_` folder.
        record: its run.json; without one, or for a release, nothing is known.
        average: how many checkpoints' weights are averaged; the loss of their mean is not known.
    """
    iteration = (record or {}).get("iteration")
    if not record or not iteration:
        return {}
    facts = {"iteration": f"{iteration:,}"}
    length = record.get("flags", {}).get("seq_length")
    skipped = record.get("flags", {}).get("skipped_train_samples", 0)
    if samples := record.get("consumed_train_samples", 0) - skipped:
        facts["training tokens"] = f"{samples * length:,}" if length else f"{samples:,} samples"
    facts |= _recipe(record)
    if average:
        return {**facts, "weights": f"the mean of {average} checkpoints, this the last"}
    # A study has its log beside its checkpoints; a relative path may be another folder's.
    folders = (record.get("flags", {}).get("log_dir"), checkpoint.parent, checkpoint.parent.parent)
    logs = [Path(folder) / FILE_NAME for folder in folders if folder]
    try:
        logged = read_records(next((log for log in logs if log.exists()), logs[-1]))
    except UserError:  # the log is elsewhere now
        return facts
    for line in reversed(logged):
        if "validation_loss" in line and line["iteration"] <= iteration:
            at = "" if line["iteration"] == iteration else f" (iteration {line['iteration']:,})"
            return {**facts, "validation loss": f"{float(line['validation_loss']):.4f}{at}"}
    return facts


def _recipe(record: Mapping[str, Any]) -> dict[str, str]:
    """Return how a run was trained, by its run.json: what is needed to repeat it from a preset."""
    flags, software = record.get("flags", {}), record.get("software", {})
    blend = flags.get("train_data_path") or flags.get("data_path") or ()
    rate = flags.get("lr")
    facts = {
        "training data": " ".join(Path(part).name for part in blend),  # and weights
        "optimizer": flags.get("optimizer"),
        "learning rate": f"{rate:g} {flags.get('lr_decay_style')}" if rate else "",
        "global batch size": flags.get("global_batch_size"),
        "seed": flags.get("seed"),
        "megatron_smlp": software.get("commit"),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _model_facts(of: SMLPConfig, specs: Mapping[str, Spec], parameters: int) -> dict[str, str]:
    facts = {
        "architecture": of.architecture,
        "token router": of.token_router,
        "feature router": of.feature_router,
        "parameters": f"{parameters:,}",
        "layers": str(of.num_layers),
        "hidden size": f"{of.hidden_size:,}",
        "context": f"{of.max_position_embeddings:,} tokens",
        "vocabulary": f"{of.unpadded_vocab_size or of.vocab_size:,}",
        "precision": str(main_dtype(specs)).removeprefix("torch."),
    }
    if of.token_router != "none":
        facts["token experts"] = str(of.num_experts)
    if of.feature_router != "none":
        facts["feature experts"] = str(of.num_feature_experts)
    return {name: value for name, value in facts.items() if value != "none"}


def _table(rows: Mapping[str, str]) -> str:
    lines: Iterable[str] = (f"| {name} | {value} |" for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *lines])


def _loading(*, is_ours: bool, has_tokenizer: bool) -> str:
    trusts = f", {TRUSTS}" if is_ours else ""
    model = f'model = AutoModelForCausalLM.from_pretrained("."{trusts})'
    if has_tokenizer:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'tokenizer = AutoTokenizer.from_pretrained("."{trusts})',
            model,
            'tokens = tokenizer("The", return_tensors="pt").input_ids',
            "print(tokenizer.decode(model.generate(tokens, max_new_tokens=20)[0]))",
        ]
    else:
        lines = [
            "import torch",
            "from transformers import AutoModelForCausalLM",
            model,
            "tokens = torch.tensor([[1, 2, 3]])  # no tokenizer in this folder",
            "print(model.generate(tokens, max_new_tokens=20))",
        ]
    where = "In this folder; elsewhere, replace `.` by its path or its name on the Hub:"
    return "\n".join([where, "", "```python", *lines, "```"])
