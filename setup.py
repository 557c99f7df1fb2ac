"""Build sparsekd: CMake compiles csrc/, setuptools packages it with the Python sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Build the one extension with CMake and put it where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'lib'}",
        ]  # fmt: skip
        # CMake refuses another generator in an existing build folder: choose only the first time.
        if shutil.which("ninja") and not (build / "CMakeCache.txt").exists():
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run(
            ["cmake", "--build", str(build), "--target", "_C", "--parallel", jobs], check=True
        )
        built = build / "lib" / target.name
        if not built.exists():
            raise RuntimeError(
                f"CMake did not produce {built.name}; found {list((build / 'lib').iterdir())}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced in one step: a process that has the old module mapped keeps it.
        fresh = target.with_suffix(".new")
        shutil.copy2(built, fresh)
        fresh.replace(target)


setup(
    packages=[
        *find_packages(include=["sparsekd", "sparsekd.*"], exclude=["sparsekd.kernels*"]),
        "sparsekd.kernels",
    ],
    package_dir={"sparsekd.kernels": "kernels"},
    package_data={"sparsekd": ["py.typed"]},
    ext_modules=[Extension("sparsekd._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
