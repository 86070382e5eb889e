"""Calls that models make: each catches a kernel that is wrong for its kind alone."""

import ml_dtypes
import numpy as np
import pytest

from refattn import Capabilities, InvalidInput, check_kernel
from refattn.check.inputs.families import Case
from refattn.check.inputs.models import LONGER, LONGEST, MODELS
from refattn.check.kernels.tiled import gradients, tiled
from refattn.check.model import FEATURES, GRADIENTS

ABLE = Capabilities({"float32", "bfloat16"}, FEATURES | {"weight"}, lse=True, gradients=GRADIENTS)


def without_first_keys(p):
    """Lose the first 64 keys in rows past 511."""
    allowed = np.ones((1, 1, p.n_q, p.n_k), bool)
    allowed[..., 512:, :64] = False
    return p.replace(allowed=allowed if p.allowed is None else allowed & p.allowed)


def without_last_key(p):
    mask = np.arange(p.n_k)[None, None, None] < max(1, p.n_k - 1)
    return p.replace(allowed=np.broadcast_to(mask, (1, 1, p.n_q, p.n_k)))


def of_batch(bits):
    def change(p):
        at = np.arange(p.batch) & bits
        return p.replace(key=p.key[at], value=p.value[at])

    return change


def without_queries(first):
    """Take the rows from one on for rows of zeros."""

    def change(p):
        q = p.query.copy()
        q[:, :, first(p) :] = 0
        return p.replace(query=q)

    return change


def without_columns(name, first, here):
    def change(p):
        x = getattr(p, name).copy()
        x[..., first:] = 0
        return p.replace(**{name: x}) if here(p) else p

    return change


def of_first_batch(name, rest):
    """Use what stands for every batch in the first alone."""

    def change(p):
        x = getattr(p, name)
        if x is None or x.shape[0] > 1 or p.batch == 1:
            return p
        x = np.repeat(x, p.batch, 0)
        x[1:] = rest
        return p.replace(**{name: x})

    return change


def without_weight(here):
    return lambda p: p.replace(weight=None) if here(p) else p


def of_group(bits):
    return lambda p: p.replace(**{n: getattr(p, n)[:, np.arange(p.heads_kv) & bits] for n in ("key", "value")})


def dense(name):
    """Read an array as if it had no gaps and no strides of 0."""

    def change(p):
        x = getattr(p, name)
        if x is None or x.flags.c_contiguous:
            return p
        whole = np.lib.stride_tricks.as_strided(x, (min(x.size, extent(x)),), (x.itemsize,))
        return p.replace(**{name: np.resize(whole, x.shape)})

    return change


def from_the_line_before(p):
    """Read queries, keys and values from the multiple of 16 bytes at or before where they begin."""

    def read(x):
        away = x.__array_interface__["data"][0] % 16
        at = np.lib.array_utils.byte_bounds(x)[0] - away
        said = {"version": 3, "data": (at, True), "shape": x.shape, "strides": x.strides, "typestr": x.dtype.str}
        return np.asarray(type("There", (), {"__array_interface__": said, "kept": x})()).copy()

    return p.replace(**{n: read(getattr(p, n)) for n in ("query", "key", "value")})


def extent(x):
    return 1 + sum((n - 1) * abs(s) for n, s in zip(x.shape, x.strides, strict=True)) // x.itemsize


def narrow_sink(p):
    return p if p.sink is None or p.sink.dtype == np.float32 else p.replace(sink=p.sink * p.sink.dtype.type(0))


def with_eight_sequences(p):
    if p.cu_seqlens_k is None or len(p.cu_seqlens_k) < 10:
        return p
    k, v = p.key.copy(), p.value.copy()
    for i in range(8, len(p.cu_seqlens_k) - 1):
        (a, b), c = p.cu_seqlens_k[i : i + 2], p.cu_seqlens_k[7]
        n = min(b - a, p.cu_seqlens_k[8] - c)
        k[:, :, a : a + n], v[:, :, a : a + n] = k[:, :, c : c + n], v[:, :, c : c + n]
    return p.replace(key=k, value=v)


