"""What follows a weight when the topology moves: optimizer state, averages, weight decay."""

from __future__ import annotations

from sparsekd.optim.averages import AveragedModel
from sparsekd.optim.following import follow
from sparsekd.optim.groups import param_groups
from sparsekd.optim.norms import unitwise_norm
from sparsekd.optim.remap import check_remappable, remap_

__all__ = [
    "AveragedModel",
    "check_remappable",
    "follow",
    "param_groups",
    "remap_",
    "unitwise_norm",
]
