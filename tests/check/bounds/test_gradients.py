"""Bounds and variances of softmax's gradients against docs/proofs/bounds.md written out element by element."""

from dataclasses import replace
from math import ceil, exp, expm1, sqrt, tanh

import numpy as np
import pytest

from refattn import Problem, evaluate
from refattn.arrays import to_float64
from refattn.check.bounds.forward import forward, head_losses
from refattn.check.bounds.gradients import gradient_bounds, spread
from refattn.check.bounds.graph import Graph
from refattn.check.bounds.operands import Operands, lost
from refattn.check.bounds.predict import predict
from refattn.check.model import C, Model, flash
from refattn.exact.heads import heads

from ...conftest import tensor
from .coarse import walk

COARSE = Model("float16", "float8_e5m2", "bfloat16", lse="float16", tile=2, chain=2)
U, TINY, TINY_W = 2.0**-11, 2.0**-25, 2.0**-17  # of its accumulator; of its weights
MODELS = {
    "coarse": COARSE,
    "split": replace(COARSE, weights="float16", scores="float16", split=3),
    "flushed": replace(COARSE, subnormals=False, group_sum="bfloat16"),
    "narrowed": replace(COARSE, operands="bfloat16"),
}
CALLS = {
    "plain": {},
    "everything": {"softcap": 2.0, "causal": "bottom_right", "bias": (1, 4, 1, 7), "sink": True, "scale": -0.75},
    "one key for all": {"bias": (1, 1, 5, 1), "sink": True},
    "a bias for each": {"bias": (2, 4, 5, 7)},
}


@pytest.fixture(params=CALLS)
def call(make, request):
    """A call of half floats, its answer and what arrives."""
    rng, more = np.random.default_rng(1), dict(CALLS[request.param])
    more |= {"bias": tensor(rng, more["bias"], "float16")} if "bias" in more else {}
    more |= {"sink": rng.standard_normal(4)} if "sink" in more else {}
    p = make(5, 7, 4, b=2, h=4, h_kv=2, d_v=3, dtype="float16", **more)
    dout = tensor(rng, p.out_shape, "float16")
    return evaluate(p, gradients=dout), to_float64(dout)


def alike(got, wanted):
    """dout·v - D is off by 2**-50 of its terms, of which a bound has u = 2**-11: 2**-39, and some operations more."""
    return bool((np.abs(got - wanted) <= 2.0**-36 * wanted).all())


def depth(n):
    return min(n, 2 + ceil(n / 2))


def tiny_of(model):
    """What underflow costs in the accumulator, and there or in the weights' type, whichever is more."""
    inside = TINY if model.subnormals else 2.0**-14
    return inside, max(inside, TINY_W if model.subnormals else 0) if model.weights == "float8_e5m2" else inside


class Head:
    """One head of a call: what is known of it, and its scalar sums."""

    def __init__(self, one, model, answer, arriving):
        self.one, self.model, self.at = one, model, (one.batch, one.head)
        self.q, self.k, self.v, self.seen = one.q, one.k, one.v, one.allowed
        self.g, self.o = arriving[self.at], answer.enclosures["out"].mid[self.at]
        self.losses = head_losses(one, slice(None), model)
        self.p, self.lse = self.losses.shares, self.losses.lse.a[:, 0]
        self.scale = one.problem.scale or 1 / sqrt(one.q.shape[1])
        self.n_q, self.n_k = one.allowed.shape
        self.tiles, self.group = ceil(self.n_k / 2), one.problem.heads // one.problem.heads_kv

    def keys(self, i):
        return np.nonzero(self.seen[i])[0]

    def cap(self, i, j):
        """tanh of a score over its cap, or None."""
        c = self.one.problem.softcap
        return None if c is None else tanh(self.q[i] @ self.k[j] * self.scale / c)

    def cell(self, name, shape, i, j):
        """Where a score's gradient is added up."""
        return tuple(x if n > 1 else 0 for x, n in zip((*self.at, i, j), shape, strict=True))


def met(shape, full):
    return int(np.prod([m for n, m in zip(shape, full, strict=True) if n == 1]))


def weight_errors(h, limit, i):
    """By key, what a weight computed again may be off by."""
    passes = 1 + 3 + h.tiles * 4 + 4
    e = h.losses.score_errors
    by = {j: h.p[i, j] * (expm1(e[i, j] + limit["lse"][h.at][i]) + passes * U) for j in h.keys(i)}
    return {j: min(x, 1.0) + tiny_of(h.model)[1] for j, x in by.items()}