WRONG = {
    "long-prefill": without_first_keys,
    "longest-decode": lambda p: without_last_key(p) if p.n_k > 2**17 else p,
    "wide-decode": lambda p: without_last_key(p) if p.n_k > 8192 and p.d_k == 128 else p,
    "mistral": lambda p: p.replace(window=(p.window[0] + 1, None)) if p.window and p.window[0] >= 256 else p,
    "nine-batches": of_batch(7),
    "many-sequences": with_eight_sequences,
    "key-heads-of-8": of_group(3),
    "groups-of-12": lambda p: p.replace(scale=0.0) if p.heads // p.heads_kv == 12 else p,
    "views": dense("bias"),
    "views-spread": dense("bias"),
    "views-of-masks": dense("allowed"),
    "columns": dense("key"),
    "turned": dense("value"),
    "odd-start": from_the_line_before,
    "batches-of-32": of_batch(15),
    "heads-of-128": lambda p: p.replace(query=p.query[:, np.arange(p.heads) & 63]),
    "sequences-of-40": without_queries(
        lambda p: p.cu_seqlens_q[32] if p.cu_seqlens_q is not None and len(p.cu_seqlens_q) > 32 else p.n_q
    ),
    "rows-past-2048": without_queries(lambda p: 2048),
    "wider-values": without_columns("value", 128, lambda p: p.d_v > p.d_k),
    "width-224": without_columns("query", 192, lambda p: 192 < p.d_k < 256),
    "mask-of-keys": of_first_batch("allowed", rest=True),
    "bias-for-all": of_first_batch("bias", rest=0),
    "alibi": of_first_batch("bias", rest=0),
    "window-of-more-rows": lambda p: p.replace(window=None) if p.n_q > p.n_k and p.causal is None else p,
    "cap-of-14.3": lambda p: p.replace(softcap=p.softcap and float(ml_dtypes.bfloat16(p.softcap))),
    "weight-groups": without_weight(lambda p: p.heads != p.heads_kv),
    "weight-decode": without_weight(lambda p: p.n_q == 1),
    "weight-options": without_weight(lambda p: p.softcap is not None),
    "weight-packed": without_weight(lambda p: p.cu_seqlens_k is not None),
}
BACKWARD = {"faint-gradient"}
"""Those whose forward pass is any other's."""


def test_every_one_is_tried():
    assert set(WRONG) | BACKWARD == set(LONGER)
    assert not (set(LONGER) | set(LONGEST)) & set(MODELS)
    assert not set(LONGER) & set(LONGEST)


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_is_wrong_there_alone_is_caught(name):
    def kernel(p):
        return tiled(WRONG[name](p))

    kernel.model = tiled.model  # so both are compared with the same
    report = check_kernel(kernel, capabilities=ABLE, dtypes=["float32"], only=f"models/{name}")
    assert report.count("failed") == 1
    assert check_kernel(tiled, capabilities=ABLE, dtypes=["float32"], only=f"models/{name}").passed


def test_heads_past_16_bits_are_asked_for_in_nightly():
    def right(p):  # of all heads at once: one after another they take many seconds
        s = np.einsum("bhqd,bhkd->bhqk", p.query, p.key) / np.float32(np.sqrt(p.d_k))
        top = s.max(3, keepdims=True)
        w = np.exp(s - top)
        total = w.sum(3, keepdims=True)
        return np.einsum("bhqk,bhkd->bhqd", w, p.value) / total, (np.log(total) + top)[..., 0]

    def kernel(p):
        out, lse = right(p)
        out.reshape(-1, *out.shape[2:])[2**16 :] = 0
        return out, lse

    asked = {"capabilities": ABLE, "dtypes": ["float32"], "only": f"models/{next(iter(LONGEST))}"}
    (check,) = check_kernel(kernel, **asked, budget="nightly").checks
    assert check.verdict == "failed"
    assert check.name == "models/heads-past-16-bits[float32]"
    batch, head = check.worst.place[:2]
    assert batch * 16 + head >= 2**16
    with pytest.raises(InvalidInput, match="no check of softmax is named"):
        check_kernel(kernel, **asked)


def test_a_narrow_sink_and_wide_offsets_are_asked_for():
    def kernel(p):
        return tiled(narrow_sink(p))

    assert check_kernel(kernel, capabilities=ABLE, dtypes=["bfloat16"], only="models/views").count("failed")
    p = Case("models", "many-sequences", "softmax", LONGER["many-sequences"][0], sampled=True).problem("float32")
    assert p.cu_seqlens_q.dtype == np.int64


def test_small_gradients_are_asked_for():
    kernel = backward(lambda k, p, dout: gradients(p, np.where(np.abs(dout) < 1e-6, 0, dout)))
    (check,) = check_kernel(
        kernel, capabilities=ABLE, dtypes=["float32"], only="models/faint-gradient/gradients"
    ).checks
    assert check.verdict == "failed"


def backward(change):
    def kernel(p):
        kernel.value = p.value
        return tiled(p)

    kernel.gradients = lambda p, dout: change(kernel, p, dout)
    return kernel


@pytest.mark.parametrize(
    ("law", "change"),
    [
        ("spread_gradient", lambda k, p, dout: gradients(p, dout if min(dout.strides) else dout * dout.dtype.type(0))),
        ("calls_between", lambda k, p, dout: gradients(p.replace(value=k.value), dout)),
    ],
)
def test_laws_of_gradients_between_calls(law, change):
    report = check_kernel(backward(change), capabilities=ABLE, dtypes=["float32"], only=f"law/{law}")
    assert report.count("failed") == 1
    right = backward(lambda k, p, dout: gradients(p, dout))
    assert check_kernel(right, capabilities=ABLE, dtypes=["float32"], only=f"law/{law}").passed
