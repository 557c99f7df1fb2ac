"""Top-KAST: compute with the largest weights, train a few more, rest the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekd.dst import scores
from sparsekd.dst.backward_only import BackwardOnly
from sparsekd.dst.base import Updater
from sparsekd.dst.dynamics import Dynamics, Periodic, at_share, check_fraction
from sparsekd.errors import OptimizerStateError
from sparsekd.sparsity import Constant, allocate, topk_mask


class TopKAST(Updater):
    """Top-KAST: forward on the set A of each layer's largest weights, training of a larger set B.

    Forward passes and input gradients cost what A costs, weight gradients what B does. Every
    `every` iterations A and B of each layer are chosen again by the magnitude of all its weights;
    those outside B keep the value they had when they left it, in one dense copy per layer that
    takes part in no computation. `penalty` times the sign of the weight is added to the gradient
    on A, and 1 / density of A times that on the rest of B, so that weights compete.

    Start from `sparsify(model, sparsity=0)`: the layers become sparse here. B less A is a second
    parameter of each layer, `extra[name]`, and joins the parameter group of the layer's values.

    Args:
        model: holds sparse modules; those with trained values are rewired at once. Of a model in a
            DistributedDataParallel wrapper give the wrapper, or wrap the model after this.
        optimizer: holds their values; it must not have stepped yet.
        sparsity: of A, over all layers.
        backward_sparsity: of B; at most `sparsity`.
        distribution: how both are shared between layers, as in `sparsify`; the paper's is
            "uniform".
        every: iterations from one choice to the next.
        until: the first iteration that chooses no more, and trains A alone.
        penalty: weight of the penalty.
        seed: unused; there so that methods can stand in for each other.

    Raises:
        ValueError: an argument is out of range, or `model` has no sparse module.
        UnsupportedError: `distribution` is not known, or a layer is capturable, now or later:
            gradients and optimizer state move to other tensors.
        OptimizerStateError: `optimizer` does not hold the values of a trainable sparse module.

    Source: Top-KAST: Top-K Always Sparse Training (arXiv 2106.03517), section 2.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.0)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> dst = skd.dst.TopKAST(layer, opt, sparsity=0.75, backward_sparsity=0.5, until=100)
        >>> layer(torch.rand(2, 8)).sum().backward()
        >>> dst.step(), layer.topology.nnz, dst.extra[""].grad.shape
        (False, 8, torch.Size([8]))
    """

    layouts = ("csr",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sparsity: float,
        backward_sparsity: float,
        distribution: str = "uniform",
        every: int = Dynamics.every,
        until: int,
        penalty: float = 1e-4,
        seed: int = 0,
    ) -> None:
        check_fraction(sparsity=sparsity, backward_sparsity=backward_sparsity)
        if backward_sparsity > sparsity:
            raise ValueError(
                f"backward_sparsity: expected at most sparsity={sparsity}, got {backward_sparsity}"
            )
        self.sparsity, self.penalty, self.until = sparsity, penalty, until
        schedule = Periodic(Constant(0.0), every, until)
        super().__init__(model, optimizer, schedule=schedule, seed=seed, skip_sgd_on_update=False)
        shapes = {name: module.topology.shape for name, module in self.layers().items()}
        inner = allocate(shapes, sparsity, distribution)
        outer = allocate(shapes, backward_sparsity, distribution)
        # one weight a layer may be rounded the other way round
        self._sizes = {name: (inner[name], max(inner[name], outer[name])) for name in shapes}
        self._loaded = False
        self._outside = BackwardOnly(self.layers(), optimizer)
        with torch.no_grad():
            wrapped = self._rewiring.wrappers.named
            self._rewiring.apply(self.plan(0.0), self._prepare, wrapped=wrapped)

    @classmethod
    def options(cls, dynamics: Dynamics, sparsity: float, steps: int) -> dict[str, Any]:
        """Return the arguments of the constructor for a run; see `Updater.options`."""
        return {
            "every": dynamics.every,
            "sparsity": sparsity,
            "backward_sparsity": max(0.0, 1 - dynamics.backward * (1 - sparsity)),
            "until": at_share(dynamics.until, steps),
            "distribution": dynamics.distribution,
        }

    @property
    def extra(self) -> dict[str, nn.Parameter]:
        """The weights of B without A, one parameter per layer."""
        return self._outside.parameters

    @torch.no_grad()
    def step(self) -> bool:
        """Add the penalty to the gradients, choose A and B again if due, and return False."""
        if self.iteration + 1 < self.until:
            self._gradients.foreign |= dict.fromkeys(self._outside.settle())
        else:
            self._outside.stop()
        self._outside.reduce_gradients()
        for name, module in self.layers().items():
            for weights, factor in ((module.values, 1.0), (self.extra[name], 1 - self.sparsity)):
                if weights.grad is not None and factor:
                    weights.grad.add_(weights.sign(), alpha=self.penalty / factor)
        rewired = super().step()
        self._outside.renew()
        self._loaded = False
        return rewired

    def catch_up(self, changed: Sequence[str]) -> None:
        """Refuse, unless the optimizer has no state yet and the weights at rest are loaded."""
        stateful = [n for n in changed if self.optimizer.state.get(self.modules[n].values)]
        if stateful or not self._loaded:
            raise OptimizerStateError(
                f"{(stateful or changed)[0]}: something else than TopKAST has changed its "
                "topology, but not the weights in training and at rest beside it; load the states "
                "of model, optimizer and method together"
            )
        self._rewiring.followed.settle()

    def plan(self, fraction: float) -> dict[str, Tensor]:
        """Return the mask of A for every layer: its largest weights, those at rest included."""
        return {name: self._largest(name, inner) for name, (inner, _) in self._sizes.items()}

    def weights(self, name: str) -> Tensor:
        """Return all weights of layer `name`, in training or at rest, in the weight's shape."""
        return self._outside.weights(name)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the method, beside that of model and optimizer."""
        return {**super().state_dict(), **self._outside.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken; load model and optimizer as well."""
        super().load_state_dict(state)
        self._outside.load_state_dict(state)
        self._loaded = True

    def _largest(self, name: str, nnz: int) -> Tensor:
        return topk_mask(scores.magnitude(self.weights(name)), nnz)

    def _prepare(self, name: str, mask: Tensor) -> Callable[[], None]:
        outer = self._largest(name, self._sizes[name][1]) & ~mask
        return self._outside.prepare_rewire(name, mask, outer)
