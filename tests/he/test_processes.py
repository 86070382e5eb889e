"""What is left when a server ends, however it ends: no process with keys, no file with ciphertexts."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from refattn import he
from refattn.errors import WorkerDied
from refattn.he import shared
from refattn.he.processes import limit_memory, pool_of, stop
from refattn.he.shared import copied, held

from .make import planned, problem

pytest.importorskip("tenseal")
PROC = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
SERVER = """
import os, signal, sys, tempfile
from multiprocessing import active_children
from refattn import he
from tests.he.make import planned, problem

def refused(*given, **more):
    raise AssertionError("a file with a name")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
    x = problem(4, 4, 4, epsilon=1.0)
    plan = planned(x, normalize="client")
    client = he.Client(plan)
    if sys.platform == "linux":
        tempfile.mkstemp = tempfile.mkdtemp = refused
    server = he.Server(plan, client.evaluation_keys(), workers=2)
    query = client.encrypt(x)
    server.attend(query)
    print(*(p.pid for p in active_children()), flush=True)
    while True:
        server.attend(query)
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(true, seconds=60.0):
    """Wait until something is true, and return whether it became so."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@PROC
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_their_parent(tmp_path, how):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "server.py").write_text(SERVER)
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(tmp_path / "server.py")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            children = [int(x) for x in server.stdout.readline().split()]
            assert children
            assert all(map(alive, children))
            server.send_signal(how)
            server.wait(60)
            assert until(lambda: not any(map(alive, children)))
        finally:
            server.kill()
    assert os.listdir(tmp_path / "tmp") == []


def names_of(pid):
    """Return what a process has open."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:  # the folder's own
            continue
    return found


@PROC
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memory without a name")
def test_no_ciphertext_is_shared_after_the_reply(monkeypatch):
    x = problem(4, 4, 4, epsilon=1.0)
    plan = planned(x, normalize="client")
    client = he.Client(plan)
    seen = []
    original = shared._written

    def noted(fd, data, start):
        seen.append(os.readlink(f"/proc/self/fd/{fd}"))
        original(fd, data, start)

    monkeypatch.setattr(shared, "_written", noted)
    with he.Server(plan, client.evaluation_keys(), workers=2) as server:
        out = client.decrypt(server.attend(client.encrypt(x)))
        assert np.abs(out - he.reference(x)).max() <= plan.error
        assert set(seen) == {"/memfd:refattn-query (deleted)"}
        for pid in (os.getpid(), *server._pool._processes):
            assert not any("refattn-query" in name for name in names_of(pid))
        processes = list(server._pool._processes)
    assert until(lambda: not any(map(alive, processes)))


@pytest.mark.parametrize("nameless", [True, False])
def test_what_is_held_is_read_as_it_is_and_gone_at_the_end(tmp_path, monkeypatch, nameless):
    if not nameless:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    parts = [b"abc", b"", bytes(range(256)) * 5000]
    with held([memoryview(x) for x in parts]) as slices, open(tmp_path / "mine", "w+b", buffering=0) as mine:
        mine.write(b"longer than the first part")
        for part, where in zip(parts, slices, strict=True):
            copied(where, mine.fileno())
            mine.seek(0)
            assert mine.read() == part
        names = [n for n in os.listdir(tmp_path) if n != "mine"]
        if not nameless or not hasattr(os, "memfd_create"):
            assert [stat.S_IMODE(os.stat(tmp_path / n).st_mode) for n in names] == [0o600]
        else:
            assert names == []
    assert os.listdir(tmp_path) == ["mine"]
    with pytest.raises(KeyError), held(parts):
        raise KeyError
    assert os.listdir(tmp_path) == ["mine"]


def test_a_server_whose_process_died_says_so():
    x = problem(4, 4, 4, epsilon=1.0)
    plan = planned(x, normalize="client")
    client = he.Client(plan)
    with he.Server(plan, client.evaluation_keys(), workers=2) as server:
        server.attend(client.encrypt(x))
        for process in server._pool._processes.values():
            process.kill()
        with pytest.raises(WorkerDied, match="workers: a process ended before it was done"):
            server.attend(client.encrypt(x))


def greedy(size):
    limit_memory(2**26)
    return len(bytearray(size))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_has_a_limit():
    pool = pool_of(1)
    assert pool.submit(greedy, 2**20).result() == 2**20
    with pytest.raises(MemoryError):
        pool.submit(greedy, 2**30).result()
    stop(pool)
