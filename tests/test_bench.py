import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import refattn.bench
from refattn import bench


def test_what_was_measured_before_an_error_is_kept(tmp_path, monkeypatch):
    rows = "def rows():\n    yield Row('a', 2.0, 'ms', at_most=1.0)\n    raise OSError('gone')\n"
    text = f"from refattn.bench import Row\n{rows}"
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.setattr(refattn.bench, "_folder", lambda: tmp_path)
    with pytest.raises(OSError, match="gone"):
        bench.run("broken", Console(quiet=True), str(tmp_path / "x.json"))
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert (row["name"], row["value"], row["holds"]) == ("a", 2.0, False)


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
    linear = m.drift("linear", (0.1,), 300, ("float32",))
    mid, radius = m.enclosed(0.1, 300)
    # 300 steps round a decay, a product and a sum each, of numbers no larger than the sum of all sizes
    k, v, _ = m.tokens(300)
    assert (abs(linear.state[0] - mid) <= radius + 900 * 2.0**-53 * (abs(k).T.astype(float) @ abs(v))).all()


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
