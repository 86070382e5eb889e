"""Triple-wise attention: streaming against its correctly rounded definition, gradients, polynomials and bounds."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import InvalidInput, InvalidProblem, UnsupportedProblem, tensor
from refattn.tensor.costs import COSTS, measure
from refattn.tensor.stream import backward

MASKS = {
    "all": {},
    "causal": {"causal": "bottom_right"},
    "top left": {"causal": "top_left"},
    "windows": {"causal": "bottom_right", "window": (4, 2)},
    "a window": {"causal": "top_left", "window": (None, 3)},
}


def arrays(b=1, h=1, h_kv=None, n_q=5, n1=6, n2=7, d=6, d_v=3, dtype="float64", seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    h_kv = h_kv or h
    shapes = [(b, h, n_q, d), (b, h_kv, n1, d), (b, h_kv, n2, d), (b, h_kv, n1, d_v), (b, h_kv, n2, d_v)]
    return [(size * rng.standard_normal(s)).astype(np.float32).astype(dtype) for s in shapes]


def logits(form, q, k1, k2):
    """Return s of one head, (n_q, n1, n2), from the formula in words."""
    if form == "trilinear":
        return np.einsum("il,jl,kl->ijk", q, k1, k2)
    if form == "determinant":
        i, j, k = (x.reshape(len(x), -1, 3) for x in (q, k1, k2))
        return np.array(
            [
                [[sum(np.linalg.det(np.stack([x[c], y[c], z[c]])) for c in range(len(x))) for z in k] for y in j]
                for x in i
            ]
        )
    a, b, c = (q @ k1.T)[:, :, None], (k1 @ k2.T)[None], (q @ k2.T)[:, None]
    return {"strassen": a + b + c, "tree": a + b + 0 * c, "rank_one": a + c + 0 * b}[form]


def seen(form, n_q, n1, n2, causal=None, window=(None, None)):
    """Return which pairs each row sees, from the rule in words."""
    out = np.zeros((n_q, n1, n2), bool)

    def sees(i, n, j, m, w):
        place = i + (m - n if causal == "bottom_right" else 0)
        return causal is None or (j <= place and (w is None or j > place - w))

    for i, j, k in itertools.product(range(n_q), range(n1), range(n2)):
        second = sees(j, n1, k, n2, window[1]) if form == "tree" else sees(i, n_q, k, n2, window[1])
        out[i, j, k] = sees(i, n_q, j, n1, window[0]) and second
    return out


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", tensor.FORMS)
def test_the_definition_is_the_formula(form, mask):
    q, k1, k2, v1, v2 = given = arrays(dtype="float32")
    options = {"form": form, **MASKS[mask]}
    answer = tensor.exact(*given, **options, rounding="float64")
    s = logits(form, *(x[0, 0].astype(float) for x in (q, k1, k2))) / 6
    p = np.where(seen(form, 5, 6, 7, **MASKS[mask]), np.exp(s), 0)
    total = p.sum((1, 2))
    expected = np.einsum("ijk,jc,kc->ic", p, v1[0, 0], v2[0, 0]) / np.where(total > 0, total, 1)[:, None]
    np.testing.assert_allclose(answer.out[0, 0], expected, rtol=1e-12, atol=1e-14)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(answer.lse[0, 0], np.log(total), rtol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", tensor.FORMS)
def test_streaming_is_the_definition(form, mask):
    given = arrays(2, 4, 2, 21, 70, 19, d=9, d_v=5, dtype="float32")
    options = {"form": form, **MASKS[mask]}
    exact = tensor.exact(*given, **options, rounding="float64")
    for dtype, most in (("float32", 1e-5), ("float64", 1e-13)):
        out, lse = tensor.attention(*(x.astype(dtype) for x in given), **options, return_lse=True)
        assert out.dtype == lse.dtype == dtype
        assert np.abs(out - exact.out).max() <= most
        empty = np.isneginf(exact.lse)
        assert np.array_equal(np.isneginf(lse), empty)
        assert (out[empty] == 0).all()
        assert np.abs(np.where(empty, 0, lse - np.where(empty, 0, exact.lse))).max() <= 10 * most


@given(data=st.data())
def test_streaming_at_any_size_is_the_definition(data):
    size = st.integers(1, 40)
    n_q, n1, n2 = (data.draw(size) for _ in range(3))
    form = data.draw(st.sampled_from(sorted(tensor.FORMS)))
    causal = data.draw(st.sampled_from([None, "bottom_right", "top_left"]))
    window = None if causal is None else data.draw(st.tuples(*[st.one_of(st.none(), st.integers(1, 45))] * 2))
    given_ = arrays(1, 2, 1, n_q, n1, n2, 3 * data.draw(st.integers(1, 3)), 2, "float32", data.draw(st.integers(0, 9)))
    options = {"form": form, "causal": causal, "window": window}
    exact = tensor.exact(*given_, **options, rounding="float64")
    out, lse = tensor.attention(*(x.astype("float64") for x in given_), **options, return_lse=True)
    np.testing.assert_allclose(out, exact.out, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-11, atol=1e-12)


def test_correct_rounding_of_a_narrow_format():
    given_ = arrays(n_q=8, n1=24, n2=24, d=6, dtype="float32")
    single = tensor.exact(*given_)
    double = tensor.exact(*given_, rounding="float64")
    assert single.out.dtype == np.float32
    np.testing.assert_array_equal(single.out, double.out.astype(np.float32))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", tensor.FORMS)
def test_gradients_are_pytorchs(form, mask):
    torch = pytest.importorskip("torch")
    given_ = arrays(2, 2, 1, 9, 11, 10, 6, 4)
    rng = np.random.default_rng(1)
    g = rng.standard_normal((2, 2, 9, 4))
    leaves = [torch.tensor(x, requires_grad=True) for x in given_]
    q, k1, k2, v1, v2 = (x.expand(2, 2, -1, -1) for x in leaves)
    if form == "trilinear":
        s = torch.einsum("bhil,bhjl,bhkl->bhijk", q, k1, k2)
    elif form == "determinant":
        i, j, k = (x.unflatten(-1, (-1, 3)) for x in (q, k1, k2))
        cross = torch.linalg.cross(i[:, :, :, None], j[:, :, None].expand(-1, -1, 9, -1, -1, -1))
        s = torch.einsum("bhijcx,bhkcx->bhijk", cross, k)
    else:
        a = torch.einsum("bhil,bhjl->bhij", q, k1)[..., None]
        b = torch.einsum("bhjl,bhkl->bhjk", k1, k2)[:, :, None]
        c = torch.einsum("bhil,bhkl->bhik", q, k2)[:, :, :, None]
        s = {"strassen": a + b + c, "tree": a + b, "rank_one": a + c}[form].expand(-1, -1, 9, 11, 10)
    hidden = ~torch.tensor(seen(form, 9, 11, 10, **MASKS[mask]))
    p = torch.softmax((s / 6).masked_fill(hidden, -1e30).flatten(3), -1).unflatten(-1, (11, 10))
    p = p.masked_fill(hidden, 0)
    torch.einsum("bhijk,bhjc,bhkc->bhic", p, v1, v2).backward(torch.tensor(g))
    found = backward(*given_, g, form=form, **MASKS[mask])
    for name, x, leaf in zip(("q", "k1", "k2", "v1", "v2"), found, leaves, strict=True):
        np.testing.assert_allclose(x, leaf.grad.numpy(), rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"form": "cubic"}, InvalidProblem, "form: got 'cubic', expected one of trilinear, determinant"),
        ({"causal": True}, InvalidProblem, "causal: got True, expected None, 'bottom_right' or 'top_left'"),
        ({"window": (3, 3)}, InvalidProblem, "window: counts keys back from a row's own place, so it needs causal"),
        ({"causal": "top_left", "window": (0, 3)}, InvalidProblem, r"window: got \(0, 3\), expected two integers"),
        ({"scale": math.inf}, InvalidProblem, "scale: got inf, expected a finite number"),
    ],
)
def test_bad_options_are_refused(change, error, text):
    with pytest.raises(error, match=text):
        tensor.attention(*arrays(), **change)


def test_bad_arrays_are_refused():
    q, k1, k2, v1, v2 = arrays()
    for given_, text in (
        ((q, k1, k2[..., :5], v1, v2), r"k2: got shape \(1, 1, 7, 5\), expected \(1, 1, 7, 6\)"),
        ((q, k1, k2, v2, v1), r"v1: got shape \(1, 1, 7, 3\), expected \(1, 1, 6, 3\)"),
        ((q, k1.astype("float32"), k2, v1, v2), "k1: is float32 of numpy and query float64 of numpy"),
        ((q[0], k1, k2, v1, v2), r"query: got shape \(1, 5, 6\), expected four axes"),
        ((*arrays(h=3),)[:1] + tuple(arrays(h=2)[1:]), "k1: has 2 heads, expected a divisor of query's 3"),
    ):
        with pytest.raises(InvalidProblem, match=text):
            tensor.attention(*given_)
    with pytest.raises(InvalidProblem, match="d: got 4, expected a multiple of 3"):
        tensor.attention(*arrays(d=4), form="determinant")
    with pytest.raises(UnsupportedProblem, match="takes float32 and float64, got float16"):
        tensor.attention(*(x.astype("float16") for x in arrays()))
    with pytest.raises(UnsupportedProblem, match="products of float64 are not exact in float64"):
        tensor.exact(*arrays())


KINDS = (None, "taylor", "chebyshev")


@given(data=st.data())
def test_no_certificate_is_violated(data):
    """Signs at the bound, clusters, normal numbers, wide values: the error never exceeds the row's bound."""
    seed, d, n = data.draw(st.integers(0, 2**31)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    order, dtype = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from(["float32", "float64"]))
    size = data.draw(st.floats(0.05, 1.8))
    rng = np.random.default_rng(seed)
    family = data.draw(st.sampled_from(["signs", "clusters", "normal"]))

    def made(*shape):
        if family == "signs":
            return rng.choice([-size, size], shape)
        if family == "clusters":
            return size * (rng.choice([-1, 1], (1, 1, 1, shape[3])) + 0.05 * rng.standard_normal(shape))
        return size * rng.standard_normal(shape)

    n = min(n, 12) if order == 3 else n
    q = made(1, 1, 6, d).astype(dtype)
    keys = [made(1, 1, n, d).astype(dtype) for _ in range(order)]
    values = [rng.standard_normal((1, 1, n, 3)).astype(dtype) for _ in range(order)]
    degree = data.draw(st.integers(1, 8))
    found = tensor.polynomial(q, keys, values, degree=degree, kind=data.draw(st.sampled_from(KINDS)))
    wide = [x[0, 0].astype(np.longdouble) for x in (q, *keys, *values)]
    names = "jkm"[:order]
    s = np.einsum("il," + ",".join(f"{t}l" for t in names) + f"->i{names}", *wide[: order + 1]) / d
    p = np.exp(s)
    exact = np.einsum(f"i{names}," + ",".join(f"{t}c" for t in names) + "->ic", p, *wide[order + 1 :])
    exact = exact / p.reshape(6, -1).sum(1)[:, None]
    assert (np.abs(found.out[0, 0] - exact).max(1) <= found.bound[0, 0]).all()


