"""Sections of README.md and docs/*.md that report.py writes, between marks that say where each one stands.

A mark is a line <!-- NAME: written by benchmarks/report.py -->, and <!-- /NAME --> ends it. To move a section to
another page is to move its marks; a section may stand in several pages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from measuring import HERE

ROOT = HERE.parent
OPENING = re.compile(r"^<!-- ([a-z-]+): written by benchmarks/report\.py -->$", re.M)
LINK = re.compile(r"(\]\()(?=benchmarks/|docs/)")  # sections write links as from the repository's root


class MarkError(ValueError):
    """Marks that are missing, not closed, or of no section."""


def pages(root: Path = ROOT) -> list[Path]:
    """Those that may have marks."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def marked(path: Path) -> list[str]:
    """The names of the sections that have marks in a page, in its order.

    Raises:
        MarkError: a section is opened twice, or not closed behind its opening.
    """
    content = path.read_text()
    names: list[str] = []
    for found in OPENING.finditer(content):
        name = found[1]
        if name in names:
            raise MarkError(f"{path} has the marks of {name} twice; once is accepted")
        following = OPENING.search(content, found.end())
        end = content.find(f"\n<!-- /{name} -->", found.end())
        if end < 0 or (following and following.start() < end):
            raise MarkError(f"{path} has <!-- {name}: ... --> without <!-- /{name} --> before the next section")
        names.append(name)
    return names


def filled(path: Path, sections: Mapping[str, str], root: Path = ROOT) -> str:
    """The page's text with these sections between their marks, links as from its folder.

    Raises:
        MarkError: as `marked`; or a mark names no section.
    """
    content = path.read_text()
    up = os.path.relpath(root, path.parent).replace(os.sep, "/")
    for name in marked(path):
        if name not in sections:
            raise MarkError(f"{path} has the marks of {name}, which is no section; accepted are {', '.join(sections)}")
        text = sections[name] if up == "." else LINK.sub(rf"\g<1>{up}/", sections[name])
        opening = f"<!-- {name}: written by benchmarks/report.py -->\n"
        head, rest = content.split(opening, 1)
        tail = rest[rest.index(f"<!-- /{name} -->") :]
        content = f"{head}{opening}{text}\n{tail}"
    return content


def homeless(sections: Mapping[str, str], root: Path = ROOT) -> list[str]:
    """The sections whose marks are in no page."""
    found = {name for path in pages(root) for name in marked(path)}
    return [name for name in sections if name not in found]


def write(sections: Mapping[str, str], root: Path = ROOT) -> None:
    """Write each section to every page that has its marks.

    Args:
        sections: name -> Markdown.
        root: of the repository.

    Raises:
        MarkError: a section has no marks in any page; or as `filled`. Nothing is written then.
    """
    new = {path: filled(path, sections, root) for path in pages(root)}  # first, as a misspelt mark is a missing one too
    if missing := homeless(sections, root):
        raise MarkError(
            f"no page has the marks of {', '.join(missing)}; README.md and docs/*.md are looked through for "
            f"<!-- {missing[0]}: written by benchmarks/report.py -->"
        )
    for path, content in new.items():
        if content != path.read_text():
            path.write_text(content)
