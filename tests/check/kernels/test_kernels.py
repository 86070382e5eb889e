"""Real kernels: what is known to be wrong with them is found and named, without being told."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest

from refattn import InvalidInput, Problem, UnsupportedProblem, check_kernel, check_problem
from refattn.check.bounds.truth import device_of
from refattn.check.kernels import _FEXP_ERROR, KERNELS, find, found
from refattn.dtypes import FORMATS
from refattn.variants.variant import COMMON_FAMILIES

from ...conftest import NIGHTLY, SMALL, tensor


def run(name, only=SMALL, dtypes=("float32",), gradients=True):
    (entry,) = find(name)
    able = entry.capabilities if gradients else replace(entry.capabilities, gradients=frozenset())
    given = {"model": entry.model, "capabilities": able, "dtypes": dtypes, "name": name}
    reports = [check_kernel(entry.kernel(), only=x, **given) for x in ([only] if isinstance(only, str) else only)]
    return replace(reports[0], checks=tuple(c for r in reports for c in r.checks))


WITHOUT_LAWS = [f"{n}/*" for n in (*COMMON_FAMILIES, "shifted", "extreme")]
"""Laws call a kernel thousands of times, which takes slow ones a minute."""


def failed(report):
    """The messages of the forward checks that fail, without where the errors lie."""
    found = {c.name.split("[")[0]: c.message for c in report.failures if "/gradients" not in c.name}
    return {n: "; ".join(part for part in m.split("; ") if not part.startswith("only ")) for n, m in found.items()}


def failed_gradients(report):
    return {c.name.split("/gradients")[0] for c in report.failures if "/gradients" in c.name}


POISON = {"poison/key-behind-mask", "poison/value-behind-mask", "poison/inf-behind-mask"}


def test_our_own_kernel_passes_in_every_format():
    report = run("refattn-tiled")
    assert report.passed
    assert report.verdict == "right"
    # its gradients in the other formats: tests/check/test_right_calls.py; float16: tests/check/bounds/test_forward.py
    narrow = run("refattn-tiled", dtypes=("bfloat16",), gradients=NIGHTLY)
    assert narrow.passed
    for r in (report, narrow):  # the bound is not idle
        assert replace(r, checks=tuple(c for c in r.checks if "/gradients" not in c.name)).worst() > 0.05
    assert not NIGHTLY or run("refattn-tiled", "gaussian/*", dtypes=("float16",)).passed
    left = {c.name.partition("[")[0] for c in report.checks if c.verdict == "unsupported"}
    assert left == {"law/row_invariance"}  # its products of a row alone are others than of several


def test_torch_flash():
    report = run("torch-sdpa-flash")
    found_wrong = failed(report)
    assert failed_gradients(report) == POISON | {"extreme/huge-products"}
    assert found_wrong["empty/rows-allowed"] == "lse: lse of a row without keys is 0, must be -inf (8 of 74)"
    assert "overflow on finite data: inf" in found_wrong["extreme/huge-values"]
    assert "two halves merged through lse differ" in found_wrong["law/split_and_merge"]
    assert "NaN or inf behind the mask leaks" in found_wrong["poison/value-behind-mask"]
    assert set(found_wrong) == POISON | {
        "empty/rows-allowed",
        "empty/rows-bias",
        "extreme/huge-values",
        "extreme/huge-products",
        "law/split_and_merge",
        "poison/bias-inf",
        "poison/key-inf",
    }
    assert report.right


def test_torch_math():
    report = run("torch-sdpa-math")
    assert set(failed(report)) == POISON
    assert failed_gradients(report) == POISON


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torch_flash_exponential_in_16_bits(dtype):
    """Its fast exponential shows in lse: wrong for a float32 exponential, within the model of its own cubic."""
    (entry,) = find("torch-sdpa-flash")
    kernel = entry.kernel()
    as_declared = run("torch-sdpa-flash", "gaussian/plain*", (dtype,))
    assert as_declared.passed
    from refattn.check import flash

    strict = check_kernel(
        kernel, model=flash, capabilities=entry.capabilities, dtypes=(dtype,), only="gaussian/causal-square*"
    )
    assert 1 < strict.checks[0].ratio < _FEXP_ERROR or sys.platform != "linux"


def test_torch_flex():
    found_wrong = failed(run("torch-flex", WITHOUT_LAWS))
    assert {"poison/value-behind-mask", "poison/value-seen-by-some", "extreme/huge-products"} <= set(found_wrong)
    assert set(found_wrong) <= POISON | {"poison/value-seen-by-some", "extreme/huge-products"}


def test_jax():
    found_wrong = failed(run("jax", WITHOUT_LAWS, gradients=False))  # they are in test_kernel_gradients.py
    assert (
        found_wrong["empty/rows-allowed"]
        == "out: the mean of all values in a row without keys, must be 0 (256 of 2368)"
    )
    assert found_wrong["empty/rows-bias"] == "out: NaN in a row without keys, must be 0 (64 of 2368)"
    assert "overflow on finite data" in found_wrong["extreme/huge-products"]
    assert "poison/value-behind-mask" in found_wrong
    assert not any(name.startswith(("gaussian", "peaked", "probe", "shifted", "sparse", "law")) for name in found_wrong)


def test_torch_flash_adds_gradients_in_bfloat16_from_block_to_block():
    pytest.importorskip("torch")
    rms = []
    for n in (32, 128):  # one block of rows, and four
        rng = np.random.default_rng(0)
        q, k, v, dout = (tensor(rng, (2, 4, m, 40), "bfloat16") for m in (n, 77, 77, n))
        _, backward = check_problem("torch-sdpa-flash", Problem(q, k, v), "blocks", gradients=dout).checks
        rms.append(next(w.figures.rms for w in backward.arrays if w.array == "dv"))
    assert rms[0] < 1.1
    assert rms[1] > rms[0] + 0.2


def test_torch_flash_adds_gradients_in_float16_from_block_to_block():
    """Of equal rows P is rounded to 1/2, the sum of 32 rows to 1, and so is that with 8 more: all three down."""
    u, d = 2.0**-11, 8
    q, k, dout = np.zeros((1, 1, 40, d)), np.zeros((1, 1, 2, d)), np.zeros((1, 1, 40, d))
    q[..., 0], k[..., 0, 0] = 1, 4 / 2 * 0.97 * u * np.sqrt(d)  # P is 0.97 unit roundoffs above 1/2
    dout[:, :, [0, 1, 32]] = np.array([2, 2 * 0.98 * u, 2 * 0.98 * u])[:, None]
    q, k, dout = (x.astype(np.float16) for x in (q, k, dout))
    p = Problem(q, k, np.ones_like(k))
    for n, failures in ((40, d), (32, 0)):
        of = {"gradients": dout[:, :, :n], "model": KERNELS["torch-sdpa-flash"].model}
        (_, check) = check_problem("torch-sdpa-flash", p.replace(query=q[:, :, :n]), "x", **of).checks
        (dv,) = (w for w in check.arrays if w.array == "dv")
        assert dv.failures == failures
        assert dv.got == 1
    (_, check) = check_problem("refattn-tiled", p, "x", gradients=dout).checks
    assert check.verdict == "passed"


def test_the_memory_efficient_kernel_says_what_it_does_not_take():
    """Whose bias has query's type, and heads of their own; without a GPU nothing further runs."""
    efficient = pytest.importorskip("refattn.check.kernels.cuda")._efficient_out
    assert "grouped_heads" not in KERNELS["cuda-efficient"].capabilities.features
    x = tensor(np.random.default_rng(0), (1, 2, 8, 8), "bfloat16")
    p = Problem(x, x, x, bias=np.zeros((1, 1, 8, 8), np.float32)).to("torch")
    text = "^bias: PyTorch's memory-efficient kernel takes one of query's type, got float32 beside bfloat16$"
    with pytest.raises(UnsupportedProblem, match=text):
        efficient(p)


