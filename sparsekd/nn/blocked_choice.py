"""Whether a block runs in the blocked layout: by a rule where that is clear, else by measurement.

What the layout costs on the way in and out counts: a block that would bring its input in has to win
by more than that, unless the convolution behind it takes the result inside. So a network is never
slower for the layout than without, wherever its blocks gain and lose.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekd import ops as products
from sparsekd.nn.conv import SparseConv2d
from sparsekd.ops.cpu import blocked as ops
from sparsekd.ops.cpu.blocked_map import Blocked, compiled, enter, leave
from sparsekd.ops.dispatch.cache_key import Key, density_step, size_step
from sparsekd.ops.dispatch.context import forced

_log = logging.getLogger(__name__)

IMAGE_CHANNELS = 4
"""Input channels of convolutions that read images, up to which they follow what is behind them."""
_SURE = 0.36
"""Share of nonzeros up to which sparse convolutions run in the layout without a measurement."""
_PINNED = 0.505
"""The share up to which they do where measurements are not wanted."""
_MOST = 16  # kinds of call of a block

_current_isa: Any = compiled("current_isa")
_known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = weakref.WeakKeyDictionary()


class Case(NamedTuple):
    """A block and its input, as far as the time depends on them.

    Args:
        owner: the module whose block it is.
        call: what is equal in calls that share a choice.
        onward: whether what reads the result runs in the layout.
        rule: whether the block runs in the layout; None where no rule tells.
    """

    owner: nn.Module
    call: Hashable
    onward: bool
    rule: bool | None

    @property
    def layout(self) -> bool | None:
        """Whether the block runs in the layout; None until that is measured."""
        if self.rule is not None:
            return self.rule
        return _known.get(self.owner, {}).get(self.call)


class Trial(NamedTuple):
    """A block that can be run again and again, without anything to remember it by.

    Args:
        specs: its convolutions.
        plan: the compiled one.
        parameters: what gradients are wanted of.
        layout: runs it on blocked images; None where the result is not finite.
        ordinary: runs it on ordinary images.
        moments: whether the layout needs the moments of the input.
    """

    specs: Sequence[ops.Spec]
    plan: ops.Plan
    parameters: Sequence[Tensor | None]
    layout: Callable[[Blocked], Blocked | None]
    ordinary: Callable[[Tensor], Tensor]
    moments: bool = False


def case_of(
    owner: nn.Module, x: Tensor | Blocked, convs: Sequence[nn.Module], then: nn.Module | None
) -> Case:
    """Return what is known of a block, and its input `x`, without a measurement.

    Args:
        owner: the module whose block it is.
        x: images `[N, C, H, W]`.
        convs: its convolutions.
        then: the convolution that reads its result, if that is known.
    """
    nnz = [len(conv.values) if isinstance(conv, SparseConv2d) else -1 for conv in convs]
    onward = isinstance(then, SparseConv2d) and _share([then]) <= _SURE
    tensor, arrives = (x.tensor, True) if isinstance(x, Blocked) else (x, False)
    call = (
        tuple(x.shape), tensor.dtype, arrives, onward, torch.get_num_threads(), _current_isa(), *nnz
    )  # fmt: skip
    return Case(owner, call, onward, _rule(convs, onward))


def _rule(convs: Sequence[Any], onward: bool) -> bool | None:
    if not all(isinstance(conv, SparseConv2d | nn.Conv2d) for conv in convs):
        return False
    if onward and all(conv.in_channels <= IMAGE_CHANNELS for conv in convs):
        return True
    if not any(isinstance(conv, SparseConv2d) for conv in convs):
        return False
    share = _share(convs)
    if share <= _SURE:
        return True
    return share <= _PINNED if forced() == "cpp" else None


def sure(conv: nn.Module) -> bool:
    """Return whether a convolution has so many zeros that the layout needs no measurement."""
    return _rule([conv], onward=False) is True


def _share(convs: Sequence[Any]) -> float:
    """Return the share of weights that are stored."""
    stored = size = 0
    for conv in convs:
        sparse = isinstance(conv, SparseConv2d)
        whole = math.prod(conv.weight_shape) if sparse else conv.weight.numel()
        stored += len(conv.values) if sparse else whole
        size += whole
    return stored / max(size, 1)


def measure(case: Case, x: Tensor | Blocked, make: Callable[[], Trial]) -> bool:
    """Return whether a block is faster in the layout, by what was measured before or now.

    Nothing but the choice remains of the runs: no gradient, no statistic of a norm, no plan.

    Args:
        case: of the block and its input `x`.
        x: images `[N, C, H, W]`.
        make: returns what runs the block.
    """
    # Both need the compiled module, without which nothing comes here.
    from sparsekd.ops.cpu import cpp
    from sparsekd.ops.dispatch import blocks

    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is),  # none of the user's
        ):
            trial = make()
            wins = blocks.chooser().layout_wins(_key(case, x, trial), *_calls(case, x, trial))
    except (ArithmeticError, MemoryError, RuntimeError) as error:  # it runs as without the layout
        _log.warning("a block is not measured and runs by ordinary ops: %s", error)
        return False
    if wins:
        for crow, col, *_ in trial.specs:
            cpp.forget(crow, col)
    else:
        ops.forget(case.owner)
    known = _known.setdefault(case.owner, {})
    if len(known) >= _MOST:
        known.clear()
    known[case.call] = wins
    return wins


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _key(case: Case, x: Tensor | Blocked, trial: Trial) -> Key:
    shape, dtype, arrives, onward, threads, isa = case.call[:6]  # type: ignore[index]
    batch, *sizes = shape
    words = [
        f"block {str(dtype).removeprefix('torch.')} threads={threads} isa={isa}",
        f"input={sizes} blocked={arrives} onward={onward}",
        *(f"conv={spec[2:]}" for spec in trial.specs),
    ]
    pixels = [math.prod(shape[2:]) for shape in trial.plan.shapes]
    stored = sum(p * spec[1].shape[0] for p, spec in zip(pixels, trial.specs, strict=True))
    every = sum(p * math.prod(spec[2]) for p, spec in zip(pixels, trial.specs, strict=True))
    density = density_step(max(stored, 1) / max(every, 1))
    return Key(" ".join(words), (density, size_step(batch)))


def _calls(
    case: Case, x: Tensor | Blocked, trial: Trial
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return the block in the layout and by ordinary ops, forward and backward."""
    arrives, onward = case.call[2:4]  # type: ignore[index]
    wanted = x.shape[1] > IMAGE_CHANNELS
    images = source = _leaf(x.stored() if isinstance(x, Blocked) else x, wanted)
    moments = x.moments.clone() if isinstance(x, Blocked) and x.moments is not None else None

    def bring(tensor: Tensor) -> Blocked:
        inside = Blocked(tensor, x.shape, moments=moments) if arrives else tensor  # type: ignore
        return entered(inside, trial.moments)

    if arrives and not onward:
        images = _leaf(leave(bring(source)), wanted)

    def layout() -> None:
        out = trial.layout(bring(source))
        if out is None:
            raise ArithmeticError("the block gives something that is not finite")
        _backward(out.tensor if arrives or onward else leave(out), source, trial)

    def ordinary() -> None:
        within = leave(bring(images)) if arrives and onward else images
        out = trial.ordinary(within)
        _backward(enter(out).tensor if onward else out, images, trial)

    return layout, ordinary


