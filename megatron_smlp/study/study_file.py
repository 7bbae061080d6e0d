"""Read a study file, studies/*.yaml: what is compared, at which lengths, with which seeds."""

# ruff: noqa: RUF009 (`key` makes a field, as dataclasses.field does)
from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smlp.command_line import did_you_mean
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.yaml_file import load_strictly, spelling

OTHERS = "others"
"""The key that stands for all systems that a mapping does not name."""
LEAST_RATES = 3
"""Fewest rates per system in a design, to fit a parabola whose curvature all systems share."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def key(parse: Callable[[Any], Any], default: Any = dataclasses.MISSING) -> Any:
    """Make a field that is read from a file; `parse` raises ValueError for a value not allowed."""
    metadata = {"parse": parse}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r}: give a whole number of 1 or more")
    return value


def _share(value: Any) -> float:
    if not 0 < float(value) < 1:
        raise ValueError(f"{value!r}: give a number between 0 and 1")
    return float(value)


def _text(value: Any) -> str:
    if not re.fullmatch(r"[\w.-]+", str(value)):
        raise ValueError(f"{value!r}: give a name of letters, digits, '_', '-' and '.'")
    return str(value)


def _pair(value: Any) -> tuple[str, str]:
    first, second = value
    return _text(first), _text(second)


def _lines(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:60]!r}: give `key: value` lines")
    return {str(name): content for name, content in value.items()}


def _titles(value: Any) -> dict[str, str]:
    return {name: str(title) for name, title in _lines(value).items()}


def _flags(value: Any) -> dict[str, Any]:
    return {spelling(name): content for name, content in _lines(value).items()}


def _variants(value: Any) -> dict[str, Any]:
    return {_text(name): _flags(content) for name, content in _lines(value).items()}


def tokens(value: Any) -> int:
    """Parse a number of tokens: 500000, 0.5M and 500K are the same.

    Raises:
        ValueError: the value is not a number of tokens.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", str(value).strip())
    if not match or not float(match[1]):
        raise ValueError(f"{value!r}: give a number of tokens, as 500000, 500K or 1.2M")
    return round(float(match[1]) * UNITS[match[2]])


