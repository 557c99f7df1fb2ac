"""A user's own model on the command line: its options, and `sparsekd advise`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from sparsekd.bench import advise as advising
from sparsekd.bench.given import Arguments, GivenCase
from sparsekd.diagnose.given import build_model, check_call, example_call
from sparsekd.errors import SparsekdError
from sparsekd.terminal import console, image_shape, one_line_errors, set_threads

Model = Annotated[
    str | None,
    typer.Option(help="Your own model, as package.module:factory or file.py:factory."),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="Channels, height and width of a network's images; for a --model the whole shape, as "
        "128,3,32,32 or, for token ids, 8,128:int64:30522, once for each input.",
    ),
]
Inputs = Annotated[
    str | None,
    typer.Option(
        help="A function that returns the model's example inputs, as package.module:function: a "
        "tensor, a tuple, or a mapping by name."
    ),
]


def given(model: str, shapes: Sequence[str] | None, inputs: str | None) -> GivenCase:
    """Build the model and the example inputs that options name.

    Raises:
        UnsupportedError: they are not there, or do not have the form that the message shows.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")  # a factory may lie in the current folder
    call = Arguments(*example_call(shapes or (), inputs))
    built = build_model(model)
    check_call(built, call.args, call.kwargs)
    return GivenCase(model, built, call)


def image(texts: Sequence[str] | None) -> tuple[int, int, int] | None:
    """Read channels, height and width; None without a text.

    Raises:
        ValueError: there are not three numbers.

    Example:
        >>> image(["3,32,32"])
        (3, 32, 32)
    """
    return image_shape("--input", ":".join(texts)) if texts else None


def advise(
    model: Annotated[
        str,
        typer.Option(help="Your model, as package.module:factory or file.py:factory."),
    ],
    input_shape: Input = None,
    inputs: Inputs = None,
    aim: Annotated[
        str,
        typer.Option(
            help="time, flops or memory; with a share of the dense step, as time=0.5, the least "
            "sparsity that reaches it is chosen."
        ),
    ] = "time",
    sparsity: Annotated[
        float | None,
        typer.Option(help="Over all layers that can be sparse; 0.9 if the aim has no share."),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="Layouts to choose from, as csr,bcsr:16,fanin:16.")
    ] = "csr",
    distribution: Annotated[str, typer.Option(help="uniform, er or erk.")] = "erk",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each step.")] = 9,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.")] = None,
) -> None:
    """Say which layers of a model to make sparse, with the step's time predicted and measured.

    \b
    sparsekd advise --model net.py:make --input 128,3,32,32 --aim time=0.5
    sparsekd advise --model net.py:make --input 8,128:int64:30522 --aim memory --sparsity 0.95
    sparsekd advise --model my_project.net:make --inputs my_project.net:batch --layout csr,bcsr:16
    """
    with one_line_errors(ValueError, SparsekdError):
        case = given(model, input_shape, inputs)
        set_threads(threads)
        advice = advising.advise(
            case.model,
            *case.inputs.args,
            aim=aim,
            sparsity=sparsity,
            layouts=[word.strip() for word in layout.split(",") if word.strip()],
            distribution=distribution,
            rounds=rounds,
            **case.inputs.kwargs,
        )
        console().print(advice)
