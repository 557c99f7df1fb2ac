"""The ops of the namespace `sparsekd`.

The structure is two int32 tensors, so a compiled graph sees a rewire as new data, not as new code.
`padding` is `[top, bottom, left, right]` and always zeros; other modes pad before the op.
"""

from __future__ import annotations

_CONV = "int[4] weight_shape, int[2] stride, int[4] padding, int[2] dilation, int groups"
_STRUCTURE = "Tensor crow, Tensor col"

SCHEMAS = {
    "conv2d": f"(Tensor x, Tensor values, {_STRUCTURE}, Tensor? bias, {_CONV}) -> Tensor",
    "conv2d_dgrad": (
        f"(Tensor grad, Tensor values, {_STRUCTURE}, SymInt[4] input_shape, {_CONV}) -> Tensor"
    ),
    "conv2d_wgrad": f"(Tensor grad, Tensor x, {_STRUCTURE}, {_CONV}) -> Tensor",
    "linear": (
        f"(Tensor x, Tensor values, {_STRUCTURE}, Tensor? bias, int[2] weight_shape) -> Tensor"
    ),
    "linear_dgrad": f"(Tensor grad, Tensor values, {_STRUCTURE}, int[2] weight_shape) -> Tensor",
    "linear_wgrad": f"(Tensor grad, Tensor x, {_STRUCTURE}, int[2] weight_shape) -> Tensor",
    "grow_topk": f"(Tensor score, {_STRUCTURE}, SymInt k) -> Tensor",
}

# BatchNorm with the residual and the ReLU behind it, see `sparsekd.ops.norm`. Unless `frozen`, mean
# and var are the moments of x, and the gradient of x goes through them.
_NORM = "Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, bool relu, bool frozen"

NORM_SCHEMAS = {
    "batch_moments": "(Tensor x) -> (Tensor, Tensor)",
    "norm_act": f"(Tensor x, Tensor? residual, {_NORM}) -> Tensor",
    "norm_act_backward": (
        f"(Tensor grad, Tensor x, Tensor? y, {_NORM}, bool param_grads) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
}