def test_bounds_are_not_idle():
    given_ = arrays(1, 2, 2, 64, 64, 64, d=4, d_v=4, size=0.3)
    q, k1, k2, v1, v2 = given_
    found = tensor.polynomial(q, (k1, k2), (v1, v2), tolerance=1e-6)
    exact = tensor.attention(*given_)
    assert 1e-9 < found.bound.max() <= 1e-6
    assert np.abs(found.out - exact).max() <= found.bound.max()
    one_less = tensor.polynomial(q, (k1, k2), (v1, v2), degree=found.degree - 1)
    assert one_less.bound.max() > 1e-6


def test_order_three_and_causal_are_the_sums():
    q, k1, k2, v1, v2 = arrays(1, 1, 1, 12, 12, 12, d=3, d_v=2, size=0.4)
    causal = tensor.polynomial(q, (k1, k2), (v1, v2), causal=True, tolerance=1e-9)
    exact = tensor.attention(q, k1, k2, v1, v2, causal="bottom_right")
    assert np.abs(causal.out - exact).max() <= causal.bound.max() <= 1e-9


@pytest.mark.parametrize(("n", "causal"), [(96, False), (300, True)], ids=["all keys", "causal"])
@pytest.mark.parametrize("hot", [0.0, 0.05, 0.2, 1.0])
def test_auto_is_within_its_tolerance_and_says_who_took_which(hot, n, causal):
    rng = np.random.default_rng(0)
    d = 4
    size = np.where(rng.random(n) < hot, 8.0, 0.6)
    q = rng.uniform(-1, 1, (1, 1, n, d)) * size[:, None]
    k1, k2 = (rng.uniform(-1, 1, (1, 1, n, d)) for _ in range(2))
    v1, v2 = (rng.uniform(-1, 1, (1, 1, n, 8)) for _ in range(2))
    found = tensor.auto(q, k1, k2, v1, v2, causal=causal, tolerance=1e-6)
    exact = tensor.attention(q, k1, k2, v1, v2, causal="bottom_right" if causal else None)
    assert found.bound.max() <= 1e-6
    assert (np.abs(found.out - exact).max(-1) <= found.bound + 1e-14).all()
    assert found.share <= 1 - (size > 1).mean() + 1e-12
    if hot < 1:
        assert found.share > 0.5
        assert found.degree > 0
    elif causal:
        assert found.share < 0.1  # of the first rows, whose keys may be small
    else:
        assert found.share == 0
        np.testing.assert_array_equal(found.out, exact)


