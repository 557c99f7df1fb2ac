"""The command line of a benchmark."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from sparsekd.bench import machine, own
from sparsekd.bench.model import given_suite
from sparsekd.bench.results import Results
from sparsekd.bench.runner import run
from sparsekd.bench.suite import BenchConfig, Suite
from sparsekd.errors import SparsekdError
from sparsekd.terminal import (
    console,
    disk_errors,
    fail,
    numbers,
    one_line_errors,
    set_threads,
    words,
)
from sparsekd.train import MetricsLog

_Level = Annotated[str | None, typer.Option(help="What to time, as layer,step.")]
_Network = Annotated[
    str | None,
    typer.Option(help="Networks, as resnet18,vgg16_bn; or your own, as package.module:factory."),
]
_Layout = Annotated[
    str, typer.Option(help="Layouts of the masks of a --model, as csr,bcsr:16,fanin:16.")
]
_Sparsity = Annotated[str | None, typer.Option(help="Sparsities, as 0.8,0.9.")]
_Competitor = Annotated[
    str | None, typer.Option(help="Only these beside the dense reference, as sparsekd,dense_bf16.")
]
_Batch = Annotated[int | None, typer.Option(help="Images or rows in a batch.")]
_Rounds = Annotated[int | None, typer.Option(help="Turns of each competitor.")]
_Threads = Annotated[int | None, typer.Option(help="Threads of torch.")]
_DeepSparse = Annotated[
    str | None, typer.Option(help="Python of an environment that has DeepSparse, for inference.")
]
_Rows = Annotated[Path, typer.Option(help="JSON-lines file of the measurements.")]
_Out = Annotated[
    Path | None, typer.Option(help="Folder of report and figures; by default that of the rows.")
]
_Seconds = Annotated[
    float | None, typer.Option(help="Begin nothing after this time; the same command goes on.")
]
_Fresh = Annotated[
    bool, typer.Option("--fresh/--resume", help="Measure again what is there already.")
]
_Formats = Annotated[
    str, typer.Option("--format", help="File formats of the figures, as pdf,svg,png.")
]
_Draw = Annotated[bool, typer.Option("--draw", help="Measure nothing; report on the rows.")]


def command(suite: Suite, folder: str) -> Callable[..., None]:
    """Return the function that typer makes a command of; its rows go to `folder` by default."""

    def bench(
        level: _Level = None,
        network: _Network = None,
        model: own.Model = None,
        input_shape: own.Input = None,
        inputs: own.Inputs = None,
        layout: _Layout = "csr",
        sparsity: _Sparsity = None,
        competitor: _Competitor = None,
        batch: _Batch = None,
        rounds: _Rounds = None,
        threads: _Threads = None,
        deepsparse: _DeepSparse = None,
        rows: _Rows = Path(folder) / "rows.jsonl",
        out: _Out = None,
        seconds: _Seconds = None,
        fresh: _Fresh = False,
        draw: _Draw = False,
        formats: _Formats = "png",
    ) -> None:
        terminal = console()
        with one_line_errors(SparsekdError, OSError, ValueError):
            if ":" in (network or ""):
                sys.path.insert(0, "")  # a factory may lie in the current folder
            chosen = suite
            if model is None and (inputs is not None or layout != "csr"):
                name = "--layout" if inputs is None else "--inputs"
                raise ValueError(f"{name}: expected a --model that it is for")
            if model is not None:
                if network is not None:
                    raise ValueError("--network: expected no --model beside it")
                case = own.given(model, input_shape, inputs)
                chosen = given_suite(case, words("--layout", layout))
            config = BenchConfig(
                levels=_words("--level", level),
                networks=_words("--network", network),
                input_shape=None if model is not None else own.image(input_shape),
                sparsities=None if sparsity is None else numbers("--sparsity", sparsity),
                competitors=_words("--competitor", competitor),
                batch=batch,
                rounds=rounds,
                threads=threads,
                deepsparse=deepsparse,
            )
            from sparsekd.plots import parse_formats  # matplotlib: only when a command runs

            forms = parse_formats(formats)
            set_threads(threads)
            if seconds is not None and not seconds > 0:  # nan is not
                raise ValueError(f"--seconds: expected a positive number, got {seconds:g}")
            if not draw:
                sessions = chosen.sessions(config)
                # Choices of the dispatcher are those of this run, not of a busy day before it.
                if not os.environ.get("SPARSEKD_CACHE"):
                    os.environ["SPARSEKD_CACHE"] = str((rows.parent / "choices").absolute())
                if fresh:
                    rows.unlink(missing_ok=True)
                limit = math.inf if seconds is None else seconds
                with disk_errors("--rows", rows.parent):  # now, not after a race
                    rows.parent.mkdir(parents=True, exist_ok=True)
                facts = machine.describe(chosen.machine())
                if not run(sessions, MetricsLog(rows), facts, terminal, limit):
                    terminal.print("time is up; the same command goes on", highlight=False)
            results = Results.read(rows)
            for grid in chosen.tables(results):
                terminal.print(grid.rich(), highlight=False)
            for file in chosen.write(results, out or rows.parent, rows, forms):
                terminal.print(str(file), highlight=False, soft_wrap=True)
            terminal.print(str(rows), highlight=False, soft_wrap=True)
        found = results.shortfalls()
        if any(what != "skipped" and chosen.ours(row["arm"]) for what, row in found):
            fail(ValueError("sparsekd raised or gave wrong results; see above"), code=1)

    bench.__doc__ = suite.help
    return bench


def _words(flag: str, text: str | None) -> tuple[str, ...] | None:
    return None if text is None else words(flag, text)
