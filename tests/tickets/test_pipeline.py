"""Where each method starts, what it leaves alone, and which methods coincide."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsekd import Layout
from sparsekd.dst import METHODS, Dynamics
from sparsekd.errors import CheckpointError, UnsupportedError
from sparsekd.nn import densify, sparse_modules
from sparsekd.tickets import (
    DistillationConfig,
    Superposition,
    make_ticket,
    masked_layers,
)
from sparsekd.train import (
    Interrupted,
    Trainer,
    Training,
    load_state,
    save_model,
    state_hash,
)

MASKED = {"convolutions": 54 + 432, "all": 54 + 432 + 288}


def masks_of(model):
    return {name: module.topology.mask() for name, module in sparse_modules(model)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_dense_run_leaves_its_start_and_every_epoch(pipeline):
    files = sorted(path.name for path in (pipeline.folder / "dense").glob("*.safetensors"))
    assert files == [f"epoch_{epoch:03}.safetensors" for epoch in range(4)]
    assert state_hash(pipeline.dense_state(0)) == state_hash(pipeline.fresh().state_dict())
    hashes = {state_hash(pipeline.dense_state(epoch)) for epoch in range(4)}
    assert len(hashes) == 4


@pytest.mark.parametrize(
    "method, epoch", [("lt", 0), ("kd", 0), ("rewind", 1), ("kd-rewind", 1), ("lr-rewind", 3)]
)
def test_a_ticket_starts_from_the_dense_run_bit_for_bit(pipeline, method, epoch):
    masks = pipeline.one_shot_masks(0.6)
    ticket = densify(pipeline.start(METHODS[method], masks))
    expected = pipeline.dense_state(epoch)
    for name, mask in masks.items():
        expected[f"{name}.weight"] = torch.where(mask, expected[f"{name}.weight"], 0.0)
    assert state_hash(ticket.state_dict()) == state_hash(expected)


def test_reinit_shares_the_masks_and_no_weight(pipeline):
    masks = pipeline.one_shot_masks(0.6)
    lt = pipeline.start(METHODS["lt"], masks)
    reinit = pipeline.start(METHODS["reinit"], masks)
    assert same(masks_of(lt), masks_of(reinit))
    for (_, a), (_, b) in zip(sparse_modules(lt), sparse_modules(reinit), strict=True):
        assert not (a.values == b.values).any()


FIXED = [m.name for m in METHODS.values() if m.updater is None and m.start != "none"]


@pytest.mark.parametrize("method", FIXED)
def test_masks_and_teacher_are_the_same_after_training(pipeline, method):
    masks = pipeline.one_shot_masks(0.6)
    trainer = pipeline.ticket_trainer(METHODS[method], masks, method)
    teacher = getattr(trainer.objective, "teacher", nn.Identity())
    before = state_hash(teacher.state_dict())
    start = state_hash(trainer.model.state_dict())
    rows = trainer.fit()
    assert len(rows) == 3 - METHODS[method].start_epoch(1)
    assert state_hash(trainer.model.state_dict()) != start
    assert same(masks_of(trainer.model), masks)
    assert state_hash(teacher.state_dict()) == before
    assert trainer.model[-1].weight.count_nonzero() == 72 * 4  # the linear layer is dense


def final_hash(pipeline, method, name):
    trainer = pipeline.ticket_trainer(METHODS[method], pipeline.one_shot_masks(0.6), name)
    trainer.fit()
    return state_hash(trainer.model.state_dict())


def test_rewinding_to_epoch_0_is_the_lottery_ticket(pipeline):
    pipeline = replace(pipeline, rewind_epoch=0)
    assert final_hash(pipeline, "rewind", "a") == final_hash(pipeline, "lt", "b")
    assert final_hash(pipeline, "kd-rewind", "c") == final_hash(pipeline, "kd", "d")


def test_distilling_with_alpha_0_is_the_lottery_ticket(pipeline):
    without = replace(pipeline, distillation=DistillationConfig(alpha=0.0))
    assert final_hash(without, "kd", "a") == final_hash(without, "lt", "b")
    assert final_hash(pipeline, "kd", "c") != final_hash(pipeline, "lt", "d")


def test_rewinding_the_weights_to_the_end_leaves_nothing_to_train(pipeline):
    pipeline = replace(pipeline, rewind_epoch=3)
    trainer = pipeline.ticket_trainer(METHODS["rewind"], pipeline.one_shot_masks(0.6), "a")
    before = state_hash(trainer.model.state_dict())
    assert trainer.fit() == []
    assert state_hash(trainer.model.state_dict()) == before


def test_weight_and_rate_rewinding_coincide_where_the_weights_do(pipeline):
    save_model(pipeline.checkpoint(1), pipeline.dense_final())
    assert final_hash(pipeline, "rewind", "a") == final_hash(pipeline, "lr-rewind", "b")


def test_an_unpruned_rewound_run_repeats_the_dense_one(make_pipeline):
    # Without momentum the state after epoch k is the whole state of the run.
    training = Training(epochs=3, batch_size=32, momentum=0.0, milestones=(2,))
    pipeline = make_pipeline(training=training, rewind_epoch=1)
    pipeline.dense_trainer().fit()
    model = pipeline.fresh()
    model.load_state_dict(pipeline.dense_state(1))
    dense = pipeline.dense_trainer()
    again = Trainer(model, pipeline.data.train, training, seed=dense.seed, start_epoch=1)
    again.fit()
    assert state_hash(model.state_dict()) == state_hash(pipeline.dense_state(3))


def test_iterative_rounds_are_nested_and_restart_from_the_rewound_weights(pipeline):
    imp, previous, outer = METHODS["imp"], None, None
    rewound = pipeline.dense_state(1)
    remaining = 54 + 432
    for number in (1, 2, 3):
        masks = pipeline.next_masks(previous, 0.2)
        remaining -= -(-remaining // 5)
        assert sum(int(mask.sum()) for mask in masks.values()) == remaining
        if outer is not None:
            assert all(bool((outer[name] | ~masks[name]).all()) for name in masks)
        trainer = pipeline.ticket_trainer(imp, masks, f"imp{number}")
        for name, module in sparse_modules(trainer.model):
            assert torch.equal(module.values, rewound[f"{name}.weight"][masks[name]])
        trainer.fit()
        previous, outer = pipeline.folder / f"imp{number}.safetensors", masks
        save_model(previous, trainer.model)
        assert same(masks_of(trainer.model), masks)
        assert load_state(previous).keys() == trainer.model.state_dict().keys()


def test_tickets_wait_for_the_dense_run(make_pipeline):
    with pytest.raises(CheckpointError, match="epoch_003"):
        make_pipeline().one_shot_masks(0.5)


def test_a_ticket_stores_only_its_weights(pipeline):
    dense = pipeline.dense_final()
    ticket = make_ticket(dense, pipeline.one_shot_masks(0.75))
    stored = sum(module.values.numel() for _, module in sparse_modules(ticket))
    assert stored == 486 - int(0.75 * 486)
    assert state_hash(dense.state_dict()) == state_hash(pipeline.dense_state(3))


def test_random_masks_need_no_dense_run_and_meet_the_sparsity(make_pipeline):
    pipeline = make_pipeline()
    masks = pipeline.masks(METHODS["rigl"], 0.8)
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.2 * MASKED["all"])
    start = pipeline.start(METHODS["rigl"], masks)
    for name, module in sparse_modules(start):
        assert torch.equal(module.values, pipeline.fresh().get_submodule(name).weight[masks[name]])
    other = replace(pipeline, seed=1).masks(METHODS["rigl"], 0.8)
    assert not same(masks, other)


@pytest.mark.parametrize("name", ["lt", "rigl", "snip", "imp"])
def test_a_row_says_which_layers_get_masks(make_pipeline, name):
    pipeline, convolutions = make_pipeline(), replace(METHODS[name], layers="convolutions")
    save_model(pipeline.checkpoint(3), pipeline.fresh("final"))
    save_model(pipeline.checkpoint(1), pipeline.fresh())
    save_model(pipeline.checkpoint(0), pipeline.fresh())
    for method, layers in (
        (convolutions, ["0", "3"]),
        (replace(convolutions, layers="all"), ["0", "3", "7"]),
    ):
        assert masked_layers(method, pipeline.fresh()).keys() == set(layers)
        if method.iterative:
            masks = pipeline.next_masks(None, 0.8, method.layers)
        else:
            masks = pipeline.masks(method, 0.8)
        total = sum(mask.numel() for mask in masks.values())
        assert sorted(masks) == layers
        stored = sum(int(mask.sum()) for mask in masks.values())
        assert abs(stored - 0.2 * total) < 1
        assert [name for name, _ in sparse_modules(pipeline.start(method, masks))] == layers


@pytest.mark.parametrize("name", ["lt", "rigl", "snip", "imp"])
def test_a_pipeline_may_say_it_for_all_methods_and_leave_layers_out(make_pipeline, name):
    method, pipeline = METHODS[name], make_pipeline(layers="all", skip=("0",))
    for epoch in (0, 1, 3):
        save_model(pipeline.checkpoint(epoch), pipeline.fresh("final" if epoch == 3 else "init"))
    for layers, masked in (("all", ["3", "7"]), ("convolutions", ["3"])):
        changed = replace(pipeline, layers=layers)
        if method.iterative:
            masks = changed.next_masks(None, 0.8, method.layers)
        else:
            masks = changed.masks(method, 0.8)
        assert sorted(masks) == masked
    with pytest.raises(ValueError, match="skip: 'conv1' matches none of 0, 3, 7"):
        replace(pipeline, skip=("conv1",)).masks(method, 0.8)


def test_a_network_without_layers_to_mask_is_refused():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    assert list(masked_layers(METHODS["rigl"], linear)) == ["1"]
    with pytest.raises(ValueError, match="lt masks convolutions, the network has none; --set lay"):
        masked_layers(METHODS["lt"], linear)
    assert list(masked_layers(METHODS["lt"], linear, "all")) == ["1"]


@pytest.mark.parametrize("name", ["static", "rigl", "gmp", "snip", "reinit"])
def test_sparse_initialisation_scales_the_networks_own(pipeline, name):
    masks, method = pipeline.masks(METHODS[name], 0.8), METHODS[name]
    kept, scaled = (
        replace(pipeline, init=init).start(method, masks) for init in ("keep", "sparse")
    )
    for (layer, a), (_, b) in zip(sparse_modules(kept), sparse_modules(scaled), strict=True):
        rows = masks[layer].flatten(1)
        factor = (rows[0].numel() / rows.sum(1, keepdim=True)).sqrt().expand(rows.shape)[rows]
        torch.testing.assert_close(b.values, a.values * factor)
        if rows.all():
            assert torch.equal(a.values, b.values)


def test_sparse_initialisation_leaves_tickets_alone(pipeline):
    masks = pipeline.one_shot_masks(0.8)
    for name in ("lt", "kd", "rewind", "lr-rewind"):
        starts = [
            replace(pipeline, init=init).start(METHODS[name], masks) for init in ("keep", "sparse")
        ]
        assert len({state_hash(start.state_dict()) for start in starts}) == 1


def test_sparse_initialisation_keeps_the_variance_of_preactivations(make_pipeline):
    """Whatever the number of inputs that masks leave a neuron."""

    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(1024, 4096, bias=False))

    pipeline = make_pipeline(init="sparse")
    rows = torch.arange(4096) % 4  # 1024, 256, 64 and 16 inputs
    mask = torch.rand(4096, 1024, generator=torch.Generator().manual_seed(0)).argsort(1)
    masks = {"1": mask < 1024 // 4 ** rows[:, None]}
    model = replace(pipeline, build=build).start(METHODS["static"], masks)
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    variance = model(x).var(0)
    dense = torch.nn.functional.linear(x, build(0)[1].weight).var().item()
    for kind in range(4):
        assert variance[rows == kind].mean().item() == pytest.approx(dense, rel=0.06)


MOVING = [m.name for m in METHODS.values() if m.updater is not None]
BUSY = {
    "dynamics": Dynamics(drop_fraction=0.5, every=2, until=1.0),
    "superposition": Superposition(cycle_fraction=0.7, cycle_epochs=1, lr=(0.01, 0.05)),
}


@pytest.mark.parametrize("name", MOVING)
def test_a_moving_topology_ends_at_its_sparsity(pipeline, name):
    pipeline, method = replace(pipeline, **BUSY), METHODS[name]
    masks = pipeline.masks(method, 0.8)
    trainer = pipeline.ticket_trainer(method, masks, name, 0.8)
    trainer.fit()
    numel = MASKED[method.layers]
    target = numel - int(0.8 * numel) if method.start == "pruned" else round(0.2 * numel)
    if name == "srigl":  # a fan-in is whole from the start
        target = sum(int(mask.sum()) for mask in masks.values())
        assert abs(target - 0.2 * numel) < sum(len(mask) for mask in masks.values())
    for model in (trainer.model, pipeline.outcome(trainer)):
        moved = masks_of(model)
        assert not same(moved, masks)
        missing = target - sum(int(mask.sum()) for mask in moved.values())
        # a constant fan-in is whole: up to one weight a neuron stays out
        assert (
            0 <= missing < sum(len(mask) for mask in moved.values())
            if name == "srigl"
            else (missing == 0)
        )


@pytest.mark.parametrize("step", [2, 5, 9])  # five steps an epoch
@pytest.mark.parametrize("name", [*MOVING, "snip", "small-dense"])
def test_every_method_resumes_bit_equal(pipeline, stop_at, name, step):
    pipeline, method = replace(pipeline, **BUSY, build_narrow=narrow), METHODS[name]

    def trainer(folder, stop=None):
        given = replace(pipeline, stop=stop)
        return given.ticket_trainer(method, given.masks(method, 0.8), folder, 0.8)

    whole = trainer("whole")
    whole.fit()
    with pytest.raises(Interrupted):
        trainer("parts", stop_at(step)).fit()
    torch.manual_seed(99)
    resumed = trainer("parts")
    assert 0 < resumed.epoch * 5 + resumed._step < 15
    resumed.fit()
    for key in ("train_loss", "flops", "updates"):
        assert [row[key] for row in resumed.rows] == [row[key] for row in whole.rows]
    first, second = (state_hash(pipeline.outcome(t).state_dict()) for t in (whole, resumed))
    assert first == second


def narrow(seed, sparsity):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(128, 4)),
        )


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
def test_masks_from_one_batch_cover_every_layer_exactly(make_pipeline, name):
    pipeline = make_pipeline()
    masks = pipeline.masks(METHODS[name], 0.8)
    assert set(masks) == {"0", "3", "7"}
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.2 * MASKED["all"])
    assert same(masks, pipeline.masks(METHODS[name], 0.8))


@pytest.mark.parametrize("name", ["gmp", "granet", "acdc", "topkast"])
def test_a_method_that_starts_denser_wants_to_know_where_it_ends(make_pipeline, name):
    pipeline = make_pipeline()
    masks = pipeline.masks(METHODS[name], 0.8)
    with pytest.raises(ValueError, match=f"sparsity: expected a number for {name}"):
        pipeline.ticket_trainer(METHODS[name], masks, name)


def test_small_dense_needs_its_network(make_pipeline):
    with pytest.raises(ValueError, match="build_narrow"):
        make_pipeline().ticket_trainer(METHODS["small-dense"], {}, "a", 0.8)


@pytest.mark.parametrize("method", ["lt", "static", "srigl", "gmp", "granet"])
def test_every_start_has_the_layout(make_pipeline, method):
    layout = Layout.parse("bcsr:2")
    pipeline = make_pipeline(layout=layout)
    save_model(pipeline.checkpoint(0), pipeline.fresh())
    save_model(pipeline.checkpoint(3), pipeline.fresh("final"))
    masks = pipeline.masks(METHODS[method], 0.7)
    model = pipeline.ticket_trainer(METHODS[method], masks, method, 0.7).model
    for _, module in sparse_modules(model):
        assert module.layout == layout
        layout.check(module.topology.mask())
    with pytest.raises(UnsupportedError, match="method 'snip' does not support layout 'bcsr:2'"):
        pipeline.masks(METHODS["snip"], 0.7)


@pytest.mark.parametrize("method", ["gmp", "granet", "acdc", "topkast", "srigl"])
def test_a_method_that_cannot_keep_the_layout_is_refused_by_name(make_pipeline, method):
    """Some start with all weights, which "nm" cannot have: that is not what is to be said."""
    pipeline = make_pipeline(layout=Layout.parse("nm"))
    with pytest.raises(UnsupportedError, match=f"'{method}' does not support layout 'nm:2:4'"):
        pipeline.masks(METHODS[method], 0.5)
