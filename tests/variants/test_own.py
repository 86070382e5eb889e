"""Operators that are not the package's: what their code says, and how another process gets to know them."""

import pickle
from dataclasses import replace

from refattn.exact.agree import under
from refattn.variants import VARIANTS
from refattn.variants.own import FILES, definition, know, named, portable

FACTOR = 2.0


def helper(x):
    return x * FACTOR


def define(q, k, v, o):
    return helper((q @ k.T * o.scale).where(o.allowed)) @ v, None


def factors(n):
    def inner(q, k, v, o):
        return (q @ k.T * n).where(o.allowed) @ v, None

    return inner


BASE = replace(VARIANTS["linear"], name="mine", define=define, forms={}, options={}, cases={})


def said(v):
    with under(v):
        return definition("mine")


def test_a_digest_says_all_that_the_code_says(monkeypatch):
    first = said(BASE)
    assert first == said(replace(BASE))
    assert definition("softmax") == ""
    others = [said(replace(BASE, define=factors(n))) for n in (1.0, 2.0)]
    others += [said(replace(BASE, define=lambda q, k, v, o: ((q @ k.T).where(o.allowed) @ v, None)))]
    others += [said(replace(BASE, default_scale="rsqrt")), said(replace(BASE, uses=frozenset()))]
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    others.append(said(BASE))
    assert len({first, *others}) == len(others) + 1


def test_what_another_process_is_told(tmp_path, monkeypatch):
    assert portable("softmax") is None
    know(None)
    with under(BASE):
        assert portable("mine") is BASE
        assert named("mine") == "mine"
    text = "import refattn\nMINE = refattn.Variant('filed', lambda q, k, v, o: (v, None), 'f', 'u', 's', frozenset())\n"
    (tmp_path / "own_of_a_test.py").write_text(text)
    name = f"{tmp_path}/own_of_a_test.py:MINE"
    know(name)
    try:
        monkeypatch.setitem(FILES, "filed", name)
        assert pickle.loads(pickle.dumps(portable("filed"))) == name == named("filed")
    finally:
        del VARIANTS["filed"]
