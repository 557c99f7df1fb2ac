"""Every kernel in the instances compiled ahead of time, to check what compilers make of it.

Tests and tables iterate over `instances`, so no kernel can exist unchecked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from . import config, gather, gemm, grow, pack, values

HALVES = ("fp16", "bf16")
FLOATS = ("fp32", *HALVES)
_INDICES = {"lists", "outputs", "chunks", "owners", "slots", "places", "offsets", "starts"} | {
    "crow", "offset", "order", "nonzero_row", "taken_row", "taken_col",
}  # fmt: skip
_POINTERS = {"weight", "bias", "x", "y", "grad", "values", "maps", "packed", "result", "scores"}

_OTHERS = {"partial": "*fp32", "keys": "*i64"}
_STRIDES = {f"{maps}_{axis}" for maps in "xygm" for axis in ("image", "row", "pixel")} | {
    "lanes", "out_plane", "positions", "m_channel", "slow", "fast",
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel.

    Args:
        name: unique, of letters, digits and underscores.
        fn: the Triton function.
        constexprs: what is known when it is compiled.
        num_warps: of a block.
        num_stages: of the software pipeline.
        dtypes: of the tensors it is compiled for, in Triton's names.
        uses_mma: it must multiply on tensor cores.
        registers: the most that a thread may take, None where the compiler decides.
    """

    name: str
    fn: Any
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    dtypes: tuple[str, ...] = FLOATS
    uses_mma: bool = False
    registers: int | None = None

    def signature(self, dtype: str) -> dict[str, str]:
        """Return the type of each argument, in order, for tensors of a dtype."""
        names = inspect.signature(self.fn.fn).parameters
        return {name: self._type(name, dtype) for name in names}

    def aligned(self) -> tuple[str, ...]:
        """Return the arguments that are multiples of 16, as they are for layers of usual sizes."""
        return tuple(
            name
            for name, kind in self.signature(self.dtypes[0]).items()
            if kind.startswith("*") or (name in _STRIDES and kind != "constexpr")
        )

    def _type(self, name: str, dtype: str) -> str:
        if name in self.constexprs:
            return "constexpr"
        if name in _INDICES:
            return "*i32"
        if name in _OTHERS:
            return _OTHERS[name]
        return f"*{dtype}" if name in _POINTERS else "i32"


# Kinds of arithmetic: label, dtypes, precision of products in float32, sides of the blocks.
_ARITHMETIC = (
    ("half", HALVES, "ieee", ((16, 16), (32, 32), (64, 64), (128, 64))),
    ("tf32", ("fp32",), "tf32", ((16, 16), (32, 32), (64, 32), (128, 32))),
    ("ieee", ("fp32",), "ieee", ((16, 16), (32, 32), (64, 32), (128, 32))),
)


def _products(
    kernels: dict[str, Any], prefix: str, architecture: str, **constexprs: Any
) -> Iterator[Kernel]:
    """Yield the instances of a product and a sample at all sizes and kinds of arithmetic.

    Of columns that lie anywhere the smallest and the largest blocks are enough.
    """
    for label, dtypes, precision, sizes in _ARITHMETIC:
        for n, k in sizes if prefix == "tile" else (sizes[0], sizes[-1]):
            block = {"PRECISION": precision, "BN": n, "BK": k if prefix == "tile" else 16}
            for kind, fn in kernels.items():
                how = config.choose(kind, n, dtypes[0], precision, 1 << 20, architecture)
                own: dict[str, Any]
                registers = None
                if kind == "product":
                    registers = config.most_registers(how, n, label, architecture)
                    own = {"BIAS": True, "BP": how.positions}
                    if prefix == "tile":
                        own |= {"WHOLE": True, "IN_PLACE": "", "FILLED": False}
                    own |= {"PADDED": True}
                elif prefix == "tile":
                    own = {"PIXELS": how.positions, "IMAGES": 1}
                else:
                    own = {"PIXELS": 1, "IMAGES": how.positions, "VECTOR": 16}
                    own |= {"PADDED": True}
                name, mma = f"{prefix}_{kind}_{label}_{n}", label != "ieee"
                known = {**constexprs, **block, **own}
                warps, stages = how.num_warps, how.num_stages
                yield Kernel(name, fn, known, warps, stages, dtypes, mma, registers)


