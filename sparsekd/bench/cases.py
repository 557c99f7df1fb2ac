"""What is measured: layers and networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsekd import models
from sparsekd.diagnose.given import factory
from sparsekd.sparsity import generator_for
from sparsekd.train import CrossEntropy
from sparsekd.train.objective import Objective

BATCH = 128  # of the published figures; names mention only others
_IMAGE = (32, 32)  # likewise
NETWORKS = ("resnet18", "resnet50", "resnet20", "wrn22_2", "vgg16_bn")
# What speed-ups refer to: eager float32 torch, in the better layout of a case. Compiled and
# bfloat16 dense are competitors of their own, shown beside it.
REFERENCE = "dense_contiguous"
BASELINES = (REFERENCE, "dense_channels_last")


@dataclass(frozen=True)
class LayerCase:
    """One layer at one input size; a linear layer is 1x1 on a 1x1 map.

    Args:
        kind: "conv" or "linear".
        channels: input channels or features.
        outs: output channels or features.
        size: height and width of the input.
        kernel: height and width of the kernel; padding is half of it.
        stride: of the kernel.
        batch: images or rows.

    Example:
        >>> case = LayerCase("conv", 64, 128, size=32, kernel=3, stride=2)
        >>> case.name, case.output_shape
        ('64>128 32x32 3x3 s2', (128, 128, 16, 16))
    """

    kind: str
    channels: int
    outs: int
    size: int = 1
    kernel: int = 1
    stride: int = 1
    batch: int = BATCH

    @property
    def name(self) -> str:
        """What rows and figures call the layer."""
        if self.kind == "linear":
            return f"linear {self.batch}x{self.channels}x{self.outs}"
        stride = f" s{self.stride}" if self.stride > 1 else ""
        maps = f"{self.size}x{self.size} {self.kernel}x{self.kernel}"
        return f"{self.channels}>{self.outs} {maps}{stride}{_batch(self.batch)}"

    @property
    def padding(self) -> int:
        """Zeros on every side of the map."""
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the input tensor."""
        shape = (self.batch, self.channels, self.size, self.size)
        return shape if self.kind == "conv" else shape[:2]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output tensor."""
        shape = (self.batch, self.outs, self.out_size, self.out_size)
        return shape if self.kind == "conv" else shape[:2]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        shape = (self.outs, self.channels, self.kernel, self.kernel)
        return shape if self.kind == "conv" else shape[:2]

    @property
    def positions(self) -> int:
        """Outputs per output channel."""
        return self.batch * self.out_size**2

    @property
    def fan_in(self) -> int:
        """Weights of one output channel."""
        return math.prod(self.weight_shape[1:])

    def flops(self, nnz: int) -> int:
        """Count the operations of one pass with `nnz` weights."""
        return 2 * nnz * self.positions


@dataclass(frozen=True)
class ModelCase:
    """One network whose training step is timed.

    Args:
        name: of the network in `sparsekd.models`, or "package.module:factory", a function without
            arguments that returns a classifier of images.
        input_shape: channels, height, width.
        batch: images a step.

    Example:
        >>> ModelCase("sparsekd.models:lenet5", (1, 28, 28)).build().fc3.out_features
        10
    """

    name: str
    input_shape: tuple[int, int, int] = (3, 32, 32)
    batch: int = BATCH

    @property
    def title(self) -> str:
        """What rows and figures call the network."""
        size = self.input_shape[1:]
        images = "" if size == _IMAGE else f" {size[0]}x{size[1]}"
        return f"{self.name}{images}{_batch(self.batch)}"

    def build(self, seed: int = 0) -> nn.Module:
        """Build the dense network from a seed of its own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if ":" in self.name:
                return factory(self.name)()
            return models.build(self.name, num_classes=10, in_channels=self.input_shape[0])

    def example(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Draw images and labels, the same ones every time."""
        generator = generator_for(0, self.name)
        x = torch.randn(self.batch, *self.input_shape, generator=generator)
        with torch.no_grad():
            classes = model.eval()(x[:1]).shape[-1]
        return x, torch.randint(0, classes, (self.batch,), generator=generator)

    @property
    def objective(self) -> Objective:
        """The loss that a step minimises."""
        return CrossEntropy()

    def takes_batches(self, model: nn.Module) -> nn.Module:
        """Return the model as it is: it takes a batch of images."""
        return model


def _batch(batch: int) -> str:
    return "" if batch == BATCH else f" b{batch}"


class AnyCase(Protocol):
    """A network whose training step is timed, from this package or a user's own."""

    @property
    def name(self) -> str:
        """Name of the network."""

    @property
    def title(self) -> str:
        """What rows and figures call it."""

    @property
    def objective(self) -> Objective:
        """The loss that a step minimises."""

    def build(self) -> nn.Module:
        """Build the dense network."""

    def example(self, model: nn.Module) -> tuple[Any, Tensor]:
        """Return a batch, which `contiguous` lays out, and its labels."""

    def takes_batches(self, model: nn.Module) -> nn.Module:
        """Return a module that is called with such a batch."""


def dense_ends(model: nn.Module) -> tuple[str, ...]:
    """Find the first convolution and the last linear layer, which stay dense in every comparison.

    Example:
        >>> dense_ends(models.resnet20())
        ('conv1', 'fc')
    """
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return (*convs[:1], *linears[-1:])
