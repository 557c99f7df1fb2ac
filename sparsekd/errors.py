"""Every error sparsekd raises on purpose; each is also the builtin a caller would expect."""

from __future__ import annotations


class SparsekdError(Exception):
    """Base of all errors raised by sparsekd."""


class ShapeError(SparsekdError, ValueError):
    """Report a tensor or argument whose shape does not fit."""


class TopologyError(SparsekdError, ValueError):
    """Report a structure of nonzeros that is not valid."""


class UnsupportedError(SparsekdError, NotImplementedError):
    """Report a request outside the supported set; the text says what is supported."""


class BackendError(SparsekdError, RuntimeError):
    """Report a backend that cannot run here; the text says how to get it."""


class SettingError(BackendError, ValueError):
    """An environment variable with a value that it does not take; the text names the choices."""


class OptimizerStateError(SparsekdError, RuntimeError):
    """Report optimizer state that cannot follow its weights."""


class CheckpointError(SparsekdError, RuntimeError):
    """Report a checkpoint that is damaged or does not fit."""


class DataError(SparsekdError, ValueError):
    """Report a data set that is missing, damaged or mislabelled."""
