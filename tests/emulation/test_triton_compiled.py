"""What Triton makes of the kernels, without a GPU: no spills, tensor cores, a whole table."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

import triton
from triton_resources import (
    SETTINGS,
    TARGETS,
    Usage,
    complaints,
    matrix_instructions,
    usage,
)

from sparsekd.kernels import config, instances
from sparsekd.kernels.config import Config
from sparsekd.kernels.table import HALVES

ROOT = Path(__file__).resolve().parents[2]
KERNELS = instances("sm_80")
TABLE = (ROOT / "docs" / "gpu.md").read_text()


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)


def published(name: str, dtype: str, target: str) -> tuple[str, str, str]:
    """Return warps, bytes of shared memory and registers of a kernel on a GPU, as in the table."""
    line = re.search(rf"^\| `{name}` \| {dtype} \| (.*) \|$", TABLE, re.MULTILINE)
    assert line is not None, "the table is out of date"
    warps, shared, *registers = line[1].split(" | ")
    number = list(TARGETS).index(target)
    warps = warps.split(" / ")[number if "/" in warps else 0]
    return warps, shared.split(" / ")[number], registers[number]


# Every day each kernel is compiled for one GPU, and for each GPU a quarter of the kernels, of all
# sizes: those that follow each other in KERNELS differ in size.
@pytest.mark.parametrize(
    "name, target",
    [
        pytest.param(
            name, target, marks=() if (one + one // 4) % 4 == other else pytest.mark.thorough
        )
        for one, name in enumerate(KERNELS)
        for other, target in enumerate(TARGETS)
    ],
)
def test_every_kernel_compiles_for_every_gpu(name: str, target: str) -> None:
    wrong = []
    kernel = instances(target)[name]
    for dtype in KERNELS[name].dtypes:
        used = usage(kernel, dtype, target)
        wrong += complaints(kernel, dtype, target, used)
        if f"with Triton {triton.__version__}." in TABLE:  # another one may count otherwise
            warps = used.threads // TARGETS[target].warp_size
            found = (str(warps), str(used.shared), str(used.registers))
            assert found == published(name, dtype, target), "the table is out of date"
    assert not wrong


def test_every_kernel_is_in_the_table() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \| ((?:fp|bf)\d+) \|", TABLE, re.MULTILINE))
    expected = {(kernel.name, dtype) for kernel in KERNELS.values() for dtype in kernel.dtypes}
    assert rows == expected, "the table is out of date"


@pytest.mark.parametrize(
    "used, complaint",
    [
        (Usage(32, 8, 0, 1, 128, 3), "spills 8"),
        (Usage(32, 0, 166913, 1, 128, 3), "166913 bytes of shared memory, more than 166912"),
        (Usage(129, 0, 0, 1, 512, 3), "129 registers of 512 threads do not fit"),
        (Usage(32, 0, 0, 0, 128, 3), "no instruction for tensor cores"),
        (Usage(32, 0, 0, 1, 128, 2), "2 buffers for 4 stages"),
    ],
)
def test_rules_are_held(used: Usage, complaint: str) -> None:
    kernel = next(kernel for kernel in KERNELS.values() if kernel.uses_mma)
    assert complaints(kernel, "fp16", "sm_80", used) == [f"{kernel.name}, fp16, sm_80: {complaint}"]
    assert not complaints(kernel, "fp16", "sm_80", Usage(128, 0, 166912, 1, 512, 3))


@pytest.mark.parametrize(
    "name, target",
    [
        pytest.param(name, target, marks=() if name in often else pytest.mark.thorough)
        for target, often in {
            "sm_90": ("tile_product_half_64", "tile_sample_half_64"),
            "sm_100": ("tile_product_half_64",),
            "gfx942": ("tile_sample_half_64",),
        }.items()
        for name, kernel in KERNELS.items()
        if "PRECISION" in kernel.constexprs
        if not name.endswith(("_ragged", "_linear"))
    ],
)
def test_all_sizes_that_tuning_tries_add_up_by_the_same_instructions(
    name: str, target: str
) -> None:
    kernel = instances(target)[name]
    kind, block = ("product", "BP") if "product" in name else ("sample", None)
    known = kernel.constexprs
    positions = known["BP"] if block else known.get("PIXELS", 1) * known["IMAGES"]
    base = Config(positions, kernel.num_warps, kernel.num_stages)
    label = "half" if kernel.dtypes == HALVES else known["PRECISION"]
    used = set()
    for how in config.candidates(kind, base, 1 << 20):
        sizes = {**known, "BP": how.positions} if block else known
        registers = config.most_registers(how, known["BN"], label, target) if block else None
        tried = dataclasses.replace(
            kernel, constexprs=sizes, num_warps=how.num_warps, num_stages=how.num_stages,
            registers=registers,
        )  # fmt: skip
        used.add(frozenset(matrix_instructions(tried, kernel.dtypes[0], target)))
    assert len(used) == 1
    # AMD's matrix cores multiply float32 in full precision too.
    assert all(used) == (kernel.uses_mma or target == "gfx942")
