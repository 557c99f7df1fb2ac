"""Pruning at initialisation: masks by SNIP, GraSP and SynFlow, from one batch and a dense network.

None of them changes the network: weights, gradients, BatchNorm statistics and training flags stay.
Pass the masks to `sparsify(model, masks=...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sparsekd._torch import BatchNorm
from sparsekd.modes import in_mode
from sparsekd.sparsity.dead import living_rows, warn_of_dead
from sparsekd.sparsity.distributions import allocate
from sparsekd.sparsity.masks import global_masks, topk_mask
from sparsekd.sparsity.rounding import check_sparsity, target_nnz
from sparsekd.sparsity.survey import layers_to_prune, with_layers

Masks = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
_Scores = dict[str, Tensor]


def snip(
    model: nn.Module,
    batch: Batch,
    sparsity: float = 0.9,
    *,
    loss: Loss = F.cross_entropy,
    distribution: str = "global",
    skip: str | Iterable[str] = (),
) -> Masks:
    """Keep the weights with the largest |w g|, whose removal would change the loss most.

    Args:
        model: a dense network, only read; it runs in training mode.
        batch: inputs and targets, a few images per class.
        sparsity: fraction of the weights of all chosen layers to remove.
        loss: of outputs and targets.
        distribution: "global" ranks the weights of all layers together, as the paper does;
            "uniform", "er" or "erk" fixes the number per layer, as the SNIP baseline of the RigL
            paper does.
        skip: layers that stay dense, as in `sparsify`.

    Returns:
        Layer name -> bool mask, with exactly `round((1 - sparsity) * N)` ones in total.

    Raises:
        ValueError: `sparsity` is out of range, a score is not finite, or there is nothing to prune.
        UnsupportedError: `distribution` is not known.

    Source: SNIP: Single-shot Network Pruning (arXiv 1810.02340), section 4.

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
        >>> masks = snip(model, (torch.randn(8, 20), torch.arange(8) % 5), sparsity=0.8)
        >>> sum(int(mask.sum()) for mask in masks.values())
        150
    """
    model = with_layers(model)
    weights, run = _prepare(model, skip)
    x, y = batch
    with torch.enable_grad(), in_mode(model, training=True):
        gradients = _gradients(loss(run(x), y), weights)
    scores = _products(weights, gradients)
    return _warn_of_empty(_keep({n: s.abs() for n, s in scores.items()}, sparsity, distribution))


def grasp(
    model: nn.Module,
    batch: Batch,
    sparsity: float = 0.9,
    *,
    temperature: float = 200.0,
    loss: Loss = F.cross_entropy,
    distribution: str = "global",
    skip: str | Iterable[str] = (),
) -> Masks:
    """Keep the weights that preserve gradient flow: remove those with the largest -w (H g).

    H g is the Hessian of the loss times its gradient, both with respect to the weights of the
    chosen layers.

    Args:
        model: a dense network, only read; it runs in training mode.
        batch: inputs and targets, about ten images per class.
        sparsity: fraction of the weights of all chosen layers to remove.
        temperature: divisor of the outputs before the loss.
        loss: of outputs and targets.
        distribution: "global" as in the paper, or "uniform", "er", "erk" to fix each layer's nnz.
        skip: layers that stay dense, as in `sparsify`.

    Returns:
        Layer name -> bool mask, with exactly `round((1 - sparsity) * N)` ones in total.

    Raises:
        ValueError: `sparsity` is out of range, a score is not finite, or there is nothing to prune.
        UnsupportedError: `distribution` is not known.

    Source: Picking Winning Tickets Before Training (arXiv 2002.07376), section 4.

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
        >>> masks = grasp(model, (torch.randn(8, 20), torch.arange(8) % 5), sparsity=0.8)
        >>> sum(int(mask.sum()) for mask in masks.values())
        150
    """
    model = with_layers(model)
    weights, run = _prepare(model, skip)
    x, y = batch
    with torch.enable_grad(), in_mode(model, training=True):
        gradients = _gradients(loss(run(x) / temperature, y), weights, create_graph=True)
        flow = torch.stack([(g.detach() * g).sum() for g in gradients]).sum()
        hessian_gradient = _gradients(flow, weights)
    return _warn_of_empty(_keep(_products(weights, hessian_gradient), sparsity, distribution))


def synflow(
    model: nn.Module,
    batch: Batch | Tensor,
    sparsity: float = 0.9,
    *,
    rounds: int = 100,
    skip: str | Iterable[str] = (),
) -> Masks:
    """Keep the weights that carry most of the flow through the network of absolute weights.

    The score is w dR/dw, R being the sum of the outputs for an input of ones. After round k of
    `rounds` exactly `round(density^(k / rounds) * N)` weights are left, so no layer is cut off
    while another has weights to spare. Everything runs in float64 and evaluation mode, with
    BatchNorm as the identity. Neither data nor targets are used.

    Args:
        model: a dense network, only read.
        batch: inputs and targets, or inputs; only the shape of one input counts.
        sparsity: fraction of the weights of all chosen layers to remove.
        rounds: number of prunings.
        skip: layers that stay dense, as in `sparsify`.

    Returns:
        Layer name -> bool mask, with exactly `round((1 - sparsity) * N)` ones in total.

    Raises:
        ValueError: `sparsity` or `rounds` is out of range, the flow is not finite, or there is
            nothing to prune.

    Source: Pruning neural networks without any data (arXiv 2006.05467), algorithm 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
        >>> masks = synflow(model, torch.empty(1, 20), sparsity=0.8)
        >>> sum(int(mask.sum()) for mask in masks.values())
        150
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds: expected a positive integer, got {rounds!r}")
    density = 1 - check_sparsity(sparsity)
    x = batch if isinstance(batch, Tensor) else batch[0]
    masks = {
        name: torch.ones_like(layer.get_parameter("weight"), dtype=torch.bool)
        for name, layer in layers_to_prune(model, skip).items()
    }
    total = sum(mask.numel() for mask in masks.values())
    for k in range(1, rounds + 1):
        scores = synaptic_flow(model, x, masks)
        nnz = target_nnz(total, sparsity if k == rounds else 1 - density ** (k / rounds))
        masks = global_masks({n: s.masked_fill(~masks[n], -1.0) for n, s in scores.items()}, nnz)
    return _warn_of_empty(masks)


