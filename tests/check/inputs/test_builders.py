"""Each problem of a family catches the bug that it is for: a right kernel with that one bug fails it."""

import ml_dtypes
import numpy as np
import pytest

from refattn import Capabilities, check_kernel, masks
from refattn.arrays import from_float64
from refattn.check.inputs.builders import BUILDERS
from refattn.check.kernels.tiled import SPLIT as TILE
from refattn.check.kernels.tiled import tiled
from refattn.check.model import FEATURES
from refattn.dtypes import FORMATS
from refattn.exact.heads import heads


def given(**changes):
    """The call with some arguments changed; a callable makes its argument from the call."""
    return lambda p: tiled(p.replace(**{n: x(p) if callable(x) else x for n, x in changes.items()}))


def repeated(name, times):
    return lambda p: np.tile(getattr(p, name), (1, times, 1, 1))


def first_only(axis):
    """A bias whose broadcast axis is read past its end: zeros there."""

    def wrong(p):
        shape = (p.batch, p.heads, p.n_q, p.n_k)
        bias = np.broadcast_to(p.bias, shape).copy()
        bias[(slice(None),) * axis + (slice(1, None),)] = 0
        return bias

    return given(bias=wrong)


def without_last_key(when):
    def wrong(p):
        mask = np.ones((1, 1, p.n_q, p.n_k), bool)
        mask[..., -1] = not when(p.n_k)
        return mask if p.allowed is None else mask & p.allowed

    return given(allowed=wrong)


def by_hand(weigh, dtype=np.float32):
    """A plain kernel: weigh(scores, mask, sink) gives its weights."""

    def kernel(p):
        out = np.zeros(p.out_shape, dtype)
        with np.errstate(all="ignore"):
            for one in heads(p):
                scale = 1 / np.sqrt(p.d_k)
                s = np.where(one.allowed, one.q @ one.k.T * scale, -np.inf).astype(dtype)
                out[one.batch, one.head, one.rows] = weigh(s, one) @ one.v.astype(dtype)
        return out.astype(p.query.dtype)

    return kernel


def normalised(s, one):
    w = np.exp(s - s.max(1, keepdims=True))
    return w / w.sum(1, keepdims=True)


def filled(s, one):
    return normalised(np.where(one.allowed, s, np.float32(-5e4)), one)


def lowest_maximum(s, one):
    w = np.exp(s - np.maximum(s.max(1, keepdims=True), np.float32(-5e4)))
    return w / w.sum(1, keepdims=True)


def keys_alone(s, one):
    m = s.max(1, keepdims=True)
    return np.exp(s - m) / (np.exp(s - m).sum(1, keepdims=True) + np.exp(np.float32(one.sink) - m))


def through_lse(s, one):
    m = s.max(1, keepdims=True)
    return np.exp(s) * np.exp(-(m + np.log(np.exp(s - m).sum(1, keepdims=True))))


def no_faint(s, one):
    w = normalised(s, one)
    return np.where(w < 2**-12 * w.max(1, keepdims=True), 0, w)


def narrow_sum(p):
    (one,) = heads(p)
    w = normalised(one.q @ one.k.T / np.sqrt(p.d_k), one)
    total = np.zeros((p.n_q, p.d_v), ml_dtypes.bfloat16)
    for j in range(p.n_k):
        total = (total.astype(np.float32) + (w[:, j : j + 1] * one.v[j])).astype(ml_dtypes.bfloat16)
    return total[None, None]


def scaled_values(p):
    """Values in fp8 with one scale for the tensor, much as a quantised cache has them."""
    v = p.value.astype(np.float64)
    unit = np.abs(v).max() / 448
    narrow = FORMATS["float8_e4m3fn"].round_array(v / unit) * unit
    return from_float64(FORMATS[p.dtype].round_array(narrow), p.dtype)


def compacted(p):
    """Query offsets whose sequences of no rows are left out, the keys' not."""
    kept = np.unique(p.cu_seqlens_q)
    return np.concatenate([kept, np.full(len(p.cu_seqlens_q) - len(kept), kept[-1])]).astype(np.int32)


def band(alignment):
    return lambda p: masks.sliding_window(p.n_q, p.n_k, *p.window, alignment)[None, None]