def _leaf(x: Tensor, wanted: bool) -> Tensor:
    return x.detach().clone().requires_grad_(wanted)


def _backward(out: Tensor, x: Tensor, trial: Trial) -> None:
    inputs = [t for t in (x, *trial.parameters) if t is not None and t.requires_grad]
    torch.autograd.grad(out, inputs, torch.full_like(out, 0.1))


def entered(x: Tensor | Blocked, moments: bool) -> Blocked:
    """Return images in the blocked layout, with the moments of their channels if they are wanted.

    Args:
        x: images `[N, C, H, W]`.
        moments: whether they are wanted where they are not known.
    """
    inside = x if isinstance(x, Blocked) else enter(x)
    if moments and inside.moments is None:
        with torch.no_grad():
            inside.moments = torch.cat(products.call_batch_moments(leave(x))).double()
    return inside


def fresh(unit: ops.ConvNorm) -> ops.ConvNorm:
    """Return a convolution and norm of the same numbers that run without a trace."""
    own = {
        name: None if t is None else _leaf(t, True)
        for name, t in zip(("values", "bias", "gamma", "beta"), unit.parameters, strict=True)
    }
    if not unit.frozen:
        own |= {"mean": None, "var": None}
    return replace(unit, **own, rate=0.0, batches=None)  # type: ignore[arg-type]


def fused_norm(
    norm: ops.ConvNorm, z: Tensor, residual: Tensor | None = None, *, relu: bool
) -> Tensor:
    """Return what a fused norm does, with the residual and ReLU behind it; statistics stay."""
    mean, var = norm.mean, norm.var
    if mean is None or var is None:
        mean, var = products.call_batch_moments(z)
    return products.call_norm_act(
        z, residual, norm.gamma, norm.beta, mean, var, norm.eps, relu, norm.frozen
    )
