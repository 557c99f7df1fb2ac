"""The global random generators of a process, seeded for a while and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed the global generators of torch's CPU, Python and NumPy, from which transforms draw.

    Args:
        seed: at least 0.

    Example:
        >>> with RandomState(0).in_use():
        ...     seed_all(1)
        ...     x = torch.rand(())
        >>> with RandomState(1).in_use():
        ...     bool(x == torch.rand(()))
        True
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what transforms of other packages draw from


class RandomState:
    """A state of the global generators that is in use at times and goes on where it stopped.

    Args:
        seed: of its beginning.

    Example:
        >>> before = torch.get_rng_state()
        >>> state = RandomState(seed=3)
        >>> with state.in_use():
        ...     first = torch.rand(())
        >>> torch.equal(before, torch.get_rng_state())
        True
        >>> with state.in_use():
        ...     bool(first == torch.rand(()))
        False
    """

    def __init__(self, seed: int) -> None:
        before = _states()
        seed_all(seed)
        self._own = _states()
        _restore(before)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Make this the state of the process within the context."""
        before = _states()
        _restore(self._own)
        try:
            yield
        finally:
            self._own = _states()
            _restore(before)


def _states() -> tuple:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def _restore(states: tuple) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002
