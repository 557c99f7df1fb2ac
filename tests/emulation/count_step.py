"""Count what the GPU kernels do in a training step: launches, host calls, bytes, instructions.

    python tests/emulation/count_step.py                      # needs nvcc and Triton, no GPU
    python tests/emulation/count_step.py --model transformer --backend triton
    python tests/emulation/count_step.py --model resnet50 --batch 4       # half an hour

Every kernel runs as PTX for sm_80 on `tools/ptx_machine`, which counts; torch's own calls inside of
an op are counted by the sizes of their tensors. From the counts a roofline predicts how long the
ops take on GPUs that nobody here has: a prediction, not a measurement.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "emulation"), str(ROOT / "tools" / "ptx_machine")]

from ptx_machine import Counts  # noqa: E402

import sparsekd as skd  # noqa: E402
from benchmarks.gpu_roofline import GPUS, Gpu  # noqa: E402
from sparsekd.ops import reference  # noqa: E402
from sparsekd.terminal import Columns  # noqa: E402

OPS = ("conv2d", "conv2d_dgrad", "conv2d_wgrad", "linear", "linear_dgrad", "linear_wgrad")
LAUNCH, CALL = 2e-6, 5e-6  # seconds a kernel takes at the least, and a call from Python


@dataclass
class Op:
    """What one call of an op did.

    Args:
        name: of the op.
        least: bytes of its tensors, each once.
        launches: kernels of ours.
        calls: into native code: our library or launcher, and torch's functions.
        counts: of our kernels.
        torch_launches: kernels that torch's functions launch.
        torch_bytes: that they read and write.
    """

    name: str
    least: int
    launches: int = 0
    calls: int = 0
    counts: Counts = field(default_factory=Counts)
    torch_launches: int = 0
    torch_bytes: int = 0

    def __add__(self, other: Op) -> Op:
        return Op(
            self.name,
            *(
                getattr(self, name) + getattr(other, name)
                for name in list(self.__dataclass_fields__)[1:]
            ),
        )

    @property
    def memory(self) -> int:
        """Bytes that memory moves at the least, each sector once for every kernel."""
        return self.counts.read_once + self.counts.written_once + self.torch_bytes

    def kernels(self, gpu: Gpu) -> float:
        """Predict how many seconds the kernels take, one after the other."""
        c = self.counts
        return max(
            c.flops / gpu.fp32 + c.tensor_flops / gpu.tf32,
            (c.read + c.written + self.torch_bytes) / gpu.l2,
            self.memory / gpu.memory,
            LAUNCH * (self.launches + self.torch_launches),
        )

    @property
    def host(self) -> float:
        """Predict how many seconds the host needs to launch them."""
        return CALL * self.calls


class Inside(TorchDispatchMode):
    """Count torch's calls inside of an op."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.op.calls += 1
        if not (func.is_view or "empty" in func.name()):
            self.op.torch_launches += 1
            self.op.torch_bytes += _bytes(args) + _bytes(out)
        return out


def _bytes(values: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


@contextmanager
def counted(module: Any, launches: list[Any], calls: Callable[[], int]) -> Iterator[list[Op]]:
    """Yield a list to which every call of an op of a backend is added.

    Of calls that are alike in all shapes the first is counted, and the others as that; the oracle
    computes their results.

    Args:
        module: of the backend.
        launches: what it launches, in order.
        calls: how many calls into native code there were so far.
    """
    ops: list[Op] = []
    alike: dict[Any, Op] = {}
    inside: list[str] = []  # backends call ops of their own

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if inside:
                return function(*args)
            key = name, *(a.shape if isinstance(a, Tensor) else repr(a) for a in args)
            if key in alike:
                ops.append(alike[key])
                return getattr(reference, name)(*args)
            inside.append(name)
            try:
                function(*args)  # makes plans
                op, first, before = Op(name, _bytes(args)), len(launches), calls()
                with Inside(op):
                    out = function(*args)
            finally:
                inside.pop()
            op.least += _bytes(out)
            op.launches = len(launches) - first
            op.calls += calls() - before
            op.counts = sum((launch.counts for launch in launches[first:]), Counts())
            alike[key] = op
            ops.append(op)
            return out

        return run

    with ExitStack() as stack:
        for name in OPS:
            patched = wrapped(name, getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, patched))
        yield ops


@contextmanager
def on_cuda() -> Iterator[tuple[Any, list[Any], Callable[[], int]]]:
    """Run the backend "cuda" as PTX."""
    from cuda_emulation import OnPtx, bound, module_of, on_the_cpu

    library = OnPtx.of_kernels()
    module, calls = module_of(library), [0]

    def counting(call: Callable[..., int]) -> Callable[..., int]:
        def run(*args: Any) -> int:
            calls[0] += 1
            return call(*args)

        return run

    with (
        bound(module, library),
        on_the_cpu("cuda", module=module.__name__),
        mock.patch.object(library, "_call", counting(library._call)),
    ):
        yield module, library.launches, lambda: calls[0]


