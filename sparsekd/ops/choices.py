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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

import sparsekd._C as _C
from sparsekd.ops.processor import cpu_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

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

    @classmethod
    def of(cls, row: dict[str, Any]) -> Choice:
        """Return what a line says; raises ValueError, KeyError or TypeError if it is damaged."""
        if row["backend"] not in ("cpp", "dense"):
            raise ValueError("backend")
        return cls(row["backend"], *(_time(row[name]) for name in ("cpp_ms", "dense_ms")))


Kept = TypeVar("Kept", bound="DataclassInstance")  # of plain values


class Store(Generic[Kept]):
    """Map kinds of work, each in numbered steps, to what was measured, in memory and in a file.

    Args:
        path: of the file; None to keep it in memory only.
        of: makes an entry of a line's fields; raises ValueError, KeyError or TypeError.
    """

    def __init__(self, path: Path | None, of: Callable[[dict[str, Any]], Kept]) -> None:
        self.path = path
        self._of = of
        self._known: dict[str, dict[int, Kept]] = {}
        self._read_to = 0

    def __len__(self) -> int:
        return sum(map(len, self._known.values()))

    def info(self) -> dict[str, Any]:
        """Return the path of the file and the number of entries known."""
        return {"path": "" if self.path is None else str(self.path), "known": len(self)}

    def get(self, kind: str, step: int) -> Kept | None:
        """Return the entry, also one that another process has made meanwhile, if there is one."""
        if step not in self._known.get(kind, ()):
            self._read()
        return self._known.get(kind, {}).get(step)

    def add(self, kind: str, step: int, made: Kept) -> Kept:
        """Record an entry; return the one that counts, which another process may have made."""
        if self.path is not None:
            line = json.dumps({"kind": kind, "step": step, **asdict(made)})
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab", buffering=0) as file:
                    file.write(f"{line}\n".encode())  # one write call: lines do not interleave
            except OSError as error:
                logger.warning("choices are kept in memory only: %s", error)
                self.path = None
            self._read()
        return self._known.setdefault(kind, {}).setdefault(step, made)

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
            parsed = self._parse(line)
            if parsed is not None:
                kind, step, made = parsed
                self._known.setdefault(kind, {}).setdefault(step, made)

    def _parse(self, line: bytes) -> tuple[str, int, Kept] | None:
        """Return what a line says, None if it is damaged."""
        try:
            row = json.loads(line)
            kind, step, made = row["kind"], row["step"], self._of(row)
        except (ValueError, KeyError, TypeError):
            return None
        return (kind, step, made) if isinstance(kind, str) and isinstance(step, int) else None


class Choices(Store[Choice]):
    """Map kinds of ops and density steps to choices.

    Args:
        path: of the file; None to keep them in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__(path, Choice.of)

    def follows(self, kind: str, step: int) -> str | None:
        """Return the backend that clear measurements at other densities imply, if they do.

        A sparse op gets slower with every nonzero, a dense one does not.
        """
        implied = set()
        for other, choice in self._known.get(kind, {}).items():
            if choice.clear and (other > step if choice.backend == "cpp" else other < step):
                implied.add(choice.backend)
        return implied.pop() if len(implied) == 1 else None


def _time(value: Any) -> float | None:
    return None if value is None else float(value)


def default_path() -> Path | None:
    """Return the file of the dispatcher's choices, None if SPARSEKD_CACHE is "off"."""
    return path_of("dispatch", surroundings())


def path_of(name: str, facts: dict[str, Any]) -> Path | None:
    """Return the file for what was measured in certain surroundings, None for memory only.

    SPARSEKD_CACHE names a folder, or is "off"; without it, it is `sparsekd` in the user's cache
    folder.

    Args:
        name: how the file's name starts.
        facts: what the measurements depend on besides their keys.
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
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return folder / f"{name}-{digest[:16]}.jsonl"


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
