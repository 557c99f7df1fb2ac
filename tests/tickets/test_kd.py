"""The identities of the distillation loss, and the rules of its teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.tickets import Distillation, kd_loss
from sparsekd.train import state_hash

N, C = 7, 5


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(N, C, dtype=torch.float64, generator=generator) * 3
    teacher = torch.randn(N, C, dtype=torch.float64, generator=generator) * 3
    target = torch.randint(C, (N,), generator=generator)
    return student.requires_grad_(), teacher, target


def test_alpha_0_is_cross_entropy_bit_for_bit(logits):
    student, teacher, target = logits
    assert torch.equal(kd_loss(student, teacher, target, alpha=0), F.cross_entropy(student, target))


def test_alpha_0_ignores_a_teacher_that_excludes_a_class(logits):
    student, teacher, target = logits
    teacher = teacher.masked_fill(torch.eye(N, C, dtype=torch.bool), -torch.inf)
    assert torch.equal(kd_loss(student, teacher, target, alpha=0), F.cross_entropy(student, target))


def mixed(seed: int = 1) -> torch.Tensor:
    """Return what mixup makes of two batches of labels."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(C, (2, N), generator=generator)
    eye, share = torch.eye(C, dtype=torch.float64), torch.rand(N, 1, generator=generator)
    return share.double() * eye[first] + (1 - share.double()) * eye[second]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_soft_targets_and_smoothing_from_the_definition(logits, smoothing, soft, alpha, reduction):
    student, teacher, target = logits
    t = 4.0
    goal = mixed() if soft else torch.eye(C, dtype=torch.float64)[target]
    loss = kd_loss(
        student, teacher, goal if soft else target, t, alpha, reduction, label_smoothing=smoothing
    )
    (gradient,) = torch.autograd.grad(loss, student)

    smooth = (1 - smoothing) * goal + smoothing / C
    ce = -(smooth * (student - student.exp().sum(1, keepdim=True).log())).sum() / N
    p, q = torch.softmax(teacher / t, 1), torch.softmax(student / t, 1)
    kl = (p * (p / q).log()).sum() / (N if reduction == "batchmean" else N * C)
    expected = alpha * t**2 * kl + (1 - alpha) * ce
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (wanted,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_one_hot_probabilities_are_class_indices(logits):
    student, teacher, target = logits
    hot = torch.eye(C, dtype=torch.float64)[target]
    for smoothing in (0.0, 0.2):
        torch.testing.assert_close(
            kd_loss(student, teacher, hot, label_smoothing=smoothing),
            kd_loss(student, teacher, target, label_smoothing=smoothing),
        )


def test_as_many_images_as_classes_are_told_apart_by_rank():
    student, teacher = torch.randn(2, C, C, dtype=torch.float64)
    soft = torch.softmax(torch.randn(C, C, dtype=torch.float64), 1)
    assert torch.equal(kd_loss(student, teacher, soft, alpha=0), F.cross_entropy(student, soft))


def test_probabilities_in_float32_beside_low_precision_logits(logits):
    student, teacher, _ = (t.detach() for t in logits)
    exact = kd_loss(student, teacher, mixed())
    with torch.autocast("cpu", torch.bfloat16):
        found = kd_loss(student.bfloat16(), teacher.bfloat16(), mixed().float())
    assert float(found) == pytest.approx(float(exact), rel=0.05)


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_student_equal_to_teacher_leaves_the_cross_entropy(logits, reduction):
    student, _, target = logits
    loss = kd_loss(student, student.detach().clone(), target, 3.0, 0.7, reduction)
    assert torch.equal(loss, (1 - 0.7) * F.cross_entropy(student, target))


def test_value_from_the_definition(logits):
    student, teacher, target = logits
    t, alpha = 4.0, 0.9
    p, q = torch.softmax(teacher / t, 1), torch.softmax(student / t, 1)
    kl = (p * (p / q).log()).sum() / N
    expected = alpha * t**2 * kl + (1 - alpha) * F.cross_entropy(student, target)
    torch.testing.assert_close(kd_loss(student, teacher, target, t, alpha), expected)


def test_element_mean_divides_by_the_number_of_classes_too(logits):
    student, teacher, target = logits
    by_batch = kd_loss(student, teacher, target, alpha=1.0)
    by_element = kd_loss(student, teacher, target, alpha=1.0, reduction="mean")
    torch.testing.assert_close(by_batch, C * by_element)


def test_gradient_of_the_kl_part(logits):
    student, teacher, target = logits
    t, alpha = 5.0, 1.0
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, target, t, alpha), student)
    expected = alpha * t * (torch.softmax(student / t, 1) - torch.softmax(teacher / t, 1)) / N
    torch.testing.assert_close(gradient, expected)


