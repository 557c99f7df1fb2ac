"""The library of CUDA kernels: load it, call it on torch's current stream.

Its header, csrc/cuda/api.h, comes with the package and says what each function takes. Calls are
checked against it, since C itself would take any arguments for others. What each costs counts: a
small kernel is done before Python has called the next one.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekd.errors import BackendError, UnavailableError

PATH = Path(__file__).resolve().with_name("libsparsekd_cuda.so")
HEADER = PATH.with_name("cuda_api.h")  # csrc/cuda/api.h
OLDEST = (8, 0)  # compute capability that the library has code for
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PREFIX = "sparsekd_cuda_"


class _Address:
    """Parameter that takes a tensor of a dtype, any for None, or None for the null pointer."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype

    def address(self, value: Tensor | None) -> int | None:
        if value is None:
            return None
        if not isinstance(value, Tensor):
            raise TypeError(f"expected a tensor or None, got {value!r}")
        if self._dtype not in (None, value.dtype):
            raise TypeError(f"expected a tensor of {self._dtype}, got {value.dtype}")
        return value.data_ptr()

    def from_param(self, value: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.address(value))


class _Dtype:
    """Parameter that takes a torch dtype and passes its code."""

    def from_param(self, value: torch.dtype) -> ctypes.c_int64:
        if value not in DTYPES:
            raise TypeError(f"expected one of {[*DTYPES]}, got {value!r}")
        return ctypes.c_int64(DTYPES[value])


class _Structs:
    """Parameter that takes a sequence of structs, each a sequence of its fields, as an array.

    They are packed as bytes, which is several times faster than filling ctypes.Structure. C reads
    them where they are, and no longer than the call lasts.

    Args:
        name: of the struct.
        fields: the type of each, all of 64 bits: `ctypes.c_int64`, or an address.
    """

    def __init__(self, name: str, fields: Sequence[Any]) -> None:
        if not all(kind is ctypes.c_int64 or isinstance(kind, _Address) for kind in fields):
            raise ValueError(f"{name}: expected fields of 64 bits")
        self._name, self._pack = name, struct.Struct(f"{len(fields)}q").pack
        self._addresses = [
            (number, kind.address)
            for number, kind in enumerate(fields)
            if isinstance(kind, _Address)
        ]
        self._count = len(fields)

    def from_param(self, values: Sequence[Sequence[Any]]) -> bytes:
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"expected a list of {self._name}, got {values!r}")
        return b"".join(map(self._packed, values))

    def _packed(self, values: Sequence[Any]) -> bytes:
        fields = list(values)
        if len(fields) != self._count:
            raise TypeError(f"{self._name}: expected {self._count} fields, got {len(fields)}")
        for number, address in self._addresses:
            fields[number] = address(fields[number]) or 0
        try:
            return self._pack(*fields)
        except struct.error as error:
            raise TypeError(f"{self._name}: expected integers, got {fields}") from error


_PARAMETERS: dict[str, Any] = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "void*": _Address(None),
    "float*": _Address(torch.float32),
    "int32_t*": _Address(torch.int32),
    "uint64_t*": _Address(torch.int64),  # torch has few ops on unsigned integers
}
# Parameters that are what their name says. torch has the address of a stream as an integer.
_NAMED = {"dtype": _Dtype(), "stream": ctypes.c_size_t}
_RESULTS = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "char*": ctypes.c_char_p}


def _structs(code: str) -> dict[str, _Structs]:
    """Return the parameters of arrays of the structs that a header defines, by their types."""
    found = {}
    for inside, name in re.findall(r"typedef struct \{([^}]*)\} (\w+);", code):
        declarations = re.findall(r"(\w+\*?) ([^;]+);", inside)
        fields = [_PARAMETERS[kind] for kind, words in declarations for _ in words.split(",")]
        found[f"{name}*"] = _Structs(name, fields)
    return found


