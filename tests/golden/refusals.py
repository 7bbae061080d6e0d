"""What a user reads when something is refused: every sentence of the package, from its code.

`python tests/golden/refusals.py` rewrites refusals.txt; its diff shows how a change is worded.
Other tests check what is refused and what the message names, not its wording.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from megatron_smlp import errors

PACKAGE = Path(errors.__file__).parent
GOLDEN = Path(__file__).with_name("refusals.txt")
SHOWN = {name for name, value in vars(errors).items() if isinstance(value, type)}
"""Exceptions whose text is shown verbatim."""


def sentence(node: ast.expr) -> str:
    """Return a text as written, with {} for what it interpolates."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(sentence, parts))
        case ast.BinOp(left=left, right=right):
            return sentence(left) + sentence(right)
    return "{}"


def refusals(path: Path) -> Iterator[str]:
    """Yield `Exception: sentence` for all exceptions of errors.py that a file makes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in SHOWN:
            yield f"{ast.unparse(node.func)}: {' '.join(sentence(node.args[0]).split())}"


def listed() -> str:
    """Return the whole list, by file."""
    blocks = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if lines := sorted(refusals(path)):
            blocks.append("\n  ".join([path.relative_to(PACKAGE).as_posix(), *lines]))
    return "\n".join(blocks) + "\n"


if __name__ == "__main__":
    GOLDEN.write_text(listed(), encoding="utf-8")
