"""SeerAttention's gate against 40 digits, its target against exact probabilities, its selectors against loops."""

import itertools
import math
import re

import mpmath
import numpy as np
import pytest
import torch

import refattn
from refattn import InvalidInput
from refattn.arrays import to_numpy
from refattn.functions.gates import seer_decode, seer_gate, seer_gate_loss, seer_gate_target, seer_select

from .selector_calls import KINDS, call, exact_probabilities, relative_error

EPS = 2.0**-52


def gate_call(seed, n=22, h=4, h_kv=2, d=6, g=4, n_q=None):
    q, k, _ = call(seed, h, h_kv, n_q or n, n, d, dtype=np.float64)
    rng = np.random.default_rng(seed + 100)
    w_q, w_k = rng.normal(size=(h, d, g)), rng.normal(size=(h_kv, 3 * d, g))
    return [torch.from_numpy(x) for x in (q, k, w_q, w_k)]


def turned(x, place, base):
    """Rotate pairs (i, i + g/2) of a list of mpmath numbers."""
    half = len(x) // 2
    angle = [place * mpmath.mpf(base) ** (-mpmath.mpf(i) / half) for i in range(half)]
    first = [x[i] * mpmath.cos(a) - x[i + half] * mpmath.sin(a) for i, a in enumerate(angle)]
    return first + [x[i + half] * mpmath.cos(a) + x[i] * mpmath.sin(a) for i, a in enumerate(angle)]


def projected(x, w):
    return [mpmath.fsum(mpmath.mpf(float(a)) * b for a, b in zip(column, x, strict=True)) for column in w.T]


def compressed(block):
    """Return max, min and mean of a block's keys (tokens, d) as mpmath numbers."""
    columns = [[mpmath.mpf(float(y)) for y in x] for x in block.T]
    return [f(x) for f in (max, min, lambda x: mpmath.fsum(x) / len(x)) for x in columns]


def score_error(q, k, w_q, w_k, block):
    """Return a bound on the error of the gate's scores in float64.

    Sizes are sums of absolute terms. Pools round block times, projections 3 d times; a turn has an angle of at most n,
    known to 3 eps, cos and sin to 1 ulp, and 3 roundings, and mixes two features, so at most doubles the size; the
    product rounds g + 2 times.
    """
    q, k, w_q, w_k = (x.abs().numpy() for x in (q, k, w_q, w_k))
    g = w_q.shape[-1]
    size_q = 2 * (q.max(2, keepdims=True) @ w_q).max()
    size_k = 2 * (np.concatenate([k.max(2, keepdims=True)] * 3, -1) @ w_k).max()
    steps = 2 * (block + 3 * q.shape[-1] + 2 + 3 * k.shape[2] + 5) + g + 2
    return 1.1 * steps * EPS * g * size_q * size_k / math.sqrt(g)


