"""The two ways to write latent attention agree, at DeepSeek-V3's widths."""

import math

import numpy as np
import pytest
import torch

from refattn import InvalidInput, evaluate
from refattn.functions.latent import absorbed, expanded, projected


def drawn(dtype=np.float32, h=2, n_q=2, n_k=9, d=128, r=64, c=512, d_v=128, b=1):
    """Small integers: every product of matrices is exact in float32."""
    rng = np.random.default_rng(0)
    shapes = ((b, h, n_q, d), (b, h, n_q, r), (b, n_k, c), (b, n_k, r), (h, d, c), (h, d_v, c))
    return [rng.integers(-1, 2, s).astype(dtype) for s in shapes]


def test_both_calls_have_the_same_answer():
    q, q_rope, latent, k_rope, w_uk, w_uv = drawn()
    more = {"scale": 2.0**-7, "causal": "bottom_right"}
    one = absorbed(q, q_rope, latent, k_rope, w_uk, **more)
    two = expanded(q, q_rope, latent, k_rope, w_uk, w_uv, **more)
    assert (one.heads_kv, one.d_k, one.d_v) == (1, 576, 512)
    assert (two.heads_kv, two.d_k, two.d_v) == (2, 192, 128)
    scores = [(p.query.astype(int) @ p.key.astype(int).swapaxes(2, 3)) for p in (one, two)]
    assert (scores[0] == scores[1]).all()
    a, b = (evaluate(p, rounding="float64") for p in (one, two))
    assert (a.lse == b.lse).all()
    size = projected(np.abs(a.out), np.abs(w_uv))
    # the latents' roundings, those of a sum of 512 products, and the rounding of what it is compared with
    assert (np.abs(projected(a.out, w_uv) - b.out) <= (512 + 2) * 2.0**-53 * size).all()
    assert (projected(a.out, w_uv) != 0).any()


def test_products_are_rounded_once_and_the_scale_is_that_of_the_heads():
    q, q_rope, latent, k_rope, w_uk, w_uv = (x / 3 for x in drawn(n_q=1, n_k=2, d=4, r=2, c=6, d_v=3))
    p = absorbed(q, q_rope, latent, k_rope, w_uk)
    assert p.scale == 1 / math.sqrt(6)
    for h in range(2):
        for c in range(6):
            exact = sum(float(q[0, h, 0, d]) * float(w_uk[h, d, c]) for d in range(4))
            assert p.query[0, h, 0, c] == np.float32(exact)
    e = expanded(q, q_rope, latent, k_rope, w_uk, w_uv)
    assert e.scale == p.scale
    for h, j, c in np.ndindex(2, 2, 3):
        assert e.value[0, h, j, c] == np.float32(
            sum(float(x) * float(w) for x, w in zip(latent[0, j], w_uv[h, c], strict=True))
        )
    assert (e.key[0, 1, :, 4:] == k_rope[0]).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {3: np.zeros((1, 9, 3), np.float32)},
            "query_rope, key_rope: r is 64 in query_rope and 3 in key_rope, exp",
        ),
        ({4: np.zeros((2, 128, 5), np.float32)}, "w_uk: c is 5, expected 512 as in latent, w_uv"),
        ({5: np.zeros((1, 128, 512), np.float32)}, "w_uv: h is 1, expected 2 as in query, query_rope, w_uk"),
        (
            {2: np.zeros((9, 512), np.float32)},
            r"latent: shape is \(9, 512\), expected \(b, n_k, c\)",
        ),
        ({1: np.zeros((1, 2, 2, 64))}, "query_rope: got dtype float64, expected query's float32; cast it"),
        ({0: np.zeros((1, 2, 2, 7), np.float32)}, "query, w_uk: d is 7 in query and 128 in w_uk, expected one length"),
        ({1: np.zeros((1, 2, 2, 3), np.float32)}, "query_rope, key_rope: r is 3 in query_rope and 64 in key_rope"),
        ({2: np.zeros((1, 9, 3), np.float32)}, "latent: c is 3, expected 512 as in w_uk, w_uv"),
        ({3: np.zeros((4, 9, 64), np.float32)}, "key_rope: b is 4, expected 1 as in query, query_rope, latent"),
        ({4: np.zeros((2, 128, 512), int)}, "w_uk: got dtype int64, expected one of float64"),
        ({5: np.zeros((2, 0, 512), np.float32)}, r"w_uv: shape is \(2, 0, 512\), expected d_v of at least 1"),
        ({0: [1.0]}, "query: got list, expected a NumPy array"),
    ],
)
def test_errors(change, text):
    given = drawn()
    for i, x in change.items():
        given[i] = x
    with pytest.raises(InvalidInput, match=text):
        expanded(*given)


def test_errors_of_options():
    given = drawn()[:5]
    for more, text in (
        ({"foo": 1}, "foo: is no option of Problem; leave it out"),
        ({"key": given[3]}, "key: is made here; leave it out"),
    ):
        with pytest.raises(InvalidInput, match=f"^{text}$"):
            absorbed(*given, **more)
    none = [np.zeros(s, np.float32) for s in ((1, 2, 3, 0), (1, 2, 3, 0), (1, 9, 4), (1, 9, 0), (2, 0, 4))]
    with pytest.raises(InvalidInput, match="query, query_rope: have no columns, d = r = 0; expected at least one"):
        absorbed(*none)


@pytest.mark.parametrize(
    ("out", "w_uv", "text"),
    [
        (np.zeros((1, 2, 4, 6)), np.zeros((2, 3, 5)), "out, w_uv: c is 6 in out and 5 in w_uv, expected one length"),
        (np.zeros((1, 2, 4, 6)), np.zeros((3, 3, 6)), "out, w_uv: h is 2 in out and 3 in w_uv, expected one length"),
        ([1.0], np.zeros((2, 3, 6)), "out: got list, expected a NumPy array"),
        (None, None, "out: got NoneType, expected a NumPy array"),
        (torch.zeros(1, 2, 4, 6), np.zeros((2, 3, 6)), "out: got Tensor, expected a NumPy array"),
        (np.zeros((1, 2, 4, 6)), np.zeros((2, 3, 6), int), "w_uv: got dtype int64, expected one of float64"),
        (np.zeros((2, 4, 6)), np.zeros((2, 3, 6)), r"out: shape is \(2, 4, 6\), expected \(b, h, n_q, c\)"),
    ],
)
def test_errors_of_the_projection(out, w_uv, text):
    with pytest.raises(InvalidInput, match=text):
        projected(out, w_uv)
