"""Which backend runs, who says so, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import sparsekd as skd
from sparsekd import Topology, cuda_library, functional, ops
from sparsekd.errors import BackendError, UnsupportedError
from sparsekd.ops import reference as reference_backend
from sparsekd.ops.dispatch import backends, context, decisions
from sparsekd.ops.kernel import products

TOPOLOGY = Topology.from_mask(torch.eye(3, dtype=torch.bool))


def product() -> torch.Tensor:
    return functional.linear(TOPOLOGY, torch.ones(3), torch.ones(3))


@pytest.fixture
def reference_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    original = reference_backend.linear

    def counted(*args: object) -> torch.Tensor:
        calls.append("linear")
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(reference_backend, "linear", counted)
    monkeypatch.setattr(products["linear"], "_known", {})
    return calls


def test_the_context_chooses_and_gives_back(reference_calls: list[str]) -> None:
    before = context.forced()
    with skd.backend("reference"):
        product()
        assert context.forced() == "reference"
    assert len(reference_calls) == 1
    assert context.forced() == before


def test_contexts_nest_and_survive_errors() -> None:
    with skd.backend("reference"):
        with pytest.raises(BackendError), skd.backend("triton"):
            pass
        assert context.forced() == "reference"
        with pytest.raises(KeyError), skd.backend("reference"):
            raise KeyError
        assert context.forced() == "reference"


def test_the_environment_chooses(
    monkeypatch: pytest.MonkeyPatch, reference_calls: list[str]
) -> None:
    monkeypatch.setenv("SPARSEKD_BACKEND", "reference")
    product()
    assert len(reference_calls) == 1
    assert ops.info()["forced"] == "reference"
    monkeypatch.setenv("SPARSEKD_BACKEND", "abacus")
    with pytest.raises(BackendError, match="expected one of auto, cpp, dense, reference"):
        product()


@pytest.mark.parametrize("name", ["triton", "abacus", ""])
def test_a_backend_that_cannot_run_says_how_to_get_it(name: str) -> None:
    with pytest.raises(BackendError, match="backend"), skd.backend(name):
        pass


def test_without_cuda_kernels_the_reason_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "library.so"
    monkeypatch.setattr(cuda_library, "PATH", library)
    with pytest.raises(ImportError, match="found no nvcc, or nvcc failed"):
        cuda_library.load()
    library.write_text("built, but damaged")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match="torch sees no CUDA device"):
        cuda_library.load()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ImportError, match="the CUDA kernels do not load"):
        cuda_library.load()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a driver")
@pytest.mark.skipif(not cuda_library.PATH.exists(), reason="this build has no CUDA kernels")
def test_a_driver_too_old_for_the_cuda_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """None at all is, to CUDA, one too old."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ImportError, match="CUDA driver version is insufficient"):
        cuda_library.load()


