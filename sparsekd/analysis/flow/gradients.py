"""The gradient norm of a sparse network: how far a step of gradient descent gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekd.tickets.superposition import blank_copy


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms of the gradient of the loss over the weights that a network stores.

    To first order, a step of rate lr lowers the loss by ``lr * total**2``.

    Args:
        total: over all trainable parameters.
        layers: over those of one module, by name.
    """

    total: float
    layers: dict[str, float]


def gradient_norms(model: nn.Module, x: Tensor, y: Tensor) -> GradientNorms:
    """Compute the norm of the gradient of the mean cross entropy, in total and per layer.

    Positions that hold no weight do not count: in a sparse layer they get no gradient at all. Nor
    does weight decay. Each module stays in its mode, so BatchNorm of a network in training mode
    takes the statistics of this batch; running statistics, `.grad` and torch's generator are left
    as they were.

    Args:
        model: only read.
        x: images.
        y: labels.

    Shape:
        x ``[N, C, H, W]``, y ``[N]``.

    Returns:
        The norms.

    Source: Evci et al., Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win
        (arXiv 2010.03533), section 3.

    Example:
        >>> import sparsekd as skd
        >>> model = nn.Sequential(nn.Flatten(), skd.nn.SparseLinear(64, 10, sparsity=0.9))
        >>> norms = gradient_norms(model, torch.rand(8, 1, 8, 8), torch.arange(8))
        >>> list(norms.layers)
        ['1']
    """
    twin = blank_copy(model)
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)  # the same dropout at every measurement
        loss = F.cross_entropy(twin(x), y)
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    squares: dict[str, float] = {}
    for name, gradient in zip(parameters, gradients, strict=True):
        layer = name.rpartition(".")[0]
        squares[layer] = squares.get(layer, 0.0) + gradient.double().square().sum().item()
    layers = {name: math.sqrt(square) for name, square in squares.items()}
    return GradientNorms(math.sqrt(sum(squares.values())), layers)
