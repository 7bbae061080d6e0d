"""Load lm-evaluation-harness's tasks by name: its own from the hub, or ours from local files."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_smlp.command_line import did_you_mean
from megatron_smlp.errors import UsageError
from megatron_smlp.evaluation.tasks.documents import FILES, find_file

TASK_FOLDER = Path(__file__).parent / "tasks"
PAPER_COPA = TASK_FOLDER / "copa_paper.yaml"
PAPER_TASKS = tuple(FILES)
HARNESS_NAMES = {"storycloze": "storycloze_2016"}
"""Names of the paper's tasks in lm-evaluation-harness, where they differ."""

NETWORK = ("aiohttp", "httpx", "huggingface_hub", "requests", "urllib3")
"""Libraries whose exceptions are of the network."""

PromptStyle = Literal["lm_eval", "paper"]


@dataclass(frozen=True)
class Selection:
    """Loaded tasks, in the order that they were asked for."""

    tasks: list[Any]
    """And groups of tasks, which have scores of their own."""
    manager: Any
    """The TaskManager that loaded them."""

    def broken(self, name: str, error: Exception) -> UsageError:
        """Return what to say of a task whose prompts cannot be made."""
        return UsageError(f"--tasks {name}: {_file_of(name, self.manager)}: {_in_words(error)}")


def split_names(text: str, *, flag: str = "--tasks") -> list[str]:
    """`copa, piqa` -> ["copa", "piqa"], each once.

    Raises:
        UsageError: there is no name in it.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError(f"{flag} '{text}' names no task; the paper's are {','.join(PAPER_TASKS)}")
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
        data_dir: folder with the tasks' files; no network is used then. None: the hub.
        prompt_style: how COPA asks; the other tasks have one style.
        include_path: folder of a user's own task files, in the harness's format.

    Raises:
        UsageError: an unknown task, with the nearest name; missing or malformed files.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"--include-path {include_path} is not a folder: give one of task files")
    if data_dir is not None:
        return _offline(names, data_dir, prompt_style, include_path)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    wanted = [HARNESS_NAMES.get(name, name) for name in names]
    for name in wanted:
        _check_known(name, manager.all_tasks, include_path=include_path)
    if prompt_style == "paper":
        wanted = [str(PAPER_COPA) if name == "copa" else name for name in wanted]
    remedy = (
        "check the network and the packages that it needs, or give --data-dir with local files of "
        "the paper's tasks (docs/evaluation.md)"
    )
    return _load(wanted, manager, remedy=remedy)


def _offline(
    names: Sequence[str], data_dir: str, prompt_style: PromptStyle, include_path: str | None
) -> Selection:
    if not Path(data_dir).is_dir():
        raise UsageError(
            f"--data-dir {data_dir} is not a folder; docs/evaluation.md says what is in it"
        )
    for name in names:
        if name in PAPER_TASKS:
            find_file(name, data_dir)
        elif include_path is None:
            _check_known(name, PAPER_TASKS, where="--data-dir serves")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at the import of the harness
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = [TASK_FOLDER, *([include_path] if include_path else [])]
    manager = TaskManager(
        include_path=folders, include_defaults=False, metadata={"data_dir": str(data_dir)}
    )
    for name in names:
        where = "--data-dir and --include-path serve"
        _check_known(name, manager.all_tasks, where=where, include_path=include_path)
    is_paper = prompt_style == "paper"
    wanted = [PAPER_COPA.stem if is_paper and name == "copa" else name for name in names]
    remedy = "check its file, and that its data is local: with --data-dir no network is used"
    return _load(wanted, manager, remedy=remedy)


def _load(names: Sequence[str], manager: Any, *, remedy: str) -> Selection:
    """Build tasks, which reads their data and imports the code that they name."""
    built: list[Any] = []
    for name in names:
        try:
            with _harness_errors() as said:
                found = _outermost(manager.load([name]))
        except UsageError:
            raise
        except Exception as error:  # of files and code that are not ours, and of the network
            reason, file = "; ".join([_in_words(error), *said]), _file_of(name, manager)
            if file and _is_users(file):
                remedy = f"{remedy}; its file is {file}" if _of_network(error) else f"mend {file}"
            raise UsageError(f"--tasks {name} cannot be loaded ({reason}): {remedy}") from error
        try:
            manager.load([*built, *found])
        except ValueError as error:
            raise UsageError(f"--tasks {name}: {error}. Leave one of them out.") from error
        built += found
    return Selection(built, manager)


def _outermost(loaded: Any) -> list[Any]:
    """Return the groups and tasks that are in no group."""
    inner = set(itertools.chain.from_iterable(loaded["group_map"].values()))
    both = loaded["groups"] | loaded["tasks"]
    return [item for name, item in both.items() if name not in inner]


def _file_of(name: str, manager: Any) -> Path | None:
    """Return the YAML file of a task or group; None: it is not known."""
    entry = manager.task_index.get(name)
    return entry and entry.yaml_path


def _is_users(file: Path) -> bool:
    import lm_eval

    return {TASK_FOLDER, Path(lm_eval.__file__).parent}.isdisjoint(file.parents)


def _in_words(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _of_network(error: Exception) -> bool:
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or library in NETWORK


@contextlib.contextmanager
def _harness_errors() -> Iterator[list[str]]:
    """Collect what the harness logs as an error, of which its exceptions may say nothing."""
    said: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("lm_eval"), Collect(logging.ERROR)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def _unread(folder: str | None) -> Iterator[str]:
    """Yield the task files of a folder that the harness passes over in silence, and why."""
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(Path(folder).rglob("*.yaml")) if folder else ():
        try:
            TaskIndex.process_cfg(load_yaml(path, resolve_func=False), path, {})
        except Exception as error:  # of any kind, as the harness itself catches it
            yield f"{path} is passed over ({' '.join(str(error).split())[:200]})"


def _check_known(
    name: str,
    known: Sequence[str],
    *,
    where: str = "known are",
    include_path: str | None = None,
) -> None:
    """Raise `UsageError` where a task is unknown, with files that may be its, and near names."""
    if name in known:
        return
    unread = "; ".join(_unread(include_path))
    hint = did_you_mean(name, known, most=3, cutoff=0.5)
    few = f"{where} {', '.join(known)}" if len(known) < 20 else ""
    text = "; ".join(part for part in (unread, hint, few) if part) or "`lm_eval ls tasks` lists all"
    raise UsageError(f"--tasks {name} is not a task: {text}")
