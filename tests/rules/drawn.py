"""Rules drawn at random, each with what it says of one pair of places, written by loops."""

import numpy as np

from refattn import rules

CORNERS = ("bottom_right", "top_left")


def atoms(rng, n_q, n_k):
    """Return pairs of a rule and ``seen(b, h, i, j)``, for two batches and three heads."""
    corner, m = CORNERS[rng.integers(2)], min(n_q, n_k)
    shift = n_k - n_q if corner == "bottom_right" else 0
    left, right, count, size, step, part = (int(x) for x in rng.integers(1, 7, 6))
    lengths, ids_q, ids_k = rng.integers(0, n_k + 1, 2), rng.integers(0, 3, (2, n_q)), np.sort(rng.integers(0, 3, n_k))
    far = rng.integers(0, 6, 3)
    mask, blocks = rng.random((n_q, n_k)) < 0.5, rng.random((3, -(-n_q // 3), -(-n_k // 4))) < 0.5
    parents = forest(rng, m)

    def above(b, h, i, j):
        q, k = i - n_q + m, j - n_k + m
        if k < 0:
            return True
        while q >= 0:
            if q == k:
                return True
            q = parents[q]
        return False

    return [
        (rules.causal(corner), lambda b, h, i, j: j <= i + shift),
        (rules.window(left - 1, right, corner), lambda b, h, i, j: i + shift - left + 1 <= j <= i + shift + right),
        (rules.window(left, None, corner), lambda b, h, i, j: i + shift - left <= j),
        (rules.window(None, right - 1, corner), lambda b, h, i, j: j <= i + shift + right - 1),
        (rules.window(None, None), lambda b, h, i, j: True),
        (rules.prefix(int(lengths[0])), lambda b, h, i, j: j < lengths[0]),
        (rules.prefix(lengths), lambda b, h, i, j: j < lengths[b]),
        (rules.sinks(count - 1), lambda b, h, i, j: j < count - 1),
        (rules.document(ids_q, ids_k), lambda b, h, i, j: ids_q[b, i] == ids_k[j]),
        (rules.chunk(size, corner), lambda b, h, i, j: (i + shift) // size == j // size),
        (rules.dilated(step, corner), lambda b, h, i, j: (i + shift - j) % step == 0),
        (rules.behind(far, part, corner), lambda b, h, i, j: (i + shift) // part - j // part in far),
        (rules.tree(parents), above),
        (rules.array(mask), lambda b, h, i, j: mask[i, j]),
        (rules.array(mask[:1]), lambda b, h, i, j: mask[0, j]),
        (rules.blocks(blocks, 3, 4), lambda b, h, i, j: blocks[h, i // 3, j // 4]),
    ]


def forest(rng, m):
    """Return parents of m nodes in any order."""
    ranks, names = [-1, *(int(rng.integers(-1, i)) for i in range(1, m))], rng.permutation(m)
    parents = np.empty(m, np.int64)
    parents[names] = [-1 if p < 0 else names[p] for p in ranks]
    return parents


def drawn(rng, n_q, n_k, depth):
    """Return a rule of so many combinations inside one another, and its loop."""
    if depth == 0:
        known = atoms(rng, n_q, n_k)
        return known[rng.integers(len(known))]
    kind = rng.integers(3)
    a, f = drawn(rng, n_q, n_k, depth - 1)
    if kind == 0:
        return ~a, lambda *at: not f(*at)
    b, g = drawn(rng, n_q, n_k, depth - 1)
    if kind == 1:
        return a & b, lambda *at: f(*at) and g(*at)
    return a | b, lambda *at: f(*at) or g(*at)


def by_loops(seen, b, h, n_q, n_k):
    """Return a head's mask."""
    return np.array([[bool(seen(b, h, i, j)) for j in range(n_k)] for i in range(n_q)]).reshape(n_q, n_k)
