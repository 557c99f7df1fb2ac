"""How the docs site reads docstrings: `Example:` as code that runs, `Source:` in bold."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_SOURCE = re.compile(r"^Source: ", re.MULTILINE)


class Docstrings(Extension):
    """Griffe's Google style knows a section of examples by its plural, and no sources."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of whatever is loaded."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = _SOURCE.sub("**Source**: ", text)
