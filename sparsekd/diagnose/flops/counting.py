"""A run of a network under torch's FLOP counter, with its operations attributed to weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.compiler import set_stance
from torch.utils.flop_counter import FlopCounterMode

from sparsekd._torch import compiler_imported
from sparsekd.diagnose.flops.formulas import FORMULAS
from sparsekd.diagnose.flops.rows import FlopCount
from sparsekd.diagnose.flops.weights import Attribution
from sparsekd.diagnose.inputs import example_inputs
from sparsekd.modes import in_mode


def count(model: nn.Module, *args: Any, **kwargs: Any) -> FlopCount:
    """Count the operations of a network on example inputs.

    What `torch.utils.flop_counter` counts is counted, and the layers and products that it leaves
    out on a CPU (recurrent and bilinear layers, attention, products with a vector) as well. A
    weight costs ``2 * nnz * positions`` in a forward pass, whether it belongs to a convolution, a
    transposed one, a linear, recurrent or attention layer or is a bare parameter. Products of two
    activations, such as those of attention, have rows of their own. Training costs three times the
    forward pass: once forward, once for the gradient of the input, once for that of the values.
    The first layer's input gradient is counted although no training step computes it, as in the
    papers whose figures these are compared with. Biases, normalisation, activations, pooling,
    embeddings and the loss are left out.

    The network runs once, in evaluation mode and without autograd; its training flags, its
    BatchNorm statistics and the state of the random number generators stay as they were. On the
    meta device it costs no time.

    Args:
        model: any network, with sparse layers or without.
        *args: its inputs, the batch dimension included. A tuple or list of integers stands for
            zeros of this shape.
        **kwargs: inputs by name. `args=` and `kwargs=` alone may hold all of them, as a tuple and
            a dictionary.

    Returns:
        Totals and one row per weight, exact integers.

    Source: Evci et al., Rigging the Lottery (2020), appendix H.

    Example:
        >>> print(count(nn.Linear(8, 4), (1, 8)).forward)
        64
        >>> tokens = torch.zeros(2, 5, dtype=torch.long)
        >>> count(nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 4)), tokens).forward
        640
    """
    inputs, named = example_inputs(model, args, kwargs, _zeros)
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    attribution = Attribution(model, counter)
    with ExitStack() as stack:
        stack.enter_context(in_mode(model, training=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_same_random_numbers(model))
        stack.enter_context(_layer_by_layer())
        stack.enter_context(counter)
        stack.enter_context(attribution)
        model(*inputs, **named)
    return attribution.result()


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, device=device, dtype=dtype)


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Leave the generators of the CPU and of the model's GPUs as they were."""
    gpus = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(gpus)):
        yield


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """Run compiled code as it was written, and encoder layers without their fused kernel."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # The call imports the compiler, which takes seconds; where nothing did, nothing is compiled.
    compiles = compiler_imported()
    try:
        with warnings.catch_warnings(), set_stance("force_eager") if compiles else nullcontext():
            # The counter's hooks on all modules fire twice for a compiled one, which is harmless.
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
