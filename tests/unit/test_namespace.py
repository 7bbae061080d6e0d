"""After the second phase of flags/, nobody assigns to the namespace but Megatron."""

import argparse
import ast
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.launches import REPOSITORY

from megatron_smlp.flags.namespace import Arguments

# The second phase, the flags that a CPU needs, what was given told from defaults; Megatron's own
# validation; which checkpoint is loaded; the steps and samples that the loop counts.
ASSIGNING = {"flags/defaults.py", "flags/parse.py", "flags/check.py"}
ASSIGNING |= {"checkpoints/choosing.py", "checkpoints/state.py", "training/loop.py"}
ASSIGNING |= {"evaluation/megatron_loading.py"}
# Namespaces of their own.
OTHERS = {"accounting/estimate.py", "data/tokenizers/folder.py"}


def test_a_frozen_namespace_refuses_assignment():
    args = Arguments.of(argparse.Namespace(lr=1.0))
    args.lr = 2.0
    args.freeze()
    with pytest.raises(AttributeError, match=r"args.lr = 3.0: flags are settled"):
        args.lr = 3.0
    with pytest.raises(AttributeError):
        args.new = 1
    with args.thawed():
        args.lr = 4.0
    with pytest.raises(AttributeError):
        args.lr = 5.0
    assert vars(args) == {"lr": 4.0}


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda args: pickle.loads(pickle.dumps(args))], ids=["copy", "pickle"]
)
def test_a_checkpoint_holds_a_plain_namespace(again: Callable[[Any], Any]):
    args = Arguments.of(argparse.Namespace(lr=1.0))
    args.freeze()
    found = again(args)
    assert type(found) is argparse.Namespace
    assert found == argparse.Namespace(lr=1.0)


def test_parsed_arguments_are_frozen(parse: Callable[[str], Any]):
    args = parse("--architecture gmlp")
    with pytest.raises(AttributeError, match="flags are settled"):
        args.lr = 1.0


def assignments(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AugAssign):
            targets = [node.target]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets = [ast.Attribute(value=node.args[0], attr="?")]
        flat = [item for t in targets for item in (t.elts if isinstance(t, ast.Tuple) else [t])]
        for target in flat:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value).endswith("args"):
                yield ast.unparse(target)


def test_only_these_files_assign_to_arguments():
    package = REPOSITORY / "megatron_smlp"
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if list(assignments(path.read_text(encoding="utf-8")))
    }
    assert found - OTHERS - {"checkpoints/torch_dist.py"} == ASSIGNING
