"""The stand-in counts what waits for a real device: reads, and copies that do not say otherwise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from support.launches import REPOSITORY, run_command


def test_what_waits_is_counted_and_refused_in_a_graph():
    done = run_command(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("waits.py"))],
        CUDA_VISIBLE_DEVICES="",
        PYTHONPATH=f"{REPOSITORY / 'tests'}:{REPOSITORY}",
    )
    found = json.loads(done.stdout.splitlines()[-1])
    never = ("filled", "sent and not waited for", "copied into and not waited for", "computed")
    once = ("sent", "moved", "copied into", "read", "fetched", "fetched behind a read")
    assert found["waits"] == dict.fromkeys(never, 0) | dict.fromkeys(once, 1) | {
        "read one by one": 3
    }
    assert set(found["waits"]) - set(found["refused"]) == {"filled", "computed"}
