"""Exact answers made on a GPU, by a stand-in: the same verdicts, what it cannot do counted, no GPU said."""

import sys
from dataclasses import replace

import numpy as np
import pytest

import refattn
from refattn import Capabilities, Problem, UnsupportedProblem, check_kernel
from refattn.check import runner
from refattn.check.ahead import Ahead, for_the_gpu
from refattn.check.bounds import expected, truth
from refattn.check.bounds.forward import forward
from refattn.check.kernels.tiled import tiled
from refattn.check.model import UNDECLARED, flash
from refattn.exact.driver import enclose
from tests.exact.device.conftest import folder, stand_in, trusted  # noqa: F401  fixtures
from tests.he.device.emulated import GXX

ABLE = Capabilities(lse=True)


@pytest.fixture
def all_there(trusted, monkeypatch):  # noqa: F811
    """Have every exact answer of a kernel made on the stand-in."""
    monkeypatch.setattr(truth, "START", 0.0)
    monkeypatch.setattr(truth, "SCORE", 1.0)
    monkeypatch.setattr(runner, "device_of", lambda able: "cuda")
    expected.forget()
    yield trusted
    expected.forget()


def test_a_kernels_gpu():
    of = lambda **more: truth.device_of(Capabilities(**more))  # noqa: E731
    assert of() == of(arrays="torch") == of(arrays="torch", device="mps") == "cpu"
    assert of(arrays="torch", device="cuda") == of(arrays="cupy") == "cuda"
    assert of(arrays="torch", device="cuda:1") == of(arrays="cupy", device="1") == "cuda:1"
    assert truth.device_of(UNDECLARED) == "cpu"


def test_it_pays_where_rows_and_keys_are_many():
    def call(n, m):
        return Problem(np.ones((1, 1, n, 1)), np.ones((1, 1, m, 1)), np.ones((1, 1, m, 1)))

    assert truth.pays(call(2**13, 2**14), False)
    assert not truth.pays(call(64, 64), False)
    assert not truth.pays(call(1, 2**16), False)  # the copy takes longer
    assert truth.pays(call(2**12, 2**13), True)
    assert not truth.pays(call(2**12, 2**13), False)  # less than a start's time


@pytest.mark.parametrize("more", [{"causal": "bottom_right"}, {"sink": np.array([0.5]), "out_scale": 3.0}])
def test_bounds_made_there_are_the_cpus(trusted, monkeypatch, more):  # noqa: F811
    rng, made, real = np.random.default_rng(0), [], trusted.asarray
    p = Problem(*(rng.standard_normal((1, 1, n, 8)).astype(np.float32) for n in (9, 70, 70)), **more)
    answer, model = refattn.evaluate(p), replace(flash("bfloat16"), split=32)
    here = forward(answer, model)
    monkeypatch.setattr(truth, "MANY", 0)
    monkeypatch.setattr(truth, "cupy_with_gpu", lambda: trusted)
    monkeypatch.setattr(trusted, "asarray", lambda x, *type: made.append(x.shape) or real(x, *type))
    with truth.on_device("cuda"):
        there = forward(answer, model)
    assert (9, 8) in made
    for mine, theirs in zip(there, here, strict=True):
        for name in ("out", "lse"):  # sums over keys of what is not negative, in another order
            assert (np.abs(mine[name] - theirs[name]) <= 8 * p.n_k * 2.0**-53 * theirs[name]).all()


def wrong(problem):
    """Forget the last key."""
    p = problem
    if p.n_k < 2 or p.allowed is not None or p.bias is not None or p.weight is not None:
        return tiled(p)
    return tiled(p.replace(key=p.key[:, :, :-1], value=p.value[:, :, :-1]))


@GXX
@pytest.mark.parametrize(("kernel", "only"), [(tiled, "gaussian/w*"), (wrong, "gaussian/dim-*"), (tiled, "calls/000*")])
def test_verdicts_are_the_cpus(all_there, monkeypatch, kernel, only):
    more = {"only": only, "budget": "quick", "seed": 3, "capabilities": ABLE, "dtypes": ["float32"]}
    there = check_kernel(kernel, **more)
    monkeypatch.setattr(runner, "device_of", lambda able: "cpu")
    expected.forget()
    here = check_kernel(kernel, **more)
    assert here.truth == ""
    assert [(c.name, c.verdict) for c in there.checks] == [(c.name, c.verdict) for c in here.checks]
    for a, b in zip(there.checks, here.checks, strict=True):  # a radius is less than 2**-16 of what float32 may lose
        assert np.array_equal(a.ratio, b.ratio, equal_nan=True) or abs(a.ratio - b.ratio) <= 2.0**-16 * b.ratio
    assert there.right == (kernel is tiled)
    assert "exact answers of large calls: " in there.truth
    assert there.truth in str(there.to_dict())
    assert {name for name, _ in all_there.seen.launched} >= {"weigh"}


@GXX
def test_what_it_does_not_compute_goes_to_the_cpu_and_is_counted(all_there):
    plain = lambda p: refattn.reference(p)["out"].astype(np.float32)  # noqa: E731
    report = check_kernel(plain, "lightning", only="gaussian/decay[float32]", capabilities=Capabilities())
    assert report.right
    text = "exact answers of large calls: 0 made on cuda, 1 on the CPU, the last because of this: device: lightning"
    assert report.truth.startswith(text)


@GXX
def test_what_is_wrong_with_a_call_is_raised(all_there):
    rng = np.random.default_rng(0)
    p = Problem(*(rng.standard_normal((1, 1, 3, 2)) for _ in range(3)))
    key = p.key.copy()
    key[0, 0, 0] = np.nan
    with truth.on_device("cuda") as found:
        with pytest.raises(UnsupportedProblem, match="gradients: NaN or inf in sight"):
            truth.made_by(enclose, p.replace(key=key), np.ones(p.out_shape))
        assert (found.there, found.here) == (0, 0)
        a = truth.made_by(enclose, p, np.ones(p.out_shape))
        assert (found.there, found.here) == (1, 0)
    b = enclose(p, gradients=np.ones(p.out_shape))
    for name, x in a.enclosures.items():
        y = b.enclosures[name]
        assert isinstance(x.mid, np.ndarray)
        assert (np.abs((x.mid - y.mid) + (x.tail - y.tail)) <= x.radius + y.radius).all()


@GXX
def test_answers_that_are_made_there_are_not_made_in_other_processes(all_there, monkeypatch):
    keys = [i.key for i in runner.plan(tiled, capabilities=ABLE, only="calls/*", seed=1) if i.key]
    with truth.on_device("cuda"):
        with Ahead(keys, 2) as ahead:
            assert not ahead._left
            assert not ahead._made
        monkeypatch.undo()  # with what it costs, calls of a few thousand keys stay with the CPU's processes
        assert not any(for_the_gpu(k) for k in keys)
        long = replace(keys[0][0], build=replace(keys[0][0].build, lengths=((64, 2**18),), h_kv=1))
        assert for_the_gpu((long, *keys[0][1:]))
    assert not for_the_gpu((long, *keys[0][1:]))


def test_without_a_gpu_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(runner, "device_of", lambda able: "cuda")
    report = check_kernel(tiled, only="gaussian/plain[float32]", capabilities=ABLE)
    assert report.right
    assert report.truth.startswith("exact answers were made on the CPU: device='cuda' needs the package cupy")


def test_enclosures_name_their_device():
    p = Problem(*(np.ones((1, 1, 2, 2)) for _ in range(3)))
    with pytest.raises(refattn.InvalidInput, match="device: got 'gpu', expected 'cpu', 'cuda'"):
        enclose(p, device="gpu")
