"""The environment variables of sparsekd: one table, and one place that refuses wrong values.

A wrong value must not be ignored: with a misspelt instruction set, training would silently run at a
quarter of the speed. All variables are checked when sparsekd is imported, and again by `ops.info`
and wherever one is read.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from sparsekd.errors import SettingError

PREFIX = "SPARSEKD_"


class Setting(NamedTuple):
    """An environment variable.

    Args:
        choices: valid values.
        folder: whether the path of a folder is valid too.
    """

    choices: tuple[str, ...]
    folder: bool = False

    @property
    def expected(self) -> str:
        """Description of the valid values."""
        words = [*self.choices, *(["the path of a folder"] if self.folder else [])]
        return " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"


TABLE: Mapping[str, Setting] = {
    "SPARSEKD_BACKEND": Setting(
        (
            "auto",
            "cpp",
            "dense",
            "reference",
            "triton",
            "cuda",
            "semi_structured",
            "dense_cuda",
            "gpu",
        )
    ),
    "SPARSEKD_ISA": Setting(("auto", "scalar", "generic", "avx2", "avx512")),
    "SPARSEKD_CACHE": Setting(("off",), folder=True),
    "SPARSEKD_TUNE": Setting(("on", "off")),
    "SPARSEKD_CPP": Setting(("on", "off")),  # this and the next: of the build
    "SPARSEKD_CUDA": Setting(("auto", "on", "off")),
    "SPARSEKD_EMULATION_SANITIZED": Setting(("1", "thread")),  # of the tests
}
"""Every variable by name. The docs list them, see docs/dispatch.md."""

_SWITCHES = frozenset(("on", "off", "yes", "no", "true", "false", "none", "auto", "0", "1"))


def get(name: str) -> str | None:
    """Return the value of a variable, or None if it is unset or empty.

    Args:
        name: of the variable, one of `TABLE`.

    Raises:
        SettingError: the value is not valid.

    Example:
        >>> get("SPARSEKD_TUNE") in (None, "on", "off")
        True
    """
    value = os.environ.get(name)
    if not value:
        return None
    setting = TABLE[name]
    if value not in setting.choices and not (setting.folder and _may_be_folder(value)):
        raise SettingError(f"{name}: expected {setting.expected}, got {value!r}")
    return value


def _may_be_folder(value: str) -> bool:
    """Distinguish a path, of a folder or of nothing yet, from a misspelt switch."""
    path = Path(value)
    return value.lower() not in _SWITCHES and (path.is_dir() or not path.exists())


def check() -> None:
    """Check the values of all variables.

    Raises:
        SettingError: a value is not valid; the message names the variable, the value and the valid
            ones.

    Example:
        >>> check()
    """
    for name in TABLE:
        get(name)


def warn_of_unknown(names: Iterable[str]) -> None:
    """Warn about names that start like a variable of sparsekd but are none.

    Args:
        names: of environment variables.

    Example:
        >>> warn_of_unknown(["PATH", "SPARSEKD_BACKEND"])
    """
    known = [name.removeprefix(PREFIX) for name in TABLE]
    for name in names:
        if not name.startswith(PREFIX) or name in TABLE:
            continue
        close = difflib.get_close_matches(name.removeprefix(PREFIX), known)
        meant = [PREFIX + word for word in close]
        hint = f"did you mean {' or '.join(meant)}?" if meant else f"it has {', '.join(TABLE)}"
        warnings.warn(f"{name} is set, but sparsekd has no such variable; {hint}", stacklevel=2)
