"""ResNets of timm, and its norm that has an activation in it, with each norm as one op."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import norm_act as timm_norm_act
from timm.models import resnet
from torch import Tensor, nn

from sparsekd._torch import is_bare
from sparsekd.nn.blocked import ConvNorm, call_blocked, conv_norm_act_blocked, leave
from sparsekd.nn.blocked_models import Extras, NumberedResidual, Residual, first_conv
from sparsekd.nn.fused import register_fused
from sparsekd.nn.norm_act import fits, fused, is_relu_or_none


@register_fused(timm_norm_act.BatchNormAct2d)
class FusedTimmBatchNormAct2d(timm_norm_act.BatchNormAct2d):
    """BatchNorm2d and an activation; another one than ReLU runs by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` and apply the activation."""
        if not (_is_identity(self.drop) and fits(self, x, None)):
            return super().forward(x)
        if _is_identity(self.act):
            return fused(self, x, None, relu=False)
        if is_relu_or_none(self.act):
            return fused(self, x, None, relu=True)
        return self.act(fused(self, x, None, relu=False))


class _Residual(NumberedResidual):
    """A residual block of timm, with what may lie between its convolutions."""

    drop_block: Any
    aa: Any
    se: Any
    drop_path: Any

    def activation(self, number: int) -> nn.Module:
        """Return the activation behind a norm."""
        return getattr(self, f"act{number}")

    def extras(self) -> Extras:
        """Return what blurs in front of the last convolution, and what weighs or drops it."""
        blurs = () if _is_identity(self.aa) else (self.aa,)
        return Extras(blurs, tuple(m for m in (self.se, self.drop_path) if m is not None))

    def units(self) -> list[ConvNorm]:
        """Return the convolutions of the main branch; none if they cannot run as one."""
        return super().units() if _is_identity(self.drop_block) else []

    def ordinary(self, x: Tensor) -> Tensor:
        """Apply the block to `x` outside of the layout."""
        if _is_identity(self.drop_block):
            return super().ordinary(x)
        return Residual.ordinary(self, x)  # it comes between a norm and its activation


@register_fused(resnet.BasicBlock)
class FusedTimmBasicBlock(_Residual, resnet.BasicBlock):
    """Residual block of two 3x3 convolutions."""

    convolutions = 2


@register_fused(resnet.Bottleneck)
class FusedTimmBottleneck(_Residual, resnet.Bottleneck):
    """Residual block of a 1x1, a 3x3 and a 1x1 convolution."""

    convolutions = 3


@register_fused(resnet.ResNet)
class FusedTimmResNet(resnet.ResNet):
    """Residual network in the blocked layout from the stem to the features."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features of the images `x`."""
        if self.grad_checkpointing or torch.compiler.is_compiling():
            return super().forward_features(x)
        whole: Any = self
        ahead = first_conv(self.layer1)
        maps = conv_norm_act_blocked(whole.conv1, whole.bn1, x, whole.act1, ahead)
        for name in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
            maps = call_blocked(getattr(self, name), maps)
        return leave(maps)


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity and is_bare(module)
