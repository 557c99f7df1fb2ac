"""How large the blocks of a kernel are and how many warps run one, in one table."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Hold the positions of a block, its warps, and the stages of its software pipeline."""

    positions: int
    num_warps: int
    num_stages: int


# By kind, kind of arithmetic and channels of a block. Halves and TF32 feed tensor cores and want
# large blocks behind a deep pipeline; float32 in full precision is bound by its multiply-adds.
_TABLE = {
    ("product", "half"): {16: (128, 4, 5), 32: (128, 4, 4), 64: (128, 4, 4), 128: (128, 8, 4)},
    ("product", "tf32"): {16: (128, 4, 5), 32: (128, 4, 4), 64: (128, 4, 4), 128: (128, 8, 4)},
    ("product", "ieee"): {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 2), 128: (64, 8, 2)},
    ("sample", "half"): {16: (64, 1, 3), 32: (64, 2, 3), 64: (64, 4, 3), 128: (64, 8, 3)},
    ("sample", "tf32"): {16: (32, 1, 3), 32: (32, 2, 3), 64: (32, 2, 3), 128: (32, 4, 3)},
    ("sample", "ieee"): {16: (32, 2, 2), 32: (32, 4, 2), 64: (32, 8, 2), 128: (32, 8, 1)},
}
SINGLE = 32  # positions of a block where every element has an address of its own
SMALLEST = 16  # side of the smallest matrix product on tensor cores


def choose(
    kind: str, channels: int, dtype: str, precision: str, positions: int, *, vectors: bool = True
) -> Config:
    """Return the sizes for one call.

    Args:
        kind: "product" or "sample".
        channels: of a block, a power of two from 16 to 128.
        dtype: "fp32", "fp16" or "bf16".
        precision: of products in float32, "ieee" or "tf32".
        positions: how many there are in all; a block has no more than it needs.
        vectors: maps are read in vectors; single elements each take registers for an address.
    """
    arithmetic = precision if dtype == "fp32" else "half"
    config = Config(*_TABLE[kind, arithmetic][channels])
    most = config.positions if vectors else min(config.positions, SINGLE)
    return config._replace(positions=min(most, power_of_two(positions)))


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`, and at least SMALLEST."""
    return max(SMALLEST, 1 << (number - 1).bit_length()) if number > 0 else SMALLEST
