"""How solutions lie to each other: distance, plane, linear path, disagreement, ensemble."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from sparsekd.data import Source
from sparsekd.errors import ShapeError
from sparsekd.modes import in_mode
from sparsekd.nn import SparseModule, sparse_modules
from sparsekd.tickets.superposition import blank_copy
from sparsekd.train import Evaluation, evaluate


@torch.no_grad()
def weight_vector(model: nn.Module) -> Tensor:
    """Return all parameters as one vector, zeros included, so that any topologies compare.

    Args:
        model: dense or sparse; only read.

    Returns:
        Float64, one entry per parameter of the dense network.
    """
    parts = []
    for module in model.modules():
        if isinstance(module, SparseModule):
            parts.append(module.dense_weight().flatten())
        own = module.named_parameters(recurse=False)
        sparse = isinstance(module, SparseModule)
        parts += [p.flatten() for name, p in own if not (sparse and name == "values")]
    return torch.cat([part.double() for part in parts])


def distance(a: nn.Module, b: nn.Module) -> float:
    """Return the L2 distance of two networks over all parameters.

    Raises:
        ShapeError: the networks do not have equally many.
    """
    first, second = _same_size(a, b)
    return float((first - second).norm())


def cosine(a: nn.Module, b: nn.Module) -> float:
    """Return the cosine of the angle between two networks, seen from the origin.

    Raises:
        ShapeError: the networks do not have equally many parameters.
    """
    return float(torch.cosine_similarity(*_same_size(a, b), dim=0))


def _same_size(a: nn.Module, b: nn.Module) -> tuple[Tensor, Tensor]:
    first, second = weight_vector(a), weight_vector(b)
    if first.shape != second.shape:
        raise ShapeError(
            f"a, b: expected networks of one size, got {len(first)} and {len(second)} parameters"
        )
    return first, second


def plane(models: Sequence[nn.Module]) -> NDArray[np.float64]:
    """Place networks in the plane so that their distances are kept as well as they can be.

    Args:
        models: of one architecture.

    Returns:
        Coordinates ``[len(models), 2]`` by classical multidimensional scaling: those of the two
        principal directions in which the networks differ.

    Raises:
        ShapeError: the networks do not have equally many parameters.
    """
    squares = np.array([[distance(a, b) ** 2 for b in models] for a in models])
    centred = squares - squares.mean(0) - squares.mean(1, keepdims=True) + squares.mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    return vectors[:, :-3:-1] * np.sqrt(np.clip(values[:-3:-1], 0, None))


def interpolate(start: nn.Module, end: nn.Module, alpha: float) -> nn.Module:
    """Return the network ``(1 - alpha) * start + alpha * end``, on the union of the topologies.

    BatchNorm keeps the statistics of `start`, which are not those of the new network.

    Args:
        start: at alpha 0; only read.
        end: at alpha 1; only read.
        alpha: any number; beyond 0 and 1 the line goes on.

    Returns:
        A new network.

    Raises:
        ShapeError: the networks do not have the same parameters.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> torch.equal(interpolate(a, b, 1.0).weight, b.weight)
        True
    """
    mixed, other = blank_copy(start), blank_copy(end)
    theirs = dict(sparse_modules(other))
    for name, module in sparse_modules(mixed):
        if name in theirs and theirs[name].topology.shape == module.topology.shape:
            union = module.topology.mask() | theirs[name].topology.mask()
            module.rewire(union)
            theirs[name].rewire(union)
    ends = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in mixed.named_parameters():
            if name not in ends or ends[name].shape != parameter.shape:
                raise ShapeError(f"end: expected {name} of shape {list(parameter.shape)}")
            parameter.mul_(1 - alpha).add_(ends[name], alpha=alpha)
    return mixed


def path(
    start: nn.Module,
    end: nn.Module,
    alphas: Iterable[float],
    data: Source,
    batch_size: int = 500,
) -> list[Evaluation]:
    """Evaluate networks along the line from `start` to `end`.

    Networks with BatchNorm get the statistics of one pass over `data` at every point.

    Args:
        start: at alpha 0; only read.
        end: at alpha 1; only read.
        alphas: the points.
        data: to evaluate on, usually training images.
        batch_size: images per forward pass.

    Returns:
        Loss and accuracy at each point.

    Source: arXiv 2010.03533, section 5; refreshed statistics are ours.
    """
    evaluations = []
    for alpha in alphas:
        model = interpolate(start, end, alpha)
        refresh_batchnorm(model, data, batch_size)
        evaluations.append(evaluate(model, data, batch_size))
    return evaluations


def refresh_batchnorm(model: nn.Module, data: Source, batch_size: int = 500) -> None:
    """Recompute the running statistics of BatchNorm by one pass over unaugmented images."""
    update_bn(data.batches(batch_size), model)  # does nothing without BatchNorm


@torch.no_grad()
def probabilities(model: nn.Module, data: Source, batch_size: int = 500) -> Tensor:
    """Return the class probabilities of every image, float64 ``[N, C]``, in eval mode."""
    with in_mode(model, training=False):
        logits = [model(x) for x, _ in data.batches(batch_size)]
    return torch.cat(logits).double().softmax(1)


def disagreement(a: Tensor, b: Tensor) -> float:
    """Return the share of images whose most probable class differs.

    Args:
        a: probabilities or logits of one network.
        b: those of another for the same images.

    Shape:
        ``[N, C]`` both

    Source: Fort et al., Deep Ensembles: A Loss Landscape Perspective (2019), section 4.

    Example:
        >>> disagreement(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]])
        0.5
    """
    return float((a.argmax(1) != b.argmax(1)).double().mean())


def ensemble_accuracy(members: Sequence[Tensor], labels: Tensor) -> float:
    """Return the accuracy of the mean of several networks' probabilities.

    Args:
        members: probabilities of each network, ``[N, C]``.
        labels: int64 ``[N]``.
    """
    mean = torch.stack(list(members)).mean(0)
    return float((mean.argmax(1) == labels).double().mean())
