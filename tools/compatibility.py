"""What works with models of other packages: a table, and the checks that a test runs a part of.

    .venv/bin/python -m tools.compatibility --write docs/compatibility.md

Models are small and have random weights. What is tried with each at 80 % sparsity:

- forward: outputs equal those of the dense model with the same zeros, in float64, to 1e-9
- gradients: so do the gradients of all parameters
- update: RigL moves as many weights as it drops, and training goes on
- compile: torch.compile without graph breaks gives the same outputs
- export: so does torch.export
- save and load: a state_dict in another sparse model, and densified in the dense one
"""

from __future__ import annotations

import argparse
import copy
import io
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.diagnose.inputs import tensors_in
from tools.compatibility_models import MODELS, NOT_TRIED
from tools.packages import load_package

HEAD = """# What works with which models

Made by `python -m tools.compatibility --write docs/compatibility.md` with the packages of
`pip install 'sparsekd[models]'`; `tests/thirdparty/test_compatibility.py` tries a quarter of it,
and the rest with `-m thorough`. Models are small and have random weights; {versions}.

With each at 80 % sparsity: *forward* and *gradients* equal those of the dense model with the same
zeros (float64, to 1e-9); *update*: RigL moves weights, and training goes on; *compile*:
torch.compile without graph breaks, *export*: torch.export, same outputs; *save and load*: a
state_dict in another sparse model, and densified in a dense one.
"""

FRAMEWORKS = """
Callbacks ([frameworks.md](frameworks.md)) train as a plain loop does, RigL's updates and resuming
included; what `tests/integrations` compares bit for bit:

"""


