"""What JAX traces: shapes and refusals without a GPU; jit, grad and control flow on one."""

import re

import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, UnsupportedProblem
from refattn.check.kernels import KERNELS
from refattn.gpu import attention

jax = pytest.importorskip("jax")
jnp = jax.numpy
gpu = pytest.mark.skipif(
    not KERNELS["refattn-gpu"].here or jax.default_backend() != "gpu", reason="needs an NVIDIA GPU, CuPy and JAX on it"
)


@pytest.fixture
def traced(monkeypatch):
    """Shapes are found as on a Hopper GPU; nothing is launched."""
    from refattn.gpu import jax_operators

    monkeypatch.setattr(jax_operators.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax_operators, "capability", lambda device: (9, 0))


def arrays(*shapes, dtype="bfloat16"):
    return tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes)


SHAPES = (2, 4, 7, 64), (2, 2, 9, 64), (2, 2, 9, 32)


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", "float32"), ("float64", "float64")])
def test_shapes_of_results(traced, dtype, wide):
    with jax.enable_x64(dtype == "float64"):
        out, lse = jax.eval_shape(lambda *x: attention(*x, return_lse=True), *arrays(*SHAPES, dtype=dtype))
    assert (out.shape, out.dtype) == ((2, 4, 7, 32), dtype)
    assert (lse.shape, lse.dtype) == ((2, 4, 7), wide)


def test_only_gradients_that_are_wanted_are_computed(traced):
    def loss(q, k, v, sink):
        return attention(q, k, v, causal="bottom_right", sink=sink).astype("float32").sum()

    given = *arrays(*SHAPES), jax.ShapeDtypeStruct((4,), "float32")
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(1, 3)))(*given))
    assert re.search(r"_backward.*\('dk', 'dsink'\)", text)
    assert text.count("buffer_callback[") == 2
    dk, dsink = jax.eval_shape(jax.grad(loss, argnums=(1, 3)), *given)
    assert (dk.shape, dk.dtype, dsink.shape, dsink.dtype) == (SHAPES[1], "bfloat16", (4,), "float32")


def test_masks_and_offsets_have_no_gradient(traced):
    def loss(q, k, v, allowed, cu):
        return attention(q, k, v, allowed=allowed, cu_seqlens=(cu, cu)).astype("float32").sum()

    more = jax.ShapeDtypeStruct((1, 1, 7, 9), "bool"), jax.ShapeDtypeStruct((3,), "int32")
    given = (*arrays((1, *SHAPES[0][1:]), *((1, *s[1:]) for s in SHAPES[1:])), *more)
    dq, dv = jax.eval_shape(jax.grad(loss, argnums=(0, 2)), *given)
    assert (dq.shape, dv.shape) == ((1, 4, 7, 64), (1, 2, 9, 32))


def test_what_does_not_fit_is_refused_while_jax_traces(traced):
    q, k, v = arrays(*SHAPES)
    with pytest.raises(InvalidProblem, match="causal: got 'x', expected None, 'bottom_right' or 'top_left'"):
        jax.eval_shape(lambda *x: attention(*x, causal="x"), q, k, v)
    with pytest.raises(InvalidProblem, match="key: axis dim is 32, expected query's 64"):
        jax.eval_shape(attention, q, v, v)
    with pytest.raises(InvalidInput, match="impl: got 'fastest', expected one of decode, sm90, latent, mma, simt"):
        jax.eval_shape(lambda *x: attention(*x, impl="fastest"), q, k, v)
    with pytest.raises(InvalidProblem, match="cu_seqlens: got int, expected a tuple"):
        jax.eval_shape(lambda *x: attention(*x, cu_seqlens=5), q, k, v)
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.eval_shape(jax.vmap(attention), *arrays(*((3, *s) for s in SHAPES)))


def test_a_second_derivative_is_refused(traced):
    def loss(q, k, v):
        return attention(q, k, v).astype("float32").sum()

    with pytest.raises(ValueError, match="do not support JVP"):
        jax.make_jaxpr(jax.grad(lambda *x: jax.grad(loss)(*x).astype("float32").sum()))(*arrays(*SHAPES))


