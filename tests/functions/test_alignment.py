"""SSA's streams against exact attention, its loss and gradients against closed forms, and a toy training."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

import refattn
from refattn import InvalidInput
from refattn.functions.alignment import ssa_alignment_loss, ssa_step, ssa_streams

from .selector_calls import call, exact_probabilities, relative_error

EPS = 2.0**-52


def ssa_call(seed, n_q=9, n_k=9, size=1.0):
    """Return query, key, value, gate and a selection that always has a row's own key."""
    q, k, v = (torch.from_numpy(size * x) for x in call(seed, n_q=n_q, n_k=n_k, dtype=np.float64))
    rng = np.random.default_rng(seed)
    gate = torch.from_numpy(rng.random((2, 4, n_q, 1)))
    selected = torch.from_numpy(rng.random((2, 2, n_q, n_k)) < 0.4) | torch.eye(n_k, dtype=torch.bool)[n_k - n_q :]
    return q, k, v, gate, selected


@pytest.mark.parametrize(("n_q", "scale"), [(9, None), (4, 0.9)])
def test_streams_are_gated_attention(n_q, scale):
    q, k, v, gate, selected = ssa_call(0, n_q)
    got = ssa_streams(q, k, v, gate, selected, scale=scale)
    for out, allowed in zip(got, (None, selected.repeat_interleave(2, 1)), strict=True):
        given = {"scale": scale, "causal": "bottom_right", "allowed": allowed}
        want = gate * refattn.softmax_attention(q, k, v, **given)
        size = gate * refattn.softmax_attention(q, k, v.abs(), **given)
        # probabilities' error, a sum of 9 products, the gate; twice for the reference's own rounding
        bound = (relative_error(q.numpy(), k.numpy(), scale) + 2 * 12 * EPS) * size
        assert ((out - want).abs() <= bound).all()


def test_a_row_without_keys_gives_zero_and_finite_gradients():
    q, k, v, gate, selected = ssa_call(1)
    selected[:, :, 3] = False
    given = [x.requires_grad_() for x in (q, k, v, gate)]
    full, sparse = ssa_streams(*given, selected)
    assert (sparse[:, :, 3] == 0).all()
    assert (full[:, :, 3] != 0).all()
    ssa_alignment_loss(full, sparse).backward()
    assert all(x.grad.isfinite().all() for x in given)


def test_selecting_all_is_full_attention_and_has_no_loss():
    q, k, v, gate, selected = ssa_call(2)
    full, sparse = ssa_streams(q, k, v, gate, torch.ones_like(selected))
    assert (full == sparse).all()
    assert ssa_alignment_loss(full, sparse) == 0


def test_the_difference_is_the_dropped_mass_times_the_difference_of_means():
    """``full - sparse = g delta (mu_dropped - mu_kept)``, and is no longer than ``2 g delta max |v|``."""
    q, k, v, gate, selected = ssa_call(3)
    full, sparse = ssa_streams(q, k, v, gate, selected)
    p = torch.from_numpy(exact_probabilities(q.numpy(), k.numpy()))
    kept, values = selected.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    delta = (p * ~kept).sum(-1, keepdim=True)
    dropped = torch.where(delta > 0, (p * ~kept) @ values / delta, 0)
    mean = (p * kept) @ values / (1 - delta)
    want = gate * delta * (dropped - mean)
    size = values.abs().amax()
    # both sides are sums of 9 products of at most `size`, off by probabilities' error; 1 - delta is at least 0.01 here
    assert float(1 - delta.max()) > 0.01
    assert ((full - sparse) - want).abs().max() <= (2 * relative_error(q.numpy(), k.numpy()) + 60 * EPS / 0.01) * size
    lengths = values.norm(dim=-1).amax(-1)[..., None, None]
    assert ((full - sparse).norm(dim=-1, keepdim=True) <= 2 * gate * delta * lengths * (1 + 60 * EPS)).all()


