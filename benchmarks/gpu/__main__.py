"""Run the arena on a GPU."""

from __future__ import annotations

import typer

from benchmarks.gpu.suite import suite
from sparsekd.bench.command import command

if __name__ == "__main__":
    typer.run(command(suite(), "runs/gpu"))
