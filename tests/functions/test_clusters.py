"""Routing attention and its parts, beside loops over tokens and clusters, in 60 digits where it is a softmax."""

import re

import mpmath
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.clusters import (
    cluster_scores,
    commitment_loss,
    kmeans,
    kmeans_step,
    members_of,
    moving_average,
    nearest_mean,
    normalised,
    routing_attention,
    routing_products,
    scatter_mean,
)

from .test_parts import KINDS

U = 2.0**-53


def draw(seed, b=1, h=2, n=12, d=4, c=3):
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, b, h, n, d))
    means = rng.standard_normal((h, c, d))
    return q, k, v, means / np.linalg.norm(means, axis=-1, keepdims=True)


def top(scores, window):
    """The members of a cluster by a sort of (score, index)."""
    return sorted(range(len(scores)), key=lambda t: (-scores[t], t))[:window]


def by_loops(q, k, v, means, window, causal, memory, shared):
    """Each head's outputs by loops over clusters and members, softmax in 60 digits; and how often a token is chosen."""
    n, d = q.shape
    k = np.stack([x / np.sqrt(x @ x) for x in q]) if shared else k
    sums, counts = [[mpmath.mpf(0)] * v.shape[1] for _ in range(n)], [0] * n
    for c, mean in enumerate(means):
        chosen = top([x @ mean / np.sqrt(x @ x) for x in q], window)
        taken = chosen if shared else top([x @ mean / np.sqrt(x @ x) for x in k], window)
        for i in chosen:
            keys = [j for j in taken if (j <= i or not causal) and not (shared and i == j)]
            extra = [] if memory is None else list(range(memory[0].shape[1]))
            keys = keys or ([i] if shared and not extra else [])
            counts[i] += 1
            if not keys and not extra:
                continue
            kk = [k[j] for j in keys] + [memory[0][c, m] for m in extra]
            vv = [v[j] for j in keys] + [memory[1][c, m] for m in extra]
            row, _ = exactly_of(q[i], kk, vv, d)
            sums[i] = [a + b for a, b in zip(sums[i], row, strict=True)]
    return [[a / max(m, 1) for a in s] for s, m in zip(sums, counts, strict=True)], counts


def exactly_of(q, k, v, d):
    """Attention of one row at scale 1/sqrt(d), and its divisor."""
    with mpmath.workdps(40):
        scale = 1 / mpmath.sqrt(d)
        exact = [[mpmath.mpf(float(a)) for a in x] for x in (q, *k)]
        w = [mpmath.exp(scale * mpmath.fdot(exact[0], x)) for x in exact[1:]]
        z = mpmath.fsum(w)
        return [mpmath.fdot(w, map(float, c)) / z for c in zip(*v, strict=True)], z


