import numpy as np
import pytest

from refattn import (
    VARIANTS,
    Capabilities,
    InvalidInput,
    InvalidProblem,
    Model,
    Problem,
    UnsupportedProblem,
    check_kernel,
    check_problem,
)
from refattn.check.kernels.tiled import tiled
from refattn.check.runner import asked, matches, plan

from ..conftest import SMALL


def test_capabilities_decide_what_runs():
    able = Capabilities({"float32"}, features={"lengths_differ", "causal_top_left"}, d_max=64)
    report = check_kernel(lambda p: tiled(p)[0], capabilities=able, only=SMALL)
    ran = {c.name for c in report.checks if c.verdict != "unsupported"}
    assert "gaussian/causal-top-left[float32]" in ran
    assert "gaussian/window[float32]" not in ran
    lacks = {c.name: c.message for c in report.checks if c.verdict == "unsupported"}
    assert lacks["gaussian/window[float32]"] == "not in its capabilities: window"
    assert lacks["gaussian/dim-128[float32]"] == "not in its capabilities: dim 128"
    assert report.count("passed") + report.count("failed") + report.count("unsupported") == len(report.checks)


def test_attributes_of_the_kernel_are_its_declaration():
    def kernel(p):
        return tiled(p)

    kernel.capabilities = Capabilities({"bfloat16"}, lse=True)
    kernel.model = Model(weights="bfloat16")
    report = check_kernel(kernel, only="gaussian/plain*")
    assert [c.name for c in report.checks] == ["gaussian/plain[bfloat16]"]
    assert report.models["bfloat16"]["weights"] == "bfloat16"
    assert report.kernel == "kernel"


def test_the_model_decides_what_is_allowed():
    """A bfloat16-P kernel is right as such and wrong as a float32 one."""

    def kernel(p):
        from refattn.arrays import from_float64
        from refattn.dtypes import FORMATS

        coarse = from_float64(FORMATS["bfloat16"].round_array(p.value.astype(float)), "bfloat16").astype(np.float32)
        return tiled(p.replace(value=coarse))[0]

    able = Capabilities({"float32"})
    loose, strict = (
        check_kernel(kernel, capabilities=able, model=m, only="gaussian/plain*")
        for m in (Model(weights="bfloat16"), None)
    )
    assert loose.passed
    assert not strict.passed


def test_lse_is_demanded_where_declared():
    report = check_kernel(lambda p: tiled(p)[0], only="gaussian/plain*", capabilities=Capabilities(lse=True))
    assert report.failures[0].message.startswith("the kernel returned no lse, but its capabilities name it")
    narrow = check_kernel(
        lambda p: (tiled(p)[0], tiled(p)[1].astype(np.float16)), only="gaussian/plain*", capabilities=Capabilities()
    )
    assert narrow.failures[0].message == "lse: got dtype float16, expected float32 as its model says"


def test_bad_arguments():
    with pytest.raises(InvalidInput, match="variant: got 'cosine'"):
        check_kernel(tiled, "cosine")
    with pytest.raises(InvalidInput, match="dtype: got 'int8'"):
        check_kernel(tiled, dtypes=["int8"])
    with pytest.raises(InvalidInput, match="budget: got 'quik', expected one of quick, ci, nightly"):
        check_kernel(tiled, budget="quik")
    with pytest.raises(InvalidInput, match="only: no check of softmax is named 'nothing'"):
        check_kernel(tiled, only="nothing")


def test_only_takes_a_name_or_a_pattern():
    names = [i.name for i in plan(tiled, only="gaussian/plain[float32]")]
    assert names == ["gaussian/plain[float32]"]
    assert len(plan(tiled, only="law/*")) == len(VARIANTS["softmax"].laws) - 1  # one runs by its name alone
    assert {i.name.split("/")[0] for i in plan(tiled, only="e*")} == {"empty", "extreme"}
    assert [i.name for i in plan(tiled, only="gaussian/plain")] == names
    others = {i.name.split("/")[0] for i in plan(tiled, only="!g*")}
    assert {"empty", "law", "calls"} < others
    assert "gaussian" not in others


def test_progress_is_told():
    seen = []
    check_kernel(tiled, only="sparse/*", progress=lambda item: seen.append(item.name))
    assert seen == ["sparse/integers[float32]", "sparse/scale-zero[float32]"]


def test_one_problem_of_ones_own(make):
    p = make(causal="top_left")
    assert check_problem(tiled, p, "mine").passed
    bad = check_problem(lambda p: tiled(p.replace(causal=None))[0], p, "mine", name="wrong")
    assert not bad.passed
    assert bad.kernel == "wrong"
    assert bad.checks[0].name == "mine[float32]"


def test_correctly_rounded_share():
    report = check_kernel(tiled, only="gaussian/*", capabilities=Capabilities({"float32", "bfloat16"}))
    assert 0.1 < report.correctly_rounded["float32"] < 0.5
    assert 0.5 < report.correctly_rounded["bfloat16"] < 0.9


