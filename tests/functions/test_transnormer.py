"""TransNormer's layer beside a loop of 60 digits, and beside the release's modules in PyTorch."""

import re

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

from refattn import InvalidInput
from refattn.functions.positions import lightning_slopes
from refattn.functions.transnormer import lrpe, lrpe_angles, sglu, simple_rms_norm, transnormer_attention

RNG = np.random.default_rng(0)
N, D, HEADS, D_K, D_V, E = 6, 5, 3, 2, 4, 3
WEIGHTS = [RNG.standard_normal(s) for s in [(D, HEADS * D_K)] * 2 + [(D, HEADS * D_V)] * 2 + [(HEADS * D_V, E)]]
X, DECAY = RNG.standard_normal((2, N, D)), lightning_slopes(HEADS, 1, 4) * 8
NORM = {"norm_weight": RNG.standard_normal(HEADS * D_V), "norm_bias": RNG.standard_normal(HEADS * D_V)}

ANGLES = np.array([[1.0, 0.3], [2.5, 0.01], [0.0, 3.0]])


def matrix(x):
    return mpmath.matrix(np.asarray(x).tolist())


def by_recurrence(x, mode, norm, epsilon, angles=None):
    """Return the layer of one sequence: states that fade and take tokens in, one after the other.

    With angles they turn as well: states are complex, and what is read is the real part.
    """
    mp = mpmath.mp

    def sigmoid(y):
        return 1 / (1 + mp.exp(-y))

    q, k, v, gate = (matrix(x) * matrix(w) for w in WEIGHTS[:4])
    q, k = (y.apply(lambda a: a * sigmoid(a)) for y in (q, k))
    if mode == "released":
        v, gate = v.apply(lambda a: a * sigmoid(a)), gate.apply(sigmoid)
    width, out = HEADS * D_V, mpmath.zeros(N, HEADS * D_V)
    for h in range(HEADS):
        state, fade = mpmath.zeros(D_K, D_V), mp.exp(-mpmath.mpf(float(DECAY[h])))
        turn = [mp.expj(0.0 if angles is None else float(angles[h, a])) for a in range(D_K)]
        for i in range(N):
            for c in range(D_V):
                for a in range(D_K):
                    state[a, c] = turn[a] * fade * state[a, c] + k[i, h * D_K + a] * v[i, h * D_V + c]
                out[i, h * D_V + c] = sum(q[i, h * D_K + a] * state[a, c].real for a in range(D_K))
    for i in range(N):
        row = [out[i, c] for c in range(width)]
        if mode == "released":
            mean = sum(row) / width
            row = [y - mean for y in row]
        size = mp.sqrt(sum(y * y for y in row) / width + epsilon)
        for c in range(width):
            y = row[c] / size
            y = y if norm is None else y * norm["norm_weight"][c] + norm["norm_bias"][c]
            out[i, c] = y * gate[i, c]
    return np.array((out * matrix(WEIGHTS[4])).tolist(), float)


@pytest.mark.parametrize("make", [np.asarray, torch.asarray, jnp.asarray])
@pytest.mark.parametrize(
    ("mode", "norm", "epsilon", "angles"),
    [
        ("paper", None, None, None),
        ("released", None, None, ANGLES),
        ("released", NORM, None, None),
        ("paper", None, 0.25, ANGLES),
    ],
)
def test_a_recurrence_of_60_digits(make, mode, norm, epsilon, angles):
    kind = np.float32 if make is jnp.asarray else np.float64
    given = [make(np.asarray(y, kind)) for y in (X, *WEIGHTS, DECAY)]
    more = {n: make(np.asarray(y, kind)) for n, y in (norm or {}).items()}
    turned = None if angles is None else np.asarray(angles, kind)
    got = transnormer_attention(
        *given, **more, epsilon=epsilon, mode=mode, angles=None if turned is None else make(turned)
    )
    assert type(got) is type(given[0])
    assert got.dtype == given[0].dtype
    assert tuple(got.shape) == (2, N, E)
    small = epsilon if epsilon is not None else {"paper": 1e-6, "released": 1e-5}[mode]
    with mpmath.workdps(60):
        exact = np.stack([by_recurrence(x, mode, norm, mpmath.mpf(small), turned) for x in X])
    # a number of the result has some 50 roundings behind it, of sums whose terms stay below 128 here
    assert np.abs(np.asarray(got, float) - exact).max() <= 50 * np.finfo(kind).eps * 128