def _tiles(architecture: str) -> Iterator[Kernel]:
    kernels = {"product": gemm.tile_product, "sample": gemm.tile_sample}
    even = {"SPATIAL": True, "EVEN_N": True, "EVEN_K": True, "ALIGN": 16}
    for kernel in _products(kernels, "tile", architecture, **even):
        known = kernel.constexprs
        yield kernel
        if kernel.name in ("tile_product_half_64", "tile_sample_half_64"):
            ragged = {**known, "EVEN_N": False, "EVEN_K": False, "ALIGN": 1}
            ragged["BP" if "BP" in ragged else "PIXELS"] = config.SINGLE
            yield replace(kernel, name=kernel.name + "_ragged", constexprs=ragged)
        if kernel.name == "tile_product_half_16":
            filled = {**known, "FILLED": True}
            yield replace(kernel, name=kernel.name + "_filled", constexprs=filled)
        if kernel.name == "tile_sample_half_64":
            linear = {**known, "SPATIAL": False}
            yield replace(kernel, name=kernel.name + "_linear", constexprs=linear)
        if kernel.name in ("tile_product_half_64", "tile_product_half_128", "tile_product_tf32_64"):
            for suffix, side in ("_linear", "k"), ("_linear_gradient", "n"):
                linear = {**known, "SPATIAL": False, "PADDED": False, "IN_PLACE": side}
                yield replace(kernel, name=kernel.name + suffix, constexprs=linear)


def _shared(architecture: str) -> Iterator[Kernel]:
    kernels = {"product": gather.shared_product, "sample": gather.shared_sample}
    for kernel in _products(kernels, "shared", architecture):
        yield kernel
        if kernel.dtypes == HALVES:
            wide = {**kernel.constexprs, "BK": 32}
            yield replace(kernel, name=kernel.name + "_wide", constexprs=wide)


def _moves() -> Iterator[Kernel]:
    """Yield packing and unpacking, of the blocks that large maps have."""
    for suffix, dtypes, side in ("", ("fp32",), 32), ("_half", HALVES, 64):
        block = {"BS": side, "BF": side}
        inner = {"CHANNELS_INNER": True, "m_channel": 1, **block}
        rows = {"CHANNELS_INNER": False, "m_pixel": 1, **block}
        for name, known in {
            "pack_channels": {"UNPACK": False, **inner},
            "pack_rows": {"UNPACK": False, **rows},
            "unpack_channels": {"UNPACK": True, **inner},
        }.items():
            yield Kernel(name + suffix, pack.move_maps, known, 4, 1, dtypes)


_ROW_PRODUCT = {"BIAS": True, "PADDED": True, "BP": 512}
_ROW_SAMPLE = {"PADDED": True, "PIXELS": 1, "IMAGES": 128, "VECTOR": 16, "BN": 8}

_EXCLUDE = {"TAKEN": grow.TAKEN, "BLOCK": grow.BLOCK}


@cache
def instances(architecture: str) -> dict[str, Kernel]:
    """Return every kernel with the sizes that it has on a GPU, by name.

    Args:
        architecture: of the GPU, "sm_90" or "gfx942" for example.
    """
    kernels = (
        *_tiles(architecture),
        *_shared(architecture),
        *_moves(),
        Kernel("row_product", gather.row_product, _ROW_PRODUCT, 4, 3, ("fp32",)),
        Kernel("row_product_half", gather.row_product, _ROW_PRODUCT, 2, 3, ("fp16", "bf16")),
        Kernel("row_sample", gather.row_sample, _ROW_SAMPLE, 4, 2),
        Kernel("take_values", values.take_values, {"BLOCK": values.BLOCK}, 4, 1),
        Kernel("score_keys", grow.score_keys, {"MAGNITUDE": True, "BLOCK": grow.BLOCK}, 4, 1),
        Kernel("exclude_taken", grow.exclude_taken, _EXCLUDE, 4, 1, ("fp32",)),
        Kernel("add_parts", values.add_parts, {"PLACED": True, "BLOCK": values.BLOCK}, 4, 1),
    )
    return {kernel.name: kernel for kernel in kernels}
