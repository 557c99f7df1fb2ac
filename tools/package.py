"""Build the sdist and the wheel, and try both in a clean environment: `make package`.

The wheel is compiled from the unpacked sdist, in `build/package`, whose objects the next run uses
again. The clean environment has no compiler on its PATH. There the wheel has to work, the sdist has
to refuse with one line, and with SPARSEKD_CPP=off to install itself without compiled kernels.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK, DIST = ROOT / "build/package", ROOT / "dist"
SMOKE = ROOT / "tools/package_smoke.py"
LIMIT = 10e6  # bytes of a wheel
PIP = ("-m", "pip", "--disable-pip-version-check")


@contextmanager
def step(what: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"== {what}", flush=True)
    yield
    print(f"   {time.monotonic() - started:.0f} s", flush=True)


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run(*command: str | Path, **environment: str) -> None:
    subprocess.run(list(map(str, command)), check=True, cwd=WORK, env=os.environ | environment)


def build_sdist() -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", fresh(DIST), ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    return sdist


def unpack(sdist: Path) -> Path:
    """Unpack the sdist; what an earlier one was built to stays, and ninja sees what has changed."""
    folder = WORK / sdist.name.removesuffix(".tar.gz")
    for old in folder.glob("*") if folder.exists() else ():
        if old.name != "build":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK, filter="data")
    shutil.rmtree(folder / "sparsekd.egg-info", ignore_errors=True)
    return folder


def build_wheel(source: Path) -> Path:
    """Build the wheel as `pip install` of the sdist does, and make it one for other machines."""
    raw = fresh(WORK / "raw")
    run(sys.executable, *PIP, "wheel", "--no-deps", "-w", raw, source, SPARSEKD_CUDA="off")
    (wheel,) = raw.glob("*.whl")
    if sys.platform == "linux":
        # Torch's OpenMP is found at run time; a copy in the wheel would be a second pool.
        run(
            sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp*", "-w", DIST, wheel
        )
    else:
        shutil.copy(wheel, DIST)
    (wheel,) = DIST.glob("*.whl")
    return wheel


def check_wheel(wheel: Path) -> None:
    size = wheel.stat().st_size
    names = zipfile.ZipFile(wheel).namelist()
    assert size < LIMIT, f"{wheel.name} has {size} bytes, more than {LIMIT:.0f}"
    assert sys.platform != "linux" or "manylinux" in wheel.name, wheel.name
    assert not [n for n in names if n.startswith("sparsekd.libs/")], "auditwheel added libraries"
    foreign = [n for n in names if not n.startswith(("sparsekd/", "sparsekd-"))]
    assert not foreign, f"not of the package: {foreign}"
    print(f"   {wheel.name}: {size / 1e6:.2f} MB, {len(names)} files")


class Clean:
    """A new environment, without a compiler on PATH and without variables of sparsekd."""

    def __init__(self) -> None:
        folder = WORK / "clean"
        run(sys.executable, "-m", "venv", "--clear", folder)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        keep = {
            k: v for k, v in os.environ.items() if not k.startswith(("SPARSEKD_", "PYTHON", "CXX"))
        }
        self.environment = keep | {"PATH": str(self.bin)}
        assert not shutil.which("c++", path=str(self.bin))

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.bin / "python"), *map(str, arguments)]
        return subprocess.run(
            command, cwd=WORK, env=self.environment | environment, capture_output=True, text=True
        )

    def must(self, *arguments: str | Path, **environment: str) -> None:
        done = self.run(*arguments, **environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, arguments))}\n{done.stdout}\n{done.stderr}")
        print("".join(f"   {line}\n" for line in done.stdout.splitlines()[-1:]), end="", flush=True)


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    with step("sdist"):
        sdist = build_sdist()
    with step("wheel, compiled from the sdist"):
        wheel = build_wheel(unpack(sdist))
        check_wheel(wheel)
    with step("the wheel, where there is no compiler"):
        clean = Clean()
        install = (*PIP, "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt")
        clean.must(*install, wheel, "setuptools>=77", "wheel")
        clean.must(SMOKE, "cpp")
    # What builds an sdist is there already: the wheel was made in an environment of pip's own.
    # Without pip's cache, which would hand the pure-Python wheel of one run to the next.
    again = (
        *install,
        "--no-cache-dir",
        "--no-deps",
        "--force-reinstall",
        "--no-build-isolation",
        sdist,
    )
    with step("the sdist, where there is no compiler: refused in one line"):
        refused = clean.run(*again)
        said = [line.strip() for line in (refused.stdout + refused.stderr).splitlines()]
        lines = [line for line in said if "SPARSEKD_CPP=off" in line]
        assert refused.returncode != 0, "installed without a compiler"
        assert len(lines) == 1, said
        assert lines[0].startswith("error: no C++ compiler found"), said
        assert not [line for line in said if line.startswith("Traceback")], said
        print(f"   {lines[0]}")
    with step("the sdist with SPARSEKD_CPP=off, where there is no compiler"):
        clean.must(*again, SPARSEKD_CPP="off")
        clean.must(SMOKE, "reference")
    print(f"{sdist}\n{wheel}")


if __name__ == "__main__":
    main()
