"""Measured choices, kept in a file so that every process of this machine makes the same ones.

One JSON line per choice, only ever appended, the first line of a key being the one that counts: so
processes that write at once agree, and a torn line costs a measurement, not the file. The name of
the file stands for everything that timings depend on besides the key: processor, instruction sets,
torch, and the compiled kernels themselves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import sparsekd._C as _C
from sparsekd.ops.processor import cpu_name

logger = logging.getLogger(__name__)

VARIABLE = "SPARSEKD_CACHE"
_FORMAT = 1


@dataclass(frozen=True)
class Choice:
    """Hold which backend runs an op, and why.

    Args:
        backend: "cpp" or "dense".
        cpp_ms: what the sparse kernel took; None where the choice follows from another one.
        dense_ms: likewise on the dense weight.
    """

    backend: str
    cpp_ms: float | None = None
    dense_ms: float | None = None

    @property
    def clear(self) -> bool:
        """Whether it was measured, and by far more than timings vary."""
        if self.cpp_ms is None or self.dense_ms is None:
            return False
        return max(self.cpp_ms, self.dense_ms) > 1.5 * min(self.cpp_ms, self.dense_ms)


class Choices:
    """Map kinds of ops and density steps to choices, in memory and in a file.

    Args:
        path: of the file; None to keep them in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, dict[int, Choice]] = {}
        self._read_to = 0

    def __len__(self) -> int:
        return sum(map(len, self._known.values()))

    def info(self) -> dict[str, Any]:
        """Return the path of the file and the number of choices known."""
        return {"path": "" if self.path is None else str(self.path), "known": len(self)}

    def get(self, kind: str, step: int) -> Choice | None:
        """Return the choice, also one that another process has made meanwhile, if there is one."""
        if step not in self._known.get(kind, ()):
            self._read()
        return self._known.get(kind, {}).get(step)

    def follows(self, kind: str, step: int) -> str | None:
        """Return the backend that clear measurements at other densities imply, if they do.

        A sparse op gets slower with every nonzero, a dense one does not.
        """
        implied = set()
        for other, choice in self._known.get(kind, {}).items():
            if choice.clear and (other > step if choice.backend == "cpp" else other < step):
                implied.add(choice.backend)
        return implied.pop() if len(implied) == 1 else None

    def add(self, kind: str, step: int, choice: Choice) -> Choice:
        """Record a choice; return the one that counts, which another process may have made."""
        if self.path is not None:
            line = json.dumps({"kind": kind, "step": step, **asdict(choice)})
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab", buffering=0) as file:
                    file.write(f"{line}\n".encode())  # one write call: lines do not interleave
            except OSError as error:
                logger.warning("choices are kept in memory only: %s", error)
                self.path = None
            self._read()
        return self._known.setdefault(kind, {}).setdefault(step, choice)

    def _read(self) -> None:
        """Take over what was appended since the last time; of equal keys the first line counts."""
        if self.path is None:
            return
        try:
            with self.path.open("rb") as file:
                file.seek(self._read_to)
                lines = file.read().splitlines(keepends=True)
        except OSError:  # not written yet, or not readable: then nothing is known
            return
        for line in lines:
            if not line.endswith(b"\n"):
                return  # another process is writing it
            self._read_to += len(line)
            parsed = _parse(line)
            if parsed is not None:
                kind, step, choice = parsed
                self._known.setdefault(kind, {}).setdefault(step, choice)


def _parse(line: bytes) -> tuple[str, int, Choice] | None:
    """Return what a line says, None if it is damaged."""
    try:
        row = json.loads(line)
        kind, step = row["kind"], row["step"]
        choice = Choice(row["backend"], *(_time(row[name]) for name in ("cpp_ms", "dense_ms")))
    except (ValueError, KeyError, TypeError):
        return None
    sound = choice.backend in ("cpp", "dense") and isinstance(kind, str) and isinstance(step, int)
    return (kind, step, choice) if sound else None


def _time(value: Any) -> float | None:
    return None if value is None else float(value)


def default_path() -> Path | None:
    """Return the file of this machine, None if SPARSEKD_CACHE is "off".

    SPARSEKD_CACHE names a folder; without it, it is `sparsekd` in the user's cache folder.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted == "off":
        return None
    if wanted:
        folder = Path(wanted)
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        try:
            folder = (Path(base) if base else Path.home() / ".cache") / "sparsekd"
        except RuntimeError:  # there is no home
            return None
    digest = hashlib.sha256(json.dumps(surroundings(), sort_keys=True).encode()).hexdigest()
    return folder / f"dispatch-{digest[:16]}.jsonl"


@cache
def surroundings() -> dict[str, Any]:
    """Return what timings depend on besides the op and its operands."""
    compiled = _C.info()
    return {
        "format": _FORMAT,
        "processor": cpu_name(),
        "isa": compiled["isa"],
        "caches": [compiled["l1d_bytes"], compiled["l2_bytes"]],
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "onednn_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "kernels": hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest(),
    }
