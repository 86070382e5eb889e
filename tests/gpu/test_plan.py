import numpy as np
import pytest

from refattn import InvalidInput, InvalidProblem, Problem, UnsupportedProblem
from refattn.gpu import attention, plan
from refattn.gpu.views import side_by_side, view


def problem(dtype="float16", d=64, d_v=None, n_q=100, n_k=300, **options):
    shapes = ((2, 8, n_q, d), (2, 2, n_k, d), (2, 2, n_k, d_v or d))
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    return Problem(*(np.zeros(s, dtype) for s in shapes), **options)


def test_products_end_where_head_dims_do_and_windows_take_no_turns():
    own = plan(problem(d=88, d_v=72), impl="sm90", capability=(9, 0))
    text = own.kernel.source(own.macros)
    assert (own.macros["WIDTH_V"], own.macros["STEPS_K"], own.macros["STEPS_V"]) == (96, 6, 5)
    assert [n for n in (64, 72, 80, 88, 96) if f"m64n{n}k16" in text] == [80, 96]  # O of 80 columns; S of 96 keys
    turns = [plan(problem(window=w), impl="sm90", capability=(9, 0)).macros["PINGPONG"] for w in (None, (5, 0))]
    assert turns == [1, 0]


def test_short_causal_calls_have_smaller_tiles():
    found = [plan(problem(n_q=n, n_k=n, causal="top_left"), impl="sm90").macros for n in (512, 513, 1024, 1025)]
    assert [m["CONSUMERS"] for m in found] == [3, 2, 2, 3]
    assert [m["PINGPONG"] for m in found] == [1, 0, 0, 1]
    assert {m["BLOCK_N"] for m in found} == {128}  # the same keys in a step: the same bits
    windows = plan(problem(n_q=999, n_k=999, causal="top_left", softcap=2.0), impl="sm90").macros
    assert windows["PINGPONG"] == 1


