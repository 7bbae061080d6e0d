"""Checks of a mixer class on its own, in one process: no Megatron, no training.

Letters: B batch, T sequence length, F features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_smlp.accounting.plugin_costs import counted
from megatron_smlp.checking.rows import Check, Row, checked, close, gradients, registered, wrong
from megatron_smlp.command_line import flag_of
from megatron_smlp.plugins import ChannelMixer, Mixer, keeps_state, options_of, weights_of

BATCH, LENGTH, WIDTH = 2, 12, 8


def checks(name: str, kind: type[Mixer]) -> Iterator[Check]:
    """Yield the checks of one class, those whose failures are easiest to fix first."""
    causal = (_causal_in_training, _causal)
    always = (_runs_alone, _repeats, _each_sample, *causal, _shorter, _gradients)
    split = () if kind.whole else (_split, _starts)
    stateful = (_continues,) if keeps_state(kind) else ()
    whole = [option for option, it in options_of(kind).items() if it.kind is int]
    flags = " and ".join(map(flag_of, whole))
    sizes = f"; the sizes here are {WIDTH // 2} or {WIDTH} features and up to {LENGTH} tokens"
    hint = f"{sizes}: if that is why, set {flags} on the command line" if flags else ""
    for check in (*always, *split, *stateful, _half, _flops):
        yield partial(checked, check, name, kind, hint=hint)


def built(kind: type[Mixer], *, width: int = WIDTH, dtype: torch.dtype = torch.float64) -> Mixer:
    """Return a mixer with default options and randomly drawn parameters."""
    torch.manual_seed(1)
    mixer = registered(kind(width=width, length=LENGTH, values={})).draw()
    # Zeros would hide what multiplies them.
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return mixer.to(dtype)


def inputs(
    kind: type[Mixer], *, width: int = WIDTH, length: int = LENGTH, dtype: Any = torch.float64
) -> list[Tensor]:
    """Return random tensors in place of the projections' outputs."""
    torch.manual_seed(2)
    shapes = ((BATCH, length, width, *([n] if n > 1 else [])) for n in kind.inner.values())
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _runs_alone(name: str, kind: type[Mixer]) -> Row:
    """Check that forward returns [B, T, F], of finite values."""
    compared, advice = "forward: [B, T, F] -> [B, T, F]", ""
    mixed = built(kind)(*inputs(kind))
    shape = list(mixed.shape)
    if shape != [BATCH, LENGTH, WIDTH]:
        advice = f"forward returns {shape} for {[BATCH, LENGTH, WIDTH]}: return the inputs' shape"
    elif not mixed.isfinite().all():  # the next rows would blame what they compare
        advice = "forward returns NaN or infinity for standard normal inputs"
    return Row(subject=name, compared=compared, apart=f"{shape}", advice=advice)


def _repeats(name: str, kind: type[Mixer]) -> Row:
    mixer = built(kind).eval()
    given = inputs(kind)
    first = mixer(*given).detach().clone()
    mixer(*(part * 2 for part in given))
    return close(
        name, "the same input twice, another between", _apart(first, mixer(*given)), 0.0,
        "an output depends on an earlier call: keep no state on the object",
    )  # fmt: skip


def _each_sample(name: str, kind: type[Mixer]) -> Row:
    mixer = built(kind).eval()
    given = inputs(kind)
    alone = [mixer(*(part[b : b + 1] for part in given)) for b in range(BATCH)]
    return close(
        name, f"{BATCH} samples together and each alone",
        _apart(torch.cat(alone), mixer(*given)), 1e-12,
        "an output depends on other samples of its batch: axis 0 of the inputs is the batch",
    )  # fmt: skip


def _causal_in_training(name: str, kind: type[Mixer]) -> Row:
    return _causal(name, kind, training=True)


