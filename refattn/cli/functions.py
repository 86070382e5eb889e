"""The command line: what `refattn list` prints of operators that are functions of arrays, by paper."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from rich.table import Table

from .. import functions
from ..papers import PAPERS
from .output import table_with

__all__ = ["by_paper", "table_of_functions"]

PLACE = "functions."


def by_paper() -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Yield paper, source, module below ``refattn`` and the names there; last, what belongs to no paper of the table.

    A module stands with each paper that names it, or one of its functions.
    """
    found, shown = functions.__name__.rpartition(".")[0], set()
    modules = {
        x.name.removeprefix(f"{found}."): tuple(getattr(importlib.import_module(x.name), "__all__", ()))
        for x in pkgutil.walk_packages(functions.__path__, f"{functions.__name__}.")
        if not x.ispkg and not x.name.endswith(".arguments")  # which checks what functions are given
    }
    homes = {name: where for where, names in modules.items() for name in names}
    for paper in PAPERS:
        places: dict[str, tuple[str, ...]] = {}
        for here in (x for x in paper.here if x.startswith(PLACE)):
            name = here.rpartition(".")[2]
            where, names = (here, modules[here]) if here in modules else (homes[name], (name,))
            places[where] = (*places.get(where, ()), *names)
        for where, names in places.items():
            shown |= {(where, x) for x in names}
            yield paper.title, paper.source, where, names
    for where, names in modules.items():
        if rest := tuple(x for x in names if (where, x) not in shown):
            yield "of no one paper", "-", where, rest


def table_of_functions() -> Table:
    """Return the table: a row for each paper and module."""
    table = table_with({"paper": 30, "functions": 40, "in": 36, "source": 30})
    before = ""
    for title, source, where, names in by_paper():
        same = title == before
        table.add_row("" if same else title, ", ".join(names), f"refattn.{where}", "" if same else source)
        before = title
    return table
