"""The command line: train, report, benchmark, explain, show versions and backends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.distributed.elastic.multiprocessing.errors import record

from sparsekd import diagnose, models, ops, terminal
from sparsekd.analysis.command import app as analysis
from sparsekd.bench.command import command as bench_command
from sparsekd.bench.suite import SUITE
from sparsekd.errors import SparsekdError
from sparsekd.memory import keep_memory_warm
from sparsekd.nn import sparsify
from sparsekd.recipes import RECIPES, Experiment, Recipe, RunFolder, get, load_data, override
from sparsekd.recipes.report import figures, read_rows, table
from sparsekd.terminal import fail, one_line_errors
from sparsekd.train import (
    Interrupted,
    ProgressReporter,
    Reporter,
    StopRequest,
    distributed,
)

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
_INTERRUPTED = 130


# Options that commands share.
_Data = Annotated[str | None, typer.Option(help="Data set instead of the recipe's.")]
_DataDir = Annotated[Path | None, typer.Option(help="Folder of the data files.")]
_Sparsity = Annotated[str | None, typer.Option(help="Sparsities, as 0.9,0.98.")]
_Seeds = Annotated[int | None, typer.Option(help="Number of seeds.")]
_FirstSeed = Annotated[int | None, typer.Option(help="The first of them; by default 0.")]
_Epochs = Annotated[int | None, typer.Option(help="Epochs; the whole schedule scales with them.")]
_Out = Annotated[Path | None, typer.Option(help="Folder of the runs; by default runs/RECIPE.")]
_Set = Annotated[
    list[str] | None, typer.Option("--set", help="Any field, as training.lr=0.05; repeatable.")
]
_Fresh = Annotated[bool, typer.Option("--fresh/--resume", help="Start over instead of going on.")]
_Threads = Annotated[int | None, typer.Option(help="Threads of torch.")]
_Backend = Annotated[
    str | None, typer.Option(help="Backend of the sparse ops: auto, cpp, dense or reference.")
]


def main() -> None:
    """Run the command line, under torchrun as one of several processes."""
    record(app)()


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A name that `sparsekd recipes` lists.")],
    data: _Data = None,
    data_dir: _DataDir = None,
    sparsity: _Sparsity = None,
    seeds: _Seeds = None,
    first_seed: _FirstSeed = None,
    epochs: _Epochs = None,
    method: Annotated[str | None, typer.Option(help="Methods, as lt,kd.")] = None,
    out: _Out = None,
    assignments: _Set = None,
    fresh: _Fresh = False,
    threads: _Threads = None,
    backend: _Backend = None,
) -> None:
    """Train a recipe's dense network and its tickets; go on where an earlier call stopped."""
    named = {
        "data.name": data,
        "sparsities": sparsity,
        "seeds": seeds,
        "first_seed": first_seed,
        "methods": method,
    }
    _train(recipe, named, epochs, assignments, out, data_dir, fresh, threads, backend)


