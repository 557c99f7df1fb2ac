"""Checkpoint files: written completely or not at all, and refused when they are damaged."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sparsekd.errors import CheckpointError
from sparsekd.train import distributed

_MAGIC = b"sparsekd training state 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
_REMEDY_MODEL = (
    "in a folder of runs, remove the folder it lies in and repeat the command, which trains this "
    "run again"
)
_REMEDY_STATE = "remove it and repeat the command, which begins this run again"


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part of it.

    In a distributed run rank 0 writes, and the others do nothing.

    Args:
        path: the file; its folder is created.
        content: all of it.

    Example:
        >>> write_atomic(Path(tempfile.mkdtemp()) / "a.txt", b"hello")
    """
    if distributed.rank() > 0:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes of all tensors, independent of their order.

    Args:
        state: a state dict of plain tensors.

    Returns:
        SHA-256 in hexadecimal; equal if and only if the states are bit-equal.

    Example:
        >>> state_hash({"a": torch.zeros(2)}) == state_hash({"a": torch.zeros(2)})
        True
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Save a model's state dict as safetensors, atomically, with a hash of its tensors.

    Bit-equal models give byte-equal files.

    Args:
        path: the file to write.
        model: dense or sparse.

    Example:
        >>> save_model(Path(tempfile.mkdtemp()) / "model.safetensors", nn.Linear(2, 2))
    """
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    # One entry only: safetensors writes several in an order that differs between processes.
    write_atomic(path, save(state, {"sha256": state_hash(state)}))


def load_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load a state dict that `save_model` wrote, and check its hash.

    Args:
        path: the file to read.

    Returns:
        The state dict.

    Raises:
        CheckpointError: the file is missing or damaged.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_model(path, nn.Linear(2, 2))
        >>> sorted(load_state(path))
        ['bias', 'weight']
    """
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get("sha256")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file: {error}; {_REMEDY_MODEL}"
        ) from error
    if expected is not None and expected != state_hash(state):
        raise CheckpointError(
            f"{path}: damaged, its tensors do not match the stored SHA-256; {_REMEDY_MODEL}"
        )
    return state


def save_training(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Save the state of an unfinished training run, atomically, with a checksum.

    Args:
        path: the file to write.
        state: tensors, numbers, strings and containers of them.

    Example:
        >>> save_training(Path(tempfile.mkdtemp()) / "training.pt", {"epoch": 3})
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    payload = buffer.getvalue()
    write_atomic(path, _MAGIC + hashlib.sha256(payload).digest() + payload)


def load_training(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a state that `save_training` wrote, and check its checksum.

    Args:
        path: the file to read.

    Returns:
        The state.

    Raises:
        CheckpointError: the file is missing or damaged.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "training.pt"
        >>> save_training(path, {"epoch": 3})
        >>> load_training(path)
        {'epoch': 3}
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    start = len(_MAGIC) + _DIGEST_BYTES
    if not content.startswith(_MAGIC):
        raise CheckpointError(
            f"{path}: expected a training state of sparsekd, got another file; {_REMEDY_STATE}"
        )
    if hashlib.sha256(content[start:]).digest() != content[len(_MAGIC) : start]:
        raise CheckpointError(
            f"{path}: damaged, its content does not match the stored SHA-256; {_REMEDY_STATE}"
        )
    return torch.load(io.BytesIO(content[start:]), weights_only=True)