def test_kernels_on_a_gpu_take_arrays_that_are_there():
    """So that exact answers are made there, too, and a GPU that a kernel lost ends the run."""
    torch = pytest.importorskip("torch")
    cuda = pytest.importorskip("refattn.check.kernels.cuda")
    for name in ("cuda-flash", "cuda-cudnn", "cuda-triton"):
        able = KERNELS[name].capabilities
        assert (able.arrays, able.device, device_of(able)) == ("torch", "cuda", "cuda")
    x = tensor(np.random.default_rng(0), (1, 2, 4, 8), "float32")
    p = Problem(x, x, x).to("torch")
    kernel = cuda._Torch("math", lambda p: torch.nn.functional.scaled_dot_product_attention(p.query, p.key, p.value))
    assert kernel(p).shape == p.out_shape
    found = kernel.gradients(p, torch.ones(p.out_shape))
    assert list(found) == ["dq", "dk", "dv"]
    assert all(isinstance(g, torch.Tensor) and g.device == p.query.device for g in found.values())
    value = p.value.clone().requires_grad_()
    kernel(p.replace(value=value)).sum().backward()
    assert torch.equal(found["dv"], value.grad)


def test_onnxruntime():
    report = run("onnxruntime")
    assert report.right
    assert set(failed(report)) == POISON | {"extreme/huge-products", "gaussian/negative-scale", "sparse/scale-zero"}
    assert any("ONNX Runtime's Attention refuses -0.5" in c.message for c in report.checks)


