"""Count the floating-point operations of a network, exactly, and of training as papers count it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd.modes import in_mode

_DENSE_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class LayerFlops:
    """What one layer costs in a forward pass.

    Args:
        name: of the module in the model.
        shape: of its weight.
        nnz: weights it stores and computes with; all of them in a dense layer.
        positions: outputs per output channel, summed over all calls.
    """

    name: str
    shape: tuple[int, ...]
    nnz: int
    positions: int

    @property
    def density(self) -> float:
        """Share of the weight that is stored."""
        return self.nnz / math.prod(self.shape)

    @property
    def flops(self) -> int:
        """Operations of a forward pass, a multiplication and an addition per weight in use."""
        return 2 * self.nnz * self.positions

    @property
    def flops_dense(self) -> int:
        """Operations of the same layer with a dense weight."""
        return 2 * math.prod(self.shape) * self.positions


@dataclass(frozen=True)
class FlopCount:
    """What a network costs; print it for a table of its layers.

    Args:
        layers: the convolutions and linear layers in the order of their first call.
    """

    layers: tuple[LayerFlops, ...]

    @property
    def nnz(self) -> int:
        """Weights stored in all counted layers."""
        return sum(layer.nnz for layer in self.layers)

    @property
    def forward(self) -> int:
        """Operations of a forward pass."""
        return sum(layer.flops for layer in self.layers)

    @property
    def forward_dense(self) -> int:
        """Operations of a forward pass of the same network with dense weights."""
        return sum(layer.flops_dense for layer in self.layers)

    @property
    def train(self) -> int:
        """Operations of forward and backward, by the convention that backward costs twice."""
        return 3 * self.forward

    @property
    def train_dense(self) -> int:
        """Operations of forward and backward of the same network with dense weights."""
        return 3 * self.forward_dense

    def at(self, nnz: Mapping[str, int]) -> FlopCount:
        """Return what the network costs with other numbers of nonzeros.

        Args:
            nnz: number by layer name; layers without one stay as they are.

        Raises:
            ValueError: a name is no counted layer, or a number does not fit its weight.

        Example:
            >>> dense = count(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), (1, 8))
            >>> dense.forward, dense.at({"0": 10}).forward
            (80, 36)
        """
        sizes = {layer.name: math.prod(layer.shape) for layer in self.layers}
        for name, number in nnz.items():
            if name not in sizes or not 0 <= number <= sizes[name]:
                raise ValueError(
                    f"nnz: expected 0 to {sizes[name]} for {name!r}, got {number}"
                    if name in sizes
                    else f"nnz: expected names among {', '.join(sizes)}, got {name!r}"
                )
        return FlopCount(
            tuple(replace(layer, nnz=nnz.get(layer.name, layer.nnz)) for layer in self.layers)
        )

    def __str__(self) -> str:
        header = ("layer", "weight", "nnz", "density", "positions", "FLOPs")
        rows = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                f"{layer.nnz:,}",
                f"{layer.density:.4f}",
                f"{layer.positions:,}",
                f"{layer.flops:,}",
            )
            for layer in self.layers
        ]
        share = self.forward / self.forward_dense if self.forward_dense else 1.0
        total = ("total", "", f"{self.nnz:,}", f"{share:.4f} of dense", "", f"{self.forward:,}")
        table = [header, *rows, total]
        widths = [max(len(row[column]) for row in table) for column in range(len(header))]
        return "\n".join(
            "  ".join(
                text.ljust(width) if column < 2 else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        )


def count(model: nn.Module, input_shape: Sequence[int]) -> FlopCount:
    """Count the operations of a network on an input of this shape.

    A convolution or linear layer costs ``2 * nnz * positions`` in a forward pass, and training
    three times that: once forward, once for the gradient of the input, once for that of the
    values. The first layer's input gradient is counted although no training step computes it,
    as in the papers whose figures these are compared with. Biases, normalisation, activations,
    pooling, attention products and the loss are left out.

    The network runs once on zeros, in evaluation mode and without autograd; its training flags
    and BatchNorm statistics stay as they were.

    Args:
        model: any network; layers with `topology` and `values` count as sparse.
        input_shape: shape of its input, the batch dimension included.

    Returns:
        Totals and one row per layer, exact integers.

    Source: Evci et al., Rigging the Lottery (2020), appendix H.

    Example:
        >>> print(count(nn.Linear(8, 4), (1, 8)).forward)
        64
    """
    positions: dict[str, int] = {}
    layers = {name: module for name, module in model.named_modules() if _is_counted(module)}
    names = {module: name for name, module in layers.items()}

    def record(module: nn.Module, _: Any, output: Tensor) -> None:
        name = names[module]
        positions[name] = positions.get(name, 0) + output.numel() // _weight_shape(module)[0]

    handles = [module.register_forward_hook(record) for module in names]
    try:
        with in_mode(model, training=False), torch.no_grad():
            model(_zeros_like_input(model, input_shape))
    finally:
        for handle in handles:
            handle.remove()
    return FlopCount(
        tuple(
            LayerFlops(name, _weight_shape(layers[name]), _nnz(layers[name]), calls)
            for name, calls in positions.items()
        )
    )


def published(method: str, sparse: float, dense: float, every: int = 100) -> float:
    """Return the operations of one training step as the papers count them.

    With f_S a forward pass of the sparse network and f_D one of the dense network, backward costs
    twice as much as forward; BatchNorm, the loss and the selection of weights are left out:

    | method | step |
    |---|---|
    | dense | 3 f_D |
    | static, small-dense, snip, grasp, synflow, set, itop, mest, gmp, acdc | 3 f_S |
    | snfs | 2 f_S + f_D |
    | rigl, rigl-sg, rigl-sm, granet, srigl | (3 f_S every + 2 f_S + f_D) / (every + 1) |

    Where the number of weights changes (gmp, granet, acdc, mest, redistribution), `sparse` is the
    mean over training, which assumes that kernels profit from every weight that goes. These here
    do; what they compute is `FlopCount.train`, at each step that of its own topology.

    Args:
        method: one of the above.
        sparse: f_S, per image or per batch.
        dense: f_D, likewise.
        every: iterations from one update to the next.

    Returns:
        Operations of a step, the mean where steps differ.

    Raises:
        ValueError: the method is not among the above.

    Source: Evci et al., Rigging the Lottery (2020), appendix H; the last line's last four by the
        same reasoning.

    Example:
        >>> published("rigl", sparse=10.0, dense=100.0, every=99)
        30.9
    """
    if method not in _STEPS:
        raise ValueError(f"method: expected one of {', '.join(_STEPS)}, got {method!r}")
    return _STEPS[method](sparse, dense, every)


def _rigl_step(sparse: float, dense: float, every: int) -> float:
    return (3 * sparse * every + 2 * sparse + dense) / (every + 1)


_PRUNED = ("static", "small-dense", "snip", "grasp", "synflow", "gmp", "acdc")
_RANDOM = ("set", "itop", "mest")
_BY_GRADIENT = ("rigl", "rigl-sg", "rigl-sm", "granet", "srigl")
_STEPS: dict[str, Callable[[float, float, int], float]] = {
    "dense": lambda sparse, dense, every: 3 * dense,
    **dict.fromkeys(_PRUNED + _RANDOM, lambda sparse, dense, every: 3 * sparse),
    "snfs": lambda sparse, dense, every: 2 * sparse + dense,
    **dict.fromkeys(_BY_GRADIENT, _rigl_step),
}


def _is_sparse(module: nn.Module) -> bool:
    return hasattr(module, "topology") and hasattr(module, "values")


def _is_counted(module: nn.Module) -> bool:
    return _is_sparse(module) or isinstance(module, _DENSE_LAYERS)


def _weight_shape(module: Any) -> tuple[int, ...]:
    return tuple(module.topology.shape if _is_sparse(module) else module.weight.shape)


def _nnz(module: Any) -> int:
    return module.topology.nnz if _is_sparse(module) else module.weight.numel()


def _zeros_like_input(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Make an input with the device and dtype of the parameters."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return torch.zeros(*shape, device=parameter.device, dtype=parameter.dtype)
    return torch.zeros(*shape)