BUGS = {
    "gaussian/grouped-heads-6-on-3": given(key=repeated("key", 2), value=repeated("value", 2)),
    "gaussian/grouped-heads-8-on-2": given(key=repeated("key", 4), value=repeated("value", 4)),
    "gaussian/window-lengths-differ": given(window=None, allowed=band("top_left")),
    "gaussian/window-both-sides-causal": given(causal=None),
    "gaussian/window-both-sides-top-left": given(causal=None, window=lambda p: (p.window[0], 0)),
    "gaussian/bias-for-all-batches": first_only(0),
    "gaussian/bias-for-all-heads": first_only(1),
    "gaussian/bias-for-all-rows": first_only(2),
    "gaussian/bias-for-all-keys": first_only(3),
    "ragged/63-by-63": without_last_key(lambda n: n == TILE - 1),
    "ragged/64-by-64": without_last_key(lambda n: n == TILE),
    "ragged/65-by-65": without_last_key(lambda n: n % TILE == 1),
    "ragged/127-by-127": without_last_key(lambda n: n == 2 * TILE - 1),
    "ragged/128-by-128": without_last_key(lambda n: n % 128 == 0),
    "ragged/129-by-129": without_last_key(lambda n: n == 2 * TILE + 1),
    "ragged/61-by-131": without_last_key(lambda n: n % TILE == 3),
    "ragged/131-by-61": without_last_key(lambda n: n < TILE),
    "ragged/packed-ends": given(cu_seqlens_q=compacted),
    "ragged/packed-no-keys": given(cu_seqlens_k=lambda p: np.array([0, 30, 60, 60], np.int32)),
    "probe/head-scales-sink": given(sink=lambda p: np.roll(p.sink, 1)),
    "probe/faint-key": by_hand(no_faint),
    "shifted/one-key-below-sentinels": by_hand(filled),
    "shifted/below-sentinels-causal": by_hand(lowest_maximum),
    "shifted/below-minus-100-masked-tail": by_hand(through_lse),
    "shifted/bias-far-below": given(bias=lambda p: np.where(p.bias < -400, -np.inf, p.bias).astype(np.float32)),
    "shifted/large-sink": by_hand(keys_alone),
    "drift/all-positive": narrow_sum,
    "extreme/one-huge-value": given(value=scaled_values),
}  # fmt: skip


@pytest.mark.parametrize("case", BUGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_case_catches_its_bug(case, dtype):
    def wrong(p):
        result = BUGS[case](p)
        out = result[0] if isinstance(result, tuple) else result
        return out.astype(p.query.dtype)  # what it does to lse is not asked for

    able = Capabilities({dtype}, FEATURES)
    (check,) = check_kernel(wrong, only=f"{case}[{dtype}]", capabilities=able, dtypes=[dtype]).checks
    assert check.verdict in ("failed", "edge"), check
    assert "error above the bound" in check.message or "NaN" in check.message or "inf" in check.message


def test_every_bug_names_a_case():
    assert {tuple(name.split("/")) for name in BUGS} <= {(f, label) for f in BUILDERS for label in BUILDERS[f]}


class Truncating:
    """A format that rounds towards 0."""

    def __init__(self, form):
        self.form = form

    def round_array(self, x):
        near = self.form.round_array(x)
        return np.where(np.abs(near) > np.abs(x), near - np.sign(near) * self.form.ulp_array(near), near)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_truncation_shows_in_drift(dtype, monkeypatch):
    """Weights and output cut off, not rounded: above the bound where rows agree, seen by the share elsewhere."""
    able = Capabilities({dtype}, lse=True)
    right = {n: check_kernel(tiled, only=f"drift/{n}*", capabilities=able) for n in BUILDERS["drift"]}
    monkeypatch.setattr("refattn.check.kernels.tiled.FORMATS", {dtype: Truncating(FORMATS[dtype])})
    wrong = {n: check_kernel(tiled, only=f"drift/{n}*", capabilities=able) for n in BUILDERS["drift"]}
    assert all(r.passed for r in right.values())
    assert wrong["similar-rows"].count("failed") == wrong["all-positive"].count("failed") == 1
    # one truncation costs less than the two roundings that the bound allows: only the share tells
    assert wrong["halves"].passed
    assert right["halves"].correctly_rounded[dtype] > 0.95
    assert wrong["halves"].correctly_rounded[dtype] < 0.6