@pytest.mark.parametrize("memory", [0, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("causal", [None, "top_left"])
def test_beside_loops(causal, shared, memory):
    q, k, v, means = draw(0)
    kept = None if not memory else tuple(np.random.default_rng(1).standard_normal((2, 2, 3, memory, 4)))
    out, (chosen, taken) = routing_attention(q, None if shared else k, v, means, window=5, causal=causal, memory=kept)
    for h in range(2):
        wanted, counts = by_loops(
            q[0, h], k[0, h], v[0, h], means[h], 5, causal, None if kept is None else (kept[0][h], kept[1][h]), shared
        )
        assert np.bincount(chosen[0, h].ravel(), minlength=12).tolist() == counts
        assert 0 in counts
        assert max(counts) > 1
        # normalised keys of the loop are off from the function's by 8 roundings of a unit vector each, which moves a
        # logit by 8u·|q|, a weight by twice that, and out by that times |v| twice; else a rounding a cluster, a sum, a
        # division
        largest = np.abs(v).max() if kept is None else max(np.abs(v).max(), np.abs(kept[1]).max())
        bound = U * (4 * 8 * np.abs(q).sum(-1).max() * shared + 6) * largest
        assert max(abs(float(a - mpmath.mpf(float(b)))) for r, o in zip(wanted, out[0, h], strict=True)
                   for a, b in zip(r, o, strict=True)) <= bound  # fmt: skip
        assert all((out[0, h, t] == 0).all() for t in range(12) if counts[t] == 0)
    if shared:
        assert (chosen == taken).all()


def test_one_cluster_of_all_is_softmax_attention():
    q, k, v, means = draw(3, c=1, n=6)
    out, _ = routing_attention(q, k, v, means, window=6)
    for h in range(2):
        for i in range(6):
            assert out[0, h, i].tolist() == [float(x) for x in exactly_of(q[0, h, i], k[0, h], v[0, h], 4)[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_library_gives_the_same(kind):
    q, k, v, means = (x.astype(np.float32) for x in draw(4))
    want, (a, b) = routing_attention(q, k, v, means, window=4)
    given = [KINDS[kind](x) for x in (q, k, v, means)]
    out, (c, d) = routing_attention(*given, window=4)
    assert type(out) is type(given[0])
    assert (np.asarray(out) == want).all()
    assert (np.asarray(c) == a).all()
    assert (np.asarray(d) == b).all()
    # and the pieces: integers' sums, products and comparisons are exact
    x = np.random.default_rng(0).integers(-3, 4, (1, 2, 9, 4)).astype(np.float32)
    assert np.asarray(nearest_mean(given[0], given[3])).tolist() == nearest_mean(q, means).tolist()
    found = scatter_mean(KINDS[kind](x), KINDS[kind](np.arange(18).reshape(1, 2, 9) % 4), 5)
    assert np.asarray(found).tolist() == scatter_mean(x, np.arange(18).reshape(1, 2, 9) % 4, 5).tolist()
    steps = kmeans(given[0], given[3], iterations=2)
    assert np.abs(np.asarray(steps) - kmeans(q, means, iterations=2)).max() <= 64 * 2.0**-24  # sums of 12 terms, twice


def test_causal_attention_within_clusters_is_not_causal():
    """Later tokens decide who is in a cluster: outputs before them change. The same members leak nothing."""
    q, k, v, means = draw(5, n=40, c=5)
    other = q.copy(), k.copy(), v.copy()
    for x, y in zip(other, draw(6, n=40), strict=False):
        x[:, :, 20:] = y[:, :, 20:]
    out, (chosen, _) = routing_attention(q, k, v, means, window=8, causal="top_left")
    after, (changed, _) = routing_attention(*other, means, window=8, causal="top_left")
    leaks = (out != after).any(-1)[:, :, :20].sum()
    assert leaks > 10
    assert (chosen != changed).any()
    one = means[:, :1]  # a cluster of all tokens: who is in it does not depend on them
    out, after = (routing_attention(*x, one, window=40, causal="top_left")[0] for x in ((q, k, v), other))
    assert (out == after).all(-1)[:, :, :20].all()
    assert (out != after).any(-1)[:, :, 20:].all()


def test_bottom_right_lets_the_last_query_see_all():
    q, k, v, means = draw(7, n=6, c=1)
    out, _ = routing_attention(q[:, :, 4:], k, v, means, window=2, causal="bottom_right")
    _, (_, taken) = routing_attention(q[:, :, 4:], k, v, means, window=2)
    for i in (0, 1):
        for h in range(2):
            keys = [j for j in taken[0, h, 0] if j <= i + 4]
            want = exactly_of(q[0, h, 4 + i], k[0, h][keys], v[0, h][keys], 4)[0] if keys else [0] * 4
            assert out[0, h, i].tolist() == [float(x) for x in want]
    # aligned top left a query sees its own place and before: none of the cluster's keys is there
    out, _ = routing_attention(q[:, :, 4:5], k + 0 * q, v, means, window=1, causal="top_left")
    best = [top([x @ means[h, 0] / np.sqrt(x @ x) for x in k[0, h]], 1)[0] for h in range(2)]
    assert [(out[0, h] == 0).all() for h in range(2)] == [b > 0 for b in best]
    assert max(best) > 0


def test_released_divides_by_a_little_more():
    q, k, v, means = draw(8)
    paper, (chosen, _) = routing_attention(q, k, v, means, window=5)
    released, _ = routing_attention(q, k, v, means, window=5, mode="released")
    for h in range(2):
        m = np.bincount(chosen[0, h].ravel(), minlength=12)[:, None]
        want = paper[0, h] * (m / (m + 1e-5))
        assert (np.abs(released[0, h] - want) <= 6 * U * np.abs(want)).all()  # three roundings each
        assert (released[0, h][m[:, 0] > 0] != paper[0, h][m[:, 0] > 0]).any()


def test_members_ties_go_to_the_lower_index():
    scores = np.array([[1.0, 0], [2, 0], [1, 0], [2, 0], [0, 0]])
    assert members_of(scores, 3).tolist() == [[1, 3, 0], [0, 1, 2]]
    assert nearest_mean(np.ones((1, 1, 1, 2)), np.ones((1, 3, 2))).tolist() == [[[0]]]


def test_scatter_mean_by_a_loop():
    rng = np.random.default_rng(0)
    x, members = rng.integers(-9, 9, (2, 11, 3)).astype(float), rng.integers(0, 6, (2, 11))
    out = scatter_mean(x, members, 7, epsilon=0.5)
    for b in range(2):
        for t in range(7):
            mine = [x[b, m] for m in range(11) if members[b, m] == t]
            want = sum(mine) / (len(mine) + 0.5) if mine else np.zeros(3)
            assert out[b, t].tolist() == want.tolist()


def test_kmeans_step_by_a_loop_and_what_it_improves():
    x, _, _, means = draw(9, b=2, n=30, c=4)
    means[1, 3] = means[1, 0]  # the lower one takes its tokens
    new = kmeans_step(x, means)
    own = nearest_mean(x, means)
    for h in range(2):
        for c in range(4):
            mine = [x[b, h, t] for b in range(2) for t in range(30) if own[b, h, t] == c]
            sums = np.sum(mine, axis=0) if mine else means[h, c]
            want = sums / np.linalg.norm(sums) if mine else sums
            # a sum of m terms in another order, then divided by its length
            assert np.abs(new[h, c] - want).max() <= 8 * (len(mine) + 4) * U * max(
                1, np.abs(mine).sum() / np.linalg.norm(sums) if mine else 1
            )
    assert any((own[:, h] != c).all() for h in range(2) for c in range(4))  # an empty cluster was among them
    unit = normalised(x)
    scores = [cluster_scores(unit, m).max(-1).sum() for m in (new, kmeans(unit, new, iterations=5))]
    assert scores[1] > scores[0]  # each step of spherical k-means raises the sum of cosines
    assert (kmeans(x, means, iterations=0) == means).all()
    assert (kmeans(x, means, iterations=2) == kmeans_step(x, new)).all()


def test_normalised():
    x = np.array([[3.0, 4.0], [0.0, 0.0], [-5.0, 12.0]])
    assert normalised(x).tolist() == [[3 / 5, 4 / 5], [0, 0], [-5 / 13, 12 / 13]]
    t = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    normalised(t).sum().backward()
    assert t.grad.isfinite().all()


def test_moving_average():
    old, new = np.array([2.0, 4.0]), np.array([4.0, 0.0])
    assert moving_average(old, new, decay=0.75).tolist() == [2.5, 3.0]
    assert moving_average(old, new, decay=1).tolist() == old.tolist()


def test_commitment_loss():
    x = torch.tensor([[[[3.0, 4.0], [5.0, 0.0]]]], dtype=torch.float64, requires_grad=True)
    means = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    loss = commitment_loss(x, means, weight=1.0)
    # (3/5, 4/5) is nearest to the second mean, (1, 0) is the first: (9/25 + 1/25 + 0 + 0) / 4
    assert abs(loss.item() - 0.1) <= 8 * U
    (grad,) = torch.autograd.grad(loss, x)
    # of -2 x·mu/|x| / 4: (x·mu x/|x|² - mu) / (2|x|), here (12/25, -9/25)/10
    assert (grad[0, 0] - torch.tensor([[0.048, -0.036], [0, 0]], dtype=torch.float64)).abs().max() <= 16 * U
    assert not commitment_loss(x.detach(), means).requires_grad
    y = torch.tensor(np.random.default_rng(0).standard_normal((2, 2, 5, 3)), requires_grad=True)
    mu = torch.tensor(np.random.default_rng(1).standard_normal((2, 4, 3)))
    assert torch.autograd.gradcheck(lambda a: commitment_loss(a, mu, weight=1.0), y)


def test_products_are_counted():
    q, k, v, means = draw(10, n=16, c=4, h=1)
    _, (chosen, taken) = routing_attention(q, k, v, means, window=4)
    pairs = sum(1 for c in range(4) for _ in chosen[0, 0, c] for _ in taken[0, 0, c])
    assert routing_products(16, 4, 4) == cluster_scores(q, means).size + cluster_scores(k, means).size + pairs
    sizes = [4**e for e in range(3, 9)]
    assert [routing_products(n, m := round(n**0.5), n // m) for n in sizes] == [3 * 8**e for e in range(3, 9)]
    assert routing_products(4096, 1, 4096) > 4096**2  # one cluster is no cheaper than attention to all


def test_errors():
    q, k, v, means = draw(0)
    for change, text in (
        ({"mode": "tf"}, "mode: got 'tf', expected one of paper, released"),
        ({"causal": True}, "causal: got True, expected None, 'bottom_right' or 'top_left'"),
        ({"window": 13}, "window: got 13, expected a whole number from 1 to 12"),
        ({"means": means[:1]}, "means: shape is (1, 3, 4), expected (2, clusters, 4), each at least 1"),
        ({"key": k[..., :3]}, "key: shape is (1, 2, 12, 3), expected (1, 2, tokens, 4), each at least 1"),
        ({"value": v[:, :, :5]}, "value: shape is (1, 2, 5, 4), expected (1, 2, 12, features), each at least 1"),
        ({"key": torch.tensor(k)}, "key: is an array of torch, expected numpy's, as query is"),
        ({"value": v * np.nan}, "value: holds NaN or an infinity"),
        ({"memory": (means, means)}, "memory key: shape is (2, 3, 4), expected (2, 3, memory, 4), each at least 1"),
    ):
        given = {"query": q, "key": k, "value": v, "means": means, "window": 4} | change
        with pytest.raises(InvalidInput, match=re.escape(text)):
            routing_attention(**given)
    with pytest.raises(InvalidInput, match=re.escape("scores: shape is (3,), expected (..., tokens, clusters)")):
        members_of(np.ones(3), 1)
    with pytest.raises(InvalidInput, match=re.escape("members: shape is (2,), expected x's without its last axis")):
        scatter_mean(np.ones((3, 2)), np.zeros(2, int), 3)
    with pytest.raises(InvalidInput, match="x: got ndarray, expected a PyTorch tensor"):
        commitment_loss(q, means)
    with pytest.raises(InvalidInput, match=re.escape("decay: got 2, expected a number in [0, 1]")):
        moving_average(means, means, decay=2)
