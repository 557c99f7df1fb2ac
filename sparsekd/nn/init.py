"""Initialisation by the number of weights that a neuron stores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekd.csr import row_indices
from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.topology import Topology

MODES = ("fan_in", "fan_out", "fan_avg")
LAWS = ("uniform", "normal")

TORCH_DEFAULT_GAIN = 1 / math.sqrt(3)
"""Gain of nn.Linear and nn.Conv2d: `kaiming_uniform_(a=sqrt(5))` has the variance 1 / (3 fan)."""


def active_fans(topology: Topology, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Count, for every nonzero, the active weights that share its output and its input.

    Args:
        topology: positions of the weight's nonzeros.
        groups: groups of the convolution.

    Returns:
        Active fan-in of the weight's output neuron and active fan-out of its input channel.

    Shape:
        both int64 [nnz]

    Source: Evci et al., Gradient Flow in Sparse Neural Networks, section 3.

    Example:
        >>> import torch
        >>> topology = Topology.from_mask(torch.tensor([[True, True], [False, True]]))
        >>> [fan.tolist() for fan in active_fans(topology)]
        [[2, 2, 1], [1, 2, 2]]
    """
    rows = row_indices(topology.crow_indices, topology.nnz)
    per_channel = math.prod(topology.shape[2:])
    channels = topology.shape[1]
    group = rows // max(topology.rows // groups, 1)
    inputs = group * channels + topology.col_indices // per_channel
    fan_in = torch.bincount(rows, minlength=topology.rows)[rows]
    fan_out = torch.bincount(inputs, minlength=groups * channels)[inputs]
    return fan_in, fan_out


@torch.no_grad()
def kaiming_(
    values: Tensor,
    topology: Topology,
    *,
    groups: int = 1,
    mode: str = "fan_in",
    law: str = "uniform",
    gain: float = TORCH_DEFAULT_GAIN,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill `values` with variance `gain**2 / fan`, where fan counts only the active weights.

    With a full topology this is the dense initialisation of the same gain; with a sparse one each
    neuron keeps the variance of its pre-activation, however few inputs it has left. The default
    gain is that of a fresh nn.Linear or nn.Conv2d; He's for ReLU is `sqrt(2)`.

    Args:
        values: the nonzeros of a weight; overwritten.
        topology: their positions.
        groups: groups of the convolution.
        mode: "fan_in", "fan_out" or "fan_avg" (their mean).
        law: "uniform" or "normal".
        gain: standard deviation at fan 1.
        generator: CPU generator; torch's global one when omitted.

    Shape:
        values [nnz]

    Returns:
        `values`.

    Raises:
        ShapeError: if `values` does not have one entry per nonzero.
        UnsupportedError: if `mode` or `law` is not known.

    Source: Evci et al., Gradient Flow in Sparse Neural Networks, section 3; He et al., Delving
    Deep into Rectifiers, section 2.2.

    Example:
        >>> import torch
        >>> topology = Topology.from_mask(torch.ones(4, 9, dtype=torch.bool))
        >>> bool(kaiming_(torch.empty(36), topology).abs().max() <= 1 / 3)
        True
    """
    _check_choice("mode", mode, MODES)
    _check_choice("law", law, LAWS)
    if values.shape != (topology.nnz,):
        raise ShapeError(f"values: expected shape [{topology.nnz}], got {list(values.shape)}")
    fan_in, fan_out = active_fans(topology, groups)
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
    std = gain / fan.to(torch.float64).sqrt()
    # Drawn on the CPU in float64, so that neither device nor dtype changes the numbers.
    noise = torch.empty(values.shape, dtype=torch.float64, device="cpu")
    if law == "uniform":
        noise.uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
    else:
        noise.normal_(generator=generator)
    return values.copy_(noise * std.cpu())


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UnsupportedError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
