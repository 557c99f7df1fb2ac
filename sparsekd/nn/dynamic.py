"""Tell torch.compile that the number of nonzeros changes."""

from __future__ import annotations

import torch

# What torch.compile calls the tensors of a sparse module whose length is its number of nonzeros.
_SOURCES = (
    r".*_parameters(?:'\])?\['values'\]$",
    r".*_buffers(?:'\])?\['col_indices'\]$",
)


def expect_other_lengths() -> None:
    """Have every later compilation take the number of nonzeros as an input, not as a constant.

    Called when that number changes for the first time, so a model whose topology keeps its size is
    compiled for that size. torch.compile takes shapes of parameters for constants, whatever marks
    they have, unless their names are among `torch.compiler.config.dynamic_sources`, where this adds
    those of `values` and `col_indices`. Lengths 0 and 1 it never takes for changing ones: a layer
    that comes down to them is compiled anew for each.
    """
    config = torch.compiler.config
    listed = [source for source in config.dynamic_sources.split(",") if source]
    missing = [source for source in _SOURCES if source not in listed]
    if missing:
        config.dynamic_sources = ",".join([*listed, *missing])
