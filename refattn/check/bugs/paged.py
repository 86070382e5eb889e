"""What kernels get wrong that read keys in pages, or write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...pages import append
from ...problem import Problem

__all__ = ["PAGED_BUGS"]


def _other_layout(p: Problem) -> Problem:
    """Take the strides of a page for those of the other layout."""
    changed = {}
    for name in ("key", "value"):
        x = getattr(p, name)
        changed[name] = np.ascontiguousarray(x).reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3])
    return p.replace(**changed, page_layout="HND" if p.page_layout == "NHD" else "NHD")


def _tail_read(p: Problem) -> Problem:
    """Read a last page to its end."""
    return p if p.lengths_k is None else p.replace(lengths_k=-(-p.lengths_k // p.page_size) * p.page_size)


def _table(change: Callable[[Any], Any]) -> Callable[[Problem], Problem]:
    """Read another place of the table; what is no page there is page 0."""

    def before(p: Problem) -> Problem:
        table = change(p.block_table)
        return p.replace(block_table=np.where((table < 0) | (table >= p.key.shape[0]), 0, table))

    return before


def _written(p: Problem) -> Problem:
    return p.replace(new_key=None, new_value=None)


def _one_late(p: Problem) -> Problem:
    """Write new keys one slot late: the last one where the first belongs."""
    if p.new_key is None:
        return p
    late = [np.roll(x, 1, 2) for x in (p.new_key, p.new_value)]
    append(p.replace(new_key=late[0], new_value=late[1]))
    return _written(p)


def _unseen(p: Problem) -> Problem:
    """Attend before the new keys are written."""
    if p.new_key is None:
        return p
    before = {"key": p.key.copy(), "value": p.value.copy()}
    append(p)
    return _written(p).replace(**before)


def _not_kept(p: Problem) -> Problem:
    """Attend to new keys that are written to a copy."""
    return p if p.new_key is None else p.replace(key=p.key.copy(), value=p.value.copy())


def _tail_cleared(p: Problem) -> Problem:
    """Write whole pages where the new keys lie: what lay behind the last one is lost."""
    if p.new_key is not None:
        for b, n in enumerate(p.lengths_k):
            page = p.block_table[b, (n - 1) // p.page_size]
            for x in (p.key, p.value):
                (x if p.page_layout == "NHD" else x.swapaxes(1, 2))[page, (n - 1) % p.page_size + 1 :] = 0
    return p


def _where_paged(before: Callable[[Problem], Problem]) -> Callable[[Problem], Problem]:
    return lambda p: p if p.block_table is None else before(p)


PAGED_BUGS = {
    name: _where_paged(before)
    for name, before in (
        ("page_of_other_layout", _other_layout),
        ("page_tail_read", _tail_read),
        ("table_ignored", _table(lambda t: np.arange(t.size).reshape(t.shape))),
        ("table_off_by_one", _table(lambda t: np.roll(t, -1, 1))),
        ("table_of_next_item", _table(lambda t: np.roll(t, -1, 0))),
        ("appended_one_late", _one_late),
        ("appended_unseen", _unseen),
        ("appended_not_kept", _not_kept),
        ("appended_over_tail", _tail_cleared),
    )
}
"""An edit of the problem that a right kernel is given, by name."""
