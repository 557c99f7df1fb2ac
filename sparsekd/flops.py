"""Count the floating-point operations of a network's convolutions and linear layers, exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
        with _evaluating(model), torch.no_grad():
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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and each back as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
