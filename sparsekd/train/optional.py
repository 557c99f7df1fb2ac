"""Packages that only some commands need."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from sparsekd.errors import UnavailableError


def need(package: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        package: its name.
        extra: of sparsekd, which has it.

    Raises:
        UnavailableError: it is not installed; the message names the extra.

    Example:
        >>> need("json", "onnx").loads("1")
        1
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise UnavailableError(
            f"{package} is not installed; pip install 'sparsekd[{extra}]' has it ({error})"
        ) from None
