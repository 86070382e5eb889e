"""The two ways to write latent attention agree, at DeepSeek-V3's widths."""

import math

import numpy as np
import pytest

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
        ({3: np.zeros((1, 9, 3), np.float32)}, r"key_rope: shape is \(1, 9, 3\), expected \(1, 9, 64\)"),
        ({4: np.zeros((2, 128, 5), np.float32)}, r"w_uk: shape is \(2, 128, 5\), expected \(2, 128, 512\)"),
        ({5: np.zeros((1, 128, 512), np.float32)}, r"w_uv: shape is \(1, 128, 512\), expected \(2, 128, 512\)"),
        (
            {2: np.zeros((9, 512), np.float32)},
            r"query, latent: shapes are .* and \(9, 512\), expected \(b, h, n_q, d\)",
        ),
        ({1: np.zeros(3, np.float64)}, "query_rope: got dtype float64, expected query's float32, a float format"),
        ({0: [1.0]}, "query: got list, expected a NumPy array"),
    ],
)
def test_errors(change, text):
    given = drawn()
    for i, x in change.items():
        given[i] = x
    with pytest.raises(InvalidInput, match=text):
        expanded(*given)


def test_errors_of_the_projection():
    with pytest.raises(
        InvalidInput, match=r"w_uv: shape is \(2, 3, 5\), expected \(h, d_v, c\) for out's \(1, 2, 4, 6\)"
    ):
        projected(np.zeros((1, 2, 4, 6)), np.zeros((2, 3, 5)))
