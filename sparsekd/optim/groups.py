"""Parameter groups that decay weights, stored dense or sparse, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekd.nn import SparseModule

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
_BIASES = ("bias", "bias_k", "bias_v", "in_proj_bias")


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_decay: Collection[str] = (),
    lr: float | Tensor | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into those that decay and those that do not.

    Dense parameters of two or more dimensions decay, and so do the `values` of sparse modules: they
    are a weight, although one-dimensional. (The usual rule "no decay below two dimensions" would
    exempt every sparse weight.) Biases, parameters of normalisation layers and all others of fewer
    dimensions do not decay.

    Args:
        model: dense, sparse or both.
        weight_decay: of the first group; that of the second is 0.
        no_decay: names of further parameters that do not decay, as in `named_parameters()`, or
            fnmatch patterns of them; `values` by the name of their module plus ".values". Unknown
            names are ignored, so that timm's `model.no_weight_decay()` can be passed.
        lr: of both groups; by default the optimizer's.

    Returns:
        One or two groups for any optimizer, each parameter once, in the model's order.

    Raises:
        ValueError: `weight_decay` is negative, or nothing is trainable.

    Example:
        >>> import torch, sparsekd as skd
        >>> model = nn.Sequential(skd.nn.SparseLinear(8, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> groups = skd.optim.param_groups(model, weight_decay=0.05)
        >>> [(group["weight_decay"], len(group["params"])) for group in groups]
        [(0.05, 2), (0.0, 4)]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay: expected a number of at least 0, got {weight_decay}")
    patterns = [no_decay] if isinstance(no_decay, str) else list(no_decay)
    members: dict[nn.Parameter, bool] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if parameter.requires_grad and parameter not in members:
                exempt = any(fnmatchcase(name, pattern) for pattern in patterns)
                members[parameter] = not exempt and _is_weight(module, leaf, parameter)
    if not members:
        raise ValueError("model: expected trainable parameters, got none")
    common = {} if lr is None else {"lr": lr}
    groups = [
        {"params": [p for p, d in members.items() if d is decays], "weight_decay": decay, **common}
        for decays, decay in ((True, weight_decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]


def warn_if_undecayed(optimizer: Optimizer, values: Iterable[nn.Parameter]) -> None:
    """Warn if an optimizer decays dense weights but no sparse ones.

    Args:
        optimizer: any.
        values: the parameters of sparse modules that it holds.
    """
    sparse = set(values)
    decay = {p: g.get("weight_decay", 0) for g in optimizer.param_groups for p in g["params"]}
    if any(decay.get(p, 0) for p in sparse):
        return
    if any(rate and p.ndim >= 2 for p, rate in decay.items() if p not in sparse):
        warnings.warn(
            "optimizer: weights of two and more dimensions decay, but the values of sparse modules "
            "do not: they have one dimension, where many trainers take a parameter for a bias. "
            "skd.optim.param_groups(model, weight_decay) makes groups that decay both; for no "
            "decay of sparse weights give them weight_decay=0 and ignore this",
            UserWarning,
            stacklevel=4,
        )


def _is_weight(module: nn.Module, leaf: str, parameter: nn.Parameter) -> bool:
    if isinstance(module, SparseModule):
        return leaf == "values"
    return parameter.ndim >= 2 and leaf not in _BIASES and not isinstance(module, _NORMS)
