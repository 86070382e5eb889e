"""Plans that come from somebody who lies: each is refused by name, at once, and without much memory."""

import contextlib
import json
import time

import numpy as np
import pytest

from refattn import RefattnError, UnsupportedProblem, he
from refattn.errors import InvalidInput
from refattn.he.call import Call
from refattn.he.inverse import Inverse
from refattn.he.layer_plan import LayerPlan
from refattn.he.saved import plan_from_json, plan_to_json
from refattn.he.sigmoid import SigmoidPlan

from .make import planned, problem
from .make_sigmoid import call
from .make_sigmoid import planned as planned_sigmoid
from .test_layer import layer

ATTENTION = json.loads(plan_to_json(planned(problem(4, 4, 4, epsilon=1.0))))
LAYER = json.loads(plan_to_json(he.Layer(layer(classes=3)[0]).plan))
SIGMOID = json.loads(plan_to_json(planned_sigmoid(call(4, 4, 4, heads=1), tolerance=0.3)))
INF, NAN = float("inf"), float("nan")
WRONG = {
    "n_q": [10**6, "4", 4.0, -4, 0, True, None, 10**400, [4]],
    "n_k": [10**9, 2**14 + 1, "x"],
    "d_k": [10**6, 0],
    "d_v": [10**6, 1.5],
    "heads": [10**6, 10**9, "1"],
    "p": [3, "2", [2], 2.0, 0, 10, None],
    "denominator": [[NAN, 2], [1e-300, 1e300], ["a", "b"], [1, 2, 3], None, [2, 1], [0, 1], [1, INF], [1, 10**400], 5],
    "epsilon": [INF, -1, NAN, "x", None, 10**400],
    "scale": [NAN, INF, 0.0, "x", [1], 1e200, 10**400],
    "norms": [[1e200, 1e200], [], [1], [1, -1], "x", None, [NAN, 1]],
    "value_most": [1e308, 0, -1, NAN, "x", None],
    "tolerance": [1e-300, INF, NAN, 0, "x", None],
    "normalize": ["x", ["server"], None, 1, {}],
    "mode": ["x", None, []],
    "upload": ["x", None, 5],
    "workers": [10**9, 0, "1", 1.0],
    "inverse": [[10**9, 3], [41, 1], [2, 10**6 + 1], [2, 10**9 + 1], [-1, 3], [2, 4], [2, INF], [2], "x", {}, [1.0, 3]],
    "foo": [1],
}
WRONG_SIGMOID = {
    n: WRONG[n]
    for n in ("n_q", "n_k", "d_k", "d_v", "heads", "scale", "norms", "value_most", "tolerance", "mode", "foo")
} | {
    "scores": [[NAN, 2], [2, 1], [1, 1], ["a", 1], [1, 2, 3], None, 5, {}, [-INF, INF], [-1, 10**400], [-1e308, 1e308]],
    "offset": [NAN, INF, "x", [1], 1e308, -1e200, 10**400, 5e9, True],
    "upload": ["x", None, "compact"],
}
WRONG_LAYER = {
    "ring.degree": [1024, 12345, 8192.5, "x", -8192, 2**40],
    "ring.first": [-5, 0, 61, 10**9, "x", NAN],
    "ring.middle": [0, -100, 1000],
    "ring.special": [0, -1000],
    "ring.levels": [0, -1, 10**7, 1.5],
    "ring.more": [1],
    "layout.slots": [0, -1, 2**40, 2**13 + 1],
    "layout.columns": [0, 10**9, -1, 1],
    "layout.keys": [0, 10**9, 3, 1],
    "layout.groups": [0, 10**9, 2**13],
    "layout.parts": [2, 0],
    "layout.spans": [2],
    "layout.compact": [True],
    "rotations": [[1] * 10**5, list(range(1, 20000)), [10**30], ["x"], None, [0], [[1]], {}],
    "counts": [[["x", 1, 10**30]], [["x", "y", "z"]], None, [[1, 2]], [["add", 10**9, 1]], [["add", 1, -1]], {}],
    "levels": [None, {"x": 10**9}, {"x": "y"}],
    "n": [0, 10**9, -1, "x", None],
    "d": [0, 10**9, 1.5],
    "classes": [-1, 10**9, "x"],
    "heads": [0, 10**9],
    "p": [3, 2.0, None],
    "spread": [0, 10**9, 2**13],
    "apart": [0, 10**9],
    "residual_limbs": [-1, 10**9],
    "first_epsilon": [-1.0, NAN, "x"],
    "residual_factor": [0, NAN, INF, "x", None],
    "out_factor": [0, NAN, 10**400],
    "upload": ["x", None, "compact"],
}


