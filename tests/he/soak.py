"""Load a server for minutes, with faults, and look at every reply: python -m tests.he.soak --minutes 10 --clients 50.

Clients ask honestly and compare what they decrypt with the exact answer, or send what is cut short, slow, changed,
repeated or another's; meanwhile sessions' processes are killed. No reply may be wrong, and memory must stay flat.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from refattn import he
from refattn.errors import InvalidInput, ServiceError
from refattn.he.remote import Remote
from refattn.he.saved import plan_to_json

from .make import planned, problem

CALL = problem(4, 4, 4, epsilon=1.0)
PLAN = planned(CALL, normalize="client")
BUSY = "sessions are in use"
KILL = 10.0
"""Seconds between two kills of a session's process."""


class Load:
    """The clients of a server, what they saw, and what was wrong."""

    def __init__(self, url, seed):
        self.url, self.seed, self.over = url, seed, threading.Event()
        self.count, self.wrong, self.lock = Counter(), [], threading.Lock()
        self.address = ("127.0.0.1", int(url.rpartition(":")[2]))

    def saw(self, what, wrong=""):
        with self.lock:
            self.count[what] += 1
            if wrong:
                self.wrong.append(f"{what}: {wrong}")

    def client(self, number):
        """Go on with one client until the end."""
        rng, client = random.Random(f"{self.seed} {number}"), he.Client(PLAN)
        kinds = [self.honest] * 4 + [self.changed, self.repeated, self.cut, self.slow, self.noise]
        while not self.over.is_set():
            kind = rng.choice(kinds)
            try:
                kind(client, rng)
            except (ServiceError, InvalidInput) as e:
                text = str(e)
                self.saw("busy" if BUSY in text else "a session that ended" if "session" in text else "refused", "")
                self.over.wait(rng.uniform(0.1, 1.0))
            except OSError as e:
                self.saw("connection", f"{type(e).__name__}: {e}")
            except Exception as e:
                self.saw(kind.__name__, f"{type(e).__name__}: {e}")

    def right(self, client, reply, kind):
        off = float(np.abs(client.decrypt(reply) - he.reference(CALL)).max())
        self.saw(kind, "" if off <= PLAN.error else f"off by {off}, the plan's error is {PLAN.error}")

    def honest(self, client, rng):
        with Remote(self.url, seconds=120.0) as server:
            server.plan()
            server.open(client.evaluation_keys())
            for _ in range(rng.randint(1, 4)):
                self.right(client, server.attend(client.encrypt(CALL)), "right")

    def refused(self, server, body, kind, *texts):
        """Send what must be refused, with one of some texts."""
        try:
            server.attend(body)
        except (InvalidInput, ServiceError) as e:
            if "session" in str(e):  # it was killed meanwhile
                raise
            self.saw(kind, "" if any(t in str(e) for t in texts) else str(e))
        else:
            self.saw(kind, "answered")

    def changed(self, client, rng):
        with Remote(self.url, seconds=120.0) as server:
            server.plan()
            server.open(client.evaluation_keys())
            body = bytearray(client.encrypt(CALL))
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            self.refused(server, bytes(body), "changed", "changed", "message", "version", "digest", "expected")
            self.right(client, server.attend(client.encrypt(CALL)), "right after a changed one")

    def repeated(self, client, rng):
        with Remote(self.url, seconds=120.0) as server:
            server.plan()
            server.open(client.evaluation_keys())
            body = client.encrypt(CALL)
            self.right(client, server.attend(body), "right")
            self.refused(server, body, "repeated", "asked before")

    def head(self, length):
        return f"POST /sessions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()

    def cut(self, client, rng):
        with socket.create_connection(self.address, 30) as s:
            keys = client.evaluation_keys()
            s.sendall(self.head(len(keys)) + keys[: rng.randrange(len(keys))])
        self.saw("cut short")

    def slow(self, client, rng):
        with socket.create_connection(self.address, 30) as s:
            s.sendall(self.head(len(client.evaluation_keys())))
            for _ in range(rng.randint(1, 20)):
                if self.over.wait(0.2):
                    break
                try:
                    s.sendall(b"x")
                except OSError:  # the server has had enough
                    break
        self.saw("slow")

    def noise(self, client, rng):
        with socket.create_connection(self.address, 30) as s:
            s.sendall(rng.randbytes(rng.randint(1, 4000)) + b"\r\n\r\n")
            s.settimeout(30)
            answer = s.recv(4096)
        self.saw("noise", "" if not answer or answer.startswith(b"HTTP/1.1 4") else repr(answer[:80]))


def family(pid):
    """Return a process and all that it started, those of a server."""
    found, todo = [], [pid]
    while todo:
        at = todo.pop()
        found.append(at)
        try:
            todo += map(int, Path(f"/proc/{at}/task/{at}/children").read_text().split())
        except OSError:
            continue
    return found


def memory(pid):
    """Return a process's resident memory in MiB, its files, 0 where it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0.0, 0


def soak(minutes, clients, seed=0, sessions=8, every=KILL):
    """Return what was seen, what was wrong, and (server's MiB, its files, processes) over time."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "plan.json").write_text(plan_to_json(PLAN))
        command = [sys.executable, "-u", "-m", "refattn", "he", "serve", "plan.json", "--port", "0"]
        command += ["--sessions", str(sessions), "--expire", "60"]
        with (
            open(Path(folder, "log"), "w+") as log,
            subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True) as server,
        ):
            try:
                url = server.stdout.readline().split()[-1]
                load, curve = _loaded(Load(url, seed), server.pid, minutes, clients, every)
                if server.poll() is not None:
                    load.wrong.append(f"the server ended with exit code {server.returncode}")
            finally:
                server.terminate()
                try:
                    server.wait(60)
                except subprocess.TimeoutExpired:
                    server.kill()
                    load.wrong.append("the server did not end within 60 s")
            log.seek(0)
            if "Traceback" in (text := log.read()):
                load.wrong.append("a traceback in the server's log: " + text[-1000:])
    return load.count, load.wrong, curve


def _loaded(load, pid, minutes, clients, every):
    rng, curve = random.Random(load.seed), []
    threads = [threading.Thread(target=load.client, args=(i,)) for i in range(clients)]
    for t in threads:
        t.start()
    end, kill = time.monotonic() + 60 * minutes, time.monotonic() + every
    while time.monotonic() < end:
        time.sleep(1.0)
        tree = family(pid)
        curve.append((*memory(pid), len(tree)))
        workers = [p for p in tree[1:] if memory(p)[0] > 20]
        if workers and time.monotonic() > kill:
            kill = time.monotonic() + every
            try:
                os.kill(rng.choice(workers), signal.SIGKILL)
                load.saw("killed processes")
            except ProcessLookupError:
                pass
    load.over.set()
    for t in threads:
        t.join(180)
        if t.is_alive():
            load.wrong.append("a client hangs")
            break
    client = he.Client(PLAN)
    load.honest(client, rng)  # it still serves
    return load, curve


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    count, wrong, curve = soak(asked.minutes, asked.clients, asked.seed)
    for text in wrong[:20]:
        print(text)
    third = max(1, len(curve) // 3)
    for name, i in (("MiB of the server's process", 0), ("files that it holds open", 1), ("processes", 2)):
        early, late = (float(np.median([x[i] for x in part])) for part in (curve[third : 2 * third], curve[-third:]))
        print(f"{name}: median {early:.0f} in the second third, {late:.0f} in the last")
    print(", ".join(f"{n} {what}" for what, n in count.most_common()))
    print(f"{sum(count.values())} requests: {len(wrong)} wrong")
    sys.exit(bool(wrong))
