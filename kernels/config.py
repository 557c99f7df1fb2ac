"""How large the blocks of a kernel are and how many warps run one: a table, and what to try."""

from __future__ import annotations

import math
from typing import NamedTuple


class Config(NamedTuple):
    """Positions of a block, its warps, and the stages of its software pipeline."""

    positions: int
    num_warps: int
    num_stages: int


_Table = dict[tuple[str, str], dict[int, tuple[int, int, int]]]

# By kind, kind of arithmetic and channels of a block. Halves and TF32 feed tensor cores and want
# large blocks behind a pipeline, whose every stage costs a program instructions before its loop;
# float32 in full precision is bound by its multiply-adds.
_TABLE: _Table = {
    ("product", "half"): {16: (128, 4, 4), 32: (128, 4, 3), 64: (128, 4, 3), 128: (128, 8, 3)},
    ("product", "tf32"): {16: (128, 4, 4), 32: (128, 4, 3), 64: (128, 4, 3), 128: (128, 8, 3)},
    ("product", "ieee"): {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (64, 8, 3)},
    ("sample", "half"): {16: (64, 1, 3), 32: (64, 2, 3), 64: (64, 4, 3), 128: (64, 8, 3)},
    ("sample", "tf32"): {16: (32, 1, 3), 32: (32, 2, 3), 64: (32, 2, 3), 128: (32, 4, 3)},
    ("sample", "ieee"): {16: (32, 2, 2), 32: (32, 4, 2), 64: (32, 8, 2), 128: (32, 8, 1)},
}
# What differs on a GPU, by how its architecture's name starts.
_DIFFERENT: dict[str, _Table] = {
    # Tensor memory gives a thread a row of results. These numbers of warps keep it off the stack,
    # with every Triton from 3.6 on.
    "sm_10": {
        ("product", "half"): {32: (128, 8, 3)},
        ("sample", "half"): {128: (64, 4, 3)},
    },
    # A compute unit has 64 KiB of shared memory: pipelines are as deep as lets two blocks share it.
    # Matrix cores multiply float32 in full precision too, so its sizes are those of TF32.
    "gfx": {
        ("product", "half"): {64: (128, 4, 2), 128: (128, 8, 2)},
        ("sample", "half"): {128: (64, 8, 2)},
        ("product", "tf32"): {32: (128, 4, 2), 64: (128, 4, 2), 128: (128, 8, 2)},
        ("product", "ieee"): {16: (128, 4, 4), 32: (128, 4, 2), 64: (128, 4, 2), 128: (128, 8, 2)},
        ("sample", "tf32"): {128: (32, 4, 2)},
        ("sample", "ieee"): {16: (32, 1, 3), 32: (32, 2, 3), 64: (32, 2, 3), 128: (32, 4, 2)},
    },
}
# Numbers on which no vector of a kernel depends. Of others Triton compiles variants: for 1, for
# multiples of 16, and for the rest, each of which takes seconds to tune.
PLAIN = (
    "count", "entries", "nnz", "parts", "images", "pixels", "images_each", "blocks_each",
    "image_parts", "high", "wide", "in_high", "in_wide", "stride_y", "stride_x", "in_row", "in_col",
    "out_origin", "out_row", "out_col", "row", "rows", "col", "cols", "width", "top", "bottom",
    "left", "right",
)  # fmt: skip
SINGLE = 32  # positions of a block where every element has an address of its own
_SHORT = 3  # chunks: too few to fill a pipeline, whose start then costs more than it hides
SMALLEST = 16  # side of the smallest matrix product on tensor cores
_GROUP, _ROWS = 4, 64  # warps and rows that one instruction of newer tensor cores takes
_MOST_POSITIONS, _MOST_WARPS = 256, 8


def choose(
    kind: str,
    channels: int,
    dtype: str,
    precision: str,
    positions: int,
    architecture: str,
    *,
    vectors: bool = True,
    chunks: float = math.inf,
) -> Config:
    """Return the sizes for one call.

    Args:
        kind: "product" or "sample".
        channels: of a block, a power of two from 16 to 128.
        dtype: "fp32", "fp16" or "bf16".
        precision: of products in float32, "ieee" or "tf32".
        positions: how many there are in all; a block has no more than it needs.
        architecture: of the GPU, "sm_90" or "gfx942" for example.
        vectors: maps are read in vectors; single elements each take registers for an address.
        chunks: that a product adds up in its loop, on average.
    """
    key = kind, precision if dtype == "fp32" else "half"
    own = (table for start, table in _DIFFERENT.items() if architecture.startswith(start))
    sizes = _TABLE[key] | next(own, {}).get(key, {})
    config = Config(*sizes[channels])
    most = config.positions if vectors else min(config.positions, SINGLE)
    stages = min(config.num_stages, 2) if chunks <= _SHORT else config.num_stages
    return config._replace(positions=min(most, power_of_two(positions)), num_stages=stages)


def most_registers(how: Config, channels: int, arithmetic: str, architecture: str) -> int | None:
    """Return how many registers a thread of a product may take, None where the compiler decides.

    Shared memory of an H100 has room for two of the largest blocks, 64 sums in each thread of eight
    warps. So have its registers if a thread takes no more than these and as many others.

    Args:
        how: the sizes.
        channels: of a block.
        arithmetic: "half", "tf32" or "ieee".
        architecture: of the GPU.
    """
    largest = how.num_warps == 8 and how.positions * channels == 64 * 8 * 32
    return 128 if architecture == "sm_90" and largest and arithmetic != "ieee" else None


def candidates(kind: str, base: Config, positions: int) -> tuple[Config, ...]:
    """Return sizes to measure against each other, `base` first; results are equal bit for bit.

    Warps and stages cut no sum, nor do the positions of a product, which are not summed over. But
    tensor cores that take groups of four warps, or 64 rows, at once may add up otherwise than those
    that do not, so a candidate takes them where `base` does and nowhere else.

    Args:
        kind: "product" or "sample".
        base: what `choose` returns.
        positions: how many there are in all.
    """
    blocks = [(base.positions, base.num_warps)]
    warps = [
        number
        for number in (base.num_warps // 2, 2 * base.num_warps)
        if 1 <= number <= _MOST_WARPS and (number < _GROUP) == (base.num_warps < _GROUP)
    ]
    if kind == "sample":
        blocks += [(base.positions, number) for number in warps]
    elif base.positions >= _ROWS:
        most = min(_MOST_POSITIONS, power_of_two(positions))
        blocks += [
            (size, number)
            for size in (base.positions // 2, base.positions, 2 * base.positions)
            for number in sorted({base.num_warps, *warps})
            # A warp has one or two blocks of the sixteen rows that tensor cores multiply.
            if _ROWS <= size <= most and SMALLEST <= size // number <= 2 * SMALLEST
        ]
    stages = base.num_stages, base.num_stages + (1 if base.num_stages <= 2 else -1)
    return tuple(dict.fromkeys(Config(*block, number) for block in blocks for number in stages))


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`, and at least SMALLEST."""
    return max(SMALLEST, 1 << (number - 1).bit_length()) if number > 0 else SMALLEST
