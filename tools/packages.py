"""Packages of models for tests and benchmarks, beside any build of torch."""

from __future__ import annotations

import importlib
from contextlib import suppress
from types import ModuleType

import torch


def load_package(name: str) -> ModuleType:
    """Import a package, also where torchvision, which it may import, was built for another torch.

    torchvision's compiled ops do not load then, as those of the wheel for CUDA beside torch for the
    CPU. Its import fails while it describes two ops that no model uses and that are not there. Here
    they are declared, without anything that could compute them.

    Args:
        name: of the package, as "timm" or "lightning.pytorch".

    Raises:
        ImportError: there is no such package, or it needs one that there is not.
    """
    with suppress(ImportError):
        _load_torchvision()
    return importlib.import_module(name)


def _load_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", schema)
        importlib.import_module("torchvision")
