"""Hash codes and their attention, beside fractions, loops, and the learner's steps written out by hand."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

import refattn
from refattn import InvalidInput
from refattn.functions.hashing import (
    Hash,
    code_attention,
    code_weights,
    hash_codes,
    hash_loss,
    kernel_features,
    learn_hash,
    linear_sums,
    similarity_targets,
    straight_through_sign,
)

from .test_parts import KINDS

U = 2.0**-53


def codes(seed, *shape):
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.float64)


def by_loops(h, g, v, mode="paper"):
    """Outputs as fractions, of integers."""
    n, bits = g.shape
    found = []
    for i in range(len(h)):
        w = [sum(int(a) * int(b) for a, b in zip(h[i], g[j], strict=True)) + bits + 1 for j in range(n)]
        bias = [bits + 1 if mode == "paper" else (bits + 1) * n * (i == j) for j in range(n)]
        top = [w[j] - bits - 1 + (bias[j] if mode == "paper" else bias[j] // n) for j in range(n)]
        found.append([Fraction(sum(t * int(y) for t, y in zip(top, c, strict=True)), sum(w)) for c in v.T])
    return found


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_linear_is_dense_is_the_loop(mode):
    h, g = codes(0, 2, 2, 9, 6)
    v = np.random.default_rng(1).integers(-50, 50, (2, 9, 3)).astype(float)
    out = code_attention(h, g, v, mode=mode)  # sums of integers are exact: one rounding, of the quotient
    for b in range(2):
        assert out[b].tolist() == [[float(x) for x in row] for row in by_loops(h[b], g[b], v[b], mode)]
    w = code_weights(h, g)
    assert (w >= 1).all()
    dense = (w @ v) / w.sum(-1)[..., None]
    assert (out == dense).all() == (mode == "paper")
    assert (np.abs(out - dense).max() > 0.1) == (mode == "released")


def test_beside_exact_linear_attention():
    """The bias as one more feature: bits + 1 for queries and 1 for keys."""
    h, g = codes(2, 2, 1, 2, 7, 5)
    v = np.random.default_rng(3).standard_normal((1, 2, 7, 4))
    q, k = np.concatenate([h, np.full((1, 2, 7, 1), 6.0)], -1), np.concatenate([g, np.ones((1, 2, 7, 1))], -1)
    want = refattn.linear_attention(q, k, v, feature="identity")
    w = code_weights(h, g)
    size = (2 * 6 * np.abs(v).sum(-2)[..., None, :] + np.abs(want)) / w.sum(-1)[..., None]
    # sums of 7 values, of 5 of them, one of the bias: 14 roundings of terms of at most 6·sum|v|; and the quotient's two
    assert (np.abs(code_attention(h, g, v) - want) <= 14 * U * size + 2 * U * np.abs(want)).all()


def test_fractions_go_through():
    h, g, v = (
        np.array([[Fraction(int(x)) for x in r] for r in a], object) for a in (*codes(4, 2, 4, 3), codes(5, 4, 2))
    )
    assert linear_sums(h, g, v, v.sum(0)).tolist() == by_loops(h, g, v)


@pytest.mark.parametrize("kind", KINDS)
def test_every_library_gives_the_same(kind):
    h, g = codes(6, 2, 1, 2, 5, 4).astype(np.float32)
    v = np.random.default_rng(1).integers(-9, 9, (1, 2, 5, 3)).astype(np.float32)
    out = code_attention(*map(KINDS[kind], (h, g, v)))
    assert type(out) is type(KINDS[kind](v))
    assert np.abs(np.asarray(out) - code_attention(h, g, v)).max() <= 2.0**-23 * 9  # a quotient
    x, anchors, planes = (
        np.zeros((1, 2, 3, 2), np.float32),
        np.ones((2, 4, 2), np.float32),
        np.ones((2, 5, 4), np.float32),
    )
    learned = Hash(*map(KINDS[kind], (anchors, np.zeros((2, 4), np.float32), planes)))
    assert (np.asarray(hash_codes(KINDS[kind](x), learned)) == 1).all()
    same = similarity_targets(KINDS[kind](codes(7, 1, 1, 6, 2)), neighbours=2)
    assert np.asarray(same).tolist() == similarity_targets(codes(7, 1, 1, 6, 2), neighbours=2).tolist()


def test_features_and_codes_by_loops():
    rng = np.random.default_rng(0)
    x, anchors, center = rng.standard_normal((2, 2, 5, 3)), rng.standard_normal((2, 4, 3)), rng.random((2, 4))
    planes = rng.standard_normal((2, 6, 4))
    features, found = kernel_features(x, anchors), hash_codes(x, Hash(anchors, center, planes))
    for b, h in np.ndindex(2, 2):
        far = np.array([[sum((p - a) ** 2) for a in anchors[h]] for p in x[b, h]])
        want = np.exp(-far / (2 * far.mean()))
        # an exponent of at most far/(2·mean), off by 40 roundings (a mean of 20, sums of 3), and an exponential
        assert (np.abs(features[b, h] - want) <= U * want * (40 * far / far.mean() + 4)).all()
        scores = (want - center[h]) @ planes[h].T
        assert (np.abs(scores) > 1e-9).all()
        assert (found[b, h] == np.where(scores > 0, 1, -1)).all()
    equal = np.ones((1, 1, 2, 3)), np.ones((1, 1, 3))
    assert (kernel_features(*equal) == 1).all()
    assert (hash_codes(equal[0], Hash(equal[1], np.ones((1, 1)), np.ones((1, 2, 1)))) == 0).all()  # the sign of 0


def test_straight_through():
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = straight_through_sign(x)
    assert y.tolist() == [-1, -1, -1, 0, 1, 1, 1]
    (y * torch.arange(1.0, 8)).sum().backward()
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 0, 0]


def test_targets_by_sorting():
    x = codes(8, 2, 2, 9, 3)
    found = similarity_targets(x, neighbours=3)
    for b, h, i in np.ndindex(2, 2, 9):
        products = [float(x[b, h, i] @ x[b, h, j]) for j in range(9)]
        most = sorted(range(9), key=lambda j: (-products[j], j))[:3]
        least = sorted(range(9), key=lambda j: (products[j], j))[:3]
        want = [1 if j in most else -1 if j in least else 0 for j in range(9)]
        assert found[b, h, i].tolist() == want


def test_loss_by_a_sum_and_its_gradient():
    y, s = codes(9, 2, 3, 5), codes(10, 2, 3, 5, 5)
    want = -sum(y[b, h, i] * s[b, h, i, j] * y[b, h, j] for b, h, i, j in np.ndindex(2, 3, 5, 5)) / 6 / (5 * 4)
    assert abs(hash_loss(y, s, bits=4) - want) <= 4 * U * abs(want)
    given, target = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.tensor(s)
    assert torch.autograd.gradcheck(lambda a: hash_loss(a, target, bits=4), given)


def steps_by_hand(x, anchors, center, planes, *, bits, steps, rate, momentum, neighbours):
    """The learner in NumPy, gradients and Nesterov's momentum written out; which bits took the new plane."""
    features = kernel_features(x, anchors) - center[:, None]
    target = similarity_targets(x, neighbours=neighbours) * bits
    b, h, n, _ = features.shape
    taken = []
    for r in range(bits):
        a, speed = planes[:, r].copy(), np.zeros_like(planes[:, r])
        for _ in range(steps):
            sigma = 1 / (1 + np.exp(-np.einsum("bhnm,hm->bhn", features, a)))
            y = 2 * sigma - 1
            pull = np.einsum("bhij,bhj->bhi", target + np.swapaxes(target, -1, -2), y) * 2 * sigma * (1 - sigma)
            slope = -np.einsum("bhn,bhnm->hm", pull, features) / (n * bits * b * h)
            speed = momentum * speed + slope
            a = a - rate * (slope + momentum * speed)
        bit = {k: np.where(np.einsum("bhnm,hm->bhn", features, p) > 0, 1, -1) for k, p in ((0, planes[:, r]), (1, a))}
        loss = {k: -np.einsum("bhi,bhij,bhj", y, target, y) for k, y in bit.items()}
        taken.append(int(loss[1] < loss[0]))
        if taken[-1]:
            planes[:, r] = a
        target = target - np.einsum("bhi,bhj->bhij", bit[taken[-1]], bit[taken[-1]])
    return planes, taken


