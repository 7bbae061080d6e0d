"""Load lm-evaluation-harness's tasks by name: its own from the hub, or ours from local files."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_smlp.command_line import did_you_mean
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.tasks.documents import FILES, find_file

TASK_FOLDER = Path(__file__).parent / "tasks"
PAPER_COPA = TASK_FOLDER / "copa_paper.yaml"
HARNESS_NAMES = {"storycloze": "storycloze_2016"}
"""Names of the paper's tasks in lm-evaluation-harness, where they differ."""

PromptStyle = Literal["lm_eval", "paper"]


@dataclass(frozen=True)
class Selection:
    """Loaded tasks, in the requested order."""

    tasks: list[Any]
    """Tasks, and groups of tasks, which have scores of their own."""
    manager: Any
    """The TaskManager that loaded them."""


def split_names(text: str, *, flag: str = "--tasks") -> list[str]:
    """Split `copa, piqa` into ["copa", "piqa"], each name once.

    Raises:
        UsageError: the text contains no name.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError(f"{flag} '{text}' names no task; the paper's are {','.join(FILES)}")
    return names


def select_tasks(
    names: Sequence[str],
    *,
    data_dir: str | None,
    prompt_style: PromptStyle = "lm_eval",
    include_path: str | None = None,
) -> Selection:
    """Load tasks.

    Args:
        data_dir: folder with the tasks' files, read without a network; None: the hub.
        prompt_style: how COPA asks; the other tasks have one style.
        include_path: folder of a user's own task files, in the harness's format.

    Raises:
        UsageError: an unknown task, with the nearest name; missing or malformed files.
    """
    for flag, folder in (("--include-path", include_path), ("--data-dir", data_dir)):
        if folder is not None and not Path(folder).is_dir():
            raise UsageError(f"{flag} {folder} is not a folder: see docs/evaluation.md")
    own: list[str | Path] = [include_path] if include_path else []
    options: dict[str, Any]
    if data_dir is None:
        wanted = [HARNESS_NAMES.get(name, name) for name in names]
        paper, options = str(PAPER_COPA), {"include_path": own or None}
        remedy = (
            "or the network, or give --data-dir with local files of the paper's tasks "
            "(docs/evaluation.md)"
        )
    else:
        wanted, paper = list(names), PAPER_COPA.stem
        options = {
            "include_path": [TASK_FOLDER, *own],
            "include_defaults": False,
            "metadata": {"data_dir": str(data_dir)},
        }
        remedy = "and that its data is local: --data-dir uses no network"
        for name in set(names) & set(FILES):
            find_file(name, data_dir)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at the import of the harness
    from lm_eval.tasks import TaskManager

    manager = TaskManager(**options)
    for name in wanted:
        _check_known(name, manager.all_tasks, include_path=include_path)
    if prompt_style == "paper":
        wanted = [paper if name == "copa" else name for name in wanted]
    return _load(wanted, manager, remedy=remedy)


def _load(names: Sequence[str], manager: Any, *, remedy: str) -> Selection:
    """Build tasks, which reads their data and imports the code that they name."""
    from lm_eval.defaults import DEFAULT_RANDOM_SEED

    built: list[Any] = []
    for name in names:
        # Some, such as GPQA, shuffle options: all ranks, and the harness's own command, alike.
        random.seed(DEFAULT_RANDOM_SEED)
        try:
            loaded = _outermost(manager.load([name]))
            manager.load([*built, *loaded])  # refuses one that is there twice
        except UsageError:
            raise
        except Exception as error:  # any kind: files, code and network are not ours
            raise UsageError(
                f"task {name} cannot be loaded ({_in_words(error)}): check "
                f"{_file_of(name, manager)}, {remedy}"
            ) from error
        built += loaded
    return Selection(built, manager)


def _outermost(loaded: Any) -> list[Any]:
    """Return the groups and tasks that belong to no group."""
    inner = set(itertools.chain.from_iterable(loaded["group_map"].values()))
    both = loaded["groups"] | loaded["tasks"]
    return [item for name, item in both.items() if name not in inner]


def _file_of(name: str, manager: Any) -> Path | None:
    """Return the YAML file of a task or group, or None if it is unknown."""
    entry = manager.task_index.get(name)
    return entry and entry.yaml_path


def _in_words(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _check_known(name: str, known: Sequence[str], *, include_path: str | None) -> None:
    """Raise `UsageError` with similar names if a task is unknown."""
    if name in known:
        return
    hint = did_you_mean(name, known, most=3, cutoff=0.5)
    few = f"known: {', '.join(known)}" if len(known) < 20 else "`lm_eval ls tasks` lists all"
    own = include_path and f"files of {include_path} that are not YAML tasks are ignored"
    text = "; ".join(part for part in (hint, few, own) if part)
    raise UsageError(f"{name} is not a task: {text}")
