"""Rings in real processes: the right one passes, each planted bug is caught, and whatever a rank does is told."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refattn import InvalidInput, KernelError, Problem, UnsupportedProblem, assert_close
from refattn.devices import context_parallel
from refattn.devices.context_parallel import _cases, _merging, check_context_parallel, judged_ranks
from refattn.devices.ranks import Ranks, _loaded, _shard, function_of
from refattn.devices.tree import tree

from ..snippets import run
from . import rings

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed")
BROKEN = {
    "lse_in_base_2": {"out", "lse", "dq", "dk", "dv"},
    "lse_returned_in_base_2": {"lse"},
    "dk_of_the_neighbour": {"dk"},
    "not_rescaled": {"out", "dq", "dk"},
    "merged_by_halves": {"out", "dq", "dk"},
    "delta_of_a_part": {"dq", "dk"},
    "dq_of_the_last_step": {"dq"},
    "dv_not_summed_over_ranks": {"dv"},
    "lse_of_a_part": {"dq", "dk", "dv"},
}
"""The arrays that must be wrong, where not all are."""
CONTRACT = {
    "nothing": "rank 0: the function returned nothing; expected 'out' and, if it likes, 'lse', 'dq', 'dk', 'dv'",
    "unknown_name": "rank 0: the function returned 'out', 'dbias'; expected 'out' and, if it likes, 'lse', 'dq', 'dk', "
    "'dv'",
    "transposed": "rank 0: out: got shape (1, 4, 4, 8), expected (1, 4, 8, 4)",
    "wider": "rank 0: out: got dtype float64, expected float32",
    "lse_on_one_rank": "rank 1: the function returned out, lse, dq, dk, dv, on rank 0 out",
}
"""Functions whose ranks go on afterwards."""


def small(make):
    return make(16, 16, 4, h=4, h_kv=2, causal="bottom_right")


real = Ranks.run


@pytest.fixture(scope="module")
def pool():
    """Two ranks for all tests: that a rank imports PyTorch takes seconds."""
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """Exact answers are made once for each call of a test."""
    made, real = {}, context_parallel.expected

    def kept(problem, model, dout=None):
        key = id(problem), dout is None
        made.setdefault(key, (problem, real(problem, model, dout)))
        return made[key][1]

    monkeypatch.setattr(context_parallel, "expected", kept)


def judge(ranks, name, problem, layout="zigzag"):
    return judged_ranks(ranks, function_of(name)[1], problem, layout, _merging(problem, ranks.world_size, layout))


def test_rings_of_two_ranks(make, pool):
    p, models = small(make), []
    for layout in ("zigzag", "striped", "contiguous"):
        checks = judge(pool, "refattn.devices.ring:ring", p, layout)
        assert [c.name for c in checks] == ["call/rank-0[float32]", "call/rank-1[float32]"]
        assert [c.verdict for c in checks] == ["passed"] * 2
        assert [w.array for w in checks[0].arrays] == ["out", "lse", "dq", "dk", "dv"]
        models.append(_merging(p, 2, layout).split)
    assert models == [4, 8, 8]
    wide = make(8, 16, 4, h=2, causal="bottom_right")  # other places of rows than of keys
    assert [c.verdict for c in judge(pool, "refattn.devices.ring:ring", wide)] == ["passed"] * 2
    for name in rings.EDITS:
        checks = judge(pool, f"tests.devices.rings:{name}", p)
        wrong = {w.array for c in checks for w in c.arrays if not w.passed}
        assert wrong == BROKEN.get(name, {"out", "lse", "dq", "dk", "dv"}), name
        assert all(f"{n} at batch 0" in "".join(c.message for c in checks) for n in wrong)
    assert len(judge(pool, rings.out_alone, p)[0].arrays) == 1


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("always_causal", "scaled"),
        ("never_scaled", "scaled"),
        ("first_of_the_batch", "scaled"),
        ("no_window", "window"),
        ("no_offset", "offset"),
        ("no_softcap", "softcap"),
        ("other_corner", "corner"),
    ],
)
def test_what_is_ignored_shows_in_the_calls_that_are_drawn(pool, name, label):
    p = _cases(None, 2, "zigzag", 0)[label]
    assert {c.verdict for c in judge(pool, getattr(rings, name), p)} == {"failed"}
    assert {c.verdict for c in judge(pool, "refattn.devices.ring:ring", p)} == {"passed"}


def test_trees_of_two_ranks(pool):
    """Every call that is drawn; a part that is not weighed is caught."""
    for label, p in _cases(None, 2, "zigzag", 0).items():
        checks = judge(pool, "refattn.devices.tree:tree", p)
        assert [c.verdict for c in checks] == ["passed"] * 2, label
        assert [w.array for w in checks[0].arrays] == ["out", "lse", "dq", "dk", "dv"]
        assert {c.verdict for c in judge(pool, "tests.devices.rings:unweighed", p)} == {"failed"}


def test_results_that_break_the_contract_are_told(make, pool):
    p = small(make)
    for name, text in CONTRACT.items():
        with pytest.raises(KernelError, match=f"^{re.escape(text)}$"):
            judge(pool, getattr(rings, name), p)
    assert len(pool._processes) == 2  # the ranks go on


def test_the_page_runs(pool, monkeypatch):
    """By the ranks that are there."""
    monkeypatch.setattr(Ranks, "run", lambda self, *given: real(pool, *given))
    with np.errstate(all="ignore"):
        run(Path(__file__).parents[2] / "docs" / "devices.md")


def test_a_rank_that_dies_is_named_and_nothing_is_left(make, pool):
    """While its neighbour waits for it."""
    if not pool._processes:
        pool._start()
    were, start = list(pool._processes), time.monotonic()
    with pytest.raises(KernelError, match=r"^rank 1: its process ended by signal 9; all processes were ended$"):
        judge(pool, rings.dies, small(make))
    assert time.monotonic() - start < 50  # not by the time limit, which is 60
    assert pool._processes == []
    assert not any(p.is_alive() for p in were)


def running(pid):
    try:
        return not re.search(r"^State:\s+[ZX]", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except FileNotFoundError:
        return False


@pytest.fixture
def note(tmp_path, monkeypatch):
    """A file with a line for each rank that hangs: its process, and one that it started."""
    monkeypatch.setenv("REFATTN_TEST_NOTE", str(tmp_path / "note"))
    path = tmp_path / "note"
    yield path
    pids = [int(x) for line in path.read_text().splitlines() for x in line.split()]
    assert len(pids) >= 2
    end = time.monotonic() + 10
    while any(map(running, pids)) and time.monotonic() < end:
        time.sleep(0.05)  # what was killed is gone a moment later
    assert not any(map(running, pids))


def test_a_hang_is_ended(make, note):
    """Ranks that never answer, and what they started."""
    text = (
        "rank 0 of 1 gave no answer within 6 s, as where a message is waited for that nobody sends; all processes were "
        "ended"
    )
    with pytest.raises(KernelError, match=f"^{re.escape(text)}$"):
        check_context_parallel(rings.Sleeper(), world_size=1, problem=small(make), seconds=6)


def test_ctrl_c_ends_all(make, note):
    def press():
        end = time.monotonic() + 60
        while not note.exists() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process of pytest-xdist ignores it
    try:
        threading.Thread(target=press, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            check_context_parallel(rings.Sleeper(), world_size=1, problem=small(make))
    finally:
        signal.signal(signal.SIGINT, before)


def test_ranks_end_with_who_started_them(tmp_path, note):
    """However that came: here by a signal that nobody can catch."""
    script = tmp_path / "script.py"
    script.write_text(
        "from refattn import check_context_parallel\nfrom tests.devices.rings import Sleeper\n"
        "if __name__ == '__main__':\n    check_context_parallel(Sleeper(), world_size=1)\n"
    )
    root = Path(__file__).parents[2]
    started = subprocess.Popen([sys.executable, str(script)], cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    try:
        end = time.monotonic() + 60
        while not (note.exists() and note.read_text().endswith("\n")) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        started.kill()
        started.wait()


def test_what_cannot_be_run_is_told(make):
    p = small(make)
    with pytest.raises(KernelError, match=r"^rank 0: its process ended with exit code 7; all processes were ended$"):
        check_context_parallel(rings.Quitter(), world_size=1, problem=p)
    report = check_context_parallel(rings.Refuser(), world_size=1, problem=p)
    assert [(c.verdict, c.message) for c in report.checks] == [("unsupported", "rank 0: window: not here")]
    assert report.verdict == "nothing ran"


def test_what_cannot_be_imported_is_told():
    text = "the function could not be imported: ValueError: invalid literal for int() with base 10: 'no"
    with pytest.raises(KernelError, match=f"^{re.escape(text)}"):
        _loaded(function_of(rings.Raiser())[1])
    with pytest.raises(InvalidInput, match=r"^kernel: there is no Python file gone\.py; name yours as"):
        _loaded(function_of("gone.py:ring")[1])


def test_bad_input(make):
    p, ring = small(make), "refattn.devices.ring:ring"
    x = np.zeros((1, 1, 12, 2), np.float32)
    for wrong, text in (
        ({"world_size": 0}, "world_size: got 0, expected a whole number from 1 on"),
        ({"world_size": 65}, "world_size: got 65, expected a whole number from 1 to 64"),
        ({"layout": "spiral"}, "layout: got 'spiral', expected one of contiguous, zigzag, striped"),
        ({"backend": "mpi"}, "backend: got 'mpi', expected one of gloo, nccl"),
        ({"backend": "nccl", "world_size": 64}, f"backend: got 'nccl' with 64 ranks and {torch.cuda.device_count()} "
            "NVIDIA GPUs, expected one for each rank; take fewer, or gloo"),
        ({"seconds": 0}, "seconds: got 0, expected a number in (0, 1000000.0]"),
        ({"seconds": float("nan")}, "seconds: got nan, expected a number in (0, 1000000.0]"),
        ({"seed": -1}, "seed: got -1, expected a whole number from 0 on"),
        ({"model": "flash"}, "model: got 'flash', expected a Model, such as refattn.check.model.flash('float32')"),
        ({"problem": 3}, "problem: got 3, expected a Problem"),
        ({"problem": p.replace(sink=np.zeros(4, np.float32))},
            "problem: got 'sink', expected a call of query, key, value and the numbers scale, causal, window, softcap, "
            "offset, alignment alone"),
        ({"problem": Problem(x, x, x), "layout": "zigzag", "world_size": 4},
            "n: got 12 rows, which 'zigzag' does not cut into 8 equal chunks; pad them"),
    ):  # fmt: skip
        many = dict(wrong)
        if (ranks := wrong.get("world_size", 0)) >= 64:
            many["problem"] = Problem(*[np.zeros((1, 1, ranks, 2), np.float32)] * 3)
        with pytest.raises(InvalidInput, match=f"^{re.escape(text)}$"):
            check_context_parallel(ring, **many)
    for function, text in (
        (3, "function: got 3, expected a function of a Shard, or a name such as path/file.py:function"),
        ("ring", "function: got 'ring', expected package.module:function or path/file.py:function"),
    ):
        with pytest.raises(InvalidInput, match=f"^{re.escape(text)}$"):
            check_context_parallel(function)
    with pytest.raises(InvalidInput, match=r"^function: cannot be sent to other processes .*; define it at the top"):
        check_context_parallel(lambda shard: {})


def test_ranks_are_ended_where_all_went_well():
    with Ranks(1) as ranks:
        ranks._start()
        (one,), folder = ranks._processes, Path(ranks._folder.name)
        assert one.is_alive()
        assert folder.is_dir()
    assert not one.is_alive()
    assert not folder.exists()


def shard(make, dtype="float32", **more):
    """The one rank's shard of a call, without a process."""
    p = make(4, 4, 4, h=2, dtype=dtype, **more)
    (fields,) = context_parallel._fields(p, p.query, "contiguous", *([np.arange(4)],) * 2)
    return _shard(fields)


