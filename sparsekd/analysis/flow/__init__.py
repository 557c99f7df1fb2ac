"""Gradient flow in sparse networks: norms, solutions and their surroundings, and the study."""

from __future__ import annotations

from sparsekd.analysis.flow.gradients import GradientNorms, gradient_norms
from sparsekd.analysis.flow.hessian import Spectrum, hessian, lanczos
from sparsekd.analysis.flow.solutions import (
    cosine,
    disagreement,
    distance,
    ensemble_accuracy,
    interpolate,
    path,
    plane,
    probabilities,
    weight_vector,
)
from sparsekd.analysis.flow.study import GradientFlow, GradientFlowStudy

__all__ = [
    "GradientFlow",
    "GradientFlowStudy",
    "GradientNorms",
    "Spectrum",
    "cosine",
    "disagreement",
    "distance",
    "ensemble_accuracy",
    "gradient_norms",
    "hessian",
    "interpolate",
    "lanczos",
    "path",
    "plane",
    "probabilities",
    "weight_vector",
]