def ds_errors(h, limit, arriving, i):
    """By key: dS, its error, and the weight's; and the row's D and its error."""
    model, off, n = h.model, Operands.of(h.one, h.model), len(h.keys(i))
    g, lost_g, d_v = np.abs(h.g[i]), lost(h.g, arriving, model)[i], h.v.shape[1]
    lost_p, dp, size, lost_dp = weight_errors(h, limit, i), {}, {}, {}
    for j in h.keys(i):
        dp[j], size[j] = h.g[i] @ h.v[j], g @ np.abs(h.v[j])
        lost_dp[j] = (d_v + 1) * U * size[j] + model.loss(model.scores) * abs(dp[j])
        lost_dp[j] += lost_g @ np.abs(h.v[j]) + (g + lost_g) @ off.v[j]
    d = h.g[i] @ h.o[i]
    by_out = g @ limit["out"][h.at][i] + (d_v + 1) * U * (g @ np.abs(h.o[i]))
    by_p = sum(lost_p[j] * abs(dp[j]) + h.p[i, j] * lost_dp[j] for j in dp)
    by_p += (depth(n) + 1) * U * sum(h.p[i, j] * size[j] for j in dp)
    lost_d, ds = max(by_out, by_p), {j: h.p[i, j] * abs(dp[j] - d) for j in dp}
    lost_ds = {
        j: lost_p[j] * abs(dp[j] - d) + (h.p[i, j] + lost_p[j]) * (lost_dp[j] + lost_d) + 2 * U * ds[j]
        + tiny_of(model)[1] for j in dp
    }  # fmt: skip
    return ds, lost_ds, lost_p, d, lost_d


def capped(h, i, j, ds, lost_ds):
    """dS and its error behind the softcap."""
    t = h.cap(i, j)
    if t is None:
        return ds, lost_ds
    raw = (h.q.shape[1] + 3) * U * (np.abs(h.q[i]) @ np.abs(h.k[j]) * abs(h.scale))
    slope = 1 - t * t
    off = 2 * abs(t) * (raw / h.one.problem.softcap * slope + 3 * U * abs(t)) + 3 * U
    return ds * slope, lost_ds * (slope + off) + ds * off


def add_bounds(h, limit, arriving, total, sums):
    model, off, (tiny, tiny_w) = h.model, Operands.of(h.one, h.model), tiny_of(h.model)
    u_p, s, kv, rows = model.loss(model.weights), abs(h.scale), (h.at[0], h.one.head_kv), h.n_q * h.group
    lost_g, passes = lost(h.g, arriving, model), depth(rows) + ceil(h.n_q / 2) + 3
    for i in range(h.n_q):
        each, lost_each, lost_p, d, lost_d = ds_errors(h, limit, arriving, i)
        n = len(each)
        for j in each:
            if "dbias" in total:
                shape, p = total["dbias"].shape, h.one.problem
                meet = depth(met(shape, (p.batch, p.heads, p.n_q, p.n_k)))
                total["dbias"][h.cell("dbias", shape, i, j)] += lost_each[j] + meet * U * each[j]
            ds, lost_ds = capped(h, i, j, each[j], lost_each[j])
            lost_ds += u_p * ds
            q, k, g, w = np.abs(h.q[i]), np.abs(h.k[j]), np.abs(h.g[i]), h.p[i, j]
            total["dq"][h.at][i] += s * (lost_ds * k + (depth(n) + h.tiles + 3) * U * ds * k + tiny_w * k)
            total["dq"][h.at][i] += tiny_w * k + tiny_w + s * (ds + lost_ds) * off.k[j]
            total["dk"][kv][j] += s * (lost_ds * q + passes * U * ds * q + tiny_w * q) + tiny_w * q
            total["dk"][kv][j] += s * (ds + lost_ds) * off.q[i]
            lost_w = lost_p[j] + u_p * w
            total["dv"][kv][j] += lost_w * g + passes * U * w * g + tiny_w * g + (w + lost_w) * lost_g[i]
            sums["dk"][kv][j] += s * ds * q
            sums["dv"][kv][j] += w * g
        if h.one.sink is not None:
            w = exp(h.one.sink - h.lse[i])
            off_w = w * (limit["lse"][h.at][i] + (2 * abs(h.lse[i]) + abs(h.one.sink) + 3 + 3) * U) + tiny
            meet = (depth(h.n_q * h.one.problem.batch) + 3) * U
            total["dsink"][h.at[1]] += off_w * abs(d) + w * lost_d + meet * w * abs(d)
    for n in ("dk", "dv"):
        total[n][kv] += tiny_w * passes


