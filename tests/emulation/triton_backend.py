"""What tests of the backend "triton" share: torch's precision settings, and counts of launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

LAUNCHES = (
    "tile_product",
    "tile_sample",
    "shared_product",
    "shared_sample",
    "row_product",
    "row_sample",
    "take_values",
)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Set torch's precision of products in float32, "ieee" or "tf32"."""
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = precision
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def counting(launches: Counter[str], name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that counts its calls by name and makes them."""

    def run(*args: Any, **kwargs: Any) -> Any:
        launches[name] += 1
        return launch(*args, **kwargs)

    return run
