"""Singletons of a process, made on first use by exactly one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Single(Generic[Made]):
    """A function that makes its result once; `functools.cache` lets two threads make it twice.

    Args:
        make: is called at the first call, and at the first one after `cache_clear`.
    """

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make = make
        self._made: list[Made] = []
        self._lock = threading.Lock()

    def __call__(self) -> Made:
        """Return the result."""
        made = self._made
        if made:
            return made[0]
        with self._lock:
            if not self._made:
                self._made = [self._make()]
            return self._made[0]

    def cache_clear(self) -> None:
        """Forget the result."""
        with self._lock:
            self._made = []
