"""Every flag that changes a model or one of its losses survives an export.

The tests try every flag of the parser that reaches Megatron's model configuration, so that a flag
that `options.MODEL_FLAGS` lacks is found by its effect.
"""

import argparse
import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversions import from_hf, run
from support.cover import slow_unless_in
from support.in_process import MINIMAL, build_model, pretrained
from support.launches import records

from megatron_smlp.architectures import SMLPTransformerConfig
from megatron_smlp.checkpoints.model_record import model_flags
from megatron_smlp.conversion import convert, huggingface
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.model_arguments import model_arguments
from megatron_smlp.flags.parse import build_parser
from megatron_smlp.options import MODEL_FLAGS

ATTENTION = "--architecture transformer --num-attention-heads 4"
MODERN = f"{ATTENTION} --position-embedding-type rope --swiglu --normalization RMSNorm"
EXPERTS = "--num-experts 4 --token-router"
SYSTEMS = {
    "switch": f"{ATTENTION} {EXPERTS} switch --moe-train-capacity-factor 1",
    "biased": f"{MODERN} --disable-bias-linear {EXPERTS} topk --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias",
    "partial": "--architecture smlp --num-dense-layers 1 --feature-router partial "
    f"--num-feature-experts 4 {EXPERTS} base",
}
TRAINING = (
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 100 --micro-batch-size 2 "
    "--global-batch-size 2 --train-iters 4 --lr 1e-3 --eval-iters 1 --eval-interval 100 "
    "--num-workers 0 --make-vocab-size-divisible-by 4"
)
OF_A_RUN = {
    "bf16": "precision: an exported folder has that of its weights",
    "calculate_per_token_loss": "how micro-batches are averaged, as their number",
    "vocab_size": "of the tokenizer",
    "make_vocab_size_divisible_by": "padding, which convert_checkpoint.py asks for by itself",
}
"""Flags that change a loss but are not part of a model, and why."""
REFUSALS = (UsageError, SystemExit, AssertionError, ValueError)
"""Errors of ours, of the parser, and of Megatron."""


def values_to_try(action: argparse.Action) -> Iterator[list[str]]:
    flag = action.option_strings[0]
    if action.nargs == 0:
        yield [flag]
    elif action.choices:
        yield from ([flag, str(getattr(choice, "name", choice))] for choice in action.choices)
    elif action.type in (int, float):
        yield from ([flag, value] for value in (("2", "8") if action.type is int else ("0.3",)))


def step(model: Any) -> tuple[float, float]:
    torch.manual_seed(5)
    tokens = torch.randint(100, (2, 16))
    loss = model.train()(tokens, torch.arange(16).expand(2, 16), None, labels=tokens.roll(-1, 1))
    loss.mean().backward()
    norms = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return float(loss.mean()), float(torch.stack(norms).sum())


def imported(args: argparse.Namespace, parse: Callable[..., Any]) -> argparse.Namespace:
    """Return the arguments of a run that resumes from the export of a run with `args`."""
    config = huggingface.config_of(model_flags(args))
    values = type(config).from_dict(config.to_dict())
    flags = model_arguments(build_parser(), huggingface.flags_of(values), trains=True)
    return parse(" ".join(flags), base=TRAINING)


@pytest.mark.slow  # a hundred flags build a model twice
@pytest.mark.usefixtures("in_one_process")
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_flag_that_changes_a_training_step_comes_back(system: str, parse: Callable[..., Any]):
    """Or it is refused, at the start or by the export."""
    reach = {field.name for field in dataclasses.fields(SMLPTransformerConfig)} | set(MODEL_FLAGS)
    kept, lost = set(), {}
    for action in build_parser()._actions:
        if action.dest not in reach or action.dest in OF_A_RUN:
            continue
        for flags in values_to_try(action):
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    args = parse(f"{SYSTEMS[system]} {' '.join(flags)}")
                    again = imported(args, parse)
                    if all(
                        getattr(args, n) == getattr(again, n) for n in reach & vars(args).keys()
                    ):
                        kept.add(action.dest)
                        continue
                    trained = _step_of(args)
                except REFUSALS:
                    continue
                steps = [trained, _step_of(again)]
            if steps[0] != pytest.approx(steps[1], rel=1e-5):
                lost[" ".join(flags)] = steps
    assert not lost
    expected = {"hidden_dropout", "moe_z_loss_coeff", "layernorm_epsilon"}
    assert expected <= kept, "what is tried reaches the model"


def _step_of(args: argparse.Namespace) -> tuple[float, float]:
    model = build_model(args)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():  # whatever their initial values
            parameter.normal_(std=0.1)
    return step(model)


COEFFICIENTS = {
    "switch": "--moe-aux-loss-coeff 0.5 --moe-z-loss-coeff 0.25 --hidden-dropout 0.2 "
    "--moe-token-drop-policy probs",
    "biased": "--moe-router-bias-update-rate 0.125 --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 0.5 --attention-dropout 0.2 --hidden-dropout 0.1",
    "partial": "--feature-aux-loss-coeff 0.5 --partial-loss all --moe-z-loss-coeff 0.25",
    "llama": "--hidden-dropout 0.25 --attention-dropout 0.2",
}


@pytest.mark.parametrize("system", slow_unless_in(["biased", "partial", "llama"], COEFFICIENTS))
def test_what_was_exported_goes_on_training_as_its_checkpoint(system: str, tmp_path: Path):
    """--use-checkpoint-args restores the coefficients of its losses, and dropout."""
    base = MINIMAL.replace("--attention-dropout 0 --hidden-dropout 0", "") + "--lr 0.02"
    flags = f"{(SYSTEMS | {'llama': MODERN})[system]} {COEFFICIENTS[system]}"
    with pretrained(f"{flags} --save {tmp_path / 'run'}", base=base):
        pass
    run(convert.torch_dist_to_hf, tmp_path / "run", tmp_path / "hf", checks=False)
    run(from_hf, tmp_path / "hf", tmp_path / "again", checks=False)
    found = {}
    for name, more in {"run": f"{flags} --finetune", "again": "--use-checkpoint-args"}.items():
        log = tmp_path / f"{name}-log"
        data = TRAINING if name == "again" else base
        with pretrained(
            f"--load {tmp_path / name} {more} --log-dir {log} --log-interval 1 --lr 0.02", base=data
        ):
            lines = [line for line in records(log) if "loss" in line]
        found[name] = [(line["loss"], line["grad_norm"]) for line in lines]
    assert len(found["run"]) == 4
    assert found["again"] == found["run"]
