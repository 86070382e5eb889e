"""Triple-wise attention on a GPU; what needs one is not run without."""

import numpy as np
import pytest

from refattn import InvalidProblem, UnsupportedProblem, tensor
from refattn.check.kernels import KERNELS
from refattn.tensor import device
from refattn.tensor.device_polynomial import polynomial

from .rounding import bounds
from .test_tensor import MASKS, arrays

GPU = pytest.mark.skipif(not KERNELS["refattn-gpu"].here, reason="needs an NVIDIA GPU and CuPy")


@GPU
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", ["tree", "rank_one"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pairwise_forms_are_the_definition(form, mask, dtype):
    torch = pytest.importorskip("torch")
    given = [
        torch.tensor(x, device="cuda").to(getattr(torch, dtype))
        for x in arrays(2, 4, 2, 70, 90, 130, 64, 64, "float32")
    ]
    options = {"form": form, **MASKS[mask]}
    out, lse = device.attention(*given, **options, accuracy="high")
    wide = [x.double().cpu().numpy() for x in given]
    expected, terms = tensor.attention(*wide, **options, return_lse=True)
    # roundings of v1 times the inner result, of the result, and of products of two results
    unit = 2.0**-8 if dtype == "bfloat16" else 2.0**-20
    assert np.abs(out.double().cpu().numpy() - expected).max() <= 6 * unit * np.abs(expected).max()
    empty = np.isneginf(terms)
    found = lse.double().cpu().numpy()
    assert np.array_equal(np.isneginf(found), empty)
    assert np.abs(np.where(empty, 0, found) - np.where(empty, 0, terms)).max() < 1e-3


# name: (b, h, h_kv, n_q, n1, n2, d), options
TRILINEAR = {
    "all keys": ((1, 2, 2, 60, 75, 90, 128), {}),
    "windows, a group of 64": ((2, 64, 1, 40, 40, 40, 128), {"causal": "bottom_right", "window": (9, 33)}),
    "the first window the longer": ((1, 64, 1, 30, 80, 30, 64), {"causal": "bottom_right", "window": (70, 5)}),
    "a group of 2": ((2, 4, 2, 70, 50, 70, 128), {"causal": "bottom_right", "window": (20, 30)}),
    "a group of 3": ((2, 6, 2, 65, 50, 80, 64), {"causal": "bottom_right", "window": (None, 50)}),
    "a group of 48, top left": ((1, 48, 1, 33, 50, 40, 64), {"causal": "top_left", "window": (5, 7)}),
    "rows without keys": ((1, 1, 1, 100, 60, 80, 96), {"causal": "bottom_right", "window": (17, None)}),
    "one key of a kind": ((2, 3, 3, 50, 60, 1, 72), {}),
    "one row": ((1, 128, 1, 1, 40, 300, 8), {"causal": "bottom_right", "window": (32, 200)}),
}


def on_gpu(shape, transposed, seed=0):
    """Return bfloat16 tensors, laid out (b, n, h, d) where transposed, and their values in float64."""
    torch = pytest.importorskip("torch")
    b, h, h_kv, n_q, n1, n2, d = shape
    host = [*arrays(b, h, h_kv, n_q, n1, n2, d, d, "float32", seed), arrays(b, h, h, n_q, 1, 1, d, d, "float32", 9)[0]]
    made = []
    for x in host:
        t = torch.tensor(x, device="cuda").to(torch.bfloat16)
        made.append(t.transpose(1, 2).contiguous().transpose(1, 2) if transposed else t)
    return made, [x.double().cpu().numpy() for x in made]


def within(found, value, bound, what):
    """Assert that a result is within the bound on its error, element by element."""
    error = np.abs(found.double().cpu().numpy() - value)
    assert (error <= bound).all(), f"{what}: error over bound {np.nanmax(error / np.maximum(bound, 1e-300)):.3g}"


@GPU
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", TRILINEAR)
def test_the_trilinear_kernels_keep_their_rounding_model(name, transposed):
    shape, options = TRILINEAR[name]
    given, wide = on_gpu(shape, transposed)
    scale = shape[-1] ** -0.5
    out, lse = device.attention(*given[:5], form="trilinear", scale=scale, **options)
    grads = device.backward(*given[:5], out, lse, given[5], scale=scale, **options)
    (value, bound), (terms, spread), expected = bounds(*wide, scale, **options)
    within(out, value, bound, "out")
    found = lse.double().cpu().numpy()
    assert np.array_equal(np.isneginf(found), np.isneginf(terms))
    here = np.isfinite(terms)
    assert (np.abs(found[here] - terms[here]) <= spread[here]).all()
    for g, (v, e), what in zip(grads, expected, ("query", "k1", "k2", "v1", "v2"), strict=True):
        within(g, v, e, f"gradient of {what}")


@GPU
def test_trilinear_gradients_are_the_same_each_time():
    torch = pytest.importorskip("torch")
    given, _ = on_gpu((2, 64, 1, 130, 130, 130, 128), transposed=False)
    options = {"causal": "bottom_right", "window": (32, 100)}
    out, lse = device.attention(*given[:5], form="trilinear", **options)
    first, *others = (device.backward(*given[:5], out, lse, given[5], **options) for _ in range(4))
    assert all(torch.equal(x, y) for more in others for x, y in zip(first, more, strict=True))


