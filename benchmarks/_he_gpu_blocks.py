"""Blocks on a GPU, for he_gpu: one, and two with a masked refresh, in one process and over loopback."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refattn import he
from refattn.bench import Row, load
from refattn.errors import UnsupportedProblem
from refattn.he.device.session import bytes_of
from refattn.he.saved import save_weights
from refattn.he.service import Remote
from refattn.he.wire import MASKED, kind_of

of = load("he_gpu")


def block() -> Iterator[Row]:
    """Yield the figures of a whole block, 16 tokens, d = 64, 4 heads, 256 hidden features: that of the benchmark he."""
    try:
        from refattn.he.torch import weights_of
    except ModuleNotFoundError as e:
        raise UnsupportedProblem("bench: the block needs PyTorch") from e
    module, tokens, _ = load("he").a_block()
    layer = he.Layer(weights_of(module, 16), tolerance=1e-2)
    client = he.Client(layer.plan)
    keys, query = client.evaluation_keys(), client.encrypt(tokens)
    start = time.perf_counter()
    with he.Server(layer, keys, device="cuda") as gpu:
        yield Row("block 16 x 64, session begun in", time.perf_counter() - start, "s")
        session = of.session_of(gpu)
        out = client.decrypt(gpu.attend(query))
        yield Row("block 16 x 64, computing", of.computing_ms(session, session.compute), "ms")
        for name, message in (("", query), (", not compressed", of.uncompressed(query, layer.plan))):
            took = 1e3 * of.seconds(partial(gpu.attend, message))
            yield Row(f"block 16 x 64, bytes to bytes{name}", took, "ms", at_most=100.0)
        yield Row("block 16 x 64, memory of the session", bytes_of(*session.schedules) / 1e9, "GB")
    off = float(np.abs(out - layer.simulate(tokens)).max())
    yield Row("block 16 x 64, noise", off, "absolute")


@contextmanager
def served(weights: Any, device: str) -> Iterator[str]:
    """Give the URL of `refattn he serve` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.npz"
        save_weights(weights, path)
        command = [sys.executable, "-m", "refattn", "he", "serve", str(path), "--port", "0", "--device", device]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                yield process.stdout.readline().split()[-1]
            finally:
                process.terminate()


def prepared(client: he.Client, call: Callable[[], Any]) -> tuple[float, Any]:
    """Return a client's seconds to prepare, and what a call then returns."""
    start = time.perf_counter()
    client.prepare()
    return time.perf_counter() - start, call()


