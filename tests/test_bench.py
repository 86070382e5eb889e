import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

import refattn.bench
from refattn import InvalidInput, bench


def test_what_was_measured_before_an_error_is_kept(tmp_path, monkeypatch):
    rows = "def rows():\n    yield Row('a', 2.0, 'ms', at_most=1.0)\n    raise OSError('gone')\n"
    text = f"from refattn.bench import Row\n{rows}"
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.setattr(refattn.bench, "_folder", lambda: tmp_path)
    with pytest.raises(OSError, match="gone"):
        bench.run("broken", Console(quiet=True), str(tmp_path / "x.json"))
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert (row["name"], row["value"], row["holds"]) == ("a", 2.0, False)


def test_what_a_benchmark_is_asked_for_and_does_not_take_is_refused():
    with pytest.raises(InvalidInput, match="bench: imports takes no --device"):
        bench.run("imports", Console(quiet=True), None, device="cuda")
    with pytest.raises(InvalidInput, match="only: got 'x 7', expected a part of one of replies; 1 x 16 x 32, p = 2"):
        next(iter(bench.load("he_gpu").rows("x 7")))


@pytest.mark.parametrize("name", bench.benchmarks())
def test_every_benchmark_loads(name):
    pytest.importorskip("torch")
    assert callable(bench.load(name).rows)


def test_other_processes_can_run_what_a_benchmark_defines(tmp_path, monkeypatch):
    (tmp_path / "many.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from joblib import Parallel, delayed\n"
        "from refattn.bench import Row\n\n\n"
        "@dataclass\nclass Twice:\n    of: float\n\n\n"
        "def twice(x):\n    return Twice(2 * x)\n\n\n"
        "def rows():\n"
        "    for t in Parallel(n_jobs=2)(delayed(twice)(x) for x in (1.0, 2.0)):\n"
        "        yield Row('twice', t.of, 'of it')\n"
    )
    monkeypatch.setattr(refattn.bench, "_folder", lambda: tmp_path)
    assert [r.value for r in bench.run("many", Console(quiet=True), None)] == [2.0, 4.0]


def test_the_plot_of_the_gpu_figures_shows_every_kernel(tmp_path):
    pytest.importorskip("matplotlib")
    root = Path(__file__).parents[1] / "benchmarks"
    target = tmp_path / "gpu.svg"
    command = [sys.executable, root / "_plot_gpu.py", root / "results" / "gpu-h100.json", target]
    subprocess.run(command, check=True)
    text = target.read_text()
    for label in ("refattn, fast", "cuDNN", "PyTorch flash", "Triton", "d = 256, causal", "NVIDIA H100"):
        assert label in text


def test_a_states_drift_is_held_to_its_bound():
    """300 tokens: within the bound, and a state that forgets a token is not; the float64 one is in its enclosure."""
    m = bench.load("recurrence")
    for rule in m.RULES:
        found = m.drift(rule, (0.1, 0.0), 300)
        for kind in m.TYPES:
            assert (found.error[kind] > 0).all()
            assert (found.error[kind] <= found.bound[kind]).all()
        k, v, beta = (x[-1].astype(float) for x in m.tokens(300))
        moved = m.stepped(rule, found.state, 1.0, k, v, beta, float) - found.state
        off = abs(moved).max((1, 2)) / abs(found.state).max((1, 2)) / 2.0**-24
        assert (off > found.bound["float32"]).all()


def test_a_states_enclosure_is_exact_to_its_radius():
    """Of 20 tokens beside rationals, and 300 in float64, which rounds at most 40 times a token of numbers below 8."""
    m = bench.load("recurrence")
    k, v, beta = ([[Fraction(float(y)) for y in row] for row in x] for x in m.tokens(20))
    fade = Fraction(float(np.float32(np.exp(-0.1))))
    for rule in m.RULES:
        state = [[Fraction(0)] * m.D for _ in range(m.D)]
        for key, value, (b,) in zip(k, v, beta, strict=True):
            state = [[fade * x for x in row] for row in state]
            told = value
            if rule == "delta":
                read = [sum(key[a] * state[a][c] for a in range(m.D)) for c in range(m.D)]
                told = [b * (x - y) for x, y in zip(value, read, strict=True)]
            state = [[x + key[a] * y for x, y in zip(state[a], told, strict=True)] for a in range(m.D)]
        mids, radius = m.enclosed(rule, (0.1,), 20)
        far = max(abs(Fraction(int(y), 2**m.POINT) - x) for row, mid in zip(state, mids, strict=True)
                  for x, y in zip(row, mid, strict=True))  # fmt: skip
        assert 0 < far <= radius < Fraction(1, 2**110)
        found = m.drift(rule, (0.1, 0.0), 300, ("float32",))
        for off, room in m.off_by(rule, found.state, (0.1, 0.0), 300):
            assert room < 2.0**-100
            assert off <= 300 * 40 * 8 * 2.0**-53
    seconds, size = m.timed("delta", 100)
    assert seconds > 0
    assert size == 4 * m.D * m.D


def test_the_plot_of_a_states_drift_shows_every_type(tmp_path):
    pytest.importorskip("matplotlib")
    root = Path(__file__).parents[1] / "benchmarks"
    target = tmp_path / "drift.svg"
    source = root / "results" / "recurrence-cpu.json"
    subprocess.run([sys.executable, root / "_plot_recurrence.py", source, target], check=True)
    text = target.read_text()
    for label in ("float32", "bfloat16", "float16", "the delta rule with gates", "0.0001"):
        assert label in text


class Gpu:
    """A GPU of which a call takes 1 ms, and its host, of which it takes 0.4; times in milliseconds."""

    def __init__(self):
        self.host = self.free = 0.0

    def sleep(self, clocks):
        self.free = max(self.free, self.host) + clocks / 2e6

    def call(self):
        self.host += 0.4
        self.free = max(self.free, self.host) + 1.0

    def event(self, enable_timing):
        found = SimpleNamespace()
        found.record = lambda: vars(found).update(at=max(self.free, self.host))
        found.elapsed_time = lambda end: end.at - found.at
        found.synchronize = lambda: vars(self).update(host=max(self.host, found.at))
        return found


def test_what_is_queued_ahead_is_measured_without_python(monkeypatch):
    gpu = Gpu()
    torch = SimpleNamespace(cuda=SimpleNamespace(Event=gpu.event, _sleep=gpu.sleep))
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: gpu.host / 1e3))
    assert bench.gpu_medians(torch, {"x": gpu.call})["x"] == pytest.approx(1.4)
    assert bench.gpu_medians(torch, {"x": gpu.call}, ahead=True)["x"] == pytest.approx(1.0)
    assert bench.gpu_medians(torch, {"x": gpu.call}, least_ms=4, ahead=True)["x"] == pytest.approx(1.0)
