"""What a fresh installation must do: `python package_smoke.py cpp`, or `reference`.

It is run outside of the repository and needs what sparsekd depends on, nothing else.
"""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

started = time.perf_counter()
import sparsekd as skd  # noqa: E402

IMPORTED = time.perf_counter() - started


def check_files(backend: str) -> None:
    """Check that this is an installed package, with the files that are no Python source."""
    assert Path(skd.__file__).is_relative_to(sys.prefix), skd.__file__
    installed = {file.name for file in files("sparsekd").iterdir()}
    assert {"py.typed", "cuda_api.h", "kernels"} <= installed, installed
    assert any(name.startswith("_C.") for name in installed) == (backend == "cpp"), installed
    assert (files("sparsekd") / "kernels" / "gemm.py").is_file()


def check_training() -> None:
    """Train with RigL: nonzeros move, and the network computes what its dense twin does."""
    digits = skd.data.load("digits")
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )
    skd.sparsify(model, sparsity=0.8, init="sparse")
    before = [module.topology for _, module in skd.nn.sparse_modules(model)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = skd.dst.RigL(model, optimizer, drop_fraction=0.3, every=3, until=100)
    losses = []
    for x, y in digits.train.batches(64, shuffle=True):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        if not method.step():
            optimizer.step()
    assert sum(losses[-4:]) < sum(losses[:4]), losses
    after = [module.topology for _, module in skd.nn.sparse_modules(model)]
    assert [t.nnz for t in before] == [t.nnz for t in after]
    assert before != after
    with torch.no_grad():
        found = model.eval()(x)
        torch.testing.assert_close(found, skd.densify(model)(x), rtol=1e-4, atol=1e-4)


def main() -> None:
    backend = sys.argv[1]
    check_files(backend)
    assert skd.ops.info()["backends"]["cpp"]["available"] == (backend == "cpp")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_training()
    slow = [w for w in caught if "slow reference backend" in str(w.message)]
    assert bool(slow) == (backend == "reference"), [str(w.message) for w in caught]
    command = Path(sys.executable).with_name("sparsekd")
    shown = subprocess.run([command, "info"], check=True, capture_output=True, text=True).stdout
    assert torch.__version__ in shown, shown
    print(f"sparsekd {skd.__version__} works on {backend}; imported {IMPORTED:.2f} s after torch")


if __name__ == "__main__":
    main()
