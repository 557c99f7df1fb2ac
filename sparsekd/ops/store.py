"""Measurements, kept in a file that all processes of this machine share.

One JSON line per measurement, appended in one write, so lines of several processes do not
interleave and a torn one costs a measurement, not the file. A measurement that is made again goes
into a later round; of the lines of a key the latest round counts, and in a round the first line: so
processes that measure at the same time agree. A file that has grown too long is replaced, in one
step, by what this process knows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from sparsekd import settings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

VARIABLE = "SPARSEKD_CACHE"
MOST_BYTES = 1 << 21
"""Length of the file from which on it is written anew."""
MOST_ENTRIES = 4096
"""Entries in memory and in a file that was just written anew; the oldest go first."""

Step = int | tuple[int, ...]
Kept = TypeVar("Kept", bound="DataclassInstance")  # of plain values


class _Entry(NamedTuple, Generic[Kept]):
    round: int
    made: Kept


class Store(Generic[Kept]):
    """A map from cache keys, each in numbered steps, to measurements, in memory and in a file.

    Args:
        path: of the file; None to keep it in memory only.
        of: makes an entry of a line's fields; raises ValueError, KeyError or TypeError.
    """

    def __init__(self, path: Path | None, of: Callable[[dict[str, Any]], Kept]) -> None:
        self.path = path
        self._of = of
        self._known: dict[str, dict[Step, _Entry[Kept]]] = {}
        self._count = 0
        self._read_to = 0
        self._file: tuple[int, int] | None = None  # which one was read: device and inode
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return self._count

    def info(self) -> dict[str, Any]:
        """Return the path of the file and the number of entries known."""
        return {"path": "" if self.path is None else str(self.path), "known": len(self)}

    def get(self, kind: str, step: Step) -> Kept | None:
        """Return the entry, also one that another process has made meanwhile, if there is one."""
        with self._lock:
            if step not in self._known.get(kind, ()):
                self._read()
            entry = self._known.get(kind, {}).get(step)
            return None if entry is None else entry.made

    def of_kind(self, kind: str) -> Iterator[tuple[Any, Kept]]:
        """Iterate over the known entries of a kind, with their steps."""
        with self._lock:
            entries = list(self._known.get(kind, {}).items())
        return ((step, entry.made) for step, entry in entries)

    def all(self) -> list[Kept]:
        """Return the known entries of every kind."""
        with self._lock:
            return [entry.made for steps in self._known.values() for entry in steps.values()]

    def add(self, kind: str, step: Step, made: Kept, *, again: bool = False) -> Kept:
        """Record an entry; return the one that counts, which another process may have made.

        Args:
            kind: of work.
            step: of the kind.
            made: the entry.
            again: whether it was measured anew and takes the place of the one that is known.
        """
        with self._lock:
            known = self._known.get(kind, {}).get(step)
            entry = _Entry(known.round + 1 if again and known is not None else 1, made)
            if self.path is not None:
                self._append(kind, step, entry)
                self._read()
            self._take(kind, step, entry)
            return self._known[kind][step].made

    def _take(self, kind: str, step: Step, entry: _Entry[Kept]) -> None:
        """Record an entry that is new or of a later round."""
        known = self._known.get(kind, {}).get(step)
        if known is not None and known.round >= entry.round:
            return
        steps = self._known.pop(kind, {})
        steps.pop(step, None)
        steps[step] = entry
        self._known[kind] = steps  # both at the end, as the latest
        self._count += known is None
        while self._count > MOST_ENTRIES:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Drop the first step of the kind that got no entry for longest."""
        kind, steps = next(iter(self._known.items()))
        del steps[next(iter(steps))]
        self._count -= 1
        if not steps:
            del self._known[kind]

    def _append(self, kind: str, step: Step, entry: _Entry[Kept]) -> None:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write(_line(kind, step, entry))  # one write call: lines do not interleave
                length = file.tell()
            if length > MOST_BYTES:
                self._write_anew()
        except OSError as error:
            logger.warning("choices are kept in memory only: %s", error)
            self.path = None

    def _write_anew(self) -> None:
        """Replace the file by the latest entries.

        What another process appends at this very moment is lost, and measured again.
        """
        assert self.path is not None
        self._read()
        rows = [(kind, *row) for kind, steps in self._known.items() for row in steps.items()]
        lines = [_line(*row) for row in rows[-MOST_ENTRIES // 2 :]]
        new = self.path.with_suffix(f".{os.getpid()}")
        new.write_bytes(b"".join(lines))
        new.replace(self.path)

    def _read(self) -> None:
        """Read the lines appended since the last time."""
        if self.path is None:
            return
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                found = status.st_dev, status.st_ino
                if found != self._file or status.st_size < self._read_to:  # another file by now
                    self._file, self._read_to = found, 0
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
                self._take(*parsed)

    def _parse(self, line: bytes) -> tuple[str, Step, _Entry[Kept]] | None:
        """Parse a line; None if it is damaged."""
        try:
            row = json.loads(line)
            kind, step = row["kind"], row["step"]
            entry = _Entry(row.get("round", 1), self._of(row))
        except (ValueError, KeyError, TypeError, OverflowError):
            return None
        numbers = [entry.round, *(step if isinstance(step, list) else [step])]
        if not isinstance(kind, str) or not all(type(number) is int for number in numbers):
            return None
        return kind, tuple(step) if isinstance(step, list) else step, entry


def _line(kind: str, step: Step, entry: _Entry[Any]) -> bytes:
    row = {"kind": kind, "step": step, "round": entry.round, **asdict(entry.made)}
    return f"{json.dumps(row)}\n".encode()


def path_of(name: str, facts: dict[str, Any]) -> Path | None:
    """Return the file for measurements in certain surroundings, or None for memory only.

    SPARSEKD_CACHE names a folder, or is "off"; without it, it is `sparsekd` in the user's cache
    folder.

    Args:
        name: how the file's name starts.
        facts: what the measurements depend on besides their keys.

    Raises:
        SettingError: SPARSEKD_CACHE is neither.
    """
    wanted = settings.get(VARIABLE)
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
