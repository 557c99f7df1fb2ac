"""Experts of transformers, whose weights are stacked in one parameter, as lists of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsekd.sparsity.packed import Part, Place, SplitModule


class SplitExperts(SplitModule):
    """A mixture's experts with a list of layers for each stacked weight, one layer an expert.

    `sparsify` puts it in the place of the experts of transformers (Mixtral, GPT-OSS, Qwen and
    others): classes under its `use_experts_implementation`, which have parameters `gate_up_proj`
    (or `up_proj`) and `down_proj` of three dimensions, [experts, out, in] or [experts, in, out].
    The lists have these names.

    In training every expert runs, also without a token, so that every layer has a gradient.

    Source: Shazeer et al., Outrageously Large Neural Networks (2017), section 2.
    """

    gate_up_proj: nn.ModuleList
    up_proj: nn.ModuleList
    down_proj: nn.ModuleList
    act_fn: Any
    _kind: Any  # the packed class, which knows the gate

    @classmethod
    def split(cls, dense: Any) -> SplitExperts | None:
        """Split the experts of a mixture; None for a module of any other class.

        Args:
            dense: it is left as it is.
        """
        marks = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
        if not all(hasattr(dense, name) for name in marks):
            return None
        names = ("gate_up_proj" if dense.has_gate else "up_proj", "down_proj")
        weights = [getattr(dense, name, None) for name in names]
        if not all(isinstance(w, nn.Parameter) and w.ndim == 3 for w in weights):
            return None
        others = ("has_post_expert_norm", "_is_expert_parallel")
        if any(getattr(dense, name, False) for name in others) or cls._odd(dense, names):
            return None
        parts = [
            Part(
                f"{name}.{expert}",
                Place(name, expert, dense.is_transposed),
                Place(f"{name}_bias", expert) if dense.has_bias else None,
            )
            for name in names
            for expert in range(getattr(dense, name).shape[0])
        ]
        new = cls.of(dense, parts)
        new._kind = type(dense)
        return new

    @staticmethod
    def _odd(dense: Any, names: tuple[str, ...]) -> bool:
        """Return whether there are other parameters than the weights and their biases."""
        known = {*names, *(f"{name}_bias" for name in names if dense.has_bias)}
        return {name for name, _ in dense.named_parameters()} != known

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return for each token the weighted sum of what its experts make of it.

        Args:
            x: the tokens.
            chosen: int64 numbers of the experts of each token; other numbers are no expert's.
            weights: of these experts.

        Shape:
            - x: [tokens, in]
            - chosen, weights: [tokens, k]
            - result: [tokens, in]
        """
        first = self.gate_up_proj if self.has_gate else self.up_proj
        result = torch.zeros_like(x)
        every = torch.is_grad_enabled() or torch.compiler.is_compiling()
        for expert, (up, down) in enumerate(zip(first, self.down_proj, strict=True)):
            token, place = torch.where(chosen == expert)
            if not every and not token.numel():
                continue
            y = up(x[token])
            y = self._kind._apply_gate(self, y) if self.has_gate else self.act_fn(y)
            y = down(y) * weights[token, place, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result
