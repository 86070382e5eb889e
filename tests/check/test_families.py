import numpy as np
import pytest

from refattn import VARIANTS
from refattn.check import FAMILIES, FEATURES, cases
from refattn.check.families import BUILDERS
from refattn.dtypes import FORMATS


def test_families_and_builders_are_the_same():
    assert set(BUILDERS) == set(FAMILIES)
    assert {f for v in VARIANTS.values() for f in v.families} == set(FAMILIES)


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
            assert p.dtype == dtype
            if c.family != "poison":
                for x in (p.query, p.key, p.value):
                    assert np.isfinite(x.astype(np.float64)).all(), c.name


def test_softmax_cases_ask_for_every_feature():
    asked = frozenset().union(*(c.problem("float32").features() for c in cases("softmax")))
    assert asked == FEATURES


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
