"""Blocks of torchvision with fused norms, each with the forward pass of the class it extends."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import densenet, inception, regnet, resnet
from torchvision.models.googlenet import BasicConv2d as GoogLeNetConv2d
from torchvision.ops.misc import Conv2dNormActivation

from sparsekd.nn.blocked import call_blocked, conv_norm_act_blocked, leave
from sparsekd.nn.blocked_models import NumberedResidual, first_conv
from sparsekd.nn.fused import FusedSequential, register_fused
from sparsekd.nn.norm_act import conv_norm_act, norm_act


class _Residual(NumberedResidual):
    """A residual block of torchvision, which uses one ReLU several times."""

    relu: nn.Module

    def activation(self, number: int) -> nn.Module:
        """Return the ReLU."""
        return self.relu


@register_fused(resnet.BasicBlock)
class FusedBasicBlock(_Residual, resnet.BasicBlock):
    """Residual block of two 3x3 convolutions."""

    convolutions = 2


@register_fused(resnet.Bottleneck)
class FusedBottleneck(_Residual, resnet.Bottleneck):
    """Residual block of a 1x1, a 3x3 and a 1x1 convolution."""

    convolutions = 3


@register_fused(resnet.ResNet)
class FusedResNet(resnet.ResNet):
    """Residual network, whose own norm is that of the stem."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        ahead = first_conv(self.layer1)
        maps = conv_norm_act_blocked(self.conv1, self.bn1, x, self.relu, ahead)
        stages = self.layer1, self.layer2, self.layer3, self.layer4
        for part in (self.maxpool, *stages, self.avgpool):
            maps = call_blocked(part, maps)
        return self.fc(torch.flatten(leave(maps), 1))


@register_fused(Conv2dNormActivation)
class FusedConv2dNormActivation(FusedSequential, Conv2dNormActivation):
    """Convolution, norm and activation of MobileNet, EfficientNet and RegNet."""


@register_fused(regnet.SimpleStemIN)
class FusedSimpleStemIN(FusedSequential, regnet.SimpleStemIN):
    """Stem of a RegNet."""


@register_fused(densenet._Transition)
class FusedTransition(FusedSequential, densenet._Transition):
    """What lies between two stages of a DenseNet."""


@register_fused(densenet._DenseLayer)
class FusedDenseLayer(densenet._DenseLayer):
    """Layer of a DenseNet, which reads the outputs of all before it."""

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        """Return the input of the 3x3 convolution's norm."""
        return self.conv1(norm_act(self.norm1, torch.cat(inputs, 1), self.relu1))

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        """Return the new features."""
        features = [input] if isinstance(input, Tensor) else input
        if self.memory_efficient and self.any_requires_grad(features):
            bottleneck = self.call_checkpoint_bottleneck(features)
        else:
            bottleneck = self.bn_function(features)
        new = self.conv2(norm_act(self.norm2, bottleneck, self.relu2))
        return F.dropout(new, self.drop_rate, self.training) if self.drop_rate > 0 else new


@register_fused(GoogLeNetConv2d)
class FusedGoogLeNetConv2d(GoogLeNetConv2d):
    """Convolution, norm and ReLU of GoogLeNet."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three to `x`."""
        return conv_norm_act(self.conv, self.bn, x, F.relu)


@register_fused(inception.BasicConv2d)
class FusedInceptionConv2d(inception.BasicConv2d):
    """Convolution, norm and ReLU of Inception v3."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three to `x`."""
        return conv_norm_act(self.conv, self.bn, x, F.relu)
