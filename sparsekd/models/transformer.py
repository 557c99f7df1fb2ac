"""Transformers for images and for characters, of linear layers by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekd.models._init import scaled


class Attention(nn.Module):
    """Self-attention over the sequence.

    Args:
        dim: size of a position's vector.
        heads: number of heads; the next smaller one that divides `dim` is taken.
        causal: whether a position sees only those before it.

    Shape:
        ``[N, L, dim]`` to the same.

    Source: Vaswani et al., Attention Is All You Need (2017), section 3.2.
    """

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads = next(number for number in range(heads, 0, -1) if dim % number == 0)
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each position gathers from the others."""
        batch, length, dim = x.shape
        parts = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """A pre-norm block: attention and a perceptron, each added to its input.

    Args:
        dim, heads, causal: of the attention.
    """

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input plus both parts."""
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """A ViT: patches as positions, and a class position that the logits are read from.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        input_size: height and width of the input.
        patch_size: height and width of a patch.
        dim: size of a position's vector.
        depth: number of blocks.
        heads: of each block's attention.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), section 3.1.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        input_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (input_size // patch_size) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class CharGPT(nn.Module):
    """A GPT-2 that reads characters, and predicts the one that follows the last.

    Args:
        num_classes: number of characters.
        context: number of characters that it reads at most; of longer inputs the last ones.
        dim: size of a position's vector.
        depth: number of blocks.
        heads: of each block's attention.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.3.
    """

    def __init__(self, num_classes: int, context: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.context = context
        self.wte, self.wpe = nn.Embedding(num_classes, dim), nn.Embedding(context, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes, bias=False)
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the next character; characters are numbers, in any dtype."""
        tokens = x.flatten(1)[:, -self.context :].long().clamp(0, self.wte.num_embeddings - 1)
        y = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(y)[:, -1]))


def _init(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                nn.init.zeros_(module.bias)
    for parameter in model.parameters(recurse=False):
        nn.init.trunc_normal_(parameter, std=0.02)


def vit_tiny(
    num_classes: int = 10,
    in_channels: int = 3,
    input_size: int = 28,
    *,
    patch_size: int | None = None,
    width: float = 1.0,
) -> VisionTransformer:
    """Build ViT-Ti: 12 blocks of width 192 with three heads.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        input_size: height and width of the input.
        patch_size: of the patches; by default a fourteenth of `input_size`, 16 at 224, at least 2.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, input_size, input_size]`` to ``[N, num_classes]``.

    Source: Touvron et al., Training data-efficient image transformers (2021), table 1.

    Example:
        >>> sum(p.numel() for p in vit_tiny(1000, input_size=224).parameters())
        5717416
    """
    patch = max(input_size // 14, 2) if patch_size is None else patch_size
    dim = scaled(192, width)
    return VisionTransformer(num_classes, in_channels, input_size, patch, dim, depth=12, heads=3)


def char_gpt(
    num_classes: int = 96, in_channels: int = 1, *, context: int = 32, width: float = 1.0
) -> CharGPT:
    """Build a small network of GPT-2's shape: six blocks of width 192 with three heads.

    Args:
        num_classes: number of characters.
        in_channels: not used; inputs are flattened.
        context: number of characters that it reads at most.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, ..., L]``, numbers of characters, to ``[N, num_classes]``.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.3.

    Example:
        >>> char_gpt()(torch.tensor([[5, 9, 2]])).shape
        torch.Size([1, 96])
    """
    return CharGPT(num_classes, context, scaled(192, width), depth=6, heads=3)
