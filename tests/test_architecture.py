"""What import-linter cannot see: who uses the compiled module, and what torch keeps private."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsekd

PACKAGE = Path(sparsekd.__file__).parent
ROOT = Path(__file__).parents[1]
# torch documents that these are for modules to override; test_torch_names has a test of them.
OVERRIDDEN = {"_apply", "_load_from_state_dict", "_save_to_state_dict"}


def attributes_of_torch() -> set[str]:
    """List the private attributes of what torch hands out, and of its modules."""
    layer = nn.BatchNorm2d(1)
    function, autograd, modules = torch.autograd.Function, torch.autograd, nn.modules
    objects = [
        *(torch, autograd, autograd.profiler, autograd.forward_ad, torch.compiler, torch.optim),
        *(torch.distributed, modules.module, modules.batchnorm, DistributedDataParallel),
        *(layer, layer.weight, layer.weight.untyped_storage(), layer.state_dict()),
        *((layer.weight * 1).grad_fn, autograd.Variable, function, function._backward_cls),
        *(torch.ops.aten.add, torch.ops.aten.add.Tensor, torch.library.Library),
        torch.optim.SGD([layer.weight]),
    ]
    names = {name for thing in objects for name in dir(thing)}
    return {n for n in names if n.startswith("_") and not n.endswith("__")} - {"_values"}


def imported_names(path: Path) -> set[str]:
    """List every module and every name that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(node.module or "")
    return found


def test_only_ops_and_csr_import_the_compiled_module():
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if any(name.startswith("sparsekd._C") for name in imported_names(path))
    }
    assert users == {"ops", "csr.py"}


def test_live_objects_are_not_searched_for():
    assert not [path for path in PACKAGE.rglob("*.py") if "gc" in imported_names(path)]


def private_uses(tree: ast.AST, private: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and name of what a source takes of torch's private names, as code or as text."""
    slots = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__"
        for name in ast.walk(node.value)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            path = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for name in path if name.startswith("_"))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("torch.")]
            yield from ((node.lineno, name) for name in names if "._" in name)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            of, _, rest = ast.unparse(node.value).partition(".")
            of_torch = of in ("torch", "nn", "dist", "F") and not node.attr.endswith("__")
            own = (of in ("self", "cls") and not rest) or (
                of == "super()" and node.attr in OVERRIDDEN
            )
            if of_torch or (node.attr in private and not own):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            begins = node.value.startswith(("torch._", "_fsdp", "_ddp", "_orig_mod"))
            if (begins or node.value in private) and node not in slots:
                yield node.lineno, repr(node.value)


def test_private_names_of_torch_are_used_in_one_file_alone():
    private, folders = attributes_of_torch(), (PACKAGE, PACKAGE.parent / "benchmarks")
    assert {"_C", "_version", "_modules", "_cdata", "_opname", "_forward_hooks"} <= private
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name}"
        for folder in folders
        for path in [*folder.rglob("*.py"), *(folder / "kernels").glob("*.py")]  # a link
        if path != PACKAGE / "_torch.py"
        for line, name in private_uses(ast.parse(path.read_text()), private)
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "from torch.utils._pytree import tree_leaves",
        "from torch.nn.modules.module import _has_any_global_hook",
        "import torch._dynamo",
        "torch.ops.mkldnn._is_mkldnn_bf16_supported()",
        "getattr(type(node), '_forward_cls', None)",
        "state_dict._metadata",
        "torch._C._current_graph_task_id()",
        "for child in model._modules.values(): pass",
        "seen = tensor._version",
        "getattr(parameter, '_fsdp_flattened', False)",
        "'torch._dynamo' in sys.modules",
    ],
)
def test_private_names_of_torch_are_found(source):
    assert list(private_uses(ast.parse(source), attributes_of_torch()))


def test_a_checkout_on_the_path_is_no_package_kernels(monkeypatch):
    """Others look for a package of that name; ours answers under its own name only."""
    monkeypatch.syspath_prepend(str(ROOT))
    kernels = importlib.import_module("kernels")
    assert not hasattr(kernels, "Kernel")
    for name in ("table", "gather"):
        with pytest.raises(ImportError, match=f"kernels.{name}"):
            importlib.import_module(f"kernels.{name}")


def test_no_file_is_longer_than_400_lines():
    folders = ("sparsekd", "kernels", "csrc", "tests", "benchmarks", "tools")
    languages = {".py", ".cc", ".h", ".inl", ".inc", ".cu", ".cuh"}
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in languages]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert len(lengths) > 300
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}