def _list(parse: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{value!r}: give a list as [1, 2]")
        items = tuple(parse(item) for item in value)
        if len({str(item) for item in items}) < len(items):
            raise ValueError(f"{value!r}: an item is repeated")
        return items

    return read


def _by_system(parse: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    """Read one list for all systems, or a mapping from systems, and `others`, to lists."""

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {OTHERS: parse(value)}
        return {str(name): parse(items) for name, items in value.items()}

    return read


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Trials of the learning rate, before the main runs and separate from them."""

    seed: int = key(_whole)
    horizon: int = key(tokens)
    """Tokens per trial."""
    lr: dict[str, tuple[float, ...]] = key(lambda value: {OTHERS: _list(float)(value)})
    """Multiples of the --lr in a system's file; the same for all systems, to be fair."""
    extend_at_edge: int = key(_whole, 0)
    """Most extra trials per system, added one by one while any system's best is at an edge."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """Full runs at several rates, each with its own seed, instead of trials and seeds."""

    lr: dict[str, tuple[float, ...]] = key(_by_system(_list(float)))
    """Multiples of the --lr in a system's file."""
    seeds: tuple[int, ...] = key(_list(_whole))
    """One per rate, in the same order; the same for all systems."""

    def factors(self, system: str) -> tuple[float, ...]:
        return _of_system(self.lr, system)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Timing separate from training, on a quiet machine."""

    rounds: int = key(_whole, 5)
    """Number of rounds, each of which times all systems in turn."""
    steps: int = key(_whole, 40)
    """Steps per system and round."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines that `plan` estimates the cost of a study on; no run depends on them."""

    gpus: int = key(_whole)
    tflops: float = key(float)
    """Peak TFLOP/s of one GPU in the runs' dtype."""
    utilization: float = key(_share)
    """Fraction of the peak that trainings are assumed to reach in needed FLOPs, as logged `mfu`."""


@dataclass(frozen=True, kw_only=True)
class Study:
    name: str = key(_text)
    base: str = key(str)
    """Folder of <system>.yaml, relative to the study file's folder."""
    systems: tuple[str, ...] = key(_list(_text))
    variants: dict[str, dict[str, Any]] = key(_variants, {})
    """Systems made from another system's file (`from`) with other flags."""
    fixed: dict[str, Any] = key(_flags, {})
    """Flags of every run, which override those of the files."""
    vocab_size: int = key(_whole)
    horizons: tuple[int, ...] = key(_list(tokens))
    """Tokens at which the systems are compared; each has its own decay of the learning rate."""
    decay: float = key(_share, 0.2)
    """Fraction of a horizon over which its learning rate decays."""
    evaluations: int = key(_whole, 5)
    """Evaluations in the shortest horizon; their interval stays the same to the end."""
    seeds: dict[str, tuple[int, ...]] = key(_by_system(_list(_whole)), {})
    tuning: Tuning | None = key(lambda value: _read(Tuning, value), None)
    design: Design | None = key(lambda value: _read(Design, value), None)
    """Replaces tuning and seeds."""
    may_differ: tuple[str, ...] | None = key(_list(lambda name: spelling(_text(name))), None)
    """Flags of the optimizer, or micro-batch-size, that are compared, and so may differ."""
    subject: str = key(_text)
    """The system whose claims are tested."""
    paper: bool = key(bool, False)
    """Whether the claims are the paper's, C1 to C5; if not, only the subject's loss is compared."""
    titles: dict[str, str] = key(_titles, {})
    """Titles of systems in tables and figures, where they differ from the names."""
    ablations: tuple[tuple[str, str], ...] = key(_list(_pair), ())
    """Pairs of a system with and without something; if that is a MoE of sMLP, for claim C5."""
    primary: tuple[str, str] | None = key(_pair, None)
    """The primary comparison, which has its own alpha: a system and its rival."""
    speed: Speed = key(lambda value: _read(Speed, value), Speed())
    cluster: Cluster | None = key(lambda value: _read(Cluster, value), None)
    flops_tolerance: float = key(_share, 0.03)
    """Largest relative difference in FLOPs per token between systems, in the paper's convention."""
    needed_flops_tolerance: float = key(_share, 0.03)
    """The same, counting causal products as triangles."""

    def __post_init__(self) -> None:
        _check(self)

    def seeds_of(self, system: str) -> tuple[int, ...]:
        return self.design.seeds if self.design else _of_system(self.seeds, system)

    def rates_of(self, system: str) -> tuple[float | None, ...]:
        """Return the multiple of the rate for each of `seeds_of`; None for the tuned one."""
        if self.design:
            return self.design.factors(system)
        return (None,) * len(self.seeds_of(system))

    @property
    def longest(self) -> int:
        """Tokens of the longest horizon."""
        return max(self.horizons)


def _of_system(lists: dict[str, tuple[Any, ...]], system: str) -> tuple[Any, ...]:
    return lists.get(system, lists.get(OTHERS, ()))


def read_studies(path: Path) -> tuple[str, list[Study]]:
    """Read a study file; return its name and the study, or a study NAME-SIZE per entry of `sizes`.

    Raises:
        UsageError: it cannot be read, a key is unknown or missing, or a value is not allowed.
    """
    place = ""
    try:
        content = _lines(load_strictly(path, name=str(path), ready="studies/"))
        name, sizes = str(content.get("name")), content.pop("sizes", None)
        if sizes is None:
            return name, [_read(Study, content)]
        studies: list[Study] = []
        for size, own in _lines(sizes).items():
            place = f"sizes: {size}: "
            keys = _of_size(content, _lines(own)) | {"name": f"{name}-{size}"}
            studies.append(_read(Study, keys))
            if studies[0].subject not in studies[-1].systems:
                raise ValueError(
                    f"systems: {studies[0].subject!r} is missing, the subject of the first size: "
                    "the report across sizes compares it. Name it alike at all of them."
                )
    except (TypeError, ValueError) as error:  # the first for a missing key
        raise UsageError(f"{path}: {place}{error}") from error
    return name, studies


def _of_size(content: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a study of one size: its own override the file's, except that `fixed` and
    each system's `variants` are merged; null removes a key."""
    content, own = _flags(content), _flags(own)
    merged = content | own
    merged["fixed"] = {**_flags(content.get("fixed") or {}), **_flags(own.get("fixed") or {})}
    variants, more = (_variants(side.get("variants") or {}) for side in (content, own))
    titles, systems = _titles(merged.get("titles") or {}), merged.get("systems") or ()
    # Drop the titles and variants of systems that this size does not have.
    merged["titles"] = {name: title for name, title in titles.items() if name in systems}
    merged["variants"] = more | {
        name: flags | more.get(name, {}) for name, flags in variants.items() if name in systems
    }
    return {key: value for key, value in merged.items() if value is not None}


def _read(kind: type, content: Any) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {}
    for name, value in _lines(content).items():
        field = fields.get(spelling(name)) or _refuse(name, list(fields))
        try:
            values[field.name] = field.metadata["parse"](value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
    return kind(**values)


def _refuse(name: str, known: list[str]) -> Any:
    spelt = [key.replace("_", "-") for key in known]
    hint = did_you_mean(name.replace("_", "-"), spelt)
    raise ValueError(f"unknown key {name!r}: {hint or f'the keys are {", ".join(spelt)}.'}")


def _check(study: Study) -> None:
    """Check what involves more than a single key."""
    tuning, design = study.tuning, study.design
    named = {study.subject, *study.variants, *study.titles, *(study.primary or ()), *study.seeds}
    named |= {name for names in study.ablations for name in names}
    named |= {*(design.lr if design else ())}
    named -= {OTHERS}
    for name in sorted(named):
        if name not in study.systems:
            raise ValueError(f"{name!r} is not in `systems`: {', '.join(study.systems)}")
    if design:
        _check_design(study, design)
    for system in study.systems:
        seeds = study.seeds_of(system)
        if not seeds:
            raise ValueError(f"seeds: none for {system!r}: name it, or {OTHERS!r}")
        if tuning and tuning.seed in seeds:
            raise ValueError(
                f"seeds: {tuning.seed} of {system!r} is also the tuning's: the learning rate "
                "would be chosen on a run that counts. Use another seed."
            )


def _check_design(study: Study, design: Design) -> None:
    if study.tuning or study.seeds:
        raise ValueError("design: it cannot be combined with tuning or seeds: remove one.")
    counts = {len(design.seeds), *(len(study.rates_of(system)) for system in study.systems)}
    if len(counts) > 1 or min(counts) < LEAST_RATES:
        raise ValueError(
            f"design: give every system as many rates as there are seeds, {LEAST_RATES} or more: a "
            "parabola needs as many."
        )
