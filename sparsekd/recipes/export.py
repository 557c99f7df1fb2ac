"""Files of a trained network for other programs, checked on the test images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsekd.data import Source
from sparsekd.errors import CheckpointError
from sparsekd.frozen import freeze, load_frozen, save_frozen
from sparsekd.nn import densify
from sparsekd.recipes.loading import FinishedRun
from sparsekd.train import load_state, save_model
from sparsekd.train.evaluation import correct_predictions
from sparsekd.train.optional import need

Predict = Callable[[Tensor], Tensor]
Write = Callable[[FinishedRun, Path], None]
Read = Callable[[FinishedRun, Path], Predict]

FILES = {
    "dense": "dense.safetensors",
    "onnx": "model.onnx",
    "torch-export": "model.pt2",
    "frozen": "network.frozen",
    "frozen-int8": "network.int8.frozen",
}
"""Format -> name of its file in the folder of a run."""

# One image of so many may fall to another class: sums differ in their order, int8 rounds weights.
_TOLERATED, _TOLERATED_INT8 = 1000, 100


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote.

    Args:
        path: of the file.
        accuracy: on the test images, by the file.
        expected: likewise, by the run's own row.
        images: number of test images.
    """

    path: Path
    accuracy: float
    expected: float
    images: int


def export(run: FinishedRun, to: str, path: Path) -> Exported:
    """Write the network of a run as a file, and check it against the run's accuracy.

    The file is read back and predicts the classes of the test images. It appears under its name
    only if it does as well as the run did, except for one image in a thousand, or with int8 in a
    hundred.

    Args:
        run: as `load_run` gives it; densified by "dense" and "onnx".
        to: "dense", a safetensors file of the plain torch module's state dict, zeros included;
            "onnx", the dense network for any ONNX runtime; "torch-export", a program for
            `torch.export.load` that computes with the nonzeros, after `import sparsekd`; "frozen",
            a file for `skd.load_frozen`, and "frozen-int8" the same with weights of int8.
        path: of the file; its folder is created.

    Returns:
        The file and its accuracy.

    Raises:
        ValueError: the format is not known.
        UnavailableError: a package is missing; the message names the extra that has it.
        CheckpointError: the file predicts other classes than the run did.
    """
    if to not in FILES:
        raise ValueError(f"--to: expected one of {', '.join(FILES)}, got {to!r}")
    formats: dict[str, tuple[Write, Read]] = {
        "dense": (_write_dense, _read_dense),
        "onnx": (_write_onnx, _read_onnx),
        "torch-export": (_write_program, _read_program),
        "frozen": (_write_frozen, _read_frozen),
        "frozen-int8": (partial(_write_frozen, weights="int8"), _read_frozen),
    }
    write, read = formats[to]
    test, expected = run.dataset.test, run.result["test_accuracy"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export") as folder, torch.no_grad():
        file = Path(folder) / path.name
        write(run, file)
        correct = _correct(read(run, file), test)
        tolerated = _TOLERATED_INT8 if to == "frozen-int8" else _TOLERATED
        allowed = -(-len(test) // tolerated)
        if abs(correct - round(expected * len(test))) > allowed:
            raise CheckpointError(
                f"{path}: not written: its accuracy would be {correct / len(test):.2%}, "
                f"the run's is {expected:.2%}"
            )
        os.replace(file, path)
    return Exported(path, correct / len(test), expected, len(test))


def _correct(predict: Predict, split: Source) -> int:
    return sum(correct_predictions(predict(x), y) for x, y in split.batches(200))


def _example(run: FinishedRun) -> tuple[Tensor, dict[str, object]]:
    """Return images, and that their number may be another one."""
    images = next(iter(run.dataset.test.batches(2)))[0]
    return images, {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}


def _write_frozen(run: FinishedRun, file: Path, weights: str = "float32") -> None:
    images, _ = _example(run)
    save_frozen(freeze(run.model, images, weights=weights), file)


def _read_frozen(run: FinishedRun, file: Path) -> Predict:
    return load_frozen(file)


def _write_dense(run: FinishedRun, file: Path) -> None:
    save_model(file, densify(run.model))


def _read_dense(run: FinishedRun, file: Path) -> Predict:
    model = run.build_dense()
    model.load_state_dict(load_state(file))
    return model


def _write_onnx(run: FinishedRun, file: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, "onnx")
    images, shapes = _example(run)
    torch.onnx.export(
        densify(run.model),
        (images,),
        file,
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        external_data=False,
        verbose=False,
        **shapes,  # type: ignore[arg-type]
    )


def _read_onnx(run: FinishedRun, file: Path) -> Predict:
    session = need("onnxruntime", "onnx").InferenceSession(
        str(file), providers=["CPUExecutionProvider"]
    )
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def _write_program(run: FinishedRun, file: Path) -> None:
    images, shapes = _example(run)
    program = torch.export.export(run.model, (images,), **shapes)  # type: ignore[arg-type]
    torch.export.save(program, file)


def _read_program(run: FinishedRun, file: Path) -> Predict:
    module: nn.Module = torch.export.load(file).module()
    return module
