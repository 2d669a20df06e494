"""What a shell is told to complete a value to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # older releases of click have it without a parameter


class Named(ParamType):
    """A text, for which names are proposed.

    Args:
        name: what it is called in help.
        names: to propose; whatever their case, as the command takes them.
        files: whether it may be a file too.
        separator: of a list of names.
    """

    def __init__(self, name: str, names: Sequence[str], *, files: bool = False, separator: str = "") -> None:
        self.name, self._names, self._files, self._separator = name, names, files, separator

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin so, and files."""
        before, last = "", incomplete
        if self._separator:
            head, comma, last = incomplete.rpartition(self._separator)
            before = head + comma
        taken = before.split(self._separator) if self._separator else []
        found = [n for n in self._names if n.lower().startswith(last.lower()) and n not in taken]
        items = [CompletionItem(before + name) for name in found]
        return [*items, CompletionItem(incomplete, type="file")] if self._files else items