@pytest.mark.parametrize("name", MODELS)
def test_every_gradients_bound_is_the_proofs(call, name):
    answer, arriving = call
    model, names = MODELS[name], [n for n in answer.enclosures if n.startswith("d")]
    limit = forward(answer, model)[0]
    total = {n: np.zeros(answer.enclosures[n].mid.shape) for n in names}
    sums = {n: np.zeros_like(total[n]) for n in ("dk", "dv")}
    for one in heads(answer.call):
        add_bounds(Head(one, model, answer, arriving), limit, arriving, total, sums)
    got = gradient_bounds(answer, model, arriving, limit)
    assert got.keys() == total.keys()
    for n, x in total.items():
        if n in sums:
            x = x + 2 * 2 * (2.0**-8 if model.group_sum else 0.0) * sums[n]
        u, tiny, normal = {"dsink": (2.0**-53, 2.0**-1074, 2.0**-1022)}.get(n, (U, TINY, 2.0**-14))
        x = x * (1 + u) + u * np.abs(answer.enclosures[n].mid)
        assert alike(got[n], x + (tiny if model.subnormals else 2 * normal)), n


class Spread(Head):
    """A head with the variances of what its gradients are made of."""

    def __init__(self, one, model, answer, arriving, variance):
        super().__init__(one, model, answer, arriving)
        Graph([self.losses.out.node, self.losses.lse.node])
        parts, g = model.merges(self.n_k, one.sink is not None), self.g
        self.cu = C * U**2
        self.dp = g @ self.v.T
        self.x = self.dp - (g * self.o).sum(1)[:, None]
        self.var_p = self.losses.score_variances + self.cu * (2 + 2 * parts) * (self.lse[:, None] ** 2 + 2)
        self.var_dp = np.array([[self.cu * dot(a * b) for b in self.v] for a in g])
        self.var_dp += C * model.loss(model.scores) ** 2 * self.dp**2
        self.var_out, self.var_lse = variance["out"][self.at], variance["lse"][self.at]
        self.var_d = (g**2 * (self.var_out + self.cu * self.o**2)).sum(1)
        self.cu_p = C * model.loss(model.weights) ** 2
        self.tiny = tiny_of(model)[0] ** 2 / 3
        self.tiny_w = max(self.tiny, (TINY_W if model.weights == "float8_e5m2" else TINY) ** 2 / 3 * model.subnormals)


def dot(terms, n=None):
    """The variance of a sum of n rounded products over C u^2; zeros do not move it."""
    return depth(n or len(terms)) * walk(terms) + np.sum(np.square(terms))


def add_variances(h, total):
    s2, kv, rows, cu = h.scale**2, (h.at[0], h.one.head_kv), h.n_q * h.group, h.cu
    t2 = np.array([[(h.cap(i, j) or 0.0) ** 2 for j in range(h.n_k)] for i in range(h.n_q)])
    slope, w2 = 1 - t2, h.p**2
    ds = h.p * h.x * slope
    own = slope**2 * w2 * (h.x**2 * (h.var_p + 2 * cu) + h.var_dp) + h.cu_p * ds**2
    if h.one.problem.softcap is not None:
        own += w2 * (h.x**2 + h.var_dp + h.var_d[:, None]) * (12 * U**2 * t2**2 + 4 * cu)
    tiny = h.tiny + s2 * h.tiny_w
    for i in range(h.n_q):
        n = len(h.keys(i))
        for c in range(h.k.shape[1]):
            k = h.k[:, c]
            x = own[i] @ k**2 + h.var_d[i] * ((h.p * slope)[i] @ k) ** 2 + cu * dot(ds[i] * k, n)
            total["dq"][h.at][i, c] = s2 * x + tiny * (h.seen[i] @ k**2) + h.tiny * (n + h.tiles)
    for j in range(h.n_k):
        for c in range(h.k.shape[1]):
            q = h.q[:, c]
            x = (own + slope**2 * w2 * h.var_d[:, None])[:, j] @ q**2 + cu * dot(ds[:, j] * q, rows)
            total["dk"][kv][j, c] += s2 * x + tiny * (h.seen[:, j] @ q**2) + h.tiny * rows
        for c in range(h.v.shape[1]):
            g = h.g[:, c]
            x = (w2 * (h.var_p + h.cu_p))[:, j] @ g**2 + cu * dot(h.p[:, j] * g, rows)
            total["dv"][kv][j, c] += x + h.tiny_w * (h.seen[:, j] @ g**2) + h.tiny * rows


def add_masks(h, total):
    cu = h.cu
    if "dbias" in total:
        shape, p = total["dbias"].shape, h.one.problem
        alone, meet = shape[3] > 1, depth(met(shape, (p.batch, p.heads, p.n_q, p.n_k))) / 6 + 1
        for i, j in np.ndindex(h.n_q, h.n_k):
            w2, x2 = h.p[i, j] ** 2, h.x[i, j] ** 2
            x = w2 * (x2 * (h.var_p[i, j] + 2 * cu) + h.var_dp[i, j] + h.var_d[i] * alone)
            x += h.tiny_w * x2 + h.tiny + cu * meet * w2 * x2 + (1 - alone) * h.p[i].sum() ** 2 * h.var_d[i] / h.n_k
            total["dbias"][h.cell("dbias", shape, i, j)] += x if h.seen[i, j] or not alone else 0.0
    if h.one.sink is not None:
        w, d, rows = np.exp(h.one.sink - h.lse), (h.g * h.o).sum(1), h.n_q * h.group
        var = h.var_lse + cu * (h.lse**2 + h.one.sink**2 + 1)
        x = w**2 * (d**2 * (var + 2 * cu) + h.var_d) + h.tiny * d**2 + cu * (depth(rows) + 1) * (w * d) ** 2
        total["dsink"][h.at[1]] += x.sum()


