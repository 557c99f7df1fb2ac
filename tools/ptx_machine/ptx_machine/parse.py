"""Read the text of a PTX module: its kernels' instructions, registers and shared memory."""

from __future__ import annotations

import dataclasses
import re

from .errors import Unsupported

BYTES = {"pred": 1, "f16x2": 4, "bf16x2": 4, "bf16": 2, "tf32": 4}
BYTES |= {f"{kind}{8 * size}": size for kind in "busf" for size in (1, 2, 4, 8)}


@dataclasses.dataclass
class Instruction:
    """An instruction, ``@predicate op.modifiers args``."""

    text: str
    op: str
    modifiers: list[str]
    args: list[str]
    predicate: str | None
    negated: bool
    source: str  # the line that it was made of, where the module says so

    @property
    def type(self) -> str:
        return self.modifiers[-1]


@dataclasses.dataclass
class Parameter:
    """A kernel's parameter: its place in the bytes that a launch passes."""

    name: str
    offset: int
    size: int
    type: str


@dataclasses.dataclass
class Kernel:
    """A kernel as parsed: parameters, code, registers and shared memory."""

    name: str
    parameters: list[Parameter] = dataclasses.field(default_factory=list)
    code: list[Instruction] = dataclasses.field(default_factory=list)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)
    registers: dict[str, int] = dataclasses.field(default_factory=dict)  # bytes; 1 is a predicate
    shared: dict[str, int] = dataclasses.field(default_factory=dict)  # where each array begins
    shared_bytes: int = 0  # without what the launch adds

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


def parse(text: str) -> dict[str, Kernel]:
    """Return the kernels of a module by name.

    Raises:
        Unsupported: it has a declaration that the machine does not know.
    """
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]*)"', text, re.MULTILINE))
    text = re.sub(r"^(\s*\.loc\b[^\n;]*)$", r"\1;", text, flags=re.MULTILINE)
    kernels: dict[str, Kernel] = {}
    outside = ""
    position = 0
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{", text):
        if match.start() < position:
            continue
        outside += text[position : match.start()]
        kernel = kernels[match[1]] = Kernel(match[1])
        _parameters(kernel, match[2])
        position = _Body(kernel, files).read(text, match.end())
    for kernel in kernels.values():
        for array in re.findall(r"\.shared\b[^;]*;", outside):
            _declare_shared(kernel, array.rstrip(";"))
    return kernels


def _align(offset: int, to: int) -> int:
    return -(-offset // to) * to


def _parameters(kernel: Kernel, text: str) -> None:
    offset = 0
    for declaration in filter(str.strip, text.split(",")):
        match = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?\s*$", declaration)
        type_ = re.search(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)", declaration)
        if match is None or type_ is None:
            raise Unsupported(f"parameter of {kernel.name}: {declaration.strip()}")
        size = BYTES[type_[2]]
        offset = _align(offset, int(type_[1] or size))
        parameter = Parameter(match[1], offset, size * int(match[2] or 1), type_[2])
        kernel.parameters.append(parameter)
        offset += parameter.size


def _declare_shared(kernel: Kernel, text: str) -> None:
    match = re.fullmatch(
        r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?", text.strip()
    )
    if match is None:
        raise Unsupported(f"shared memory of {kernel.name}: {text}")
    size = BYTES[match[2]]
    # The array without a length is the launch's and comes last.
    count = 1 if match[4] is None else int(match[4] or 0)
    start = _align(kernel.shared_bytes, int(match[1] or size))
    kernel.shared[match[3]] = start
    kernel.shared_bytes = start + size * count


class _Body:
    """Read statements up to the brace that closes a kernel; inner ones are scopes of registers."""

    def __init__(self, kernel: Kernel, files: dict[str, str]) -> None:
        self.kernel = kernel
        self.files = files
        self.scopes: list[dict[str, str]] = [{}]
        self.opened = 0
        self.source = ""

    def read(self, text: str, position: int) -> int:
        while True:
            position = re.compile(r"\s*").match(text, position).end()
            if text[position] == "{":
                self.scopes.append({})
                self.opened += 1
            elif text[position] == "}":
                self.scopes.pop()
                if not self.scopes:
                    return position + 1
            elif label := re.compile(r"([\w$]+):(?!:)").match(text, position):
                self.kernel.labels[label[1]] = len(self.kernel.code)
                position = label.end()
                continue
            else:
                end = text.index(";", position)
                self.statement(" ".join(text[position:end].split()))
                position = end
            position += 1

    def statement(self, text: str) -> None:
        if text.startswith(".loc"):
            # The line, and where something inlined is called from.
            places = re.findall(r"(?:loc|inlined_at) (\d+) (\d+)", text)
            self.source = ", from ".join(f"{self.files.get(f, '?')}:{line}" for f, line in places)
        elif text.startswith(".reg"):
            self.declare(text)
        elif text.startswith(".shared"):
            _declare_shared(self.kernel, text)
        elif text.startswith(".pragma") or not text:
            pass
        elif text.startswith("."):
            raise Unsupported(f"{self.kernel.name}: {text}")
        else:
            self.kernel.code.append(self.instruction(text))

    def declare(self, text: str) -> None:
        _, type_, names = text.split(maxsplit=2)
        for name in (n.strip() for n in names.split(",")):
            family = re.fullmatch(r"([\w%$]+)<(\d+)>", name)
            members = [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [name]
            for member in members:
                inner = len(self.scopes) > 1
                unique = f"{member}@{self.opened}" if inner else member
                self.scopes[-1][member] = unique
                self.kernel.registers[unique] = BYTES[type_[1:]]

    def resolve(self, match: re.Match) -> str:
        for scope in reversed(self.scopes):
            if match[0] in scope:
                return scope[match[0]]
        return match[0]

    def instruction(self, text: str) -> Instruction:
        match = re.fullmatch(r"(?:@(!?)([\w%$]+)\s+)?([\w.:]+)\s*(.*)", text)
        if match is None:
            raise Unsupported(f"{self.kernel.name}: {text}")
        negated, predicate, op, rest = match.groups()
        name, *modifiers = op.replace("shared::cta", "shared").split(".")
        rest = re.sub(r"[\w%$.]+", self.resolve, rest)
        if predicate:
            predicate = re.sub(r".+", self.resolve, predicate)
        return Instruction(
            text, name, modifiers, split(rest), predicate, bool(negated), self.source
        )


def split(text: str) -> list[str]:
    """Split operands at the commas that are outside of braces and brackets."""
    parts = re.findall(r"\s*((?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+)", text)
    return [part.strip() for part in parts]


def members(text: str) -> list[str]:
    """Return the operands of a vector, or of what is no vector the one."""
    return [part.strip() for part in text.strip("{} ").split(",")]
