"""New masks for the layers of a model, and what has to follow them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparsekd.dst import replicas
from sparsekd.errors import UnsupportedError
from sparsekd.nn import SparseModule
from sparsekd.optim import check_remappable, remap_
from sparsekd.optim.following import Followed
from sparsekd.sparsity import warn_of_dead

Prepare = Callable[[str, Tensor], Callable[[], None]]
"""Layer and mask -> what rewires the layer; it raises where the layer cannot take the mask."""


class Rewiring:
    """The step from a plan of new masks to rewired layers: all of them, or none.

    Everything that may refuse comes first: the optimizer's state must be able to follow, each layer
    must be able to take its mask, and where layers change size under `torch.distributed` the
    wrappers must be known. Then layers, optimizer state and gradient buckets change.

    Args:
        model: in training, or its DistributedDataParallel wrapper.
        modules: its sparse modules by name.
        optimizer: holds their values.
        who: the method, for the text of errors.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, SparseModule],
        optimizer: Optimizer,
        who: str,
    ) -> None:
        self.modules, self.optimizer, self.who = modules, optimizer, who
        self.wrappers = replicas.Wrappers(model)
        self.followed = Followed(modules, optimizer)
        self.compared = False
        """Whether all ranks are known to hold the topologies at hand."""
        self._known_dead: set[str] = set()

    def apply(
        self, plan: Mapping[str, Tensor], prepare: Prepare, *, wrapped: bool = True
    ) -> dict[str, int]:
        """Rewire layers.

        Args:
            plan: new masks by layer.
            prepare: makes what rewires one layer.
            wrapped: whether the model is in DistributedDataParallel wrappers by now.

        Returns:
            By layer the number of weights that it had before.
        """
        for name in plan:
            check_remappable(self.optimizer, self.modules[name].values, name=f"{name}.values")
        prepared = [prepare(name, mask) for name, mask in plan.items()]
        before = {name: self.modules[name].topology.nnz for name in plan}
        wrappers = self._to_fit(plan) if wrapped else []
        for rewire in prepared:
            rewire()
        self.followed.settle()
        replicas.rebuild_buckets(wrappers)
        return before

    def prepare(self, name: str, mask: Tensor) -> Callable[[], None]:
        """Return a function that rewires layer `name` and moves its optimizer state."""
        module = self.modules[name]
        try:
            rewire_module = module.prepare_rewire(mask)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error}") from None

        def rewire() -> None:
            remap_(self.optimizer, module.values, rewire_module())

        return rewire

    def compare_ranks(self) -> None:
        """Check that all ranks hold the same topologies."""
        replicas.check_topologies({name: m.topology for name, m in self.modules.items()})
        self.compared = True

    def warn_of_dead(self, before: Mapping[str, int]) -> None:
        """Warn about layers and output channels that an update has left without a weight.

        Where as many weights come as go, channels empty and fill all the time.

        Args:
            before: as `apply` returns it.
        """
        topologies = {name: self.modules[name].topology for name in before}
        alive = {n: t.crow_indices.diff() > 0 for n, t in topologies.items() if t.nnz < before[n]}
        if alive:
            warn_of_dead(alive, self._known_dead, stacklevel=5)

    def _to_fit(self, plan: Mapping[str, Tensor]) -> list[DistributedDataParallel]:
        """Return the wrappers whose buckets will not fit once layers have these masks."""
        if not replicas.several() or all(
            int(mask.sum()) == self.modules[name].topology.nnz for name, mask in plan.items()
        ):
            return []
        return self.wrappers.for_change(self.who)
