"""CuPy and the kernels: what is missing is said, products of any layout, and what nvcc makes of the kernels."""

import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import refattn
from refattn import Problem, UnsupportedProblem
from refattn.arrays import cupy_with_gpu
from refattn.errors import InvalidProblem
from refattn.exact import elementwise
from refattn.exact.device import asked, finish
from refattn.exact.device.card import KERNELS, OPTIONS, Card, text_of
from refattn.exact.device.finish import text_finish
from tests.conftest import NIGHTLY
from tests.gpu.compiled import NVCC, check_compiles
from tests.he.device.emulated import GXX

from .cupys_part import cupys_part

CALL = Problem(*(np.ones((1, 1, 2, 2)) for _ in range(3)))


def test_without_cupy_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnsupportedProblem, match=r"device='cuda' needs the package cupy .*pip install"):
        refattn.evaluate(CALL, rounding="float64", device="cuda")


def test_without_a_gpu_it_is_said(monkeypatch, tmp_path):
    module = cupys_part(tmp_path, gpus=0)
    monkeypatch.setitem(sys.modules, "cupy", module)
    with pytest.raises(UnsupportedProblem, match="device='cuda' finds no GPU; use device='cpu'"):
        cupy_with_gpu()

    def none():
        raise module.cuda.runtime.CUDARuntimeError("no driver")

    module.cuda.runtime.getDeviceCount = none
    with pytest.raises(UnsupportedProblem, match=r"device='cuda' finds no GPU \(no driver\)"):
        cupy_with_gpu()


@pytest.mark.parametrize(
    "name", ["key", "key_scale", "block_table", "lengths_k", "new_value", "offset", "cu_seqlens_q", "alibi_slopes"]
)
def test_an_array_on_another_gpu_is_refused(monkeypatch, name):
    """Whatever it is of the call: a scale, a table of pages, new keys, lengths."""
    there = np.full((1, 1, 1, 1), 2.0)
    monkeypatch.setattr(asked, "_gpu_of", lambda x: 1 if x is there else None)
    p = Problem(CALL.query, CALL.key, CALL.value)
    object.__setattr__(p, name, there)
    with pytest.raises(
        InvalidProblem, match=rf"{name}: is on GPU 1, device='cuda:0' is GPU 0; move it, or use .*cuda:1"
    ):
        asked.asked("cuda:0", p, "float64")


def test_the_gpu_of_an_array_is_its_librarys(monkeypatch):
    monkeypatch.setattr(asked, "kind_of", lambda x: x.kind)
    place = SimpleNamespace
    jax = [place(platform="cpu"), place(platform="gpu", local_hardware_id=2)]
    for x, expected in (
        (place(kind="cupy", device=place(id=1)), 1),
        (place(kind="torch", device=place(index=3), is_cuda=True), 3),
        (place(kind="torch", device=place(index=None), is_cuda=False), None),
        (place(kind="jax", devices=lambda: jax), 2),
        (place(kind="jax", devices=lambda: jax[:1]), None),
        (place(kind=None), None),
    ):
        assert asked._gpu_of(x) == expected


@GXX
@pytest.mark.parametrize("level", [0, 1, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_cuts_are_the_cpus_wherever_parts_lie(folder, level, turned):
    card, rng = Card(cupys_part(folder), 0), np.random.default_rng(level)
    x, low = rng.standard_normal((37, 300)), rng.standard_normal((37, 300)) * 2.0**-55
    sigma = 1.5 * 2.0 ** (52 - 20 - 21 * np.arange(level)[:, None] + np.ones(37))
    made, there = card.xp.asarray, (lambda a: np.ascontiguousarray(a.T).T) if turned else lambda a: a
    for y in (low, np.zeros((1, 1))):
        y = np.broadcast_to(y, x.shape)
        heads, tails = np.zeros((level, 37, 300)), np.zeros((level + 1, 37, 300))
        elementwise.cut(x, y, sigma, heads, tails)
        room = card.xp.zeros
        for mine in (
            [room((n, 37, 300))[::-1] for n in (level, level + 1)],
            [np.moveaxis(room((37, n, 300)), 1, 0) for n in (level, level + 1)],
            [np.moveaxis(room((n, 300, 37)), 1, 2) for n in (level, level + 1)],
        ):
            spread = y if y.strides[1] else y[:1, :1]
            card.cut(made(there(x)), np.broadcast_to(made(spread), x.shape), made(sigma), *mine)
            assert (mine[0].get() == heads).all()
            assert (mine[1].get() == tails).all()


@GXX
def test_products_of_any_layout(tmp_path):
    card, rng = Card(cupys_part(tmp_path), 0), np.random.default_rng(0)
    a, b = rng.standard_normal((5, 7)), rng.standard_normal((7, 4))
    made = card.xp.asarray
    wide, deep = rng.standard_normal((5, 20)), rng.standard_normal((20, 4))
    wide[:, 3:10], deep[6:13] = a, b
    lefts = made(a), made(np.ascontiguousarray(a.T)).T, made(wide)[:, 3:10]
    rights = made(b), made(np.ascontiguousarray(b.T)).T, made(deep)[6:13]
    for x in lefts:
        for y in rights:
            planes = card.xp.zeros((5, 3, 4))
            card.matmul(x, y, planes[:, 1])
            assert (planes.get()[:, 1] == a @ b).all()
            assert not planes.get()[:, ::2].any()
    thin = card.xp.zeros((1, 1))
    card.matmul(lefts[0][:1], rights[0][:, :1], thin)
    assert float(thin[0, 0]) == (a[:1] @ b[:, :1])[0, 0]
    with pytest.raises(UnsupportedProblem, match="no axis of unit stride"):
        card.matmul(made(wide)[:, ::2], made(deep)[::2], card.xp.zeros((5, 4)))


@NVCC
@pytest.mark.parametrize("level", range(4) if NIGHTLY else (2, 3))
def test_kernels_compile_without_spills(tmp_path, level):
    check_compiles(tmp_path / "kernels.cu", text_of(level))
    check_compiles(tmp_path / "finish.cu", text_finish(level))


def test_no_product_is_fused_by_the_compiler():
    assert "--fmad=false" in OPTIONS
    names = re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(", text_of(0))
    assert tuple(names) == KERNELS


@GXX
@pytest.mark.parametrize("shape", [(1, 1), (37, 300), (70, 3), (3, 0), (0, 3)])
def test_sizes_are_the_cpus_wherever_rows_lie(folder, shape, monkeypatch):
    monkeypatch.setattr(finish, "SHORTEST", 7)
    card, rng = Card(cupys_part(folder), 0), np.random.default_rng(0)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-600, 300, (shape[0], 1))
    x[::3] = 0.0
    wide = np.full((shape[0], shape[1] + 2), np.inf)  # of which the middle is taken
    wide[:, 1:-1] = x
    there = card.xp.asarray(wide)[:, 1:-1], card.xp.asarray(np.ascontiguousarray(wide.T)).T[:, 1:-1]
    for a in there:
        most, total, norm = (y.get() for y in card.sizes(a))
        assert (most == np.abs(x).max(1, initial=0.0)).all()
        exact = np.abs(x).sum(1)
        assert (np.abs(total - exact) <= 2 * shape[1] * 2.0**-53 * exact).all()  # sums in two orders
        true = np.array([math.hypot(*row) for row in x.tolist()])
        assert (norm >= true).all()
        assert (norm <= true * (1 + 2.0**-39) + 2.0**-519).all()
