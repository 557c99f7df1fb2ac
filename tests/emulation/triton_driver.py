"""A driver that lets Triton's launchers run on CPU tensors: it executes the PTX they compile.

``kernel[grid](...)`` goes the real way: arguments are specialised, the kernel is compiled for sm_80
to a binary, configurations are tried and limits held; only the launch is ours.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from cuda_emulation import Launch
from ptx_machine import Executable, Module
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

# Bytes of shared memory that a block may have.
SHARED_LIMITS = {80: 166912, 90: 232448, 100: 232448}
FLOATS = {"fp16": "<e", "fp32": "<f", "fp64": "<d"}


class Utils:
    """Answer what Triton asks of a device, and load kernels."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.text = ""  # of the kernel that is being loaded
        self._modules: dict[str, Executable] = {}

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_LIMITS[self.capability],
            "multiprocessor_count": 108,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Return Triton's (module, function, registers, spills, most threads)."""
        if self.text not in self._modules:
            self._modules[self.text] = Module(self.text)[name]
        return None, self._modules[self.text], 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class PtxDriver(DriverBase):
    """Be Triton's active driver: ``triton.runtime.driver.set_active(PtxDriver())``.

    Attributes:
        launches: what was launched, in order.
    """

    def __init__(self, capability: int = 80) -> None:
        self.utils = Utils(capability)
        self.launches: list[Launch] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return the function that launches a compiled kernel."""
        types = _flat(source.signature.values())

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args) -> None:
            given = [(v, t) for v, t in zip(_flat(args), types, strict=True) if t != "constexpr"]
            tensors = [value for value, _ in given if isinstance(value, torch.Tensor)]
            data = [_bytes(value, type_) for value, type_ in given]
            # Triton adds pointers to memory of its own, which our kernels do not use.
            data += [bytes(8)] * (len(function.kernel.parameters) - len(data))
            counts = function.launch(
                (x, y, z),
                (32 * metadata.num_warps,),
                function.arguments(*data),
                buffers(tensors),
                metadata.shared,
            )
            self.launches.append(Launch(metadata.name, (x, y, z), metadata.num_warps, counts))

        return launch

    def loading(self, module, function, name, metadata_group, hash_) -> None:
        """Be Triton's hook that runs before a kernel is loaded: note what it was compiled to."""
        path = next(p for file, p in metadata_group.items() if file.endswith(".ptx"))
        self.utils.text = self.edit(Path(path).read_text())

    def edit(self, text: str) -> str:
        """Return the PTX that runs for what was compiled; tests plant mistakes here."""
        return text

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, type_: str) -> str:
        return type_

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.utils.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def run_once(call: Callable[[], None], quantiles: Sequence[float], **_: Any) -> list[float]:
            call()
            return [1.0] * len(quantiles)

        return run_once

    def get_empty_cache_for_benchmark(self) -> None:
        return None

    def clear_cache(self, cache: Any) -> None:
        pass


class installed:
    """Make a driver the active one: ``with installed(PtxDriver()) as driver``."""

    def __init__(self, driver: PtxDriver) -> None:
        self.driver = driver

    def __enter__(self) -> PtxDriver:
        self.before = triton.runtime.driver._active
        self.hook = triton.knobs.runtime.kernel_load_start_hook
        triton.runtime.driver.set_active(self.driver)
        triton.knobs.runtime.kernel_load_start_hook = self.driver.loading
        return self.driver

    def __exit__(self, *_: object) -> None:
        triton.runtime.driver._active = self.before
        triton.knobs.runtime.kernel_load_start_hook = self.hook


def buffers(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Return where the storages of tensors are, the memory that a launch with them may touch."""
    storages = (t.untyped_storage() for t in tensors)
    return [(storage.data_ptr(), storage.nbytes()) for storage in storages]


def _flat(values: Any) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        flat += _flat(value) if isinstance(value, tuple) else [value]
    return flat


def _bytes(value: Any, type_: str) -> bytes:
    if isinstance(value, torch.Tensor):
        return struct.pack("<Q", value.data_ptr())
    if type_ in FLOATS:
        return struct.pack(FLOATS[type_], value)
    if type_[0] in "iu":
        size = max(1, int(type_[1:]) // 8)
        return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
    if type_[0] == "*" and value is None:
        return bytes(8)
    raise TypeError(f"argument of type {type_}: {value!r}")
