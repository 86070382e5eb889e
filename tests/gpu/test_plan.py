import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, UnsupportedProblem
from refattn.gpu import attention, plan
from refattn.gpu.attention import _check
from refattn.gpu.views import View, view

SHAPES = ((2, 8, 100, 64), (2, 2, 300, 64), (2, 2, 300, 64))


def changed(d=64, d_v=None, n_q=100):
    return ((2, 8, n_q, d), (2, 2, 300, d), (2, 2, 300, d_v or d))


def test_what_runs_and_why():
    p = plan(SHAPES, "bfloat16", causal="bottom_right", accuracy="high")
    assert (p.impl, p.why) == ("sm90", "bfloat16, head dim 64 in tiles of 64, compute capability 9.0")
    assert (p.macros["BF16"], p.macros["CAUSAL"], p.macros["HIGH"]) == (1, 1, 1)
    for d, width in ((8, 64), (72, 128), (128, 128), (192, 256)):
        assert plan(changed(d), "float16").macros["HEAD_DIM"] == width


@pytest.mark.parametrize(
    ("shapes", "dtype", "more", "text"),
    [
        (SHAPES, "float32", {}, "takes float16 and bfloat16, got float32"),
        (changed(60), "float16", {}, "takes equal head dims, multiples of 8 up to 256, got 60 and 60"),
        (changed(264), "float16", {}, "up to 256, got 264 and 264"),
        (changed(64, 128), "float16", {}, "got 64 and 128"),
        (SHAPES, "float16", {"scale": 0.0}, "takes a scale above 0, got 0.0"),
        (SHAPES, "float16", {"causal": "top_left"}, "takes causal='top_left' only with n_q = n_k, got 100 and 300"),
        (SHAPES, "float16", {"capability": (8, 0)}, "needs compute capability 9.0, got 8.0"),
        (changed(n_q=2**30), "float16", {}, r"takes fewer than 2\*\*30 rows and keys"),
    ],
)
def test_what_is_not_supported_says_why(shapes, dtype, more, text):
    with pytest.raises(UnsupportedProblem, match=f"gpu: the kernel sm90 .*{text}"):
        plan(shapes, dtype, **more)


def test_names_are_checked():
    with pytest.raises(InvalidInput, match="accuracy: got 'exact', expected one of fast, high"):
        plan(SHAPES, "float16", accuracy="exact")
    with pytest.raises(InvalidInput, match="impl: got 'sm80', expected one of sm90"):
        plan(SHAPES, "float16", impl="sm80")


def test_arrays_that_are_not_on_a_gpu():
    x = np.zeros((1, 1, 4, 64), np.float16)
    with pytest.raises(
        UnsupportedProblem, match="query: got an array of numpy, expected one of cupy or torch on a GPU"
    ):
        attention(x, x, x)
    with pytest.raises(InvalidProblem, match="query: got list, expected an array of cupy or torch on a GPU"):
        attention([1], x, x)
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidProblem, match=r"query: is on device cpu, expected a GPU; move it with query.cuda\(\)"):
        view(torch.zeros(1), "query")


@pytest.mark.parametrize(
    ("shapes", "more", "text"),
    [
        (
            ((2, 8, 64), (2, 8, 4, 64), (2, 8, 4, 64)),
            {},
            r"query: got shape \(2, 8, 64\), expected \(batch, heads, n, d\)",
        ),
        (((2, 8, 4, 64), (1, 8, 4, 64), (1, 8, 4, 64)), {}, "which do not fit query's"),
        (((2, 8, 4, 64), (2, 3, 4, 64), (2, 3, 4, 64)), {}, "key: got 3 heads, expected a divisor of query's 8"),
        (SHAPES, {"scale": float("nan")}, "scale: got nan, expected a finite number"),
        (SHAPES, {"causal": "left"}, "causal: got 'left', expected None, 'bottom_right' or 'top_left'"),
    ],
)
def test_shapes_that_do_not_fit(shapes, more, text):
    views = [View(0, s, (0,) * len(s), "float16", 0) for s in shapes]
    with pytest.raises(InvalidProblem, match=text):
        _check(*views, more.get("scale"), more.get("causal"))


def test_types_that_do_not_fit():
    q, k = (View(0, (1, 1, 4, 64), (256, 256, 64, 1), t, 0) for t in ("float16", "bfloat16"))
    with pytest.raises(InvalidProblem, match="key: got bfloat16 on GPU 0, expected query's float16 on GPU 0"):
        _check(q, k, k, None, None)
