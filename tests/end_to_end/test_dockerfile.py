"""What the Dockerfile copies is there. What it runs, a build tries itself."""

from __future__ import annotations

from support.launches import REPOSITORY


def test_what_is_copied_is_there_and_not_ignored() -> None:
    patterns = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").split()
    lines = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copies = [line.split() for line in lines if line.startswith("COPY ")]
    sources = [name for _, *names, _ in copies for name in names]
    assert {"setup.py", "pretrain_smlp.py", "megatron_smlp", "configs", "plugins"} <= set(sources)
    for name in sources:
        assert (REPOSITORY / name).exists(), name
        assert f"!{name}" in patterns, name
    assert {f"!{name}" for name in sources} == {name for name in patterns if name[0] == "!"}
