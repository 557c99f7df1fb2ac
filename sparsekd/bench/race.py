"""Competitors and a race between them: results pass the gate, then all are timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from sparsekd.bench import gate
from sparsekd.timing import interleave
from sparsekd.train import Row

Problem = TypeVar("Problem")
Run = TypeVar("Run")
Key = tuple[str, float | None]  # competitor and sparsity
_PAUSE = 0.005  # seconds for another package's idle threads to stop spinning


def runs_anywhere(case: Any) -> str | None:
    """Return None: nothing is missing for any case."""
    return None


@dataclass(frozen=True)
class Competitor(Generic[Problem, Run]):
    """One way to compute a layer or a training step.

    Args:
        name: in rows and options.
        label: in tables and figures.
        build: prepares a problem to be run.
        missing: the reason why it cannot run a case here, None if it can.
        sparse: whether its time depends on the sparsity; a dense one is timed once for all.
        dtype: in which it multiplies.
        least: lowest sparsity it is tried at.
        network: the only network it is timed on; None for all.
    """

    name: str
    label: str
    build: Callable[[Problem], Run]
    missing: Callable[[Any], str | None] = runs_anywhere
    sparse: bool = False
    dtype: torch.dtype = torch.float32
    least: float = 0.0
    network: str | None = None

    def obstacle(self, case: Any, sparsity: float) -> str | None:
        """Return why it is not timed on a case at a sparsity, None if it is."""
        if self.sparse and sparsity < self.least:
            return f"timed from {self.least:.0%} sparsity on"
        return self.missing(case)


Field = Mapping[str, Competitor[Any, Any]]  # by name, in the order of tables


def by_name(*competitors: Competitor[Problem, Run]) -> dict[str, Competitor[Problem, Run]]:
    """Return a table of competitors, in this order."""
    return {competitor.name: competitor for competitor in competitors}


def timed_on(case: Any, competitors: Field) -> set[str]:
    """Return the names of the competitors that are timed on a network."""
    return {name for name, one in competitors.items() if one.network in (None, case.name)}


def pairs(competitors: Field, sparsities: Sequence[float]) -> list[Key]:
    """Pair every sparse competitor with every sparsity; a dense one runs once, at none.

    Example:
        >>> from sparsekd.bench.layers import LAYER_COMPETITORS
        >>> two = {name: LAYER_COMPETITORS[name] for name in ("dense_contiguous", "sparsekd")}
        >>> pairs(two, (0.8, 0.9))
        [('dense_contiguous', None), ('sparsekd', 0.8), ('sparsekd', 0.9)]
    """
    dense: list[Key] = [(name, None) for name, entry in competitors.items() if not entry.sparse]
    return dense + [(name, s) for s in sparsities for name, e in competitors.items() if e.sparse]


def is_ours(name: str) -> bool:
    """Return whether a competitor of this name runs kernels of sparsekd.

    Example:
        >>> is_ours("sparsekd_contiguous"), is_ours("dense_bf16")
        (True, False)
    """
    return name.startswith("sparsekd")


class Session(Protocol):
    """What is measured together: the unit that is skipped when all its rows exist."""

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""

    def keys(self) -> list[Key]:
        """List the rows it gives."""

    def measure(self) -> list[Row]:
        """Measure them."""


class Ready(NamedTuple):
    """A competitor that is ready to be timed.

    Args:
        call: what is timed.
        errors: relative error of each of its results.
        bounds: the largest error allowed of each.
        facts: what else the row says about it.
    """

    call: Callable[[], object]
    errors: Mapping[str, float]
    bounds: Mapping[str, float]
    facts: Mapping[str, Any] = MappingProxyType({})


# A row that names a competitor, and what builds it and computes its results for the first time;
# one whose row has a reason under `skipped` does not run.
Entry = tuple[Row, Callable[[], Ready]]


def take_turns(
    entries: Iterable[Entry],
    *,
    rounds: int,
    slow: float,
    least: float = 0.02,
    device: torch.device | None = None,
) -> list[Row]:
    """Compare every competitor's results with the reference, then time those that are right.

    Args:
        entries: one for each competitor and sparsity.
        rounds: turns of each.
        slow: those that take more seconds than this have three turns at most.
        least: seconds of a turn; a shorter call is repeated within it.
        device: where they compute; None is the CPU.

    Returns:
        A row for each entry, in their order: with `ms` (the median), `times` and `error`, or with
        the reason it has none as `skipped`, `refused` (wrong results) or `failed` (it raised).

    Example:
        >>> good = Ready(lambda: None, errors={"output": 0.0}, bounds={"output": 1e-6})
        >>> wrong = Ready(lambda: None, errors={"output": 0.5}, bounds={"output": 1e-6})
        >>> entries = [({"arm": "a"}, lambda: good), ({"arm": "b"}, lambda: wrong)]
        >>> [sorted(row) for row in take_turns(entries, rounds=1, slow=1.0)]
        [['arm', 'error', 'ms', 'times'], ['arm', 'ms', 'refused']]
    """
    rows: list[Row] = []
    calls: dict[int, Callable[[], object]] = {}
    for number, (row, prepare) in enumerate(entries):
        outcome, call = ({"ms": None}, None) if "skipped" in row else _admit(prepare)
        rows.append({**row, **outcome})
        if call is not None:
            calls[number] = call
    times = interleave(
        calls, rounds, settle=True, least=least, pause=_PAUSE, slow=slow, device=device
    )
    for number, turns in times.items():
        rows[number] |= {
            "ms": round(statistics.median(turns), 4),
            "times": [round(turn, 4) for turn in turns],
        }
    return rows


def _admit(prepare: Callable[[], Ready]) -> tuple[Row, Callable[[], object] | None]:
    try:
        ready = prepare()
    except Exception as error:  # another package's, or a shape it does not take: the race goes on
        return {"ms": None, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}, None
    reason = gate.refusal(ready.errors, ready.bounds)
    if reason:
        return {"ms": None, "refused": reason}, None
    largest = float(f"{max(ready.errors.values(), default=0.0):.2g}")
    return {"error": largest, **ready.facts}, ready.call


@dataclass(frozen=True)
class Race:
    """A race over one case; subclasses say what is computed and when it is right.

    Args:
        case: the layer or network.
        sparsities: at which sparse competitors run; dense ones run once.
        competitors: by name.
        rounds: turns of each.
    """

    case: Any
    sparsities: tuple[float, ...]
    competitors: Field
    rounds: int

    slow = 1.5  # seconds; a slower competitor takes fewer turns
    least = 0.02  # seconds of a turn

    def keys(self) -> list[Key]:
        """List the rows it gives."""
        return pairs(self.competitors, self.sparsities)

    def measure(self) -> list[Row]:
        """Measure them."""
        return take_turns(self._entries(), rounds=self.rounds, slow=self.slow, least=self.least)

    def _problems(self) -> Iterator[Any]:
        """Build for each sparsity what competitors are given, and its right results."""
        raise NotImplementedError

    def _work(self, competitor: Any, given: Any) -> Row:
        """Return the fields of a row about the work that a competitor does."""
        raise NotImplementedError

    def _ready(self, competitor: Any, given: Any) -> Ready:
        """Build a competitor and compare its results with the right ones."""
        raise NotImplementedError

    def _entries(self) -> Iterator[Entry]:
        for sparsity, given in zip(self.sparsities, self._problems(), strict=True):
            for name, competitor in self.competitors.items():
                if competitor.sparse or sparsity == self.sparsities[0]:
                    row = {
                        "arm": name,
                        "sparsity": sparsity if competitor.sparse else None,
                        "batch": self.case.batch,
                        **self._work(competitor, given),
                    }
                    if reason := competitor.obstacle(self.case, sparsity):
                        row["skipped"] = reason
                    yield row, partial(self._ready, competitor, given)
