"""Nothing that rounds as its Model says passes its bound, and the bound is not idle."""

import numpy as np
import pytest

from refattn import VARIANTS, Problem, evaluate
from refattn.check.bounds.forward import bounds
from refattn.check.bounds.rounded import simulate
from refattn.check.model import Model, flash
from refattn.variants import Rows, Steps

from ...conftest import tensor
from . import gate


@pytest.mark.parametrize("definition", gate.definitions(), ids=" ".join)
def test_no_element_is_past_its_bound(definition):
    """Rows of another operator's call are bounded as that operator's: fewer of them are looked at."""
    count = 200_000 if isinstance(VARIANTS[definition[0]].shape, Rows | Steps) else 50_000
    fewer = dict.fromkeys(("codebook", "hyper", "spark"), 20_000)  # softmax's own sums, otherwise fed
    fewer |= {"gated_delta": 10_000, "titans": 2_000}  # decays by channel take their time
    count = fewer.get(definition[0], count)
    found, past = gate.run(count, seed=1, names=[definition])
    assert past == []
    assert found[definition][0] >= count


@pytest.mark.parametrize("definition", gate.definitions(), ids=" ".join)
def test_the_worst_rounding_comes_near_the_bound(definition):
    """Otherwise the gate would say nothing: one key, every operation off the same way.

    Scores that are weights are exactly 1 among one block: they have six, of a key each.
    """
    rng, v = np.random.default_rng(0), VARIANTS[definition[0]]
    more = {"causal": "bottom_right"} if "causal_bottom_right" in v.always else {}
    weights = definition in (("nsa", "scores"), ("nsa_selected", "scores"))
    n, options = (6, {"block_size": 1, "topk": 2}) if weights else (1, {})
    options = {"sink_keys": 0} if v.name == "topk" else options  # or the only key is none to choose
    q, key, value = (tensor(rng, (1, 1, n, 8)) for n in (6, n, n))
    q, key = (np.abs(q), np.abs(key)) if v.name == "dsa" else (q, key)  # products below 0 lose nothing
    more |= {name: np.ones((1, 1, n, 1), np.float32) for name in ("beta", "eta") if name in v.always}
    p = Problem(q, key, np.abs(value), variant=v.name, options=v.fitted(options, 1), **more)
    p = p if v.takes(p) else p.replace(query=q[:, :, :1])  # some have no more queries than keys
    answer, worst = evaluate(p), {}
    for _ in range(20):
        for what, error, limit, _ in gate.judged(definition, p, answer, Model(lse="float64"), rng):
            name = what.split()[0]
            worst[name] = max(worst.get(name, 0.0), float((error / limit).max()))
    assert all(x <= 1 for x in worst.values())
    assert all(x > 0.3 for name, x in worst.items() if name != "lse")  # one weight of 1: its logarithm is exact


def test_to_nearest_is_what_a_kernel_in_float32_gives():
    rng = np.random.default_rng(0)
    p = Problem(*(tensor(rng, (1, 2, n, 16)) for n in (9, 33, 33)))
    got = simulate(p, flash("float32"))
    q, k, v = (x.astype(np.float32) for x in (p.query, p.key, p.value))
    s = q @ k.swapaxes(2, 3) * np.float32(0.25)
    w = np.exp(s - s.max(-1, keepdims=True))
    out = (w @ v) / w.sum(-1, keepdims=True)
    limit = bounds(evaluate(p), flash("float32"))["out"]
    assert (np.abs(got["out"] - out) <= 2 * limit).all()
    assert got["out"].astype(np.float32).tolist() == got["out"].tolist()
