"""The networks of `sparsekd.models` in the blocked layout of the CPU kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsekd._torch import is_bare
from sparsekd.models.norm_act import BatchNormAct2d
from sparsekd.models.resnet import BasicBlock, Bottleneck, ResNet
from sparsekd.nn.blocked import Blocked, ConvNorm, call_blocked, leave, run_block
from sparsekd.nn.fused import FusedSequential, register_fused


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
        result = None
        units = [] if torch.compiler.is_compiling() else self.units()
        if units:
            identity = self.downsample is None
            shortcut = projection(self.downsample)
            if identity or shortcut is not None:
                result = run_block(self, x, units, shortcut, identity=identity)
        return self.ordinary(leave(x)) if result is None else result

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to `x`."""
        return leave(self.forward_blocked(x))


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
            maps = self.maxpool(leave(maps))
        for name in self.stages:
            maps = call_blocked(getattr(self, name), maps)
        return self.fc(torch.flatten(self.avgpool(leave(maps)), 1))
