"""A kernel that nobody vouches for sees its call and nothing of what judges it."""

import multiprocessing
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from refattn import Capabilities, InvalidInput, KernelError, Problem, UnsupportedProblem, check_kernel
from refattn.check.inputs.families import cases
from refattn.check.kernels.alone import Problem as Stranger
from refattn.check.kernels.alone import receive, send
from refattn.check.kernels.untrusted import Untrusted
from refattn.problem import TENSORS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="pipes are passed on as POSIX does")
KERNEL = """
import os, sys, time
import numpy as np
from refattn import Capabilities, UnsupportedProblem

def attention(p):
    if p.causal or p.window or p.softcap:
        raise UnsupportedProblem("masks")
    q, k, v = (np.asarray(x).astype(np.float32) for x in (p.query, p.key, p.value))
    s = q @ k.swapaxes(2, 3) * np.float32(p.d_k**-0.5 if p.scale is None else p.scale)
    m = s.max(-1, keepdims=True)
    e = np.exp(s - m)
    z = e.sum(-1, keepdims=True)
    return (e @ v / z).astype(p.query.dtype), (m + np.log(z))[..., 0]

attention.capabilities = Capabilities({"float32"}, features={"lengths_differ"}, lse=True)
attention.gradients = lambda p, dout: {"dq": np.zeros_like(p.query)}

ABLE = Capabilities({"float32"}, features={"lengths_differ"})

def required(p):
    ABLE.require(p)
    return attention(p)

required.capabilities = ABLE

def torch(p):
    import torch
    q, k, v = p.query, p.key, p.value
    assert isinstance(q, torch.Tensor) and q.dtype == torch.bfloat16
    return torch.softmax(q.float() @ k.float().mT * p.d_k**-0.5, -1).to(q.dtype) @ v

torch.capabilities = Capabilities({"bfloat16"}, features={"lengths_differ"}, arrays="torch")

def answer(p):
    import refattn.exact.driver

def forks(p):
    os.fork()
    time.sleep(1000)

def again(p):
    sys.modules.pop("refattn", None)
    import refattn

def looks(p):
    frame, names = sys._getframe(), []
    while frame:
        names.append(frame.f_globals["__name__"])
        frame = frame.f_back
    seen = [m for m in sys.modules if m.startswith("refattn.")] + [n for n in names if "refattn" in n]
    told = [x for x in sys.argv + list(os.environ.values()) if "gaussian" in x]
    raise RuntimeError(f"saw {seen + told}")

def changes(p):
    p.key[...] = 0
    return attention(p)

def eats(p):
    return np.ones(2**33)

def hangs(p):
    time.sleep(100)

def leaves(p):
    os._exit(0)

def forges(p):
    for number in range(3, 1000):
        try:
            os.write(number, bytes([0, 0, 0, 5]) + b"hello")
        except OSError:
            pass
    return attention(p)

def whole(p):
    return p.query.astype(int), None
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "k.py"
    path.write_text(KERNEL)
    return path


@pytest.fixture
def ask(file):
    made = []

    def of(function, **more):
        made.append(Untrusted(f"{file}:{function}", **more))
        return made[-1]

    yield of
    for kernel in made:
        kernel.close()


def plain(dtype="float32"):
    return next(c for c in cases("softmax") if c.name == "gaussian/plain").problem(dtype)


def test_it_is_judged_as_any_other(ask):
    kernel = ask("attention")
    assert kernel.capabilities == Capabilities({"float32"}, features={"lengths_differ"}, lse=True)
    report = check_kernel(kernel, only="gaussian/*", dtypes=["float32"])
    assert report.right
    assert report.count("passed") >= 2
    assert "not in its capabilities" in next(c for c in report.checks if "softcap" in c.name).message
    with pytest.raises(UnsupportedProblem, match="masks"):
        kernel(plain().replace(causal="top_left"))
    assert set(kernel.gradients(plain(), np.zeros(plain().out_shape, np.float32))) == {"dq"}


def test_it_may_require_its_capabilities(ask):
    kernel = ask("required")
    assert check_kernel(kernel, only="gaussian/plain", dtypes=["float32"]).verdict == "right"
    with pytest.raises(UnsupportedProblem, match="not in its capabilities: causal_top_left"):
        kernel(plain().replace(causal="top_left"))


def test_tensors_of_torch(ask):
    pytest.importorskip("torch")
    assert check_kernel(ask("torch"), only="gaussian/plain", dtypes=["bfloat16"]).right


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("answer", "No module named 'refattn.exact'"),
        ("again", "refattn is not here: an untrusted kernel has Capabilities and UnsupportedProblem alone"),
        ("looks", r"saw \[\]"),
        ("changes", "the kernel changed its input key"),
        ("leaves", r"the kernel ended its process \(exit code 0\)"),
        ("forges", "the kernel's process sent what is no answer"),
        ("whole", "out: got dtype int64, expected a float of the table"),
    ],
)
def test_what_it_tries_is_named_and_the_next_call_is_not_affected(ask, function, says):
    kernel = ask(function)
    for _ in range(2):
        with pytest.raises(KernelError, match=says):
            kernel(plain())


def test_arrays_begin_where_they_began_within_16_bytes():
    one, other = multiprocessing.Pipe()
    whole = np.arange(40, dtype=np.float16)
    for i in range(9):
        x = whole[i : i + 8]
        send(one, {}, {"x": x})
        got = receive(other)[1]["x"]
        assert (got == x).all()
        assert (got.__array_interface__["data"][0] - x.__array_interface__["data"][0]) % 16 == 0


def test_time_and_memory_are_limited(ask):
    with pytest.raises(KernelError, match="no answer within 1 s; its process was ended"):
        ask("hangs", seconds=1.0)(plain())
    with pytest.raises(KernelError, match="no answer within 1 s; its process was ended"):
        ask("forks", seconds=1.0)(plain())  # the second process has the pipe, too
    with pytest.raises(KernelError, match="the kernel raised MemoryError"):
        ask("eats", memory=4.0)(plain())


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("nothing.py:f", {}, "an untrusted kernel is a function of a file"),
        ("refattn-tiled", {}, "an untrusted kernel is a function of a file"),
        ("{file}:missing", {}, "AttributeError"),
        ("{file}:attention", {"seconds": 0}, "expected more than 0"),
        ("{file}:attention", {"memory": -1}, "memory-limit: got -1 GiB, expected at least 0"),
    ],
)
def test_bad_input_is_said_at_once(file, name, more, says):
    with pytest.raises(InvalidInput, match=says):
        Untrusted(name.format(file=file), **more)


def test_its_problem_has_the_fields_of_ours():
    p = plain()
    theirs = Stranger(dict(p.arrays()) | p.settings(), set())
    for name in (*TENSORS, "scale", "causal", "window", "softcap"):
        assert getattr(theirs, name) is getattr(p, name) or getattr(theirs, name) == getattr(p, name)
    for name in ("batch", "heads", "heads_kv", "n_q", "n_k", "d_k", "d_v", "out_shape", "dtype", "kind"):
        assert getattr(theirs, name) == getattr(p, name)
    assert theirs.segments() == p.segments()
    packed = next(c for c in cases("softmax") if c.name == "ragged/packed").problem("float32")
    assert isinstance(packed, Problem)
    assert Stranger(dict(packed.arrays()), set()).segments() == packed.segments()


def test_the_program_imports_nothing_of_refattn():
    text = "import sys, runpy; sys.argv = ['x']\n"
    text += "from importlib.util import spec_from_file_location, module_from_spec\n"
    text += f"s = spec_from_file_location('alone', {str(Untrusted.__init__.__globals__['PROGRAM'])!r})\n"
    text += "s.loader.exec_module(module_from_spec(s)); print([m for m in sys.modules if 'refattn' in m])"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
