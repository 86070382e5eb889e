import numpy as np
import pytest

from refattn import VARIANTS
from refattn.check import FAMILIES, FEATURES, FURTHER, cases
from refattn.check.inputs.builders import BUILDERS
from refattn.dtypes import FORMATS
from refattn.gates import RECURRENT


def test_families_and_builders_are_the_same():
    assert set(BUILDERS) | {"models", "calls"} == set(FAMILIES)
    assert {f for v in VARIANTS.values() for f in v.families} == set(BUILDERS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_are_unique_and_problems_repeat(variant):
    names = [c.name for c in cases(variant)]
    assert len(set(names)) == len(names)
    for c in cases(variant):
        a, b = c.problem("float32"), c.problem("float32")
        assert {n: x.tobytes() for n, x in a.arrays().items()} == {n: x.tobytes() for n, x in b.arrays().items()}


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_case_builds_in_every_format(dtype):
    for c in cases("softmax"):
        if not c.dtypes or dtype in c.dtypes:
            p = c.problem(dtype)
            assert dtype == p.out_type or c.label == "out-float8"
            if c.family != "poison" and c.label != "unowned-nan":
                for x in (p.query, p.key, p.value):
                    assert np.isfinite(x.astype(np.float64)).all(), c.name


def test_softmax_cases_ask_for_every_feature():
    asked = frozenset().union(*(c.problem("float32").features() for c in cases("softmax")))
    assert asked == FEATURES | FURTHER - set(RECURRENT)  # that is a recurrence's


def by_name(name, dtype="float32"):
    return next(c for c in cases("softmax") if c.name == name).problem(dtype)


def test_families_do_what_they_say():
    from refattn import evaluate

    assert np.abs(evaluate(by_name("shifted/large")).lse).min() > 5e4
    assert evaluate(by_name("shifted/small")).lse.max() < -5e4
    assert evaluate(by_name("shifted/below-minus-100")).lse.max() < -100
    empty = np.isneginf(evaluate(by_name("empty/rows-allowed")).lse).sum()
    assert empty == 2 * 4
    p = by_name("probe/one-hot-values")
    out = evaluate(p).out / 128
    assert np.allclose(out.sum(-1), 1)  # the output is P itself
    assert np.abs(by_name("extreme/huge-values").value).min() > 2.9e38
    products = by_name("extreme/huge-products")
    assert np.abs(products.query.astype(float) @ products.key.astype(float).swapaxes(-1, -2)).max() > 1e39


def test_new_problems_do_what_they_say():
    from refattn import evaluate

    for name, heads in (("6-on-3", (6, 3)), ("8-on-2", (8, 2))):
        p = by_name(f"gaussian/grouped-heads-{name}")
        assert (p.heads, p.heads_kv) == heads
        assert p.heads // p.heads_kv != p.heads_kv
    for name in ("causal", "top-left"):
        p = by_name(f"gaussian/window-both-sides-{name}")
        assert p.n_q != p.n_k
        assert None not in p.window
        assert p.causal
    for axis, name in enumerate(("batches", "heads", "rows", "keys")):
        p = by_name(f"gaussian/bias-for-all-{name}")
        assert p.bias.shape[axis] == 1 < (p.batch, p.heads, p.n_q, p.n_k)[axis]
    edges = {c.problem("float32").n_k for c in cases("softmax") if c.family == "ragged"}
    assert edges >= {61, 63, 64, 65, 127, 128, 129, 131}
    p = by_name("ragged/packed-ends")
    lengths = [(r.stop - r.start, k.stop - k.start) for r, k in p.segments()]
    assert lengths[0][0] == 0
    assert lengths[-1] == (0, 0)
    assert any(n_q > n_k > 0 for n_q, n_k in lengths)
    assert np.isneginf(evaluate(p).lse).any()
    assert np.isneginf(evaluate(by_name("ragged/packed-no-keys")).lse).sum() == 2 * (5 + 8)
    alone = by_name("shifted/one-key-below-sentinels")
    assert (alone.allowed.sum(-1) == 1).all()
    assert evaluate(alone).lse.max() < -5e4
    tail = by_name("shifted/below-minus-100-masked-tail")
    assert tail.n_k % 128 == 64
    assert not tail.allowed[..., -40:].any()
    assert evaluate(tail).lse.max() < -100
    far = evaluate(by_name("shifted/bias-far-below"))
    assert (far.lse[..., 5:9] < -900).all()
    assert (far.lse[..., 10:] > -10).all()
    sink = by_name("shifted/large-sink")
    assert sink.sink.max() == 100
    assert 0 < np.abs(evaluate(sink).out[0, 1]).max() < 1e-36
    assert min(x.min() for x in (by_name("drift/all-positive").query, by_name("drift/all-positive").value)) > 0
    assert np.ptp(by_name("drift/similar-rows").query, axis=2).max() < 0.2
    step = FORMATS["bfloat16"].ulp(1.0)
    halves = np.abs(evaluate(by_name("drift/halves", "bfloat16"), bits=100).out[0, 0, 0])
    assert np.array_equal((halves - 1) / step, np.arange(32) / 32)
    huge = by_name("extreme/one-huge-value")
    assert np.abs(huge.value[:, :, 40]).min() == 2.0**127
    assert np.abs(huge.value[:, :, :40]).max() < 10


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_bias_of_minus_infinity_survives_in_every_format(dtype):
    bias = by_name("empty/rows-bias", dtype).bias.astype(np.float64)
    assert np.isneginf(bias[..., 5, :]).all()
    assert not np.isnan(bias).any()