def synaptic_flow(model: nn.Module, x: Tensor, masks: Mapping[str, Tensor]) -> _Scores:
    """Compute w dR/dw, the score of `synflow`, for every masked layer.

    In a network of bias-free layers and ReLUs the scores of each layer add up to R.

    Args:
        model: a dense network, only read.
        x: inputs; only the shape of one counts.
        masks: layer name -> bool mask of the weights that are left.

    Returns:
        Layer name -> float64 scores, none negative.

    Raises:
        ValueError: the flow is not finite.

    Source: as `synflow`, section 4.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> mask = torch.tensor([[True, False]])
        >>> flow = synaptic_flow(model, torch.empty(1, 2), {"0": mask})["0"]
        >>> bool(flow[0, 0] == model[0].weight[0, 0].abs()), bool(flow[0, 1] == 0)
        (True, True)
    """
    model = with_layers(model)
    tensors = {name: t.detach().abs().double() for name, t in model.named_parameters()}
    tensors |= {n: t.double() if t.is_floating_point() else t for n, t in model.named_buffers()}
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm):
            tensors |= _identity(name, module)
    weights = {}
    for name, mask in masks.items():
        weights[name] = (tensors[_key(name)] * mask).requires_grad_()
        tensors[_key(name)] = weights[name]
    ones = torch.ones(1, *x.shape[1:], dtype=torch.float64, device=x.device)
    with torch.enable_grad(), in_mode(model, training=False):
        flow = functional_call(model, tensors, (ones,)).sum()
    if not flow.isfinite():
        raise ValueError(f"model: expected a finite flow, got {flow.item()}; the weights explode")
    return _products(weights, _gradients(flow, weights))


def _identity(name: str, norm: BatchNorm) -> dict[str, Tensor]:
    """Return the tensors with which a BatchNorm changes nothing but rounding."""
    values = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0 - norm.eps}
    own = {key: getattr(norm, key) for key in values}
    return {
        f"{name}.{key}" if name else key: torch.full_like(t, values[key], dtype=torch.float64)
        for key, t in own.items()
        if t is not None
    }


def _prepare(
    model: nn.Module, skip: str | Iterable[str]
) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """Return the weights to score, and the network as a function that depends on them."""
    layers = layers_to_prune(model, skip)
    weights = {n: m.get_parameter("weight").detach().requires_grad_() for n, m in layers.items()}
    tensors = {name: t.detach() for name, t in model.named_parameters()}
    tensors |= {name: t.clone() for name, t in model.named_buffers()}  # BatchNorm updates these
    tensors |= {_key(name): weight for name, weight in weights.items()}
    return weights, lambda x: functional_call(model, tensors, (x,))


def _key(name: str) -> str:
    return f"{name}.weight" if name else "weight"


def _gradients(
    output: Tensor, weights: Mapping[str, Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        output, list(weights.values()), create_graph=create_graph, materialize_grads=True
    )


def _products(weights: _Scores, gradients: tuple[Tensor, ...]) -> _Scores:
    pairs = zip(weights.items(), gradients, strict=True)
    return {name: (weight * gradient).detach() for (name, weight), gradient in pairs}


def _keep(scores: _Scores, sparsity: float, distribution: str) -> Masks:
    for name, score in scores.items():
        if not score.isfinite().all():
            raise ValueError(f"{name}: expected finite scores; check the batch and the weights")
    if distribution == "global":
        return global_masks(scores, target_nnz(sum(s.numel() for s in scores.values()), sparsity))
    nnz = allocate({name: score.shape for name, score in scores.items()}, sparsity, distribution)
    return {name: topk_mask(score, nnz[name]) for name, score in scores.items()}


def _warn_of_empty(masks: Masks) -> Masks:
    # Only of whole layers: that few channels of a layer carry everything is what scores are like.
    empty = {name: living_rows(mask) for name, mask in masks.items() if not mask.any()}
    warn_of_dead(empty, stacklevel=3)
    return masks