@GPU
def test_what_the_trilinear_kernel_does_not_take_is_named():
    given, _ = on_gpu((1, 2, 2, 9, 9, 9, 64), transposed=False)
    with pytest.raises(UnsupportedProblem, match="takes bfloat16, got float32"):
        device.attention(*(x.float() for x in given[:5]), form="trilinear")
    with pytest.raises(UnsupportedProblem, match=r"takes a scale above 0, got -1\.0"):
        device.attention(*given[:5], form="trilinear", scale=-1.0)
    with pytest.raises(UnsupportedProblem, match="multiples of 8 up to 128, got 60 and 60"):
        device.attention(*(x[..., :60].contiguous() for x in given[:5]), form="trilinear")
    with pytest.raises(UnsupportedProblem, match=r"query: .* multiples of 16 bytes"):
        device.attention(*(x[..., 4:60] for x in given[:5]), form="trilinear")
    out, lse = device.attention(*given[:5], form="trilinear")
    with pytest.raises(InvalidProblem, match=r"lse: got shape \(1, 2, 8\) of float32, expected \(1, 2, 9\) of float32"):
        device.backward(*given[:5], out, lse[..., :8], given[5])


@GPU
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", ["torch", "cupy"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_polynomial_on_a_gpu_keeps_its_bound(order, library, dtype):
    xp = pytest.importorskip(library)
    rng = np.random.default_rng(order)
    shapes = [(2, 3, 70, 4), *((2, 3, 30 + t, 4) for t in range(order)), *((2, 3, 30 + t, 5) for t in range(order))]
    host = [rng.uniform(-0.6, 0.6, s).astype(dtype) for s in shapes]
    given = [xp.asarray(x, device="cuda") if library == "torch" else xp.asarray(x) for x in host]
    tolerance = 1e-3 if dtype == "float32" else 1e-8
    found = polynomial(given[0], given[1 : order + 1], given[order + 1 :], tolerance=tolerance)
    cpu = tensor.polynomial(host[0], host[1 : order + 1], host[order + 1 :], tolerance=tolerance)
    assert (found.degree, found.kind) == (cpu.degree, cpu.kind)
    np.testing.assert_allclose(found.bound, cpu.bound, rtol=1e-9)
    wide = [x.astype(np.float64) for x in host]
    exact = np.empty((*found.bound.shape, 5))
    for b, h in np.ndindex(2, 3):
        axes = "jkl"[:order]
        names = [f"{x}d" for x in axes]
        s = np.einsum(",".join(["id", *names]) + f"->i{axes}", *(x[b, h] for x in wide[: order + 1])) / 4
        p = np.exp(s) / np.exp(s).sum(tuple(range(1, order + 1)), keepdims=True)
        terms = [f"{x}c" for x in axes]
        exact[b, h] = np.einsum(",".join([f"i{axes}", *terms]) + "->ic", p, *(x[b, h] for x in wide[order + 1 :]))
    out = found.out.cpu().numpy() if library == "torch" else found.out.get()
    assert (np.abs(out - exact).max(3) <= found.bound).all()
    assert found.bound.max() <= tolerance


@GPU
def test_what_the_polynomial_on_a_gpu_does_not_take_is_named():
    torch = pytest.importorskip("torch")
    q, k1, k2, v1, v2 = (torch.tensor(x, device="cuda") for x in arrays(dtype="float32", size=0.3))
    with pytest.raises(UnsupportedProblem, match="takes float32 and float64 of PyTorch or CuPy, got float16"):
        polynomial(q.half(), (k1.half(),), (v1.half(),))
    with pytest.raises(InvalidProblem, match=r"v2: got shape \(1, 1, 6, 3\), expected \(1, 1, 7, 3\)"):
        polynomial(q, (k1, k2), (v1, v1))
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(UnsupportedProblem, match=r"the bound needs torch\.set_float32_matmul_precision"):
            polynomial(q, (k1, k2), (v1, v2))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_bounds_are_of_the_definition():
    rng = np.random.default_rng(3)
    q, k1, k2, v1, v2 = arrays(2, 4, 2, 9, 8, 11, 6, 6)
    options = {"causal": "bottom_right", "window": (4, 6)}
    (out, _), (lse, _), grads = bounds(q, k1, k2, v1, v2, d_out := rng.standard_normal(q.shape), 0.3, **options)
    expected, terms = tensor.attention(q, k1, k2, v1, v2, scale=0.3, return_lse=True, **options)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    np.testing.assert_allclose(lse, terms, atol=1e-12)
    slow = tensor.backward(q, k1, k2, v1, v2, d_out, scale=0.3, **options)
    for (g, _), e in zip(grads, slow, strict=True):
        np.testing.assert_allclose(g, e, atol=1e-12)


def test_a_kernel_that_drops_a_pair_breaks_the_bound():
    given = arrays(1, 2, 2, 6, 9, 7, 64, 64)
    (out, bound), _, _ = bounds(*given, given[0], 64**-0.5)
    fewer = tensor.attention(*(x[:, :, :8] if i in (1, 3) else x for i, x in enumerate(given)), scale=64**-0.5)
    assert (np.abs(fewer - out) > bound).any()


def test_forms_without_a_kernel_are_named():
    with pytest.raises(UnsupportedProblem, match="the form 'strassen' with accuracy 'fast' is not there on a GPU; "):
        device.attention(*arrays(), form="strassen")
    with pytest.raises(UnsupportedProblem, match="the form 'trilinear' with accuracy 'high' is not there on a GPU; "):
        device.attention(*arrays(), form="trilinear", accuracy="high")
    with pytest.raises(InvalidProblem, match="accuracy: got 'best', expected 'fast' or 'high'"):
        device.attention(*arrays(), form="tree", accuracy="best")
