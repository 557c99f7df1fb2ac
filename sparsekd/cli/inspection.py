"""`sparsekd recipes`, `explain` and `info`: what there is, and what runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from sparsekd import diagnose, models, ops, terminal
from sparsekd.bench import own
from sparsekd.cli import options
from sparsekd.errors import UnsupportedError
from sparsekd.memory import keep_memory_warm
from sparsekd.nn import optimize, sparsify
from sparsekd.recipes import GROUPS, get
from sparsekd.recipes.files import to_toml
from sparsekd.terminal import Columns, fail, one_line_errors


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show every field of this recipe.")] = None,
    toml: Annotated[
        bool, typer.Option("--toml", help="As a file that `sparsekd train` takes.")
    ] = False,
) -> None:
    """List the recipes, or every field of one, as --set names them.

    \b
    sparsekd recipes
    sparsekd recipes rigl
    sparsekd recipes rigl --toml > mine.toml
    """
    console = terminal.console()
    if name is None and toml:
        fail("--toml: expected the name of a recipe, as `sparsekd recipes demo --toml`", code=2)
    if name is None:
        for group, members in GROUPS.items():
            lines = [(recipe.name, recipe.description) for recipe in members]
            console.print(Columns(("recipe", "what it does"), lines, group, left=2))
        return
    with one_line_errors(ValueError):
        if toml:
            typer.echo(to_toml(get(name)), nl=False)
            return
        for field, value in _fields(asdict(get(name))):
            console.print(f"{field} = {value}", highlight=False, soft_wrap=True)


def explain(
    network: Annotated[str | None, typer.Argument(help="A network, as resnet18.")] = None,
    model: own.Model = None,
    sparsity: Annotated[float, typer.Option(help="Of the whole network.")] = 0.9,
    distribution: Annotated[str, typer.Option(help="uniform, er or erk.")] = "uniform",
    layout: Annotated[
        str, typer.Option(help="csr, bcsr, fanin or nm; with numbers as bcsr:32.")
    ] = "csr",
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 128,
    input_shape: own.Input = None,
    inputs: own.Inputs = None,
    threads: options.Threads = None,
) -> None:
    """Time each pass of each sparse layer both ways; show what runs, and when dense would win.

    \b
    sparsekd explain resnet18 --sparsity 0.95
    sparsekd explain wrn22_2 --layout bcsr:8 --batch 64
    sparsekd explain --model net.py:make --input 8,128:int64:30522
    """
    with one_line_errors(ValueError, UnsupportedError):
        if (network is None) == (model is None):
            raise ValueError("expected a network, as resnet18, or your own by --model")
        if inputs is not None and model is None:
            raise ValueError("--inputs: expected a --model that takes them")
        if not 0 <= sparsity < 1:
            raise ValueError(f"--sparsity: expected a number in [0, 1), got {sparsity:g}")
        terminal.set_threads(threads)
        args: tuple[Any, ...]
        if model is not None:
            case = own.given(model, input_shape, inputs)
            net, args, kwargs = case.build(), case.inputs.args, dict(case.inputs.kwargs)
        else:
            image = own.image(input_shape) or (3, 32, 32)
            net = models.build(network or "", num_classes=10, in_channels=image[0])
            args, kwargs = ((batch, *image),), {}
        keep_memory_warm()
        net = sparsify(net, sparsity=sparsity, distribution=distribution, layout=layout)
        console = terminal.console()
        console.print(diagnose.explain(net, args=args, kwargs=kwargs))
        inside = diagnose.region(optimize(net), args=args, kwargs=kwargs)
        console.print(f"After optimize, {inside}", highlight=False, soft_wrap=True)


def info() -> None:
    """Show versions, backends, instruction set, threads and OpenMP runtime.

    \b
    sparsekd info
    """
    console = terminal.console()
    facts = ops.info()
    backends = facts.pop("backends")
    for field, value in _fields(facts):
        console.print(f"{field}: {value}", highlight=False, soft_wrap=True)
    lines = [
        (name, "yes" if entry["available"] else "no", entry["detail"])
        for name, entry in backends.items()
    ]
    console.print(Columns(("backend", "available", "detail"), lines, left=3))


def _fields(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        elif isinstance(value, (tuple, list)):
            yield f"{prefix}{name}", ",".join(map(str, value))
        else:
            yield f"{prefix}{name}", str(value).lower() if value is None else str(value)
