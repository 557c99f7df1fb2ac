"""Which kernels run: passes of sparse layers, timed sparse and dense; and when dense would win."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsekd._torch import onednn_computes
from sparsekd.diagnose.breakeven import PassTimes, time_pass
from sparsekd.diagnose.coverage import Coverage, coverage
from sparsekd.diagnose.inputs import example_inputs, random_input, tensors_in
from sparsekd.errors import BackendError, ShapeError
from sparsekd.modes import in_mode
from sparsekd.nn import SparseModule, sparse_modules
from sparsekd.ops import observe
from sparsekd.ops.dispatch import cache_key
from sparsekd.ops.dispatch.backends import module
from sparsekd.ops.dispatch.decisions import decide
from sparsekd.terminal import Columns

PASSES = {
    f"{kind}{suffix}": name
    for kind in ("conv2d", "linear")
    for suffix, name in (("", "fprop"), ("_dgrad", "dgrad"), ("_wgrad", "wgrad"))
}


@dataclass(frozen=True)
class LayerReport:
    """One sparse layer in a training step, all its calls together.

    Args:
        name: of the module in the model.
        shape: of its weight.
        nnz: weights stored.
        passes: time, backend and its reason of each direction, "fprop", "dgrad" and "wgrad"; a
            layer whose input needs no gradient has no dgrad.
        tile: output and input channels of the tiles that the kernels found the weight to consist
            of; (1, 1) for one without structure.
    """

    name: str
    shape: tuple[int, ...]
    nnz: int
    passes: dict[str, PassTimes]
    tile: tuple[int, int] = (1, 1)

    @property
    def density(self) -> float:
        """Share of the weight that is stored."""
        return self.nnz / max(math.prod(self.shape), 1)

    @property
    def ms(self) -> float:
        """Time of all passes as they run."""
        return sum(times.ms for times in self.passes.values())

    @property
    def dense_ms(self) -> float:
        """Time of all passes with a dense weight."""
        return sum(times.dense_ms for times in self.passes.values())

    @property
    def bf16_ms(self) -> float | None:
        """Time of all passes with a dense weight in bfloat16, None where it was not timed."""
        return sum(self.passes.values(), start=PassTimes.zero()).bf16_ms

    def ms_at(self, nnz: int) -> float | None:
        """Return the time of all passes on the sparse kernels with another number of nonzeros.

        It is that of a line through times at several densities; None without sparse kernels.
        """
        both = sum(self.passes.values(), start=PassTimes.zero())
        if both.sparse_ms is None:
            return None
        return both.sparse_ms_at(nnz / max(math.prod(self.shape), 1))

    @property
    def break_even(self) -> float | None:
        """Sparsity from which on the sparse kernels are faster in sum, None if never or unknown."""
        return sum(self.passes.values(), start=PassTimes.zero()).break_even


@dataclass(frozen=True)
class Explanation:
    """All sparse layers of a network; print it for a table.

    Args:
        layers: in the order of their first call.
        threads: of torch, when it was measured.
        coverage: how much of the network is sparse.
    """

    layers: tuple[LayerReport, ...]
    threads: int
    coverage: Coverage

    @property
    def ms(self) -> float:
        """Time of all sparse layers as they run."""
        return sum(layer.ms for layer in self.layers)

    @property
    def dense_ms(self) -> float:
        """Time of the same layers with dense weights."""
        return sum(layer.dense_ms for layer in self.layers)

    @property
    def bf16_ms(self) -> float | None:
        """Time of the same layers with dense weights in bfloat16, None where it was not timed."""
        times = [layer.bf16_ms for layer in self.layers]
        return None if None in times else sum(ms for ms in times if ms is not None)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the table, its header first."""
        names = ("fprop", "dgrad", "wgrad")
        rows: list[tuple[str, ...]] = [
            ("layer", "weight", "density", "tiles", *names, "all passes", "bf16", "break-even")
        ]
        for layer in self.layers:
            cells = [_pair(layer.passes.get(name)) for name in names]
            rows.append(
                (
                    layer.name,
                    "x".join(map(str, layer.shape)),
                    f"{layer.density:.3g}",
                    "none" if layer.tile == (1, 1) else "x".join(map(str, layer.tile)),
                    *cells,
                    f"{layer.ms:.3g} / {layer.dense_ms:.3g}",
                    _number(layer.bf16_ms),
                    _break_even(layer),
                )
            )
        total = f"{self.ms:.3g} / {self.dense_ms:.3g}"
        rows.append(("total", *[""] * 6, total, _number(self.bf16_ms), ""))
        return rows

    @property
    def caption(self) -> str:
        """Explanation of the table, and the share of the network it covers."""
        return (
            f"{self.coverage}\n"
            f"Reasons for what runs, and passes: {self._reasons()}\n"
            "Passes: ms sparse / dense, * is what runs. All passes: ms as they run / dense. "
            "Tiles: output x input channels that are there together. "
            f"{self._bf16()} "
            "Break-even: the sparsity from which on the sparse kernels are faster. "
            f"{self.threads} threads."
        )

    def _bf16(self) -> str:
        if self.bf16_ms is not None:
            return "Bf16: all passes dense in bfloat16, as under autocast."
        if not onednn_computes(torch.bfloat16):
            return (
                "Bf16: not timed, as this processor has no instructions for it and dense bfloat16 "
                "is slower here than dense float32."
            )
        return "Bf16: not timed, as no sparse kernels run in float32 on the CPU."

    def _reasons(self) -> str:
        reasons = Counter(t.reason for layer in self.layers for t in layer.passes.values())
        return "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, self.caption])

    def __rich__(self) -> Columns:
        header, *rows = self.rows()
        return Columns(header, rows, note=self.caption, left=2)


