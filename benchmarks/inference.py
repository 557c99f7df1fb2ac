"""Time frozen networks against the fastest dense engines, in turns, and against their floor.

Prints milliseconds of a batch, how much faster than the best dense engine the frozen network is,
and how near it comes to two floors: its multiplications at this processor's peak, and that with
every map through memory once. Appends its rows to a file, from which `--draw` prints the tables.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.bench import machine
from sparsekd.bench.inference_cases import InferenceCase, InferenceProblem
from sparsekd.bench.onnx_engines import ENGINES
from sparsekd.ops.cpu.cpp import peak_flops, read_bandwidth
from sparsekd.terminal import Columns
from sparsekd.timing import interleave
from sparsekd.train import MetricsLog

NETWORKS = ("resnet50", "resnet18", "encoder")
_ROUNDING = 1e-5  # of the largest result, between a frozen network and its model


def calls(
    name: str, sparsity: float, batch: int, compiled: bool
) -> tuple[dict[str, Callable[[], object]], int, int]:
    """Return what takes turns, each checked against the sparse network, its products and bytes."""
    threads = torch.get_num_threads()
    problem = InferenceProblem.of(InferenceCase(name, batch, threads), sparsity)
    sparse, dense, x = problem.model, problem.dense, problem.x
    frozen = skd.freeze(sparse, x)
    found: dict[str, Callable[[], object]] = {"dense": lambda: dense(x)}
    if x.ndim == 4:
        last = copy.deepcopy(dense).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = x.contiguous(memory_format=torch.channels_last)
        found["dense, channels_last"] = lambda: last(images)
    if compiled:
        found["dense, compiled"] = functools.partial(torch.compile(copy.deepcopy(dense)), x)
    for engine in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(engine) and importlib.util.find_spec("onnxscript"):
            run = ENGINES[engine](problem.onnx, batch, threads)
            found[engine] = functools.partial(run, x.numpy())
    found |= {"sparse, eval": lambda: sparse(x), "frozen": lambda: frozen(x)}
    with torch.no_grad():
        right = sparse(x)
    for what, call in found.items():
        with torch.no_grad():
            result = torch.as_tensor(call())
        if not torch.allclose(result, right, rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"{what}: other results than the sparse network's")
    error = float((frozen(x) - right).abs().max() / right.abs().max())
    if error > _ROUNDING:
        raise RuntimeError(f"frozen: results differ by {error:.1e} of the largest")
    return found, batch * frozen.islands[0].products, _map_bytes(dense, x)


def _map_bytes(model: nn.Module, x: Tensor) -> int:
    kept = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.LayerNorm)  # the others become part of these
    sizes: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _, __, y: sizes.append(y.nbytes))
        for module in model.modules()
        if isinstance(module, kept)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return sum(sizes)


def measure(
    name: str, sparsity: float, batch: int, rounds: int, compiled: bool
) -> dict[str, float]:
    """Return the median milliseconds of each engine, and of the floors."""
    found, products, maps = calls(name, sparsity, batch, compiled)
    with torch.no_grad():
        times = interleave(found, rounds, shuffle=True)
    medians = {what: statistics.median(taken) for what, taken in times.items()}
    threads = torch.get_num_threads()
    floor = 2e3 * products / peak_flops(threads, 0.2)
    memory = 1e3 * maps / read_bandwidth(1 << 29, threads, 0.2)
    return medians | {"floor": floor, "floor with maps": floor + memory}


def _name(row: dict[str, Any]) -> str:
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    return f"{row['network']}, batch {row['batch']}, {threads}"


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print a line for each network, batch, number of threads and sparsity."""
    lines = []
    for row in rows:
        ms = row["ms"]
        dense = {what: ms[what] for what in ms if what.startswith(("dense", *ENGINES))}
        best = min(dense, key=dense.__getitem__)
        lines.append(
            (
                *(f"{_name(row)}, {row['sparsity']:.0%}", best, f"{dense[best]:.1f}"),
                *(f"{ms[what]:.1f}" for what in ("sparse, eval", "frozen")),
                *(f"{dense[best] / ms['frozen']:.2f}", f"{ms['floor'] / ms['frozen']:.0%}"),
                f"{ms['floor with maps'] / ms['frozen']:.0%}" if "floor with maps" in ms else "",
            )
        )
    heads = (
        "",
        "best dense",
        "its ms",
        "eval ms",
        "frozen ms",
        "times faster",
        "of the floor",
        "maps too",
    )
    console.print(Columns(heads, lines, left=2))


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """Draw times faster than the best dense engine against sparsity; below 1 dense wins."""
    from sparsekd import plots  # matplotlib: not needed to measure

    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        ms = row["ms"]
        best = min(ms[what] for what in ms if what.startswith(("dense", "onnx")))
        lines.setdefault(_name(row), {})[row["sparsity"]] = best / ms["frozen"]
    figure, axes = plots.single_axes("Frozen networks", "sparsity", "times faster than dense")
    for number, (name, factors) in enumerate(lines.items()):
        points = sorted((plots.stretched(sparsity), factor) for sparsity, factor in factors.items())
        axes.plot(*zip(*points, strict=True), label=name, **plots.line_style(number))
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_ylim(0)
    shown = sorted({sparsity for factors in lines.values() for sparsity in factors})
    plots.sparsity_axis(axes, shown, "{:.0%}".format)
    axes.legend(fontsize="small")
    plots.save({"inference": figure}, folder)


def main() -> None:
    """Measure what the options name; --help lists them."""
    parser = argparse.ArgumentParser(prog="benchmarks.inference", description=__doc__)
    parser.add_argument("--network", default=",".join(NETWORKS))
    parser.add_argument("--sparsity", default="0.8,0.9,0.95")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results/inference.jsonl"))
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile as well: slow to start"
    )
    parser.add_argument("--draw", action="store_true", help="only print the tables of the rows")
    parser.add_argument("--figures", type=Path, help="draw times faster against sparsity there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    log, console = MetricsLog(options.rows), Console()
    if not options.draw:
        facts = machine.describe({})
        for name in options.network.split(","):
            for batch in map(int, options.batch.split(",")):
                for sparsity in map(float, options.sparsity.split(",")):
                    ms = measure(name, sparsity, batch, options.rounds, options.compiled)
                    row = {"network": name, "batch": batch, "threads": options.threads}
                    log.append(row | {"sparsity": sparsity, "ms": ms, "machine": facts})
                    show([row | {"sparsity": sparsity, "ms": ms}], console)
    show(list(log.rows()), console)
    if options.figures:
        draw(list(log.rows()), options.figures)


if __name__ == "__main__":
    main()
