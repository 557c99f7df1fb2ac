"""Engines that run a network from an ONNX file, in this process or in one of their own.

An engine that wants other versions of packages than sparsekd runs in another interpreter, which
runs this file: so it imports nothing of sparsekd, nor torch.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Call = Callable[[Any], Any]  # an array of numpy to another


def onnxruntime(file: str, batch: int, threads: int) -> Call:
    """Load a file into ONNX Runtime."""
    import onnxruntime as engine

    options = engine.SessionOptions()
    options.intra_op_num_threads = threads
    session = engine.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def openvino(file: str, batch: int, threads: int) -> Call:
    """Load a file into OpenVINO, in float32, which it would leave where there is AMX."""
    import openvino as engine

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    request = engine.Core().compile_model(file, "CPU", settings).create_infer_request()
    return lambda x: request.infer([x])[0]


def deepsparse(file: str, batch: int, threads: int) -> Call:
    """Load a file into DeepSparse, which finds the zeros in it."""
    from deepsparse import compile_model

    engine = compile_model(file, batch_size=batch, num_cores=threads)
    return lambda x: engine.run([x])[0]


ENGINES = {"onnxruntime": onnxruntime, "openvino": openvino, "deepsparse": deepsparse}


class Elsewhere:
    """An engine in an interpreter of its own, with one input that does not change.

    Args:
        python: the interpreter.
        engine: a name in `ENGINES`.
        file: the ONNX file.
        inputs: a file of numpy's, with the input.
        threads: of the engine.

    Raises:
        RuntimeError: the process ended; the text is the last line that it wrote.
    """

    def __init__(self, python: str, engine: str, file: str, inputs: Path, threads: int) -> None:
        self.result = inputs.with_suffix(f".{engine}.npy")
        self._log = inputs.with_suffix(f".{engine}.log")
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                # -I: neither PYTHONPATH nor the folder of this file have a say in what it imports.
                [python, "-I", __file__, engine, file, str(inputs), str(self.result), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._answer()

    def __call__(self) -> None:
        """Compute once."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line == "done\n":  # engines print lines of their own
                return
        said = [line for line in self._log.read_text(errors="replace").splitlines() if line]
        raise RuntimeError(said[-1] if said else "the engine's process ended")


def _main(engine: str, file: str, inputs: str, result: str, threads: str) -> None:
    import numpy

    x = numpy.load(inputs)
    call = ENGINES[engine](file, len(x), int(threads))
    numpy.save(result, call(x))
    print("done", flush=True)
    for _ in sys.stdin:
        call(x)
        print("done", flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
