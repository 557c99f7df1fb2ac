"""Networks whose inference is timed."""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekd import models
from sparsekd.bench.cases import dense_ends
from sparsekd.diagnose.given import factory
from sparsekd.nn import densify, sparsify
from sparsekd.sparsity import generator_for

SHAPES: dict[str, tuple[int, ...]] = {"resnet50": (3, 224, 224), "encoder": (128, 768)}
"""Inputs of one image, where they are not 32x32; the encoder takes tokens."""
_IMAGENET = 64  # from this height on, ResNets have the stem of ImageNet


class EncoderLayer(nn.Module):
    """A layer of BERT-base: 768 channels, 12 heads, 3072 hidden channels."""

    def __init__(self, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        ]
        met = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        x = self.first(x + self.out(met))
        return self.second(x + self.down(F.gelu(self.up(x))))


def encoder(layers: int = 12) -> nn.Module:
    """Return the layers of BERT-base, without its embeddings."""
    return nn.Sequential(*(EncoderLayer() for _ in range(layers)))


@dataclass(frozen=True)
class InferenceCase:
    """One network whose inference is timed.

    Args:
        name: in `sparsekd.models`, "encoder", or "package.module:factory".
        batch: images.
        threads: of every engine.
        input_shape: of an image; by default that of `SHAPES`.
        deepsparse: an interpreter that has DeepSparse.

    Example:
        >>> InferenceCase("resnet50", batch=8, threads=2).title
        'resnet50 224x224 b8, 2 threads'
    """

    name: str
    batch: int
    threads: int
    input_shape: tuple[int, ...] = ()
    deepsparse: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.input_shape or SHAPES.get(self.name, (3, 32, 32))

    @property
    def title(self) -> str:
        """What rows and figures call it."""
        size = "x".join(map(str, self.shape[-2:]))
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.name} {size} b{self.batch}, {threads}"

    def build(self) -> nn.Module:
        """Build the dense network, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.name == "encoder":
                return encoder()
            if ":" in self.name:
                return factory(self.name)()
            large = self.name.startswith("resnet") and self.shape[-1] >= _IMAGENET
            stem: dict[str, Any] = {"stem": "imagenet"} if large else {"num_classes": 10}
            return models.build(self.name, **stem)


@dataclass(frozen=True)
class InferenceProblem:
    """One network at one sparsity: what every engine is given.

    Args:
        case: the network.
        model: with sparse layers, in eval mode; engines change copies.
        x: a batch.
        folder: for files that engines read.
    """

    case: InferenceCase
    model: nn.Module
    x: Tensor
    folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    @classmethod
    def of(cls, case: InferenceCase, sparsity: float) -> InferenceProblem:
        """Build it; convolutional networks have dense ends."""
        model = case.build()
        convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
        ends = dense_ends(model) if convolutional else ()
        sparsify(model, sparsity=sparsity, distribution="uniform", skip=ends, init="sparse")
        x = torch.randn(case.batch, *case.shape, generator=generator_for(0, case.name))
        return cls(case, model.eval(), x)

    @cached_property
    def dense(self) -> nn.Module:
        """The same network with its zeros stored."""
        return densify(copy.deepcopy(self.model))

    @cached_property
    def onnx(self) -> str:
        """The network as a file of ONNX."""
        return self._exported("model.onnx", external_data=False, verbose=False)

    @cached_property
    def old_onnx(self) -> str:
        """The same for engines that know no later version."""
        return self._exported("old.onnx", dynamo=False, opset_version=14)

    @cached_property
    def images(self) -> Path:
        """The batch as a file of numpy's."""
        import numpy

        file = Path(self.folder.name) / "images.npy"
        numpy.save(file, self.x.numpy())
        return file

    def _exported(self, name: str, **options: Any) -> str:
        file = str(Path(self.folder.name) / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters' own future
            torch.onnx.export(self.dense, (self.x,), file, input_names=["x"], **options)
        return file
