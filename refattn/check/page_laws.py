"""Relations of calls whose keys lie in pages: where the pages lie, and what nobody owns, does not matter."""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from .compare import Worst
from .inputs.draw import Draw
from .inputs.paged import paged
from .trial import Trial, agree

__all__ = ["pages_case", "pages_moved", "unowned_unread"]


def pages_case(d: Draw) -> Problem:
    """Return the call that the laws are tried on; what nobody owns is NaN, by which it is known."""
    return paged(d, 8, "NHD", causal="bottom_right", fill=np.nan)


def pages_moved(ask: Trial, p: Problem) -> Worst:
    """Put every page into another place of the cache."""
    place = np.random.default_rng(0).permutation(p.key.shape[0])
    order = np.argsort(place)
    table = np.where(p.block_table < 0, p.block_table, place[p.block_table])
    moved = p.replace(key=p.key[order], value=p.value[order], block_table=table)
    limit = 0.0 if ask.able.deterministic else 2 * ask.allowed(p)["out"]
    return agree(ask.out(moved), ask.out(p), limit, "where pages lie in the cache matters")


def unowned_unread(ask: Trial, p: Problem) -> Worst:
    """Put other numbers into pages that nobody owns, and behind the last keys."""
    one, two = (
        p.replace(**{n: np.where(np.isnan(x), x.dtype.type(y), x) for n, x in (("key", p.key), ("value", p.value))})
        for y in (3, -7)
    )
    limit = 0.0 if ask.able.deterministic else 2 * ask.allowed(one)["out"]
    return agree(ask.out(two), ask.out(one), limit, "what nobody owns in the cache changes the output")
