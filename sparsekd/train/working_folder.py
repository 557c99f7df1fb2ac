"""A folder that one process at a time works in, and what a killed one has left there."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import BinaryIO

from sparsekd.errors import FolderInUseError

_locks: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """Close the locks in a forked process: a worker that loads data may outlive its parent.

    A lock is free when the last process that has its file has closed it.
    """
    for file in list(_locks):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def lock_folder(path: Path) -> BinaryIO:
    """Take a folder for this process.

    Args:
        path: the folder; created if missing.

    Returns:
        A file; the folder is free again once it is closed.

    Raises:
        FolderInUseError: another process works there.

    Example:
        >>> import tempfile
        >>> with lock_folder(Path(tempfile.mkdtemp())) as file:
        ...     Path(file.name).name
        '.lock'
    """
    path.mkdir(parents=True, exist_ok=True)
    file = open(path / ".lock", "wb")  # noqa: SIM115 - stays open as long as the lock is held
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock
        pass
    else:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise FolderInUseError(
                f"{path}: another process is training here; wait until it is done, or choose "
                "another --out"
            ) from None
        _locks.add(file)
    return file


def remove_unfinished(path: Path) -> None:
    """Remove files that `write_atomic` had not finished when its process was killed.

    Args:
        path: a folder that this process has taken.
    """
    for unfinished in path.rglob(".*.tmp"):
        unfinished.unlink()
