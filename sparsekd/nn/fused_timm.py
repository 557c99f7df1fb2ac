"""The norm of timm that has an activation in it, with a ReLU as one op."""

from __future__ import annotations

from timm.layers import norm_act as timm_norm_act
from torch import Tensor, nn

from sparsekd._torch import is_bare
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


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity and is_bare(module)
