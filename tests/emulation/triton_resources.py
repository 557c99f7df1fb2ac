"""Compile every Triton kernel for every GPU and print its registers and shared memory as a table.

    python tests/emulation/triton_resources.py            # needs Triton, no GPU

Ends with status 1 if a kernel breaks one of the rules in `complaints`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from packaging.version import Version
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a block may have.
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
REGISTERS = 65536  # of a multiprocessor; a block has to fit
# In PTX, of which every one becomes an instruction of tensor cores, and in AMD's assembly.
MATRIX_INSTRUCTION = re.compile(r"wgmma\.mma_async\S+|mma\.sync\S+|tcgen05\.mma\S+|v_s?mfma_\w+")
SETTINGS = {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton"), "TRITON_DEFAULT_FP_FUSION": "1"}


class Usage(NamedTuple):
    """What a kernel uses on a GPU."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread, or on AMD registers
    shared: int  # bytes of a block
    multiplies: int  # instructions for tensor cores
    threads: int
    buffers: int  # of each operand that is copied ahead, the fewest; 0 where none is


def compiled(kernel: Any, dtype: str, target: str) -> Any:
    """Compile one of `sparsekd.kernels.instances`."""
    signature = kernel.signature(dtype)
    names = list(signature)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in kernel.aligned()}
    source = ASTSource(kernel.fn, signature, kernel.constexprs, aligned)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    if kernel.registers:
        options["maxnreg"] = kernel.registers
    return triton.compile(source, target=TARGETS[target], options=options)


def usage(kernel: Any, dtype: str, target: str) -> Usage:
    """Compile a kernel and return what it uses."""
    built = compiled(kernel, dtype, target)
    threads = kernel.num_warps * TARGETS[target].warp_size
    text = _assembly(built, target)
    if target.startswith("gfx"):
        registers, spilled = _number(r"\.vgpr_count: +(\d+)", text), 0
        for kind in ("vgpr", "sgpr"):
            spilled += _number(rf"\.{kind}_spill_count: +(\d+)", text)
    else:
        report = _resource_usage(built.asm["cubin"])
        registers, spilled = _number(r"REG:(\d+)", report), _number(r"STACK:(\d+)", report)
    multiplies = len(MATRIX_INSTRUCTION.findall(text))
    copies = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", built.asm["ttgir"])
    buffers = min(map(int, copies), default=0)
    return Usage(registers, spilled, built.metadata.shared, multiplies, threads, buffers)


def matrix_instructions(kernel: Any, dtype: str, target: str) -> set[str]:
    """Return the kinds of instructions for tensor cores, with as many products as one adds up.

    How many columns one has at once, N of sm_90's, does not matter to a sum.
    """
    found = MATRIX_INSTRUCTION.findall(_assembly(compiled(kernel, dtype, target), target))
    return {re.sub(r"n\d+k", "k", instruction) for instruction in found}


def _assembly(built: Any, target: str) -> str:
    return built.asm["amdgcn" if target.startswith("gfx") else "ptx"]


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in what the tools say"
    return int(match[1])


def _resource_usage(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Kernels that may spill some bytes: (name, tensors, GPU) and why.
SPILLS = {
    # Single elements, each with an address: only for channels that fill no vector.
    ("tile_sample_half_64_ragged", "fp16", "gfx942"): 16,
    ("tile_sample_half_64_ragged", "bf16", "gfx942"): 16,
    # A few registers outside of the inner loop, for what computes results again.
    ("tile_product_half_64_ragged", "fp16", "gfx942"): 8,
    ("tile_product_half_64_ragged", "bf16", "gfx942"): 8,
    ("tile_product_tf32_64", "fp32", "sm_80"): 8,
    ("tile_product_ieee_32", "fp32", "sm_80"): 8,
    ("shared_sample_half_16", "fp16", "sm_80"): 8,
    ("shared_sample_half_16", "bf16", "sm_80"): 8,
}
if Version(triton.__version__) < Version("3.9"):
    # A few addresses, put aside outside of the inner loop.
    SPILLS |= {
        ("tile_sample_half_64", "fp16", "sm_80"): 16,
        ("tile_sample_half_64", "bf16", "sm_80"): 16,
        ("tile_sample_ieee_64", "fp32", "sm_90"): 16,
        ("tile_sample_ieee_128", "fp32", "sm_100"): 16,
    }


# Single elements of two bytes, for channels that fill no vector, cannot be copied ahead.
NOT_PIPELINED = {"tile_sample_half_64_ragged"}


def complaints(kernel: Any, dtype: str, target: str, used: Usage) -> list[str]:
    """Return what is wrong with a compiled kernel."""
    wrong = []
    if used.spilled > SPILLS.get((kernel.name, dtype, target), 0):
        wrong.append(f"spills {used.spilled}")
    if used.shared > SHARED[target]:
        wrong.append(f"{used.shared} bytes of shared memory, more than {SHARED[target]}")
    if target.startswith("sm") and used.registers * used.threads > REGISTERS:
        wrong.append(f"{used.registers} registers of {used.threads} threads do not fit")
    if kernel.uses_mma and not used.multiplies:
        wrong.append("no instruction for tensor cores")
    # A stage may be the product itself, which reads registers.
    ahead = kernel.num_stages - 1 if kernel.uses_mma and target.startswith("sm") else 0
    if used.buffers < ahead and kernel.name not in NOT_PIPELINED:
        wrong.append(f"{used.buffers} buffers for {kernel.num_stages} stages")
    return [f"{kernel.name}, {dtype}, {target}: {what}" for what in wrong]


def row(name: str, dtype: str, used: dict[str, Usage]) -> str:
    """Return what the table says of a kernel that uses so much on each GPU."""
    warps = [str(u.threads // TARGETS[target].warp_size) for target, u in used.items()]
    cells = [
        f"`{name}`",
        dtype,
        warps[0] if len(set(warps)) == 1 else " / ".join(warps),
        " / ".join(str(u.shared) for u in used.values()),
        *(str(u.registers) for u in used.values()),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    os.environ.update(SETTINGS)
    from sparsekd.kernels import instances

    wrong = []
    heads = ["kernel", "tensors", "warps", "shared bytes", *(f"registers {t}" for t in TARGETS)]
    print("|", " | ".join(heads), "|")
    print("|---|---|" + "---:|" * (len(heads) - 2))
    for name, kernel in instances("sm_80").items():
        kernels = {target: instances(target)[name] for target in TARGETS}
        for dtype in kernel.dtypes:
            used = {target: usage(k, dtype, target) for target, k in kernels.items()}
            print(row(name, dtype, used), flush=True)
            for target, k in kernels.items():
                wrong += complaints(k, dtype, target, used[target])
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
