"""Configure Sphinx to build a site from README.md, these pages and the docstrings: `make docs`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import megatron_smlp
from megatron_smlp.library_logging import silence_libraries

silence_libraries()
DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = Path(megatron_smlp.__file__).parent
SOURCE = (
    "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}/blob/{GITHUB_SHA}".format_map(os.environ)
    if "GITHUB_SHA" in os.environ
    else ROOT.as_uri()
)
"""Target of `source:` links, those that leave docs/: the repository, or the checkout."""

project = "megatron_smlp"
html_title = project
html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
smartquotes = False
add_module_names = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["pictures"]
highlight_language = "none"
myst_heading_anchors = 4
myst_url_schemes = {
    "http": None,
    "https": None,
    "source": {"url": f"{SOURCE}/{{{{path}}}}"},
}
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_typehints = "none"
autodoc_preserve_defaults = True

FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"(`[^`]+`)")
SECTIONS = ("Args:", "Raises:")
RETURNS = re.compile(r"(Returns|Yields):\n")
TENSORS = re.compile(r"^(?=[a-z][\w, ]*: <|Returns |Raises )", re.MULTILINE)


def read(app: Any, page: str, source: list[str]) -> None:
    """Prepend README.md to the index, append modules to a reference page, and fix links."""
    folder = (DOCS / page).parent
    if page == "index":
        readme = ROOT / "README.md"
        app.env.note_dependency(str(readme))
        source[0] = mended(readme.read_text(encoding="utf-8"), ROOT, folder) + source[0]
        return
    source[0] = mended(source[0], folder, folder)
    if folder.name == "reference":
        source[0] += "".join(map(documented, modules_of(PACKAGE / Path(page).name)))


def mended(text: str, base: Path, folder: Path) -> str:
    """Turn links from `base` into links from `folder`, or into `source:` links if outside docs/."""

    def target(match: re.Match[str]) -> str:
        image, shown, link = match.groups()
        path, hash_sign, anchor = link.partition("#")
        if "://" in link or not path:
            return match[0]
        there = Path(os.path.normpath(base / path))
        if there == ROOT / "README.md":
            there = DOCS / "index.md"
        if image or (there.is_relative_to(DOCS) and there.suffix == ".md"):
            link = os.path.relpath(there, folder) + hash_sign + anchor
        else:
            link = f"source:{there.relative_to(ROOT)}"
        return f"{image}[{shown}]({link})"

    parts, end = [], 0
    for fence in FENCED.finditer(text):
        parts += [LINK.sub(target, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(target, text[end:])])


def modules_of(path: Path) -> list[str]:
    """Return the modules of a folder, except `__init__`, or the module of a file."""
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return [
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for file in files
        if file.stem != "__init__"
    ]


def documented(module: str) -> str:
    """Return a section that autodoc fills from a module."""
    title = module.rpartition(".")[2]
    return f"\n## {title}\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"


def plain(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring, in which only code and sections are markup, into reStructuredText.

    Indented paragraphs are formulas or commands, and are kept as they are.
    """
    blocks, in_section = [], False
    for block in "\n".join(lines).split("\n\n"):
        head = block.lstrip("\n").split("\n")[0]
        if head in SECTIONS:
            in_section = True
        elif not head.startswith(" "):
            in_section = False
        if RETURNS.match(block):
            blocks.append(escaped(" ".join(block.split())))
        elif in_section:
            blocks.append(escaped(block))
        elif head.startswith("    "):
            blocks.append(f"::\n\n{block}")
        else:
            blocks.append(escaped(listed(block)))
    lines[:] = "\n\n".join(blocks).split("\n")


def listed(block: str) -> str:
    """Return a list if a paragraph describes tensors, one `values: <float>[T, N]` per line."""
    if ": <" not in block:
        return block
    items = [" ".join(item.split()) for item in TENSORS.split(block) if item.strip()]
    return "\n".join(f"- {item}" for item in items)


def escaped(text: str) -> str:
    """Return text in which only `code` is markup."""
    parts = CODE.split(text)
    return "".join(
        f"`{part}`" if place % 2 else re.sub(r"([\\*|]|_(?!\w))", r"\\\1", part)
        for place, part in enumerate(parts)
    )


def setup(app: Any) -> None:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", plain, priority=100)  # before napoleon
