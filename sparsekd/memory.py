"""Process-wide settings of the allocator, so that a training step does not pay for page faults."""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)

# Parameters of mallopt(3); -1 reads as "never" because glibc converts the value to size_t.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_SETTINGS = ((_M_MMAP_THRESHOLD, -1), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 1 << 30))

_applied = False


def keep_memory_warm() -> bool:
    """Keep memory that tensors free inside this process instead of returning it to the system.

    torch's CPU allocator passes each large activation to malloc, which maps fresh pages and unmaps
    them again every step; zeroing them costs up to a third of a sparse training step. This raises
    glibc's thresholds for mapping and trimming and lets the heap grow by 1 GiB at a time. The
    process then keeps its peak memory until it ends. Sparse and dense code both gain from it, so a
    comparison must have it on, or off, for both. A second call does nothing.

    Returns:
        True if the settings are active, False where the C library does not have them (anything
        but glibc on Linux); a log message then says so.

    Source: mallopt(3), parameters M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD.

    Example:
        >>> active = keep_memory_warm()
    """
    global _applied
    if not _applied:
        mallopt = _find_mallopt()
        if mallopt is None:
            logger.warning("keep_memory_warm: needs glibc on Linux, found %s; no effect", _libc())
            return False
        accepted = [mallopt(parameter, value) for parameter, value in _SETTINGS]
        _applied = all(answer == 1 for answer in accepted)
        if not _applied:
            logger.warning("keep_memory_warm: glibc %s refused a setting; no effect", _libc())
    return _applied


def trim() -> None:
    """Return freed memory to the system, also after `keep_memory_warm`; a no-op without glibc.

    Networks that take turns in one process leave holes between each other's tensors; this returns
    the pages of the holes.

    Source: malloc_trim(3).

    Example:
        >>> trim()
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.malloc_trim(0)


def _find_mallopt() -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    # musl has no mallopt, and other C libraries accept it without doing anything.
    if not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return None
    mallopt = library.mallopt
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    return mallopt


def _libc() -> str:
    if not sys.platform.startswith("linux"):
        return sys.platform
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return "another C library"
    library.gnu_get_libc_version.restype = ctypes.c_char_p
    return library.gnu_get_libc_version().decode()
