"""nn.MultiheadAttention with sparse projections, against the dense module of the same weights."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sparsekd as skd
from sparsekd.errors import ShapeError
from sparsekd.nn import SplitAttention, sparse_modules

pytestmark = pytest.mark.filterwarnings("ignore:no weight is left", "ignore:sparsify leaves")
KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "batch_first": {"batch_first": True},
    "own sizes": {"kdim": 6, "vdim": 10},
    "no bias": {"bias": False},
    "own sizes, no bias": {"kdim": 6, "bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True, "add_zero_attn": True},
    "zero": {"add_zero_attn": True, "batch_first": True},
}
EMBED, HEADS, BATCH, LENGTH, SOURCE = 8, 2, 3, 5, 4


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


def attention(dtype: torch.dtype = torch.float64, **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(EMBED, HEADS, **options)
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    return dense.to(dtype).eval()


def sparse_and_twin(**options: Any) -> tuple[SplitAttention, nn.MultiheadAttention]:
    sparse = skd.sparsify(attention(**options), sparsity=0.5)
    return sparse, skd.densify(copy.deepcopy(sparse))


def inputs(dense: nn.MultiheadAttention, batched: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(LENGTH, EMBED), (SOURCE, dense.kdim), (SOURCE, dense.vdim)]
    found = []
    for length, size in sizes:
        shape = (BATCH, length, size) if dense.batch_first else (length, BATCH, size)
        shape = shape if batched else (length, size)
        dtype = dense.out_proj.weight.dtype
        found.append(torch.randn(shape, generator=generator).to(dtype).requires_grad_())
    return found


def assert_same(found: Any, expected: Any, limit: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=limit, atol=limit)


def masks(batched: bool = True) -> dict[str, Tensor | None]:
    between = torch.zeros(LENGTH, SOURCE, dtype=torch.bool)
    between[:2, 2:] = True
    each = torch.randn(BATCH * HEADS if batched else HEADS, LENGTH, SOURCE).double()
    return {"none": None, "bool": between, "float": each[0], "each head": each}


@pytest.mark.parametrize("mask", ["none", "bool", "float", "each head"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("weights", ["no", "mean", "all"])
@pytest.mark.parametrize("batched", [True, False])
def test_numbers_and_gradients_are_those_of_the_dense_module(kind, mask, padded, weights, batched):
    sparse, dense = sparse_and_twin(**kind)
    assert type(dense) is nn.MultiheadAttention
    options: dict[str, Any] = {
        "need_weights": weights != "no",
        "average_attn_weights": weights == "mean",
        "attn_mask": masks(batched)[mask],
    }
    if padded:
        padding = torch.zeros(BATCH, SOURCE, dtype=torch.bool)
        padding[1, -1] = True
        padding = padding if batched else padding[1]
        floats = options["attn_mask"] is not None and options["attn_mask"].dtype != torch.bool
        options["key_padding_mask"] = (
            padding.double().masked_fill(padding, -torch.inf) if floats else padding
        )
    mine, theirs = inputs(dense, batched), inputs(dense, batched)
    found, expected = sparse(*mine, **options), dense(*theirs, **options)
    assert_same(found, expected)
    seed = torch.randn_like(found[0])
    (found[0] * seed).sum().backward()
    (expected[0] * seed).sum().backward()
    assert_same([x.grad for x in mine], [x.grad for x in theirs])
    assert_same_gradients(sparse, dense)


def assert_same_gradients(sparse: SplitAttention, dense: nn.MultiheadAttention) -> None:
    gradients = {n: p.grad for n, p in dense.named_parameters()}
    for part in sparse.parts:
        layer: Any = sparse.get_submodule(part.layer)
        weight = part.weight.of(gradients[part.weight.path])
        assert_same([layer.values.grad], [weight[layer.topology.mask()]])
        if part.bias is not None:
            assert_same([layer.bias.grad], [part.bias.of(gradients[part.bias.path])])
    for name in ("bias_k", "bias_v"):
        if name in gradients:
            assert_same([getattr(sparse, name).grad], [gradients[name]])


def test_gradcheck(kind):
    sparse, dense = sparse_and_twin(**kind)
    values = [m.values for _, m in sparse_modules(sparse)]

    def run(*tensors: Tensor) -> Tensor:
        return sparse(*tensors[:3])[0]

    torch.autograd.gradcheck(run, (*inputs(dense), *values))


def test_float32_is_within_1e_5_of_float64(kind):
    sparse, dense = sparse_and_twin(dtype=torch.float32, **kind)
    found = sparse(*inputs(dense))
    assert_same([t.double() for t in found], dense.double()(*inputs(dense)), 1e-5)


def test_causal_hint():
    sparse, dense = sparse_and_twin(batch_first=True)
    x = inputs(dense)[0]
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    padding = torch.zeros(BATCH, LENGTH).double()
    for weights, pad in itertools.product([True, False], [None, padding]):
        options = {"attn_mask": mask, "is_causal": True, "need_weights": weights}
        options["key_padding_mask"] = pad
        assert_same(sparse(x, x, x, **options), dense(x, x, x, **options))
    with pytest.raises(ValueError, match="attn_mask"):
        sparse(x, x, x, is_causal=True)
    with pytest.raises(ShapeError, match="attn_mask"):
        sparse(x, x, x, attn_mask=mask[:-1])


def test_dropout_drops_weights_in_training_only():
    sparse, dense = sparse_and_twin(dropout=0.5)
    found = []
    for module, weights in itertools.product((sparse, dense), (True, False)):
        torch.manual_seed(5)
        found.append(module.train()(*inputs(dense), need_weights=weights))
    assert_same(found[0], found[2])
    assert (found[0][1] == 0).any()
    assert_same(found[1], found[3])
    assert_same(sparse.eval()(*inputs(dense)), dense.eval()(*inputs(dense)))


def encoder(kind: str = "encoder") -> nn.Module:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    if kind == "transformer":
        return nn.Transformer(EMBED, HEADS, 2, 2, 16, **options)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 16, **options), 2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_encoders_of_torch_leave_their_fast_path(training, padded):
    model = skd.sparsify(encoder(), sparsity=0.5, skip=["*linear1", "*linear2"]).train(training)
    assert len(dict(sparse_modules(model))) == 8
    twin = skd.densify(copy.deepcopy(model))
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, -2:] = padded
    with torch.no_grad():
        found = model(x, src_key_padding_mask=padding)
        expected = twin(x, src_key_padding_mask=padding)
    assert found.shape[1] == LENGTH
    assert_same([found[~padding]], [expected[~padding]])


def test_transformer_with_cross_attention():
    model = skd.sparsify(encoder("transformer"), sparsity=0.5)
    twin = skd.densify(copy.deepcopy(model))
    x, y = (torch.randn(2, n, EMBED, dtype=torch.float64) for n in (5, 3))
    assert_same([model(x, y)], [twin(x, y)])


@pytest.mark.parametrize("method", ["RigL", "SET"])
def test_growth(method):
    model = skd.sparsify(encoder(), sparsity=0.5)
    before = {name: layer.topology for name, layer in sparse_modules(model)}
    twin = skd.densify(copy.deepcopy(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    updater = getattr(skd.dst, method)(model, optimizer, drop_fraction=0.4, every=1, until=9)
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    weight = torch.randn_like(x)
    for each in (model, twin):
        (each(x) * weight).sum().backward()
    assert updater.step()
    for layer in range(2):
        split: Any = model.get_submodule(f"layers.{layer}.self_attn")
        dense = dict(twin.get_submodule(f"layers.{layer}.self_attn").named_parameters())
        for part in split.parts:
            module = split.get_submodule(part.layer)
            old = before[f"layers.{layer}.self_attn.{part.layer}"].mask()
            new = module.topology.mask()
            grown, free = new & ~old, ~(new | old)
            assert new.sum() == old.sum()
            assert grown.any()
            if method == "RigL":
                grad = part.weight.of(dense[part.weight.path].grad).abs()
                assert grad[grown].min() >= grad[free].max() * (1 - 1e-9)


def test_densify_gives_the_dense_module_back(kind):
    dense = attention(**kind)
    handle_calls = []
    dense.register_forward_hook(lambda *_: handle_calls.append(1))
    sparse = skd.sparsify(copy.deepcopy(dense), sparsity=0.0)
    back = skd.densify(sparse)
    assert type(back) is nn.MultiheadAttention
    assert str(back) == str(dense)
    mine, theirs = back.state_dict(), dense.state_dict()
    assert list(mine) == list(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(mine[key], tensor), key
    assert_same(back(*inputs(dense)), dense(*inputs(dense)))
    assert len(handle_calls) == 2
    back.load_state_dict(theirs)


def test_checkpoints(kind):
    dense = attention(**kind)
    sparse = skd.sparsify(copy.deepcopy(dense), sparsity=0.5)
    other = skd.sparsify(copy.deepcopy(dense), sparsity=0.5, seed=1)
    file = io.BytesIO()
    torch.save(sparse.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(other(*inputs(dense)), sparse(*inputs(dense)), 0)
    with torch.no_grad():
        dense.out_proj.weight.add_(1)
        for parameter in dense.parameters():
            parameter.mul_(2)
    other.load_state_dict(dense.state_dict())
    parameters = dict(dense.named_parameters())
    for part in other.parts:
        layer: Any = other.get_submodule(part.layer)
        weight = part.weight.of(parameters[part.weight.path])
        assert torch.equal(layer.values, weight[layer.topology.mask()])
    again = skd.sparsify(attention(**kind), masks=skd.nn.stored_masks(sparse.state_dict(), dense))
    again.load_state_dict(sparse.state_dict())
    assert_same(again(*inputs(dense)), sparse(*inputs(dense)), 0)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(sparse)))
    assert_same(twin(*inputs(dense)), sparse(*inputs(dense)), 0)


def test_a_checkpoint_of_another_size_is_refused():
    sparse = skd.sparsify(attention(), sparsity=0.5)
    with pytest.raises(RuntimeError, match="size mismatch for in_proj_weight"):
        sparse.load_state_dict(nn.MultiheadAttention(2 * EMBED, HEADS).state_dict(), strict=False)


def test_names_in_skip_and_masks():
    model = skd.sparsify(encoder(), sparsity=0.5, skip="layers.0.self_attn.in_proj_weight")
    names = {name for name, _ in sparse_modules(model) if name.startswith("layers.0.self")}
    assert names == {"layers.0.self_attn.out_proj"}
    assert torch.is_tensor(model.layers[0].self_attn.in_proj_weight)
    whole = skd.sparsify(encoder(), sparsity=0.5, skip="*self_attn")
    assert type(whole.layers[0].self_attn) is nn.MultiheadAttention
    mask = torch.eye(EMBED, dtype=torch.bool)
    one = skd.sparsify(attention(), masks={"k_proj": mask})
    assert [name for name, _ in sparse_modules(one)] == ["k_proj"]
    assert one.q_proj.weight.untyped_storage().nbytes() == EMBED * EMBED * 8  # no longer a view
    dense = attention()
    with torch.no_grad():
        dense.in_proj_weight[EMBED : 2 * EMBED][~mask] = 0
    found = skd.sparsify(copy.deepcopy(dense), masks="nonzero")
    assert torch.equal(found.k_proj.topology.mask(), mask)
    assert_same(found(*inputs(dense)), dense(*inputs(dense)))


def test_an_error_changes_nothing():
    dense = attention()
    with pytest.raises(ValueError, match="no layer"):
        skd.sparsify(nn.ModuleList([dense]), masks={"0.q_proj": dense.in_proj_weight[:EMBED] > 0,
                                                    "0.other": torch.ones(1, 1) > 0})  # fmt: skip
    assert type(dense) is nn.MultiheadAttention
    assert set(dict(dense.named_children())) == {"out_proj"}


def test_what_is_pruned_shared_or_replaced_stays():
    pruned = prune.random_unstructured(nn.MultiheadAttention(4, 2), "in_proj_weight", 0.5)
    replaced = nn.MultiheadAttention(4, 2)
    replaced.forward = lambda *args: args  # type: ignore[method-assign]
    one, other = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2)
    other.in_proj_weight = one.in_proj_weight
    model = nn.ModuleList([pruned, replaced, one, other, nn.Linear(4, 4)])
    skd.sparsify(model, sparsity=0.5)
    assert [name for name, _ in sparse_modules(model)] == ["4"]
    assert [type(module) for module in model[:4]] == [nn.MultiheadAttention] * 4


def test_flops_and_coverage():
    sparse, dense = sparse_and_twin()
    x = torch.randn(LENGTH, BATCH, EMBED).double()
    found, expected = (skd.flops.count(m, x, x, x) for m in (sparse, dense))
    assert found.forward_dense == expected.forward
    assert found.products == expected.products
    assert {layer.name for layer in found.layers} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert skd.coverage(sparse).converted == 0.5
    assert not skd.coverage(sparse).dense


def test_pruning_at_initialisation_sees_the_projections():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = attention(batch_first=True), nn.Linear(EMBED, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    model = Pooled()
    before = copy.deepcopy(model.state_dict())
    batch = torch.randn(6, LENGTH, EMBED).double(), torch.arange(6) % 3
    for masks in (
        skd.sparsity.snip(model, batch, sparsity=0.5),
        skd.sparsity.synflow(model, batch, sparsity=0.5, rounds=3),
    ):
        assert set(masks) == {f"attention.{n}_proj" for n in ("q", "k", "v", "out")} | {"head"}
        assert sum(int(m.sum()) for m in masks.values()) == (4 * EMBED * EMBED + 3 * EMBED) // 2
        skd.sparsify(copy.deepcopy(model), masks=masks)(batch[0]).sum().backward()
    assert type(model.attention) is nn.MultiheadAttention
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    weight = model.attention.in_proj_weight.detach().clone().requires_grad_()
    tensors = {**dict(model.named_parameters()), "attention.in_proj_weight": weight}
    out = torch.func.functional_call(model, tensors, (batch[0],))
    nn.functional.cross_entropy(out, batch[1]).backward()
    scores = (weight * weight.grad).abs()[EMBED : 2 * EMBED]
    kept = skd.sparsity.snip(model, batch, sparsity=0.5)["attention.k_proj"]
    if kept.any() and not kept.all():
        assert scores[kept].min() >= scores[~kept].max()


def test_graphs():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention(batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.attention(x, x, x, need_weights=False)
            return x + y

    model = skd.sparsify(Block(), sparsity=0.5).eval()
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(model)
    assert len(dict(sparse_modules(traced))) == 4
    exported = torch.export.export(model, (x,)).module()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same([run(x) for run in (traced, exported, compiled)], [model(x)] * 3)
