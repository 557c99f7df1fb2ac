"""Every error sparsekd raises on purpose; each is also the builtin a caller would expect."""

from __future__ import annotations


class SparsekdError(Exception):
    """Base of all errors raised by sparsekd."""


class ShapeError(SparsekdError, ValueError):
    """A tensor or argument whose shape does not fit."""


class TopologyError(SparsekdError, ValueError):
    """An invalid structure of nonzeros."""


class UnsupportedError(SparsekdError, NotImplementedError):
    """A request outside the supported set; the message says what is supported."""


class BackendError(SparsekdError, RuntimeError):
    """A backend that cannot run here; the message says how to get it."""


class UnavailableError(SparsekdError, ImportError):
    """A part of sparsekd that was not built, or whose device is missing; the message says which."""


class SettingError(BackendError, ValueError):
    """An environment variable with an unknown value; the message lists the valid ones."""


class OptimizerStateError(SparsekdError, RuntimeError):
    """Optimizer state that cannot follow its weights."""


class CheckpointError(SparsekdError, RuntimeError):
    """A checkpoint that is damaged or does not fit."""


class FolderInUseError(CheckpointError):
    """A folder of runs in which another process works."""


class DataError(SparsekdError, ValueError):
    """A data set that is missing, damaged or mislabelled."""
