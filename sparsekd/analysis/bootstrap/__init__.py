"""Deep bootstrap: the same training on samples that repeat and on samples that do not."""

from __future__ import annotations

from sparsekd.analysis.bootstrap.measure import Errors, errors, gaps, stopping_time
from sparsekd.analysis.bootstrap.population import (
    Mixture,
    Population,
    Stream,
    held_out_population,
    ideal_world,
    mixture_population,
    real_world,
)
from sparsekd.analysis.bootstrap.study import BootstrapStudy, DeepBootstrap

__all__ = [
    "BootstrapStudy",
    "DeepBootstrap",
    "Errors",
    "Mixture",
    "Population",
    "Stream",
    "errors",
    "gaps",
    "held_out_population",
    "ideal_world",
    "mixture_population",
    "real_world",
    "stopping_time",
]