def test_the_learner_by_hand():
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal((2, 2, 24, 4)))
    options = {"bits": 4, "neighbours": 5, "steps": 8, "rate": 0.5, "momentum": 0.9}
    first = learn_hash(x, torch.Generator().manual_seed(0), anchors=6, **options | {"steps": 0})
    learned = learn_hash(x, torch.Generator().manual_seed(0), anchors=6, **options)
    unit = (x / x.norm(dim=-1, keepdim=True)).numpy()
    chosen = [[np.abs(unit[0, h] - a.numpy()).sum(-1).argmin() for a in learned.anchors[h]] for h in range(2)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 6
    features = kernel_features(unit, learned.anchors.numpy())
    assert np.abs(features.mean((0, 2)) - learned.center.numpy()).max() <= 64 * U  # means of 48 numbers up to 1
    start = first.planes.numpy().copy()
    want, taken = steps_by_hand(unit, *(y.numpy() for y in learned[:2]), start.copy(), **options)
    assert sum(taken) > 0
    # 8 steps, each off by sums of 24·24 terms of at most 2·bits; errors grow by 1 + rate·curvature a step, here below 2
    assert np.abs(learned.planes.numpy() - want).max() <= 2.0**8 * 8 * 576 * 8 * U
    assert np.abs(learned.planes.numpy() - start).max() > 0.1
    assert not learned.planes.requires_grad


def test_learned_codes_say_more_of_similarity_than_random_ones():
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal((1, 1, 64, 8)))
    options = {"bits": 8, "anchors": 25, "neighbours": 10}
    unit = x / x.norm(dim=-1, keepdim=True)
    cosine = (unit @ unit.mT).flatten()

    def says(steps):
        learned = learn_hash(x, torch.Generator().manual_seed(1), steps=steps, rate=0.2, **options)
        h = hash_codes(unit, learned)
        return torch.corrcoef(torch.stack([(h @ h.mT).flatten(), cosine]))[0, 1].item()

    assert says(30) > says(0) + 0.02


