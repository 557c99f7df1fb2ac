"""CUDA sources compiled for the CPU."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc" / "cuda"
FLAGS = (
    "-std=c++17", "-x", "c++", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
    "-Wno-unknown-pragmas", "-DSPARSEKD_HOST_EMULATION", f"-I{HERE}",
)  # fmt: skip
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

Compile = Callable[..., Path]


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("needs g++")
    return found


@pytest.fixture(scope="session")
def compile_for_the_cpu(compiler: str) -> Compile:
    """Return a function that compiles a .cu file with g++, once as long as nothing changes."""

    def compile_(source: Path, *flags: str, headers: Path = SOURCES) -> Path:
        command = [compiler, *FLAGS, f"-I{headers}", *flags]
        inputs = [source, *sorted(HERE.glob("*.h")), *sorted(headers.glob("*.*h")), Path(compiler)]
        digest = hashlib.sha256(repr(command).encode())
        for path in inputs:
            digest.update(path.read_bytes())
        built = ROOT / "build" / "emulation" / f"{source.stem}-{digest.hexdigest()[:16]}"
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            fresh = built.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, str(source), "-o", str(fresh)], check=True)
            fresh.replace(built)
        return built

    return compile_


@pytest.fixture(scope="session")
def sanitizers(compiler: str) -> tuple[str, ...]:
    """Return the flags of AddressSanitizer and UndefinedBehaviorSanitizer."""
    for name in ("libasan.so", "libubsan.so"):
        command = [compiler, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if not os.path.isabs(found):
            pytest.skip(f"the compiler comes without {name}")
    return SANITIZERS
