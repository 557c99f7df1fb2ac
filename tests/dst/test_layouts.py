"""Dynamic sparse training keeps every layout: whole tiles come and go, by each method's rules."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsekd as skd
from sparsekd import Layout, dst
from sparsekd.dst import Updater
from sparsekd.dst.tile_grid import TileGrid, slack
from sparsekd.errors import UnsupportedError
from sparsekd.nn import SparseConv2d, SparseLinear, sparse_modules

BCSR, FANIN, TILED_FANIN, NM = map(Layout.parse, ("bcsr:4", "fanin", "fanin:4x2", "nm:2:4"))
Make = Callable[..., Updater]


def moving(method: type[Updater], **options: Any) -> Make:
    def make(model, opt, until, **rest):
        rest.pop("sparsity")
        return method(model, opt, drop_fraction=0.5, every=1, until=until, **options, **rest)

    return make


def pruning(method: type[Updater], **options: Any) -> Make:
    def make(model, opt, until, sparsity, seed):
        more = {"until": until, "every": 1} if method is not dst.ACDC else {}
        return method(model, opt, sparsity=sparsity, seed=seed, **more, **options)

    return make


METHODS: dict[str, tuple[Make, list[Layout]]] = {
    "static": (moving(dst.Static), [BCSR, FANIN, TILED_FANIN, NM]),
    "set": (moving(dst.SET), [BCSR, FANIN, TILED_FANIN, NM]),
    "itop": (moving(dst.ITOP), [BCSR, FANIN, TILED_FANIN, NM]),
    "rigl": (moving(dst.RigL), [BCSR, FANIN, TILED_FANIN, NM]),
    "snfs": (moving(dst.SNFS), [BCSR, FANIN, TILED_FANIN, NM]),
    "snfs-redistribute": (moving(dst.SNFS, redistribute=True), [BCSR]),
    "rigl-sg": (moving(dst.RigLSG), [BCSR]),
    "rigl-sm": (moving(dst.RigLSM), [BCSR]),
    "srigl": (moving(dst.SRigL), [BCSR, FANIN, TILED_FANIN]),
    "mest": (pruning(dst.MEST, mutation=0.1, extra=0.1), [BCSR, FANIN, TILED_FANIN]),
    "gmp": (pruning(dst.GMP), [BCSR, FANIN, TILED_FANIN]),
    "gmp-layer": (pruning(dst.GMP, scope="layer"), [BCSR, FANIN, TILED_FANIN]),
    "granet": (pruning(dst.GraNet), [BCSR, FANIN, TILED_FANIN]),
    "acdc": (
        pruning(dst.ACDC, compress=range(2, 99, 4), decompress=range(4, 99, 4)),
        [BCSR],
    ),
}
CASES = [
    pytest.param(make, layout, id=f"{name}-{layout}")
    for name, (make, layouts) in METHODS.items()
    for layout in layouts
]
UPDATES = 17


def start_of(layout: Layout, make: Make) -> float:
    if layout.name == "nm":
        return 0.5
    return 0.0 if make in (METHODS[n][0] for n in ("gmp", "gmp-layer", "granet", "acdc")) else 0.6


def tile_counts(model: nn.Module) -> dict[str, int]:
    return {n: TileGrid(m.topology, m.layout).tiles.nnz for n, m in sparse_modules(model)}


def at_positions(module: Any, per_weight: Tensor) -> Tensor:
    flat = torch.zeros(module.topology.numel, dtype=per_weight.dtype)
    return flat.index_copy(0, module.topology.flat_indices(), per_weight.detach())


def dense_view(opt: torch.optim.Optimizer, model: nn.Module) -> list[Tensor]:
    return [
        at_positions(module, tensor)
        for _, module in sparse_modules(model)
        for tensor in (module.values, opt.state[module.values]["momentum_buffer"])
    ]


def check_counts(updater: Any, start: dict[str, int], sparsity: float) -> None:
    """Check the numbers of tiles against what the method promises."""
    now = tile_counts(updater.model)
    grids = updater.grids()
    match type(updater).__name__:
        case "Static" | "SET" | "ITOP" | "RigL":
            assert now == start
        case "SNFS" | "RigLSG" | "RigLSM":
            assert sum(now.values()) == sum(start.values())
        case "SRigL":
            for name, grid in grids.items():
                fans = grid.tiles.crow_indices.diff()
                used = int((fans > 0).sum())
                assert len(fans[fans > 0].unique()) <= 1 or name not in updater.last_update
                assert 0 <= start[name] - now[name] < max(used, 1)
        case "GMP" | "GraNet" | "ACDC":
            miss = abs(updater.nnz() - updater.target(updater.iteration))
            if all(g.layout.name == "bcsr" for g in grids.values()) and exact(updater):
                assert miss <= slack(grids)
            else:  # a ragged tile counts as the mean of its layer
                assert miss <= sum(g.grain for g in grids.values()) + 0.15 * updater.numel()


def exact(updater: Any) -> bool:
    """Return whether each count is the nearest; GraNet goes on to move tiles of unequal size."""
    return type(updater) is not dst.GraNet and getattr(updater, "scope", "global") == "global"


@pytest.mark.parametrize("make, layout", CASES)
@settings(max_examples=6, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 11), min_size=3, max_size=3),
    kernel=st.sampled_from([1, 3]),
    groups=st.sampled_from([1, 2]),
    dead=st.sampled_from([False, False, True]),
    seed=st.integers(0, 1000),
)
def test_a_hundred_random_updates(make, layout, sizes, kernel, groups, dead, seed):
    """17 updates on each of 6 networks: 1x1 and 3x3, ragged, grouped, with dead gradients."""
    torch.manual_seed(seed)
    first, hidden, out = sizes[0], sizes[1] * groups, sizes[2]
    begin = start_of(layout, make)
    options = {"layout": layout, "sparsity": begin, "seed": seed}
    model = nn.Sequential(
        SparseConv2d(first, hidden, 1, **options),
        nn.Tanh(),
        SparseConv2d(hidden, 2 * groups, kernel, padding=kernel // 2, groups=groups, **options),
        nn.Flatten(),
        SparseLinear(8 * groups, out, **options),
    ).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    start = tile_counts(model)
    sparsity = max(begin, 0.7)
    updater = make(model, opt, until=UPDATES + 1, sparsity=sparsity, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(UPDATES):
        opt.zero_grad()
        x = torch.randn(2, first, 2, 2, generator=generator, dtype=torch.float64)
        (model(x).tanh().sum() * (not dead)).backward()
        opt.step()
        before = dense_view(opt, model)
        masks = {name: module.topology.mask() for name, module in sparse_modules(model)}
        rewired = updater.step()
        for name, module in sparse_modules(model):
            mask = module.topology.mask()
            layout.check(mask, name)
            update = updater.last_update.get(name) if rewired else None
            if update is not None:
                assert int((masks[name] & ~mask).sum()) == update.dropped - update.regrown
                assert int((mask & ~masks[name]).sum()) == update.grown - update.regrown
        check_counts(updater, start, sparsity)
        stored = [m.topology.mask().view(-1) for _, m in sparse_modules(model) for _ in range(2)]
        for old, new, mask in zip(before, dense_view(opt, model), stored, strict=True):
            assert torch.equal(new, old * mask)


# -- resuming -------------------------------------------------------------------------------------


class Run:
    def __init__(self, layout: Layout, make: Make, seed: int) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(90, 7))
        skd.sparsify(self.model, start_of(layout, make), "uniform", layout=layout, seed=seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.dst = make(self.model, self.optimizer, until=9, sparsity=0.7, seed=seed)

    def train(self, first: int, last: int) -> None:
        for t in range(first, last):
            x = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(t))
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            if not (t % 2 and self.dst.step()):
                self.optimizer.step()

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (self.dst, self.model, self.optimizer)], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        states = torch.load(file, weights_only=True)
        for part, state in zip((self.dst, self.model, self.optimizer), states, strict=True):
            part.load_state_dict(state)


@pytest.mark.parametrize("make, layout", CASES)
def test_resuming_is_bit_equal(make, layout):
    straight = Run(layout, make, seed=1)
    straight.train(0, 5)
    file = straight.save()
    straight.train(5, 10)
    resumed = Run(layout, make, seed=2)
    resumed.load(file)
    resumed.train(5, 10)
    ours, theirs = resumed.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for a, b in zip(
        resumed.optimizer.state.values(), straight.optimizer.state.values(), strict=True
    ):
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])


# -- what is not supported ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, layout, text",
    [
        (METHODS["gmp"][0], NM, "GMP does not support layout 'nm:2:4', which layer '' has"),
        (METHODS["mest"][0], NM, "MEST does not support layout 'nm:2:4'"),
        (METHODS["srigl"][0], NM, "SRigL does not support layout 'nm:2:4'"),
        (METHODS["rigl-sg"][0], FANIN, "RigLSG does not support layout 'fanin:1x1'"),
        (METHODS["acdc"][0], FANIN, "ACDC does not support layout 'fanin:1x1'"),
        (
            METHODS["snfs-redistribute"][0],
            NM,
            "SNFS with redistribute=True does not support layout",
        ),
        (
            lambda model, opt, **rest: dst.TopKAST(
                model, opt, sparsity=0.5, backward_sparsity=0.4, until=9
            ),
            BCSR,
            "TopKAST does not support layout 'bcsr:4'",
        ),
    ],
)
def test_a_method_that_cannot_keep_a_layout_says_so(make, layout, text):
    layer = SparseLinear(16, 16, sparsity=0.5, layout=layout)
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match=text):
        make(layer, opt, until=9, sparsity=0.6, seed=0)


def test_redistribution_wants_one_layout():
    model = nn.Sequential(SparseLinear(8, 8), SparseLinear(8, 8, layout="bcsr:4"))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match=r"one layout in all of them, got bcsr:4, csr"):
        dst.RigLSG(model, opt, every=1, until=9)


def test_a_rule_of_growth_without_its_ranking_is_refused_in_cells():
    class Lowest(dst.RigL):
        def grow(self, name, kept, k):
            return (~kept.mask()).flatten().nonzero().squeeze(1)[:k]

    layer = SparseLinear(16, 16, sparsity=0.5, layout=NM)
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match="Lowest replaces grow but not ranking"):
        Lowest(layer, opt, until=9)
    skd.relayout(layer, "csr")
    skd.relayout(tiled := SparseLinear(16, 16, sparsity=0.5, layout=BCSR), BCSR)
    for fine in (layer, tiled):
        opt = torch.optim.SGD(fine.parameters(), lr=0.1)
        updater = Lowest(fine, opt, every=1, until=9)
        fine(torch.randn(2, 16)).sum().backward()
        assert updater.step()
        assert fine.layout.fits(fine.topology.mask())


def test_layers_of_several_layouts_train_together():
    model = nn.Sequential(
        SparseLinear(16, 16, sparsity=0.5),
        SparseLinear(16, 16, sparsity=0.5, layout=BCSR),
        SparseLinear(16, 16, sparsity=0.5, layout=TILED_FANIN),
    )
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = dst.GraNet(model, opt, sparsity=0.8, every=1, until=8)
    for _ in range(8):
        opt.zero_grad()
        model(torch.randn(4, 16)).square().sum().backward()
        if not updater.step():
            opt.step()
    for module in model:
        module.layout.check(module.topology.mask())
    assert abs(updater.nnz() - round(0.2 * 768)) <= 16


def test_frozen_layers_may_have_any_layout():
    model = nn.Sequential(SparseLinear(8, 8, sparsity=0.5, layout=NM), SparseLinear(8, 8))
    model[0].values.requires_grad_(False)
    opt = torch.optim.SGD(model[1].parameters(), lr=0.1)
    assert dst.GMP(model, opt, sparsity=0.95, until=100).nnz() == model[1].topology.nnz


def test_srigl_ablates_groups_of_rows():
    torch.manual_seed(0)
    layout = Layout("fanin", group=4, block=2)
    layer = SparseLinear(40, 24, sparsity=0.8, layout=layout, seed=0)
    model = nn.Sequential(layer, SparseLinear(24, 3, sparsity=0.0, layout="fanin"))
    with torch.no_grad():
        layer.values[: layer.topology.nnz // 3] *= 1e-6  # two of six groups
        model[1].values.mul_(model[1].topology.col_indices >= 8)  # and nobody listens to them
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = dst.SRigL(model, opt, every=1, until=9)
    updater.schedule = lambda iteration: 0.4
    tiles = TileGrid(layer.topology, layout).tiles.nnz
    model(torch.randn(6, 40)).square().sum().backward()
    assert updater.step()
    grid = TileGrid(layer.topology, layout)
    assert grid.tiles.crow_indices.diff().tolist() == [0, 0, *[tiles // 4] * 4]
    layout.check(layer.topology.mask())


def test_superposing_blocks_keeps_blocks():
    models = [
        nn.Sequential(SparseLinear(32, 24, sparsity=0.75, layout=BCSR, seed=seed))
        for seed in (0, 1)
    ]
    union = skd.tickets.superpose(models)
    merged = skd.tickets.superpose(models, sparsity=0.75)
    mean = (models[0][0].dense_weight() + models[1][0].dense_weight()) / 2
    torch.testing.assert_close(union[0].dense_weight(), mean)
    assert merged[0].topology.nnz == models[0][0].topology.nnz
    BCSR.check(merged[0].topology.mask())
    pooled = BCSR.tiling((24, 32)).pool(mean.abs())
    kept = BCSR.tiling((24, 32)).pool(merged[0].topology.mask().int()) > 0
    assert pooled[kept].min() >= pooled[~kept].max()
    fan = nn.Sequential(SparseLinear(8, 8, layout="fanin"))
    with pytest.raises(UnsupportedError, match="superposition, which takes unions of masks, does"):
        skd.tickets.superpose([fan, copy.deepcopy(fan)])