def test_a_gpu_too_old_for_the_cuda_kernels_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda_library, "PATH", tmp_path)
    monkeypatch.setattr(cuda_library, "_opened", lambda path: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    capabilities = [(6, 1), (7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    with pytest.raises(ImportError, match=r"capability 8\.0, the GPU has 7\.5"):
        cuda_library.load()
    capabilities[0] = 8, 0  # the better of two counts
    cuda_library.load()


def test_a_triton_that_cannot_compile_its_launcher_is_no_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It compiles C at the first use, which fails without a compiler or Python's headers."""
    driver = pytest.importorskip("triton", reason="needs Triton").runtime.driver

    class NoHeaders:
        def get_current_target(self) -> None:
            raise subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"])

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(driver, "_active", NoHeaders())
    monkeypatch.delitem(sys.modules, "sparsekd.ops.triton.ops", raising=False)
    loaded, reason = backends.load.__wrapped__("triton")
    assert loaded is None
    assert "gcc" in reason


@pytest.fixture
def backend_of_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[str], None]]:
    """Return a function that puts a module of this source in the place of the backend "cuda"."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(source: str) -> None:
        (tmp_path / "replaced_backend.py").write_text(source)
        entry = dataclasses.replace(backends.BACKENDS["cuda"], module="replaced_backend")
        monkeypatch.setitem(backends.BACKENDS, "cuda", entry)
        backends.load.cache_clear()

    yield put
    monkeypatch.undo()
    backends.load.cache_clear()
    sys.modules.pop("replaced_backend", None)


@pytest.mark.parametrize(
    "source, error, text",
    [
        ("from sparsekd.errors import Misspelt", ImportError, "cannot import name 'Misspelt'"),
        ("import sparsekd.ops.misspelt", ModuleNotFoundError, "sparsekd.ops.misspelt"),
        ("import triton_of_another_version", ModuleNotFoundError, "triton_of_another_version"),
        ("from torch import a_name_that_is_gone", ImportError, "a_name_that_is_gone"),
        ("1 / 0", ZeroDivisionError, "division by zero"),
    ],
)
def test_a_fault_in_a_backend_is_not_a_backend_that_cannot_run(
    backend_of_source: Callable[[str], None], source: str, error: type[Exception], text: str
) -> None:
    backend_of_source(source)
    for ask in (ops.info, lambda: skd.backend("cuda").__enter__()):
        with pytest.raises(error, match=text) as caught:
            ask()
        assert "replaced_backend.py" in {Path(entry.path).name for entry in caught.traceback}


@pytest.mark.parametrize(
    "source, reason",
    [
        ("import sparsekd._C", "sparsekd._C"),
        ("import triton", "triton"),
        (
            "from sparsekd.errors import UnavailableError as E; raise E('no such GPU')",
            "no such GPU",
        ),
    ],
)
def test_what_an_installation_may_lack_is_named(
    backend_of_source: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    reason: str,
) -> None:
    for name in ("sparsekd._C", "triton"):
        monkeypatch.setitem(sys.modules, name, None)
    backend_of_source(source)
    loaded, found = backends.load("cuda")
    assert loaded is None
    assert reason in found
    with pytest.raises(BackendError, match=f"cannot run here .*{reason}"), skd.backend("cuda"):
        pass


def test_topologies_use_the_library_on_devices_that_it_has_code_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def capability(found: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)

    device, library = torch.device("cuda"), object()
    monkeypatch.setattr(cuda_library, "load", lambda: library)
    capability((8, 0))
    assert cuda_library.library_for(device) is library
    assert cuda_library.library_for(torch.device("cpu")) is None
    capability((7, 5))
    assert cuda_library.library_for(device) is None


def test_topologies_do_without_a_library_that_does_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_library, "PATH", tmp_path / "library.so")
    assert cuda_library.library_for(torch.device("cuda")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_the_cuda_backend_says_how_to_get_it() -> None:
    entry = ops.info()["backends"]["cuda"]
    assert not entry["available"]
    assert "SPARSEKD_CUDA=on" in entry["detail"]
    with pytest.raises(BackendError, match="SPARSEKD_CUDA=on"), skd.backend("cuda"):
        pass


def test_info_names_every_backend() -> None:
    table = ops.info()["backends"]
    gpu = {"triton", "cuda", "semi_structured", "dense_cuda", "gpu"}
    assert set(table) == {"auto", "cpp", "dense", "reference"} | gpu
    assert table["reference"]["available"]
    assert all(entry["available"] or entry["detail"] for entry in table.values())


def test_every_backend_is_asked_in_the_same_way(backend: str) -> None:
    entry = backends.BACKENDS[backend]
    args = torch.ones(3), torch.ones(3), TOPOLOGY.crow_indices, TOPOLOGY.col_indices, None, [3, 3]
    decision = entry.decide("linear", args)
    assert decision == decisions.decide("linear", args)
    assert decision.backend == {"auto": "cpp"}.get(backend, backend)
    assert torch.equal(decision.run(*args), product())
    assert not entry.supports("no such op")
    for op in ("LargestK", "norm_act", "linear_wgrad_tile"):
        owner = entry if entry.supports(op) else backends.BACKENDS[str(entry.extends)]
        assert entry.function(op) is owner.function(op)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_other_dtypes_are_refused(backend: str, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedError, match=f"supports .*got {dtype}"):
        functional.linear(TOPOLOGY, torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype))


def test_a_device_without_kernels_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSEKD_BACKEND", raising=False)

    class OnGpu:
        device = torch.device("cuda")

    with pytest.raises(BackendError, match=r"no backend for device 'cuda'.*move the model"):
        decisions.function("linear", OnGpu())  # type: ignore[arg-type]


PROBE = """
import sys, warnings
sys.modules["sparsekd._C"] = None
import torch, sparsekd as skd
topology = skd.Topology.from_mask(torch.ones(2, 3, dtype=torch.bool))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y = skd.functional.linear(topology, torch.ones(6), torch.ones(3))
assert y.tolist() == [3, 3], y
assert [w.category for w in caught] == [RuntimeWarning], caught
assert "slow reference backend" in str(caught[0].message), caught[0].message
assert not skd.ops.info()["backends"]["cpp"]["available"]
try:
    with skd.backend("cpp"):
        raise SystemExit("cpp must not be available")
except skd.errors.BackendError as error:
    assert "pip install" in str(error)
"""


def run(script: str) -> None:
    root = Path(skd.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "2"}
    env.pop("SPARSEKD_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_without_the_compiled_module_one_warning_and_the_reference() -> None:
    run(PROBE)


ONE_RUNTIME = """
import re, torch, sparsekd as skd
topology = skd.Topology.from_mask(torch.ones(64, 64, dtype=torch.bool))
values = torch.ones(4096, requires_grad=True)
skd.functional.linear(topology, values, torch.ones(512, 64)).sum().backward()
torch.ones(10**6).sum()
with open("/proc/self/maps") as maps:
    mapped = {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line}
runtimes = {path for path in mapped if re.search(r"lib(g|i|)omp[-.\\w]*\\.so", path)}
assert len(runtimes) == 1, runtimes
assert skd.ops.info()["cpp"]["parallel_runtime"] in runtimes
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see mappings")
def test_one_openmp_runtime_is_loaded() -> None:
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    run(ONE_RUNTIME)


def test_import_stays_light() -> None:
    run(
        "import sys, torch.utils.flop_counter\n"  # imports triton where it is installed
        "before = set(sys.modules)\n"
        "import sparsekd\n"
        "heavy = {'matplotlib', 'sklearn', 'typer', 'torchvision', 'scipy', 'triton'} - before\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import sparsekd.cli\n"
        "assert 'matplotlib' not in sys.modules"  # half a second of each command
    )
