"""A text corpus that needs no download: the prose of the Python installation itself.

Takes the `pydoc` topics and the docstrings of the standard library, then those of the installed
packages, one document a module, until there is enough.

    python examples/quickstart_corpus.py --output corpus.jsonl --megabytes 8
"""

import argparse
import ast
import json
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 120  # characters; shorter docstrings are labels, not prose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON lines to write")
    parser.add_argument(
        "--megabytes", type=float, default=8.0, help="size of the text (10^6 bytes)"
    )
    options = parser.parse_args()
    written = write_corpus(options.output, int(options.megabytes * 1e6))
    print(f"{options.output}: {written / 1e6:.1f} MB of text", file=sys.stderr)


def write_corpus(output: Path, limit: int) -> int:
    """Write documents until their text is `limit` bytes; returns the bytes of text."""
    written = 0
    lines = []
    for source, text in documents():
        if written >= limit:
            break
        lines.append(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
        written += len(text.encode())
    # Megatron takes the last documents for validation: they must be of the same kind as the rest.
    random.Random(0).shuffle(lines)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(output)
    return written


def documents() -> Iterator[tuple[str, str]]:
    """(where it is from, text), in the same order on every run; no docstring twice."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"pydoc topic {name}", text
    seen: set[str] = set()
    for root in (Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if {"test", "tests", "idlelib", "turtledemo"} & set(parts):
                continue
            if root.name != "site-packages" and "site-packages" in parts:
                continue
            fresh = [text for text in docstrings(path) if text not in seen]
            seen.update(fresh)
            if fresh:
                yield "/".join(parts), "\n\n".join(fresh)


def docstrings(path: Path) -> list[str]:
    """The longer docstrings of a module, in order; none of a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's code
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError, ValueError, RecursionError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in texts if text and len(text) >= SHORTEST]


if __name__ == "__main__":
    main()
