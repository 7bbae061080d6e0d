"""After the second phase of flags/, only Megatron and the loop assign to the namespace."""

import ast
from collections.abc import Iterator

from support.launches import REPOSITORY

# They set the second phase's defaults, which flags were given, and a CPU's flags; run Megatron's
# own validation; choose the checkpoint to load; count steps and samples; and set the batch of a
# set that is evaluated whole, for as long as Megatron's `evaluate` runs.
ASSIGNING = {"flags/defaults.py", "flags/parse.py", "flags/check.py", "platform/cpu.py"}
ASSIGNING |= {"checkpoints/choosing.py", "checkpoints/state.py", "training/loop.py"}
ASSIGNING |= {"training/evaluating.py", "evaluation/megatron_loading.py"}
# These assign to namespaces of their own.
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
    """After Megatron's own validation one flag is reset, so that each save forks a process."""
    assert list(assignments("flags/check.py")) == ["args.use_persistent_ckpt_worker"]
