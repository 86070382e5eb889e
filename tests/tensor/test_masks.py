"""Masks of single keys: the definition in words, streaming, gradients, and what lies at keys that nobody sees."""

import numpy as np
import pytest

from refattn import InvalidProblem, tensor

from .test_tensor import arrays, logits, seen


def masks(form, n_q, n1, n2, b=1, h=1, seed=0):
    """Return random masks; a row sees no k1, and a k1 and a k2 are seen by no row."""
    rng = np.random.default_rng(seed)
    one = rng.random((b, h, n_q, n1)) < 0.6
    two = rng.random((1, 1, n1 if form == "tree" else n_q, n2)) < 0.6
    one[:, :, n_q // 2] = False
    one[..., n1 // 3], two[..., n2 // 3] = False, False
    return one, two


def expected(form, given, allowed, scale, **options):
    """Return out and lse from the formula in words, in float64."""
    q, k1, k2, v1, v2 = (x.astype(float) for x in given)
    (b, h, n_q), h_kv, (n1, n2) = q.shape[:3], k1.shape[1], (k1.shape[2], k2.shape[2])
    out, lse = np.zeros((b, h, n_q, v1.shape[3])), np.zeros((b, h, n_q))
    for at in np.ndindex(b, h):
        kv = at[0], at[1] * h_kv // h
        one, two = (m[at[0] % len(m), at[1] % m.shape[1]] for m in allowed)
        mask = seen(form, n_q, n1, n2, **options) & one[:, :, None] & (two if form == "tree" else two[:, None])
        p = np.where(mask, np.exp(scale * logits(form, q[at], k1[kv], k2[kv])), 0)
        total = p.sum((1, 2))
        out[at] = np.einsum("ijk,jc,kc->ic", p, v1[kv], v2[kv]) / np.where(total > 0, total, 1)[:, None]
        with np.errstate(divide="ignore"):
            lse[at] = np.log(total)
    return out, lse


@pytest.mark.parametrize("causal", [{}, {"causal": "bottom_right", "window": (9, 5)}], ids=["alone", "causal"])
@pytest.mark.parametrize("form", tensor.FORMS)
def test_masked_attention_is_the_formula(form, causal):
    given = arrays(2, 4, 2, 21, 70, 19, d=9, d_v=5, dtype="float32")
    allowed = masks(form, 21, 70, 19, 2, 4)
    out, lse = expected(form, given, allowed, 0.2, **causal)
    options = {"form": form, "scale": 0.2, "allowed": allowed, **causal}
    exact = tensor.exact(*given, **options, rounding="float64")
    np.testing.assert_allclose(exact.out, out, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(exact.lse, lse, rtol=1e-12, atol=1e-13)
    for dtype, most in (("float32", 1e-5), ("float64", 1e-12)):
        found, terms = tensor.attention(*(x.astype(dtype) for x in given), **options, return_lse=True)
        np.testing.assert_allclose(found, exact.out, rtol=0, atol=most)
        np.testing.assert_allclose(terms, exact.lse, rtol=0, atol=10 * most)
        assert np.array_equal(np.isneginf(terms), np.isneginf(lse))


@pytest.mark.parametrize("form", tensor.FORMS)
def test_masked_gradients_are_those_of_the_definition(form):
    given = arrays(1, 2, 1, 4, 5, 6, d=3, d_v=2, dtype="float32")
    allowed = masks(form, 4, 5, 6, 1, 2, seed=3)
    dout = np.random.default_rng(1).standard_normal((1, 2, 4, 2)).astype(np.float32)
    options = {"form": form, "allowed": allowed}
    double = tensor.backward(*(x.astype(float) for x in (*given, dout)), **options)
    problem = tensor.as_pairs(*given, **options)
    assert problem.allowed.shape == (1, 2, 4, 30)
    step = 1e-5
    for t, (x, g) in enumerate(zip(given, double, strict=True)):
        direction = np.random.default_rng(t).standard_normal(x.shape)
        ends = []
        for sign in (1, -1):
            moved = [y.astype(float) for y in given]
            moved[t] += sign * step * direction
            ends.append(float((expected(form, moved, allowed, 1 / 3)[0] * dout).sum()))
        assert (g * direction).sum() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-8)


def test_exact_gradients_with_masks():
    given = arrays(1, 1, 1, 3, 4, 5, d=3, d_v=2, dtype="float32")
    one, two = masks("trilinear", 3, 4, 5)
    one, two = one | (np.arange(4) < 1), two | (np.arange(5) < 1)  # an exact zero's rounding would stay open
    dout = np.ones((1, 1, 3, 2), np.float32)
    rounded = tensor.exact_gradients(*given, dout, allowed=(one, two), rounding="float64")
    found = tensor.backward(*(x.astype(float) for x in (*given, dout)), allowed=(one, two))
    for name, x in zip(("dq", "dk1", "dk2", "dv1", "dv2"), found, strict=True):
        np.testing.assert_allclose(x, rounded[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("form", tensor.FORMS)
def test_keys_that_no_row_sees_may_hold_anything(form):
    given = arrays(1, 2, 2, 10, 12, 9, d=6, d_v=4)
    allowed = masks(form, 10, 12, 9, 1, 2)
    dout = np.ones((1, 2, 10, 4))
    spoiled = [x.copy() for x in given]
    for t, hidden in ((1, 4), (2, 3), (3, 4), (4, 3)):
        spoiled[t][:, :, hidden] = np.nan
    out, lse = tensor.attention(*given, form=form, allowed=allowed, return_lse=True)
    again, terms = tensor.attention(*spoiled, form=form, allowed=allowed, return_lse=True)
    assert np.array_equal(out, again)
    assert np.array_equal(lse, terms)
    clean, dirty = (tensor.backward(*x, dout, form=form, allowed=allowed) for x in (given, spoiled))
    assert all(np.array_equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        (np.ones((1, 1, 5, 6), bool), "allowed: got ndarray, expected two masks, of k1 and of k2, or None"),
        ((np.ones((1, 1, 5, 6)), None), "allowed: the mask of k1 is float64, expected bool"),
        ((None, np.ones((1, 1, 5, 6), bool)), r"the mask of k2 has shape \(1, 1, 5, 6\), expected \(1, 1, 5, 7\)"),
        ((np.ones((3, 1, 5, 6), bool), None), r"the mask of k1 has shape \(3, 1, 5, 6\), expected .* may be 1"),
        ((np.ones((5, 6), bool), None), r"the mask of k1 has shape \(5, 6\)"),
    ],
)
def test_masks_that_do_not_fit(allowed, text):
    with pytest.raises(InvalidProblem, match=text):
        tensor.attention(*arrays(), allowed=allowed)
    if isinstance(allowed, tuple) and allowed[0] is None:
        with pytest.raises(InvalidProblem, match=r"expected \(1, 1, 6, 7\)"):
            tensor.attention(*arrays(), form="tree", allowed=allowed)
