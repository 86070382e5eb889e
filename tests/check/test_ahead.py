"""Answers that other processes make are those that the run would make."""

import threading

import numpy as np
import pytest

from refattn import Capabilities, check_kernel
from refattn.check import ahead
from refattn.check.bounds import expected
from refattn.check.inputs.families import calls, cases
from refattn.check.kernels.tiled import tiled
from refattn.check.model import GRADIENTS, flash

ABLE = Capabilities({"float32"}, lse=True, gradients=GRADIENTS)


@pytest.fixture(autouse=True)
def _fresh():
    expected.forget()
    yield
    expected.forget()


def keys(n):
    drawn = calls("softmax", ABLE, "quick", 3)[-3:]
    some = [*cases("softmax", "quick")[: n - 3], *drawn]
    return [(c, "float32", flash("float32"), c.backward and i % 2 == 0) for i, c in enumerate(some)]


def test_another_process_makes_the_same():
    wanted = keys(ahead.BLOCK + 6)
    with ahead.Ahead(wanted, 2) as workers:
        for future in list(workers._made.values()):
            future.result()
        sent = list(workers._made)
        assert len(sent) == ahead.BLOCK
        for key in sent:
            workers.prepare(key)
            assert expected.kept(key)
        assert workers._made  # the next block is on its way
    for key in sent:
        mine, theirs = expected.made(*key), expected.of_case(*key)
        for name in mine.allowed:
            np.testing.assert_array_equal(mine.answer.enclosures[name].mid, theirs.answer.enclosures[name].mid)
            np.testing.assert_array_equal(mine.allowed[name], theirs.allowed[name])


def test_what_is_not_there_yet_is_left_to_the_run(monkeypatch):
    monkeypatch.setattr(ahead._Workers, "start", lambda self: None)
    stuck = threading.Event()
    monkeypatch.setattr(ahead._Workers, "ask", lambda self, key: stuck.wait() and None)
    wanted = keys(ahead.BLOCK + 6)
    with ahead.Ahead(wanted, 2) as workers:
        workers.prepare(wanted[0])  # the worker is at the block's last
        assert not expected.kept(wanted[0])
        stuck.set()


def test_a_process_that_ends_is_said_and_the_run_goes_on(monkeypatch):
    monkeypatch.setattr(ahead, "CHILD", "import sys; sys.stdin.buffer.read(1)")
    only = "gaussian/*"
    with pytest.warns(UserWarning, match="a process for exact answers ended"):
        report = check_kernel(tiled, capabilities=ABLE, dtypes=["float32"], only=only, n_jobs=2)
    assert report.right
    assert len(report.checks) > ahead.BLOCK


def test_few_answers_need_no_process():
    with ahead.Ahead(keys(5), 8) as workers:
        assert workers._pool is None
    with ahead.Ahead(keys(ahead.BLOCK + 6), 1) as workers:
        assert workers._pool is None
