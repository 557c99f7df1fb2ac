"""Read pickled arrays without running anything a pickle asks for.

A pickle is a program: it may call any function it names. This reader replaces the few names that
pickled NumPy arrays use with inert stand-ins, and refuses every other name. Not even NumPy's
constructors run before the result has been checked.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from sparsekd.errors import DataError

_DTYPES = {code: np.dtype(f"<{code}") for code in ("u1", "i4", "i8")}


class _Array:
    """The description of an array in a pickle."""

    __slots__ = ("content", "dtype", "fortran", "shape")
    content: Any
    dtype: Any
    fortran: Any
    shape: Any

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.content = state


class _DType:
    """The description of a dtype in a pickle."""

    __slots__ = ("byte_order", "code")
    byte_order: str
    code: str

    def __setstate__(self, state: Any) -> None:
        self.byte_order = _text(state[1])


# The stand-ins below are called by pickles. They are instances without attributes rather than
# functions, because a pickle may also set attributes of whatever it got by name.
class _NewArray:
    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _NewDType:
    __slots__ = ()

    def __call__(self, code: Any, *_: Any) -> _DType:
        dtype = _DType()
        dtype.code, dtype.byte_order = _text(code), "|"
        return dtype


class _FromBuffer:
    __slots__ = ()

    def __call__(self, content: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
        array = _Array()
        array.content, array.dtype, array.shape = content, dtype, shape
        array.fortran = order == "F"
        return array


class _Encode:
    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"encoding {encoding!r}")
        return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _NewDType(),
    ("_codecs", "encode"): _Encode(),
}
for _package in ("numpy.core", "numpy._core"):
    _STAND_INS[f"{_package}.multiarray", "_reconstruct"] = _NewArray()
    _STAND_INS[f"{_package}.numeric", "_frombuffer"] = _FromBuffer()


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _STAND_INS[module, name]


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _assemble(found: _Array) -> np.ndarray:
    """Build the array a pickle described, once everything about it has been checked."""
    dtype, shape, content = found.dtype, found.shape, found.content
    if not isinstance(dtype, _DType) or dtype.code not in _DTYPES or dtype.byte_order == ">":
        raise pickle.UnpicklingError("an array of another type than uint8, int32 or int64")
    if isinstance(content, str):
        content = content.encode("latin1")
    if not isinstance(content, bytes | bytearray):
        raise pickle.UnpicklingError("an array without bytes")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError(f"an array of shape {shape!r}")
    flat = np.frombuffer(bytearray(content), dtype=_DTYPES[dtype.code])
    if flat.size != math.prod(shape):
        raise pickle.UnpicklingError(f"an array of shape {shape} with {flat.size} elements")
    array = flat.reshape(shape, order="F" if found.fortran else "C")
    return np.ascontiguousarray(array)


def read_pickle(path: Path) -> Any:
    """Read a pickle of plain Python values and integer arrays; nothing it names is run.

    Args:
        path: the file, written by Python 2 or 3 with any protocol.

    Returns:
        The pickled value; a dict's values that are arrays become NumPy arrays.

    Raises:
        DataError: unreadable, truncated, corrupt, or with more than plain values and integer
            arrays.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "batch")
        >>> _ = path.write_bytes(pickle.dumps({"data": np.zeros(3, np.uint8)}))
        >>> read_pickle(path)["data"]
        array([0, 0, 0], dtype=uint8)
    """
    try:
        with path.open("rb") as file:
            content = _Reader(file, encoding="bytes").load()
            if file.read(1):
                raise pickle.UnpicklingError("more bytes after its end")
        if isinstance(content, dict):
            content = {
                key: _assemble(value) if isinstance(value, _Array) else value
                for key, value in content.items()
            }
        return content
    except Exception as error:  # damaged pickles raise almost anything
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path}: expected a pickle of integer arrays; found one that cannot be read: {reason}"
        ) from error