def _number(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.3g}"


def _break_even(layer: LayerReport) -> str:
    if any(times.sparse_ms is None for times in layer.passes.values()):
        return "-"
    return "never" if layer.break_even is None else f"{layer.break_even:.0%}"


def _pair(times: PassTimes | None) -> str:
    if times is None:
        return "-"
    if times.sparse_ms is None:
        return f"{times.backend} {times.ms:.3g}"
    marks = ("", "*") if times.backend == "dense" else ("*", "")
    return f"{times.sparse_ms:.3g}{marks[0]} / {times.dense_ms:.3g}{marks[1]}"


class _Watcher:
    """A listener that times every pass of a model's sparse layers as it is called."""

    def __init__(self, layers: dict[str, SparseModule], advance: Callable[[], None]) -> None:
        self.layers = layers
        self.found: dict[str, dict[str, PassTimes]] = {}
        self.tiles: dict[str, tuple[int, int]] = {}
        self._advance = advance
        self._known: dict[Any, PassTimes] = {}

    def on_call(self, op: str, args: tuple[Any, ...]) -> bool:
        """Time a call, unless one just like it was.

        Nobody else sees it: to a method that grows weights this is no training.
        """
        name = observe.owner(self.layers, args[2]) if op in PASSES else None
        if name is None:
            return False
        decision, tile = decide(op, args), _tile_size(op, args)
        self.tiles.setdefault(name, tile)
        # Backend and tiles hang on the structure, of which these are the sizes only.
        alike = op, decision.backend, decision.reason, tile, cache_key.sizes_of(args)
        if alike not in self._known:
            times = time_pass(op, args, decision.backend)
            self._known[alike] = replace(times, reason=decision.reason)
        passes = self.found.setdefault(name, {})
        passes[PASSES[op]] = passes.get(PASSES[op], PassTimes.zero()) + self._known[alike]
        self._advance()
        return True


def _tile_size(op: str, args: tuple[Any, ...]) -> tuple[int, int]:
    try:
        dispatch = module("auto")
    except BackendError:  # no compiled module, and so no kernels that use tiles
        return 1, 1
    return dispatch.tile_size(op, (*args[:2], args[2].cpu(), args[3].cpu(), *args[4:]))


def explain(
    model: nn.Module,
    *args: Any,
    memory_format: torch.memory_format = torch.channels_last,
    **kwargs: Any,
) -> Explanation:
    """Time each pass of each sparse layer, sparse and dense, and say what runs and why.

    The network runs forward and backward once, backward from all its outputs, in evaluation mode;
    its parameters, gradients, statistics and training flags stay as they were. What was never
    measured on this machine is, and the choices are kept as in training.

    Args:
        model: any network with sparse layers.
        *args: its inputs, the batch included. A tuple or list of integers stands for random
            numbers in this shape.
        memory_format: of an input of four dimensions that is given as a shape.
        **kwargs: inputs by name. `args=` and `kwargs=` alone may hold all of them, as a tuple and
            a dictionary.

    Returns:
        One row per layer, and totals; printing it gives a table.

    Raises:
        ShapeError: the network has no output that depends on a trainable parameter.

    Example:
        >>> import sparsekd as skd
        >>> found = explain(skd.nn.SparseLinear(64, 32, sparsity=0.9), (16, 64))
        >>> sorted(found.layers[0].passes)
        ['fprop', 'wgrad']
    """
    make = partial(random_input, memory_format=memory_format)
    inputs, named = example_inputs(model, args, kwargs, make)
    layers = dict(sparse_modules(model))
    with _progress(len(layers)) as advance:
        watcher = _Watcher(layers, advance)
        with observe.listeners.before(watcher), in_mode(model, training=False), torch.enable_grad():
            _run(model, inputs, named)
    return Explanation(
        tuple(
            LayerReport(
                name,
                tuple(layers[name].weight_shape),
                layers[name].values.numel(),
                passes,
                watcher.tiles[name],
            )
            for name, passes in watcher.found.items()
        ),
        torch.get_num_threads(),
        coverage(model),
    )


def _run(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    outputs = [t for t in tensors_in(model(*inputs, **named)) if t.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not outputs or not parameters:
        raise ShapeError("model: expected an output that depends on trainable parameters")
    ones = [torch.ones_like(output) for output in outputs]
    torch.autograd.grad(outputs, parameters, ones, allow_unused=True)


@contextmanager
def _progress(layers: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("timing each pass both ways", total=3 * layers)
        yield partial(progress.advance, task)