@pytest.mark.parametrize("name", ["coarse", "split", "flushed"])
def test_every_gradients_variance_is_the_proofs(call, name):
    answer, arriving = call
    model = MODELS[name]
    variance = forward(answer, model)[1]
    got = predict(answer, model, arriving, variance)
    total = {n: np.zeros(answer.enclosures[n].mid.shape) for n in answer.enclosures if n.startswith("d")}
    for one in heads(answer.call):
        h = Spread(one, model, answer, arriving, variance)
        assert np.isfinite(h.var_p).all()
        add_variances(h, total)
        add_masks(h, total)
    assert got.keys() == total.keys()
    for n, x in total.items():
        form = np.float64 if n == "dsink" else np.float16
        assert alike(got[n], x + np.spacing(np.abs(answer.enclosures[n].mid).astype(form)).astype(float) ** 2 / 12), n
    assert predict(answer, MODELS["narrowed"], arriving, variance) == {}


@pytest.mark.parametrize("shape", [(2, 4, 7, 8), (1, 4, 1, 8), (2, 1, 7, 1), (1, 1, 1, 1)])
def test_a_biass_gradient_is_added_up_where_the_bias_is_one_for_all(make, shape):
    packed = {"cu_seqlens_q": np.array([0, 3, 7], np.int32), "cu_seqlens_k": np.array([0, 5, 8], np.int32)}
    p = make(7, 8, 4, b=1, h=4, **packed)
    one = [x for x in heads(p) if x.rows.start == 3][1]
    total, x = np.zeros(shape), np.arange(12.0).reshape(4, 3)
    spread(one, total, x)
    wanted = np.zeros((2, 4, 7, 8))
    wanted[one.batch, one.head, 3:, 5:] = x
    for axis, n in enumerate(shape):
        wanted = wanted.sum(axis, keepdims=True) if n == 1 else wanted
    assert (total == wanted).all()


def test_a_sink_of_nothing_has_no_error(make):
    p = make(sink=np.array([0.5, -np.inf]))
    dout = np.ones(p.out_shape, np.float32)
    answer, model = evaluate(p, gradients=dout), Model()
    limit, variance = forward(answer, model)
    assert gradient_bounds(answer, model, dout, limit)["dsink"][1] == 2.0**-1074  # what 0 of its type may be off by
    assert predict(answer, model, dout, variance)["dsink"][1] == 0.0


def test_a_weight_grows_by_no_more_than_exp_700():
    """Scores of 8000 and 705 less, stored in eight bits, may be off by 1000."""
    one = np.ones((1, 1, 1, 1))
    p = Problem(one, np.array([8000.0, 7295.0]).reshape(1, 1, 2, 1), np.ones((1, 1, 2, 1)), scale=1.0)
    answer, model = evaluate(p, gradients=one), replace(flash("float64"), scores="float8_e5m2")
    found = gradient_bounds(answer, model, one, {"out": 0 * one, "lse": 0 * one[..., 0]})["dv"][0, 0, 1, 0]
    # 705 is off by an ulp of 8000, 2**-40, and so is the weight, of its size
    assert abs(found / exp(-705) / expm1(700) - 1) <= 2.0**-39


def test_zeros_stay_zeros():
    """Products with 0 are 0: a column of values that is 0 allows out nothing, and dq and dk, all 0, half a step."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (tensor(rng, (1, 2, 9, 16), "float16") for _ in range(4))
    v[..., 3] = 0
    answer = evaluate(Problem(q, k, v))
    allowed = forward(answer, flash("float16"))[0]["out"]
    assert (allowed[..., 3] == 0).all()
    assert (np.delete(allowed, 3, 3) > 0).all()
    answer = evaluate(Problem(q, k, 0 * v), gradients=dout)
    limit = gradient_bounds(answer, flash("float16"), dout, forward(answer, flash("float16"))[0])
    assert (np.concatenate([limit["dq"], limit["dk"]]) == 2.0**-25).all()
    dout[:, :, 1:] = 0  # of rows to which nothing arrives
    answer = evaluate(Problem(q, k, v), gradients=dout)
    limit = gradient_bounds(answer, flash("float16"), dout, forward(answer, flash("float16"))[0])
    assert (limit["dq"][:, :, 1:] == 2.0**-25).all()
    assert (limit["dq"][:, :, 0] > 2.0**-24).all()
