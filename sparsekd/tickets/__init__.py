"""Tickets: sparse networks found by pruning a dense one, and ways to train them again."""

from __future__ import annotations

from sparsekd.tickets.cycles import Cycles, Superposition
from sparsekd.tickets.kd import Distillation, DistillationConfig, kd_loss
from sparsekd.tickets.pipeline import Pipeline, check_layout, masked_layers
from sparsekd.tickets.pruning import Masks, collapsed_layers, maskable, prune, prune_further
from sparsekd.tickets.sup import SupTickets
from sparsekd.tickets.superposition import superpose
from sparsekd.tickets.ticket import make_ticket

__all__ = [
    "Cycles",
    "Distillation",
    "DistillationConfig",
    "Masks",
    "Pipeline",
    "SupTickets",
    "Superposition",
    "check_layout",
    "collapsed_layers",
    "kd_loss",
    "make_ticket",
    "maskable",
    "masked_layers",
    "prune",
    "prune_further",
    "superpose",
]