def test_the_loss_in_fractions():
    rng = np.random.default_rng(4)
    full, sparse = (torch.from_numpy(rng.normal(size=(3, 5)) * 2) for _ in range(2))
    total, ways = Fraction(0), set()
    for a, b in zip(full.flatten().tolist(), sparse.flatten().tolist(), strict=True):
        x = abs(Fraction(a) - Fraction(b))
        ways.add(x < 1)
        total += 2 * (x * x / 2 if x < 1 else x - Fraction(1, 2)) / 15
    assert ways == {True, False}
    # 15 terms, each off by 4 roundings of at most twice itself (|x| - 1/2 >= 1/2 |x|), summed and doubled
    assert abs(Fraction(float(ssa_alignment_loss(full, sparse))) - total) <= Fraction((15 + 8) * EPS) * total


def test_each_stream_has_its_own_gradient():
    """``clip(full - sparse, -1, 1) / size`` for one, minus that for the other; neither reaches the other's."""
    rng = torch.Generator().manual_seed(0)
    full, sparse = (torch.randn(40, dtype=torch.float64, generator=rng, requires_grad=True) for _ in range(2))
    ssa_alignment_loss(full, sparse).backward()
    want = (full - sparse).detach().clamp(-1, 1) / 40
    # a difference and a product by 1/40, each rounded, here and there
    assert ((full.grad - want).abs() <= 4 * EPS * want.abs()).all()
    assert ((sparse.grad + want).abs() <= 4 * EPS * want.abs()).all()
    one = torch.autograd.grad(ssa_alignment_loss(full, sparse.detach()), full)[0]
    assert (one == full.grad).all()


def test_dropped_keys_learn_through_the_full_stream_alone():
    """Closed form: with ``c_i = g_i clip(full_i - sparse_i, -1, 1) / size`` a dropped key j has

    ``dv_j = sum_i p_ij c_i`` and ``dk_j = scale sum_i p_ij (v_j - o_i)·c_i q_i``, o the attention before the gate. The
    sparse stream gives it 0.
    """
    q, k, v, gate, selected = ssa_call(5)
    j = 2
    selected[:, :, :, j] = False
    selected[:, :, j, 0] = True  # so that the row still has a key
    k.requires_grad_()
    v.requires_grad_()
    full, sparse = ssa_streams(q, k, v, gate, selected)
    for x in torch.autograd.grad(sparse.sum(), (k, v), retain_graph=True):
        assert (x[:, :, j] == 0).all()
        assert (x[:, :, j + 1] != 0).any()
    dk, dv = torch.autograd.grad(ssa_alignment_loss(full, sparse), (k, v))
    q, k, v, full, sparse = (x.detach() for x in (q, k, v, full, sparse))
    p = torch.from_numpy(exact_probabilities(q.numpy(), k.numpy()))[..., j]
    c = gate * (full - sparse).clamp(-1, 1) / full.numel()
    lean = (v.repeat_interleave(2, 1)[:, :, j : j + 1] - full / gate).mul(c).sum(-1)
    want_v = (p[..., None] * c).unflatten(1, (2, 2)).sum((2, 3))
    want_k = ((p * lean)[..., None] * q / 8**0.5).unflatten(1, (2, 2)).sum((2, 3))
    assert (want_v != 0).all()
    # 18 terms of at most max|c|, max|v| and max|q|, each of some 60 roundings and twice probabilities' error
    error = (18 * 60 * EPS + 4 * relative_error(q.numpy(), k.numpy())) * 18 * float(c.abs().max())
    assert (dv[:, :, j] - want_v).abs().max() <= error
    assert (dk[:, :, j] - want_k).abs().max() <= error * 3 * 2 * float(v.abs().max() * q.abs().max())


def test_gradients():
    q, k, v, gate, selected = ssa_call(6, n_q=3, n_k=4)
    given = [x.requires_grad_() for x in (q, k, v, gate)]
    for i in (0, 1):
        assert torch.autograd.gradcheck(lambda *x, i=i: ssa_streams(*x, selected)[i], given)


