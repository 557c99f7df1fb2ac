"""Sizes of blocks by measurement, with a clock of our own; launches run what Triton compiles."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("sparsekd._C", reason="the compiled module is not built")

import triton
import triton_driver
from triton_backend import float32_products

from sparsekd import functional
from sparsekd.kernels import config
from sparsekd.kernels.config import Config
from sparsekd.ops.store import Store
from sparsekd.ops.triton import launch as triton_launch
from sparsekd.ops.triton import tuning as triton_tuning
from sparsekd.ops.triton.tuning import Clock, Tuned, Tuner, Work
from sparsekd.testing import LayerCase, sparse_results

LAYER = LayerCase(
    seed=3,
    in_features=32,
    out_features=32,
    batch=(144,),  # more than a block, so that larger ones are tried
    density=0.3,
    bias=True,
    dtype=torch.float16,
    layout="contiguous",
    kernel_size=None,
    map_size=(1, 1),
    options={},
    tile=(32, 16),
)
MOST = 8  # candidates that a launch can have
ARITHMETIC = {"half": (torch.float16, "ieee"), "tf32": (torch.float32, "tf32")}
ARITHMETIC |= {"ieee": (torch.float32, "ieee")}


class Stopwatch:
    """Answer that a launch took a time, made up from its number; without making it if told so.

    Attributes:
        timed: launches in order, with what they are for.
    """

    def __init__(self, milliseconds: Callable[[int], float], *, make: bool = True) -> None:
        self.milliseconds = milliseconds
        self.make = make
        self.timed: list[tuple[Work, partial]] = []

    def __call__(self, work: Work) -> Clock:
        first = len(self.timed)

        def clock(run: Any) -> float:
            if self.make:
                run()
            self.timed.append((work, run))
            return self.milliseconds(len(self.timed) - 1 - first)

        return clock


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tuner]:
    """Return a function that puts a tuner with a clock in the place of the process's."""

    def install(clock_for: Callable[[Work], Clock | None], path: Path | None = None) -> Tuner:
        made = Tuner(Store(path, Tuned.of), clock_for)
        monkeypatch.setattr(triton_launch, "tuner", lambda: made)
        return made

    return install


def products(driver: triton_driver.PtxDriver) -> Iterator[tuple[int, int]]:
    """Yield programs and warps of the launches of products."""
    for launch in driver.launches:
        if launch.kernel == "tile_product":
            yield launch.grid[0], launch.warps


def forward(case: LayerCase = LAYER) -> Any:
    topology, values, x, bias = case.tensors()
    return functional.linear(topology, values, x, bias)


