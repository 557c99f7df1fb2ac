"""Time what RigL's growth costs, by layer and by training step; --help lists the options.

Layers: the dense weight gradient of torch in both layouts against growth, the same gradient tile by
tile with a running top-k of 3 % of the positions, in turns in one process. Growth's positions are
first compared with those of torch.topk on the full gradient. Steps: a plain step, a step that
updates the topology instead of the optimizer step, and the first step after it, which makes new
plans; the longer epoch is what the last two take more than a plain step, over `every` steps.
One JSON line a row goes to --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekd as skd
from benchmarks.cases import MODELS, conv_layers
from sparsekd.bench import machine
from sparsekd.bench.cases import LayerCase, dense_ends
from sparsekd.dst import growers
from sparsekd.memory import keep_memory_warm
from sparsekd.ops import growth
from sparsekd.sparsity import generator_for, random_mask
from sparsekd.timing import interleave
from sparsekd.train import to_channels_last

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Row = dict[str, Any]


def dense_gradient(case: LayerCase, grad: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """Return a call that computes the weight gradient as torch does."""
    stride, padding = [case.stride] * 2, [case.padding] * 2
    weight = grad.new_empty(case.weight_shape)
    mask = [False, True, False]

    def run() -> Tensor:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, mask
        )[1]

    return run


def grown(
    case: LayerCase, kept: skd.Topology, k: int, grad: Tensor, x: Tensor
) -> Callable[[], Tensor]:
    """Return a call that finds the positions to grow."""
    geometry = [list(case.weight_shape), [case.stride] * 2, [case.padding] * 4, [1, 1], 1]

    def run() -> Tensor:
        return growers.largest_magnitude(growth.gradient([(grad, x, geometry)]), kept, k)

    return run


def check(case: LayerCase, kept: skd.Topology, k: int, gradient: Tensor, found: Tensor) -> None:
    """Raise unless the positions are those of torch.topk, up to ties within rounding."""
    score = gradient.reshape(-1).abs().masked_fill(kept.mask().view(-1), -1)
    least = score.topk(k).values[-1]
    if len(found) != k or score[found].min() < least * (1 - 1e-3):
        raise SystemExit(f"{case.name}: growth is wrong, no time is printed")


def measure_layer(case: LayerCase, density: float, rounds: int) -> Row:
    """Time one layer's dense gradients and growth."""
    rows, cols = case.outs, case.fan_in
    mask = random_mask((rows, cols), round(density * rows * cols), generator=generator_for(0))
    kept = skd.Topology.from_mask(mask)
    k = round(0.3 * kept.nnz)
    x, grad = torch.randn(case.input_shape), torch.randn(case.output_shape)
    calls: dict[str, Callable[[], Tensor]] = {}
    for layout, memory_format in LAYOUTS.items():
        operands = [t.contiguous(memory_format=memory_format) for t in (grad, x)]
        calls[f"dense_{layout}"] = dense_gradient(case, *operands)
        calls[f"growth_{layout}"] = grown(case, kept, k, *operands)
        check(case, kept, k, calls[f"dense_{layout}"](), calls[f"growth_{layout}"]())
    times = interleave(calls, rounds, settle=True)
    ms = {name: round(statistics.median(turns), 3) for name, turns in times.items()}
    best = min(ms[f"dense_{layout}"] for layout in LAYOUTS)
    return {
        "level": "layer",
        "case": case.name,
        "ms": ms,
        "times": {name: [round(turn, 3) for turn in turns] for name, turns in times.items()},
        "ratio": {layout: round(ms[f"growth_{layout}"] / best, 3) for layout in LAYOUTS},
    }


def measure_steps(name: str, sparsity: float, updates: int, every: int) -> Row:
    """Time plain steps, updates and the steps after them."""
    case = MODELS[name]
    model = case.build()
    skd.sparsify(model, sparsity=sparsity, distribution="uniform", skip=dense_ends(model))
    model = to_channels_last(skd.optimize(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    dst = skd.dst.RigL(model, optimizer, drop_fraction=0.3, every=5, until=10**9)
    x = torch.randn(case.batch, *case.input_shape).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (case.batch,))
    times: dict[str, list[float]] = {"plain": [], "update": [], "after": []}
    for iteration in range(1, 5 * (updates + 1) + 3):
        begin = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if not dst.step():
            optimizer.step()
        kind = {0: "update", 1: "after"}.get(iteration % 5, "plain")
        if iteration > 6:  # the first cycle warms up
            times[kind].append((time.perf_counter() - begin) * 1e3)
    ms = {kind: round(statistics.median(turns), 2) for kind, turns in times.items()}
    longer = (ms["update"] + ms["after"] - 2 * ms["plain"]) / (every * ms["plain"])
    return {
        "level": "step",
        "case": case.title,
        "sparsity": sparsity,
        "every": every,
        "ms": ms,
        "times": {kind: [round(turn, 2) for turn in turns] for kind, turns in times.items()},
        "longer_epoch_percent": round(100 * longer, 3),
    }


def main() -> None:
    """Measure what is asked for, one printed line and one row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="resnet18,resnet20")
    parser.add_argument("--layers-of", default="resnet18,resnet50", help="networks, or nothing")
    parser.add_argument("--sparsity", default="0.8,0.9,0.95,0.98", help="of the steps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSONL file to append to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_memory_warm()
    about = {"machine": machine.describe()}

    def record(row: Row, text: str) -> None:
        print(f"{row['case']:>24} {text}", flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row | about) + "\n")

    for case in conv_layers(tuple(filter(None, options.layers_of.split(",")))):
        row = measure_layer(case, 0.1, options.rounds)
        ms = "  ".join(f"{name} {value:.1f}" for name, value in row["ms"].items())
        record(
            row, f"{ms}  ratio {row['ratio']['contiguous']:.2f} {row['ratio']['channels_last']:.2f}"
        )
    for name in filter(None, options.networks.split(",")):
        for sparsity in map(float, options.sparsity.split(",")):
            row = measure_steps(name, sparsity, options.updates, options.every)
            ms = "  ".join(f"{kind} {value:.1f} ms" for kind, value in row["ms"].items())
            record(
                row, f"{sparsity:.2f}  {ms}  epoch longer by {row['longer_epoch_percent']:.2f} %"
            )


if __name__ == "__main__":
    main()
