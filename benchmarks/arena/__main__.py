"""Run the arena."""

from __future__ import annotations

import typer

from benchmarks.arena.suite import ARENA
from sparsekd.bench.command import command

if __name__ == "__main__":
    typer.run(command(ARENA, "runs/arena"))
