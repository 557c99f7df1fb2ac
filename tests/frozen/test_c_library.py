"""csrc/include/sparsekd.h: C computes what Python does, and a mistake is an error in one line."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparsekd as skd

ROOT = Path(__file__).parents[2]
INCLUDE = ROOT / "csrc/include"


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(12), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(self.layer(self.norm(x)))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.second(y) + self.first(x)).relu()


CASES: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "resnet20": (lambda: skd.models.resnet20(num_classes=10), ((3, 32, 32),)),
    "tokens": (Tokens, ((5, 12),)),
    "vector": (lambda: nn.Sequential(nn.Linear(9, 4), nn.SiLU(), nn.Linear(4, 3)), ((9,),)),
    "vit": (
        lambda: skd.models.vit_tiny(num_classes=10, in_channels=3, input_size=32),
        ((3, 32, 32),),
    ),
    "two inputs": (Two, ((2, 9, 8), (3, 9, 8))),
}


def saved(name: str, folder: Path) -> tuple[Path, nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    make, shapes = CASES[name]
    model = skd.sparsify(make(), sparsity=0.6).eval()
    inputs = [torch.randn(3, *shape) for shape in shapes]
    skd.save_frozen(skd.freeze(model, *inputs), folder / "net.frozen")
    return folder / "net.frozen", model, inputs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threads", [1, 2])
def test_results(name: str, threads: int, tmp_path: Path, c_library: Any) -> None:
    path, model, inputs = saved(name, tmp_path)
    for source in (path, path.read_bytes()):
        network = c_library.load(source)
        assert c_library.shapes(network, "input") == list(CASES[name][1])
        with torch.inference_mode():
            right = model(*inputs)
        (result,) = c_library.run(network, *inputs, threads=threads)
        assert result.shape == right.shape
        assert (result - right).abs().max() <= 1e-5 * right.abs().max()
        assert c_library.run(network, *(x[:0] for x in inputs))[0].shape == (0, *right.shape[1:])
        c_library.free(network)


def test_the_example_in_c(tmp_path: Path, c_library: Any) -> None:
    """Compiled as a user would; the network comes from a file and so do the images."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if not compiler:
        pytest.skip("no C compiler")
    program, folder = tmp_path / "run_frozen", c_library.path.parent
    subprocess.run(
        [
            *(*compiler.split(), "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"),
            *(str(ROOT / "csrc/examples/run_frozen.c"), f"-I{INCLUDE}"),
            *(f"-L{folder}", "-lsparsekd", f"-Wl,-rpath,{folder}", "-o", str(program)),
        ],
        check=True,
    )
    path, model, (images,) = saved("resnet20", tmp_path)
    images.numpy().tofile(tmp_path / "images.bin")
    files = [str(tmp_path / name) for name in ("images.bin", "results.bin")]
    ran = subprocess.run([program, path, *files], capture_output=True, text=True)
    assert ran.stdout == (
        "input: [batch, 3, 32, 32] float32\noutput: [batch, 10] float32\n3 images\n"
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    with torch.inference_mode():
        right = model(images)
    result = torch.from_numpy(np.fromfile(files[1], np.float32)).view(3, 10)
    assert (result - right).abs().max() <= 1e-5 * right.abs().max()

    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ran = subprocess.run([program, path, *files], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr == f"{path}: damaged, its tensors do not match the stored SHA-256\n"


def test_the_header_in_cpp() -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not compiler:
        pytest.skip("no C++ compiler")
    command = [*compiler.split(), "-fsyntax-only", "-Wall", "-Werror", "-include", "sparsekd.h"]
    subprocess.run([*command, f"-I{INCLUDE}", "-x", "c++", os.devnull], check=True)


def test_errors(tmp_path: Path, c_library: Any) -> None:
    def message(call: Any, text: str) -> None:
        with pytest.raises(ValueError, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)

    path, _, inputs = saved("two inputs", tmp_path)
    message(lambda: c_library.load(tmp_path / "none"), "none: No such file")
    message(lambda: c_library.load(tmp_path), "Is a directory")
    message(lambda: c_library.load(b""), "not a safetensors file, or cut off")
    message(lambda: c_library.load(b"x" * 100), "not a safetensors file, or cut off")
    skd.train.save_model(tmp_path / "model.safetensors", nn.Linear(2, 2))
    message(lambda: c_library.load(tmp_path / "model.safetensors"), "a file of save_frozen")
    calls, network = c_library.calls, c_library.load(path)
    message(
        lambda: c_library.run(network, *inputs, threads=0), "threads: expected 1 to 1024, got 0"
    )
    given = (ctypes.c_void_p * 2)(inputs[0].data_ptr(), None)
    for arguments, text in (
        ((network, given, given, 1, 1), "input 1: expected numbers, got NULL"),
        ((network, None, given, 1, 1), "input: expected pointers, got NULL"),
        ((network, given, None, 0, 1), "output: expected pointers, got NULL"),
        ((network, given, given, -1, 1), "batch: expected 0 or more, got -1"),
        ((None, given, given, 1, 1), "network: expected one, got NULL"),
    ):
        assert calls.sparsekd_run(*arguments) == -1
        assert c_library.error() == f"sparsekd_run: {text}"
    for index in (-1, 2):
        assert calls.sparsekd_input(network, index, None) == -1
        assert c_library.error() == f"sparsekd_input: index: expected one below 2, got {index}"
    assert calls.sparsekd_outputs(None) == -1
    c_library.free(network)
    c_library.free(None)
