"""What reads what others wrote, and a valid input for each."""

import json
import random
import time
from pathlib import Path

import numpy as np

import refattn
from refattn.cli.baseline import Baseline
from refattn.errors import RefattnError
from refattn.files import load_arrays, load_problem, save_arrays, save_problem
from refattn.golden.make import check_results, make, verify
from refattn.he import wire
from refattn.he.saved import load_weights, plan_from_json, plan_to_json, save_weights

from ..he.make import planned
from ..he.make import problem as small
from ..he.test_layer import layer
from .mutate import of_bytes, of_json, of_zip
from .service import KEYS, QUERY, REQUESTS, Port, Sealed

SECONDS = 10.0
"""The most that one input may take."""


def problem():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 4)).astype(np.float32) for n in (3, 5, 5))
    return refattn.Problem(q, k, v, causal="bottom_right", scale=0.3, sink=np.ones(2, np.float32))


class Readers:
    """Every reader by name: ``read(data)``, what is valid, and how it is changed."""

    def __init__(self, folder):
        self.folder = Path(folder)
        file = self.folder / "x.npz"
        save_problem(problem(), file)
        saved = file.read_bytes()
        save_arrays({"out": np.ones((2, 3)), "lse": np.ones(2, np.float32)}, file)
        arrays = file.read_bytes()
        made = planned(small(4, 4, 4, epsilon=1.0))
        weights = self._weights(file)
        golden = self._golden()
        message = wire.pack(wire.Message(1, b"p" * 32, b"c" * 16, b"q" * 16, (b"abc", b"defg")))
        text = plan_to_json(made).encode()
        self.sealed, self.port = Sealed(), Port(folder)
        baseline = b'seed = 3\n[kernel]\n"gaussian/plain[float32]" = "out"\n'
        self.all = {
            "problem": (self.file(load_problem, ".npz"), saved, (of_bytes, of_zip)),
            "arrays": (self.file(load_arrays, ".npz"), arrays, (of_bytes, of_zip)),
            "weights": (self.file(load_weights, ".npz"), weights, (of_bytes, of_zip)),
            "plan": (plan_from_json, text, (of_bytes, of_json)),
            "golden": (self.read_golden, golden, (of_bytes, of_json)),
            "baseline": (self.file(lambda path: Baseline(str(path), new=False), ".toml"), baseline, (of_bytes,)),
            "ciphertext": (self.sealed.ciphertext, self.sealed.parts[QUERY][0], (of_bytes,)),
            "key": (self.sealed.key, self.sealed.parts[KEYS][0], (of_bytes,)),
            "request": (self.port.request, REQUESTS[1], (of_bytes, self.of_request)),
            "message": (lambda data: wire.unpack(data, 1, b"p" * 32, 10**6), message, (of_bytes,)),
        }

    def close(self):
        self.port.close()

    def of_request(self, rng, data):
        return of_bytes(rng, rng.choice(REQUESTS))

    def file(self, read, ending):
        """A reader of bytes from a reader of files."""
        path = self.folder / f"read{ending}"

        def of_data(data):
            path.write_bytes(data)
            return read(path)

        return of_data

    def _weights(self, path):
        save_weights(layer(n=4, d=4, heads=1, classes=2)[0], path)
        return path.read_bytes()

    def _golden(self):
        make(self.folder / "golden", only="gaussian/plain*", dtypes=["float32"])
        self.document = next(p for p in (self.folder / "golden").rglob("*.json") if p.name != "manifest.json")
        return self.document.read_bytes()

    def read_golden(self, data):
        kept = self.document.read_bytes()
        self.document.write_bytes(data)
        try:
            return verify(self.folder / "golden"), check_results(self.folder / "golden", self.folder / "golden")
        finally:
            self.document.write_bytes(kept)


def attack(readers, name, seed):
    """Read one changed input: what went wrong, or "" for a value or a RefattnError in time."""
    read, valid, changes = readers.all[name]
    rng = random.Random(f"{name} {seed}")
    data = valid
    for _ in range(rng.randint(1, 2)):
        change = rng.choice(changes)
        try:
            data = change(rng, data)
        except (ValueError, KeyError, IndexError, json.JSONDecodeError, NotImplementedError):  # no longer of that form
            data = of_bytes(rng, data)
        except Exception as e:  # zipfile's own
            if type(e).__name__ not in ("BadZipFile", "error"):
                raise
            data = of_bytes(rng, data)
    start = time.perf_counter()
    try:
        read(data)
    except RefattnError:
        pass
    except Exception as e:
        return f"{name} {seed}: {type(e).__name__}: {str(e)[:200]}"
    took = time.perf_counter() - start
    return f"{name} {seed}: {took:.1f} s" if took > SECONDS else ""
