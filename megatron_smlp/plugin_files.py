"""Loads the plugins that the user names, and enters what they register into the tables.

    --plugin FILE.py      a file
    --plugin NAME         a module, or an entry point of the group megatron_smlp.plugins
    plugin: FILE.py       in a --config file, relative to its folder; or a list

Nothing else runs a plugin: no folder, no checkpoint, no exported model. torch is not imported until
there is a plugin.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from megatron_smlp import options, systems
from megatron_smlp.command_line import Parser, flag_of, negation_of
from megatron_smlp.errors import UsageError
from megatron_smlp.flag_facts import Facts
from megatron_smlp.flags.yaml_file import Setting, config_paths, read_settings
from megatron_smlp.plugin_texts import (
    ALLOW,
    ALLOWED,
    EXPORTED,
    FLAG,
    LOADED,
    PluginFile,
    recorded,
)

KEY = "plugin"
NO_PLUGIN, NO_ALLOW = negation_of(FLAG), negation_of(ALLOW)
GROUP = "megatron_smlp.plugins"
HOSTED = "megatron_smlp.layers.hosted"
WITHOUT_FLAGS = ("mlp", "none")
RESERVED = (*WITHOUT_FLAGS, *systems.ARCHITECTURES, "token_moe")
"""Names of the package's own layers in exported models, which no mixer may have."""
OF_MEGATRON = ("rank", "world_size", "data_parallel_size", "iteration", "params_dtype")
"""Names that Megatron sets in the namespace of the flags, overwriting what is there."""


def load_named(argv: Sequence[str]) -> list[str]:
    """Load what --plugin names, record --allow-other-plugin, and return the remaining arguments.

    Raises:
        UsageError: see `load`; or the flag has no value.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(FLAG, action="append", default=[], dest="names")
    parser.add_argument(ALLOW, action="store_true", dest="allows")
    given, rest = parser.parse_known_args(argv)
    settings = read_settings(config_paths(argv))
    in_file = any(s.value for key, s in settings.items() if flag_of(key) == ALLOW)
    if given.allows or (in_file and NO_ALLOW not in rest):
        ALLOWED.add(ALLOW)
    in_files = [] if NO_PLUGIN in rest else named_in(settings)
    for name in (*in_files, *given.names):
        load(name)
    return [argument for argument in rest if argument != NO_PLUGIN]


def named_in(settings: Mapping[str, Setting]) -> list[str]:
    """Return what `plugin` names in --config files; paths are relative to the file's folder."""
    setting = settings.get(KEY)
    if setting is None or setting.value is None:
        return []
    names = setting.value if isinstance(setting.value, list) else [setting.value]
    folder = Path(setting.place.rpartition(":")[0]).parent
    paths = [os.path.normpath(folder / str(name)) for name in names]
    return [
        path if Path(path).is_file() else str(name) for path, name in zip(paths, names, strict=True)
    ]