def test_what_is_not_taken_is_refused(make):
    for name, function in (("ring", rings.right.ring), ("tree", tree)):
        for change, text in (
            ({"options": {"sink": 0.0}}, f"sink: the {name} takes causal, scale, offset, alignment, window, softcap"),
            ({"query": torch.ones(1, dtype=torch.bfloat16)},
                f"query: the {name} takes float32 and float64, got torch.bfloat16"),
        ):  # fmt: skip
            with pytest.raises(UnsupportedProblem, match=f"^{re.escape(text)}$"):
                function(replace(shard(make), **change))
    with pytest.raises(UnsupportedProblem, match=r"^world_size: the tree takes powers of two, got 3$"):
        tree(replace(shard(make), world_size=3))


def test_the_ring_of_one_rank(make):
    """Alone it is the whole call: an offset, and another corner, too."""
    for more in (
        {"softcap": 0.5},
        {"causal": "top_left", "offset": 1, "scale": 0.3},
        {"causal": "bottom_right", "offset": -2},
        {"window": (1, 0), "alignment": "top_left"},
    ):
        p = make(4, 4, 4, h=2, **more)
        found = {n: x.numpy() for n, x in rings.right.ring(shard(make, **more)).items()}
        gradients = {n: found[n] for n in ("dq", "dk", "dv")}
        assert_close(found["out"], p, lse=found["lse"], gradients=gradients, dout=p.query)


def test_the_report_is_plain(make):
    """A report can be written, though nothing ran; what a function refuses is no failure."""
    with Ranks(1) as ranks:
        ranks.run = lambda *_: [{"out": np.zeros((1, 4, 16, 4), np.float32)}]
        (check,) = judged_ranks(ranks, b"", small(make), "contiguous", _merging(small(make), 1, "contiguous"))
    assert check.verdict == "failed"
    assert "64 of" not in check.message
    assert re.match(r"out at batch 0, head \d, row \d+, column \d: got 0, exact", check.message)
    json.dumps(check.message)
