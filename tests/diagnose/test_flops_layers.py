"""FLOPs of every kind of layer against numbers computed by hand, and of any inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sparsekd as skd
from sparsekd.diagnose import flops

Rows = dict[str, tuple[tuple[int, ...], int]]


def rows(found: flops.FlopCount) -> Rows:
    """Return shape and positions by name."""
    assert all(layer.nnz == torch.Size(layer.shape).numel() for layer in found.layers)
    return {layer.name: (layer.shape, layer.positions) for layer in found.layers}


def products(found: flops.FlopCount) -> dict[str, int]:
    return {product.name: product.flops for product in found.products}


def assert_adds_up(found: flops.FlopCount) -> None:
    layers = sum(2 * layer.nnz * layer.positions for layer in found.layers)
    assert found.forward == layers + sum(product.flops for product in found.products)
    assert found.train == 3 * found.forward
    assert type(found.forward) is int


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind, gates", [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers_cost_each_matrix_per_step_and_sequence(device, kind, gates):
    layer = kind(4, 5, num_layers=2, bidirectional=True, device=device)
    found = flops.count(nn.ModuleDict({"rnn": layer})["rnn"], (7, 3, 4))
    first, second, state = (gates * 5, 4), (gates * 5, 10), (gates * 5, 5)
    assert rows(found) == {
        name: (shape, 7 * 3)
        for way in ("", "_reverse")
        for name, shape in (
            (f"weight_ih_l0{way}", first),
            (f"weight_hh_l0{way}", state),
            (f"weight_ih_l1{way}", second),
            (f"weight_hh_l1{way}", state),
        )
    }
    assert found.forward == 2 * 21 * 2 * gates * 5 * (4 + 5 + 10 + 5)
    assert_adds_up(found)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projected_and_packed_sequences():
    found = flops.count(nn.LSTM(4, 5, proj_size=3), (7, 3, 4))
    assert found.forward == 2 * 21 * (20 * 4 + 20 * 3 + 3 * 5)
    packed = nn.utils.rnn.pack_padded_sequence(torch.zeros(7, 3, 4), torch.tensor([7, 4, 2]))
    for layer in (nn.LSTM(4, 5), nn.GRU(4, 5)):
        found = flops.count(layer, packed)
        gates = layer.weight_hh_l0.shape[0]
        assert found.forward == 2 * (7 + 4 + 2) * gates * (4 + 5)


@pytest.mark.parametrize("kind, gates", [(nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)])
def test_cells(kind, gates):
    found = flops.count(kind(4, 5), (3, 4))
    assert rows(found) == {"weight_ih": ((gates * 5, 4), 3), "weight_hh": ((gates * 5, 5), 3)}


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, query: Tensor, memory: Tensor | None = None, weights: bool = False) -> Tensor:
        memory = query if memory is None else memory
        return self.attention(query, memory, memory, need_weights=weights)[0]


@pytest.mark.parametrize("weights", [False, True])
def test_attention_within_a_sequence(weights):
    found = flops.count(Attention(), (2, 3, 8), weights=weights)
    assert rows(found) == {
        "attention.in_proj_weight": ((24, 8), 2 * 3),
        "attention.out_proj": ((8, 8), 2 * 3),
    }
    assert products(found) == {"attention": 2 * (2 * 3 * 3 * 8) * 2}  # queries keys, weights values
    assert_adds_up(found)
    assert found.at({"attention.out_proj": 0}).forward == found.forward - 2 * 64 * 6


def test_attention_to_another_sequence_uses_parts_of_its_weight():
    found = flops.count(Attention(), (2, 3, 8), (2, 5, 8))
    assert rows(found) == {
        "attention.in_proj_weight[0:8]": ((8, 8), 2 * 3),
        "attention.in_proj_weight[8:24]": ((16, 8), 2 * 5),
        "attention.out_proj": ((8, 8), 2 * 3),
    }
    assert products(found) == {"attention": 2 * 2 * (2 * 3 * 5 * 8)}
    found = flops.count(Attention(kdim=4, vdim=4), (2, 3, 8), (2, 5, 4))
    assert rows(found) == {
        "attention.q_proj_weight": ((8, 8), 6),
        "attention.k_proj_weight": ((8, 4), 10),
        "attention.v_proj_weight": ((8, 4), 10),
        "attention.out_proj": ((8, 8), 6),
    }


def test_an_encoder_s_fused_kernel_hides_nothing():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=20, batch_first=True)
    before = torch.backends.mha.get_fastpath_enabled()
    found = flops.count(nn.TransformerEncoder(layer, 2), (2, 3, 8))
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert found.forward == 2 * (2 * 6 * (24 * 8 + 8 * 8 + 2 * 20 * 8) + 2 * 2 * (2 * 3 * 3 * 8))
    assert set(products(found)) == {"layers.0.self_attn", "layers.1.self_attn"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("heads", [2, 1])
def test_scaled_dot_product_attention(device, heads):
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=heads == 1)

    query, memory = torch.zeros(3, 2, 5, 8, device=device), torch.zeros(3, heads, 7, 8).to(device)
    found = flops.count(Grouped(), query, memory, memory)
    assert found.layers == ()
    assert found.forward == 3 * 2 * (2 * 5 * 7 * 8 + 2 * 5 * 7 * 8)


def test_a_learned_bias_of_attention_is_no_factor():
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(9, 2))
            self.state = nn.Parameter(torch.ones(1, 3, 5))
            self.rnn = nn.LSTM(4, 5)
            self.start = nn.Parameter(torch.ones(7, 5))

        def forward(self, x: Tensor) -> Tensor:
            bias = self.table[torch.arange(25).view(5, 5) % 9].permute(2, 0, 1)
            x = F.scaled_dot_product_attention(x, x, x, attn_mask=bias)
            y = self.rnn(x.new_zeros(7, 3, 4), (self.state, self.state))[0]
            return torch.addmm(self.start, x.new_ones(7, 4), x.new_ones(4, 5)) + y[:, 0]

    found = flops.count(Biased(), (2, 2, 5, 8))
    assert rows(found) == {"rnn.weight_ih_l0": ((20, 4), 21), "rnn.weight_hh_l0": ((20, 5), 21)}
    assert products(found) == {"": 2 * 2 * 2 * (2 * 5 * 5 * 8) + 2 * 7 * 4 * 5}


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9), (6, 2, 3), 2 * 7),
    (nn.Conv3d(2, 4, (1, 2, 3), stride=2), (2, 2, 3, 4, 5), (4, 2, 1, 2, 3), 2 * 2 * 2 * 2),
    (nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect"), (1, 2, 5, 5), (4, 2, 3, 3), 25),
    (nn.Conv2d(2, 4, 3), (2, 5, 5), (4, 2, 3, 3), 9),  # no batch
    # Every input is multiplied by a whole filter, whatever the stride.
    (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5), (4, 6, 3), 2 * 5),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 6), (4, 3, 3, 3), 2 * 30),
    (nn.ConvTranspose3d(2, 3, 2, output_padding=0), (1, 2, 2, 3, 4), (2, 3, 2, 2, 2), 24),
]


@pytest.mark.parametrize("layer, shape, weight, positions", CONVOLUTIONS, ids=str)
def test_convolutions(layer, shape, weight, positions):
    found = flops.count(nn.Sequential(layer), shape)
    assert rows(found) == {"0": (weight, positions)}


def test_bilinear_layers_take_two_inputs():
    found = flops.count(nn.Bilinear(4, 3, 2), (5, 6, 4), (5, 6, 3))
    assert rows(found) == {"": ((2, 4, 3), 30)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (5,), (5, 6)])
def test_linear_layers_at_any_number_of_dimensions(bias, lead):
    found = flops.count(nn.Linear(4, 3, bias=bias), (*lead, 4))
    assert rows(found) == {"": ((3, 4), torch.Size(lead).numel())}


class Bare(nn.Module):
    """Weights as some libraries keep them: transposed, as experts, on the left, of a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))
        self.experts = nn.Parameter(torch.ones(3, 6, 5))
        self.left = nn.Parameter(torch.ones(7, 2))
        self.vector = nn.Parameter(torch.ones(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(x.new_zeros(6), x, self.weight)
        x = torch.einsum("bi,eio->ebo", x, self.experts)
        x = x[0] @ self.vector
        return self.left @ x


def test_parameters_of_no_layer():
    found = flops.count(Bare(), (2, 4))
    assert rows(found) == {
        "": ((4, 6), 2),
        "experts": ((3, 6, 5), 2),
        "vector": ((5, 1), 2),
        "left": ((7, 2), 1),
    }
    assert found.products == ()


def test_one_expert_at_a_time():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.ones(3, 6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.up[2]) + F.linear(x[:1], self.up[0])

    found = flops.count(Experts(), (5, 4))
    assert rows(found) == {"up[2:3]": ((1, 6, 4), 5), "up[0:1]": ((1, 6, 4), 1)}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_parametrised_weight_is_its_layer_s(norm):
    found = flops.count(nn.Sequential(norm(nn.Linear(4, 3))), (5, 4))
    assert rows(found) == {"0": ((3, 4), 5)}


def test_autocast_and_inference_mode_count_alike():
    model = nn.Sequential(Attention(), nn.Linear(8, 3))
    plain = flops.count(model, (2, 3, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert flops.count(model, (2, 3, 8)) == plain
    with torch.inference_mode():
        assert flops.count(model, (2, 3, 8)).forward == plain.forward


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


class Language(nn.Module):
    """A small language model: ids in, a dataclass out, the embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, *, mask: Tensor | None = None) -> Output:
        x = self.block(self.embedding(ids), src_key_padding_mask=mask)
        return Output(self.head(self.proj(x)))


IDS = torch.zeros(2, 5, dtype=torch.long)
MASK = torch.zeros(2, 5, dtype=torch.bool)
BLOCK = 2 * 10 * (24 * 8 + 8 * 8 + 2 * 16 * 8) + 2 * 2 * (2 * 5 * 5 * 8)


def language() -> Language:
    model = Language()
    return skd.sparsify(model, sparsity=0.75, distribution="uniform", skip=("block", "head"))


@pytest.mark.filterwarnings("ignore:sparsify leaves")
@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((IDS,), {}),
        ((), {"ids": IDS, "mask": MASK}),
        ((IDS,), {"mask": MASK}),
        ((), {"args": (IDS,), "kwargs": {"mask": MASK}}),
        ((), {"args": [IDS]}),
    ],
)
def test_inputs_by_position_and_by_name(args, kwargs):
    found = flops.count(language(), *args, **kwargs)
    assert found.forward == BLOCK + 2 * 16 * 10 + 2 * 30 * 8 * 10
    assert found.forward_dense == BLOCK + 2 * 64 * 10 + 2 * 30 * 8 * 10
    assert [layer.name for layer in found.layers][-2:] == ["proj", "head"]
    assert {layer.name: layer.nnz for layer in found.layers}["proj"] == 16
    assert_adds_up(found)


def test_inputs_of_another_kind_are_named():
    with pytest.raises(TypeError, match="args: expected a tuple of inputs, got Tensor"):
        flops.count(nn.Linear(4, 3), args=torch.zeros(2, 4))
    with pytest.raises(TypeError, match="kwargs: expected inputs by name, got int"):
        flops.count(nn.Linear(4, 3), args=((2, 4),), kwargs=3)


@pytest.mark.filterwarnings("ignore:sparsify leaves")
def test_the_total_is_torch_s_own():
    """On the meta device attention is made of products that torch counts."""
    model = skd.densify(language()).eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            model(IDS.to("meta"))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert flops.count(model, IDS.to("meta")).forward == counter.get_total_flops()


@pytest.mark.filterwarnings("ignore:.*computes with its dense weight")
def test_a_sparse_layer_s_weight_read_from_outside_counts_dense():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = skd.nn.SparseLinear(8, 6, sparsity=0.75, seed=0)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x) + F.linear(x, self.proj.dense_weight())

    found = flops.count(Reader(), (5, 8))
    assert found.layers == (
        flops.LayerFlops("proj", (6, 8), 12, 5),
        flops.LayerFlops("proj.weight", (6, 8), 48, 5),
    )


def test_a_sparse_layer_called_around_its_module():
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = skd.nn.SparseLinear(8, 6, sparsity=0.75, seed=0)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj.forward(x)

    assert flops.count(Direct(), (5, 8)).layers == (flops.LayerFlops("proj", (6, 8), 12, 5),)


@pytest.mark.parametrize("nnz", [0, 1, 48])
def test_sparse_layers_of_any_nnz_have_a_row(nnz):
    mask = (torch.arange(48) < nnz).view(6, 8)
    layer = skd.nn.SparseLinear.from_dense(nn.Linear(8, 6), mask=mask)
    found = flops.count(nn.Sequential(layer), (5, 8))
    assert found.layers == (flops.LayerFlops("0", (6, 8), nnz, 5),)


def test_random_numbers_go_on_as_before():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + torch.randn_like(x))

    model = Noisy()
    torch.manual_seed(3)
    expected = torch.randn(5)
    torch.manual_seed(3)
    flops.count(model, (2, 4))
    assert torch.equal(torch.randn(5), expected)


def test_compiled_modules_are_counted_as_written():
    model = nn.Sequential(nn.Linear(4, 3), torch.compile(nn.Linear(3, 2)))
    found = flops.count(model, (5, 4))
    assert found.forward == 2 * 5 * (12 + 6)
    assert [layer.name for layer in found.layers] == ["0", "1._orig_mod"]


def test_the_table_shows_products_without_a_weight():
    lines = str(flops.count(Attention(), (2, 3, 8))).splitlines()
    assert lines[3].split() == ["attention", "-", f"{2 * 2 * 2 * 3 * 3 * 8:,}"]
    assert lines[4].split()[0] == "total"