def test_the_first_launch_tries_all_and_later_ones_use_the_fastest(
    ptx, on_triton, tune, tmp_path: Path
) -> None:
    watch = Stopwatch(lambda number: abs(number - 3) + 1.5)
    tune(watch, tmp_path / "tuned.jsonl")
    first = forward()
    base = config.choose("product", 32, "fp16", "ieee", 144, "sm_80", chunks=1)
    tried = config.candidates("product", base, 144)
    assert [run.args[0] for _, run in watch.timed] == list(tried)
    assert {work.arithmetic for work, _ in watch.timed} == {"half"}
    best = (-(-144 // tried[3].positions), tried[3].num_warps)
    assert list(products(ptx))[-1] == best
    assert len(list(products(ptx))) == len(tried) + 1
    row = json.loads((tmp_path / "tuned.jsonl").read_text())
    assert [row[name] for name in (*Config._fields, "ms")] == [*tried[3], 1.5]

    def never(work: Work) -> Clock:
        return lambda run: pytest.fail("measured again")

    for again in (None, never):  # in this process, and in one that finds the file
        if again is not None:
            tune(again, tmp_path / "tuned.jsonl")
        ptx.launches.clear()
        assert torch.equal(forward(), first)
        assert list(products(ptx)) == [best]


@pytest.mark.parametrize(
    "tile, arithmetic",
    [
        pytest.param(tile, arithmetic, marks=[pytest.mark.thorough] if thorough else [])
        for tile in ((32, 16), (32, 1))
        for arithmetic in ARITHMETIC
        for thorough in [(tile, arithmetic) not in (((32, 16), "half"), ((32, 1), "tf32"))]
    ],
    ids=str,
)
def test_no_size_changes_a_bit_of_a_result(ptx, on_triton, tune, tile, arithmetic: str) -> None:
    dtype, precision = ARITHMETIC[arithmetic]
    case = dataclasses.replace(LAYER, tile=tile, dtype=dtype, density=0.2)
    results, used, tried = [], set(), Counter()
    for number in range(MOST):
        watch = Stopwatch(lambda i, number=number: abs(i - number), make=False)
        tune(watch)
        ptx.launches.clear()
        with float32_products(precision):
            results.append(sparse_results(case))
        used |= {(launch.kernel, launch.grid, launch.warps) for launch in ptx.launches}
        tried = Counter(work for work, _ in watch.timed)
    assert 1 < max(tried.values()) <= MOST
    for work in tried:
        assert len([launch for launch in used if launch[0] == work.kernel]) > 1, work
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in results[0])


def test_what_a_gpu_has_no_room_for_is_left_out(ptx, on_triton, tune, monkeypatch) -> None:
    compiler = importlib.import_module("triton.compiler.compiler")
    monkeypatch.setattr(compiler, "max_shared_mem", lambda device: 8000)  # else asked once
    case = dataclasses.replace(LAYER, dtype=torch.bfloat16)  # kernels that are not loaded yet
    watch = Stopwatch(lambda number: 1.0)
    tuner = tune(watch)
    forward(case)
    base = config.choose("product", 32, "bf16", "ieee", 144, "sm_80")
    timed = [run.args[0] for _, run in watch.timed]
    assert 0 < len(timed) < len(config.candidates("product", base, 144))
    assert len(tuner.store) == 1
    assert list(products(ptx))[-1] == (-(-144 // timed[0].positions), timed[0].num_warps)


def test_where_nothing_may_be_measured_the_table_is_used(ptx, on_triton, tune) -> None:
    asked = []
    tuner = tune(asked.append)  # answers None
    forward()
    base = config.choose("product", 32, "fp16", "ieee", 144, "sm_80")
    assert [work.kernel for work in asked] == ["tile_product"]
    assert list(products(ptx)) == [(-(-144 // base.positions), base.num_warps)]
    assert len(tuner.store) == 0


def test_sizes_that_nobody_would_try_are_not_launched(tune, tmp_path: Path) -> None:
    """The file may have been edited, or written for other candidates."""
    work = Work("tile_sample", "half", (64, 64), 5000, torch.device("cpu"))
    base = Config(64, 4, 3)
    for sizes, expected in ((Config(64, 8, 3), Config(64, 8, 3)), (Config(32, 4, 3), base)):
        path = tmp_path / f"{sizes.positions}.jsonl"
        fresh = Tuner(Store(path, Tuned.of), Stopwatch(lambda number: 1.0, make=False))
        assert fresh.sizes(work, base, print) == base
        row = json.loads(path.read_text())
        path.write_text(json.dumps({**row, **sizes._asdict()}) + "\n")
        again = Tuner(Store(path, Tuned.of), Stopwatch(lambda number: 1.0))
        assert again.sizes(work, base, print) == expected


def test_similar_numbers_of_positions_share_a_measurement() -> None:
    watch = Stopwatch(lambda number: 1.0, make=False)
    tuner = Tuner(Store(None, Tuned.of), watch)
    work = Work("tile_sample", "half", (64, 64), 0, torch.device("cpu"))
    for positions in (2049, 3000, 4096, 4097):
        tuner.sizes(work._replace(positions=positions), Config(64, 4, 3), print)
    assert {work.positions for work, _ in watch.timed} == {2049, 4097}


def test_without_memory_to_measure_in_the_table_is_used_and_nothing_kept() -> None:
    def full(work: Work) -> Clock:
        def clock(run: Any) -> float:
            raise torch.OutOfMemoryError("no room for what empties the cache")

        return clock

    tuner = Tuner(Store(None, Tuned.of), full)
    work = Work("tile_sample", "half", (64, 64), 5000, torch.device("cpu"))
    assert tuner.sizes(work, Config(64, 4, 3), print) == Config(64, 4, 3)
    assert len(tuner.store) == 0


def test_when_launches_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work("tile_product", "half", (64, 64), 5000, torch.device("cuda", 0))
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.delenv("SPARSEKD_TUNE", raising=False)
    assert triton_tuning.gpu_clock(work) is not None
    assert triton_tuning.gpu_clock(work._replace(positions=1000)) is None
    assert triton_tuning.gpu_clock(work._replace(device=torch.device("cpu"))) is None
    capturing = True
    assert triton_tuning.gpu_clock(work) is None
    capturing = False
    monkeypatch.setenv("SPARSEKD_TUNE", "off")
    assert triton_tuning.gpu_clock(work) is None
    assert not triton_tuning.enabled()


def test_info_names_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEKD_CACHE", str(tmp_path))
    triton_tuning.tuner.cache_clear()
    facts = triton_tuning.info()
    triton_tuning.tuner.cache_clear()
    assert Path(facts["path"]).parent == tmp_path
    assert Path(facts["path"]).name.startswith("tuning-")
    assert facts["known"] == 0


@pytest.mark.parametrize(
    "damage", [{"positions": "64"}, {"num_warps": None}, {"ms": "fast"}, {"num_stages": 1.5}]
)
def test_damaged_entries_are_skipped(tmp_path: Path, damage: dict[str, Any]) -> None:
    path = tmp_path / "tuned.jsonl"
    good = dataclasses.asdict(Tuned(64, 4, 3, 1.0))
    rows = [{"kind": "bad", "step": 1, **good, **damage}, {"kind": "good", "step": 1, **good}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = Store(path, Tuned.of)
    assert store.get("bad", 1) is None
    assert store.get("good", 1) == Tuned(64, 4, 3, 1.0)


BASES = [
    (kind, config.choose(kind, channels, dtype, precision, positions, architecture, vectors=wide))
    for kind in ("product", "sample")
    for channels in (16, 32, 64, 128)
    for dtype, precision in (("fp16", "ieee"), ("fp32", "tf32"), ("fp32", "ieee"))
    for positions in (20, 1 << 20)
    for architecture in ("sm_80", "sm_90", "sm_100", "gfx942")
    for wide in (True, False)
]


@pytest.mark.parametrize("kind", ["product", "sample"])
def test_candidates_cut_sums_alike(kind: str) -> None:
    for base in {base for of, base in BASES if of == kind}:
        tried = config.candidates(kind, base, 1 << 20)
        assert tried[0] == base
        assert len(set(tried)) == len(tried) <= MOST
        for how in tried:
            assert (how.num_warps < 4) == (base.num_warps < 4)
            if kind == "sample":
                assert how.positions == base.positions
            else:
                assert how.positions == base.positions or 64 <= how.positions <= 256


def test_layers_of_other_sizes_run_the_same_code(on_triton, ptx, monkeypatch) -> None:
    """What Triton compiles anew costs a second, and eight where it is tuned."""
    variants: set[tuple[str, str]] = set()

    def compile_nothing(**facts: Any) -> bool:
        variants.add((facts["fn"].name.rpartition(".")[2], str(facts["compile"]["key"])))
        return True

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", compile_nothing)
    monkeypatch.setattr(ptx, "get_current_device", lambda: 1)  # for which nothing is compiled yet
    for channels, size, stride, batch in ((32, 8, 1, 16), (512, 9, 1, 48), (64, 32, 2, 40)):
        case = dataclasses.replace(
            LAYER, in_features=channels, out_features=2 * channels, batch=(batch,),
            kernel_size=(3, 3), map_size=(size, size), options={"padding": 1, "stride": stride},
        )  # fmt: skip
        sparse_results(case)
    number = Counter(name for name, _ in variants)
    # One product has a bias, that of the input gradient has none; with a stride it writes every so
    # many pixels.
    assert number == {"tile_product": 3, "tile_sample": 1, "take_values": 1, "add_parts": 1}


@pytest.mark.parametrize("dtype, precision", [("fp16", "ieee"), ("fp32", "tf32"), ("fp32", "ieee")])
def test_short_lists_fill_no_pipeline(dtype: str, precision: str) -> None:
    sizes = "product", 64, dtype, precision, 5000, "sm_90"
    stages = [config.choose(*sizes, chunks=chunks).num_stages for chunks in (0.1, 3.0, 3.1, 50.0)]
    assert stages == [2, 2, 3, 3]
    # The sizes that tuning starts from are part of what it remembers: the two are tuned apart.
    assert len({config.choose(*sizes, chunks=chunks) for chunks in (1.0, 9.0)}) == 2
