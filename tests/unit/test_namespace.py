"""After the second phase of flags/, nobody assigns to the namespace but Megatron and the loop."""

import ast
from collections.abc import Iterator

from support.launches import REPOSITORY

# The second phase, the flags that a CPU needs, what was given told from defaults; Megatron's own
# validation; which checkpoint is loaded; the steps and samples that the loop counts; the batch of
# a set that is evaluated whole, for the time of Megatron's `evaluate`.
ASSIGNING = {"flags/defaults.py", "flags/parse.py", "flags/check.py", "platform/cpu.py"}
ASSIGNING |= {"checkpoints/choosing.py", "checkpoints/state.py", "training/loop.py"}
ASSIGNING |= {"training/evaluating.py", "evaluation/megatron_loading.py"}
# Namespaces of their own.
OTHERS = {"accounting/estimate.py", "data/tokenizers/folder.py"}
PACKAGE = REPOSITORY / "megatron_smlp"


def assignments(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AugAssign):
            targets = [node.target]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets = [ast.Attribute(value=node.args[0], attr="?")]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "vars(args).update":
            targets = [node.func]
        flat = [item for t in targets for item in (t.elts if isinstance(t, ast.Tuple) else [t])]
        for target in flat:
            if isinstance(target, ast.Attribute) and (
                ast.unparse(target.value).endswith(("args", "vars(args)"))
            ):
                yield ast.unparse(target)


def test_only_these_files_assign_to_arguments():
    names = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")]
    found = {name for name in names if list(assignments(name))}
    assert found - OTHERS - {"checkpoints/torch_dist.py"} == ASSIGNING


def test_the_third_phase_assigns_nothing():
    """Behind Megatron's own validation one flag is taken back, with which it saves otherwise."""
    assert list(assignments("flags/check.py")) == ["args.use_persistent_ckpt_worker"]
