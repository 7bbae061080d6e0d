"""The source texts of this process's plugins, and what is recorded of them with a model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_smlp.errors import UsageError

FLAG, ALLOW = "--plugin", "--allow-other-plugin"
ALLOWED: set[str] = set()
"""Contains ALLOW if this process was given it."""
EXPORTED = ("configuration_smlp", "modeling_plugin", "modeling_smlp", "plugins")
"""Module names of an exported folder's own files, which a plugin's file is put next to."""


@dataclass(frozen=True)
class PluginFile:
    """A plugin file that was loaded."""

    name: str
    """Its module name."""
    path: Path
    text: str
    parts: frozenset[str] = frozenset()
    """Names of the model parts that it registers; listeners and updates are not among them."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def exported(self) -> str:
        """Return its text for an exported folder.

        Raises:
            UsageError: it imports something that the folder does not contain.
        """
        text = exported(self.text)
        names = "|".join(["megatron_smlp", *LOADED])
        if other := re.search(rf"^\s*(?:from|import) (?:{names})\b.*", text, flags=re.M):
            raise UsageError(
                f"{self.path} cannot be exported with a model, as it has the line "
                f"`{other[0].strip()}`: write `from megatron_smlp.plugins import NAME`, `from "
                "OTHER_PLUGIN import NAME`, and move code that only observes training to a "
                "separate file."
            )
        return text

    def imports(self) -> list[str]:
        """Return the names of other plugins that its text imports."""
        line = r"^\s*(?:from|import) {}\b"
        return [name for name in LOADED if re.search(line.format(name), self.text, flags=re.M)]


LOADED: dict[str, PluginFile] = {}
"""The plugins of this process by module name, in the order in which they were named."""


def recorded() -> dict[str, str]:
    """Return the SHA-256 of each plugin text that a model may be made of, for model.json: those
    with parts of models, and what these import."""
    needed = [name for name, plugin in LOADED.items() if plugin.parts]
    for name in needed:  # which grows
        needed += [other for other in LOADED[name].imports() if other not in needed]
    return {name: plugin.sha256 for name, plugin in LOADED.items() if name in needed}


def texts() -> dict[str, str]:
    """Return the text of each plugin of this process, for run.json."""
    return {name: plugin.text for name, plugin in LOADED.items()}


def require(there: Mapping[str, str], where: str) -> None:
    """Check that the plugins that a model was made with were named.

    Raises:
        UsageError: one was not, or its text differs and --allow-other-plugin was not given.
    """
    if missing := [name for name in there if name not in LOADED]:
        made = ", ".join(f"{name}.py (SHA-256 {there[name][:12]})" for name in missing)
        flags = " ".join(f"{FLAG} {name}.py" for name in missing)
        raise UsageError(f"{where} was made with {made}: add {flags}; no plugin runs unless named.")
    for name, digest in there.items():
        here = LOADED[name]
        if here.sha256 != digest and not ALLOWED:
            raise UsageError(
                f"{where} was made with another version of {name}.py (SHA-256 {digest[:12]}, "
                f"{here.path} has {here.sha256[:12]}): name that, or give {ALLOW}."
            )


def exported(text: str) -> str:
    """Return a text for a folder that needs only torch and transformers: imports of this package
    and of other plugins become imports of the files next to it."""
    ours = rf"megatron_smlp(?:\.hf)?\.({'|'.join(EXPORTED)})"
    others = "|".join(LOADED) or "(?!)"
    return re.sub(
        rf"^(\s*)from (?:{ours}|({others})) import",
        lambda match: f"{match[1]}from .{match[2] or match[3]} import", text, flags=re.M,
    )  # fmt: skip
