"""RigL trains a small ResNet on the backend "cuda" as it does on the CPU, its kernels emulated."""

from __future__ import annotations

import torch
from courses import assert_same_course
from torch import nn

import sparsekd as skd


def network() -> nn.Module:
    torch.manual_seed(0)
    return skd.sparsify(skd.models.resnet20(width=0.25), sparsity=0.7, seed=0)


def test_rigl_makes_the_choices_of_the_cpu(on_cuda) -> None:
    assert_same_course("cuda", network, batch=6, size=8)