def test_what_runs_and_why():
    p = plan(problem("bfloat16", causal="bottom_right"), accuracy="high")
    few = "the kernel decode takes 1 to 16 queries, got 100"
    assert (p.impl, p.why) == ("sm90", f"bfloat16 on Hopper's tensor cores, head dims 64 and 64 in tiles of 64; {few}")
    assert (p.macros["BF16"], p.macros["RIGHT"], p.macros["LEFT"], p.macros["HIGH"]) == (1, 1, 0, 1)
    for d, width in ((8, 64), (72, 96), (128, 128), (192, 192), (200, 256)):
        m = plan(problem(d=d)).macros
        assert (m["WIDTH_K"], m["WIDTH_V"], m["STEPS_K"]) == (width, width, -(-d // 16))
    p = plan(problem(d=192, d_v=128, window=(10, 0), softcap=2.0))
    assert p.why.startswith("float16 on Hopper's tensor cores, head dims 192 and 128 in tiles of 192 and 128; ")
    assert [p.macros[n] for n in ("RIGHT", "LEFT", "SOFTCAP")] == [1, 1, 1]
    p = plan(problem("float32"))
    assert p.impl == "simt"
    assert p.why == (
        "products and sums in float32; the kernel decode takes float16 and bfloat16, got float32; "
        "the kernel sm90 takes float16 and bfloat16, got float32; "
        "the kernel latent takes head dims of which one is above 256, up to 576 and 512, got 64 and 64; "
        "the kernel mma takes float16 and bfloat16, got float32"
    )
    p = plan(problem(d=60))
    assert (p.impl, p.why) == (
        "mma",
        f"float16 on tensor cores by mma.sync; {few}; "
        "the kernel sm90 takes head dims that are multiples of 8 up to 256, got 60 and 60; "
        "the kernel latent takes head dims of which one is above 256, up to 576 and 512, got 60 and 60",
    )
    assert plan(problem(), capability=(8, 0)).impl == "mma"
    assert plan(problem(), capability=(7, 0)).impl == "simt"
    assert plan(problem(), impl="simt").impl == "simt"


@pytest.mark.parametrize(
    ("given", "more", "text"),
    [
        ({"dtype": "float32"}, {}, "sm90 takes float16 and bfloat16, got float32"),
        ({"d": 60}, {}, "sm90 takes head dims that are multiples of 8 up to 256, got 60 and 60"),
        ({"d_v": 260}, {}, "sm90 takes head dims that are multiples of 8 up to 256, got 64 and 260"),
        ({"bias": np.zeros((1, 1, 1, 1))}, {}, "sm90 takes a bias of float16 or float32, got float64"),
        ({}, {"capability": (8, 0)}, "sm90 needs compute capability 9.0, got 8.0"),
        ({"n_k": 0}, {}, "sm90 needs at least one key"),
        (
            {"softcap": 2.0, "window": (3, 3)},
            {"block_mask": (1, 3, 128, 128)},
            "sm90 takes block masks without window, softcap",
        ),
        (
            {"d": 96},
            {"block_mask": (1, 3, 128, 128)},
            "sm90 takes block masks with equal head dims in tiles of 64, 128 or 256, got 96 and 96",
        ),
        (
            {},
            {"block_mask": (2, 5, 64, 64)},
            "sm90 takes block masks of multiples of 128 rows and 128 keys, got 64 and 64",
        ),
        ({}, {"impl": "mma", "capability": (7, 5)}, "mma needs compute capability 8.0 or later, got 7.5"),
        ({"dtype": "float32"}, {"impl": "mma"}, "mma takes float16 and bfloat16, got float32"),
        ({"d": 264}, {"impl": "mma"}, "mma takes head dims up to 256, got 264 and 264"),
        (
            {"d": 200, "window": (3, 3)},
            {"impl": "mma", "accuracy": "high"},
            "mma takes accuracy='high' with a bias, masks, a window or packed sequences for head dims up to 128, "
            "got 200 and 200",
        ),
        ({"bias": np.zeros((1, 1, 1, 1))}, {"impl": "mma"}, "mma takes a bias of float16 or float32, got float64"),
        ({"bias": np.zeros((1, 1, 1, 1))}, {"impl": "simt"}, "simt takes a bias of float16 or float32, got float64"),
        ({"d": 264}, {"impl": "simt"}, "simt takes head dims up to 256, got 264 and 264"),
        ({}, {"impl": "simt", "capability": (6, 1)}, "simt needs compute capability 7.0 or later, got 6.1"),
    ],
)
def test_what_is_not_supported_says_why(given, more, text):
    if "block_mask" in more:
        rows, columns, block_q, block_k = more["block_mask"]
        more = more | {"block_mask": (np.ones((1, 1, rows, columns), bool), block_q, block_k)}
    with pytest.raises(UnsupportedProblem) as e:
        plan(problem(**given), **({"impl": "sm90"} | more))
    assert str(e.value) == f"gpu: the kernel {text}"


def test_what_no_kernel_takes_names_every_obstacle():
    with pytest.raises(
        UnsupportedProblem,
        match=r"gpu: the kernel decode .*; .* sm90 .*; .* latent .* 576 .*; .* mma .*; the kernel simt .* 256",
    ):
        plan(problem(d=584))
    with pytest.raises(UnsupportedProblem, match="gpu: computes variant 'softmax', got 'power'"):
        plan(problem(variant="power"))


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (5, r"block_mask: expected \(blocks, block_q, block_k\)"),
        ((np.ones((1, 1, 1, 3), bool), 128, 0), "got blocks of 128 rows and 0 keys, expected at least 1"),
        ((np.ones((1, 1, 1, 3)), 128, 128), "block_mask: got dtype float64, expected bool"),
        (
            (np.ones((1, 1, 2, 3), bool), 128, 128),
            r"block_mask: got shape \(1, 1, 2, 3\), expected \(2, 8, 1, 3\), or 1 in place of its first two axes",
        ),
        (([[True]], 128, 128), "block_mask: is of None and query of numpy"),
    ],
)
def test_block_masks_that_do_not_fit(mask, text):
    with pytest.raises(InvalidProblem, match=text):
        plan(problem(), block_mask=mask)


def test_names_are_checked():
    with pytest.raises(InvalidInput, match="accuracy: got 'exact', expected one of fast, high"):
        plan(problem(), accuracy="exact")
    with pytest.raises(InvalidInput, match="impl: got 'sm80', expected one of decode, sm90, latent, mma, simt"):
        plan(problem(), impl="sm80")


def test_arrays_that_are_not_on_a_gpu():
    x = np.zeros((1, 1, 4, 64), np.float16)
    expected = "expected one of cupy, torch or jax on a GPU"
    with pytest.raises(UnsupportedProblem, match=f"query: got an array of numpy, {expected}"):
        attention(x, x, x)
    with pytest.raises(InvalidProblem, match="query: got list, expected an array of cupy, torch or jax on a GPU"):
        attention([1], x, x)
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidProblem, match=r"query: is on device cpu, expected a GPU; move it with query.cuda\(\)"):
        view(torch.zeros(1), "query")
    jax = pytest.importorskip("jax")
    with pytest.raises(InvalidProblem, match=r"key: is on device .*, expected one GPU; move it with jax.device_put"):
        view(jax.device_put(jax.numpy.zeros(1), jax.devices("cpu")[0]), "key")


def test_a_gradient_whose_last_axis_is_spread_is_copied():
    torch = pytest.importorskip("torch")
    whole, turned = torch.ones(2, 3, 4), torch.arange(24.0).reshape(2, 4, 3).transpose(1, 2)
    assert side_by_side(whole) is whole
    assert side_by_side(whole.transpose(0, 1)).data_ptr() == whole.data_ptr()
    for x in (turned, torch.ones(()).expand(2, 3, 4)):
        assert side_by_side(x).stride(-1) == 1
        assert torch.equal(side_by_side(x), x)
