"""Networks whose blocks normalise in front of their convolutions, in the blocked layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekd.models.wide_resnet import PreActivationBlock, WideResNet
from sparsekd.nn.blocked import (
    Blocked,
    ConvNorm,
    call_blocked,
    conv_fits,
    input_fits,
    lasts,
    leave,
    norm_fits,
    norm_parameters,
    parameters_of,
    plain_conv,
    plain_norm,
    run_again,
    spec_of,
    values_of,
)
from sparsekd.nn.blocked_choice import Trial, case_of, entered, fresh, fused_norm, measure
from sparsekd.nn.blocked_models import first_conv
from sparsekd.nn.fused import register_fused
from sparsekd.nn.prepared import Prepared, remember
from sparsekd.ops.cpu import blocked as ops
from sparsekd.ops.cpu import preactivation


def run_preactivation(
    owner: nn.Module,
    x: Tensor | Blocked,
    front: nn.BatchNorm2d | None,
    units: Sequence[ConvNorm],
    last: nn.Module,
    shortcut: nn.Module | None = None,
    then: nn.Module | None = None,
) -> Blocked | None:
    """Run a block that normalises in front of its convolutions, in the blocked layout.

    Args:
        owner: whose plan it is.
        x: images `[N, C, H, W]`.
        front: the norm of the input, with a ReLU behind it; None for a convolution alone.
        units: convolutions with norms behind them.
        last: the convolution whose result, with the residual, is the block's.
        shortcut: the convolution that makes the residual of the normalised input; where it is None
            and there is a front, the residual is the input.
        then: the convolution that reads its result, if that is known.

    Returns:
        What the modules would return, to rounding; running statistics are updated as they would
        be. None where the layout does not serve: the modules have to be called then.
    """
    tensor, shape = (x.tensor, x.shape) if isinstance(x, Blocked) else (x, x.shape)
    if not input_fits(tensor, shape):
        return None
    norms = [unit.norm for unit in units] if front is None else [front, *(u.norm for u in units)]
    bare = [last] if shortcut is None else [last, shortcut]
    convs = [*(unit.conv for unit in units), *bare]
    if any(conv.bias is not None for conv in bare):
        return None
    case = case_of(owner, x, convs, then)
    if case.layout is False:
        return None
    if not all(conv_fits(conv, tensor.dtype) for conv in convs):
        return None
    if not all(norm_fits(norm, tensor.dtype) for norm in norms):
        return None
    moments = front is not None and (front.training or front.running_mean is None)
    n, c, h, w = shape
    identity = front is not None and shortcut is None
    specs = [*(spec_of(unit.conv, unit.relu) for unit in units), spec_of(last, False)]
    projection = None if shortcut is None else spec_of(shortcut, False)
    kind = partial(preactivation.PreActivationPlan, front is not None)
    plan = ops.plan(kind, owner, specs, projection, identity, (n, c, h, w))
    if plan is None:
        return None
    values = values_of(last)
    ahead = None if front is None else norm_parameters(front, values, None)
    found = [parameters_of(unit) for unit in units]
    training = owner.training
    block = preactivation.Block(
        plan, ahead, found, values, None if shortcut is None else values_of(shortcut),
        partial(_plain, specs, projection, ahead, found),
    )  # fmt: skip

    trial = partial(_trial, block, specs, projection, moments)
    if case.layout is None and not measure(case, x, trial):
        return None

    def run(inside: Blocked) -> Blocked | None:
        return preactivation.run(block, inside, moments=training)

    again = all(lasts(conv, None) for conv in convs) and all(lasts(None, norm) for norm in norms)
    if front is not None and again:
        remember(owner, shape, tensor.dtype, Prepared(run, plan, moments))
    return run(entered(x, moments))


def _trial(
    block: preactivation.Block,
    specs: Sequence[ops.Spec],
    projection: ops.Spec | None,
    moments: bool,
) -> Trial:
    """Return a block for a measurement."""
    values = block.last.detach().clone().requires_grad_()
    shortcut = block.shortcut
    own = replace(
        block,
        front=None if block.front is None else fresh(block.front),
        units=[fresh(unit) for unit in block.units],
        last=values,
        shortcut=None if shortcut is None else shortcut.detach().clone().requires_grad_(),
    )

    def ordinary(x: Tensor) -> Tensor:
        residual = None if own.front is None else x
        if own.front is not None:
            x = fused_norm(own.front, x, relu=True)
        if projection is not None:
            residual = plain_conv(projection, x, own.shortcut, None)
        for spec, unit in zip(specs, own.units, strict=False):
            x = fused_norm(unit, plain_conv(spec, x, unit.values, unit.bias), relu=spec[-1])
        x = plain_conv(specs[-1], x, own.last, None)
        return x if residual is None else x + residual

    every = [*specs, projection] if projection is not None else specs
    return Trial(
        every, block.plan, own.parameters,
        lambda inside: preactivation.run(own, inside, moments=True), ordinary, moments,
    )  # fmt: skip


def _plain(
    specs: Sequence[ops.Spec],
    projection: ops.Spec | None,
    front: ops.ConvNorm | None,
    norms: Sequence[ops.ConvNorm],
    x: Tensor,
    parameters: Sequence[Tensor | None],
) -> Tensor:
    """Compute a block by ordinary ops."""
    rest = list(parameters)
    residual = None if front is None else x
    if front is not None:
        x = F.relu(plain_norm(front, x, rest.pop(0), rest.pop(0)))
    shortcut, last = rest.pop(), rest.pop()
    if projection is not None:
        residual = plain_conv(projection, x, shortcut, None)
    for i, norm in enumerate(norms):
        conv_values, bias, gamma, beta = rest[4 * i : 4 * i + 4]
        x = plain_norm(norm, plain_conv(specs[i], x, conv_values, bias), gamma, beta)
        x = F.relu(x) if specs[i][-1] else x
    x = plain_conv(specs[-1], x, last, None)
    return x if residual is None else x + residual


@register_fused(PreActivationBlock)
class BlockedPreActivationBlock(PreActivationBlock):
    """BatchNorm, ReLU and a 3x3 convolution, twice, in the blocked layout."""

    def forward_blocked(self, x: Tensor | Blocked) -> Tensor | Blocked:
        """Apply the block to ordinary or blocked images."""
        compiling = torch.compiler.is_compiling()
        result = None if compiling else run_again(self, x)
        if result is not None:
            return result
        if not compiling and getattr(self.bn1, "act", False):
            unit = ConvNorm(self.conv1, self.bn2, getattr(self.bn2, "act", False))
            result = run_preactivation(self, x, self.bn1, [unit], self.conv2, self.shortcut)
        return super().forward(leave(x)) if result is None else result

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to `x`."""
        return leave(self.forward_blocked(x))


@register_fused(WideResNet)
class BlockedWideResNet(WideResNet):
    """Wide residual network in the blocked layout from the first convolution to the last norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the images `x`."""
        if torch.compiler.is_compiling():
            return super().forward(x)
        ahead = first_conv(self.layer1)
        stem = run_preactivation(self, x, None, [], self.conv1, then=ahead)
        maps = self.conv1(x) if stem is None else stem
        for layer in (self.layer1, self.layer2, self.layer3):
            maps = call_blocked(layer, maps)
        return self.fc(torch.flatten(self.avgpool(self.bn(leave(maps))), 1))