def test_when_the_time_is_over_the_rest_is_left_and_said():
    def kernel(p):
        return tiled(p)

    able = Capabilities({"float32"}, lse=True)
    report = check_kernel(kernel, capabilities=able, seconds=1e-6, seed=0)
    assert report.left > 100
    quick = {i.name for i in plan(kernel, capabilities=able, budget="quick")}
    assert {c.name for c in report.checks} < quick
    assert report.to_dict()["left"] == report.left
    assert not report.whole
    for seconds in (0, -1.0):
        with pytest.raises(InvalidInput, match=f"seconds: got {seconds}, expected a number above 0"):
            check_kernel(kernel, capabilities=able, seconds=seconds)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kernel": "refattn-tiled"}, "kernel: got 'refattn-tiled', expected a function of a Problem"),
        ({"kernel": None}, "kernel: got None, expected a function"),
        ({"model": "flash"}, "model: got 'flash', expected a Model"),
        ({"capabilities": {"lse": True}}, "capabilities: got {'lse': True}, expected Capabilities"),
        ({"seed": 1.5}, "seed: got 1.5, expected an integer"),
        ({"seed": -1}, "seed: got -1"),
        ({"n_jobs": 0}, "n_jobs: got 0, expected an integer of at least 1"),
        ({"n_jobs": None}, "n_jobs: got None"),
        ({"seconds": "5"}, "seconds: got '5', expected a number above 0"),
        ({"seconds": True}, "seconds: got True, expected a number above 0"),
        ({"seed": True}, "seed: got True, expected an integer"),
        ({"n_jobs": True}, "n_jobs: got True, expected an integer"),
        ({"dtypes": "float32"}, "dtypes: got 'float32', expected a sequence of names"),
        ({"model": lambda dtype: "flash"}, "model: got 'flash', expected a Model of float32"),
        ({"model": lambda dtype: {}[dtype]}, "model: of float32 it raised KeyError: 'float32'"),
        ({"only": ["gaussian/*"]}, "only: got .*, expected a name or a shell pattern"),
    ],
)
def test_arguments_that_are_none_are_named(given, says):
    given = {"kernel": tiled} | given
    with pytest.raises(InvalidInput, match=says):
        check_kernel(given.pop("kernel"), **given)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Model(tile="a"), "model: got tile='a', expected int"),
        (lambda: Model(tile=1.5), "model: got tile=1.5, expected int"),
        (lambda: Model(accumulator=None), "model: got accumulator=None, expected str"),
        (lambda: Model(weights="x"), "model: got weights='x', expected one of float64, .* tf32"),
        (lambda: Model(tile=2**80), "model: got tile=1208925819614629174706176, .* expected at most 2147483648"),
        (lambda: Model(split=-1), "split=-1, expected .* at least 0"),
        (lambda: Capabilities(d_max="64"), "capabilities: got d_max='64', expected int"),
        (lambda: Capabilities(d_max=0), "d_max=0"),
        (lambda: Capabilities(features=None), "capabilities: got features=None, expected a set of str"),
        (lambda: Capabilities(head_dims=64), "capabilities: got head_dims=64, expected a set of int"),
        (lambda: Capabilities("float32"), "capabilities: got dtypes='float32', expected a set of str"),
        (lambda: Capabilities(lse=1), "capabilities: got lse=1, expected bool"),
    ],
)
def test_fields_of_another_type_are_named(make, says):
    with pytest.raises(InvalidInput, match=says):
        make()


@pytest.mark.parametrize(
    ("only", "calls"),
    [
        (None, True), ("calls/*", True), ("*", True), ("c*", True), ("calls/000-decode", True), ("*decode*", True),
        ("!calls/000*", True), ("!gaussian/*", True), ("!calls", True), ("cal?s/*", True),
        ("gaussian/*", False), ("models/*", False), ("law/*", False), ("gaussian/plain[float32]", False),
        ("!*ls/*", False), ("!calls/*", False), ("!*/*", False),
    ],
)  # fmt: skip
def test_calls_are_drawn_only_where_one_may_be_asked_for(only, calls):
    assert asked(only, "calls") == calls
    names = [f"calls/{i:03d}-{kind}[float32]" for i in range(3) for kind in ("decode", "prefill")]
    assert calls or not any(matches(n, only) for n in names)


def test_nothing_is_computed_for_a_call_that_is_refused(monkeypatch):
    def kernel(problem):
        raise UnsupportedProblem("no such call")

    def exact(*given, **more):
        raise AssertionError("asked for")

    kernel.gradients = lambda problem, dout: kernel(problem)
    monkeypatch.setattr("refattn.check.runner.of_case", exact)
    able = Capabilities({"float32"}, features=set(), gradients={"dq"})
    report = check_kernel(kernel, capabilities=able, only="gaussian/causal-square*")
    assert {c.verdict for c in report.checks} == {"unsupported"}
    assert len(report.checks) == 2


@pytest.mark.parametrize(
    ("gradients", "text"),
    [
        (
            np.ones((1, 2, 5, 7), np.float32),
            r"^gradients: got \(1, 2, 5, 7\), expected an array of out's shape \(1, 2, ",
        ),
        ("ones", "^gradients: got str, expected an array of out's shape"),
        (np.ones((1, 2, 5, 8), int), "^gradients: got dtype int64, expected one of"),
    ],
)
def test_an_arriving_gradient_that_does_not_fit_is_the_callers(gradients, text):
    x = np.ones((1, 2, 5, 8), np.float32)
    with pytest.raises(InvalidProblem, match=text):
        check_problem(tiled, Problem(x, x, x), "x", gradients=gradients)