def test_errors():
    h, v = codes(0, 4, 3), np.ones((4, 2))
    for given, text in (
        ((h, h, v, "tf"), "mode: got 'tf', expected 'paper' or 'released'"),
        ((2 * h, h, v, "paper"), "query: expected codes of -1, 0 and 1; else a weight may be below 1"),
        ((h, h[:, :2], v, "paper"), "key: shape is (4, 2), expected (tokens, 3), each at least 1"),
        ((h, h, v[:3], "paper"), "value: shape is (3, 2), expected (4, features), each at least 1"),
        ((h[:2], h, v, "released"), "query: shape is (2, 3), expected (4, 3), each at least 1"),
        ((h, h[None], v, "paper"), "query, key, value: expected as many axes each, (..., tokens, features)"),
    ):
        with pytest.raises(InvalidInput, match=re.escape(text)):
            code_attention(*given[:3], mode=given[3])
    x = torch.zeros(1, 1, 8, 2)
    with pytest.raises(InvalidInput, match="anchors: got 9, expected a whole number from 1 to 8"):
        learn_hash(x, torch.Generator(), anchors=9)
    with pytest.raises(InvalidInput, match="neighbours: got 5, expected a whole number from 1 to 4"):
        learn_hash(x, torch.Generator(), anchors=2, neighbours=5)
    with pytest.raises(InvalidInput, match="x: got ndarray, expected a PyTorch tensor"):
        straight_through_sign(h)
    learned = Hash(np.ones((1, 3, 2)), np.ones((1, 2)), np.ones((1, 4, 3)))
    with pytest.raises(InvalidInput, match=re.escape("center: shape is (1, 2), expected (1, 3), each at least 1")):
        hash_codes(np.ones((1, 1, 5, 2)), learned)
