"""What sparse networks learn and why: studies that measure, each resumable and redrawn at will."""

from __future__ import annotations

from sparsekd.analysis.bases import BasisStudy, BasisTickets, make_basis, make_basis_ticket
from sparsekd.analysis.bootstrap import BootstrapStudy, DeepBootstrap, ideal_world, real_world
from sparsekd.analysis.flow import (
    GradientFlow,
    GradientFlowStudy,
    gradient_norms,
    hessian,
    interpolate,
    lanczos,
)
from sparsekd.analysis.folder import StudyFolder
from sparsekd.analysis.probe import Probe

__all__ = [
    "BasisStudy",
    "BasisTickets",
    "BootstrapStudy",
    "DeepBootstrap",
    "GradientFlow",
    "GradientFlowStudy",
    "Probe",
    "StudyFolder",
    "gradient_norms",
    "hessian",
    "ideal_world",
    "interpolate",
    "lanczos",
    "make_basis",
    "make_basis_ticket",
    "real_world",
]
