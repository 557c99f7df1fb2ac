"""Could other choices of the dispatcher have made a step faster?

Every pass of every layer of a network's step is timed both ways, sparse and dense, on the operands
of a real step, and what the measured choices take is compared with what the best ones would. The
first convolution and the last linear layer stay dense. One JSON line per network and sparsity goes
to --out; lines that are there already are not measured again. --help lists the options.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sparsekd as skd
from benchmarks.cases import MODELS
from sparsekd.bench.steps import STEP_COMPETITORS, StepProblem, step_problem
from sparsekd.ops import observe
from sparsekd.ops.cpu import cpp, dense
from sparsekd.ops.dispatch.choices import surroundings
from sparsekd.ops.dispatch.decisions import decide
from sparsekd.timing import interleave
from sparsekd.train import MetricsLog

PASSES = (
    *(f"conv2d{p}" for p in ("", "_dgrad", "_wgrad")),
    *(f"linear{p}" for p in ("", "_dgrad", "_wgrad")),
)


class Passes:
    """Listen to the passes of a step and time each both ways."""

    watched = None

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.chosen: list[str] = []
        self.times: list[dict[str, float]] = []

    def on_call(self, op: str, args: tuple[Any, ...]) -> None:
        """Note which backend is chosen for a call, and what each takes."""
        if op not in PASSES:
            return
        self.chosen.append(decide(op, args).backend)
        ways = {"cpp": getattr(cpp, op), "dense": getattr(dense, op)}
        calls: dict[str, Callable[[], object]] = {n: partial(run, *args) for n, run in ways.items()}
        times = interleave(calls, self.rounds, settle=True)
        self.times.append({name: statistics.median(taken) for name, taken in times.items()})


def regret(given: StepProblem, rounds: int) -> dict[str, Any]:
    """Compare the measured choices with the best ones, pass by pass."""
    step = STEP_COMPETITORS["sparsekd"].build(given).call
    step()  # where nothing is known yet, this measures
    passes = Passes(rounds)
    observe.listeners.add(passes)
    step()
    observe.listeners.discard(passes)
    taken = sum(t[name] for t, name in zip(passes.times, passes.chosen, strict=True))
    best = sum(min(t.values()) for t in passes.times)
    return {
        "passes": len(passes.times),
        "chosen_ms": round(taken, 2),
        "best_ms": round(best, 2),
        "all_sparse_ms": round(sum(t["cpp"] for t in passes.times), 2),
        "all_dense_ms": round(sum(t["dense"] for t in passes.times), 2),
        "regret": round(taken / best - 1, 4),
        "dense_share": round(passes.chosen.count("dense") / len(passes.chosen), 3),
        "rounds": rounds,
    }


def main() -> None:
    """Measure and print one line per network and sparsity."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sparsity", default="0,0.5,0.7,0.8,0.9,0.95,0.98")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSONL file to append to and go on from")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    skd.keep_memory_warm()
    log = MetricsLog(options.out) if options.out else None
    done = set()
    if log:
        log.keep(lambda row: True)  # drops a line that a kill cut short
        done = {(row["model"], row["sparsity"], row["batch"]) for row in log.rows()}
    for name in options.models.split(","):
        for sparsity in map(float, options.sparsity.split(",")):
            if (name, sparsity, options.batch) in done:
                continue
            given = step_problem(replace(MODELS[name], batch=options.batch), sparsity)
            row = {"what": "regret", "model": name, "sparsity": sparsity, "batch": options.batch}
            row |= regret(given, options.rounds)
            row |= {"threads": options.threads, "machine": surroundings()}
            print({key: row[key] for key in row if key not in ("machine", "what")}, flush=True)
            if log:
                log.append(row)


if __name__ == "__main__":
    main()
