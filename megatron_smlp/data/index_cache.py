"""Make Megatron's sample index caches safe for jobs that start at the same time and after a crash.

Megatron writes its `.npy` files under their final names and trusts every file that exists. Here
only one job at a time builds in a cache folder, after removing what a killed job left unfinished.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from megatron_smlp.durable import lock_if_possible
from megatron_smlp.errors import DataError

CLASS_FOLDER = "WatchedGPTDataset_indices"
LOCK_NAME = ".building.lock"
THREADS = 32
"""Files opened at a time: there may be thousands, on a file system that answers slowly."""
INDICES = ("*-WatchedGPTDataset-*_index.npy", "*-BlendedDataset-*_index.npy")


def cache_folders(prefixes: Sequence[str], *, path_to_cache: str | None) -> list[Path]:
    """Return where Megatron puts their caches: `--data-cache-path`, or next to each dataset."""
    if path_to_cache is not None:
        return [Path(path_to_cache)]
    return sorted({Path(prefix) / "cache" / CLASS_FOLDER for prefix in prefixes})


@contextmanager
def exclusive_caches(folders: Sequence[Path]) -> Iterator[None]:
    """Lock the cache folders while Megatron builds or loads; call on one rank of a job.

    A folder or lock that exists but is not writable is left alone: another user builds in it.

    Raises:
        DataError: a missing folder cannot be created, or a folder cannot be locked or cleaned up.
    """
    with ExitStack() as stack:
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / LOCK_NAME
                if os.access(path if path.exists() else folder, os.W_OK):
                    lock = stack.enter_context(path.open("ab"))
                    lock_if_possible(lock, fcntl.LOCK_EX)
                    remove_unfinished(folder)
            except OSError as error:
                raise DataError(
                    f"the sample index cannot be cached in {folder} ({error.strerror}: "
                    f"{error.filename or LOCK_NAME}); give another folder with --data-cache-path"
                ) from None
        yield


def remove_unfinished(folder: Path) -> list[Path]:
    """Remove indices that are shorter than their headers say, and return them.

    Megatron rebuilds all files of a dataset if one of them is missing. The folder may contain other
    files.
    """
    indices = sorted(path for pattern in INDICES for path in folder.glob(pattern))
    with ThreadPoolExecutor(THREADS) as pool:
        whole = list(pool.map(_is_whole, indices))
    broken = [path for path, is_whole in zip(indices, whole, strict=True) if not is_whole]
    for path in broken:
        path.unlink()
    return broken


def _is_whole(path: Path) -> bool:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    # An empty file, a truncated header, or fewer bytes than the header says.
    except (ValueError, EOFError):
        return False
    # Another user's file, or a transient disk error: it may be complete and in use.
    except OSError:
        return True
    return bool(os.path.getsize(path) >= array.nbytes)  # noqa: PTH202
