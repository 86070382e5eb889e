"""Parts, processes, checkpoints, interrupts: the same bits whatever the way."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from refattn import InvalidInput, Problem, evaluate, load_problem, save_problem
from refattn.errors import WorkerDied
from refattn.exact import parts as module
from refattn.exact.parts import fingerprint


def same(a, b):
    assert set(a.values) == set(b.values)
    for n, x in a.values.items():
        assert x.dtype == b.values[n].dtype
        assert x.tobytes() == b.values[n].tobytes(), n
    assert a.undecided == b.undecided


CALLS = {
    "plain": {},
    "causal": {"causal": "bottom_right"},
    "window": {"window": (3, 1), "causal": "top_left"},
    "masks": {
        "allowed": np.random.default_rng(0).random((2, 1, 9, 11)) < 0.7,
        "bias": np.random.default_rng(1).standard_normal((1, 4, 1, 11)).astype(np.float32),
        "sink": np.arange(4, dtype=np.float32),
    },
    "linear": {"variant": "linear", "causal": "bottom_right"},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("jobs", [1, 2])
def test_parts_give_the_same_bits(name, jobs, make, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 4)
    p = make(9, 11, 8, b=2, h=4, h_kv=2, **CALLS[name])
    told = []
    want = evaluate(p, rounding="bfloat16")
    got = evaluate(p, rounding="bfloat16", n_jobs=jobs, progress=lambda i, n: told.append((i, n)))
    same(want, got)
    assert told[-1] == (12, 12)  # 2 batches, 2 key heads, 3 blocks of rows
    for n, e in want.enclosures.items():
        assert e.mid.shape == got.enclosures[n].mid.shape
    assert sum(s["decided"] for s in got.stats.values()) == sum(x.size for x in want.values.values())


def test_gradients_in_parts(make):
    p = make(6, 6, 8, b=2, h=4, h_kv=2, causal="top_left")
    dout = np.random.default_rng(0).standard_normal(p.out_shape).astype(np.float32)
    same(evaluate(p, rounding="float32", gradients=dout), evaluate(p, rounding="float32", gradients=dout, n_jobs=2))


def test_a_gradient_that_parts_would_share_is_kept_whole(make, tmp_path):
    p = make(4, 5, 8, b=2, bias=np.ones((1, 1, 4, 5), np.float32), sink=np.zeros(2, np.float32))
    dout = np.ones(p.out_shape, np.float32)
    want = evaluate(p, rounding="float32", gradients=dout)
    same(want, evaluate(p, rounding="float32", gradients=dout, n_jobs=2))
    same(want, evaluate(p, rounding="float32", gradients=dout, checkpoint=tmp_path))
    assert len(os.listdir(tmp_path)) == 1


def test_a_checkpoint_is_gone_on_from(make, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 3)
    p = make(9, 11, 8, h=2)
    want = evaluate(p, rounding="float32")

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        evaluate(p, rounding="float32", checkpoint=tmp_path, progress=stop)
    assert len(os.listdir(tmp_path)) == 2
    told = []
    same(want, evaluate(p, rounding="float32", checkpoint=tmp_path, progress=lambda i, n: told.append(i)))
    assert told == [2, 3, 4, 5, 6]
    other = make(9, 11, 8, h=2, seed=1)  # another call does not take those parts
    same(evaluate(other, rounding="float32"), evaluate(other, rounding="float32", checkpoint=tmp_path))
    assert len(os.listdir(tmp_path)) == 12


def test_a_damaged_part_is_named(make, tmp_path):
    p = make(4, 5, 8)
    evaluate(p, rounding="float32", checkpoint=tmp_path)
    victim = tmp_path / os.listdir(tmp_path)[0]
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(InvalidInput, match="is not an array file of refattn"):
        evaluate(p, rounding="float32", checkpoint=tmp_path)


def test_bad_arguments(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match=r"checkpoint: .* cannot be made"):
        evaluate(make(), rounding="float32", checkpoint=tmp_path / "file" / "folder")
    for jobs in (0, -1, True, 1.5):
        with pytest.raises(InvalidInput, match=f"n_jobs: got {jobs}, expected an integer of at least 1"):
            evaluate(make(), rounding="float32", n_jobs=jobs)


def test_killed_at_any_time_nothing_is_torn(make, tmp_path):
    """Killed at ten moments and gone on from each time: the answer is that of one run, and no file is half written."""
    p = make(200, 40, 16, h=2)
    save_problem(p, tmp_path / "p.npz")
    script = (
        "import sys; from refattn import evaluate, load_problem; from refattn.exact import parts; parts.ROWS = 10;"
        "evaluate(load_problem(sys.argv[1]), rounding='float64', checkpoint=sys.argv[2])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "p.npz"), str(tmp_path / "parts")]
    for i in range(10):
        process = subprocess.Popen(command)
        time.sleep(0.5 + 0.06 * i)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, check=True)
    assert done.returncode == 0
    files = [f for f in os.listdir(tmp_path / "parts") if not f.startswith(".")]
    assert len(files) == 40
    old = module.ROWS
    module.ROWS = 10
    try:
        same(evaluate(p, rounding="float64"), evaluate(p, rounding="float64", checkpoint=tmp_path / "parts"))
    finally:
        module.ROWS = old
    assert load_problem(tmp_path / "p.npz").n_q == 200


def test_a_cluster_of_dask_workers(make):
    import joblib
    from distributed import Client, LocalCluster

    p = make(6, 7, 8, b=2)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        got = evaluate(p, rounding="float32", n_jobs=2)
    same(evaluate(p, rounding="float32"), got)


def test_a_worker_that_dies_is_named_and_what_is_done_is_kept(make, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 3)
    todo = module.parts(make(9, 5, 4, h=2), None)

    def work(part):
        import os
        import time

        if part.head_kv == 1 and part.rows.start == 6:
            time.sleep(2)
            os._exit(1)
        return {"out.value": np.zeros(3)}

    found = []
    with pytest.raises(
        WorkerDied, match="a worker process died, perhaps for want of memory; use fewer, and checkpoint="
    ):
        found.extend(module.work_through(todo, work, 2, tmp_path, "name", None))
    assert 1 <= len(os.listdir(tmp_path)) < 6


def test_a_checkpoint_is_of_one_call_of_one_version(make, tmp_path, monkeypatch):
    x = make(8, 8, 4)
    swapped = {n: a.view(a.dtype.newbyteorder("S")) for n, a in x.arrays().items()}  # the same bytes, other numbers
    small = {n: np.where(np.abs(a) < 1e30, a, 1).astype(a.dtype) for n, a in swapped.items()}
    y = x.replace(**small)
    evaluate(y, rounding="float32", checkpoint=tmp_path)
    same(evaluate(x, rounding="float32"), evaluate(x, rounding="float32", checkpoint=tmp_path))
    # and the same numbers in the other order of bytes are the same call
    before = os.listdir(tmp_path)
    again = x.replace(**{n: a.astype(a.dtype.newbyteorder("S")) for n, a in x.arrays().items()})
    same(evaluate(x, rounding="float32"), evaluate(again, rounding="float32", checkpoint=tmp_path))
    assert os.listdir(tmp_path) == before
    monkeypatch.setattr(module, "VERSION", "another")
    evaluate(x, rounding="float32", checkpoint=tmp_path)
    assert len(os.listdir(tmp_path)) == len(before) + 2  # two heads


def test_the_name_of_a_call_holds_its_arrays_whole():
    a, b = np.arange(3000.0), np.arange(3000.0)
    b[1500] += 1  # in the middle, which str() leaves out
    q = np.ones((1, 1, 2, 4), np.float32)
    calls = [Problem(q, q, q, options={"decay": x}) for x in (a, b)]
    assert fingerprint(calls[0]) != fingerprint(calls[1])
    bytes_alone = [Problem(*[q.view(np.float32)] * 3), Problem(*[q.view(">f4")] * 3)]
    assert fingerprint(bytes_alone[0]) != fingerprint(bytes_alone[1])
