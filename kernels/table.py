"""Every kernel in the instances compiled ahead of time, to check what compilers make of it.

Tests and tables iterate over `KERNELS`, so no kernel can exist unchecked.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from . import config, tiles, values

HALVES = ("fp16", "bf16")
FLOATS = ("fp32", *HALVES)
_INDICES = {"lists", "outputs", "chunks", "owners", "slots", "places"}
_POINTERS = {"weight", "bias", "x", "y", "grad", "values", "packed", "result"}


@dataclass(frozen=True)
class Kernel:
    """Name one instance of a kernel.

    Args:
        name: unique, of letters, digits and underscores.
        fn: the Triton function.
        constexprs: what is known when it is compiled.
        num_warps: of a block.
        num_stages: of the software pipeline.
        dtypes: of the tensors it is compiled for, in Triton's names.
        uses_mma: it must multiply on tensor cores.
    """

    name: str
    fn: Any
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    dtypes: tuple[str, ...] = FLOATS
    uses_mma: bool = False

    def signature(self, dtype: str) -> dict[str, str]:
        """Return the type of each argument, in order, for tensors of a dtype."""
        names = inspect.signature(self.fn.fn).parameters
        return {name: self._type(name, dtype) for name in names}

    def aligned(self) -> tuple[str, ...]:
        """Return the arguments that are multiples of 16, as they are for layers of usual sizes."""
        strides = ("_image", "_row", "_pixel")
        return tuple(
            name
            for name, kind in self.signature("fp32").items()
            if kind.startswith("*") or name.endswith(strides)
        )

    def _type(self, name: str, dtype: str) -> str:
        if name in self.constexprs:
            return "constexpr"
        if name in _INDICES:
            return "*i32"
        if name == "partial":
            return "*fp32"
        return f"*{dtype}" if name in _POINTERS else "i32"


def _tiles() -> list[Kernel]:
    found = []
    for label, dtypes, precision, sizes in (
        ("half", HALVES, "ieee", ((16, 16), (32, 32), (64, 64), (128, 64))),
        ("tf32", ("fp32",), "tf32", ((16, 16), (32, 32), (64, 32), (128, 32))),
        ("ieee", ("fp32",), "ieee", ((16, 16), (32, 32), (64, 32), (128, 32))),
    ):
        for n, k in sizes:
            shared = {"SPATIAL": True, "EVEN": True, "ALIGN": 16, "PRECISION": precision}
            shared |= {"BN": n, "BK": k}
            for kind, fn, names in (
                ("product", tiles.tile_product, ("BIAS", "BP")),
                ("sample", tiles.tile_sample, ("IMAGES", "PIXELS")),
            ):
                how = config.choose(kind, n, dtypes[0], precision, 1 << 20)
                constexprs = {**shared, names[0]: 1, names[1]: how.positions}
                if kind == "product":
                    constexprs |= {"BIAS": True, "RELU": False}
                name, mma = f"tile_{kind}_{label}_{n}x{k}", label != "ieee"
                numbers = how.num_warps, how.num_stages
                found.append(Kernel(name, fn, constexprs, *numbers, dtypes, mma))
    for even in found[:2]:
        constexprs = {**even.constexprs, "EVEN": False, "ALIGN": 1, "SPATIAL": False}
        name = even.name.replace("half", "ragged_linear")
        found.append(replace(even, name=name, constexprs=constexprs))
    return found


KERNELS: tuple[Kernel, ...] = (
    *_tiles(),
    Kernel("take_values", values.take_values, {"BLOCK": values.BLOCK}, 4, 1),
    Kernel("add_parts", values.add_parts, {"BLOCK": values.BLOCK}, 4, 1),
)
