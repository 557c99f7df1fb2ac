"""Maps as tokens, class tokens and positions, scales and constants in frozen networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekd as skd


def assert_frozen(model: nn.Module, *inputs: Tensor, outside: tuple[str, ...] = ()) -> None:
    """Compare with the model in float64, to 1e-5 of the largest result, in two batches."""
    frozen = skd.freeze(model.eval(), *inputs)
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        for x in (inputs, [part[:1] for part in inputs]):
            right = exact(*(part.double() for part in x))
            error = (frozen(*x) - right).abs().max() / right.abs().max()
            assert error < 1e-5
    assert tuple(sorted(set(frozen.outside))) == outside
    if not outside:
        assert len(frozen.islands) == 1


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_vit_is_one_part_and_has_a_file(sparsity: float, weights: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = skd.models.vit_tiny(num_classes=10, in_channels=3, input_size=32)
    if sparsity:
        skd.sparsify(model, sparsity=sparsity)
    x = torch.randn(3, 3, 32, 32)
    if weights == "float32":
        assert_frozen(model, x)
    frozen = skd.freeze(model.eval(), x, weights=weights)
    skd.save_frozen(frozen, tmp_path / "vit.frozen")
    with torch.inference_mode():
        assert torch.equal(skd.load_frozen(tmp_path / "vit.frozen")(x), frozen(x))


def flat(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def repeated(x: Tensor, tokens: Tensor) -> Tensor:
    return tokens.expand(len(x), -1, -1)


class Patches(nn.Module):
    """A stem whose map becomes tokens in one of the ways in which models write it."""

    def __init__(self, form: Callable[[Patches, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5)
        self.one, self.two = (nn.Parameter(torch.randn(1, n, 8)) for n in (1, 2))
        self.positions = nn.Parameter(torch.randn(1, 15, 8))
        self.scale = nn.Parameter(torch.randn(8))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.form(self, self.stem(x)))


FORMS: dict[str, Callable[[Patches, Tensor], Tensor]] = {
    "flatten, transpose": lambda m, x: flat(x),
    "reshape, permute": lambda m, x: x.reshape(len(x), 8, -1).permute(0, 2, 1),
    "permute, reshape": lambda m, x: x.permute(0, 2, 3, 1).reshape(len(x), -1, 8),
    "a class token": lambda m, x: torch.cat([m.one.repeat(len(x), 1, 1), flat(x)], 1),
    "two kinds of them": lambda m, x: torch.cat(
        [repeated(x, m.one), repeated(x, m.two), flat(x)], 1
    ),
    "positions before it": lambda m, x: torch.cat(
        [repeated(x, m.two), flat(x) + m.positions[:, 3:]], 1
    ),
    "positions after it": lambda m, x: (
        torch.cat([repeated(x, m.one), repeated(x, m.two), flat(x)], 1) + m.positions[0]
    ),
    "positions in between": lambda m, x: F.relu(flat(x) + m.positions[:, 3:]) + m.positions[:, :12],
    "a map kept": lambda m, x: torch.cat([repeated(x, m.one), flat(x)], 1)[:, 0] + x.mean((2, 3)),
    "scale and shift of channels": lambda m, x: flat(x) * m.scale + m.one,
    "scale and shift of a map": lambda m, x: flat(
        F.relu(x) * m.scale[:, None, None] + m.scale.view(1, 8, 1, 1)
    ),
    "numbers": lambda m, x: 3 * (flat(x) * 0.5 + 1) + True,
    "the first token": lambda m, x: (flat(x) * 2)[:, 0],
    "all of it": lambda m, x: flat(x)[:, :, :],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_tokens(form: str) -> None:
    torch.manual_seed(0)
    assert_frozen(Patches(FORMS[form]), torch.randn(3, 3, 12, 16))


OUTSIDE: dict[str, tuple[Callable[[Patches, Tensor], Tensor], tuple[str, ...]]] = {
    "a class token after them": (
        lambda m, x: torch.cat([flat(x), repeated(x, m.one)], 1),
        ("aten.cat.default", "aten.expand.default"),
    ),
    "a class token three times": (
        lambda m, x: torch.cat([m.one.expand(x.shape[0], 3, -1), flat(x)], 1),
        ("aten.cat.default", "aten.expand.default"),
    ),
    "a number for all channels of a token": (
        lambda m, x: torch.cat([m.one[:, :, :1].repeat(x.shape[0], 1, 8), flat(x)], 1),
        ("aten.cat.default", "aten.repeat.default"),
    ),
    "another token than the first": (lambda m, x: flat(x)[:, 1], ("aten.select.int",)),
    "some tokens": (lambda m, x: flat(x)[:, 1:], ("aten.slice.Tensor",)),
    "every second token": (lambda m, x: flat(x)[:, ::2], ("aten.slice.Tensor",)),
    "a class token of each image": (
        lambda m, x: torch.cat([x.mean((2, 3))[:, None], flat(x)], 1),
        ("aten.cat.default", "aten.unsqueeze.default"),
    ),
    "positions of every pixel": (
        lambda m, x: flat(x * m.positions[0, :4, 0]),
        ("aten.mul.Tensor",),
    ),
}


@pytest.mark.parametrize("form", OUTSIDE)
def test_forms_that_run_in_torch(form: str) -> None:
    torch.manual_seed(0)
    make, outside = OUTSIDE[form]
    assert_frozen(Patches(make), torch.randn(3, 3, 12, 16), outside=outside)


def test_long_sequences() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[:, 0]

    torch.manual_seed(0)
    assert_frozen(First(), torch.randn(2, 1024, 4))
    assert_frozen(First(), torch.randn(2, 1025, 4), outside=("aten.select.int",))


class Attends(nn.Module):
    """Attention with a mask that is computed from nothing, the same for every image."""

    def __init__(self, opens: bool, numbers: bool) -> None:
        super().__init__()
        self.qkv, self.opens, self.numbers = nn.Linear(8, 24), opens, numbers

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        place = torch.arange(x.shape[1])
        mask = place[:, None] >= (0 if self.opens else place)
        if self.numbers:
            mask = torch.where(mask, 0.0, -torch.inf)
        mask = mask.expand(x.shape[0], 1, x.shape[1], -1)
        return F.scaled_dot_product_attention(*heads, mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("opens", [False, True])
def test_masks_that_no_input_changes(opens: bool, numbers: bool) -> None:
    torch.manual_seed(0)
    model, x = Attends(opens, numbers).eval(), torch.randn(3, 6, 8)
    frozen = skd.freeze(model, x)
    with torch.inference_mode():
        right = model(x)
        assert (frozen(x) - right).abs().max() < 1e-5 * right.abs().max()
    assert bool(frozen.outside) != opens


def test_a_model_that_asks_for_the_batch_runs_with_any() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cumsum(self.first(x), 1).reshape(len(x), 3, 2).reshape(-1, 6))

    torch.manual_seed(0)
    model = Counts().eval()
    frozen = skd.freeze(model, torch.randn(2, 4))
    with torch.inference_mode():
        for batch in (2, 5, 1, 2, 7):
            x = torch.randn(batch, 4)
            torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-6)
    assert "aten.cumsum.default" in frozen.outside


def test_weights_that_are_computed_are_folded() -> None:
    torch.manual_seed(0)
    model = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    assert_frozen(model, torch.randn(2, 3, 8, 8))


def test_buffers_that_the_model_writes_to_are_no_constants() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x) * (self.calls + 1)

    torch.manual_seed(0)
    model, x = Counts().eval(), torch.randn(3, 4)
    frozen = skd.freeze(model, x)
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-6)


def test_random_numbers_stay_random() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.rand(4)

    x = torch.randn(2, 4)
    frozen = skd.freeze(Noisy().eval(), x)
    with torch.inference_mode():
        assert not torch.equal(frozen(x), frozen(x))