class Case:
    """A model with its inputs, dense and sparse.

    Args:
        name: a key of `MODELS`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.make, self.inputs = MODELS[name]
        self.model = self.sparse(0)

    def dense(self, seed: int) -> nn.Module:
        """Build the dense model in float64; all parameters are drawn, also biases and scales."""
        torch.manual_seed(seed)
        model = self.make().double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.min() == parameter.max():
                    parameter.add_(torch.rand_like(parameter), alpha=0.1)
        return model.eval()

    def sparse(self, seed: int) -> nn.Module:
        """Build the sparse model."""
        return skd.sparsify(self.dense(seed), sparsity=0.8, seed=seed)

    def run(self, model: Callable[..., Any]) -> list[Tensor]:
        """Return the outputs of a model, what depends on its weights of them."""
        inputs = self.inputs()
        found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        return [tensor for tensor in tensors_in(found) if tensor.is_floating_point()]

    def backward(self, model: nn.Module) -> list[Tensor]:
        """Run a model forward and backward, and return the outputs."""
        found = self.run(model)
        torch.stack([t.square().mean() for t in found if t.requires_grad]).sum().backward()
        return [t.detach() for t in found]

    def same(self, model: Callable[..., Any], other: Callable[..., Any]) -> None:
        """Fail unless two models have equal outputs."""
        with torch.no_grad():
            _close(self.run(model), self.run(other))

    # -- what is tried -----------------------------------------------------------------------------

    def forward(self) -> None:
        """Compare outputs with those of the dense model with the same zeros."""
        self.same(self.model, skd.densify(copy.deepcopy(self.model)))

    def gradients(self) -> None:
        """Compare the gradients of all parameters."""
        model, twin = copy.deepcopy(self.model), skd.densify(copy.deepcopy(self.model))
        _close(self.backward(model), self.backward(twin))
        found = gradients_by_name(model, twin)
        for name, parameter in model.named_parameters():
            expected = found[name]
            if (parameter.grad is None) != (expected is None):
                raise AssertionError(f"{name}: only one of both has a gradient")
            if parameter.grad is not None and expected is not None:
                _close([parameter.grad], [expected])

    def update(self) -> None:
        """Train for five steps, two of which are updates."""
        model = copy.deepcopy(self.model).train()
        before = {name: layer.topology for name, layer in skd.nn.sparse_modules(model)}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        method = skd.dst.RigL(model, optimizer, drop_fraction=0.3, every=2, until=100)
        updates = 0
        for _ in range(5):
            optimizer.zero_grad()
            self.backward(model)
            if method.step():
                updates += 1
            else:
                optimizer.step()
        moved = 0
        for name, layer in skd.nn.sparse_modules(model):
            old, new = before[name].mask(), layer.topology.mask()
            assert new.sum() == old.sum(), name
            moved += int((new & ~old).sum())
        assert updates == 2
        assert moved > 0
        assert all(t.isfinite().all() for t in self.run(model.eval()))

    def compile(self) -> None:
        """Compile without graph breaks, to the graphs that inductor gets but not its code."""
        torch.compiler.reset()
        compiled = torch.compile(self.model, fullgraph=True, backend="aot_eager")
        self.same(compiled, self.model)

    def export(self) -> None:
        """Export, and run the exported program."""
        inputs = self.inputs()
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
        self.same(torch.export.export(self.model, args, kwargs).module(), self.model)

    def save_and_load(self) -> None:
        """Load a file into another sparse model, and what is densified into a dense one."""
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        other = self.sparse(1)
        other.load_state_dict(torch.load(file, weights_only=True))
        self.same(other, self.model)
        plain = self.dense(2)
        plain.load_state_dict(skd.densify(copy.deepcopy(self.model)).state_dict())
        self.same(plain, self.model)


TRIED = ("forward", "gradients", "update", "compile", "export", "save_and_load")


def gradients_by_name(model: nn.Module, twin: nn.Module) -> dict[str, Tensor | None]:
    """Return the gradients of a dense twin under the names of the sparse model's parameters.

    Those of weights are the entries at the nonzeros, also where the twin packs or transposes them.
    """
    found = {name: p.grad for name, p in twin.named_parameters(remove_duplicate=False)}
    for name, split in model.named_modules():
        if isinstance(split, skd.nn.SplitAttention | skd.nn.SplitExperts):
            for part in split.parts:
                for leaf, place in part.places:
                    grad = found[f"{name}.{place.path}"]
                    found[f"{name}.{part.layer}.{leaf}"] = None if grad is None else place.of(grad)
    for layer, module in skd.nn.sparse_modules(model):
        grad = found[f"{layer}.weight"]
        if grad is not None:
            grad = grad.t() if isinstance(module, skd.nn.SparseConv1D) else grad
            grad = grad[module.topology.mask()]
        found[f"{layer}.values"] = grad
    return found


def attempt(case: Case, what: str) -> str:
    """Try one thing, and return "yes"; or "not tried", where that is known to be so."""
    if (case.name, what) in NOT_TRIED:
        return NOT_TRIED[case.name, what]
    getattr(case, what)()
    return "yes"


def rows(names: list[str]) -> Iterator[list[str]]:
    """Try everything with each model, and yield package, version, model and results."""
    for name in names:
        package, _, model = name.partition("-")
        try:
            load_package(package)
        except ImportError:
            print(f"{name}: {package} is not installed", file=sys.stderr)
            continue
        case, found = Case(name), []
        for what in TRIED:
            try:
                found.append(attempt(case, what))
            except Exception as error:  # the table is to say so, whatever it is
                found.append(f"no: {type(error).__name__}")
                print(f"{name}, {what}: {error}", file=sys.stderr)
        print(name, *found, file=sys.stderr, flush=True)
        yield [package, metadata.version(package), model, *found]


def framework_rows() -> Iterator[list[str]]:
    """Run the tests of the callbacks, and yield package, version, what it is and how they end."""
    tests = {"lightning": "lightning", "transformers": "trainer", "accelerate": "accelerate"}
    kinds = {"lightning": "Trainer", "transformers": "Trainer", "accelerate": "Accelerator"}
    for package, file in tests.items():
        command = [sys.executable, "-m", "pytest", "-q", f"tests/integrations/test_{file}.py"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        line = ended.stdout.strip().rpartition("\n")[2]
        print(f"{package}: {line}", file=sys.stderr)
        if "passed" in line or ended.returncode:  # all are skipped where the package is missing
            result = "yes" if ended.returncode == 0 else "no"
            yield [package, metadata.version(package), kinds[package], result]


def table(names: list[str]) -> str:
    """Return the page."""
    heads = ["package", "version", "model", *(what.replace("_", " ") for what in TRIED)]
    lines = [heads, ["---"] * len(heads), *rows(names)]
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    others = [["package", "version", "class", "equals a plain loop"], ["---"] * 4]
    head = HEAD.format(versions=versions)
    return f"{head}\n{_lines(lines)}{FRAMEWORKS}{_lines([*others, *framework_rows()])}"


def _lines(cells: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert found
    for one, other in zip(found, expected, strict=True):
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * scale)


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description="Try what works with models of other packages.")
    parser.add_argument("--write", type=Path, help="file to write instead of the terminal")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="some of them")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    page = table(options.models)
    if options.write is None:
        print(page)
    else:
        options.write.write_text(page)


if __name__ == "__main__":
    main()
