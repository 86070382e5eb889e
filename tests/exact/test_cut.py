"""Some rows of a call are what they are in the whole: every bit of out, lse and dq."""

import numpy as np
import pytest
import torch

from refattn import InvalidInput, UnsupportedProblem, evaluate, query_rows, rules
from refattn.functions import positions

RNG = np.random.default_rng(0)
CALLS = {
    "plain": {},
    "causal, bottom right": {"causal": "bottom_right"},
    "causal, top left": {"causal": "top_left", "offset": 2},
    "offsets of items": {"causal": "bottom_right", "offset": np.array([1, -2])},
    "a window": {"window": (3, 1)},
    "a window, top left": {"window": (2, None), "alignment": "top_left"},
    "keys of items": {"causal": "bottom_right", "lengths_k": np.array([11, 7])},
    "masks": {
        "allowed": RNG.random((2, 1, 9, 11)) < 0.7,
        "bias": RNG.standard_normal((1, 4, 1, 11)).astype(np.float32),
        "weight": RNG.random((1, 1, 9, 11)),
        "sink": np.arange(4, dtype=np.float32),
    },
    "a rule": {"allowed": rules.causal() & rules.window(4, 0) | rules.prefix(2)},
    "a mask of linear attention": {
        "variant": "linear",
        "causal": "top_left",
        "allowed": RNG.random((1, 4, 9, 11)) < 0.7,
    },
    "rotations": {
        "rotary": "half",
        **dict(zip(("rotary_cos", "rotary_sin"), positions.rotary_tables(16, 8), strict=True)),
    },
    "slopes": {"alibi_slopes": np.array([1, 0.5, 0.25, 0.125]), "causal": "bottom_right"},
    "linear": {"variant": "linear", "causal": "bottom_right"},
}


@pytest.mark.parametrize("name", CALLS)
def test_rows_have_the_bits_of_the_whole(name, make):
    p = make(9, 11, 8, b=2, h=4, h_kv=2, **CALLS[name])
    dout = RNG.standard_normal(p.out_shape).astype(np.float32)
    asked = None if "alibi_slopes" in CALLS[name] else dout
    whole = evaluate(p, rounding="float32", gradients=asked)
    for start, stop in ((0, 9), (0, 1), (3, 7), (8, 9)):
        part = query_rows(p, start, stop)
        found = evaluate(part, rounding="float32", gradients=None if asked is None else dout[:, :, start:stop])
        for n in {"out", "lse", "dq"} & set(whole.values):
            assert np.array_equal(found.values[n], whole.values[n][:, :, start:stop], equal_nan=True), n
        if "dbias" in whole.values:
            assert set(found.values) == set(whole.values)


def test_rows_of_tensors_are_tensors(make):
    p = make(9, 11, 8, causal="bottom_right", allowed=rules.window(4, 0)).to("torch")
    part = query_rows(p, 2, 5)
    assert isinstance(part.query, torch.Tensor)
    assert isinstance(part.allowed, torch.Tensor)
    assert part.query.data_ptr() == p.query[:, :, 2:].data_ptr()  # nothing is copied


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 2), (-1, 4), (0, 10), (0.5, 4), (True, 4)])
def test_rows_that_are_not_there(start, stop, make):
    with pytest.raises(InvalidInput, match=rf"rows: got {start}:{stop}, expected 0 <= start < stop <= 9, the queries"):
        query_rows(make(9, 11, 8), start, stop)


def test_rows_that_do_not_stand_alone(make):
    for given, text in (
        ({"variant": "lightning"}, "a row of lightning does not stand alone; evaluate the whole call"),
        ({"lengths_q": np.array([4])}, "those of packed sequences or with lengths_q cannot be cut"),
        ({"query_scale": np.ones((1, 1, 9, 1)), "out_dtype": "float32"}, "a query_scale for each query cannot be cut"),
    ):
        with pytest.raises(UnsupportedProblem, match=f"rows: .*{text}"):
            query_rows(make(9, 9, 8, **given), 0, 4)
