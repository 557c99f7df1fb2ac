"""Which processor this is."""

from __future__ import annotations

import platform
from pathlib import Path


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
