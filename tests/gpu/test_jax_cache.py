"""Attention over a cache with JAX: shapes and refusals without a GPU; the bits of CuPy's call on one."""

import numpy as np
import pytest

from refattn import InvalidProblem, UnsupportedProblem
from refattn.check.kernels import KERNELS
from refattn.gpu import attention_with_cache

jax = pytest.importorskip("jax")
jnp = jax.numpy
gpu = pytest.mark.skipif(
    not KERNELS["refattn-gpu"].here or jax.default_backend() != "gpu", reason="needs an NVIDIA GPU, CuPy and JAX on it"
)
Q, K, V = (3, 8, 2, 64), (3, 2, 100, 64), (3, 2, 100, 32)


@pytest.fixture
def traced(monkeypatch):
    """Shapes are found as on a Hopper GPU; nothing is launched."""
    from refattn.gpu import jax_cache

    monkeypatch.setattr(jax_cache.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax_cache, "capability", lambda device: (9, 0))


def shapes(*sizes, dtype="bfloat16"):
    return tuple(jax.ShapeDtypeStruct(s, dtype) for s in sizes)


def whole(*size):
    return jax.ShapeDtypeStruct(size, "int32")


def test_shapes_of_results(traced):
    def call(q, k, v, n):
        return attention_with_cache(q, k, v, lengths=n, sink=jnp.zeros(8), return_lse=True)

    out, lse = jax.eval_shape(call, *shapes(Q, K, V), whole(3))
    assert (out.shape, out.dtype) == ((3, 8, 2, 32), "bfloat16")
    assert (lse.shape, lse.dtype) == ((3, 8, 2), "float32")


def test_float8_reaches_the_kernels_as_bytes(traced):
    def call(q, k, v, n, t):
        return attention_with_cache(q, k, v, lengths=n, page_table=t, key_scale=0.5, window=[3, 0])

    pages = shapes((9, 2, 16, 64), (9, 2, 16, 64), dtype="float8_e4m3fn")
    given = *shapes(Q), *pages, jax.ShapeDtypeStruct((3,), "int32"), whole(3, 4)
    text = str(jax.make_jaxpr(call)(*given))
    assert text.count("new_dtype=uint8") == 2
    assert text.count("buffer_callback[") == 1
    assert jax.eval_shape(call, *given).shape == Q


def test_what_does_not_fit_is_refused_while_jax_traces(traced):
    def call(*x, **options):
        return jax.eval_shape(lambda q, k, v, n: attention_with_cache(q, k, v, lengths=n, **options), *x)

    with pytest.raises(InvalidProblem, match=r"lengths: got shape \(2,\), expected \(3,\)"):
        call(*shapes(Q, K, V), whole(2))
    with pytest.raises(InvalidProblem, match="lengths: got dtype float32, expected int32 or int64"):
        call(*shapes(Q, K, V), jax.ShapeDtypeStruct((3,), "float32"))
    with pytest.raises(InvalidProblem, match="causal: got 'x', expected None, 'bottom_right' or 'top_left'"):
        call(*shapes(Q, K, V), whole(3), causal="x")
    with pytest.raises(InvalidProblem, match="window: "):
        call(*shapes(Q, K, V), whole(3), window={})
    with pytest.raises(UnsupportedProblem, match="attention_with_cache: takes 1 to 16 queries, got 17"):
        call(*shapes((3, 8, 17, 64), K, V), whole(3))


def test_jax_without_a_gpu_is_refused():
    if jax.default_backend() == "gpu":
        pytest.skip("JAX has a GPU here")
    with pytest.raises(UnsupportedProblem, match="query: is of JAX with its backend 'cpu', expected 'gpu'"):
        jax.eval_shape(lambda q, k, v, n: attention_with_cache(q, k, v, lengths=n), *shapes(Q, K, V), whole(3))


@gpu
@pytest.mark.parametrize("paged", [False, True])
def test_it_has_the_bits_of_cupys_call(paged):
    import cupy

    keys = jax.random.split(jax.random.key(0), 3)
    shape = (40, 2, 16, 64) if paged else (3, 2, 160, 64)
    q, k, v = (jax.random.normal(x, s, "bfloat16") for x, s in zip(keys, (Q, shape, shape), strict=True))
    given = {"lengths": jnp.array([160, 0, 77], "int32"), "sink": jnp.linspace(-1, 1, 8)}
    if paged:
        given["page_table"] = jax.random.permutation(keys[0], 39)[:30].reshape(3, 10).astype("int32")

    def call(q, k, v, given):
        return attention_with_cache(q, k, v, causal="bottom_right", return_lse=True, **given)

    other = call(*map(cupy.from_dlpack, (q, k, v)), {n: cupy.from_dlpack(x) for n, x in given.items()})
    expected = [np.asarray(jax.dlpack.from_dlpack(x)) for x in other]
    for found in (call(q, k, v, given), jax.jit(call)(q, k, v, given)):
        for a, b in zip(found, expected, strict=True):
            assert np.array_equal(np.asarray(a), b)


@gpu
def test_a_single_float8_key_gives_its_value():
    q = jax.random.normal(jax.random.key(0), Q, "bfloat16")
    k, v = (jax.random.normal(jax.random.key(i), (3, 2, 100, 64)).astype("float8_e4m3fn") for i in (1, 2))
    found = attention_with_cache(q, k, v, lengths=jnp.array([1, 1, 1]), key_scale=0.5)
    expected = v[:, :, :1].astype("bfloat16").repeat(4, 1).repeat(2, 2)
    assert np.array_equal(np.asarray(found), np.asarray(expected))
