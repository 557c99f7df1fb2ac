"""The processor, and the instruction set that the kernels use."""

from __future__ import annotations

import platform
from pathlib import Path

from sparsekd import settings
from sparsekd.errors import SettingError


def cpu_name() -> str:
    """Return the processor's name, as the system gives it.

    Example:
        >>> cpu_name() != ""
        True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" in fields:
        family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
        return f"{fields['model name']} ({family})"
    return platform.processor() or platform.machine()


def select_isa() -> None:
    """Select the instruction set of the compiled kernels by SPARSEKD_ISA.

    The compiled module does not read the variable itself: an import that fails for a wrong value
    would look like a module that is missing, and the slow reference would run.

    Raises:
        SettingError: this processor, or this build, does not have it.

    Example:
        >>> select_isa()
    """
    wanted = settings.get("SPARSEKD_ISA")
    if wanted is None:
        return
    try:
        import sparsekd._C as _C
    except ModuleNotFoundError:  # there are no kernels, and so nothing to choose
        return
    available = _C.info()["isas"]
    if wanted not in ("auto", *available):
        raise SettingError(
            f"SPARSEKD_ISA: expected one of auto, {', '.join(available)}, which this processor "
            f"has, got {wanted!r}"
        )
    _C.set_isa(wanted)