def test_jax_without_a_gpu_is_refused():
    if jax.default_backend() == "gpu":
        pytest.skip("JAX has a GPU here")
    with pytest.raises(UnsupportedProblem, match="query: is traced by JAX for its backend 'cpu', expected 'gpu'"):
        jax.eval_shape(attention, *arrays(*SHAPES))


def drawn(dtype="bfloat16", shapes=((2, 4, 100, 64), (2, 2, 150, 64), (2, 2, 150, 32))):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(x, s, dtype) for x, s in zip(keys, shapes, strict=True))


def same(found, expected):
    """Bit for bit."""
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


OPTIONS = [
    {},
    {"causal": "bottom_right", "window": (40, None)},
    {"softcap": 20.0, "scale": 0.3},
    {"accuracy": "high"},
    {"impl": "simt"},
]


@gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_jit_has_the_bits_of_a_plain_call(options):
    q, k, v = drawn()
    same(
        jax.jit(lambda *x: attention(*x, **options, return_lse=True))(q, k, v),
        attention(q, k, v, **options, return_lse=True),
    )


@gpu
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_gradients_have_the_bits_of_attention_backward(options):
    from refattn.gpu import attention_backward

    q, k, v = drawn()
    sink, bias = jnp.linspace(-1, 1, 4), drawn(shapes=((2, 4, 100, 150),))[0]
    out, lse = attention(q, k, v, sink=sink, bias=bias, **options, return_lse=True)
    dout, dlse = drawn(shapes=(out.shape,))[0], jnp.cos(jnp.arange(lse.size, dtype="float32")).reshape(lse.shape)

    def both(q, k, v, sink, bias):
        return attention(q, k, v, sink=sink, bias=bias, **options, return_lse=True)

    def loss(*x):
        a, b = both(*x)
        return (a * dout).astype("float32").sum() + (b * dlse).sum()

    _, pull = jax.vjp(both, q, k, v, sink, bias)
    found = attention_backward(q, k, v, out, lse, dout, sink=sink, bias=bias, dlse=dlse, **options)
    expected = [found[n] for n in ("dq", "dk", "dv", "dsink", "dbias")]
    same(pull((dout, dlse)), expected)
    same(jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))(q, k, v, sink, bias), expected)


@gpu
def test_masks_and_packed_sequences_under_jit():
    q, k, v = drawn(shapes=((1, 4, 150, 64), (1, 2, 150, 64), (1, 2, 150, 64)))
    allowed = jax.random.bernoulli(jax.random.key(1), 0.5, (1, 1, 150, 150))
    same([jax.jit(lambda q, a: attention(q, k, v, allowed=a))(q, allowed)], [attention(q, k, v, allowed=allowed)])
    cu = jnp.array([0, 20, 20, 150], "int32")
    same(
        [jax.jit(lambda q, c: attention(q, k, v, cu_seqlens=(c, c)))(q, cu)], [attention(q, k, v, cu_seqlens=(cu, cu))]
    )
    blocks = jax.random.bernoulli(jax.random.key(2), 0.5, (1, 1, 10, 10))
    grad = jax.grad(lambda q, m: attention(q, k, v, block_mask=(m, 16, 16)).astype("float32").sum())
    same([jax.jit(grad)(q, blocks)], [grad(q, blocks)])


@gpu
def test_a_loop_of_steps_follows_the_same_steps_one_by_one():
    """What XLA queues before and after is waited for: a scan of calls, each on the last one's result."""
    q, k, v = drawn(shapes=((2, 4, 128, 64), (2, 4, 128, 64), (2, 4, 128, 64)))

    def step(x, _):
        return (attention(x, k, v, causal="bottom_right") + x).astype(x.dtype), None

    looped, _ = jax.jit(lambda x: jax.lax.scan(step, x, length=20))(q)
    one = q
    for _ in range(20):
        one = jax.jit(lambda x: step(x, None)[0])(one)
    same([looped], [one])
