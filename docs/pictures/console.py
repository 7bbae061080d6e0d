#!/usr/bin/env python3
"""Write quickstart.txt, the end of what `make quickstart` prints: README.md shows lines of it.

.venv/bin/python docs/pictures/console.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUTPUT = HERE / "quickstart.txt"
FIRST = "validation perplexity"


def main() -> None:
    environment = {**os.environ, "PYTHON_BIN": sys.executable}
    done = subprocess.run(
        [ROOT / "examples" / "quickstart.sh"], cwd=ROOT, env=environment, check=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    OUTPUT.write_text(done.stdout[done.stdout.index(FIRST) :], encoding="utf-8")


if __name__ == "__main__":
    main()