@app.command()
def compare(
    methods: Annotated[
        list[str] | None, typer.Argument(help="Methods, as kd-ticket rigl set; by default six.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="What they share: data, network, length.")
    ] = "compare",
    data: _Data = None,
    data_dir: _DataDir = None,
    sparsity: _Sparsity = None,
    seeds: _Seeds = None,
    first_seed: _FirstSeed = None,
    epochs: _Epochs = None,
    out: _Out = None,
    assignments: _Set = None,
    fresh: _Fresh = False,
    threads: _Threads = None,
    backend: _Backend = None,
) -> None:
    """Train methods side by side; draw accuracy over sparsity, training FLOPs and time.

    Runs that have finished stay; more methods, sparsities and seeds can be added later.
    """
    named = {
        "data.name": data,
        "sparsities": sparsity,
        "seeds": seeds,
        "first_seed": first_seed,
        "methods": ",".join(methods or []) or None,
    }
    _train(recipe, named, epochs, assignments, out, data_dir, fresh, threads, backend)


def _train(
    recipe: str,
    named: dict[str, Any],
    epochs: int | None,
    assignments: list[str] | None,
    out: Path | None,
    data_dir: Path | None,
    fresh: bool,
    threads: int | None,
    backend: str | None,
) -> None:
    """Run a recipe with the fields that options name, then those of --set, changed."""
    with one_line_errors(ValueError):
        chosen = get(recipe)
        for field, value in named.items():
            if value is not None:
                chosen = override(chosen, f"{field}={value}")
        if epochs is not None:
            chosen = chosen.with_epochs(epochs)
        for assignment in assignments or []:
            chosen = override(chosen, assignment)
        chosen.check_layout()
        if threads is not None and threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {threads}")
    folder = out or Path("runs") / chosen.name
    console = terminal.console()
    with one_line_errors(SparsekdError, OSError), contextlib.ExitStack() as stack:
        if threads is not None:
            torch.set_num_threads(threads)
        if backend is not None:
            stack.enter_context(ops.backend(backend))
        _run(chosen, data_dir, folder, fresh, console, stack)


def _run(
    recipe: Recipe,
    data_dir: Path | None,
    path: Path,
    fresh: bool,
    console: Console,
    stack: contextlib.ExitStack,
) -> None:
    stop = stack.enter_context(StopRequest())
    warm = keep_memory_warm()
    dataset = load_data(recipe.data, data_dir)
    try:
        with distributed.process_group():
            first, ranks = distributed.rank() == 0, distributed.ranks()
            folder = stack.enter_context(RunFolder(path, recipe, fresh=fresh))
            reporter = stack.enter_context(ProgressReporter(console)) if first else Reporter()
            reporter.message(_mode(warm, ranks))
            experiment = Experiment(recipe, dataset, folder, reporter=reporter, stop=stop)
            experiment.run()
        if not first:
            return
        if ranks == 1:
            reporter.message("measuring a training step of every run, sparse and dense")
            experiment.time_steps()
    except Interrupted as interruption:
        typer.echo(f"{interruption}; the same command goes on from {path}")
        raise typer.Exit(_INTERRUPTED) from None
    except distributed.LostRank as error:
        fail(RuntimeError(f"{error}; the same command goes on from {path}"), code=1)
    except FloatingPointError as error:
        fail(error, code=1)
    _report(path, console)


def _mode(warm: bool, ranks: int) -> str:
    text = (
        "freed memory stays mapped (keep_memory_warm), for sparse and dense alike"
        if warm
        else "freed memory is returned to the system (keep_memory_warm has no effect here)"
    )
    return text if ranks == 1 else f"{ranks} processes, each with its share of every batch; {text}"


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Print the table of a run and draw its figures again, from its raw rows."""
    with one_line_errors(SparsekdError, OSError):
        _report(run_dir, terminal.console())


def _report(path: Path, console: Console) -> None:
    rows = read_rows(path)
    console.print(table(rows), highlight=False)
    for file in figures(rows, path):
        console.print(str(file), highlight=False, soft_wrap=True)
    console.print(str(path / "metrics.jsonl"), highlight=False, soft_wrap=True)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show every field of this recipe.")] = None,
) -> None:
    """List the recipes, or every field of one, as --set names them."""
    console = terminal.console()
    if name is None:
        listing = Table("recipe", "what it does")
        for recipe in RECIPES.values():
            listing.add_row(recipe.name, recipe.description)
        console.print(listing)
        return
    with one_line_errors(ValueError):
        for field, value in _fields(asdict(get(name))):
            console.print(f"{field} = {value}", highlight=False, soft_wrap=True)


app.command("bench")(bench_command(SUITE, "runs/bench"))
app.add_typer(analysis, name="analyze")


@app.command()
def explain(
    network: Annotated[str, typer.Argument(help="A network, as resnet18.")],
    sparsity: Annotated[float, typer.Option(help="Of the whole network.")] = 0.9,
    distribution: Annotated[str, typer.Option(help="uniform, er or erk.")] = "uniform",
    layout: Annotated[
        str, typer.Option(help="csr, bcsr, fanin or nm; with numbers as bcsr:32.")
    ] = "csr",
    batch: Annotated[int, typer.Option(help="Images per step.")] = 128,
    input_shape: Annotated[
        str, typer.Option("--input", help="Channels, height and width.")
    ] = "3,32,32",
    threads: _Threads = None,
) -> None:
    """Time each pass of each sparse layer both ways; show what runs, and when dense would win."""
    with one_line_errors(ValueError, SparsekdError):
        image = tuple(map(int, input_shape.split(",")))
        if threads is not None:
            torch.set_num_threads(threads)
        keep_memory_warm()
        model = models.build(network, num_classes=10, in_channels=image[0])
        sparsify(model, sparsity=sparsity, distribution=distribution, layout=layout)
        terminal.console().print(diagnose.explain(model, (batch, *image)))


@app.command()
def info() -> None:
    """Show versions, backends, instruction set, threads and OpenMP runtime."""
    console = terminal.console()
    facts = ops.info()
    backends = facts.pop("backends")
    for field, value in _fields(facts):
        console.print(f"{field}: {value}", highlight=False, soft_wrap=True)
    listing = Table("backend", "available", "detail")
    for name, entry in backends.items():
        listing.add_row(name, "yes" if entry["available"] else "no", entry["detail"])
    console.print(listing)


def _fields(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        elif isinstance(value, (tuple, list)):
            yield f"{prefix}{name}", ",".join(map(str, value))
        else:
            yield f"{prefix}{name}", str(value).lower() if value is None else str(value)