@contextmanager
def on_triton() -> Iterator[tuple[Any, list[Any], Callable[[], int]]]:
    """Run the backend "triton" as PTX."""
    from cuda_emulation import on_the_cpu
    from triton_backend import float32_products
    from triton_driver import PtxDriver, installed

    with installed(PtxDriver()) as driver, on_the_cpu("triton"), float32_products("tf32"):
        from sparsekd.ops.dispatch import backends

        module, _ = backends.load("triton")
        yield module, driver.launches, lambda: len(driver.launches)


BACKENDS = {"cuda": on_cuda, "triton": on_triton}


class Block(nn.Module):
    """A block of a ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())) + x).relu()


def resnet(channels: int, batch: int) -> tuple[nn.Module, Tensor]:
    """Return a block of 3x3 convolutions, one of 1x1, and images in channels_last."""
    model = nn.Sequential(Block(channels), nn.Conv2d(channels, channels, 1))
    x = torch.randn(batch, channels, 8, 8).to(memory_format=torch.channels_last)
    return model.to(memory_format=torch.channels_last), x  # type: ignore[call-overload]


def transformer(channels: int, batch: int, tokens: int = 16) -> tuple[nn.Module, Tensor]:
    """Return the linear layers of a transformer's block, and tokens."""
    layers = [nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)]
    layers += [nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)]
    return nn.Sequential(*layers), torch.randn(batch, tokens, channels)


def resnet50(channels: int, batch: int) -> tuple[nn.Module, Tensor]:
    """Return ResNet-50 and images, whose convolutions take half an hour."""
    x = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    model = skd.models.resnet50(stem="imagenet")
    return model.to(memory_format=torch.channels_last), x  # type: ignore[call-overload]


def vit_b(channels: int, batch: int) -> tuple[nn.Module, Tensor]:
    """Return the linear layers of a block of ViT-B, and the tokens of images of 224 x 224."""
    return transformer(768, batch, tokens=197)


MODELS = {"resnet": resnet, "transformer": transformer, "resnet50": resnet50, "vit_b": vit_b}
SMALL = ("resnet", "transformer")


def count(model: str, backend: str, sparsity: float, channels: int, batch: int) -> list[Op]:
    """Return what the ops of a training step of a model did."""
    torch.manual_seed(0)
    network, x = MODELS[model](channels, batch)
    layout = "bcsr:32" if backend == "triton" else "csr"
    skd.sparsify(network, sparsity=sparsity, distribution="uniform", layout=layout, init="sparse")
    x.requires_grad_()
    with BACKENDS[backend]() as gpu, counted(*gpu) as ops:
        network(x).square().sum().backward()
    return ops


def table(ops: list[Op]) -> Columns:
    """Return a line for each kind of op: averages of its calls."""
    lines = []
    for kind in dict.fromkeys(op.name for op in ops):
        chosen = [op for op in ops if op.name == kind]
        total, n = sum(chosen[1:], chosen[0]), len(chosen)
        c = total.counts
        lines.append(
            (
                *(kind, str(n), f"{total.launches / n:.1f}", f"{total.torch_launches / n:.1f}"),
                *(f"{total.calls / n:.1f}", f"{(c.read + c.written) / n / 2**20:.1f}"),
                *(f"{total.memory / n / 2**20:.2f}", f"{total.memory / total.least:.2f}"),
                f"{c.coalesced:.2f}",
                f"{sum(c.instructions.values()) / n / 1e3:,.0f}",
                *(f"{_share(c, 'float'):.0%}", f"{_share(c, 'tensor'):.1%}"),
                f"{1e6 * total.host / n:.0f}",
                *(f"{1e6 * sum(op.kernels(gpu) for op in chosen) / n:.0f}" for gpu in GPUS),
            )
        )
    heads = (
        *("op", "calls", "launches", "torch's", "host calls", "L2 MB", "memory MB", "of least"),
        *("coalesced", "1000 warp instructions", "float", "tensor", "host, us"),
        *(f"{gpu.name}, us" for gpu in GPUS),
    )
    return Columns(heads, lines, left=1)


def _share(counts: Counts, kind: str) -> float:
    return counts.instructions[kind] / max(1, sum(counts.instructions.values()))


def main() -> None:
    """Count what the options name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    console = Console()
    for model in options.model or SMALL:
        for backend in options.backend or BACKENDS:
            ops = count(model, backend, options.sparsity, options.channels, options.batch)
            console.print(
                f"\n{model}, backend {backend}, {options.sparsity:.0%} sparse, {options.channels} "
                f"channels, batch {options.batch}: averages of a call"
            )
            console.print(table(ops))
            step = sum(ops[1:], ops[0])
            console.print(f"of least, all ops together: {step.memory / step.least:.2f}")
    console.print(
        "\nmemory: every sector once for every kernel; of least: over every tensor of the op once. "
        f"Predicted: the host at {CALL * 1e6:.0f} us a call; a GPU at the slowest of arithmetic, "
        f"L2, memory, and {LAUNCH * 1e6:.0f} us a launch."
    )


if __name__ == "__main__":
    main()
