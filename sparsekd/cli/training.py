"""`sparsekd train`, `compare` and `report`: experiments and their summaries."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sparsekd import ops, terminal
from sparsekd.cli import options
from sparsekd.memory import keep_memory_warm
from sparsekd.recipes import Experiment, Recipe, RunFolder, check, get, load_data, override
from sparsekd.recipes.files import SUFFIXES, read_file
from sparsekd.recipes.report import bars, figures, read_rows, savings_table, table
from sparsekd.terminal import fail, one_line_errors
from sparsekd.train import (
    Interrupted,
    ProgressReporter,
    Reporter,
    StopRequest,
    distributed,
)
from sparsekd.train.sinks import make_sinks

_INTERRUPTED = 130


def train(
    recipe: Annotated[
        str, typer.Argument(help="A name that `sparsekd recipes` lists, or a TOML or YAML file.")
    ],
    data: options.Data = None,
    data_dir: options.DataDir = None,
    sparsity: options.Sparsity = None,
    seeds: options.Seeds = None,
    first_seed: options.FirstSeed = None,
    epochs: options.Epochs = None,
    method: Annotated[str | None, typer.Option(help="Methods, as lt,kd.")] = None,
    out: options.Out = None,
    assignments: options.Set = None,
    fresh: options.Fresh = False,
    threads: options.Threads = None,
    workers: options.Workers = None,
    backend: options.Backend = None,
    log: options.Log = None,
) -> None:
    """Train a recipe's dense network and its tickets; go on where an earlier call stopped.

    \b
    sparsekd train demo
    sparsekd train fashion-mnist --sparsity 0.9,0.98 --seeds 3
    sparsekd train rigl --data digits --epochs 20 --set dynamics.every=10
    sparsekd recipes demo --toml > mine.toml; sparsekd train mine.toml
    """
    named = {
        "data.name": data,
        "sparsities": sparsity,
        "seeds": seeds,
        "first_seed": first_seed,
        "methods": method,
    }
    run_recipe(
        recipe,
        named,
        epochs,
        assignments,
        out,
        data_dir,
        fresh,
        threads,
        backend,
        log,
        workers=workers,
    )


def compare(
    methods: Annotated[
        list[str] | None, typer.Argument(help="Methods, as kd-ticket rigl set; by default six.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="What they share: data, network, length.")
    ] = "compare",
    data: options.Data = None,
    data_dir: options.DataDir = None,
    sparsity: options.Sparsity = None,
    seeds: options.Seeds = None,
    first_seed: options.FirstSeed = None,
    epochs: options.Epochs = None,
    out: options.Out = None,
    assignments: options.Set = None,
    fresh: options.Fresh = False,
    threads: options.Threads = None,
    workers: options.Workers = None,
    backend: options.Backend = None,
    log: options.Log = None,
) -> None:
    """Train methods side by side; draw accuracy over sparsity, training FLOPs and time.

    Runs that have finished stay; more methods, sparsities and seeds can be added later.

    \b
    sparsekd compare rigl set static --seeds 3
    sparsekd compare kd-ticket gmp --data digits --set data.train_images=none
    """
    named = {
        "data.name": data,
        "sparsities": sparsity,
        "seeds": seeds,
        "first_seed": first_seed,
        "methods": ",".join(methods or []) or None,
    }
    run_recipe(
        recipe,
        named,
        epochs,
        assignments,
        out,
        data_dir,
        fresh,
        threads,
        backend,
        log,
        workers=workers,
    )


def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of an experiment, as runs/demo.")],
    html: Annotated[
        bool, typer.Option("--html", help="Write report.html too, a page that needs no network.")
    ] = False,
    log: options.Log = None,
    form: Annotated[
        str, typer.Option("--format", help="File formats of the figures, as pdf,svg,png.")
    ] = "png",
) -> None:
    """Print the table of an experiment and draw its figures again, from its raw rows.

    \b
    sparsekd report runs/demo
    sparsekd report runs/demo --format pdf,svg
    sparsekd report runs/demo --html --log csv
    """
    from sparsekd.plots import parse_formats  # matplotlib: not worth loading to train
    from sparsekd.recipes.html import write_html

    with one_line_errors(ValueError):
        sinks, formats = make_sinks(log or "", run_dir), parse_formats(form)
    _report(run_dir, terminal.console(), formats)
    rows = read_rows(run_dir)
    for sink in sinks:
        sink.begin(rows)
    if html:
        typer.echo(write_html(run_dir, rows))


def run_recipe(
    recipe: str,
    named: Mapping[str, Any] | None = None,
    epochs: int | None = None,
    assignments: Sequence[str] | None = None,
    out: Path | None = None,
    data_dir: Path | None = None,
    fresh: bool = False,
    threads: int | None = None,
    backend: str | None = None,
    log: str | None = None,
    first: Callable[[StopRequest], None] | None = None,
    before_run: Callable[[], None] | None = None,
    workers: int | None = None,
) -> None:
    """Run a recipe with the fields that options name, then those of --set, changed.

    `first` is called once all settings are checked and the folder is open; `before_run` before each
    run.
    """
    console = terminal.console()
    with one_line_errors(ValueError):
        chosen = read_file(Path(recipe)) if Path(recipe).suffix in SUFFIXES else get(recipe)
        for field, value in (named or {}).items():
            if value is not None:
                chosen = override(chosen, f"{field}={value}")
        if epochs is not None:
            chosen = chosen.with_epochs(epochs)
        for assignment in assignments or []:
            chosen = override(chosen, assignment)
        terminal.set_threads(threads)
    folder = out or Path("runs") / chosen.name
    try:
        with terminal.disk_errors("--out", folder), contextlib.ExitStack() as stack:
            if backend is not None:
                stack.enter_context(ops.backend(backend))
            reports = _run(
                chosen,
                data_dir,
                workers,
                folder,
                fresh,
                log or "",
                console,
                stack,
                first,
                before_run,
            )
    except Interrupted as interruption:
        typer.echo(f"{interruption}; the same command goes on from {folder}:\n  {_resume()}")
        raise typer.Exit(_INTERRUPTED) from None
    except distributed.LostRank as error:
        fail(f"{error}; the same command goes on from {folder}", code=1)
    except FloatingPointError as error:
        fail(error, code=1)
    if reports:
        _report(folder, console)


def _run(
    recipe: Recipe,
    data_dir: Path | None,
    workers: int | None,
    path: Path,
    fresh: bool,
    log: str,
    console: Console,
    stack: contextlib.ExitStack,
    first: Callable[[StopRequest], None] | None,
    before_run: Callable[[], None] | None,
) -> bool:
    """Train what has not finished; return whether this process is the one that reports."""
    stop = stack.enter_context(StopRequest())
    warm = keep_memory_warm()
    with one_line_errors(ValueError):
        dataset = load_data(recipe.data, data_dir, workers)
        check(recipe, dataset)  # before anything is written
        sinks = make_sinks(log, path)
    with distributed.process_group():
        main, ranks = distributed.rank() == 0, distributed.ranks()
        folder = stack.enter_context(RunFolder(path, recipe, fresh=fresh, sinks=sinks))
        if first is not None:
            first(stop)
        reporter = stack.enter_context(ProgressReporter(console)) if main else Reporter()
        stack.enter_context(terminal.warnings_by_kind(reporter.message))
        reporter.message(_mode(warm, ranks))
        experiment = Experiment(
            recipe, dataset, folder, reporter=reporter, stop=stop, before_run=before_run
        )
        experiment.run()
    if main and ranks == 1:
        reporter.message("measuring a training step of every run, sparse and dense")
        experiment.time_steps()
    return main


def _mode(warm: bool, ranks: int) -> str:
    text = (
        "freed memory stays mapped (keep_memory_warm), for sparse and dense alike"
        if warm
        else "freed memory is returned to the system (keep_memory_warm has no effect here)"
    )
    return text if ranks == 1 else f"{ranks} processes, each with its share of every batch; {text}"


def _resume() -> str:
    """Return the command line that goes on: this one, less what would start over."""
    return shlex.join(["sparsekd", *(word for word in sys.argv[1:] if word != "--fresh")])


def _report(path: Path, console: Console, formats: Sequence[str] = ("png",)) -> None:
    rows = read_rows(path)
    for part in (table(rows), bars(rows), savings_table(rows)):
        if part.row_count:
            console.print(part)
    for file in figures(rows, path, formats):
        console.print(str(file), highlight=False, soft_wrap=True)
    console.print(str(path / "metrics.jsonl"), highlight=False, soft_wrap=True)
