"""Knowledge distillation: the loss, and an objective for the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekd.errors import ShapeError, UnsupportedError

Reduction = Literal["batchmean", "mean"]


@dataclass(frozen=True)
class DistillationConfig:
    """Hyper-parameters of distillation.

    Args:
        temperature: T of `kd_loss`.
        alpha: weight of the KL term, as in `kd_loss`.
        reduction: of the KL term, as in `kd_loss`.
        until: first epoch without distillation, or None to distil to the end.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 4.0
    alpha: float = 0.9
    reduction: Reduction = "batchmean"
    until: int | None = None

    def __post_init__(self) -> None:
        check_hyperparameters(self.temperature, self.alpha, self.reduction)
        if self.until is not None and self.until < 1:
            raise ValueError(f"until: expected at least 1 epoch, or None, got {self.until}")


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float = DistillationConfig.temperature,
    alpha: float = DistillationConfig.alpha,
    reduction: Reduction = DistillationConfig.reduction,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute ``alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross_entropy``.

    Both distributions of the KL term are softmaxes of the logits divided by the temperature T. The
    gradient of that term is ``alpha * T * (p_student - p_teacher) / N`` with "batchmean".

    Args:
        student_logits: logits that receive the gradient.
        teacher_logits: logits of the teacher for the same batch; always treated as constants.
        target: class indices, or a probability of each class, as from mixup and CutMix.
        temperature: T > 0.
        alpha: weight of the KL term in [0, 1]; 0 is exactly cross entropy.
        reduction: of the KL term: "batchmean" divides by N, "mean" by N * C as the published
            CIFAR code does.
        label_smoothing: of the cross entropy, in [0, 1]; the target becomes
            ``(1 - label_smoothing) * target + label_smoothing / C``.

    Shape:
        ``student_logits`` and ``teacher_logits`` ``[N, C]``, ``target`` ``[N]`` or ``[N, C]``.

    Returns:
        A scalar.

    Raises:
        ShapeError: the shapes do not match.
        UnsupportedError: class indices are not int64, or probabilities not floating-point numbers.
        ValueError: temperature, alpha, reduction or label_smoothing is out of range.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (2015), section 2; weights
        as in the code of the KD ticket (arXiv 2101.03255).

    Example:
        >>> student, teacher = torch.randn(8, 10), torch.randn(8, 10)
        >>> loss = kd_loss(student, teacher, torch.arange(8), temperature=4.0, alpha=0.9)
        >>> mixed = 0.7 * torch.eye(10)[:8] + 0.3 * torch.eye(10)[2:]
        >>> loss = kd_loss(student, teacher, mixed, label_smoothing=0.1)
    """
    _check(student_logits, teacher_logits, target)
    check_hyperparameters(temperature, alpha, reduction, label_smoothing)
    ce = F.cross_entropy(student_logits, target, label_smoothing=label_smoothing)
    if alpha == 0:
        return ce  # not 0 * KL + CE: an infinite KL would make that NaN
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    kl = F.kl_div(student, teacher, reduction="sum", log_target=True)
    kl = kl / (len(target) if reduction == "batchmean" else student.numel())
    return alpha * temperature**2 * kl + (1 - alpha) * ce


def check_hyperparameters(
    temperature: float, alpha: float, reduction: str, label_smoothing: float = 0.0
) -> None:
    """Check the hyper-parameters of `kd_loss`.

    Args:
        temperature: as in `kd_loss`.
        alpha: as in `kd_loss`.
        reduction: as in `kd_loss`.
        label_smoothing: as in `kd_loss`.

    Raises:
        ValueError: one of them is out of range.

    Example:
        >>> check_hyperparameters(4.0, 0.9, "batchmean")
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    if reduction not in get_args(Reduction):
        known = " or ".join(map(repr, get_args(Reduction)))
        raise ValueError(f"reduction: expected {known}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")


def _check(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> None:
    if student_logits.ndim != 2:
        got = tuple(student_logits.shape)
        raise ShapeError(f"student_logits: expected shape [N, C], got {got}")
    if teacher_logits.shape != student_logits.shape:
        raise ShapeError(
            f"teacher_logits: expected the student's shape {tuple(student_logits.shape)}, "
            f"got {tuple(teacher_logits.shape)}"
        )
    number, classes = student_logits.shape
    if target.shape == (number,):
        if target.dtype != torch.int64:
            raise UnsupportedError(
                f"target: expected class indices of dtype int64, got {target.dtype}; probabilities "
                f"have shape [{number}, {classes}]"
            )
    elif target.shape != (number, classes):
        raise ShapeError(
            f"target: expected shape [{number}] (class indices) or [{number}, {classes}] "
            f"(probabilities), got {tuple(target.shape)}"
        )
    elif not target.is_floating_point():
        raise UnsupportedError(
            f"target: expected probabilities of a floating-point dtype, got {target.dtype}; "
            f"class indices have shape [{number}]"
        )


class Distillation:
    """Distillation from a teacher's logits, as an objective for `sparsekd.train.Trainer`.

    The teacher runs once per batch, in eval mode and without autograd, on the same augmented batch
    as the student. From epoch `until` on the objective is plain cross entropy, and the teacher is
    not run.

    Args:
        teacher: the trained dense network; put in eval mode, otherwise untouched.
        temperature: as in `kd_loss`.
        alpha: as in `kd_loss`.
        reduction: as in `kd_loss`.
        until: first epoch without distillation, or None to distil to the end.
        label_smoothing: as in `kd_loss`.

    Raises:
        ValueError: temperature, alpha, reduction or label_smoothing is out of range.

    Source: arXiv 2101.03255, "KD ticket"; `until` is early-stopped distillation (its ImageNet
        recipe).

    Example:
        >>> objective = Distillation(nn.Linear(4, 3), temperature=2.0)
        >>> x, y = torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
        >>> loss = objective(nn.Linear(4, 3)(x), x, y, epoch=0)
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        temperature: float = DistillationConfig.temperature,
        alpha: float = DistillationConfig.alpha,
        reduction: Reduction = DistillationConfig.reduction,
        until: int | None = DistillationConfig.until,
        label_smoothing: float = 0.0,
    ) -> None:
        check_hyperparameters(temperature, alpha, reduction, label_smoothing)
        self.teacher = teacher.eval()
        self.temperature = temperature
        self.alpha = alpha
        self.reduction: Reduction = reduction
        self.until = until
        self.label_smoothing = label_smoothing

    def __call__(self, logits: Tensor, x: Tensor, y: Tensor, epoch: int) -> Tensor:
        if self.until is not None and epoch >= self.until:
            return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        with torch.no_grad():
            teacher_logits = self.teacher(x)
        return kd_loss(
            logits,
            teacher_logits,
            y,
            self.temperature,
            self.alpha,
            self.reduction,
            label_smoothing=self.label_smoothing,
        )