def test_gradient_for_a_large_temperature(logits):
    student, teacher, target = logits
    student = (student - student.mean(1, keepdim=True)).detach().requires_grad_()
    teacher = teacher - teacher.mean(1, keepdim=True)
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, target, 1e4, 1.0), student)
    expected = (student - teacher) / (C * N)
    # The next term of the expansion is smaller by |z| / T, at most 1e-3 here.
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-4)


def test_the_teacher_gets_no_gradient(logits):
    student, teacher, target = logits
    teacher.requires_grad_()
    kd_loss(student, teacher, target).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"alpha": 1.5}, "alpha"),
        ({"reduction": "sum"}, "reduction"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
    ],
)
def test_hyperparameters_out_of_range_raise(logits, arguments, name):
    with pytest.raises(ValueError, match=name):
        kd_loss(*logits, **arguments)


def test_shapes_that_do_not_fit_raise(logits):
    student, teacher, target = logits
    with pytest.raises(ShapeError, match="teacher_logits"):
        kd_loss(student, teacher[:, :-1], target)
    with pytest.raises(ShapeError, match="target"):
        kd_loss(student, teacher, target[:-1])
    with pytest.raises(ShapeError, match="student_logits"):
        kd_loss(student[0], teacher[0], target)


@pytest.mark.parametrize(
    "target, names",
    [
        (torch.zeros(N), "class indices of dtype int64, got torch.float32"),
        (torch.zeros(N, dtype=torch.int32), "class indices of dtype int64, got torch.int32"),
        (torch.zeros(N, C, dtype=torch.long), "floating-point dtype, got torch.int64"),
    ],
)
def test_targets_of_another_dtype_are_named(logits, target, names):
    student, teacher, _ = logits
    with pytest.raises(UnsupportedError, match=f"target: expected .*{names}"):
        kd_loss(student, teacher, target)
    with pytest.raises(ShapeError, match=r"target: expected shape \[7\] .* or \[7, 5\]"):
        kd_loss(student, teacher, torch.zeros(N, C + 1))


def test_distillation_takes_what_mixup_makes(logits):
    teacher, student = nn.Linear(4, C).double(), nn.Linear(4, C).double()
    x, y = torch.randn(N, 4, dtype=torch.float64), mixed()
    objective = Distillation(teacher, label_smoothing=0.1, until=1)
    loss = objective(student(x), x, y, 0)
    torch.testing.assert_close(
        loss, kd_loss(student(x), teacher(x), y, label_smoothing=0.1), rtol=0, atol=0
    )
    after = objective(student(x), x, y, 1)
    assert torch.equal(after, F.cross_entropy(student(x), y, label_smoothing=0.1))


class _Counting(nn.Module):
    """Count calls, and remember whether autograd and train mode were on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C))
        self.calls: list[tuple[bool, bool, torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append((torch.is_grad_enabled(), self.training, x))
        return self.net(x)


def test_the_teacher_runs_once_a_batch_without_autograd_and_stays_as_it_is():
    teacher, student = _Counting(), nn.Linear(4, C)
    before = state_hash(copy.deepcopy(teacher.state_dict()))
    objective = Distillation(teacher)
    x, y = torch.randn(6, 4), torch.zeros(6, dtype=torch.long)
    objective(student(x), x, y, 0).backward()
    ((grad_enabled, training, seen),) = teacher.calls
    assert not grad_enabled
    assert not training
    assert seen is x
    assert state_hash(teacher.state_dict()) == before
    assert all(p.grad is None for p in teacher.parameters())


def test_distillation_stops_at_until():
    teacher, student = _Counting(), nn.Linear(4, C)
    objective = Distillation(teacher, until=2)
    x, y = torch.randn(6, 4), torch.zeros(6, dtype=torch.long)
    logits = student(x)
    assert not torch.equal(objective(logits, x, y, 1), F.cross_entropy(logits, y))
    assert torch.equal(objective(logits, x, y, 2), F.cross_entropy(logits, y))
    assert len(teacher.calls) == 1
