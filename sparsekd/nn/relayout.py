"""Change the layout of modules whose masks allow it."""

from __future__ import annotations

from torch import nn

from sparsekd.layouts import Layout
from sparsekd.nn.base import sparse_modules


def relayout(model: nn.Module, layout: str | Layout) -> nn.Module:
    """Give every weight-sparse module of a model another layout, in place.

    No weight moves and no mask changes: a layout is what masks have to fit from here on. "csr"
    takes every mask; the others take those that have their structure already. Updaters look at
    layouts when they are built, so call this before.

    Args:
        model: any module; a sparse module itself is fine.
        layout: its name, or a `sparsekd.Layout`.

    Returns:
        The model.

    Raises:
        UnsupportedError: the mask of a layer does not fit, or the layout is not known; the text
            names the layer, and no layer has changed then.

    Example:
        >>> import sparsekd as skd
        >>> layer = skd.nn.SparseLinear(64, 64, sparsity=0.75, layout="bcsr")
        >>> str(relayout(layer, skd.Layout("fanin", group=64)).layout)
        Traceback (most recent call last):
        sparsekd.errors.UnsupportedError: ...
        >>> str(relayout(layer, skd.Layout("bcsr", block=8)).layout)
        'bcsr:8'
    """
    layout = Layout.parse(layout)
    modules = dict(sparse_modules(model))
    for name, module in modules.items():
        layout.check(module.topology.mask(), f"{name or 'model'}: mask")
    for module in modules.values():
        module._layout = layout
    return model