def _causal(name: str, kind: type[Mixer], *, training: bool = False) -> Row:
    """Change each position; compare all outputs before it, or for a channel mixer all others."""
    mixer = built(kind).train(training)
    given = [part.detach() for part in inputs(kind)]
    torch.manual_seed(3)
    before = mixer(*given).detach()
    worst, where = 0.0, 0
    for t in range(LENGTH):
        changed = [part.clone() for part in given]
        for part in changed:
            part[:, t] += 1.0
        torch.manual_seed(3)
        after = mixer(*changed).detach()
        kept = [s for s in range(LENGTH) if s < t or (issubclass(kind, ChannelMixer) and s > t)]
        apart = _apart(before[:, kept], after[:, kept]) if kept else 0.0
        if not apart <= worst:
            worst, where = apart, t
    mode = "training" if training else "evaluation"
    reads = "another token" if issubclass(kind, ChannelMixer) else "a later token"
    return close(
        name, f"outputs before a changed token, each of {LENGTH}, {mode}", worst, 1e-12,
        f"in {mode} an output reads {reads}: changing token {where} changes the output at another",
    )  # fmt: skip


def _shorter(name: str, kind: type[Mixer]) -> Row:
    """Compare a sequence of fewer than T tokens with the beginning of a longer one."""
    mixer = built(kind).eval()
    given = inputs(kind)
    whole = mixer(*given)
    shortest = 1 if issubclass(kind, ChannelMixer) else 3
    short = mixer(*(part[:, :shortest] for part in given))
    return close(
        name, f"{shortest} tokens alone and as the first of {LENGTH}",
        _apart(short, whole[:, :shortest]), 1e-12,
        "a short sequence is mixed differently from the start of a long one: forward gets T' "
        "tokens, at most `length`",
    )  # fmt: skip


def _continues(name: str, kind: type[Mixer]) -> Row:
    """Continue from the state, one or more tokens at a time; compare with all tokens at once."""
    mixer = built(kind).eval()
    given = inputs(kind)
    sizes: dict[str, torch.Size] = {}
    compared = f"3, 1, 1 and {LENGTH - 5} tokens with a state, and {LENGTH} at once"
    state: dict[str, Tensor] = {}
    mixed = []
    alone: dict[str, Tensor] = {}  # of one sample, as another axis may be as long as the batch
    mixer(*(part[:1] for part in given), state=alone)
    for call in zip(*(part.split([3, 1, 1, LENGTH - 5], dim=1) for part in given), strict=True):
        mixed.append(mixer(*call, state=state))
        for key, values in state.items():
            if not isinstance(values, Tensor):
                advice = f"state[{key!r}] is {values!r}: keep tensors whose axis 0 is the batch"
                return wrong(name, compared, advice)
            if values.shape[:1] != (BATCH,) or alone.get(key, values[:1]).shape[:1] != (1,):
                advice = f"state[{key!r}] has {list(values.shape)}: its axis 0 must be the batch"
                return wrong(name, compared, advice)
            if values.shape != sizes.setdefault(key, values.shape):
                advice = f"state[{key!r}] grows with the tokens: rows of a batch have other numbers"
                return wrong(name, compared, advice)
    return close(
        name, compared, _apart(torch.cat(mixed, dim=1), mixer(*given)), 1e-12,
        "outputs differ with a state: keep in it what later tokens need",
    )  # fmt: skip


