"""How errors move gradients by normed and turned queries and keys, against derivatives by PyTorch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from refattn import Problem, evaluate
from refattn.check.bounds import placed
from refattn.check.bounds.forward import forward
from refattn.check.bounds.parts import Parts
from refattn.check.bounds.predict import predict
from refattn.check.model import flash
from refattn.exact.heads import heads

EXACT = flash("float64")
N_Q, N_K, D, D_V = 3, 5, 4, 2
NOISE = {"scores": (N_Q, N_K), "rows": (N_Q, 1), "query": (N_Q, D), "key": (N_K, D)}


@pytest.fixture(params=[None, 2.0])
def call(request):
    """A small call with norms and partly turned columns, and what arrives."""
    rng = np.random.default_rng(7)
    q, k, v, dout = (rng.normal(size=(1, 1, *s)) for s in ((N_Q, D), (N_K, D), (N_K, D_V), (N_Q, D_V)))
    angle = rng.uniform(0, 6, (N_K, 1))
    more = {"rotary": "half", "rotary_cos": np.cos(angle), "rotary_sin": np.sin(angle), "softcap": request.param}
    return Problem(q, k, v, query_norm=rng.normal(size=D), key_norm=rng.normal(size=D), norm_eps=0.1, **more), dout


def turn(p, x, which, way=1):
    cos, sin = (torch.tensor(t[np.arange(len(x)) + (N_K - N_Q) * (which == 0)]) for t in (p.rotary_cos, p.rotary_sin))
    a, b, rest = x[:, :1], x[:, 1:2], x[:, 2:]
    return torch.cat([a * cos - way * b * sin, b * cos + way * a * sin, rest], 1)


def norm(p, which):
    x, w = (torch.tensor(getattr(p, n)) for n in (("query", "query_norm"), ("key", "key_norm"))[which])
    x = x[0, 0]
    return x, w, (x.square().mean(1, keepdim=True) + p.norm_eps).rsqrt()


def back(p, g, which, behind=0, before=0):
    """The gradients by queries or keys, and by the norm's weights, from that by what is multiplied."""
    x, w, r = norm(p, which)
    g = turn(p, g + behind, which, -1) + before
    return r * (w * g - x * r * r * (x * w * g).mean(1, keepdim=True)), (x * r * g).sum(0)


def gradients(p, dout, noise):
    """A backward pass with errors put in, by name."""
    q, k = (turn(p, x * r * w, i) for i, (x, w, r) in enumerate(norm(p, i) for i in (0, 1)))
    q, k, v, dout = q + noise["query"], k + noise["key"], torch.tensor(p.value)[0, 0], torch.tensor(dout)[0, 0]
    scores, slope = q @ k.T / D**0.5, 1
    if p.softcap is not None:
        t = torch.tanh(scores / p.softcap)
        scores, slope = p.softcap * t, 1 - t * t
    w = scores.softmax(1)
    d = (dout * (w @ v)).sum(1, keepdim=True) + noise["rows"]
    ds = w * (dout @ v.T - d) * slope + noise["scores"]
    (dq, query), (dk, key) = (back(p, g / D**0.5, i) for i, g in enumerate((ds @ k, ds.T @ q)))
    return {"dq": dq, "dk": dk, "query_norm": query, "key_norm": key}


def parts_of(p, dout, model=EXACT):
    answer = evaluate(p, gradients=dout)
    variance = forward(answer, model)[1]
    (one,) = heads(p)
    at = (variance["out"][0, 0], variance["lse"][0, 0], np.zeros(N_Q))
    return replace(Parts.of(one, model, answer.enclosures["out"].mid[0, 0], dout[0, 0], *at), cu=0.0)


def slopes_of(p, dout, name, noise):
    """The derivatives of a gradient by each error."""
    zero = {n: torch.zeros(s, dtype=torch.float64) for n, s in NOISE.items()}
    return torch.autograd.functional.jacobian(
        lambda x: gradients(p, dout, zero | {noise: x})[name], zero[noise]
    ).numpy()