def cases(base, wrong):
    for name, values in wrong.items():
        for value in values:
            changed = json.loads(json.dumps(base)) | {"digest": "00" * 32}
            *path, last = name.split(".")
            place = changed["plan"]
            for step in path:
                place = place[step]
            place[last] = value
            yield pytest.param(json.dumps(changed), id=f"{base['refattn']} {name} {str(value)[:20]}")


@pytest.mark.parametrize("text", [*cases(ATTENTION, WRONG), *cases(SIGMOID, WRONG_SIGMOID), *cases(LAYER, WRONG_LAYER)])
def test_a_plan_that_is_none_is_refused_at_once(text, monkeypatch):
    for kind in (Call, SigmoidPlan, LayerPlan):  # a liar reckons the digest, too
        monkeypatch.setattr(kind, "digest", property(lambda plan: bytes(32)))
    start = time.process_time()
    with pytest.raises(RefattnError) as refused:
        he.Client(plan_from_json(text))
    assert len(str(refused.value)) < 600
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"[" * 100000, "got what is no plan: RecursionError"),
        (b"\xff\xfe", "got what is no plan: JSONDecodeError"),
        (b"", "got what is no plan: JSONDecodeError"),
        (b"x" * (2**20 + 1), "got 1048577 bytes of a plan, expected at most 1048576"),
        (json.dumps(ATTENTION | {"version": "V"}).replace('"V"', "1" * 100000), "got what is no plan: ValueError"),
        (json.dumps(ATTENTION | {"version": [1]}), r"got a plan of version \[1\], expected 2"),
        (json.dumps(ATTENTION | {"digest": 1}), "the plan is not what its digest says"),
        (json.dumps(ATTENTION | {"plan": []}), "got what is no plan: "),
        (json.dumps(ATTENTION | {"plan": "x"}), "got what is no plan: "),
        (json.dumps(ATTENTION | {"plan": None}), "got what is no plan: "),
        (json.dumps(ATTENTION | {"refattn": {}}), "got {}, expected a plan of attention, of decoding, of a layer or"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_text_that_is_no_plan(text, expected):
    with pytest.raises(InvalidInput, match=expected):
        plan_from_json(text)


def test_a_plan_that_asks_for_too_much_is_refused():
    for base in (ATTENTION, SIGMOID, LAYER):
        made = plan_from_json(json.dumps(base))
        assert plan_from_json(json.dumps(base), max(made.key_bytes, made.upload_bytes)).digest == made.digest
        with pytest.raises(InvalidInput, match=r"asks for \d+ bytes of keys, expected at most most_bytes = 1000000"):
            plan_from_json(json.dumps(base), 10**6)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((1, 2**14, 2**8), r"n_k·d is 4194304, beyond the 1048576 that are planned; cut the call into several"),
        ((2**14, 64, 64, 64, 2**4), r"heads·n_q is 262144, beyond"),
        ((2**14, 2**10, 2**10, 2**10, 8), r"heads·n_q·n_k·d is \d+, beyond"),
    ],
)
def test_what_would_be_planned_for_hours_is_refused(sizes, text):
    with pytest.raises(UnsupportedProblem, match=f"he: {text}"):
        he.plan(*sizes, denominator=(1.0, 2.0), norms=(1.0, 1.0), value_most=1.0)


def test_the_largest_sizes_are_decided_soon():
    given = {"denominator": (1.0, 1e9), "norms": (1.0, 1.0), "value_most": 1.0, "tolerance": 1e-9}
    for sizes, mode in (
        ((2**14, 64, 64, 64, 8), "latency"),
        ((1, 2**14, 64, 64, 1), "latency"),
        ((2**14, 2**12, 4, 4, 1), "latency"),
        ((16, 2**8, 2**8, 2**8, 2**14), "throughput"),
        ((2**14, 16, 16, 16, 2**14), "throughput"),
    ):
        for divides in ("server", "client"):
            start = time.process_time()
            with contextlib.suppress(UnsupportedProblem):
                he.plan(*sizes, mode=mode, normalize=divides, **given)
            assert time.process_time() - start < 30, (sizes, mode, divides)


def test_a_polynomial_of_another_range_is_refused():
    given = {"denominator": (1.0, 40.0), "epsilon": 1.0, "norms": (4.0, 4.0), "value_most": 4.0}
    assert he.plan(4, 4, 4, inverse=Inverse(1.0, 40.0, 4), tolerance=1.0, **given)
    with pytest.raises(InvalidInput, match=r"inverse: got one for \(2.0, 40.0\), expected one for the denominator"):
        he.plan(4, 4, 4, inverse=Inverse(2.0, 40.0, 4), tolerance=1.0, **given)


def test_numbers_of_numpy_are_numbers():
    one = np.float32(1.0)
    made = he.plan(4, 4, 4, denominator=(one, np.float64(40)), epsilon=one, norms=[np.int64(4), 4], value_most=one)
    assert made.epsilon == 1.0
