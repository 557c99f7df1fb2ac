"""Compile every CUDA kernel for every GPU and print its registers and shared memory as a table.

    python csrc/cuda/resources.py            # needs nvcc and c++filt, no GPU

Ends with status 1 if a kernel spills registers or does not compile.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().with_name("kernels.cu")
TARGETS = ("sm_80", "sm_90", "sm_100")


class Usage(NamedTuple):
    """Registers and memory of a kernel, as ptxas reports them."""

    kernel: str
    registers: int
    shared: int
    spilled: int


def usage(target: str) -> list[Usage]:
    """Return what every kernel uses on a GPU, by name."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={target}", "-cubin", "-Xptxas", "-v"]
        command += ["-o", f"{folder}/kernels.cubin", str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return sorted(_parse(_readable(done.stderr)))


def _readable(text: str) -> str:
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout


def _parse(text: str) -> Iterator[Usage]:
    for part in text.split("Compiling entry function '")[1:]:
        name = re.sub(r"\(.*", "", part.split("' for '")[0]).removeprefix("void ")
        stores, loads = re.findall(r"(\d+) bytes spill", part)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers is not None
        yield Usage(
            name.removeprefix("sparsekd_cuda::"),
            int(registers[1]),
            int(shared[1]) if shared else 0,
            int(stores) + int(loads),
        )


def main() -> int:
    if not shutil.which("nvcc"):
        raise SystemExit("needs nvcc on PATH")
    used = {target: usage(target) for target in TARGETS}
    print("| kernel | shared bytes |", " | ".join(f"registers {t}" for t in TARGETS), "|")
    print("|---|---:|" + "---:|" * len(TARGETS))
    for row in zip(*used.values(), strict=True):
        registers = " | ".join(str(used_there.registers) for used_there in row)
        print(f"| `{row[0].kernel}` | {row[0].shared} | {registers} |")
    spilled = [f"{t}: {u.kernel}" for t, rows in used.items() for u in rows if u.spilled]
    if spilled:
        print("spills:", *spilled, sep="\n", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    raise SystemExit(main())
