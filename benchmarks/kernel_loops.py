"""What compilers made of the inner loops of the CPU kernels: multiply-adds, loads and spills.

python -m benchmarks.kernel_loops [--match 'sample<float'] [OBJECT ...]

disassembles the objects (by default the convolution engines of the last build) with objdump and
prints a line for each innermost loop that has fused multiply-adds. `stack` counts accesses to the
stack, `moves` those between general and vector registers: both are spills, which a loop that waits
for its loads should not have.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
_INSTRUCTION = re.compile(r"^ *([0-9a-f]+):\t(\S+) *(.*)$")
_TARGET = re.compile(r"^([0-9a-f]+) <")
_STACK = re.compile(r"\(%rsp|\(%rbp")
_GENERAL = re.compile(r"%(?:r[a-z0-9]+|e[a-z]{2})(?![^(]*\))\b")


@dataclass(frozen=True)
class Loop:
    """An innermost loop, by what it executes in one turn.

    Attributes:
        function: the demangled name of the function it is in.
        fma: fused multiply-adds of vectors.
        loads: vectors read from memory, by multiply-adds or alone.
        stack: accesses to the stack.
        moves: between general and vector registers.
        instructions: all of them.
    """

    function: str
    fma: int
    loads: int
    stack: int
    moves: int
    instructions: int


@dataclass(frozen=True)
class _Instruction:
    at: int
    name: str
    operands: str


def loops(disassembly: str) -> Iterator[Loop]:
    """Yield the innermost loops with multiply-adds of what `objdump -d -C` prints."""
    function, body = "", list[_Instruction]()
    for line in disassembly.splitlines():
        if start := _FUNCTION.match(line):
            yield from _loops_of(function, body)
            function, body = start[1], []
        elif found := _INSTRUCTION.match(line):
            body.append(_Instruction(int(found[1], 16), found[2], found[3]))
    yield from _loops_of(function, body)


def _loops_of(function: str, body: Sequence[_Instruction]) -> Iterator[Loop]:
    index = {each.at: i for i, each in enumerate(body)}
    spans = list[tuple[int, int]]()
    for i, each in enumerate(body):
        target = _TARGET.match(each.operands) if each.name.startswith("j") else None
        first = index.get(int(target[1], 16)) if target else None
        if first is not None and first <= i:
            spans.append((first, i + 1))
    for first, end in spans:
        inner = any((a, b) != (first, end) and first <= a and b <= end for a, b in spans)
        loop = _count(function, body[first:end])
        if loop.fma and not inner:
            yield loop


def _count(function: str, body: Sequence[_Instruction]) -> Loop:
    def in_memory(each: _Instruction) -> bool:
        return "(" in each.operands

    def reads_vector(each: _Instruction) -> bool:
        last = each.operands.rsplit(",", 1)[-1]
        return each.name.startswith("v") and in_memory(each) and "(" not in last

    def crosses(each: _Instruction) -> bool:
        registers = re.sub(r"\([^)]*\)", "", each.operands)
        return bool(re.search(r"%[xyz]mm", registers) and _GENERAL.search(registers))

    return Loop(
        function,
        fma=sum(re.match(r"vf(n?m)(add|sub)\d+p[sd]", each.name) is not None for each in body),
        loads=sum(map(reads_vector, body)),
        stack=sum(_STACK.search(each.operands) is not None for each in body),
        moves=sum(map(crosses, body)),
        instructions=len(body),
    )


def disassemble(path: Path) -> str:
    """Return the instructions of an object file.

    Raises:
        FileNotFoundError: there is no objdump (binutils).
    """
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def built_engines(isa: str = "*") -> list[Path]:
    """Return the convolution engines that the last release build left, newest first."""
    pattern = f"build/cmake-*/CMakeFiles/sparsekd_engines_{isa}.dir/csrc/core/conv/engine.cc.o"
    return sorted(ROOT.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of the loops of each object."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("objects", nargs="*", type=Path, metavar="OBJECT")
    parser.add_argument("--match", default="", help="only functions whose name contains this")
    args = parser.parse_args(argv)
    for path in args.objects or built_engines():
        print(path)
        print("  fma loads loads/fma stack moves instructions  function")
        for loop in loops(disassemble(path)):
            if args.match in loop.function:
                name = loop.function.replace("sparsekd::(anonymous namespace)::", "").split("(")[0]
                print(
                    f"{loop.fma:5} {loop.loads:5} {loop.loads / loop.fma:9.2f} {loop.stack:5}"
                    f" {loop.moves:5} {loop.instructions:12}  {name}"
                )


if __name__ == "__main__":
    main()