def test_the_release_by_pytorchs_modules():
    """Its gate of low rank is one matrix of two; its heads are as wide as one another."""
    torch.manual_seed(0)
    d, heads, n = 8, 2, 7
    q, k, v, o = (torch.nn.Linear(d, d, bias=False, dtype=torch.float64) for _ in range(4))
    gate = [torch.nn.Linear(*s, bias=False, dtype=torch.float64) for s in ((d, d // heads), (d // heads, d))]
    norm = torch.nn.LayerNorm(d, dtype=torch.float64)
    x, decay = torch.randn(3, n, d, dtype=torch.float64), torch.asarray(lightning_slopes(heads, 2, 6))
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        a, b, c = (torch.nn.functional.silu(f(x)).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (q, k, v))
        apart = torch.arange(n)[:, None] - torch.arange(n)
        fade = torch.exp(-decay[:, None, None] * apart).tril()
        want = norm(((a @ b.mT * fade) @ c).transpose(1, 2).flatten(-2)) * torch.sigmoid(gate[1](gate[0](x)))
        want = o(want)
        weights = [f.weight.T for f in (q, k, v)] + [gate[0].weight.T @ gate[1].weight.T, o.weight.T]
        got = transnormer_attention(x, *weights, decay, norm_weight=norm.weight, norm_bias=norm.bias, mode="released")
    # some 50 roundings each of terms below 1, and the norm divides by the root of 1e-5 at least
    assert (got - want).abs().max() <= 2 * 50 * 2.0**-52 * 316


def test_a_token_reads_none_after_it():
    one = transnormer_attention(X, *WEIGHTS, DECAY)
    other = X.copy()
    other[:, 4:] = 9.0
    two = transnormer_attention(other, *WEIGHTS, DECAY)
    assert (one[:, :4] == two[:, :4]).all()
    assert (one[:, 4:] != two[:, 4:]).all()


def test_the_norm():
    assert simple_rms_norm(np.array([3.0, 4.0, 0.0, 0.0]), 0.0).tolist() == [1.2, 1.6, 0.0, 0.0]
    assert simple_rms_norm(np.zeros(4)).tolist() == [0.0] * 4
    assert simple_rms_norm(np.array([1.0, 1.0]), 3.0).tolist() == [0.5, 0.5]


def test_lrpe_knows_the_distance_alone():
    """The sum of cosines is exact to a few roundings; later rows are those of an offset, to the bit."""
    q, k = np.array([[1.0, 2.0]] * 5)[None], np.array([[4.0, 0.5]] * 5)[None]
    angles = np.array([[0.75, 2.0]])
    scores = (lrpe(q, angles) @ lrpe(k, angles).mT)[0]
    apart = np.arange(5)[:, None] - np.arange(5)
    assert abs(scores - 4 * np.cos(0.75 * apart) - np.cos(2.0 * apart)).max() <= 5 * 16 * 2.0**-52
    assert (lrpe(q[:, 2:], angles, 2) == lrpe(q, angles)[:, 2:]).all()
    assert lrpe(q, angles)[0, 0].tolist() == [1.0, 2.0, 0.0, 0.0]


def test_lrpe_holds_positions_that_a_narrow_type_does_not():
    x, angles = np.ones((1, 2, 2)), np.array([[0.75, 2.0]])
    wide = lrpe(x, angles, 3000)
    narrow = lrpe(x.astype(np.float16), angles.astype(np.float16), 3000)
    assert abs(narrow - wide).max() <= 2.0**-11 + 3001 * 2.0 * 2.0**-24  # a rounding of out, and one of an angle


def test_lrpe_starts_with_one_geometric_row_of_angles_over_all_heads():
    found = lrpe_angles(2, 4)
    assert found.shape == (2, 4)
    assert found[0, 0] == 1.0
    assert abs(found.reshape(-1)[1:] / found.reshape(-1)[:-1] - 0.1).max() <= 2.0**-50
    assert abs(found[1, 0] - 1e-4) <= 2.0**-60


@pytest.mark.parametrize("make", [np.asarray, torch.asarray, jnp.asarray])
def test_sglu_is_a_product_of_two_linear_maps(make):
    x, a, b, c = (make(np.array(y, np.float32)) for y in ([[2, -1]], [[1, 0, 3], [2, 1, 1]], [[1, 1, 0], [0, 5, 2]],
                                                          [[1], [2], [3]]))  # fmt: skip
    assert np.asarray(sglu(x, a, b, c)).tolist() == [[0 * 2 + 2 * (-1 * -3) + 3 * (5 * -2)]]


def test_errors_of_lrpe_and_sglu():
    x, angles, w = np.ones((1, 3, 2)), np.ones((1, 2)), np.ones((2, 3))
    for call, text in (
        (lambda: lrpe(x[0], angles), "x: shape is (3, 2), expected (..., heads, tokens, features), each at least 1"),
        (lambda: lrpe(x, angles[:, :1]), "angles: shape is (1, 1), expected (1, 2)"),
        (lambda: lrpe(x, angles, -1), "offset: got -1, expected"),
        (
            lambda: lrpe(x, angles, 2**53),
            "offset: got 9007199254740992, expected a whole number from 0 to 900719925474",
        ),
        (lambda: lrpe_angles(0, 2), "heads: got 0, expected"),
        (lambda: lrpe_angles(2**62, 2), f"heads: got {2**62}, expected a whole number from 1 to {2**30}"),
        (lambda: lrpe_angles(2, 2**62), f"width: got {2**62}, expected a whole number from 1 to {2**31}"),
        (lambda: sglu(np.float64(1.0) * np.ones(()), w, w, w.T), "x: shape is (), expected (..., features), at least"),
        (lambda: sglu(x, w.T, w, w.T), "w_gate: shape is (3, 2), expected (2, columns)"),
        (lambda: sglu(x, w, w[:, :2], w.T), "w_value: shape is (2, 2), expected (2, 3)"),
        (lambda: sglu(x, w, w, w), "w_out: shape is (2, 3), expected (3, features)"),
        (lambda: transnormer_attention(X, *WEIGHTS, DECAY, angles=ANGLES[:2]), "angles: shape is (2, 2), expected (3,"),
    ):
        with pytest.raises(InvalidInput, match=f"^{re.escape(text)}"):
            call()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mode": "x"}, "mode: got 'x', expected one of paper, released"),
        ({"x": X[0, 0]}, "x: shape is (5,), expected (..., tokens, features), each at least 1"),
        ({"w_q": WEIGHTS[0][:, :5]}, "w_k: shape is (5, 6), expected (5, 5), each at least 1"),
        ({"w_gate": WEIGHTS[0]}, "w_gate: shape is (5, 6), expected (5, 12), each at least 1"),
        ({"w_out": WEIGHTS[4][:4]}, "w_out: shape is (4, 3), expected (12, features), each at least 1"),
        ({"decay": np.ones(4)}, "w_q: has 6 columns, expected a multiple of the 4 heads of decay"),
        ({"decay": -DECAY}, "decay: one is no finite number from 0 on"),
        ({"decay": DECAY * np.nan}, "decay: one is no finite number from 0 on"),
        ({"decay": DECAY.astype(np.float32)}, "decay: holds float32, expected float64, as x does"),
        (NORM, "norm_weight: got an array, expected None for mode 'paper', whose norm has none"),
        ({"norm_bias": np.ones(3), "mode": "released"}, "norm_bias: shape is (3,), expected (12)"),
        ({"epsilon": -1.0}, "epsilon: got -1.0, expected a finite number from 0 on"),
    ],
)
def test_errors(change, text):
    names = ("x", "w_q", "w_k", "w_v", "w_gate", "w_out", "decay")
    given = dict(zip(names, (X, *WEIGHTS, DECAY), strict=True))
    with pytest.raises(InvalidInput, match=f"^{re.escape(text)}"):
        transnormer_attention(**(given | change))
