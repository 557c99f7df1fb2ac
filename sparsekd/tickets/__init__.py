"""Tickets: sparse networks found by pruning a dense one, and ways to train them again."""

from __future__ import annotations

from sparsekd.tickets.hosts import Dynamics, Superposition
from sparsekd.tickets.kd import Distillation, kd_loss
from sparsekd.tickets.methods import METHODS, Method, find_method, make_ticket
from sparsekd.tickets.pipeline import Pipeline
from sparsekd.tickets.pruning import Masks, collapsed_layers, prune, prune_further
from sparsekd.tickets.sup import Cycles, SupTickets
from sparsekd.tickets.superposition import superpose

__all__ = [
    "METHODS",
    "Cycles",
    "Distillation",
    "Dynamics",
    "Masks",
    "Method",
    "Pipeline",
    "SupTickets",
    "Superposition",
    "collapsed_layers",
    "find_method",
    "kd_loss",
    "make_ticket",
    "prune",
    "prune_further",
    "superpose",
]
