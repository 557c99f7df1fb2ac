"""Masks with an exact number of ones, drawn at random or chosen by magnitude."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsekd.errors import ShapeError


def generator_for(seed: int, name: str = "") -> torch.Generator:
    """Return a CPU generator that depends on `seed` and `name` alone.

    Layers that share a seed draw different numbers, the same ones in every process: the name
    enters through a stable hash, not Python's `hash`, and torch's global generator is not used.

    Example:
        >>> a, b = generator_for(0, "conv1"), generator_for(0, "conv1")
        >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
        True
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device="cpu")
    return generator.manual_seed(int.from_bytes(digest, "little") >> 1)


def topk_indices(score: Tensor, k: int) -> Tensor:
    """Find the positions of the `k` largest scores, in ascending order.

    Equal scores go to the lower flat position, so the result does not depend on the machine.

    Args:
        score: any shape; read in row-major order.
        k: number of positions.

    Shape:
        score [...] -> int64 [k]

    Raises:
        ValueError: if `k` is not in [0, score.numel()] or a score is NaN.

    Example:
        >>> topk_indices(torch.tensor([1.0, 3.0, 1.0, 2.0]), 3)
        tensor([0, 1, 3])
    """
    flat = score.detach().reshape(-1)
    if not 0 <= k <= flat.numel():
        raise ValueError(f"k: expected 0 to {flat.numel()}, got {k}")
    if flat.isnan().any():
        raise ValueError("score: expected numbers, got NaN")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=flat.device)
    last = flat.kthvalue(flat.numel() - k + 1).values  # linear time; the ties are settled below
    above = (flat > last).nonzero().reshape(-1)
    ties = (flat == last).nonzero().reshape(-1)[: k - above.numel()]
    return torch.cat([above, ties]).sort().values


def _mask_at(indices: Tensor, shape: Sequence[int]) -> Tensor:
    mask = torch.zeros(math.prod(shape), dtype=torch.bool, device=indices.device)
    mask[indices] = True
    return mask.reshape(tuple(shape))


def topk_mask(score: Tensor, nnz: int) -> Tensor:
    """Keep the `nnz` largest scores; among equal scores the earlier one.

    Args:
        score: any shape.
        nnz: number of ones.

    Returns:
        Bool tensor of the score's shape and device.

    Raises:
        ValueError: if `nnz` is not in [0, score.numel()] or a score is NaN.

    Example:
        >>> topk_mask(torch.tensor([1.0, -3.0, 0.5]), 2)
        tensor([ True, False,  True])
    """
    return _mask_at(topk_indices(score, nnz), score.shape)


def random_mask(
    shape: Sequence[int], nnz: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a mask with exactly `nnz` ones, every such mask being equally likely.

    Args:
        shape: shape of the weight.
        nnz: number of ones.
        generator: CPU generator; `generator_for(0)` when omitted, never torch's global one.

    Returns:
        Bool tensor of `shape` on the CPU.

    Raises:
        ValueError: if `nnz` is not in [0, number of elements].

    Example:
        >>> int(random_mask((4, 5), 7).sum())
        7
    """
    numel = math.prod(shape)
    if not 0 <= nnz <= numel:
        raise ValueError(f"nnz: expected 0 to {numel}, got {nnz}")
    generator = generator_for(0) if generator is None else generator
    order = torch.randperm(numel, generator=generator, device="cpu")
    return _mask_at(order[:nnz], shape)


def magnitude_mask(weight: Tensor, nnz: int) -> Tensor:
    """Keep the `nnz` entries of largest magnitude; among equal ones the earlier.

    Args:
        weight: any shape.
        nnz: number of ones.

    Returns:
        Bool tensor of the weight's shape and device.

    Raises:
        ValueError: if `nnz` is not in [0, weight.numel()] or the weight holds NaN.

    Example:
        >>> magnitude_mask(torch.tensor([[1.0, -3.0], [0.5, 1.0]]), 2)
        tensor([[ True,  True],
                [False, False]])
    """
    return topk_mask(weight.detach().abs(), nnz)


def random_masks(
    shapes: Mapping[str, Sequence[int]], nnz: Mapping[str, int], *, seed: int = 0
) -> dict[str, Tensor]:
    """Draw one mask per layer, each from its own generator of `seed` and the layer's name.

    Args:
        shapes: weight shape per layer.
        nnz: number of ones per layer, as `allocate` gives it.
        seed: seed of all layers.

    Returns:
        Bool mask per layer. A layer's mask does not depend on which other layers there are.

    Example:
        >>> int(random_masks({"fc": (10, 10)}, {"fc": 7}, seed=1)["fc"].sum())
        7
    """
    return {
        name: random_mask(shape, nnz[name], generator=generator_for(seed, name))
        for name, shape in shapes.items()
    }


def magnitude_masks(weights: Mapping[str, Tensor], nnz: Mapping[str, int]) -> dict[str, Tensor]:
    """Keep the entries of largest magnitude of each layer.

    Args:
        weights: weight per layer.
        nnz: number of ones per layer.

    Returns:
        Bool mask per layer.

    Raises:
        ValueError: as `magnitude_mask`.

    Example:
        >>> magnitude_masks({"fc": torch.tensor([[1.0, 2.0]])}, {"fc": 1})
        {'fc': tensor([[False,  True]])}
    """
    return {name: magnitude_mask(weight, nnz[name]) for name, weight in weights.items()}


def global_masks(scores: Mapping[str, Tensor], nnz: int) -> dict[str, Tensor]:
    """Keep the `nnz` largest scores over all layers together.

    Global magnitude pruning passes `weight.abs()`. Equal scores go to the earlier layer, then to
    the lower position.

    Args:
        scores: score per layer; all of one device.
        nnz: number of ones over all layers.

    Returns:
        Bool mask per layer, with `nnz` ones in total.

    Raises:
        ValueError: if `nnz` exceeds the number of scores or a score is NaN.
        ShapeError: if there are no layers.

    Source: Frankle & Carbin, The Lottery Ticket Hypothesis, section 4 (global pruning).

    Example:
        >>> masks = global_masks({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([3.0])}, 2)
        >>> masks["a"].tolist(), masks["b"].tolist()
        ([False, True], [True])
    """
    if not scores:
        raise ShapeError("scores: expected at least one layer, got none")
    flat = torch.cat([score.detach().reshape(-1) for score in scores.values()])
    kept = _mask_at(topk_indices(flat, nnz), flat.shape)
    parts = kept.split([score.numel() for score in scores.values()])
    return {
        name: part.reshape(score.shape)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }
