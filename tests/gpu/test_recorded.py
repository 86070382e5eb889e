"""Launches that are queued again: for other arrays they are what a new launch is."""

from dataclasses import replace
from itertools import count
from threading import Thread

import pytest

from refattn.gpu import backward_launch, recorded
from refattn.gpu.arguments import arguments_of
from refattn.gpu.launch import launch
from refattn.gpu.plan import choose
from refattn.gpu.recorded import recording, replay
from refattn.gpu.views import View

from .test_build import PLAIN
from .test_launch import arrays, driver  # noqa: F401

PLAIN_OPTIONS = {"scale": 0.5, "causal": None, "window": None, "softcap": None}
MORE = {
    "bias": View(6, (1, 4, 128, 300), (9, 38400, 300, 1), "float32", 0),
    "sink": View(7, (4,), (1,), "float32", 0),
    "cu_q": View(8, (3,), (1,), "int32", 0),
    "cu_k": View(9, (3,), (1,), "int32", 0),
}
CALLS = [
    (replace(PLAIN, n_k=300), (), "sm90", ("sm90",)),
    (replace(PLAIN, n_k=300, causal="bottom_right", sink=True), ("sink",), "sm90", ("sm90", "simt")),
    (replace(PLAIN, n_k=300, bias="float32", softcap=True), ("bias",), "sm90", ("sm90",)),
    (replace(PLAIN, n_k=300, packed=True), ("cu_q", "cu_k"), "sm90", ("sm90", "simt")),
    (replace(PLAIN, n_k=300, bias="float32", sink=True), ("bias", "sink"), "mma", ("mma",)),
    (replace(PLAIN, n_k=300, packed=True), ("cu_q", "cu_k"), "simt", ("simt",)),
]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(recorded, "_THREAD", recorded._Thread())


def moved(given):
    """Return the same arrays elsewhere."""
    return {n: replace(x, pointer=1000 + 8 * x.pointer) for n, x in given.items()}


@pytest.mark.parametrize(("call", "names", "impl", "launches"), CALLS)
def test_a_launch_again_is_a_launch_anew(driver, call, names, impl, launches):  # noqa: F811
    from refattn.gpu.plan import KERNELS

    given = arrays() | {n: MORE[n] for n in names}
    plan = choose(call, impl, (9, 0))
    options = PLAIN_OPTIONS | {"causal": call.causal, "softcap": 20.0 if call.softcap else None}
    driver.takes = [KERNELS[n].takes for n in launches] * 4
    with recording("kind"):
        launch(call, plan, None, dict(given), options, 7)
    assert replay("kind", moved(given))
    launch(call, plan, None, moved(given), options, 7)
    assert replay("kind", given)
    n = len(launches)
    first, again, anew, back = (driver.launches[i * n : (i + 1) * n] for i in range(4))
    assert len(driver.launches) == 4 * n
    assert again == anew != first == back


def test_what_was_not_recorded_is_not_queued(driver):  # noqa: F811
    assert not replay("kind", arrays())
    with pytest.raises(ValueError, match="stop"), recording("kind"):
        raise ValueError("stop")
    assert not replay("kind", arrays())
    assert driver.launches == []


def test_a_thread_has_its_own(driver):  # noqa: F811
    with recording("kind"):
        pass
    assert replay("kind", {})
    seen = []
    thread = Thread(target=lambda: seen.append(replay("kind", {})))
    thread.start()
    thread.join()
    assert seen == [False]


def test_the_oldest_are_dropped(driver, monkeypatch):  # noqa: F811
    monkeypatch.setattr(recorded, "MOST", 2)
    for kind in "abc":
        with recording(kind):
            pass
    assert [replay(kind, {}) for kind in "abc"] == [False, False, True]


@pytest.mark.parametrize("options", [{}, {"causal": "bottom_right", "sink": True}, {"packed": True, "window": (9, 9)}])
@pytest.mark.parametrize("ordered", [True, False])
def test_a_backward_pass_again_is_one_anew(driver, monkeypatch, options, ordered):  # noqa: F811
    stand_ins = {
        "attribute": lambda device, name: 5,
        "compiled": lambda text, entry, *_: (entry, None),
        "capability": lambda device: (9, 0),
        "kernel_of": lambda plan, device, entry="", shared=0: (entry or plan.impl, None),
        "zeros": lambda *call: View(7000, (1,), (1,), "int32", 0),
        "empty": lambda like, shape, dtype: (None, View(next(places), shape, (1,) * len(shape), dtype, 0)),
    }
    for n, x in stand_ins.items():
        monkeypatch.setattr(backward_launch, n, x)
    call, kernel = replace(PLAIN, n_k=300, **options), backward_launch.hopper.KERNEL
    given = arrays() | {"dout": replace(arrays()["out"], pointer=10)}
    given |= {n: replace(given[x], pointer=p) for p, (n, x) in enumerate((("dq", "query"), ("dk", "key")), 11)}
    given |= {n: x for n, x in MORE.items() if (call.sink and n == "sink") or (call.packed and n in ("cu_q", "cu_k"))}
    given |= {"dsink": replace(MORE["sink"], pointer=13)} if call.sink else {}
    asked = PLAIN_OPTIONS | {"causal": call.causal, "window": call.window}

    def passed(given, start, again):
        nonlocal places
        places = count(start, 64)
        backward_launch.prepare(call, kernel, None, {}, given, ordered)
        driver.takes = [arguments_of("backward.cu", "keys_of_rows"), small, kernel.takes, small]
        driver.takes += [arguments_of("simt_backward.cu", "backward")] * 2  # n_k is no multiple of the tile
        driver.takes += [arguments_of("backward.cu", "sinks")] * call.sink
        driver.launches = []
        if not (again and replay("kind", given)):
            with recording("kind"):
                backward_launch.launch(call, kernel, None, {}, given, asked, 7, ordered)
        assert not driver.takes
        return driver.launches

    small, places = arguments_of(kernel.file, "statistics"), count()
    first, anew = passed(dict(given), 1 << 20, False), passed(moved(given), 1 << 21, False)
    assert first != anew
    assert passed(dict(given), 1 << 20, True) == first
    assert passed(moved(given), 1 << 21, True) == anew