def test_openvino():
    found_wrong = failed(run("openvino", WITHOUT_LAWS))
    assert found_wrong["empty/rows-allowed"] == "out: NaN in a row without keys, must be 0 (256 of 2368)"
    assert not any(name.startswith(("gaussian", "peaked", "probe", "shifted", "sparse", "law")) for name in found_wrong)


def test_keras():
    found_wrong = failed(run("keras", gradients=False))
    assert "must be 0" in found_wrong["empty/rows-allowed"]
    assert not any(name.startswith(("gaussian", "peaked", "probe", "shifted", "sparse", "law")) for name in found_wrong)


def test_the_table():
    assert "refattn-tiled" in {e.name for e in found()}
    assert "torch-flex-compiled" not in {e.name for e in found()}
    for name, e in KERNELS.items():
        assert e.name == name
        for dtype in e.capabilities.dtypes:
            assert e.model(dtype).accumulator in FORMATS
        if e.here:
            ours = e.name.startswith(("refattn", "example"))
            assert e.version.startswith("refattn" if ours else e.package)
    assert math.isclose(_FEXP_ERROR, 1289, rel_tol=0.01)


def test_names():
    assert [e.name for e in find("torch-sdpa")] == ["torch-sdpa-flash", "torch-sdpa-math"]
    assert [e.name for e in find("torch-flex-compiled")] == ["torch-flex-compiled"]
    with pytest.raises(
        InvalidInput, match="kernel: got 'flashy', expected one of refattn-tiled, example-no-rescale, refattn-"
    ):
        find("flashy")


def test_a_kernel_whose_package_is_not_here(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InvalidInput, match=r"kernel: jax needs the package jax; in a clone of refattn: pip install '\.\[jax\]'"
    ):
        find("jax")
    assert [e.name for e in found()] == ["refattn-tiled"]


def test_a_function_in_a_file_or_a_module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from refattn import Capabilities\n"
        "def attention(problem):\n    return problem.query\n"
        "attention.capabilities = Capabilities({'float16'})\n"
        "value = 3\n"
    )
    (tmp_path / "broken_kernel.py").write_text("1 / 0\n")
    (entry,) = find(f"{tmp_path}/mine.py:attention")
    assert entry.capabilities.dtypes == {"float16"}
    assert entry.kernel().call(type("P", (), {"query": 5})) == 5
    monkeypatch.syspath_prepend(tmp_path)
    assert find("mine:attention")[0].name == "mine:attention"
    for name, text in (
        (f"{tmp_path}/none.py:f", "kernel: there is no Python file"),
        (f"{tmp_path}/mine.py:g", "has no function 'g'"),
        ("mine:value", "kernel: mine has no function 'value'"),
        ("no_such_module:f", "kernel: importing no_such_module raised ModuleNotFoundError"),
        (f"{tmp_path}/broken_kernel.py:f", "raised ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(InvalidInput, match=text):
            find(name)
