"""No speed for wrong results: what a competitor computed is compared with dense torch first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_FLOAT32 = torch.finfo(torch.float32).eps


def tolerance(terms: int, dtype: torch.dtype) -> float:
    """Bound the difference between two correct sums of products, relative to the largest result.

    The operands are rounded to `dtype` once, the sum of so many terms accumulates in float32, and
    errors of random sign grow with the square root of its length.

    Source: Higham and Mary, Probabilistic rounding error analysis (2019), theorem 2.4.

    Example:
        >>> tolerance(576, torch.float32) < 1e-5 < tolerance(576, torch.bfloat16)
        True
    """
    return 4 * torch.finfo(dtype).eps + 2 * _FLOAT32 * math.sqrt(terms)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest entry; NaN and a wrong shape are inf.

    Example:
        >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        0.5
    """
    if got.shape != expected.shape:
        return math.inf
    scale = expected.abs().max().item() if expected.numel() else 0.0
    error = (got.to(expected.dtype) - expected).abs().max().item() if expected.numel() else 0.0
    return math.inf if math.isnan(error) else error / (scale or 1.0)


def overall_error(got: Tensor, expected: Tensor) -> float:
    """Return the Euclidean norm of the difference relative to that of the expected tensor.

    Example:
        >>> overall_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
        0.2
    """
    if got.shape != expected.shape:
        return math.inf
    scale = expected.double().norm().item()
    error = (got.double() - expected.double()).norm().item()
    return math.inf if math.isnan(error) else error / (scale or 1.0)


def compare(
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    error: Callable[[Tensor, Tensor], float] = relative_error,
) -> dict[str, float]:
    """Return the error of every expected result; one that is missing counts as inf.

    Example:
        >>> compare({"output": torch.ones(2)}, {"output": torch.ones(2), "gradient": torch.ones(2)})
        {'output': 0.0, 'gradient': inf}
    """
    return {
        name: error(got[name].detach(), reference.detach()) if name in got else math.inf
        for name, reference in expected.items()
    }


def refusal(errors: Mapping[str, float], bounds: Mapping[str, float]) -> str | None:
    """Return why results are wrong: a line on the first error over its bound, None if all agree.

    Example:
        >>> refusal({"output": 0.1}, {"output": 1e-6})
        'output differs by 1.0e-01, allowed 1.0e-06'
    """
    for name, error in errors.items():
        if not error <= bounds[name]:
            return f"{name} differs by {error:.1e}, allowed {bounds[name]:.1e}"
    return None


def step_bounds(noise: Mapping[str, float], dtype: torch.dtype) -> dict[str, float]:
    """Bound how far results may be off after a whole training step.

    A rounding unit that flips a ReLU changes a gradient visibly, so the bound is measured: eight
    times what rounding alone did to the same gradient, or to the median one if that is more. A
    gradient of which rounding changes a quarter is nothing but rounding, as that of a bias before
    BatchNorm, and is not compared; nor are those of bfloat16, where only the loss is.

    Args:
        noise: `overall_error` of the loss and of each gradient between results that are all right.
        dtype: in which the competitor multiplies.

    Returns:
        The bounds by name, below the error of a gradient that is missing or unrelated.

    Example:
        >>> step_bounds({"loss": 1e-4, "fc.weight gradient": 2e-3}, torch.float32)
        {'loss': 0.0008, 'fc.weight gradient': 0.016}
    """
    loss = 8 * max(noise["loss"], 4 * torch.finfo(dtype).eps)
    if dtype != torch.float32:
        return {"loss": loss}
    gradients = {name: e for name, e in noise.items() if name != "loss" and e < 0.25}
    usual = statistics.median(gradients.values() or [0.0])
    bounds = {name: min(0.9, 8 * max(error, usual)) for name, error in gradients.items()}
    return {"loss": loss, **bounds}
