"""Gradients of a term's tables: the exact ones by autograd in float64, kernels' in float32, wrong ones caught."""

import numpy as np
import pytest

from refattn import InvalidInput, MismatchError, Problem, rules
from refattn.check.tables import assert_tables, table_gradients
from refattn.rules import terms

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)
TERM = terms.t5(RNG.integers(-9, 9, (2, 8)) / 8, 6) + terms.by_key(RNG.integers(-9, 9, 9) / 4) * terms.by_head([0.5, 2])
"""Of few bits: written out in float32 it is what it is."""


@pytest.fixture(scope="module")
def call():
    q, k, v, dout = (RNG.standard_normal((2, 2, n, 8)).astype(np.float32) for n in (5, 9, 9, 5))
    return Problem(q, k, v, bias=TERM, causal="bottom_right"), dout


def by_autograd(p, dout, term, dtype=torch.float32):
    """What a kernel in PyTorch learns, its scores written out."""
    tables = {n: torch.tensor(x, dtype=dtype, requires_grad=True) for n, x in term.tables().items()}
    kind = "float64" if dtype == torch.float64 else "float32"
    mod = rules.score_mod(term, p.n_q, p.n_k, tables=tables, kind=kind)
    q, k, v, d = (torch.as_tensor(x, dtype=dtype) for x in (p.query, p.key, p.value, dout))
    at = [torch.as_tensor(x) for x in np.indices((p.batch, p.heads, p.n_q, p.n_k))]
    s = mod(q @ k.mT * p.d_k**-0.5, *at)
    seen = torch.ones(p.n_q, p.n_k, dtype=torch.bool).tril(p.n_k - p.n_q)
    out = s.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    found = torch.autograd.grad((out * d).sum(), list(tables.values()))
    return {n: x.numpy() for n, x in zip(tables, found, strict=True)}


def test_the_exact_ones_are_those_of_float64(call):
    p, dout = call
    known = table_gradients(p, dout)
    wide = by_autograd(p.replace(bias=None), dout, TERM, torch.float64)
    as_float64 = {n: getattr(p, n).astype(np.float64) for n in ("query", "key", "value")}
    limit = table_gradients(p.replace(**as_float64), dout.astype(np.float64))
    assert list(known) == list(TERM.tables())
    for n, x in wide.items():
        assert (np.abs(known[n].value - x) <= known[n].radius + limit[n].allowed).all()
        assert (known[n].radius <= 2.0**-20 * known[n].allowed).all()  # what is judged is the kernel, not this


def test_autograd_in_float32_passes_and_bugs_do_not(call):
    p, dout = call
    right = by_autograd(p, dout, TERM)
    assert_tables(right, p, dout)
    wrong = {
        "a batch left out": {n: x / 2 for n, x in right.items()},
        "buckets by one": {"t5": np.roll(right["t5"], 1, 1)},
        "heads swapped": {"t5": right["t5"][::-1].copy()},
        "a factor left out": by_autograd(p, dout, TERM.parts[0] + terms.by_key(np.ones(9)) * terms.by_head([1.0, 1.0])),
        "NaN": {"keys": np.full((1, 1, 9), np.nan)},
        "off by a rounding to bfloat16": {n: x * (1 + 2.0**-8) for n, x in right.items()},
    }
    for found in wrong.values():
        with pytest.raises(
            MismatchError, match=r"(t5|keys|heads)\[.*: got .*, exact .*, allowed .* elements are wrong"
        ):
            assert_tables(found, p, dout)


def test_what_cannot_be_judged_is_said(call):
    p, dout = call
    for given, text in (
        ({}, "gradients: got {}, expected arrays by name"),
        ({"a": dout}, "gradients: got 'a', expected some of t5, keys, heads"),
        ({"t5": dout}, r"gradients: t5 is \(2, 2, 5, 8\), expected an array of shape \(2, 8\)"),
        ({"t5": 3}, "gradients: t5 is int, expected an array of shape"),
    ):
        with pytest.raises(InvalidInput, match=text):
            assert_tables(given, p, dout)
    with pytest.raises(InvalidInput, match="problem: bias: got None, expected a term"):
        table_gradients(p.replace(bias=None), dout)
    for model in ([], "flash"):
        with pytest.raises(InvalidInput, match=r"model: got .*, expected a Model, such as"):
            table_gradients(p, dout, model)
    with pytest.raises(InvalidInput, match="problem: got 3, expected a Problem"):
        table_gradients(3, dout)
