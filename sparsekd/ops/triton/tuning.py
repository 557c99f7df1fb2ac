"""Sizes of blocks by measurement: what `config.candidates` allows, timed on the GPU in use.

The first launch of a kind is made with every candidate, which takes some seconds, most of them to
compile; from then on, in this process and through a file in every later one, the fastest is used.
No candidate changes a result. Nothing is measured on the CPU, while a CUDA graph is recorded, for
few positions, or with SPARSEKD_TUNE=off; such launches use the table.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.errors import TritonError

from sparsekd import settings
from sparsekd.kernels import config
from sparsekd.ops.single import Single
from sparsekd.ops.store import Store, path_of

logger = logging.getLogger(__name__)

VARIABLE = "SPARSEKD_TUNE"
LEAST_POSITIONS = 1024  # fewer take a GPU microseconds, whatever the blocks
_WARMUP_MS, _TIMED_MS = 5, 20

Launch = Callable[[config.Config], None]
Clock = Callable[[Callable[[], None]], float]  # milliseconds of a run


class Work(NamedTuple):
    """A launch, as far as its time depends on it.

    Args:
        kernel: its name, which ends in "product" or "sample".
        arithmetic: dtype and precision.
        chunk: outputs and columns of a chunk.
        positions: how many there are.
        device: where.
    """

    kernel: str
    arithmetic: str
    chunk: tuple[int, int]
    positions: int
    device: torch.device


@dataclass(frozen=True)
class Tuned:
    """The fastest sizes, and their time."""

    positions: int
    num_warps: int
    num_stages: int
    ms: float

    @classmethod
    def of(cls, row: dict[str, Any]) -> Tuned:
        """Parse a line; raises ValueError, KeyError or TypeError if it is damaged."""
        sizes = {name: row[name] for name in config.Config._fields}
        if not all(isinstance(size, int) for size in sizes.values()):
            raise TypeError("sizes")
        return cls(**sizes, ms=float(row["ms"]))


class Tuner:
    """The choice of block sizes by measurement.

    Args:
        store: what was measured before.
        clock_for: what times launches of some work, None where they must not be timed.
    """

    def __init__(self, store: Store[Tuned], clock_for: Callable[[Work], Clock | None]) -> None:
        self.store = store
        self._clock_for = clock_for
        self._best: dict[Any, config.Config] = {}
        self._lock = threading.RLock()

    def sizes(self, work: Work, base: config.Config, launch: Launch) -> config.Config:
        """Return the sizes to launch with.

        Args:
            work: what is launched.
            base: the sizes that the table has for it.
            launch: makes the launch with given sizes; it may be made any number of times.
        """
        step = (work.positions - 1).bit_length()
        key = work._replace(positions=step), base
        best = self._best.get(key)
        if best is not None:
            return best
        clock = self._clock_for(work)
        if clock is None:
            return base
        allowed = config.candidates(work.kernel.rpartition("_")[-1], base, work.positions)
        with self._lock:  # measurements must not disturb each other
            kind = _describe(work, base)
            known = self.store.get(kind, step)
            if known is None:
                times = _measure(kind, allowed, launch, clock)
                if times:
                    best = min(times, key=times.__getitem__)
                    known = self.store.add(kind, step, Tuned(*best, ms=times[best]))
                    logger.info("%s: %s, %.3f ms", kind, best, times[best])
        best = base if known is None else config.Config(*astuple(known)[:-1])
        # Of a file that somebody has edited only what may be launched counts.
        return self._best.setdefault(key, best if best in allowed else base)


def _measure(
    kind: str, allowed: tuple[config.Config, ...], launch: Launch, clock: Clock
) -> dict[config.Config, float]:
    """Return the milliseconds of each that this GPU has room for."""
    times = {}
    for how in allowed:
        try:
            times[how] = clock(partial(launch, how))
        except (TritonError, torch.OutOfMemoryError) as error:
            logger.debug("%s with %s: %s", kind, how, error)
    return times


def _describe(work: Work, base: config.Config) -> str:
    chunk, sizes = "x".join(map(str, work.chunk)), "/".join(map(str, base))
    return f"{work.kernel} {work.arithmetic} {chunk} from {sizes} on {name_of(work.device)}"


@cache
def name_of(device: torch.device) -> str:
    """Return the name of a GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def gpu_clock(work: Work) -> Clock | None:
    """Return a clock where a launch may be timed, else None."""
    return None if work.positions < LEAST_POSITIONS else clock_on(work.device)


def clock_on(device: torch.device) -> Clock | None:
    """Return Triton's clock where work on a device may be timed, which waits for it, else None."""
    if device.type != "cuda" or not enabled() or torch.cuda.is_current_stream_capturing():
        return None
    return partial(triton.testing.do_bench, warmup=_WARMUP_MS, rep=_TIMED_MS, return_mode="median")


def enabled() -> bool:
    """Return whether launches on a GPU are tuned; raises SettingError if SPARSEKD_TUNE is wrong."""
    return settings.get(VARIABLE) != "off"


@Single
def tuner() -> Tuner:
    """Return the tuner of this process."""
    return Tuner(Store(path_of("tuning", surroundings()), Tuned.of), gpu_clock)


def surroundings() -> dict[str, Any]:
    """Describe what the time of a launch depends on besides the work and the GPU."""
    sources = sorted(Path(config.__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {"torch": torch.__version__, "triton": triton.__version__, "kernels": digest}


def info() -> dict[str, Any]:
    """Return whether launches are tuned, the path of the file and the number of entries known."""
    return {"enabled": enabled(), **tuner().store.info()}