def test_what_the_polynomial_cannot_do_is_named():
    q, k1, k2, v1, v2 = arrays(d=4, size=3.0)
    with pytest.raises(
        UnsupportedProblem, match=r"logits of up to .* are too large|features of d = 4, more than 65536"
    ):
        tensor.polynomial(q, (k1, k2), (v1, v2), tolerance=1e-9)
    half = [x.astype("float16") for x in (q, k1, k2, v1, v2)]
    with pytest.raises(UnsupportedProblem, match="got float16, whose features would overflow"):
        tensor.polynomial(half[0], half[1:3], half[3:])
    with pytest.raises(InvalidProblem, match="got 1 kinds and 2 of values"):
        tensor.polynomial(q, (k1,), (v1, v2))
    with pytest.raises(InvalidProblem, match="the numbers are not finite"):
        tensor.polynomial(q * np.inf, (k1, k2), (v1, v2))
    with pytest.raises(InvalidInput, match="degree: got 99, expected from 1 to 24"):
        tensor.polynomial(q, (k1, k2), (v1, v2), degree=99)
    with pytest.raises(InvalidInput, match="kind: got 'remez'"):
        tensor.polynomial(q, (k1, k2), (v1, v2), kind="remez")


def test_the_crossover_says_why():
    near = tensor.crossover(4096, 4, 0.25, 1e-8)
    assert (near.method, near.features) == ("polynomial", math.comb(4 + near.degree, 4))
    assert near.exact_seconds > 100 * near.polynomial_seconds
    assert "features" in near.why
    assert tensor.crossover(8, 16, 0.25, 1e-8).method == "exact"
    far = tensor.crossover(4096, 4, 50.0, 1e-8)
    assert (far.method, far.degree) == ("exact", None)
    assert "no degree up to 24 is within 1e-08 for logits of 50" in far.why
    with pytest.raises(InvalidInput, match="crossover: got n 0"):
        tensor.crossover(0, 4, 1.0, 1e-8)