def _gradients(name: str, kind: type[Mixer]) -> Row:
    """Compare gradients of inputs and parameters with finite differences, in fp64."""
    mixer = built(kind, width=WIDTH // 2).train()
    given = inputs(kind, width=WIDTH // 2, length=5)
    count = len(given)

    def function(*tensors: Tensor) -> Tensor:
        names = [key for key, _ in mixer.named_parameters()]
        values = dict(zip(names, tensors[count:], strict=True))
        torch.manual_seed(4)
        mixed: Tensor = torch.func.functional_call(mixer, values, tensors[:count])
        return mixed

    inputs_and_parameters = (*given, *mixer.parameters())
    names = [*kind.inner, *(key.removesuffix(".weight") for key, _ in mixer.named_parameters())]
    mixed = function(*inputs_and_parameters).sum()
    found = torch.autograd.grad(mixed, inputs_and_parameters, allow_unused=True)
    if unread := [key for key, gradient in zip(names, found, strict=True) if gradient is None]:
        advice = (
            f"forward does not read {' and '.join(unread)}: leave out what is not trained, whose "
            "gradient an overlapped reduction would wait for"
        )
        return wrong(name, "gradients of all inputs and parameters", advice)
    return gradients(name, function, inputs_and_parameters, "a gradient does not match the output")


def _split(name: str, kind: type[Mixer]) -> Row:
    """Check that two ranks with half of the features each compute halves of the full output."""
    whole = built(kind).eval()
    given = inputs(kind)
    mixed = whole(*given)
    advice = (
        "with half of the features the output differs: a parameter sized by features needs "
        "cut=, or the class needs whole = True"
    )
    parts = []
    for part in range(2):
        half = built(kind, width=WIDTH // 2).eval()
        for mine, its in zip(weights_of(half), weights_of(whole), strict=True):
            values = its.weight.detach()
            with torch.no_grad():
                cut = values if its.cut is None else values.chunk(2, dim=its.cut)[part]
                if cut.shape != mine.weight.shape:
                    return wrong(
                        name, "halves of the features",
                        f"a parameter has {list(mine.weight.shape)} on one of two ranks, "
                        f"not {list(cut.shape)}: its size or its cut is wrong",
                    )  # fmt: skip
                mine.weight.copy_(cut)
        parts.append(half(*(its.chunk(2, dim=2)[part] for its in given)))
    return close(
        name, "halves of the features, as on two ranks",
        _apart(torch.cat(parts, dim=-1), mixed), 1e-12, advice,
    )  # fmt: skip


def _starts(name: str, kind: type[Mixer]) -> Row:
    """Compare the initial values that two ranks draw with those that one draws."""
    whole, apart = built(kind), 0.0
    for part in range(2):
        for mine, its in zip(
            weights_of(built(kind, width=WIDTH // 2)), weights_of(whole), strict=True
        ):
            for weight, rank in ((its, {}), (mine, {"parts": 2, "part": part})):
                torch.manual_seed(5)
                weight.draw(**rank)
            cut = its.weight if its.cut is None else its.weight.chunk(2, dim=its.cut)[part]
            apart = max(apart, _apart(mine.weight, cut))
    return close(
        name, "initial values of two ranks and of one", apart, 0.0,
        "an init draws other values on two ranks: it must read sizes from the tensor that it is "
        "given, which is the whole parameter, not from `width`",
    )  # fmt: skip


def _half(name: str, kind: type[Mixer]) -> Row:
    """Compare bf16 with fp32, relative to the largest output."""
    single = built(kind, dtype=torch.float32).eval()
    half = copy.deepcopy(single).to(torch.bfloat16)
    given = inputs(kind, dtype=torch.float32)
    exact = single(*given)
    rough = half(*(part.detach().bfloat16() for part in given)).float()
    scale = max(1e-9, exact.abs().max().item())
    return close(
        name, "bf16 and fp32, of the largest output", _apart(rough, exact) / scale, 0.05,
        "bf16 is far from fp32: use x.float() in forward where precision matters",
    )  # fmt: skip


def _flops(name: str, kind: type[Mixer]) -> Row:
    """Compare the FLOPs of `cost` with those that torch counts, which are full squares."""
    values = {key: it.default for key, it in options_of(kind).items()}
    said = kind.cost(features=WIDTH, length=LENGTH, values=values)
    _, products, above, _ = counted(kind, features=WIDTH, length=LENGTH, values=values)
    needed, square = said or (products - above, products)
    is_off = not (0.2 * products <= needed <= square and products <= 1.1 * square)
    return Row(
        subject=name,
        compared="FLOPs of `cost` and those torch counts" if said else "FLOPs, as torch counts",
        apart=f"{needed:,} and {products:,}" if said or above else f"{products:,}",
        advice="`cost` disagrees with the FLOPs of the products: forward FLOPs are 2 per "
        "multiply-add, of one sequence, without the host's projections" if is_off else "",
    )  # fmt: skip


def _apart(left: Tensor, right: Tensor) -> float:
    """Return the largest difference; NaN counts as infinite."""
    if left.shape != right.shape:
        return float("inf")
    if not left.numel():
        return 0.0
    return torch.nan_to_num((left - right).abs(), nan=float("inf")).max().item()
