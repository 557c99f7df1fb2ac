"""Sup-tickets: short cycles at the end of a sparse run, and the superposition of its tickets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from sparsekd.dst import Updater, replicas
from sparsekd.dst.dynamics import UpdateSchedule, check_fraction, check_positive
from sparsekd.errors import CheckpointError
from sparsekd.nn import sparse_modules
from sparsekd.tickets.superposition import (
    BETA,
    Average,
    blank_copy,
    check_average,
    check_superposable,
    fold_,
    prune_back_,
    warn_of_dead_layers,
)


@dataclass(frozen=True)
class Cycles:
    """The division of a run into a first phase and `count` cycles of equal length at its end.

    Args:
        total_steps: iterations of the whole run.
        cycle_fraction: largest share of them to spend on cycles.
        cycle_steps: iterations of a cycle; `count` is the number of whole cycles that fit.
        lr: learning rate at both ends of a cycle, and in its middle.

    Raises:
        ValueError: a value is out of range.

    Source: Superposing Many Tickets into One (arXiv 2205.15322), section 3 and released code.

    Example:
        >>> cycles = Cycles(250, 0.1, 8, (0.001, 0.005))
        >>> cycles.count, cycles.first_phase, cycles.learning_rate(226 + 8 + 4)
        (3, 226, 0.005)
    """

    total_steps: int
    cycle_fraction: float
    cycle_steps: int
    lr: tuple[float, ...]

    def __post_init__(self) -> None:
        check_positive(total_steps=self.total_steps, cycle_steps=self.cycle_steps)
        check_fraction(cycle_fraction=self.cycle_fraction)
        if len(self.lr) != 2 or not all(rate >= 0 for rate in self.lr):
            raise ValueError(f"lr: expected two numbers of at least 0, got {self.lr}")

    @property
    def count(self) -> int:
        """Number of cycles; 0 if not even one fits."""
        # as written: 0.29 * 100 is 28.999999999999996 in floating point
        share = Fraction(repr(float(self.cycle_fraction)))
        return int(self.total_steps * share) // self.cycle_steps

    @property
    def first_phase(self) -> int:
        """Number of iterations before the first cycle."""
        return self.total_steps - self.count * self.cycle_steps

    def begins(self, step: int) -> bool:
        """Return whether a cycle begins after `step` iterations."""
        done = step - self.first_phase
        return 0 <= done < self.count * self.cycle_steps and done % self.cycle_steps == 0

    def tickets(self, step: int) -> int:
        """Count the networks to average after `step` iterations.

        The first is the one at the end of the first phase; each cycle adds one.
        """
        if self.count == 0:
            return 0
        done = min(step, self.total_steps) - self.first_phase
        return 0 if done < 0 else 1 + done // self.cycle_steps

    def learning_rate(self, step: int) -> float:
        """Return the learning rate after `step` iterations: a triangle within each cycle."""
        low, high = self.lr
        done = min(step, self.total_steps) - self.first_phase
        t = done % self.cycle_steps / self.cycle_steps
        return low + (high - low) * (1 - abs(2 * t - 1))


@dataclass(frozen=True)
class Superposition:
    """Hyper-parameters of Sup-tickets, with times in epochs; see `SupTickets`."""

    cycle_fraction: float = 0.1
    cycle_epochs: int = 8
    lr: tuple[float, ...] = (0.001, 0.005)
    drop_fraction: float = 0.5
    average: Average = "caa"
    prune_each: bool = False

    def __post_init__(self) -> None:
        check_average(self.average)
        self.cycles(1, 1)

    def cycles(self, epochs: int, steps: int) -> Cycles:
        """Return the cycles at the end of `epochs` epochs of `steps` steps."""
        return Cycles(epochs * steps, self.cycle_fraction, self.cycle_epochs * steps, self.lr)

    def tail(self, epochs: int) -> int:
        """Return the number of epochs that the cycles take at the end of `epochs`."""
        return self.cycles(epochs, 1).count * self.cycle_epochs


class SupTickets:
    """The average of cheap tickets that a sparse run passes through in cycles at its end.

    The first phase belongs to the host method. At the start of each cycle one large update moves
    `drop_fraction` of every layer by the host's rules; there are no other updates in the cycle. The
    learning rate of all parameter groups rises from `lr[0]` to `lr[1]` and falls back, and the
    network at the end of the cycle is folded into the average. Training continues from that
    network, never from the average, and keeps its momentum. The loop is that of the host:

        opt.zero_grad(); loss.backward()
        if not sup.step():
            opt.step()
        ...
        best = sup.finish(loader)

    A ticket is collected when the next iteration steps or the run finishes, so the state between
    two iterations resumes bit-equal. The average costs one more sparse network.

    Args:
        model: the network in training.
        opt: its optimizer, the one `dst` has.
        dst: the host, any `sparsekd.dst` method of `model`; from here on `step` calls it.
        total_steps: iterations of the whole run.
        cycle_fraction: largest share of them to spend on cycles; without room for one, the run is
            the host's alone.
        cycle_steps: iterations of a cycle.
        lr: learning rate at both ends of a cycle, and in its middle.
        drop_fraction: fraction of a layer's weights that the update of a cycle moves.
        average: "caa" for the mean of all tickets, "cima" for a moving average.
        prune_each: prune the average after every ticket, as the released code does, instead of
            once at the end.
        beta: weight of the newest ticket in "cima".

    Raises:
        ValueError: an argument is out of range, or `dst` belongs to another model or optimizer.
        UnsupportedError: a layer's layout is not "csr" or "bcsr".

    Source: Superposing Many Tickets into One (arXiv 2205.15322), algorithm 1. Its code grows by
        gradient whatever the host; here the host's own rule grows.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> dst = skd.dst.SET(layer, opt, every=2, until=4)
        >>> sup = skd.tickets.SupTickets(
        ...     layer, opt, dst, total_steps=8, cycle_fraction=0.5, cycle_steps=2, lr=(0.01, 0.05)
        ... )
        >>> batches = [(torch.rand(2, 8), None)] * 8
        >>> for x, _ in batches:
        ...     opt.zero_grad(); layer(x).square().sum().backward()
        ...     if not sup.step():
        ...         opt.step()
        >>> sup.finish(batches).topology.nnz
        16
    """

    def __init__(
        self,
        model: nn.Module,
        opt: Optimizer,
        dst: Updater,
        *,
        total_steps: int,
        cycle_fraction: float = Superposition.cycle_fraction,
        cycle_steps: int,
        lr: tuple[float, ...] = Superposition.lr,
        drop_fraction: float = Superposition.drop_fraction,
        average: Average = Superposition.average,
        prune_each: bool = Superposition.prune_each,
        beta: float = BETA,
    ) -> None:
        model = replicas.unwrap(model)
        if dst.model is not model or dst.optimizer is not opt:
            raise ValueError("dst: expected a method of this model and this optimizer")
        check_fraction(drop_fraction=drop_fraction)
        check_superposable(model)
        check_average(average, beta)
        self.cycles = Cycles(total_steps, cycle_fraction, cycle_steps, lr)
        self.model, self.optimizer, self.dst = model, opt, dst
        self.average, self.prune_each, self.beta = average, prune_each, beta
        dst.schedule = _in_cycles(dst.schedule, self.cycles, drop_fraction)
        self._merged: nn.Module | None = None
        self._folded = 0

    def attach(self, *wrappers: DistributedDataParallel) -> None:
        """Register the DistributedDataParallel wrappers of the model, as `Updater.attach` does."""
        self.dst.attach(*wrappers)

    def step(self) -> bool:
        """Run `dst.step` for one iteration, with the learning rate of the cycle set before it.

        Returns:
            True if this iteration rewired the topology instead of stepping.

        Raises:
            As `step` of `dst`.
        """
        self._collect()
        step = self.dst.iteration
        if step >= self.cycles.first_phase and self.cycles.count:
            for group in self.optimizer.param_groups:
                group["lr"] = self.cycles.learning_rate(step)
        return self.dst.step()

    def finish(self, loader: Iterable[Any]) -> nn.Module:
        """Return the superposition of all tickets, pruned back to the run's own nnz.

        Its BatchNorm statistics are the plain mean over one pass through `loader`, in train mode.
        Neither the network in training nor torch's random state is touched.

        Args:
            loader: batches of training data, tensors or tuples that start with one.

        Returns:
            A new network; without cycles, a copy of the one in training.

        Raises:
            RuntimeError: the run has not reached `total_steps`.
        """
        if self.dst.iteration < self.cycles.total_steps:
            raise RuntimeError(
                f"finish: expected after {self.cycles.total_steps} iterations (total_steps), "
                f"got {self.dst.iteration}"
            )
        self._collect()
        merged = blank_copy(self.model if self._merged is None else self._merged)
        prune_back_(merged, _nnz(self.model))
        warn_of_dead_layers(merged)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            update_bn(loader, merged, device=_device(merged))
        return merged.train(self.model.training)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, the host's included."""
        return {
            "dst": self.dst.state_dict(),
            "folded": self._folded,
            "merged": None if self._merged is None else self._merged.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken; load model and optimizer as well.

        Raises:
            CheckpointError: `state` is of another method, or incomplete.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise CheckpointError(f"state: expected the keys {sorted(missing)} as well")
        self.dst.load_state_dict(state["dst"])
        self._folded, self._merged = int(state["folded"]), None
        if state["merged"] is not None:
            self._merged = blank_copy(self.model)
            self._merged.load_state_dict(state["merged"])

    def _collect(self) -> None:
        """Fold the current network into the average, if the last iteration completed a ticket."""
        if self._folded == self.cycles.tickets(self.dst.iteration):
            return
        if self._merged is None:
            self._merged = blank_copy(self.model)
        else:
            fold_(self._merged, self.model, self.average, self._folded, self.beta)
            if self.prune_each:
                prune_back_(self._merged, _nnz(self.model))
        self._folded += 1


def _in_cycles(host: UpdateSchedule, cycles: Cycles, drop_fraction: float) -> UpdateSchedule:
    """Return the host's schedule for the first phase, then one update per cycle, at its start."""

    def schedule(iteration: int) -> float | None:
        if iteration <= cycles.first_phase:
            return host(iteration)
        return drop_fraction if cycles.begins(iteration - 1) else None

    return schedule


def _nnz(model: nn.Module) -> int:
    return sum(module.topology.nnz for _, module in sparse_modules(model))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
