"""The library of CUDA kernels, csrc/cuda/api.h: load it, call it on torch's current stream."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekd.errors import BackendError

PATH = Path(__file__).resolve().with_name("libsparsekd_cuda.so")
OLDEST = (8, 0)  # compute capability that the library has code for
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Library:
    """Call the library's functions by name, without the prefix that they have in common.

    Tensors become their addresses, dtypes their codes, None the null pointer.

    Args:
        path: of the shared library.

    Raises:
        OSError: it does not load, or the driver is older than the CUDA it was built with.
    """

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        self._functions.sparsekd_cuda_error.restype = ctypes.c_char_p
        code = self._functions.sparsekd_cuda_driver()
        if code:
            raise OSError(self._reason(code))

    def size(self, name: str, *args: Any) -> int:
        """Return what a function that only computes a size returns."""
        function = self._functions[f"sparsekd_cuda_{name}"]
        function.restype = ctypes.c_int64
        return function(*map(_argument, args))

    def run(self, name: str, device: torch.device, *args: Any) -> None:
        """Queue a function's work behind what is queued on the device's current stream.

        Raises:
            BackendError: CUDA refused it; the text has CUDA's reason.
        """
        function = self._functions[f"sparsekd_cuda_{name}"]
        code = self._queue(function, device, list(map(_argument, args)))
        if code:
            raise BackendError(f"{name}: {self._reason(code)}")

    def _reason(self, code: int) -> str:
        return f"CUDA error {code}, {self._functions.sparsekd_cuda_error(code).decode()}"

    def _queue(self, function: Any, device: torch.device, args: list[Any]) -> int:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            return function(*args, ctypes.c_void_p(stream))


def load() -> Library:
    """Return the library of this installation.

    Raises:
        ImportError: it was not built, does not load, or has no GPU or driver that it can use; the
            text says which.
    """
    if not PATH.exists():
        raise ImportError("this build has no CUDA kernels: it found no nvcc, or nvcc failed")
    if not torch.cuda.is_available():
        raise ImportError("the CUDA kernels are built, but torch sees no CUDA device")
    try:
        library = _opened(PATH)
    except OSError as error:
        raise ImportError(f"the CUDA kernels do not load: {error}") from error
    newest = max(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    if newest < OLDEST:
        wanted, found = (".".join(map(str, capability)) for capability in (OLDEST, newest))
        raise ImportError(f"the CUDA kernels need compute capability {wanted}, the GPU has {found}")
    return library


@cache
def _opened(path: Path) -> Library:
    return Library(path)


def library_for(device: torch.device) -> Library | None:
    """Return the library if tensors on a device can go to it, else None."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < OLDEST:
        return None
    try:
        return load()
    except ImportError:
        return None


def _argument(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(DTYPES[value] if isinstance(value, torch.dtype) else value)