def load(name: str) -> PluginFile:
    """Run a plugin's file, once per process, and enter what it registers.

    Raises:
        UsageError: it is missing, fails to import, or registers something invalid.
    """
    path = _path(name)
    known = LOADED.get(path.stem)
    if known is not None and known.path == path:
        return known
    why = None
    if known is not None:
        why = f"and {known.path} share a name"
    elif path.stem in EXPORTED:
        why = "is named like a file of exported models"
    elif not path.stem.isidentifier():
        why = "is not a module name"
    elif path.stem in sys.stdlib_module_names or _is_installed(path):
        why = "shadows another module of its name"
    if why:
        raise UsageError(f"{FLAG} {name} {why}: rename the file.")
    from megatron_smlp.plugins import register

    before = {title: set(table) for title, table in register.tables()}
    text = path.read_text(encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    take_back = snapshot()
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        added = {title: sorted({*table} - before[title]) for title, table in register.tables()}
        _enter(added)
    except Exception as error:
        del sys.modules[path.stem]
        take_back()
        line = next(_lines_in(path, error), None)
        where = f"{path}:{line}" if line else f"{path}"
        raise UsageError(
            f"{FLAG} {name}: {where}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    parts = frozenset(name for names in added.values() for name in names)
    plugin = LOADED[path.stem] = PluginFile(path.stem, path, text, parts)
    return plugin


def snapshot() -> Callable[[], None]:
    """Return a function that restores everything a plugin adds to, as it is now."""
    from megatron_smlp.plugins import register

    tables: list[dict[str, Any]] = [
        *(table for _, table in register.tables()),
        *(systems.MIXERS, systems.CHANNELS, systems.TOKEN_ROUTERS, systems.FEATURE_ROUTERS),
        systems.ARCHITECTURES,
        *(options.OUR_FLAGS, options.MODEL_FLAGS, options.DEFAULTS, options.PLUGIN_OPTIONS),
        LOADED,
    ]
    lists: list[list[Any]] = [
        *(systems.SCORING, systems.WITH_BALANCE_LOSS, systems.BY_PREFIX),
        *(register.listeners, register.updates, register.schedules),
    ]
    copies = [dict(table) for table in tables], [list(names) for names in lists]

    def take_back() -> None:
        for table, was in zip(tables, copies[0], strict=True):
            table.clear()
            table.update(was)
        for names, were in zip(lists, copies[1], strict=True):
            names[:] = were

    return take_back


def _is_installed(path: Path) -> bool:
    """Return whether imports of this name mean another file, such as that of a library."""
    spec = importlib.machinery.PathFinder.find_spec(path.stem)
    origin = spec.origin if spec else None  # None: nothing, or a folder
    return origin is not None and Path(origin).resolve() != path.resolve()


def _path(name: str) -> Path:
    """Return the file that a name refers to."""
    path = Path(name)
    if path.suffix == ".py" or path.is_file():
        if not path.is_file():
            raise UsageError(f"{FLAG} {name}: no such file.")
        return path.resolve()
    entries = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    try:
        spec = importlib.util.find_spec(entries.get(name, name)) if name else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        known = f", or one of {', '.join(sorted(entries))}" if entries else ""
        raise UsageError(f"{FLAG} {name}: give a .py file or a module{known}.")
    return Path(spec.origin).resolve()


def _lines_in(path: Path, error: BaseException) -> Iterator[int]:
    """Yield the lines of the file at which an error arose, innermost first."""
    if isinstance(error, SyntaxError) and error.filename == str(path) and error.lineno:
        yield error.lineno
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == str(path) and frame.lineno:
            yield frame.lineno


def _enter(added: Mapping[str, Sequence[str]]) -> None:
    """Enter registered names into the tables of systems.py and options.py.

    Raises:
        ValueError: a name is taken, an architecture names something unknown, or an option has the
            name of a flag or of something that Megatron sets.
    """
    from megatron_smlp.plugins import register

    targets: dict[str, tuple[dict[str, Any], Callable[[str, Any], Any]]] = {
        "token mixer": (systems.MIXERS, _mixer),
        "channel mixer": (systems.CHANNELS, lambda _, kind: kind),
        "token router": (systems.TOKEN_ROUTERS, _rule),
        "feature router": (systems.FEATURE_ROUTERS, _feature_rule),
        "architecture": (systems.ARCHITECTURES, _architecture),
    }
    for title, table in register.tables():
        target, make = targets[title]
        for name in added[title]:
            is_ours = name in (RESERVED if title.endswith("mixer") else WITHOUT_FLAGS)
            if name in target or is_ours:
                raise ValueError(f"the {title} {name!r} already exists: give another name.")
            target[name] = make(name, table[name])
    for name in added["token router"]:
        systems.SCORING.append(name)
        systems.WITH_BALANCE_LOSS.append(name)
        _enter_options(register.token_routers[name], token_routers=(name,))
    for name in added["feature router"]:
        systems.BY_PREFIX.append(name)
        _enter_options(register.feature_routers[name], feature_routers=(name,))
    for name in added["architecture"]:
        for kind in _kinds_of(register.architectures[name]):
            _enter_options(kind, architectures=(name,))
        _enter_package_flags(name)


def _enter_package_flags(name: str) -> None:
    """Let an architecture take the flags of the package's own architectures whose mixers are all
    among its own, such as --spatial-heads if it has spatial gating."""
    own = {systems.ARCHITECTURES[name].mixer, *systems.ARCHITECTURES[name].others}
    like = {
        other
        for other, kind in systems.ARCHITECTURES.items()
        if own >= {kind.mixer, kind.sparse_mixer or kind.mixer}
    }
    for table in (options.OUR_FLAGS, options.MODEL_FLAGS):
        for flag, facts in table.items():
            if flag not in options.PLUGIN_OPTIONS and like & {*facts.architectures}:
                wider = (*facts.architectures, name)
                table[flag] = dataclasses.replace(facts, architectures=wider)


def _mixer(name: str, kind: Any) -> systems.MixerEntry:
    return systems.MixerEntry(
        spec=f"{HOSTED}:hosted_spec",
        cost="megatron_smlp.accounting.plugin_costs:plugin_cost",
        title=f"{name} (plugin)",
        learned_positions=kind.learned_positions,
        check=f"{HOSTED}:check_flags",
        plugin=kind,
    )


def _rule(name: str, kind: Any) -> systems.TokenRouterRule:
    from megatron_smlp.plugins import TOPK

    return systems.TokenRouterRule(
        module="megatron_smlp.routers.hosted:hosting",
        experts_per_token=kind.experts_per_token or TOPK,
        takes_topk=kind.experts_per_token is None,
        has_balance_loss=True,
        plugin=kind,
    )


def _feature_rule(name: str, kind: Any) -> systems.FeatureRouterRule:
    return systems.FeatureRouterRule(
        module="megatron_smlp.routers.hosted:hosting_features", plugin=kind
    )


def _architecture(name: str, architecture: Any) -> systems.ArchitectureEntry:
    pairs = _pairs_of(architecture)
    for mixer, channel in pairs:
        if mixer not in systems.MIXERS:
            known = ", ".join(systems.MIXERS)
            raise ValueError(
                f"architecture {name!r}: no token mixer {mixer!r} among {known}; to use a "
                f"plugin's, name its file by an earlier {FLAG}."
            )
        if not systems.MIXERS[mixer].for_plugins:
            raise ValueError(
                f"architecture {name!r}: {mixer!r} is only for --architecture amlp or smlp."
            )
        if channel not in (*WITHOUT_FLAGS, *systems.CHANNELS):
            known = ", ".join((*WITHOUT_FLAGS, *systems.CHANNELS))
            raise ValueError(f"architecture {name!r}: no channel mixer {channel!r} among {known}.")
    mixer, channel = pairs[0]
    others = dict.fromkeys(other for other, _ in pairs if other != mixer)
    return systems.ArchitectureEntry(
        mixer=mixer, channel=channel, layers=architecture.layers, others=tuple(others)
    )


def _pairs_of(architecture: Any) -> list[tuple[str, str]]:
    """Return the distinct pairs of mixers in the layers of a model with 64 layers."""
    pairs: dict[tuple[str, str], None] = {}
    for number in range(64):
        try:
            pairs[architecture.layers(number, 64)] = None
        except LookupError as error:
            raise ValueError(
                f"layers({number}, 64): it is called for a model of 64 layers; handle every number "
                "(ORDER[number % len(ORDER)])."
            ).with_traceback(error.__traceback__) from error  # keeps the plugin's line number
    return list(pairs)


def _kinds_of(architecture: Any) -> list[Any]:
    """Return the plugin classes used in an architecture's layers."""
    pairs = _pairs_of(architecture)
    kinds = [
        *(systems.MIXERS[mixer].plugin for mixer, _ in pairs),
        *(systems.CHANNELS.get(channel) for _, channel in pairs),
    ]
    return [kind for kind in dict.fromkeys(kinds) if kind is not None]


def _enter_options(kind: Any, **belongs: tuple[str, ...]) -> None:
    """Enter a class's options for the architecture or router that uses it; those of one kind share
    an option that they inherit, or that the same mixer has."""
    from megatron_smlp.plugins import options_of

    ((which, names),) = belongs.items()
    for name, it in options_of(kind).items():
        others = getattr(options.OUR_FLAGS.get(name), which, ())
        is_shared = others and options.PLUGIN_OPTIONS.get(name) == it
        if not is_shared and (name in options.MODEL_FLAGS or name in options.OUR_FLAGS):
            raise ValueError(
                f"{kind.__name__}.{name} would shadow the flag {flag_of(name)}: rename it."
            )
        if name in OF_MEGATRON:
            raise ValueError(
                f"{kind.__name__}.{name} is a name that Megatron sets itself: rename it."
            )
        owners: dict[str, Any] = {which: (*names, *others)}
        facts = Facts(least=it.smallest, may_change=it.may_change, evaluates=True, **owners)
        options.OUR_FLAGS[name] = options.MODEL_FLAGS[name] = facts
        options.DEFAULTS[name], options.PLUGIN_OPTIONS[name] = it.default, it


def described(flags: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the plugin entry of a Hugging Face configuration for a model's flags; None: no part of
    the model is a plugin's."""
    if not LOADED:
        return None
    from megatron_smlp.plugins import register

    architecture = register.architectures.get(flags["architecture"])
    routers = (flags["token_router"], flags["feature_router"])
    plugged = {*register.token_routers, *register.feature_routers}
    if architecture is None and plugged.isdisjoint(routers):
        return None
    count = flags["num_layers"]
    return {
        "files": recorded(),
        "options": {name: flags[name] for name in options.PLUGIN_OPTIONS},
        "layers": architecture and [list(architecture.layers(i, count)) for i in range(count)],
    }
