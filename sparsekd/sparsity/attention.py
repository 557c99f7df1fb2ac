"""nn.MultiheadAttention with its projections as linear layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from sparsekd.errors import ShapeError
from sparsekd.sparsity.packed import Part, Place, SplitModule
from sparsekd.tracing import call_module, stays_whole

_NAMES = ("q_proj", "k_proj", "v_proj")


class SplitAttention(SplitModule, nn.MultiheadAttention):
    """An nn.MultiheadAttention that calls `q_proj`, `k_proj`, `v_proj` and `out_proj` as layers.

    `sparsify` puts it in the place of one, with sparse layers. Arguments, shapes and results are
    those of nn.MultiheadAttention; `in_proj_weight` is made anew when it is read.

    Source: Vaswani et al., Attention Is All You Need (2017), section 3.2.

    Example:
        >>> attention = SplitAttention.split(nn.MultiheadAttention(8, 2))
        >>> x = torch.randn(5, 3, 8)
        >>> attention(x, x, x)[0].shape, attention.q_proj
        (torch.Size([5, 3, 8]), Linear(in_features=8, out_features=8, bias=True))
    """

    q_proj: Any  # an nn.Linear or a SparseLinear, as the others
    k_proj: Any
    v_proj: Any

    @classmethod
    def split(cls, dense: nn.Module) -> SplitAttention | None:
        """Split an nn.MultiheadAttention; None for a module of any other class.

        The layers are views of its parameters.

        Args:
            dense: it is left as it is.
        """
        if type(dense) is not nn.MultiheadAttention:
            return None
        size, own = dense.embed_dim, {name for name, _ in dense.named_parameters()}
        together = "in_proj_weight" in own
        parts = []
        for i, name in enumerate(_NAMES):
            rows = slice(i * size, (i + 1) * size)
            weight = Place("in_proj_weight", rows) if together else Place(f"{name}_weight")
            bias = Place("in_proj_bias", rows) if "in_proj_bias" in own else None
            parts.append(Part(name, weight, bias))
        bias = Place("out_proj.bias") if "out_proj.bias" in own else None
        parts.append(Part("out_proj", Place("out_proj.weight"), bias))
        known = {place.path for part in parts for _, place in part.places}
        if own - {"bias_k", "bias_v"} != known or [*dense.buffers()]:
            return None  # pruned, or its weights are computed in another way
        return cls.of(dense, parts)

    @property
    def in_proj_weight(self) -> Any:  # type: ignore[override]
        """The packed weight [3 embed_dim, embed_dim]; None where the inputs differ in size."""
        if not self.embed_dim == self.kdim == self.vdim:
            return None
        return torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])

    @property
    def in_proj_bias(self) -> Any:  # type: ignore[override]
        """The packed bias [3 embed_dim], or None."""
        bias = [self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]
        return None if bias[0] is None else torch.cat(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended values, and the weights if they are needed."""
        if isinstance(query, Proxy) and stays_whole(self, SplitAttention.forward, query):
            masks = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            return call_module(self, query, key, value, *masks)
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected one with is_causal=True, which only describes it")
        alone, last = query.ndim == 2, not self.batch_first

        def batched(x: Tensor) -> Tensor:
            return x[None] if alone else x.transpose(0, 1) if last else x

        q = self.q_proj(batched(query))
        k, v = self.k_proj(batched(key)), self.v_proj(batched(value))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], 1)
        q, k, v = (self._heads(t) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        added = k.shape[2] - key.shape[0 if alone or last else 1]
        # As torch does: the hint is followed where nothing else masks and no weights are asked for.
        causal = is_causal and key_padding_mask is None and not need_weights and not added
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, added)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout, training=dropout > 0)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        y = y[0] if alone else y.transpose(0, 1) if last else y
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if alone else weights
        return y, weights

    def _heads(self, x: Tensor) -> Tensor:
        """[N, L, embed_dim] -> [N, heads, L, head_dim]"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(
        self, between: Tensor | None, padding: Tensor | None, q: Tensor, added: int
    ) -> Tensor | None:
        """Return the sum of both masks, in numbers, for `added` more positions than they have."""
        batch, heads, length, _ = q.shape
        masks = []
        if between is not None:
            if between.ndim not in (2, 3) or between.shape[-2] != length:
                raise ShapeError(
                    f"attn_mask: expected [{length}, S] or [{batch * heads}, {length}, S], "
                    f"got {list(between.shape)}"
                )
            masks.append(between if between.ndim == 2 else between.unflatten(0, (batch, heads)))
        if padding is not None:
            masks.append(padding.reshape(batch, 1, 1, -1))
        numbers = [_numbers(mask, q.dtype) for mask in masks]
        total = sum(numbers[1:], numbers[0]) if numbers else None
        return total if total is None or not added else F.pad(total, (0, added))


def _numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


# torch.fx writes the annotations of what it traces into a graph, and cannot pickle strings there.
_forward: Any = SplitAttention.forward
_forward.__annotations__ = {}
