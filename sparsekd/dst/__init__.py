"""Dynamic sparse training: schedules, drop scores and grow rules around one loop."""

from __future__ import annotations

from sparsekd.dst.acdc import ACDC
from sparsekd.dst.base import Updater
from sparsekd.dst.dynamics import Dynamics
from sparsekd.dst.gmp import GMP
from sparsekd.dst.granet import GraNet
from sparsekd.dst.itop import ITOP, Exploration
from sparsekd.dst.mest import MEST
from sparsekd.dst.redistribution import RigLSG, RigLSM
from sparsekd.dst.registry import METHODS, Method, find_method
from sparsekd.dst.rigl import RigL
from sparsekd.dst.set import SET
from sparsekd.dst.snfs import SNFS
from sparsekd.dst.srigl import SRigL
from sparsekd.dst.static import Static
from sparsekd.dst.tile_grid import LayerUpdate
from sparsekd.dst.topkast import TopKAST

__all__ = [
    "ACDC",
    "GMP",
    "ITOP",
    "MEST",
    "METHODS",
    "SET",
    "SNFS",
    "Dynamics",
    "Exploration",
    "GraNet",
    "LayerUpdate",
    "Method",
    "RigL",
    "RigLSG",
    "RigLSM",
    "SRigL",
    "Static",
    "TopKAST",
    "Updater",
    "find_method",
]
