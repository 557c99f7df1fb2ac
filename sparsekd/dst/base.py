"""The loop of dynamic sparse training: methods replace what is dropped and what is grown."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparsekd.dst import growers, replicas, scores
from sparsekd.dst.dynamics import Dynamics, UpdateSchedule, at_share
from sparsekd.dst.gradients import DenseGradients, NonFiniteGradient, check_finite
from sparsekd.dst.rewiring import Rewiring
from sparsekd.dst.tile_grid import LayerUpdate, TileGrid, TileGrids, check_method
from sparsekd.errors import CheckpointError
from sparsekd.nn import SparseModule, sparse_modules
from sparsekd.nn.distributed import check_own
from sparsekd.ops.growth import Block
from sparsekd.optim import check_remappable
from sparsekd.optim.groups import warn_if_undecayed
from sparsekd.topology import Topology


class Updater:
    """The loop of dynamic sparse training: it rewires the sparse modules of a model in training.

    A method is a schedule (when, and which fraction), how many weights each layer loses and gains,
    a drop score and a grow rule. Subclasses replace `grow`, `drop_score` or `counts`, or `plan`
    for masks that do not come from dropping and growing. The loop is

        opt.zero_grad(); loss.backward()
        if not dst.step():
            opt.step()

    An update first plans new masks for all layers, then checks that every layer, the optimizer and
    the other ranks can follow, and only then changes anything. Where a layout has tiles, whole
    tiles come and go: rules work on the layer's `grid`, a weight with one number per tile.

    Surviving weights keep their value, optimizer state and gradient, and so do weights that are
    dropped and grown again in one update. New weights start at 0 with the optimizer state of a new
    parameter. Layers that something else has rewired since the last step (a checkpoint of another
    topology, `rewire` by hand) keep their optimizer state in the same way, unless the optimizer has
    loaded a state too, which is then taken to fit them. With a GradScaler, `scaler.step(opt)` and
    `scaler.update()` both belong under the `if`.

    Under `torch.distributed` every rank builds the same updater on its DDP wrapper. Dense gradients
    are averaged over the ranks, and topologies compared at the first step and after each update.

    Args:
        model: holds the sparse modules, of which those with frozen values and those that store
            every weight stay as they are; or its DistributedDataParallel wrapper, which follows
            where layers change size; see `attach`.
        optimizer: holds the values of these modules.
        schedule: iteration (from 1) -> drop fraction, or None where there is no update.
        seed: of the generator that random growth draws from.
        skip_sgd_on_update: whether an update takes the place of the optimizer step. If False,
            `step()` returns False after an update too; the gradients of grown weights are then 0.

    Raises:
        ValueError: `model` has no sparse module.
        UnsupportedError: the method cannot keep the layout of a trainable sparse module, or FSDP
            shards the model.
        OptimizerStateError: `optimizer` does not hold the values of a trainable sparse module.

    Source: Rigging the Lottery (arXiv 1911.11134), algorithm 1.

    Example:
        >>> import torch, sparsekd as skd
        >>> class LowestFirst(skd.dst.Updater):
        ...     def grow(self, name, kept, k):
        ...         return (~kept.mask()).flatten().nonzero().squeeze(1)[:k]
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> LowestFirst(layer, opt, schedule=lambda iteration: 0.5).step(), layer.topology.nnz
        (True, 16)
    """

    needs_gradient: ClassVar[bool] = False
    """Whether `grow` uses `gradient(name)` or `gradient_blocks(name)`."""

    layouts: ClassVar[tuple[str, ...]] = ("csr", "bcsr")
    """Layouts that the method keeps; "fanin" and "nm" ask it for `ranking`."""

    ablates: ClassVar[bool] = False
    """Whether the method may take all weights of an output channel on purpose."""

    saved: ClassVar[tuple[str, ...]] = ()
    """Attributes that `state_dict` holds besides the iteration and the generator."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        schedule: UpdateSchedule,
        seed: int = 0,
        skip_sgd_on_update: bool = True,
    ) -> None:
        self.model = replicas.unwrap(model)
        self.modules = dict(sparse_modules(self.model))
        if not self.modules:
            raise ValueError(
                f"model: expected a model with sparse modules, got a {type(model).__name__} "
                "without any; call skd.sparsify(model, sparsity=...) first"
            )
        for name, module in self.modules.items():
            check_own(module, f"dst.{type(self).__name__}", name)
        check_method(type(self), {name: m.layout for name, m in self.layers().items()})
        self.optimizer = optimizer
        self._grids = TileGrids(self.modules)
        for name in self.layers():
            check_remappable(optimizer, self.modules[name].values, name=f"{name}.values")
        warn_if_undecayed(optimizer, [module.values for module in self.layers().values()])
        self._rewiring = Rewiring(model, self.modules, optimizer, type(self).__name__)
        self.skip_sgd_on_update = skip_sgd_on_update
        self.generator = torch.Generator().manual_seed(seed)
        self.iteration = 0
        self.last_update: dict[str, LayerUpdate] = {}
        self._gradients = DenseGradients(self.modules)
        self.schedule = schedule

    @property
    def schedule(self) -> UpdateSchedule:
        """Iteration -> drop fraction or None; may be replaced between two iterations."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: UpdateSchedule) -> None:
        self._schedule = schedule
        self._prepare_next()

    @classmethod
    def options(cls, dynamics: Dynamics, sparsity: float, steps: int) -> dict[str, Any]:
        """Return the arguments of the constructor for a run whose recipe gives times as shares.

        Args:
            dynamics: of the run.
            sparsity: at the end.
            steps: of the run; what would not happen in it happens at its end.

        Example:
            >>> import sparsekd as skd
            >>> skd.dst.RigL.options(skd.dst.Dynamics(), 0.9, steps=1000)
            {'drop_fraction': 0.3, 'every': 100, 'until': 750}
        """
        end = at_share(dynamics.until, steps)
        return {"drop_fraction": dynamics.drop_fraction, "every": dynamics.every, "until": end}

    def updates_ahead(self, steps: int) -> int:
        """Return how many updates are planned in a run of `steps` iterations, from here on."""
        return sum(self.schedule(i) is not None for i in range(self.iteration + 1, steps + 1))

    def attach(self, *wrappers: DistributedDataParallel) -> None:
        """Register DistributedDataParallel wrappers of the model that were not passed as `model`.

        A wrapper lays out its gradient buckets when it is made, and must do so again where layers
        change size (GMP, GraNet, AC/DC, redistribution). Call this for wrappers made after the
        updater, or without arguments if gradients are averaged in another way.

        Args:
            wrappers: all of the model, its parts and what contains it; they replace earlier ones.

        Raises:
            ValueError: one is no DistributedDataParallel, or of another model.
        """
        self._rewiring.wrappers.name(*wrappers)

    @property
    def due(self) -> bool:
        """Whether the next `step` updates the topology."""
        return self.schedule(self.iteration + 1) is not None

    def step(self) -> bool:
        """Count one iteration, and update the topology if it is due.

        Call it after `backward` and before gradients are unscaled or clipped. Growth by gradient
        ranks the dense gradient whose entries at the nonzeros are `values.grad`; a RuntimeWarning
        names layers whose `.grad` was not written by backward passes alone. If a gradient is not
        finite, the update is skipped with a RuntimeWarning that names the parameter, and `step`
        returns False: the caller or the GradScaler then decides whether the optimizer steps.

        Returns:
            True if this iteration rewired the topology instead of stepping.

        Raises:
            RuntimeError: the update needs gradients and there was no backward pass.
            ValueError: a weight is NaN.
            OptimizerStateError: the optimizer has state that cannot follow the weights of a layer,
                whether this update or something else has rewired it.
            TopologyError: the ranks of a distributed run hold different topologies.
            UnsupportedError: a capturable layer cannot take its mask, or layers would change size
                under `torch.distributed` and no wrapper is known. No layer has changed.
        """
        if changed := self._rewiring.followed.changed():
            self.catch_up(changed)
        if not self._rewiring.compared:
            self._rewiring.compare_ranks()
        self.iteration += 1
        fraction = self.schedule(self.iteration)
        self._gradients.settle()
        try:
            rewired = fraction is not None and self.update(fraction)
            self._gradients.warn_of_foreign(type(self).__name__)
        finally:
            self._prepare_next()
        return rewired and self.skip_sgd_on_update

    @torch.no_grad()
    def update(self, fraction: float) -> bool:
        """Drop `fraction` of every layer's weights and grow as many; all layers or none.

        Returns:
            Whether there was anything to rewire.
        """
        if changed := self._rewiring.followed.changed():
            self.catch_up(changed)
        self.last_update = {}
        self._grids.clear()
        if self.needs_gradient and not any(map(self.has_gradient, self.modules)):
            raise RuntimeError(
                f"{type(self).__name__} grows by gradient, but no backward pass has written .grad "
                f"of a sparse module in iteration {self.iteration}; call loss.backward() before "
                "step()"
            )
        if self.needs_gradient and replicas.several():
            seen = {name: int(self.has_gradient(name)) for name in self.modules}
            problem = "layers took part in the backward pass on some ranks only"
            replicas.check_equal(seen, problem, next(self.model.parameters()).device)
        try:
            check_finite(self.model)
            plan = self.plan(fraction)
        except NonFiniteGradient as problem:
            self.last_update = {}
            message = f"iteration {self.iteration}: topology update skipped, {problem}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
            return False
        finally:
            self._grids.clear()
        before = self._rewiring.apply(plan, self._prepare)
        if not self.ablates:
            self._rewiring.warn_of_dead(before)
        self._rewiring.compare_ranks()
        return bool(plan)

    def plan(self, fraction: float) -> dict[str, Tensor]:
        """Return the new mask of each layer that is to change, by name, without changing it."""
        return {
            name: self.drop_and_grow(name, drop=drop, grow=grow)
            for name, (drop, grow) in self.counts(fraction).items()
            if drop or grow
        }

    def catch_up(self, changed: Sequence[str]) -> None:
        """Move the optimizer state of layers that something else has rewired."""
        for name in changed:
            self._rewiring.followed.carry(name)
        self._rewiring.compared = False

    def counts(self, fraction: float) -> dict[str, tuple[int, int]]:
        """Return how many weights, or tiles, each layer loses and gains; by default `fraction`."""
        moved = {name: self.replaceable(name, fraction) for name in self.layers()}
        return {name: (k, k) for name, k in moved.items()}

    def replaceable(self, name: str, fraction: float, pruned: int = 0) -> int:
        """Return `fraction` of the tiles that layer `name` has once `pruned` of them are gone.

        It is 0 in a layer that stores every weight, or has no gradient for growth to rank.
        """
        grid = self.grid(name)
        nnz = grid.tiles.nnz - pruned
        if nnz == grid.tiles.numel or (self.needs_gradient and not self.has_gradient(name)):
            return 0
        moved = math.floor(fraction * nnz)
        return moved - moved % grid.quantum

    def drop_and_grow(self, name: str, *, drop: int, grow: int) -> Tensor:
        """Return the mask of layer `name` without `drop` of its tiles and with `grow` others."""
        grid = self.grid(name)
        dropped = grid.lowest(self.tile_score(name), drop)
        kept = scores.without(grid.tiles, dropped)
        if not grow:
            grown = dropped[:0]
        elif grid.in_cells:
            quota = grid.quota(dropped, grow)
            grown = growers.largest_in_cells(self.ranking(name), kept, grid.cell_of, quota)
        else:
            grown = self.grow(name, kept, grow)
        mask, self.last_update[name] = grid.exchange(dropped, grown)
        return mask

    def grid(self, name: str) -> TileGrid:
        """Return layer `name` in the tiles of its layout; in most layouts a tile is one weight."""
        return self._grids[name]

    def tile_score(self, name: str) -> Tensor:
        """Return the mean of `drop_score` over each tile of layer `name`."""
        return self.grid(name).pool(self.drop_score(name))

    def grids(self) -> dict[str, TileGrid]:
        """Return the grids of the layers that take part."""
        return {name: self.grid(name) for name in self.layers()}

    def drop_score(self, name: str) -> Tensor:
        """Return one score per weight of layer `name`; the lowest are dropped."""
        score = scores.magnitude(self.modules[name].values)
        if score.isnan().any():
            raise ValueError(f"{name}.values: expected numbers, got NaN")
        return score

    def grow(self, name: str, kept: Topology, k: int) -> Tensor:
        """Return `k` positions of the grid of layer `name` outside `kept`, ascending."""
        raise NotImplementedError(f"{type(self).__name__} grows nothing")

    def ranking(self, name: str) -> Iterable[Block]:
        """Yield one number for every tile of layer `name`, in rectangles of its grid.

        In layouts with cells ("fanin", "nm") the free tiles of largest magnitude grow in each cell,
        and `grow` is not called. A method that replaces one of the two replaces both.
        """
        raise NotImplementedError(f"{type(self).__name__} ranks nothing")

    def gradient(self, name: str) -> Tensor:
        """Return the dense gradient of layer `name`, the mean over all ranks; once in an update.

        Its entries at the nonzeros are those of `values.grad`.
        """
        return self._gradients.take(name)

    def gradient_blocks(self, name: str) -> Iterator[Block]:
        """Yield that gradient in rectangles, `(row, column, entries)`, instead of storing it.

        They cover `[rows, cols]` once, in an order that depends on the layer alone; each overwrites
        the one before. If tiles have several weights, one has the mean magnitude of each tile.
        """
        grid, blocks = self.grid(name), self._gradients.blocks(name)
        if grid.single:
            return blocks
        return iter([(0, 0, grid.pool_magnitude(blocks, self.modules[name].values))])

    def layers(self) -> dict[str, SparseModule]:
        """Return the sparse modules whose values are trained, the only ones to be rewired."""
        return {name: m for name, m in self.modules.items() if m.values.requires_grad}

    def nnz(self) -> int:
        """Return how many weights these layers store."""
        return sum(module.topology.nnz for module in self.layers().values())

    def numel(self) -> int:
        """Return how many weights these layers have, zeros included."""
        return sum(module.topology.numel for module in self.layers().values())

    def has_gradient(self, name: str) -> bool:
        """Return whether layer `name` took part in the backward passes that `.grad` sums."""
        return name in self._gradients

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the method, beside that of model and optimizer."""
        return {
            "method": type(self).__name__,
            "iteration": self.iteration,
            "generator": self.generator.get_state(),
            **{name: copy.deepcopy(getattr(self, name)) for name in self.saved},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken; load model and optimizer as well.

        Raises:
            CheckpointError: `state` is of another method, or incomplete.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise CheckpointError(f"state: expected the keys {sorted(missing)} as well")
        if state["method"] != type(self).__name__:
            raise CheckpointError(
                f"state: expected that of {type(self).__name__}, got that of {state['method']}"
            )
        self.iteration = int(state["iteration"])
        self.generator.set_state(state["generator"].cpu())
        for name in self.saved:
            setattr(self, name, copy.deepcopy(state[name]))
        self.last_update, self._rewiring.compared = {}, False
        self._prepare_next()

    def _prepare_next(self) -> None:
        self._gradients.switch(on=self.collects(self.iteration + 1))

    def collects(self, iteration: int) -> bool:
        """Return whether the method reads `gradient(name)` in this iteration."""
        return self.needs_gradient and self.schedule(iteration) is not None

    def _prepare(self, name: str, mask: Tensor) -> Callable[[], None]:
        """Return a function that rewires one layer; raise if it cannot take the mask."""
        return self._rewiring.prepare(name, mask)
