"""Sup-tickets: short cycles at the end of a sparse run, and the superposition of its tickets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from sparsekd.dst import Updater, replicas
from sparsekd.dst.dynamics import UpdateSchedule, check_fraction
from sparsekd.errors import CheckpointError
from sparsekd.nn import sparse_modules
from sparsekd.tickets.cycles import Cycles, Superposition, warn_if_annealed
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


class SupTickets:
    """The average of cheap tickets that a sparse run passes through in cycles at its end.

    The first phase belongs to the host method. At the start of each cycle one large update moves
    `drop_fraction` of every layer by the host's rules; there are no other updates in the cycle. The
    learning rate of each parameter group rises from the host's last one to five times that and
    falls back, and the network at the end of the cycle is folded into the average. Training
    continues from that network, never from the average, and keeps its momentum. The loop is that
    of the host:

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
        lr: learning rate at both ends of a cycle, and in its middle; None for that of the host's
            last iteration, group by group, and five times that.
        drop_fraction: fraction of a layer's weights that the update of a cycle moves.
        average: "caa" for the mean of all tickets, "cima" for a moving average.
        prune_each: prune the average after every ticket, as the released code does, instead of
            once at the end.
        beta: weight of the newest ticket in "cima".
        cycle_count: number of cycles, instead of `cycle_fraction`.

    Raises:
        ValueError: an argument is out of range, the cycles do not fit, or `dst` belongs to another
            model or optimizer.
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
        lr: tuple[float, ...] | None = Superposition.lr,
        drop_fraction: float = Superposition.drop_fraction,
        average: Average = Superposition.average,
        prune_each: bool = Superposition.prune_each,
        beta: float = BETA,
        cycle_count: int | None = Superposition.cycle_count,
    ) -> None:
        model = replicas.unwrap(model)
        if dst.model is not model or dst.optimizer is not opt:
            raise ValueError("dst: expected a method of this model and this optimizer")
        check_fraction(drop_fraction=drop_fraction)
        check_superposable(model)
        check_average(average, beta)
        self.cycles = Cycles(total_steps, cycle_fraction, cycle_steps, lr, cycle_count)
        if lr is None and self.cycles.count and not self.cycles.first_phase:
            raise ValueError("lr: expected two numbers, as the cycles leave the host no iteration")
        self.model, self.optimizer, self.dst = model, opt, dst
        self.average, self.prune_each, self.beta = average, prune_each, beta
        dst.schedule = _in_cycles(dst.schedule, self.cycles, drop_fraction)
        self._merged: nn.Module | None = None
        self._folded = 0
        self._host_lr: list[float] = []
        self._highest_lr = 0.0

    def attach(self, *wrappers: DistributedDataParallel) -> None:
        """Register the DistributedDataParallel wrappers of the model, as `Updater.attach` does."""
        self.dst.attach(*wrappers)

    def step(self) -> bool:
        """Run `dst.step` for one iteration, with the learning rate of the cycle set before it.

        Returns:
            True if this iteration rewired the topology instead of stepping.

        Raises:
            RuntimeError: the update needs gradients and there was no backward pass; `step` of `dst`
                lists what else it raises.
        """
        self._collect()
        step, first_phase = self.dst.iteration, self.cycles.first_phase
        if self.cycles.count and step >= first_phase:
            if step == first_phase and self.cycles.lr is None:
                warn_if_annealed(max(self._host_lr), self._highest_lr)
            for number, group in enumerate(self.optimizer.param_groups):
                host_lr = self._host_lr[number] if self._host_lr else 0.0
                group["lr"] = self.cycles.learning_rate(step, host_lr)
        elif self.cycles.count and self.cycles.lr is None:
            self._host_lr = [float(group["lr"]) for group in self.optimizer.param_groups]
            self._highest_lr = max(self._highest_lr, *self._host_lr)
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

    @property
    def union_density(self) -> float | None:
        """Density of the average so far, the union of the tickets' supports; None before the first.

        Only weights of sparse modules count. With `prune_each` it has been pruned after each
        ticket.
        """
        self._collect()
        if self._merged is None:
            return None
        numel = sum(module.topology.numel for _, module in sparse_modules(self._merged))
        return _nnz(self._merged) / max(numel, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, the host's included."""
        state = {
            "dst": self.dst.state_dict(),
            "folded": self._folded,
            "merged": None if self._merged is None else self._merged.state_dict(),
        }
        if self.cycles.lr is None:
            state |= {"host_lr": list(self._host_lr), "highest_lr": self._highest_lr}
        return state

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
        if self.cycles.lr is None:
            self._host_lr, self._highest_lr = list(state["host_lr"]), float(state["highest_lr"])

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
