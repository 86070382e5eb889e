"""URPE attention by fractions and loops, its gradients by linearity in the gain, and the task that names it."""

from fractions import Fraction

import numpy as np
import pytest

from refattn import InvalidProblem, Problem, evaluate
from refattn.exact.arithmetics import Balls

SIGNED = (0.5, -1.0, 0.25, 2.0, 1.0, 0.0, -0.75)


def values(gain, far):
    """Return a gain's value for a key so many places ahead."""
    reach = len(gain) // 2
    return gain[max(-reach, min(reach, far)) + reach]


@pytest.mark.parametrize("gain", [(2.0,), (1.0, 1.0, 0.0), SIGNED])
@pytest.mark.parametrize("causal", [None, "bottom_right", "top_left"])
def test_equal_scores_by_fractions(make, gain, causal):
    """With a scale of 0 the weights are 1 over the number of keys: out is a rational number, rounded once."""
    p = make(5, 9, 4, dtype="float64", causal=causal, scale=0.0, variant="urpe", options={"gain": (gain,)})
    out = evaluate(p, rounding="float64").out
    corner = 0 if causal == "top_left" else 4
    for h, i, c in np.ndindex(2, 5, 4):
        keys = [j for j in range(9) if causal is None or j <= i + corner]
        terms = [Fraction(values(gain, j - i - corner)) * Fraction(float(p.value[0, h, j, c])) for j in keys]
        assert out[0, h, i, c] == float(sum(terms) / len(keys))


def test_by_a_loop_with_a_gain_for_each_head(make):
    """In float64, u = 2^-53: a score is off by 8 roundings of its terms, and a share by twice that in proportion.

    The exponential, the denominator's 6 terms, the gain and the sum over 6 values bring less than 20 roundings more.
    """
    u = 2.0**-53
    gain = (SIGNED, (0.0, 1.0, 3.0), (-1.0,), (0.25, 0.5, 0.75, 1.0, 0.0))
    bias = np.random.default_rng(1).standard_normal((1, 4, 6, 6))
    p = make(6, 6, 4, h=4, h_kv=2, dtype="float64", bias=bias, variant="urpe", options={"gain": gain})
    answer = evaluate(p)
    for h, i in np.ndindex(4, 6):
        s = p.query[0, h, i] @ p.key[0, h // 2].T / 2 + bias[0, h, i]
        off = 8 * u * (np.abs(p.query[0, h, i]) @ np.abs(p.key[0, h // 2]).T / 2 + np.abs(bias[0, h, i])).max()
        w = np.exp(s) / np.exp(s).sum()
        w = w * [values(gain[h], j - i) for j in range(6)]
        size = np.abs(w) @ np.abs(p.value[0, h // 2])
        assert (np.abs(answer.out[0, h, i] - w @ p.value[0, h // 2]) <= (2 * off + 20 * u) * size).all()
        assert abs(answer.lse[0, h, i] - np.log(np.exp(s).sum())) <= off + 20 * u * (1 + np.abs(s).max())


@pytest.mark.parametrize("n", [1, 2, 7, 128])
def test_one_layer_tells_places_apart(n):
    """The paper's task: equal tokens, W_Q = 0 and the gain 1[j <= i] give exactly i / n."""
    one = np.ones((1, 1, n, 1))
    p = Problem(0 * one, one, one, variant="urpe", options={"gain": ((1.0, 1.0, 0.0),)})
    places = np.array([float(Fraction(i, n)) for i in range(1, n + 1)])
    assert (evaluate(p, rounding="float64").out[0, 0, :, 0] == places).all()


def test_without_a_gain_no_layer_does():
    """The negative control: any bias, or a causal mask, leaves all outputs equal."""
    one, bias = np.ones((1, 1, 7, 1)), np.random.default_rng(0).standard_normal((1, 1, 7, 7))
    for more in ({}, {"bias": bias}, {"causal": "bottom_right"}):
        assert (evaluate(Problem(one, one, one, variant="urpe", **more), rounding="float64").out == 1).all()


def test_gradients_are_linear_in_the_gain(make):
    """Two gains that add up to 1 have gradients that add up to those of softmax attention; bias among them."""
    bias, dout = (np.random.default_rng(i).standard_normal((1, 2, 5, n)) for i, n in ((1, 5), (2, 4)))
    p = make(5, 5, 4, dtype="float64", bias=bias)
    parts = [(1.0, 0.75, -0.5, 0.0, 2.0), (0.0, 0.25, 1.5, 1.0, -1.0)]
    found = [evaluate(p.replace(variant="urpe", options={"gain": (g,)}), gradients=dout) for g in parts]
    dense = evaluate(p, gradients=dout)
    with Balls(128).working():
        for name in ("out", "dq", "dk", "dv", "dbias"):
            a, b, c = (x.balls[name].ravel() for x in (*found, dense))
            assert all((x + y).overlaps(z) for x, y, z in zip(a, b, c, strict=True)), name
            assert not all(x.overlaps(y) for x, y in zip(a, c, strict=True)), name


def test_the_lse_does_not_know_of_the_gain(make):
    p = make(variant="urpe")
    gained = p.replace(options={"gain": (SIGNED,)})
    assert (evaluate(gained).lse == evaluate(p.replace(variant="softmax")).lse).all()
    assert (evaluate(p).out == evaluate(p.replace(variant="softmax")).out).all()
    assert (evaluate(gained).out != evaluate(p).out).any()


def test_one_row_stands_for_all_heads(make):
    p = make(variant="urpe", options={"gain": (SIGNED,)})
    both = evaluate(p, rounding="float32").out
    assert (both == evaluate(p.replace(options={"gain": (SIGNED, SIGNED)}), rounding="float32").out).all()
    assert (both != evaluate(p.replace(options={"gain": (SIGNED, SIGNED[::-1])}), rounding="float32").out).any()


def test_distances_count_within_a_sequence(make):
    """Packed sequences are what each is alone."""
    ends = np.array([0, 3, 8], np.int32)
    p = make(8, 8, variant="urpe", options={"gain": (SIGNED,)})
    packed = evaluate(p.replace(cu_seqlens_q=ends, cu_seqlens_k=ends), rounding="float32").out
    for part in (slice(0, 3), slice(3, 8)):
        alone = p.replace(query=p.query[:, :, part], key=p.key[:, :, part], value=p.value[:, :, part])
        assert (packed[:, :, part] == evaluate(alone, rounding="float32").out).all()


def test_a_key_whose_gain_is_zero_is_read(make):
    p = make(3, 3, variant="urpe", options={"gain": ((1.0, 1.0, 0.0),)})
    value = p.value.copy()
    value[:, :, 2] = np.nan
    assert np.isnan(evaluate(p.replace(value=value)).out).all()
    hidden = evaluate(p.replace(value=value, allowed=np.array([True, True, False])[None, None, None]))
    assert np.isfinite(hidden.out).all()


@pytest.mark.parametrize(
    "gain", [(1.0, 2.0, 3.0), ((1.0, 2.0),), ((),), ((1.0,),) * 3, ((1.0, None, 1.0),), ((float("nan"),),), [[1.0]]]
)
def test_a_gain_that_cannot_be_is_named(make, gain):
    text = r"gain: got .*, expected None or a tuple of one row of 2·reach \+ 1 finite numbers, .* each of 2 query heads"
    with pytest.raises(InvalidProblem, match=text):
        evaluate(make(variant="urpe", options={"gain": gain}))