def test_a_step_hands_on_the_stream_of_the_coin_and_always_the_loss():
    given = ssa_call(7)
    full, sparse = ssa_streams(*given)
    for stream, want in (("full", full), ("sparse", sparse)):
        out, loss = ssa_step(*given, stream=stream)
        assert (out == want).all()
        assert loss == ssa_alignment_loss(full, sparse)


def trained(streams, weight, steps=80, seed=0):
    """Train one layer to copy what teachers give, and return its mean squared gap between streams and its task losses.

    Each row of 32 sees its own block of 4 keys and the one of the largest mean score. `streams` are drawn by a coin.
    """
    rng = torch.Generator().manual_seed(seed)
    d, n, block = 8, 32, 4
    w = [torch.randn(d, d, generator=rng).div(2).requires_grad_() for _ in range(3)]
    teacher = [torch.randn(d, d, generator=rng).div(2) for _ in range(3)]
    data = torch.randn(8, 1, n, d, generator=rng)
    gate = torch.ones(8, 1, n, 1)

    def selected(q, k):
        s = (q @ k.unflatten(2, (-1, block)).mean(3).transpose(2, 3)).detach()
        own = (torch.arange(n) // block)[:, None]
        s = s.masked_fill(torch.arange(n // block) >= own, -torch.inf)
        best = s.argmax(-1, keepdim=True) == torch.arange(n // block)
        return (best | (torch.arange(n // block) == own)).repeat_interleave(block, -1)

    want = ssa_streams(*(data @ x for x in teacher), gate, torch.ones(8, 1, n, n, dtype=torch.bool))[0]
    optimizer = torch.optim.Adam(w, 2e-2)
    for _ in range(steps):
        q, k, v = (data @ x for x in w)
        stream = streams[int(torch.randint(len(streams), (1,), generator=rng))]
        out, align = ssa_step(q, k, v, gate, selected(q, k), stream=stream)
        optimizer.zero_grad()
        ((out - want).pow(2).mean() + weight * align).backward()
        optimizer.step()
    q, k, v = (data @ x for x in w)
    full, sparse = ssa_streams(q, k, v, gate, selected(q, k))
    return [float((a - b).detach().pow(2).mean()) for a, b in ((full, sparse), (full, want), (sparse, want))]


def test_training_with_the_loss_closes_the_gap():
    alone, both = trained(["full"], 0.0), trained(["full", "sparse"], 10.0)
    assert both[0] < alone[0] / 2


QKV = dict(zip(("query", "key", "value", "gate", "selected"), ssa_call(8), strict=True))
WRONG = [
    ({"gate": torch.ones(2, 4, 9)}, "gate: shape is (2, 4, 9), expected (2, 4, 9, 1), each at least 1"),
    ({"selected": torch.ones(2, 4, 9, 9) > 0}, "selected: shape is (2, 4, 9, 9), expected (2, 2, 9, 9)"),
    ({"selected": torch.ones(2, 2, 9, 9)}, "selected: has type torch.float32, expected torch.bool"),
    ({"stream": "both"}, "stream: got 'both', expected 'full' or 'sparse'"),
    ({n: x.numpy() for n, x in QKV.items()}, "query: is an array of numpy, expected a PyTorch tensor"),
]


@pytest.mark.parametrize(("change", "text"), WRONG)
def test_wrong_calls(change, text):
    with pytest.raises(InvalidInput, match=re.escape(text)):
        ssa_step(**{**QKV, "stream": "full", **change})


def test_wrong_losses():
    with pytest.raises(InvalidInput, match=re.escape("sparse: shape is (2,), expected full's (3,)")):
        ssa_alignment_loss(torch.ones(3), torch.ones(2))
    with pytest.raises(InvalidInput, match=re.escape("full: is an array of numpy, expected a PyTorch tensor")):
        ssa_alignment_loss(np.ones(3), np.ones(3))
