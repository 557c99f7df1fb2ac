"""Dynamic sparse training: schedules, drop scores and grow rules around one loop."""

from __future__ import annotations

from sparsekd.dst.base import LayerUpdate, Updater
from sparsekd.dst.rigl import RigL
from sparsekd.dst.set import SET
from sparsekd.dst.static import Static

__all__ = ["SET", "LayerUpdate", "RigL", "Static", "Updater"]
