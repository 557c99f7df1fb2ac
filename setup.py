"""Build sparsekd: CMake compiles csrc/, setuptools packages it with the Python sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import OptionError, PlatformError

ROOT = Path(__file__).resolve().parent
CPP = os.environ.get("SPARSEKD_CPP") or "on"
CUDA = os.environ.get("SPARSEKD_CUDA") or "auto"
CUDA_LIBRARY = "libsparsekd_cuda.so"
WITHOUT = "to install sparsekd without its compiled kernels, slow, set SPARSEKD_CPP=off"


class CMakeBuild(build_ext):
    """Build the extension and the CUDA kernels with CMake and put them where they belong."""

    def build_extension(self, ext: Extension) -> None:
        if CUDA not in ("auto", "on", "off"):
            raise OptionError(f"SPARSEKD_CUDA: expected auto, on or off, got {CUDA!r}")
        _check_compiler()
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'lib'}", f"-DSPARSEKD_CUDA={CUDA}",
        ]  # fmt: skip
        # CMake refuses another generator in an existing build folder, and after an isolated build
        # looks there for the ninja of an environment that is gone.
        ninja, cache = shutil.which("ninja"), build / "CMakeCache.txt"
        if ninja and (not cache.exists() or "CMAKE_GENERATOR:INTERNAL=Ninja" in cache.read_text()):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        compile_ = ["cmake", "--build", str(build), "--target", "_C", "--parallel", jobs]
        for command in (configure, compile_):
            if subprocess.run(command).returncode != 0:
                raise PlatformError(
                    f"{' '.join(command[:3])} ... failed, as it says above; {WITHOUT}"
                )
        built = build / "lib" / target.name
        if not built.exists():
            raise RuntimeError(
                f"CMake did not produce {built.name}; found {list((build / 'lib').iterdir())}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        _install(built, target)
        self._build_cuda(build, target.parent)

    def _build_cuda(self, build: Path, folder: Path) -> None:
        """Build the CUDA kernels where there is an nvcc; only SPARSEKD_CUDA=on insists on them."""
        command = ["cmake", "--build", str(build), "--target", "sparsekd_cuda"]
        failed = subprocess.run(command).returncode != 0
        if failed and CUDA == "on":
            raise RuntimeError("SPARSEKD_CUDA=on, but nvcc failed; see its messages above")
        if failed:
            print("No CUDA kernels: nvcc failed. The rest of sparsekd does not need them.")
            (build / "lib" / CUDA_LIBRARY).unlink(missing_ok=True)
        _install(build / "lib" / CUDA_LIBRARY, folder / CUDA_LIBRARY)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        _install(Path(self.build_lib) / "sparsekd" / CUDA_LIBRARY, ROOT / "sparsekd" / CUDA_LIBRARY)


def _check_compiler() -> None:
    """Say in one line that there is no C++ compiler, which CMake says in a page.

    Where Visual Studio is, CMake finds it without PATH.
    """
    named = (os.environ.get("CXX") or "").split(maxsplit=1)[:1]
    if os.name != "nt" and not any(map(shutil.which, named or ("c++", "g++", "clang++"))):
        raise PlatformError(
            f"no C++ compiler found (looked for {named[0] if named else 'c++, g++, clang++'}): "
            f"install one, or name it in CXX; {WITHOUT}"
        )


def _install(built: Path, target: Path) -> None:
    """Put a file in its place, or what was there away if it was not built.

    In one step: a process that has the old file mapped keeps it.
    """
    if not built.exists():
        target.unlink(missing_ok=True)
        return
    fresh = target.with_suffix(".new")
    shutil.copy2(built, fresh)
    fresh.replace(target)


if CPP not in ("on", "off"):
    raise SystemExit(f"SPARSEKD_CPP: expected on or off, got {CPP!r}")
setup(
    packages=[
        *find_packages(include=["sparsekd", "sparsekd.*"], exclude=["sparsekd.kernels*"]),
        "sparsekd.kernels",
    ],
    package_dir={"sparsekd.kernels": "kernels"},
    package_data={"sparsekd": ["py.typed", "cuda_api.h"]},
    ext_modules=[Extension("sparsekd._C", sources=[])] if CPP == "on" else [],
    cmdclass={"build_ext": CMakeBuild},
)
