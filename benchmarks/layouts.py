"""Time layers whose masks have a layout against csr and dense; --help lists the options.

Every convolution of a network, or linear layers, at one sparsity: the same number of weights,
chosen without structure ("csr"), with constant fan-in shared by a group of rows ("fanin:R") and in
blocks ("bcsr:B"), on the sparse kernels (maps in channels_last), and dense torch in its better
layout. Before a pass is timed, its result is compared with dense torch's on the masked weight. The
competitors of a pass take turns in one process. One JSON line a layer and pass goes to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import sparsekd as skd
from benchmarks.arena.passes import PASSES, pass_competitors
from benchmarks.cases import LINEAR_LAYERS, conv_layers
from sparsekd.bench import machine
from sparsekd.bench.cases import BASELINES, LayerCase
from sparsekd.bench.gate import relative_error, tolerance
from sparsekd.bench.layers import LayerProblem, LayerRun, Maps, layer_maps, layer_problem
from sparsekd.ops.cpu import cpp
from sparsekd.sparsity import generator_for
from sparsekd.sparsity.tiles import random_tiles, tile_counts
from sparsekd.timing import interleave

LAYOUTS = "fanin:1,fanin:8,fanin:16,fanin:32,bcsr:16,bcsr:32"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Row = dict[str, Any]


def with_layout(case: LayerCase, sparsity: float, layout: str, maps: Maps) -> LayerProblem:
    """Return a problem whose mask has a layout; "csr" is the one of every other benchmark."""
    drawn = layer_problem(case, sparsity, maps)
    if layout == "csr":
        return drawn
    kind = skd.Layout.parse(layout)
    count = tile_counts({"": case.weight_shape}, sparsity, "uniform", kind)[""]
    mask = random_tiles(case.weight_shape, kind, count, generator_for(0, f"{case.name} {layout}"))
    weight = torch.randn(case.weight_shape, generator=generator_for(0, f"{case.name} weight"))
    return LayerProblem(case, maps, weight / case.fan_in**0.5 * mask, mask)


def check(given: LayerProblem, name: str, sparse: LayerRun) -> None:
    """Raise unless a pass of the sparse kernels equals dense torch's on the masked weight."""
    dense = pass_competitors(name)["dense_contiguous"].build(given).results()
    case = given.case
    summands = case.positions if name == "wgrad" else max(case.channels, case.outs) * case.kernel**2
    for what, tensor in sparse.results().items():
        error = relative_error(tensor, dense[what])
        if error > tolerance(summands, torch.float32):
            raise SystemExit(f"{case.name} {name}: {what} is wrong by {error:.2g}")


def measure(
    case: LayerCase, name: str, sparsity: float, layouts: list[str], turns: tuple[int, str]
) -> Row:
    """Time one pass of one layer with every layout."""
    maps, calls, nnz, tiles = layer_maps(case), {}, {}, {}
    found = {n: made for n, made in pass_competitors(name).items() if made.missing(case) is None}
    sparse = found.get("sparsekd_channels_last", found["sparsekd_contiguous"])
    for layout in ("csr", *layouts):
        given = with_layout(case, sparsity, layout, maps)
        run = sparse.build(given)
        check(given, name, run)
        calls[layout], nnz[layout] = run.call, given.nnz
        indices = skd.Topology.from_mask(given.mask)
        shape = (*case.weight_shape, 1, 1)[:4]
        size = cpp.tile_size(indices.crow_indices, indices.col_indices, shape, 1)
        tiles[layout] = "x".join(map(str, size))
    dense = layer_problem(case, sparsity, maps)
    baselines = [layout for layout in BASELINES if layout in found]
    for layout in baselines:
        calls[layout] = found[layout].build(dense).call
    times = interleave(calls, turns[0], shuffle=True, clock=CLOCKS[turns[1]])
    ms = {way: round(statistics.median(taken), 3) for way, taken in times.items()}
    # A layout in whole tiles may have some weights more or less: compare the time of a weight.
    each = {layout: ms[layout] / max(nnz[layout], 1) for layout in nnz}
    return {
        "case": case.name,
        "pass": name,
        "sparsity": sparsity,
        "ms": ms,
        "times": {way: [round(turn, 3) for turn in taken] for way, taken in times.items()},
        "nnz": nnz,
        "tiles": tiles,
        "faster_than_csr": {layout: round(each["csr"] / each[layout], 3) for layout in layouts},
        "faster_than_dense": {
            layout: round(min(ms[dense] for dense in baselines) / ms[layout], 3)
            for layout in ("csr", *layouts)
        },
        "clock": turns[1],
    }


def summary(rows: list[Row], layouts: list[str]) -> str:
    """Return the geometric means over the layers, a line a pass."""
    lines = []
    for name in PASSES:
        found = [row["faster_than_csr"] for row in rows if row["pass"] == name]
        means = {
            layout: math.exp(statistics.fmean(math.log(ratios[layout]) for ratios in found))
            for layout in layouts
        }
        cells = "  ".join(f"{layout} {mean:.2f}" for layout, mean in means.items())
        lines.append(f"{name}, faster than csr: {cells}")
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for, one printed line and one row a pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet18", help="or linear: three linear layers")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--layouts", default=LAYOUTS)
    parser.add_argument("--batch", type=int, default=128, help="of a network")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine")
    parser.add_argument("--layers", type=int, help="only so many, for a look")
    parser.add_argument("--out", type=Path, help="JSONL file to append to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = {"machine": machine.describe()}
    layouts = options.layouts.split(",")
    rows = []
    cases: Sequence[LayerCase] = LINEAR_LAYERS
    if options.network != "linear":
        cases = [replace(case, batch=options.batch) for case in conv_layers((options.network,))]
    for case in cases[: options.layers]:
        for name in PASSES:
            turns = options.rounds, options.clock
            row = measure(case, name, options.sparsity, layouts, turns)
            rows.append(row)
            cells = "  ".join(f"{way} {ms:.2f}" for way, ms in row["ms"].items())
            print(f"{row['case']:>24} {name}  {cells} ms", flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row | about) + "\n")
    print(summary(rows, layouts))


if __name__ == "__main__":
    main()
