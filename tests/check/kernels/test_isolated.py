"""A kernel that hangs, crashes or misbehaves in its own process is a named failure, and the next call works."""

from types import SimpleNamespace

import numpy as np
import pytest

from refattn import InvalidInput, KernelError, UnsupportedProblem, check_kernel
from refattn.check.kernels import isolated
from refattn.check.kernels.isolated import Isolated
from refattn.check.kernels.tiled import tiled

KERNEL = """
import ctypes, os, time
import numpy as np
from refattn import UnsupportedProblem
from refattn.check.kernels.tiled import tiled

def kernel(p):
    what = int(p.n_q)
    if what == 1:
        time.sleep(60)
    if what == 2:
        ctypes.string_at(0)
    if what == 3:
        os._exit(7)
    if what == 4:
        raise ValueError("no such thing")
    if what == 5:
        p.query[...] = 0
    if what == 6:
        return p.value
    if what == 7:
        raise UnsupportedProblem("seven rows")
    return tiled(p)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernel") / "kernel.py"
    path.write_text(KERNEL)
    k = Isolated(f"{path}:kernel", 2.0)
    yield k
    k.close()


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (1, "the kernel gave no answer within 2 s; its process was ended"),
        (2, "the kernel ended its process by signal 11"),
        (3, "the kernel ended its process with exit code 7"),
        (4, "the kernel raised ValueError: no such thing"),
        (5, "the kernel changed its input query; it must leave its inputs as they are"),
        (6, "out: shares memory with the input value; return an array of its own"),
    ],
)
def test_a_failure_has_a_name(kernel, make, rows, text):
    with pytest.raises(KernelError, match=text):
        kernel(make(rows, rows, 4))
    out, lse = kernel(make(8, 5, 4))  # the run goes on
    want = tiled(make(8, 5, 4))
    assert out.tobytes() == want[0].tobytes()
    assert lse.tobytes() == want[1].tobytes()


class Pipe:
    def __init__(self, *told):
        self.told, self.sent, self.send = list(told), [], lambda x: self.sent.append(x)

    def poll(self, seconds):
        return bool(self.told)

    def recv(self):
        if not self.told:
            raise EOFError
        return self.told.pop(0)


def test_a_process_whose_device_is_lost_is_ended(kernel, make, monkeypatch):
    p, text = make(4, 4, 4), "the kernel raised ValueError: no such thing"
    for gone, kind in ((True, "lost"), (False, "error")):
        monkeypatch.setattr(isolated, "lost", lambda able, gone=gone: gone)
        there = Pipe((p.arrays(), p.settings() | {"variant": p.variant}, None))
        isolated._serve(kernel.name, p.variant, there)
        assert there.sent == ["ready", (kind, text)]
        here = Isolated(kernel.name, 2.0)
        nothing = lambda: None  # noqa: E731
        here._process = SimpleNamespace(is_alive=lambda: True, kill=nothing, join=nothing)
        here._pipe = Pipe((kind, text))
        with pytest.raises(KernelError, match=text):
            here(p)
        assert (here._process is None) == gone


def test_unsupported_stays_unsupported(kernel, make):
    with pytest.raises(UnsupportedProblem, match="seven rows"):
        kernel(make(7, 7, 4))


def test_a_run_reports_them(kernel):
    report = check_kernel(kernel, only="ragged/one-*", dtypes=["float32"])
    assert {c.name: c.message for c in report.failures} == {
        "ragged/one-query[float32]": "the kernel gave no answer within 2 s; its process was ended",
        "ragged/one-key[float32]": "the kernel changed its input query; it must leave its inputs as they are",
    }


def test_gradients_come_through(make):
    k = Isolated("refattn-tiled")
    try:
        p = make(4, 6, 4)
        got = k.gradients(p, np.ones(p.out_shape, np.float32))
        want = tiled.gradients(p, np.ones(p.out_shape, np.float32))
        assert {n: x.tobytes() for n, x in got.items()} == {n: x.tobytes() for n, x in want.items()}
    finally:
        k.close()


def test_bad_arguments():
    with pytest.raises(InvalidInput, match="time-limit: got 0 seconds, expected more than 0 and at most 1e"):
        Isolated("refattn-tiled", 0)
    with pytest.raises(InvalidInput, match="kernel: torch-sdpa means 2 kernels; name one of torch-sdpa-flash"):
        Isolated("torch-sdpa")
