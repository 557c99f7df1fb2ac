"""Launch the Triton kernels: sizes of blocks, grids, strides. Only tuning waits for a device."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sparsekd.kernels import config, gather, gemm, values
from sparsekd.ops.gpu.sizes import ceil_div, next_power_of_two
from sparsekd.ops.triton.gather_plans import GatherPlan, Window
from sparsekd.ops.triton.tile_plans import Lists
from sparsekd.ops.triton.tuning import Launch, Work, tuner

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Programs of a sample: one for each multiprocessor, and more while their sums are cheap; fixed, so
# that sums are cut alike anywhere.
_LEAST_PROGRAMS, _MOST_PROGRAMS = 128, 1024
_PARTIAL = 1 / 4  # of what operands take, that sums of parts may take to be written and read
_ROW_POSITIONS, _ROW_SAMPLE, _ROW_NONZEROS = 512, 128, 8


class Access(NamedTuple):
    """Where output (y, x) of a tile product or sample finds its input.

    `spatial` is False where positions are simply rows of features, `padded` where all inputs lie
    inside of their maps.
    """

    spatial: bool
    padded: bool
    stride: tuple[int, ...]


class Pixels(NamedTuple):
    """Maps whose channels lie side by side, as kernels see them.

    Args:
        data: where they begin.
        images, high, wide, channels: their sizes.
        strides: from image to image, row to row and pixel to pixel, in elements.
    """

    data: Tensor
    images: int
    high: int
    wide: int
    channels: int
    strides: tuple[int, int, int]

    @classmethod
    def of(cls, maps: Tensor) -> Pixels:
        """Return maps `[N, C, H, W]` in channels_last as they are."""
        images, channels, high, wide = maps.shape
        strides = high * wide * channels, wide * channels, channels
        return cls(maps, images, high, wide, channels, strides)

    def flat(self) -> Pixels:
        """Return all pixels as images of their own; they must lie one behind the other."""
        images = self.images * self.high * self.wide
        return self._replace(images=images, high=1, wide=1, strides=(self.channels,) * 3)

    def grid(self, first: Sequence[int], size: Sequence[int], steps: Sequence[int]) -> Pixels:
        """Return `size` rows and columns of pixels from `first` on, `steps` apart."""
        if tuple(size) == (self.high, self.wide):
            return self
        image, row, pixel = self.strides
        start = self.data.storage_offset() + first[0] * row + first[1] * pixel
        data = self.data.as_strided((1,), (1,), start)
        strides = image, row * steps[0], pixel * steps[1]
        return self._replace(data=data, high=size[0], wide=size[1], strides=strides)


def take_values(of: Tensor, slots: Tensor) -> Tensor:
    """Return values in the order of a kernel, zeros where a slot is -1."""
    packed = of.new_empty(slots.shape)
    if packed.numel():
        grid = (ceil_div(packed.numel(), values.BLOCK),)
        values.take_values[grid](of, slots, packed, packed.numel(), BLOCK=values.BLOCK)
    return packed


def _weight(of: Tensor, lists: Lists) -> Tensor:
    of = of.contiguous()
    return of if lists.slots is None else take_values(of, lists.slots)


def add_parts(partial: Tensor, places: Tensor | None, like: Tensor, nnz: int) -> Tensor:
    """Return the gradient of each value, summed over parts, in the dtype of a tensor."""
    result = like.new_empty(nnz)
    size = partial[0].numel()
    grid = (ceil_div(nnz, values.BLOCK),)
    values.add_parts[grid](
        partial, result if places is None else places, result, nnz, size, partial.shape[0],
        PLACED=places is not None, BLOCK=values.BLOCK,
    )  # fmt: skip
    return result


def tile_product(
    lists: Lists,
    of: Tensor,
    bias: Tensor | None,
    x: Pixels,
    y: Pixels,
    access: Access,
    precision: str,
) -> None:
    """Write a product over tiles.

    Args:
        lists: its chunks.
        of: the weight, its values.
        bias: one per output channel, or None.
        x: the input.
        y: maps for the result, or every so many pixels of them.
        access: how the two meet.
        precision: of products in float32, "ieee" or "tf32".
    """
    weight, positions = _weight(of, lists), y.images * y.high * y.wide
    count = lists.outputs.shape[0]
    image, row, pixel = y.strides
    whole = row == y.wide * pixel and image == y.high * row
    slots = lists.slots if lists.filled else lists.lists  # which nothing reads

    def launch(how: config.Config) -> None:
        gemm.tile_product[count * ceil_div(positions, how.positions),](
            lists.lists, lists.outputs, lists.columns, slots,
            weight, weight if bias is None else bias, x.data, y.data,
            count, positions, y.high, y.wide,
            *x.strides, x.high, x.wide, *access.stride, *y.strides,
            SPATIAL=access.spatial, PADDED=access.padded, WHOLE=whole, BIAS=bias is not None,
            EVEN_N=lists.even[0], EVEN_K=lists.even[1], ALIGN=lists.align,
            IN_PLACE=lists.in_place, FILLED=lists.filled, PRECISION=precision,
            BP=how.positions, BN=lists.n, BK=lists.k,
            **_sizes(how, lists, x.data, precision),
        )  # fmt: skip

    how = _choose("product", lists, x.data, x.channels, precision, positions)
    _launch_tuned("tile_product", lists, x.data, precision, positions, how, launch)


def tile_sample(lists: Lists, grad: Pixels, x: Pixels, access: Access, precision: str) -> Tensor:
    """Return the gradient of packed values in parts, float32 `[parts, E, n, k]`.

    Args:
        lists: the chunks.
        grad: of the output.
        x: the input.
        access: how the two meet.
        precision: of products in float32, "ieee" or "tf32".
    """
    images, outputs = grad.images, grad.high * grad.wide
    how = _choose("sample", lists, x.data, x.channels, precision, images * outputs)
    pixels = min(how.positions, next_power_of_two(outputs))
    most, chunks = _most_parts(lists.size, grad.data, x.data), lists.owners.shape[0]
    parts = _Parts.of(chunks, most, images, how.positions // pixels, outputs, pixels)
    shape = parts.number, chunks, lists.n, lists.k
    partial = x.data.new_empty(shape, dtype=torch.float32)

    def launch(how: config.Config) -> None:
        gemm.tile_sample[chunks, parts.number](
            lists.owners, lists.outputs, lists.columns, grad.data, x.data, partial,
            chunks, images, outputs, grad.wide, *parts.sizes,
            *grad.strides, *x.strides, x.high, x.wide, *access.stride,
            SPATIAL=access.spatial, EVEN_N=lists.even[0], EVEN_K=lists.even[1], ALIGN=lists.align,
            PRECISION=precision,
            PIXELS=pixels, IMAGES=how.positions // pixels, BN=lists.n, BK=lists.k,
            num_warps=how.num_warps, num_stages=how.num_stages,
        )  # fmt: skip

    _launch_tuned("tile_sample", lists, x.data, precision, images * outputs, how, launch)
    return partial


def shared_product(
    lists: Lists,
    window: Window,
    of: Tensor,
    bias: Tensor | None,
    x: Tensor,
    y: Tensor,
    precision: str,
) -> None:
    """Write a product whose columns are shared by lists of rows; maps are packed."""
    weight, lanes = _weight(of, lists), x.shape[-1]
    positions = window.height * window.width * lanes
    count = lists.outputs.shape[0]

    def launch(how: config.Config) -> None:
        gather.shared_product[count * ceil_div(positions, how.positions),](
            lists.lists, lists.outputs, lists.columns,
            weight, weight if bias is None else bias, x, y,
            count, positions, lanes, *window[1:], *x.shape[1:3], y[0].numel(),
            BIAS=bias is not None, PADDED=any(window.padding), PRECISION=precision,
            BP=how.positions, BN=lists.n, BK=lists.k,
            **_sizes(how, lists, x, precision),
        )  # fmt: skip

    how = _choose("product", lists, x, lanes, precision, positions)
    _launch_tuned("shared_product", lists, x, precision, positions, how, launch)


def shared_sample(
    lists: Lists, window: Window, starts: Tensor, grad: Tensor, x: Tensor, precision: str
) -> Tensor:
    """Return the gradient of packed values in parts, float32 `[parts, E, n, k]`."""
    lanes, outputs = x.shape[-1], starts.shape[0]
    how = _choose("sample", lists, x, lanes, precision, lanes * outputs)
    images = min(how.positions, next_power_of_two(lanes))
    chunks = lists.owners.shape[0]
    most = _most_parts(lists.size, grad, x)
    parts = _Parts.of(chunks, most, lanes, images, outputs, how.positions // images)
    partial = x.new_empty((parts.number, chunks, lists.n, lists.k), dtype=torch.float32)

    def launch(how: config.Config) -> None:
        gather.shared_sample[chunks, parts.number](
            lists.owners, lists.outputs, lists.columns, starts, grad, x, partial,
            chunks, outputs, lanes, *parts.sizes, *window.padding, *x.shape[1:3],
            PADDED=any(window.padding), PRECISION=precision,
            PIXELS=how.positions // images, IMAGES=images, VECTOR=math.gcd(lanes, images, 16),
            BN=lists.n, BK=lists.k, num_warps=how.num_warps, num_stages=how.num_stages,
        )  # fmt: skip

    _launch_tuned("shared_sample", lists, x, precision, lanes * outputs, how, launch)
    return partial


def row_product(plan: GatherPlan, of: Tensor, bias: Tensor | None, x: Tensor, y: Tensor) -> None:
    """Write a product row by row; maps are packed."""
    lanes, rows = x.shape[-1], plan.order.shape[0]
    positions = plan.window.height * plan.window.width * lanes
    block = min(_ROW_POSITIONS, config.power_of_two(positions))
    of = of.contiguous() if plan.slots is None else of.index_select(0, plan.slots)
    gather.row_product[rows * ceil_div(positions, block),](
        plan.crow, plan.offset, plan.order, of, of if bias is None else bias, x, y,
        positions, lanes, *plan.window[1:], *x.shape[1:3], y[0].numel(),
        BIAS=bias is not None, PADDED=any(plan.window.padding),
        BP=block, num_warps=_warps(block, x), num_stages=3,
    )  # fmt: skip


def row_sample(rows: Tensor, plan: GatherPlan, starts: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of each value in parts, float32 `[parts, nnz]`."""
    lanes, outputs, nnz = x.shape[-1], starts.shape[0], rows.shape[0]
    images = min(_ROW_SAMPLE, next_power_of_two(lanes))
    together = min(_ROW_SAMPLE // images, next_power_of_two(outputs))
    programs = ceil_div(nnz, _ROW_NONZEROS)
    parts = _Parts.of(programs, _most_parts(nnz, grad, x), lanes, images, outputs, together)
    partial = x.new_empty((parts.number, nnz), dtype=torch.float32)
    gather.row_sample[programs, parts.number](
        rows, plan.offset, starts, grad, x, partial, nnz, outputs, lanes, *parts.sizes,
        *plan.window.padding, *x.shape[1:3], PADDED=any(plan.window.padding),
        PIXELS=together, IMAGES=images, VECTOR=math.gcd(lanes, images, 16),
        BN=_ROW_NONZEROS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return partial


class _Parts(NamedTuple):
    """The positions of a sample cut into parts: blocks of pixels, and images, of each."""

    number: int
    sizes: tuple[int, int, int]  # images_each, blocks_each, image_parts

    @classmethod
    def of(
        cls, programs: int, most: int, images: int, step: int, pixels: int, together: int
    ) -> _Parts:
        """Return a cut into about as many parts as it takes to keep a GPU busy.

        Args:
            programs: of one part.
            most: how many parts are cheap to add up.
            images: how many there are.
            step: how many a program computes at once.
            pixels: of an image.
            together: how many a program computes at once.
        """
        programs = max(programs, 1)
        wanted = max(1, _LEAST_PROGRAMS // programs, min(_MOST_PROGRAMS // programs, most))
        steps, blocks = max(ceil_div(images, step), 1), ceil_div(pixels, together)
        images_each = ceil_div(steps, min(steps, wanted)) * step
        image_parts = max(ceil_div(images, images_each), 1)
        blocks_each = ceil_div(blocks, min(blocks, max(wanted // image_parts, 1)))
        number = image_parts * ceil_div(blocks, blocks_each)
        return cls(number, (images_each, blocks_each, image_parts))


def _most_parts(sums: int, *operands: Tensor) -> int:
    """Return how many parts are cheap to add up, of so many sums each."""
    return int(_PARTIAL * sum(t.nbytes for t in operands) / (2 * 4 * max(sums, 1)))


def _choose(
    kind: str, lists: Lists, x: Tensor, neighbours: int, precision: str, positions: int
) -> config.Config:
    """Return sizes for tiles, or for columns that lie anywhere: their lists have no ALIGN.

    `neighbours` is how many elements of the maps lie side by side.
    """
    single = lists.align > 0 and not (lists.even[1] and lists.align * x.element_size() >= 16)
    vectors = not single and neighbours % 16 == 0  # what Triton asks of strides
    dtype, target = _DTYPES[x.dtype], architecture(x.device)
    chunks = lists.columns.shape[0] / lists.outputs.shape[0] if kind == "product" else math.inf
    return config.choose(
        kind, lists.n, dtype, precision, positions, target, vectors=vectors, chunks=chunks
    )


def _arithmetic(x: Tensor, precision: str) -> str:
    """Return how products multiply: "half", or in float32 the precision."""
    return precision if x.dtype == torch.float32 else "half"


def _sizes(how: config.Config, lists: Lists, x: Tensor, precision: str) -> dict[str, int]:
    """Return what Triton is told of the threads of a product."""
    sizes = {"num_warps": how.num_warps, "num_stages": how.num_stages}
    kind = _arithmetic(x, precision)
    registers = config.most_registers(how, lists.n, kind, architecture(x.device))
    return sizes if registers is None else {**sizes, "maxnreg": registers}


def _launch_tuned(
    kernel: str,
    lists: Lists,
    x: Tensor,
    precision: str,
    positions: int,
    base: config.Config,
    launch: Launch,
) -> None:
    """Make a launch with the sizes that were measured for it, where any were."""
    work = Work(kernel, _arithmetic(x, precision), (lists.n, lists.k), positions, x.device)
    launch(tuner().sizes(work, base, launch))


@cache
def architecture(device: torch.device) -> str:
    """Return the architecture that kernels are compiled for, as "sm_90" or "gfx942", if any."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


def _warps(positions: int, x: Tensor) -> int:
    """Return how many warps it takes for each thread to load 16 bytes."""
    return max(1, positions * x.element_size() // (16 * 32))
