"""The command line: train, report, export, benchmark, explain, show versions and backends."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch.distributed.elastic.multiprocessing.errors import record

from sparsekd import __version__
from sparsekd.analysis.command import app as analysis
from sparsekd.bench import own
from sparsekd.bench.command import command as bench_command
from sparsekd.bench.suite import SUITE
from sparsekd.cli import demo, exporting, inspection, training
from sparsekd.terminal import OneLineGroup

# Without rich's markup, which would take brackets out of help texts and error messages.
app = typer.Typer(
    cls=OneLineGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line, under torchrun as one of several processes."""
    record(app)(prog_name="sparsekd")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparsekd {__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def sparsekd(
    context: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions."),
    ] = False,
) -> None:
    """Train networks whose weights are sparse, compare methods, export, benchmark.

    \b
    sparsekd demo               a race and a first table, in minutes
    sparsekd recipes            what else ships
    sparsekd bench              what is faster on this machine
    sparsekd COMMAND --help     every option, with examples

    `sparsekd --install-completion` completes commands and options in your shell.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("demo")(demo.command)
app.command()(training.train)
app.command()(training.compare)
app.command()(training.report)
app.command("export")(exporting.command)
app.command()(inspection.recipes)
app.command("bench")(bench_command(SUITE, "runs/bench"))
app.add_typer(analysis, name="analyze")
app.command()(inspection.explain)
app.command()(own.advise)
app.command()(inspection.info)
