"""The Strassen form by products of matrices: no exponential for a triple, rows that would underflow left to the tiles.

exp(q·k1 + k1·k2 + k2·q) = A_ij B_jk C_ik, so all sums over pairs are products of matrices. Rows and columns are shifted
by their largest scores: A_ij = exp(a_ij + b_j - top_i), B_jk = exp(b_jk - b_j), C_ik = exp(c_ik - c_i), all at most 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .forms import Seen

__all__ = ["forward"]

Array = NDArray[Any]
ROWS, KEYS = 64, 512


def forward(
    arrays: list[Array], by: Any, seen: tuple[Seen, Seen], by_tiles: Callable[[list[Array], Any], Any]
) -> tuple[Array, Array]:
    """Return out and lse of a head.

    Parameters
    ----------
    arrays : list of arrays
        The scaled query, k1, k2, v1 and v2 of a head.
    by : float
        The scale.
    seen : (Seen, Seen)
        The keys k1 and k2 that each row sees.
    by_tiles : callable
        Gives out and lse of some rows by tiles: of those whose sum is so small that what underflowed may count.
    """
    q, k1, k2, v1, v2 = arrays
    n, (n1, n2), d_v = len(q), (len(k1), len(k2)), v1.shape[1]
    tiny, eps = (float(getattr(np.finfo(q.dtype), x)) for x in ("tiny", "eps"))
    least = n1 * n2 * tiny / eps  # a term that is lost is below tiny, so all of them are below eps of such a sum
    out, lse, known = np.zeros((n, d_v), q.dtype), np.full(n, -np.inf, q.dtype), np.zeros(n, bool)
    tops = np.concatenate([(by * k1[j : j + KEYS] @ k2.T).max(1) for j in range(0, n1, KEYS)])
    value = np.concatenate([v2, np.ones((n2, 1), v2.dtype)], 1)
    for i in range(0, n, ROWS):
        rows = slice(i, min(i + ROWS, n))
        masks = [s[rows].mask() for s in seen]
        a = np.where(masks[0], q[rows] @ k1.T + tops, -np.inf)
        c = np.where(masks[1], q[rows] @ k2.T, -np.inf)
        top_a, top_c = (np.where(np.isfinite(x.max(1)), x.max(1), 0)[:, None] for x in (a, c))
        a, c = np.exp(a - top_a), np.exp(c - top_c)
        # (rows · (d_v + 1), k2) times (k2, k1): all sums over k at once
        left = (c[:, None] * value.T).reshape(-1, n2)
        sums = np.zeros((len(c), d_v + 1), q.dtype)
        for j in range(0, n1, KEYS):
            js = slice(j, min(j + KEYS, n1))
            if not masks[0][:, js].any():
                continue
            b = np.exp(by * k1[js] @ k2.T - tops[js, None])
            weighted = (left @ b.T).reshape(len(c), d_v + 1, -1)
            sums[:, :-1] += np.einsum("ij,icj,jc->ic", a[:, js], weighted[:, :-1], v1[js], optimize=True)
            sums[:, -1] += np.einsum("ij,ij->i", a[:, js], weighted[:, -1])
        total = sums[:, -1]
        good = total > least
        safe = np.where(good, total, 1)
        out[rows], known[rows] = sums[:, :-1] / safe[:, None], good
        lse[rows] = np.log(safe) + top_a[:, 0] + top_c[:, 0]
    rest = ~known
    if rest.any():
        out[rest], lse[rest] = by_tiles([q[rest], k1, k2, v1, v2], tuple(s[rest] for s in seen))
    return out, lse