def signatures(header: str) -> dict[str, tuple[Any, list[Any]]]:
    """Return the result and the parameters of each function that a header declares, for ctypes.

    Args:
        header: text in the style of csrc/cuda/api.h.

    Raises:
        ValueError: a declaration is unlike those, or has a type that no parameter here stands for.

    Example:
        >>> signatures("SPARSEKD_API int sparsekd_cuda_half(int64_t count); // of it")
        {'sparsekd_cuda_half': (<class 'ctypes.c_int'>, [<class 'ctypes.c_long'>])}
    """
    code = re.sub(r"//.*|#.*|\bconst\b", "", header)
    parameters = _PARAMETERS | _structs(code)
    found = {}
    for declaration in code.split("SPARSEKD_API")[1:]:
        try:
            result, name, inside = re.findall(r"^([^(]+?)(\w+)\(([^)]*)\);", declaration)[0]
            words = [part.rsplit(maxsplit=1) for part in inside.split(",") if part.strip()]
            types = [_NAMED.get(word) or parameters[kind.strip()] for kind, word in words]
            found[name] = _RESULTS[result.strip()], types
        except (IndexError, KeyError, ValueError) as error:
            raise ValueError(f"header: cannot read{declaration}") from error
    return found


class Library:
    """The library's functions by name, without the prefix that they have in common.

    Tensors become their addresses, dtypes their codes, None the null pointer, and a list of
    structs, each a sequence of its fields, an array. Arguments that are too few, too many or not
    what the header says raise TypeError or ctypes.ArgumentError.

    Args:
        path: of the shared library.

    Raises:
        OSError: it does not load, or the driver is older than the CUDA it was built with.
    """

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        for name, (result, parameters) in signatures(HEADER.read_text()).items():
            function = getattr(self._functions, name)
            function.restype, function.argtypes = result, parameters
        code = self._functions.sparsekd_cuda_driver()
        if code:
            raise OSError(self._reason(code))

    def size(self, name: str, *args: Any) -> int:
        """Call a function that only computes a size."""
        return self._call(getattr(self._functions, PREFIX + name), args)

    def run(self, name: str, device: torch.device, *args: Any) -> None:
        """Queue a function's work behind what is queued on the device's current stream.

        Raises:
            BackendError: CUDA refused it; the message has CUDA's reason.
        """
        code = self._queue(getattr(self._functions, PREFIX + name), device, args)
        if code:
            raise BackendError(f"{name}: {self._reason(code)}")

    def _reason(self, code: int) -> str:
        return f"CUDA error {code}, {self._functions.sparsekd_cuda_error(code).decode()}"

    def _queue(self, function: Any, device: torch.device, args: tuple[Any, ...]) -> int:
        with torch.cuda.device(device):
            return self._call(function, (*args, torch.cuda.current_stream(device).cuda_stream))

    def _call(self, function: Any, args: tuple[Any, ...]) -> int:
        expected = len(function.argtypes)
        if len(args) != expected:  # ctypes lets C functions have more
            raise TypeError(f"{function.__name__}: expected {expected} arguments, got {len(args)}")
        return function(*args)


def load() -> Library:
    """Return the library of this installation.

    Raises:
        UnavailableError: it was not built, does not load, or has no GPU or driver that it can
            use; the message says which.
    """
    if not PATH.exists():
        raise UnavailableError("this build has no CUDA kernels: it found no nvcc, or nvcc failed")
    if not torch.cuda.is_available():
        raise UnavailableError("the CUDA kernels are built, but torch sees no CUDA device")
    try:
        library = _opened(PATH)
    except OSError as error:
        raise UnavailableError(f"the CUDA kernels do not load: {error}") from error
    newest = max(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    if newest < OLDEST:
        wanted, found = (".".join(map(str, capability)) for capability in (OLDEST, newest))
        raise UnavailableError(
            f"the CUDA kernels need compute capability {wanted}, the GPU has {found}"
        )
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
    except UnavailableError:
        return None
