"""What `make docs` does to the pages before mkdocs reads them.

The pages of docs/ are written to be read in the repository. Three things differ on the site:
CONTRIBUTING.md and CHANGELOG.md become pages of it; a link to any other file outside docs/ becomes
the file's path, since the site does not carry the sources; and the front page shows the README's
table of what is faster, which stands there alone.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_NEEDS = re.compile(r"^(```\w+) needs \w+$", re.MULTILINE)  # what the test of the guides reads
_FIGURES = re.compile(r"<!-- figures: begin.*?-->\n(.*?)<!-- figures: end -->", re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside of docs/."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = inside((ROOT / source).read_text(), "")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page, and give the front page its figures."""
    source = page.file.src_uri
    if source in PAGES.values():
        return markdown
    markdown = markdown.replace("<!-- figures -->", figures())
    markdown = _NEEDS.sub(r"\1", markdown)
    return inside(markdown, posixpath.join("docs", posixpath.dirname(source)))


def figures() -> str:
    """Return the README's table of what is faster, as a page of docs/ would have it."""
    (text,) = _FIGURES.findall((ROOT / "README.md").read_text())
    return text.replace("](docs/", "](")


def inside(markdown: str, folder: str) -> str:
    """Rewrite links so that none leads out of docs/.

    Args:
        markdown: a page.
        folder: where the page is, from the root of the repository.

    Example:
        >>> inside("[the rows](../bench/rows.jsonl), [habits](../CONTRIBUTING.md#habits)", "docs")
        'the rows (`bench/rows.jsonl`), [habits](contributing.md#habits)'
        >>> inside("[ops](docs/ops.md) and [ops.h](csrc/ops.h)", "")
        '[ops](ops.md) and `csrc/ops.h`'
    """

    def rewrite(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PAGES:
            path = f"docs/{PAGES[path]}"
        folder_page = ROOT / path / "README.md"
        if folder_page.exists():
            path = f"{path}/README.md"
        if path.startswith("docs/") and not (ROOT / path).is_dir():
            to = posixpath.relpath(path, folder if folder.startswith("docs") else "docs")
            return f"[{text}]({to}{anchor})"
        return f"`{path}`" if path.endswith(text) else f"{text} (`{path}`)"

    return _LINK.sub(rewrite, markdown)