def alike(got, wanted):
    """A slope is a sum of some hundred terms, which cancel to a thousandth at most: 2**-53 times 2**20."""
    return bool((np.abs(got - wanted) <= 2.0**-33 * (np.abs(wanted) + wanted.max())).all())


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("name", ["dq", "dk", "query_norm", "key_norm"])
def test_errors_are_followed_as_derivatives_do(call, name, noise):
    p, dout = call
    s = parts_of(p, dout)
    size = np.random.default_rng(3).uniform(0.5, 2, NOISE[noise])
    s = replace(s, var_d=size if noise == "rows" else np.zeros((N_Q, 1)))
    lost = placed._Lost(s)
    zero = {n: np.zeros(x) for n, x in NOISE.items()} | {noise: size}
    lost.own, lost.var_q, lost.var_k = zero["scores"] * lost.scale**2, zero["query"], zero["key"]
    lost.by_keys = lost.scale**2 * (s.q * s.q) @ lost.var_k.T
    lost.apart = np.zeros((N_Q, N_K))
    wanted = slopes_of(p, dout, name, noise) ** 2
    which = int(name in ("dk", "key_norm"))
    way = placed._Way(s, which)
    if name.endswith("norm"):
        (found,) = (lost.whole(b, which) for _, _, b in way.weights(1))
        assert alike(found, (wanted * size).sum((1, 2)))
    elif noise not in ("query", "key"):  # those meet themselves there, which is left out
        (found,) = ((lost.by_row if which == 0 else lost.by_key)(b) for _, _, b in way.inputs(1))
        assert alike(found.T, (wanted * size).sum((2, 3)))
    elif (name, noise) == ("dq", "query"):
        (found,) = (lost.by_row(b) for _, _, b in way.inputs(1))
        assert alike(found.T, (wanted * size).sum((2, 3)))
    elif (name, noise) == ("dk", "key"):  # by what the key itself has lost
        (found,) = (lost.by_key(b) for _, _, b in way.inputs(1))
        at = np.arange(N_K)
        assert alike(found.T, (wanted[at, :, at] * size[:, None]).sum(2))


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_lost_on_the_way_back_is_followed(call, which):
    p, dout = call
    way = placed._Way(parts_of(p, dout), which)
    way.u = way.scatter = 0.0
    shape = way.g.shape
    sizes = way.lost, way.lost_before = np.random.default_rng(5).uniform(0.5, 2, (2, *shape))
    zero, inputs, weights = torch.zeros(shape, dtype=torch.float64), 0, 0
    for name, size in zip(("behind", "before"), sizes, strict=True):
        slopes = torch.autograd.functional.jacobian(lambda x, n=name: back(p, zero, which, **{n: x}), zero)
        inputs, weights = (
            a + (s.numpy() ** 2 * size).sum((-2, -1)) for a, s in zip((inputs, weights), slopes, strict=True)
        )
    ((c, v, b),) = way.inputs(1)
    assert alike(way.back(c, v, b).T, inputs)
    ((_, v, b),) = way.weights(1)
    assert alike(way.sums(v, b), weights)


def test_what_is_written_on_the_way_is_rounded_each_time(call):
    s = parts_of(*call, replace(flash("float64"), rotated="bfloat16"))
    way, u = placed._Way(s, 0), flash("bfloat16").scatter("bfloat16")
    assert (way.lost_before >= 0.99 * u * way.g**2).all()
    assert (way.lost >= 0.99 * u * (s.scale * s.ds @ s.k) ** 2).all()
    assert placed._written(s)[1] == 2 * u  # a norm and a turn


def test_errors_too_large_to_foresee_are_not_predicted(call):
    p, dout = call
    p = p.replace(query_norm=64 * p.query_norm, softcap=None)
    answer = evaluate(p, gradients=dout)
    model = replace(flash("float64"), scores="float8_e5m2")
    found = predict(answer, model, dout, forward(answer, model)[1])
    assert {n for n, x in found.items() if np.isnan(x).all()} >= {"dk", "dv", "dquery_norm", "dkey_norm"}
    known = predict(answer, flash("float64"), dout, forward(answer, flash("float64"))[1])
    assert not any(np.isnan(x).any() for x in known.values())
    model = replace(flash("float64"), rotated="float8_e5m2")  # what is written is as far off
    assert np.isnan(predict(answer, model, dout, forward(answer, model)[1])["dkey_norm"]).all()


def test_rows_that_are_alike_are_rounded_alike():
    assert placed._times_there(np.array([[1.0, 2], [3, 4], [1, 2]])).tolist() == [2, 1, 2]
    assert placed._times_there(np.zeros((0, 2))).shape == (0,)