def conversation(client: he.Client, server: he.Server | Remote, tokens: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Return a client's seconds, a server's, and the result, of an input."""
    start = time.perf_counter()
    message, of_server = client.encrypt(tokens), 0.0
    while True:
        begin = time.perf_counter()
        answer = server.attend(message)
        of_server += time.perf_counter() - begin
        if kind_of(answer) != MASKED:
            break
        message = client.refresh(answer)
    out = client.decrypt(answer)
    return time.perf_counter() - start - of_server, of_server, out


def encoder() -> Iterator[Row]:
    """Yield the figures of two blocks: an input's way over loopback, and what client and server have of it."""
    try:
        from refattn.he.torch import weights_of

        module, tokens = load("he").an_encoder(2)
    except ModuleNotFoundError as e:
        raise UnsupportedProblem("bench: the encoder needs PyTorch") from e
    weights = weights_of(module, 16)
    at = "two-layer encoder, 16 tokens, d = 64, masked refresh"
    start = time.perf_counter()
    program = he.Encoder(weights, tolerance=1e-2, device="cuda")
    yield Row(f"{at}, planned in", time.perf_counter() - start, "s")
    client = he.Client(program.plan)
    keys = client.evaluation_keys()
    yield Row(f"{at}, ciphertexts up", program.plan.loads().total(), "")
    yield Row(f"{at}, up", program.plan.upload_bytes / 1e6, "MB")
    yield Row(f"{at}, keys", len(keys) / 1e6, "MB")
    start = time.perf_counter()
    with he.Server(program, keys, device="cuda") as gpu:
        yield Row(f"{at}, session begun in", time.perf_counter() - start, "s")
        session = of.session_of(gpu)
        yield Row(f"{at}, memory of the session", bytes_of(*session.schedules) / 1e9, "GB")
        conversation(client, gpu, tokens)
        times = [conversation(client, gpu, tokens) for _ in range(3)]
        ahead = [prepared(client, partial(conversation, client, gpu, tokens)) for _ in range(3)]
        yield Row(f"{at}, computing", of.computing_ms(session, session.compute), "ms")
    yield Row(f"{at}, client", statistics.median(x for x, _, _ in times), "s")
    yield Row(f"{at}, client, prepared", statistics.median(x for _, (x, _, _) in ahead), "s", at_most=0.4)
    yield Row(
        f"{at}, client and server, prepared", statistics.median(x + y for _, (x, y, _) in ahead), "s", at_most=0.5
    )
    yield Row(f"{at}, client prepares in", statistics.median(x for x, _ in ahead), "s")
    yield Row(f"{at}, server on the GPU", statistics.median(x for _, x, _ in times), "s")
    expected = program.simulate(tokens)
    off = max(float(np.abs(out - expected).max()) for _, _, out in times)
    yield Row(f"{at}, noise", off, "absolute", at_most=1e-4)
    for device, runs in (("cuda", 3), ("cpu", 1)):
        yield from over_loopback(weights, tokens, at, device, runs)


def more_tokens(n: int, tolerance: float) -> Iterator[Row]:
    """Yield the figures of two blocks of more tokens than fit a ciphertext's slots, whose queries come in parts."""
    try:
        import torch

        from refattn.he import torch as nets
    except ModuleNotFoundError as e:
        raise UnsupportedProblem("bench: the encoder needs PyTorch") from e
    module, tokens = load("he").an_encoder(2, n)
    with torch.no_grad():
        clear = nets.polynomial(module, False)(torch.tensor(tokens)[None])[0].numpy()
    program = he.Encoder(nets.weights_of(module, n), tolerance=tolerance, device="cuda")
    plan, at = program.plan, f"two-layer encoder, {n} tokens, d = 64, masked refresh"
    yield Row(f"{at}, parts of queries", plan.query_parts, "")
    yield Row(f"{at}, ciphertexts up", plan.loads().total(), "")
    yield Row(f"{at}, up", plan.upload_bytes / 1e6, "MB")
    client = he.Client(plan)
    keys = client.evaluation_keys()
    yield Row(f"{at}, keys", len(keys) / 1e6, "MB")
    with he.Server(program, keys, device="cuda") as gpu:
        session = of.session_of(gpu)
        yield Row(f"{at}, memory of the session", bytes_of(*session.schedules) / 1e9, "GB")
        yield Row(f"{at}, computing", of.computing_ms(session, session.compute), "ms")
        conversation(client, gpu, tokens)
        took, of_server, out = conversation(client, gpu, tokens)
    yield Row(f"{at}, client", took, "s")
    yield Row(f"{at}, server on the GPU", of_server, "s")
    off = float(np.abs(out - program.simulate(tokens)).max())
    yield Row(f"{at}, noise", off, "absolute", at_most=1e-4)
    yield Row(f"{at}, encrypted class is the clear one", float(out.argmax() == clear.argmax()), "", at_least=1.0)


def over_loopback(weights: Any, tokens: np.ndarray, at: str, device: str, runs: int) -> Iterator[Row]:
    """Yield the time of an input's way over 127.0.0.1, a server in a process of its own, and what that and HTTP have.

    On a GPU also of a client that does not compress what it sends.
    """
    name, most = f"{at} over loopback, per input, {device}", 0.5 if device == "cuda" else None
    with served(weights, device) as url, Remote(url) as remote:
        plan = remote.plan()
        assert not isinstance(plan, he.DecodingPlan)
        client = he.Client(plan)
        remote.open(client.evaluation_keys())
        ask = partial(conversation, client, remote, tokens)
        yield Row(name, of.seconds(ask, runs), "s")
        for more in ("", ", not compressed") if device == "cuda" else ("",):
            client._compressed = client._zeros._compressed = not more
            soon = [prepared(client, ask)[1] for _ in range(runs)]
            yield Row(f"{name}, prepared{more}", statistics.median(x + y for x, y, _ in soon), "s", at_most=most)
            yield Row(f"{name}, prepared{more}, of it HTTP and server", statistics.median(y for _, y, _ in soon), "s")
