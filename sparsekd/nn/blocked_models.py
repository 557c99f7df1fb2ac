"""The networks of `sparsekd.models` in the blocked layout of the CPU kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekd._torch import is_bare
from sparsekd.models.norm_act import BatchNormAct2d
from sparsekd.models.resnet import BasicBlock, Bottleneck, ResNet
from sparsekd.nn.blocked import (
    Blocked,
    ConvNorm,
    call_blocked,
    leave,
    run_again,
    run_block,
)
from sparsekd.nn.fused import FusedSequential, register_fused
from sparsekd.nn.norm_act import conv_norm_act


class Residual(nn.Module):
    """A residual block; the class behind it in the order of bases is the plain one."""

    downsample: Any

    def units(self) -> list[ConvNorm]:
        """Return the convolutions of the main branch; none if they cannot run as one."""
        raise NotImplementedError

    def ordinary(self, x: Tensor) -> Tensor:
        """Apply the block to `x` outside of the layout."""
        return super().forward(x)

    def forward_blocked(self, x: Tensor | Blocked) -> Tensor | Blocked:
        """Apply the block to ordinary or blocked images."""
        compiling = torch.compiler.is_compiling()
        result = None if compiling else run_again(self, x)
        if result is not None:
            return result
        units = [] if compiling else self.units()
        if units:
            identity = self.downsample is None
            shortcut = projection(self.downsample)
            if identity or shortcut is not None:
                result = run_block(self, x, units, shortcut, identity=identity, parts=())
        return self.ordinary(leave(x)) if result is None else result

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to `x`."""
        return leave(self.forward_blocked(x))


class Extras(NamedTuple):
    """Modules of a residual block's main branch in front of its last convolution and behind it."""

    front: tuple[nn.Module, ...] = ()
    behind: tuple[nn.Module, ...] = ()


class NumberedResidual(Residual):
    """A residual block whose convolutions and norms have numbers, conv1 and bn1 to the last."""

    convolutions: int

    def activation(self, number: int) -> nn.Module:
        """Return the activation behind a norm, the last one behind the addition."""
        raise NotImplementedError

    def extras(self) -> Extras:
        """Return the modules besides convolutions, norms and activations."""
        return Extras()

    def _parts(self) -> list[ConvNorm]:
        numbers = range(1, self.convolutions + 1)
        return [ConvNorm(getattr(self, f"conv{i}"), getattr(self, f"bn{i}"), True) for i in numbers]

    def units(self) -> list[ConvNorm]:
        """Return the convolutions of the main branch; none if they cannot run as one."""
        acts = [self.activation(i) for i in range(1, self.convolutions + 1)]
        if any(self.extras()) or not all(type(act) is nn.ReLU and is_bare(act) for act in acts):
            return []
        parts = self._parts()
        return parts if all(type(part.norm) is nn.BatchNorm2d for part in parts) else []

    def ordinary(self, x: Tensor) -> Tensor:
        """Apply the block to `x` outside of the layout."""
        *first, last = self._parts()
        out, extras, act = x, self.extras(), self.activation(self.convolutions)
        for i, unit in enumerate(first, 1):
            out = conv_norm_act(unit.conv, unit.norm, out, self.activation(i))
        for module in extras.front:
            out = module(out)
        if extras.behind:
            out = conv_norm_act(last.conv, last.norm, out)
        for module in extras.behind:
            out = module(out)
        identity = x if self.downsample is None else self.downsample(x)
        if extras.behind:
            return act(out + identity)
        return conv_norm_act(last.conv, last.norm, out, act, identity)


@register_fused(BasicBlock)
class BlockedBasicBlock(Residual, BasicBlock):
    """Residual block of two 3x3 convolutions, in the blocked layout."""

    def units(self) -> list[ConvNorm]:
        """Return the convolutions of the main branch."""
        return [unit(self.conv1, self.bn1), unit(self.conv2, self.bn2)]


@register_fused(Bottleneck)
class BlockedBottleneck(Residual, Bottleneck):
    """Residual block of a 1x1, a 3x3 and a 1x1 convolution, in the blocked layout."""

    def units(self) -> list[ConvNorm]:
        """Return the convolutions of the main branch."""
        return [unit(self.conv1, self.bn1), unit(self.conv2, self.bn2), unit(self.conv3, self.bn3)]


def projection(module: nn.Module | None) -> ConvNorm | None:
    """Return the convolution and norm of a shortcut, None if it is anything else."""
    if isinstance(module, nn.Sequential) and len(module) == 2 and is_bare(module):
        conv, norm = module
        whole = type(module) in (nn.Sequential, FusedSequential)
        if whole and isinstance(norm, nn.BatchNorm2d) and not getattr(norm, "act", False):
            return ConvNorm(conv, norm, False)
    return None


def first_conv(stage: Any) -> nn.Module | None:
    """Return the first convolution of the blocks in a row, None if it is not there."""
    blocks = list(stage) if isinstance(stage, nn.Sequential) else []
    return getattr(blocks[0], "conv1", None) if blocks else None


def unit(conv: nn.Module, norm: BatchNormAct2d) -> ConvNorm:
    """Return a convolution and its norm, with the ReLU that the norm has."""
    return ConvNorm(conv, norm, getattr(norm, "act", False))


@register_fused(ResNet)
class BlockedResNet(ResNet):
    """Residual network in the blocked layout from the stem to the pooling."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the images `x`."""
        if torch.compiler.is_compiling():
            return super().forward(x)
        stem = run_block(self, x, [unit(self.conv1, self.bn1)], then=first_conv(self.layer1))
        maps = self.bn1(self.conv1(x)) if stem is None else stem
        if type(self.maxpool) is not nn.Identity or not is_bare(self.maxpool):
            maps = call_blocked(self.maxpool, maps)
        for name in self.stages:
            maps = call_blocked(getattr(self, name), maps)
        return self.fc(torch.flatten(leave(call_blocked(self.avgpool, maps)), 1))
