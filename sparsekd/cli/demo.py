"""`sparsekd demo`: a race, then tickets, in minutes."""

from __future__ import annotations

import os

import typer

from sparsekd import terminal
from sparsekd.bench.demo import race
from sparsekd.cli import options, training
from sparsekd.train import StopRequest


def command(
    out: options.Out = None, fresh: options.Fresh = False, threads: options.Threads = None
) -> None:
    """Race sparse against dense for seconds, then train tickets and RigL, on data that ship.

    Takes about four minutes on two idle cores. Processors that other processes keep busy are left
    to them, unless --threads or OMP_NUM_THREADS says how many to use.

    \b
    sparsekd demo
    sparsekd report runs/demo
    """
    console = terminal.console()
    with terminal.one_line_errors(ValueError):
        terminal.set_threads(threads)
    fitting = None
    if threads is None and not os.environ.get("OMP_NUM_THREADS"):
        fitting = terminal.FittingThreads(typer.echo)
    fit = fitting or (lambda: None)

    def begin(stop: StopRequest) -> None:
        def before_race() -> None:
            stop.check()
            fit()

        race(console, before_race)

    training.run_recipe("demo", out=out, fresh=fresh, first=begin, before_run=fit)