@pytest.mark.parametrize(("block", "base"), [(5, 10000.0), (4, 50.0), (30, 10000.0), (1, 10.0)])
def test_gate(block, base):
    q, k, w_q, w_k = gate_call(0)
    got = seer_gate(q, k, w_q, w_k, block=block, base=base).numpy()
    count = -(-22 // block)
    assert got.shape == (2, 4, count, count)
    # the logarithm of a softmax: two scores' errors, count + 12 roundings of at most 1 + its size
    off = 2 * score_error(q, k, w_q, w_k, block)
    with mpmath.workdps(40):
        for h in range(4):
            keys = [k[1, h // 2, at : at + block].numpy() for at in range(0, 22, block)]
            keys = [turned(projected(compressed(x), w_k[h // 2].numpy()), c * block, base) for c, x in enumerate(keys)]
            for r in range(count):
                rows = q[1, h, r * block : (r + 1) * block].numpy()
                mean = compressed(rows)[2 * 6 :]
                one = turned(projected(mean, w_q[h].numpy()), r * block, base)
                scores = [mpmath.fsum(a * b for a, b in zip(one, x, strict=True)) / 2 for x in keys[: r + 1]]
                total = mpmath.log(mpmath.fsum(map(mpmath.exp, scores)))
                for c, s in enumerate(scores):
                    bound = off + (count + 12) * EPS * (1 + abs(float(s)) + abs(float(total)))
                    assert abs(float(s - total) - got[1, h, r, c]) <= bound
            assert (got[1, h][np.triu_indices(count, 1)] == -np.inf).all()


def test_gradients_of_the_gate():
    q, k, w_q, w_k = gate_call(1, n=7, h=2, h_kv=1, d=3, g=2)
    target = seer_gate_target(q, k, block=2)

    def loss(q, k, w_q, w_k):
        return seer_gate_loss(seer_gate(q, k, w_q, w_k, block=2), target)

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in (q, k, w_q, w_k)])


@pytest.mark.parametrize("block", [4, 5, 30])
def test_target(block):
    q, k, *_ = gate_call(2)
    got = seer_gate_target(q, k, block=block).numpy()
    p = exact_probabilities(q.numpy(), k.numpy())
    count = -(-22 // block)
    want = np.zeros((2, 4, count, count))
    for r in range(count):
        for c in range(count):
            part = p[:, :, r * block : (r + 1) * block, c * block : (c + 1) * block]
            want[:, :, r, c] = part.max((2, 3))
    want /= want.sum(-1, keepdims=True)
    # a ratio of probabilities' sums, and the sum again
    assert (np.abs(got - want) <= (2 * relative_error(q.numpy(), k.numpy()) + 2 * count * EPS) * want).all()


def test_loss_is_pytorchs_and_its_gradient_is_gate_minus_target():
    """The first quarter of rows has no gradient; a score's is ``(G - t) / elements``, as rows of t sum to 1."""
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=rng, requires_grad=True)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    target = torch.rand(2, 3, 9, 9, dtype=torch.float64, generator=rng).masked_fill(~seen, 0)
    target = target / target.sum(-1, keepdim=True)
    log_gate = scores.masked_fill(~seen, -math.inf).log_softmax(-1)
    loss = seer_gate_loss(log_gate, target)
    loss.backward()
    peer = torch.nn.functional.kl_div(
        log_gate[:, :, 2:].masked_fill(~seen[2:], -1e3), target[:, :, 2:], reduction="none"
    ).mean()
    terms = (target * (target.clamp(min=1e-300).log().abs() + log_gate.masked_fill(~seen, 0).abs()))[:, :, 2:]
    size = float(terms.detach().sum()) / terms.numel()
    assert abs(float((loss - peer).detach())) <= 2 * (terms.numel() + 8) * EPS * size
    want = (log_gate.exp() - target)[:, :, 2:].detach() / (2 * 3 * 7 * 9)
    # softmax and its derivative: each a sum of 9 terms of at most 1
    assert (scores.grad[:, :, 2:] - want).abs().max() <= 60 * EPS / (2 * 3 * 7 * 9)
    assert (scores.grad[:, :, :2] == 0).all()


def random_gate(seed, count, b=2, h=3):
    scores = np.random.default_rng(seed).normal(size=(b, h, count, count)).astype(np.float32)
    scores[..., ~np.tril(np.ones((count, count), bool))] = -np.inf
    p = np.exp(scores)
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense_rows", [0, 2])
@pytest.mark.parametrize(("threshold", "ratio"), [(0.2, None), (0.0, None), (None, 0.3), (None, 0.75), (None, 1.0)])
def test_selectors(kind, dense_rows, threshold, ratio):
    gate = np.round(random_gate(0, 12) * 16) / 16  # many ties
    got = to_numpy(seer_select(KINDS[kind](gate), threshold=threshold, ratio=ratio, dense_rows=dense_rows))
    kept = max(1, int((1 - math.sqrt(1 - (ratio or 0))) * 12))
    for at in np.ndindex(2, 3, 12):
        row = gate[at]
        if at[2] >= 12 - dense_rows:
            want = set(range(at[2] + 1))
        elif ratio is None:
            want = {c for c in range(at[2] + 1) if row[c] > threshold}
        else:
            want = set(sorted(range(at[2] + 1), key=lambda c, row=row: (-row[c], c))[:kept])
        assert set(np.flatnonzero(got[at])) == want


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.9])
def test_a_ratio_is_the_density_of_the_triangle(ratio):
    """Exactly ``k (k + 1) / 2 + (n - k) k`` of ``n (n + 1) / 2`` blocks, k = floor(r n); within 3/n of the ratio.

    With f(r) = 2 r - r^2 = z the density is ``(f(k/n) + k/n^2) / (1 + 1/n)``; k/n is less than 1/n below r, and the
    slope of f at most 2.
    """
    n = 200
    got = seer_select(random_gate(1, n, 1, 1), ratio=ratio)
    k = int((1 - math.sqrt(1 - ratio)) * n)
    assert got.sum() == k * (k + 1) // 2 + (n - k) * k
    assert abs(got.sum() / (n * (n + 1) / 2) - ratio) <= 3 / n
    assert got.any(-1).all()


def test_threshold_0_is_dense_and_a_high_one_leaves_empty_rows():
    """Under a mask with an empty row attention is 0 and its log-sum-exp -inf; by a ratio no row is empty."""
    q, k, w_q, w_k = gate_call(3)
    gate = seer_gate(q, k, w_q, w_k, block=5).exp()
    dense = seer_select(gate, threshold=0.0)
    assert (dense == torch.ones(5, 5, dtype=torch.bool).tril()).all()
    row = int(gate[0, 0].amax(-1).argmin())
    mask = seer_select(gate, threshold=float(gate[0, 0, row].max()))
    assert not mask[0, 0, row].any()
    assert seer_select(gate, ratio=1e-9).any(-1).all()
    for chosen, empty in ((dense, False), (mask, True)):
        allowed = chosen.repeat_interleave(5, 2).repeat_interleave(5, 3)[:, :, :22, :22]
        out, lse = refattn.softmax_attention(q, k, k, causal="bottom_right", allowed=allowed, return_lse=True)
        rows = slice(row * 5, row * 5 + 5)
        assert bool((lse[0, 0, rows] == -math.inf).all() and (out[0, 0, rows] == 0).all()) == empty
        assert bool((out == refattn.softmax_attention(q, k, k, causal="bottom_right")).all()) != empty


@pytest.mark.parametrize("n", [3, 20, 22])
@pytest.mark.parametrize("rule", [{"count": 2}, {"count": 0}, {"count": 99}, {"threshold": 0.3}])
def test_decode(n, rule):
    """Whole blocks by 40 digits; the last block in any case."""
    q, k, w_q, w_k = gate_call(4, n=n, n_q=1)
    got = seer_decode(q, k, w_q, w_k, **rule, block=5, base=100.0).numpy()
    assert got.shape == (2, 2, -(-n // 5))
    assert got[..., -1].all()
    error = score_error(q, k, w_q, w_k, 5) * 2  # two heads of a group are added
    with mpmath.workdps(40):
        for at in np.ndindex(2, 2):
            group = range(2 * at[1], 2 * at[1] + 2)
            heads = [projected([mpmath.mpf(float(x)) for x in q[at[0], h, 0]], w_q[h].numpy()) for h in group]
            one = turned([a + b for a, b in zip(*heads, strict=True)], n - 1, 100.0)
            keys = [compressed(k[at][c * 5 : c * 5 + 5].numpy()) for c in range(n // 5)]
            keys = [turned(projected(x, w_k[at[1]].numpy()), 5 * c, 100.0) for c, x in enumerate(keys)]
            scores = [float(mpmath.fsum(a * b for a, b in zip(one, x, strict=True)) / 2) for x in keys]
            order = sorted(range(len(scores)), key=lambda c: -scores[c])
            assert all(scores[a] - scores[b] > 2 * error for a, b in itertools.pairwise(order))
            p = np.exp(scores) / np.exp(scores).sum()
            if "count" in rule:
                want = set(order[: rule["count"]])
            else:
                assert all(abs(x - 0.3) > 3 * error for x in p)
                want = {c for c, x in enumerate(p) if x > 0.3}
            assert set(np.flatnonzero(got[at])) == want | {-(-n // 5) - 1}


def asking(rng, b=4, n=256, block=16, topic=8, h=2, h_kv=1):
    """Return query and key where the queries of a block ask for the topic of one earlier block, in other features."""
    count = n // block
    topics = torch.randn(b, count, topic, generator=rng)
    asked = torch.stack([topics[:, int(torch.randint(r + 1, (1,), generator=rng))] for r in range(count)], 1)
    noise = torch.randn(b, n, 2 * topic, generator=rng) / 2
    x = torch.cat([topics, asked], -1).repeat_interleave(block, 1) + noise
    q = torch.cat([x[..., topic:] * 2, torch.zeros_like(x[..., topic:])], -1)
    k = torch.cat([x[..., :topic] * 2, x[..., topic:]], -1)
    return q[:, None].expand(b, h, n, -1), k[:, None].expand(b, h_kv, n, -1)


def recall(gate, target, ratio=0.4375):
    """Return the part of the target in the blocks that a gate chooses; the ratio keeps 4 of 16 blocks."""
    return float((target * seer_select(gate, ratio=ratio)).sum(-1)[:, :, 4:].mean())


def trained(steps=40, seed=0):
    """Return recalls on other data of a gate before and after training, of chance, and of the target itself."""
    rng = torch.Generator().manual_seed(seed)
    w = [torch.randn(s, generator=rng).div(4).requires_grad_() for s in ((2, 16, 16), (1, 48, 16))]
    q, k = asking(rng)
    target = seer_gate_target(q, k, block=16)
    before = recall(seer_gate(q, k, *w, block=16).exp(), target)
    chance = recall(torch.rand(target.shape, generator=rng), target)
    optimizer = torch.optim.Adam(w, 2e-2)
    for _ in range(steps):
        a, b = asking(rng)
        loss = seer_gate_loss(seer_gate(a, b, *w, block=16), seer_gate_target(a, b, block=16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, recall(seer_gate(q, k, *w, block=16).exp(), target), chance, recall(target, target)


def test_training_finds_what_attention_finds():
    before, after, chance, best = trained()
    assert abs(before - chance) < 0.15
    assert before + 0.15 < after <= best


Q, K, *W = gate_call(5, n=8)
GATE = {"query": Q, "key": K, "w_q": W[0], "w_k": W[1], "block": 4}
DECODE = {**GATE, "query": Q[:, :, -1:], "count": 1}
LOSS = {"log_gate": torch.zeros(1, 2, 4, 4), "target": torch.ones(1, 2, 4, 4)}
SELECT = {"gate": np.ones((1, 2, 4, 4)), "ratio": 0.5}
NUMPY = {"query": Q.numpy(), "key": K.numpy()}
WRONG = [
    (seer_gate, GATE, {"query": Q[:, :, 1:]}, "query: has 7 queries, expected one for each of the 8 keys"),
    (seer_gate, GATE, {"w_q": W[0][:2]}, "w_q: shape is (2, 6, 4), expected (4, 6, gate), each at least 1"),
    (seer_gate, GATE, {"w_k": W[1][:, :6]}, "w_k: shape is (2, 6, 4), expected (2, 18, 4), each at least 1"),
    (seer_gate, GATE, {"w_q": W[0][..., :3], "w_k": W[1][..., :3]}, "w_q: axis gate is 3, expected an even number"),
    (
        seer_gate,
        GATE,
        {**NUMPY, "w_q": W[0].numpy(), "w_k": W[1].numpy()},
        "query: is an array of numpy, expected a PyT",
    ),
    (seer_gate_target, {"query": Q, "key": K}, NUMPY, "query: is an array of numpy, expected a PyTorch tensor"),
    (seer_gate_target, {"query": Q, "key": K}, {"block": 0}, "block: got 0, expected a whole number from 1 on"),
    (seer_gate_loss, LOSS, {"target": torch.ones(1, 2, 3, 4)}, "target: shape is (1, 2, 3, 4), expected (1, 2, 4, 4)"),
    (
        seer_select,
        SELECT,
        {"ratio": None},
        "threshold: got None, and ratio None, expected one of the two; leave",
    ),
    (seer_select, SELECT, {"threshold": 0.1}, "threshold: got 0.1, and ratio 0.5, expected one of the two"),
    (seer_select, SELECT, {"ratio": 0.0}, "ratio: got 0.0, expected a number in (0, 1]"),
    (seer_select, SELECT, {"dense_rows": -1}, "dense_rows: got -1, expected a whole number from 0 on"),
    (seer_select, SELECT, {"gate": np.ones((1, 2, 4, 3))}, "gate: shape is (1, 2, 4, 3), expected (1, 2, 4, 4)"),
    (seer_decode, DECODE, {"query": Q}, "query: has 8 queries, expected the one of the token that is decoded"),
    (seer_decode, DECODE, {"threshold": 0.1}, "threshold: got 0.1, and count 1, expected one of the two"),
    (seer_decode, DECODE, {"count": -1}, "count: got -1, expected a whole number from 0 on"),
]


@pytest.mark.parametrize(("function", "good", "change", "text"), WRONG)
def test_wrong_calls(function, good, change, text):
    function(**good)
    with pytest.raises(InvalidInput, match=re.escape(text)):
        function(**{**good, **change})
