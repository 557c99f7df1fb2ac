"""What Triton makes of the kernels, without a GPU: no spills, tensor cores, a whole table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

from triton_resources import SETTINGS, TARGETS, Usage, complaints, usage

from sparsekd.kernels import KERNELS

ROOT = Path(__file__).resolve().parents[2]

# Kernels that may spill some bytes: (name, tensors, GPU) and why.
SPILLS = {
    # Addresses of the output, once a block and after the loop; other sizes would make it slower.
    ("tile_product_half_32", "fp16", "sm_100"): 32,
    # Single elements, each with an address: only for channels that fill no vector.
    ("tile_sample_half_64_ragged", "fp16", "gfx942"): 15,
    ("tile_sample_half_64_ragged", "bf16", "gfx942"): 15,
}


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_compiles_for_every_gpu(kernel) -> None:
    wrong = []
    for dtype in kernel.dtypes:
        for target in TARGETS:
            used = usage(kernel, dtype, target)
            allowed = SPILLS.get((kernel.name, dtype, target), 0)
            used = used._replace(spilled=used.spilled if used.spilled > allowed else 0)
            wrong += complaints(kernel, dtype, target, used)
    assert not wrong


def test_every_kernel_is_in_the_table() -> None:
    table = (ROOT / "docs" / "gpu.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \| ((?:fp|bf)\d+) \|", table, re.MULTILINE))
    expected = {(kernel.name, dtype) for kernel in KERNELS for dtype in kernel.dtypes}
    assert rows == expected, "the table is out of date"


@pytest.mark.parametrize(
    "used, complaint",
    [
        (Usage(32, 8, 0, 1, 128), "spills 8"),
        (Usage(32, 0, 166913, 1, 128), "166913 bytes of shared memory, more than 166912"),
        (Usage(129, 0, 0, 1, 512), "129 registers of 512 threads do not fit"),
        (Usage(32, 0, 0, 0, 128), "no instruction for tensor cores"),
    ],
)
def test_rules_are_held(used: Usage, complaint: str) -> None:
    kernel = next(kernel for kernel in KERNELS if kernel.uses_mma)
    assert complaints(kernel, "fp16", "sm_80", used) == [f"{kernel.name}, fp16, sm_80: {complaint}"]
    assert not complaints(kernel, "fp16", "sm_80", Usage(128, 0, 166912, 1, 512))