def test_costs_decide_and_are_told():
    cheap, dear = replace(COSTS, triple=(1e-9, 0.0)), replace(COSTS, triple=(1e9, 0.0))
    assert tensor.crossover(4096, 4, 0.25, 1e-8, costs=cheap).method == "exact"
    assert tensor.crossover(8, 16, 0.25, 1e-8, costs=dear).method == "polynomial"
    q, k1, k2, v1, v2 = arrays(d=4, size=0.6)
    assert tensor.auto(q, k1, k2, v1, v2, costs=cheap).share == 0
    found = tensor.auto(q, k1, k2, v1, v2, costs=dear)
    assert found.share == 1
    n, heads = q.shape[2], q.shape[0] * q.shape[1]
    features = math.comb(4 + found.degree, 4)
    each = COSTS.features(n, k1.shape[2] + k2.shape[2], v1.shape[3])
    assert found.predicted_seconds == pytest.approx(heads * features * each / 1e9)
    # causal sums cost by row, not by key
    assert COSTS.features(8, 16, 3, causal=True) == 8 * 4 * COSTS.causal


def test_measured_costs_are_costs():
    found = measure(0.1)
    assert found.exact(10.0, 4, 4) > 0
    assert found.features(8, 16, 4) > 0
    assert found.causal > 0
    with pytest.raises(InvalidInput, match="costs: got 0 seconds, expected more than 0"):
        measure(0)


@pytest.mark.parametrize("form", tensor.FORMS)
def test_gradients_are_correctly_rounded(form):
    given_ = arrays(1, 2, 1, 4, 5, 4, 3, 2, "float32")
    dout = np.random.default_rng(1).standard_normal((1, 2, 4, 2)).astype(np.float32)
    exact = tensor.exact_gradients(*given_, dout, form=form, causal="top_left", rounding="float64")
    wide = [x.astype(np.float64) for x in (*given_, dout)]
    for name, x in zip(exact, backward(*wide, form=form, causal="top_left"), strict=True):
        np.testing.assert_allclose(x, exact[name], rtol=1e-12, atol=1e-15, err_msg=name)
    single = tensor.exact_gradients(*given_, dout, form=form, causal="top_left")
    for name, x in single.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, exact[name].astype(np.float32))
