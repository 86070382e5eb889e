"""Shared makers of small problems, and Hypothesis profiles."""

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from refattn import VARIANTS, Problem
from refattn.arrays import from_float64
from refattn.dtypes import FORMATS

pytest_plugins = ["pytester"]

settings.register_profile("refattn-quick", max_examples=30, deadline=None, derandomize=True)
settings.register_profile(
    "refattn-nightly", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
PROFILE = os.environ.get("REFATTN_PROFILE", "refattn-quick")
settings.load_profile(PROFILE)

NIGHTLY = PROFILE == "refattn-nightly"
"""Whether tests take all that there is, where a systematic part shows the same faults."""

SMALL = "!*ls/*"
"""The checks on small problems: neither models nor calls."""


def pytest_configure(config):
    """Give every process that this one starts one thread of BLAS, another would spin on the next one's core, and have
    modules compiled once, also where Python is told to keep none: hundreds of processes import them."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each worker tests that stand together: they need the same exact answers, and the same programs of JAX."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


LONGEST = (
    "tests/meta/test_docs.py::test_notebooks_run_without_warnings",
    "tests/meta/test_docs.py::test_documentation_builds_without_warnings_and_links_lead_somewhere",
    "tests/meta/test_house.py::test_lint_and_types[mypy]",
    "tests/he/test_encoder.py::test_four_encrypted_layers_are_the_simulation",
)
"""Single tests of 25 to 75 s: the last of them would leave other processes idle."""


def pytest_collection_modifyitems(items):
    """Begin with the longest tests, and mark what `slow.txt` lists."""
    items.sort(key=lambda item: item.nodeid not in LONGEST)
    slow = set(Path(__file__).with_name("slow.txt").read_text().splitlines())
    for item in items:
        if item.nodeid.partition("[")[0] in slow:
            item.add_marker("slow")


def pytest_collection_finish():
    """Have the garbage collector leave alone what is there for all tests: each full pass went through all of it."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item, nextitem):
    """Let JAX forget what it compiled for a file's tests: hundreds of programs of no use to the next.

    What a file's tests have freed goes back to the system: glibc keeps it, half a gigabyte after JAX's compilations.
    """
    if nextitem is not None and nextitem.path == item.path:
        return
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def tensor(rng, shape, dtype="float32"):
    return from_float64(FORMATS[dtype].round_array(rng.standard_normal(shape)), dtype)


@pytest.fixture
def make():
    """Return a maker of random problems: make(n_q, n_k, d, ...) with any option of Problem."""

    def maker(n_q=5, n_k=7, d=8, *, b=1, h=2, h_kv=None, d_v=None, dtype="float32", seed=0, **more):
        rng = np.random.default_rng(seed)
        h_kv = h if h_kv is None else h_kv
        shapes = ((b, h, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d if d_v is None else d_v))
        return Problem(*(tensor(rng, s, dtype) for s in shapes), **more)

    return maker


@pytest.fixture
def call_of(make):
    """Return a maker of a small call that an operator takes, whichever it is: call_of(variant, ...) as make(...)."""

    def maker(variant, n_q=5, n_k=7, d=8, **more):
        v = VARIANTS[variant]
        if "lengths_differ" in v.never:
            n_q = n_k
        if "causal_bottom_right" in v.always:
            more.setdefault("causal", "bottom_right")
        for name, most in (("beta", d), ("eta", 16)):
            if name in v.always:
                shape = (more.get("b", 1), more.get("h", 2), n_k, 1)
                more.setdefault(name, tensor(np.random.default_rng(1), shape, more.get("dtype", "float32")) ** 2 / most)
        own = {n: o.draws(2)[1] for n, o in v.options.items() if o.check(o.default, 2) is not None}
        return make(n_q, n_k, d, variant=variant, **({"options": own} if own else {}) | more)

    return maker
