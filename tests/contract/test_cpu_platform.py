"""The CPU platform replaces only what exists, only where needed; nothing else replaces anything."""

import ast
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launches import REPOSITORY, launch_calls

from megatron_smlp.platform import cpu

PLACES = """
    torch torch.cuda torch.cuda.random torch.Tensor torch.nn.Module megatron.training.training
    megatron.training.initialize megatron.core.datasets.utils
    megatron.core.tensor_parallel.mappings megatron.core.tensor_parallel.random
    megatron.core.transformer.moe.moe_utils megatron.core.transformer.moe.token_dispatcher
    megatron.core.optimizer.layer_wise_optimizer.LayerWiseDistributedOptimizer
"""
Difference = dict[str, list[str]]
NOTHING: Difference = {"new": [], "replaced": []}


def attributes() -> dict[str, Any]:
    found = {}
    for place in PLACES.split():
        where = pkgutil.resolve_name(place)
        found |= {f"{place}.{n}": getattr(where, n, None) for n in dir(where) if n != "__dict__"}
    return found


def applied() -> Difference:
    """Apply the platform, and return what that changed."""

    def same(a: Any, b: Any) -> bool:
        # Methods of a class are looked up anew each time: equal, not identical.
        return a is b or (type(a) is type(b) and callable(a) and a == b)

    before = attributes()
    cpu.apply()
    after = attributes()
    kept = before.keys() & after.keys()
    return {
        "new": sorted(after.keys() - before.keys()),
        "replaced": sorted(name for name in kept if not same(before[name], after[name])),
    }


def probe_platform(answer: str) -> None:
    """Write to a file what the platform replaces, with and without CUDA."""
    has_cuda = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    found: dict[str, Any] = {"with_cuda": applied()}
    torch.cuda.is_available = has_cuda
    found |= {"without": applied(), "again": applied()}
    with torch.device("meta"):
        found["meta"] = [make(2).device.type for make in (torch.empty, torch.zeros, torch.arange)]
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Probe in another process, since `apply` lasts for the life of one."""
    folder = tmp_path_factory.mktemp("probe")
    launch_calls(probe_platform, str(folder / "answer"), processes=1, log=folder / "log")
    return json.loads((folder / "answer").read_text(encoding="utf-8"))


def test_nothing_is_replaced_where_cuda_is_available(probe: dict[str, Any]):
    assert probe["with_cuda"] == NOTHING


def test_whatever_is_replaced_was_there(probe: dict[str, Any]):
    """A name that Megatron or torch no longer has would be set to no effect."""
    assert probe["without"]["new"] == ["torch.cuda._smlp_cpu_platform"]
    assert probe["without"]["replaced"]


def test_applying_twice_is_applying_once(probe: dict[str, Any]):
    assert probe["again"] == NOTHING


def test_a_device_context_still_places_what_is_made_in_it(probe: dict[str, Any]):
    """transformers builds a model on `meta` before it loads the weights."""
    assert probe["meta"] == ["meta"] * 3


def test_every_flag_that_the_platform_sets_is_one_of_megatrons():
    from megatron_smlp.flags.parse import build_parser

    destinations = {action.dest for action in build_parser()._actions}
    assert set(cpu.FLAGS) <= destinations


def replacements(source: str) -> Iterator[str]:
    """Yield each assigned `name.attribute` whose `name` was imported from torch or Megatron."""
    tree = ast.parse(source)
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ("torch", "megatron"):
                    foreign.add(alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            "torch",
            "megatron",
        ):
            foreign |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            targets = [ast.Attribute(value=node.args[0], attr="?")]
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            if root is not target and isinstance(root, ast.Name) and root.id in foreign:
                yield ast.unparse(target)


def test_only_two_folders_replace_anything_in_torch_or_megatron():
    allowed = {REPOSITORY / "megatron_smlp" / name for name in ("platform", "megatron_patches")}
    files = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("tools/*.py")]
    files += [f for f in REPOSITORY.glob("megatron_smlp/**/*.py") if not allowed & {*f.parents}]
    found = {str(f.relative_to(REPOSITORY)): list(replacements(f.read_text())) for f in files}
    assert len(found) > 20
    assert {name: what for name, what in found.items() if what} == {}
    assert list(replacements(Path(cpu.__file__).read_text())), "and the platform does"


def test_an_epoch_that_begins_draws_no_random_number():
    """Dropout uses the default generator, and only the first tensor parallel rank reads data."""
    from megatron_smlp.training.batches import _endless

    before = torch.get_rng_state()
    samples = _endless(torch.utils.data.DataLoader(range(3), shuffle=False))
    assert [int(next(samples)) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(torch.get_rng_state(), before)
