"""Top-KAST: compute with the largest weights, train a few more, rest the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekd.dst import replicas, scores
from sparsekd.dst.base import Updater
from sparsekd.dst.schedules import Periodic, check_fraction
from sparsekd.ops import observe
from sparsekd.sparsity import Constant, allocate, topk_mask
from sparsekd.topology import Topology

Pair = tuple[Tensor, Tensor]


class TopKAST(Updater):
    """Compute with the set A of each layer's largest weights, train the larger set B around it.

    Forward passes and input gradients cost what A costs, weight gradients what B does. Every
    `every` iterations each layer chooses A and B anew by the magnitude of all its weights; those
    outside B keep the value they had when they left it, one dense copy a layer that nothing
    computes with. `penalty` times the sign of the weight is added to the gradient on A, and
    1 / density of A times that on the rest of B, so that weights compete.

    Start from `sparsify(model, sparsity=0)`: the layers become sparse here. B less A is a second
    parameter of each layer, `extra[name]`, and joins the parameter group of the layer's values.

    Args:
        model: holds sparse modules; those with trained values are rewired at once.
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
        UnsupportedError: `distribution` is not known.
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
        every: int = 100,
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
        self.resting: dict[str, Tensor] = {}
        self.extra: dict[str, nn.Parameter] = {}
        self._outer: dict[str, Topology] = {}  # where the extra weights are
        self._pass: dict[str, int] = {}  # the backward pass that each layer last took part in
        for name, module in self.layers().items():
            self.resting[name] = module.dense_weight().detach().clone()
            self._place(name, torch.zeros_like(self.resting[name], dtype=torch.bool))
            self.extra[name] = nn.Parameter(module.values.detach().new_empty(0))
            self._group(module.values).append(self.extra[name])
        with torch.no_grad():
            for name, mask in self.plan(0.0).items():
                self._rewire(name, mask)
        if replicas.several():
            replicas.rebuild_buckets(model)
        observe.listeners.add(self)

    @torch.no_grad()
    def step(self) -> bool:
        """Add the penalty to the gradients and choose anew if it is due; always False."""
        if self.iteration + 1 >= self.until:
            observe.listeners.discard(self)
            for extra in self.extra.values():
                extra.grad = None
        for name, module in self.layers().items():
            extra = self.extra[name]
            if extra.grad is not None:
                replicas.mean_(extra.grad)  # DistributedDataParallel does not know it
            for weights, factor in ((module.values, 1.0), (extra, 1 - self.sparsity)):
                if weights.grad is not None and factor:
                    weights.grad.add_(weights.sign(), alpha=self.penalty / factor)
        return super().step()

    def plan(self, fraction: float) -> dict[str, Tensor]:
        """Return the mask of A for every layer: its largest weights, those at rest included."""
        return {name: self._largest(name, inner) for name, (inner, _) in self._sizes.items()}

    def weights(self, name: str) -> Tensor:
        """Return all weights of layer `name`, in training or at rest, in the weight's shape."""
        module, all_weights = self.modules[name], self.resting[name].clone()
        flat = all_weights.view(-1)
        flat[self._outer[name].flat_indices()] = self.extra[name].detach()
        flat[module.topology.flat_indices()] = module.values.detach()
        return all_weights

    def saw(self, op: str, args: tuple[Any, ...]) -> None:
        """Compute the gradient of the extra weights beside that of the layer's values."""
        if op not in ("conv2d_wgrad", "linear_wgrad"):
            return
        grad, x, crow, _, *geometry = args
        name, current = observe.owner(self.layers(), crow), torch._C._current_graph_task_id()
        if name is None or current == -1:  # -1: a call of the op outside any backward pass
            return
        outer, extra = self._outer[name], self.extra[name]
        if self.modules[name].values.grad is None and current != self._pass.get(name):
            extra.grad = None  # gradients were zeroed: start afresh
        self._pass[name] = current
        kernel = getattr(torch.ops.sparsekd, op)
        part = kernel(grad, x, outer.crow_indices, outer.col_indices, *geometry).to(extra.dtype)
        extra.grad = part if extra.grad is None else extra.grad + part

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, next to the model's and the optimizer's state."""
        return {
            **super().state_dict(),
            "resting": {name: weight.clone() for name, weight in self.resting.items()},
            "extra": {name: extra.detach().clone() for name, extra in self.extra.items()},
            "outer": {name: outer.mask() for name, outer in self._outer.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken; load model and optimizer as well."""
        super().load_state_dict(state)
        for name, extra in self.extra.items():
            self.resting[name].copy_(state["resting"][name])
            extra.data = state["extra"][name].to(extra.device, extra.dtype, copy=True)
            self._place(name, state["outer"][name])

    def _largest(self, name: str, nnz: int) -> Tensor:
        return topk_mask(scores.magnitude(self.weights(name)), nnz)

    def _rewire(self, name: str, mask: Tensor) -> bool:
        """Move values, gradients and optimizer state of both parameters to the new A and B."""
        module, extra = self.modules[name], self.extra[name]
        outer = self._largest(name, self._sizes[name][1]) & ~mask
        self.resting[name] = self.weights(name)
        old = (module.topology.flat_indices(), self._outer[name].flat_indices())
        new = (mask.view(-1).nonzero().squeeze(1), outer.view(-1).nonzero().squeeze(1))
        weights = self.resting[name].view(-1)
        grads = _move((module.values.grad, extra.grad), old, new, weights)
        states = [self.optimizer.state.get(p, {}) for p in (module.values, extra)]
        moved = {
            key: _move((value, states[1].get(key)), old, new, weights)
            for key, value in states[0].items()
            if isinstance(value, Tensor) and value.shape == module.values.shape
        }
        module.rewire(mask)
        module.values.copy_(weights[new[0]])
        extra.data = weights[new[1]]
        module.values.grad, extra.grad = grads
        for key, tensors in moved.items():
            for state, tensor in zip(states, tensors, strict=True):
                if key in state:
                    state[key] = tensor
        self._place(name, outer)
        return False

    def _place(self, name: str, outer: Tensor) -> None:
        self._outer[name] = Topology.from_mask(outer)

    def _group(self, values: nn.Parameter) -> list[nn.Parameter]:
        groups = (group["params"] for group in self.optimizer.param_groups)
        return next(params for params in groups if any(held is values for held in params))


def _move(pair: tuple[Tensor | None, Tensor | None], old: Pair, new: Pair, like: Tensor) -> Any:
    """Carry one number per weight from the old sets to the new; weights from neither get 0."""
    if pair[0] is None and pair[1] is None:
        return None, None
    flat = torch.zeros_like(like)
    for tensor, positions in zip(pair, old, strict=True):
        if tensor is not None:
            flat[positions] = tensor.to(flat.dtype)
    return flat[new[0]], flat[new[1]]
