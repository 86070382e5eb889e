"""Attention on ciphertexts: times, predictions, errors; blocks; decoding. Peers are in he_peers, data in he_data.

Normal inputs, epsilon a tenth of the mean denominator, 128-bit security. Times are the server's, from the query's bytes
to the reply's: medians of 5 after one to warm up, on one core unless workers are named. The worst errors seen are those
of 5 encryptions of such inputs and of 5 at the ends of the plan's ranges.
Floor: the circuit's operations at the costs that ``refattn.he.costs.measure`` finds on this machine for the plan's
ring, before and after each timing: the machine's speed changes within a minute.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from refattn import he
from refattn.bench import Row
from refattn.he.baselines import edge_call, random_call, random_sigmoid
from refattn.he.costs import measure
from refattn.he.planned import Planned
from refattn.he.wire import TOKEN, unpack
from refattn.he.worker import Sent
from refattn.problem import Problem

RUNS = 5
SIZES = ((16, 32, 1), (16, 64, 4), (32, 64, 1), (64, 64, 1), (128, 64, 1))
GRID = [(n, d, heads, p) for n, d, heads in SIZES for p in (2, 4)]


def timed(plan: he.Plan, x: Problem, workers: int) -> float:
    """Return the median seconds of a server."""
    client = he.Client(plan)
    with he.Server(plan, client.evaluation_keys(), workers) as server:
        query, times = client.encrypt(x), []
        for _ in range(RUNS + 1 + workers):
            start = time.perf_counter()
            server.attend(query)
            times.append(time.perf_counter() - start)
    return statistics.median(times[-RUNS:])


def compared(plan: Planned, queries: int, serve: Callable[[], object]) -> tuple[float, float]:
    """Return the median seconds of a server, and predicted over measured time: the median of pairs close in time."""
    times, expected = [], []
    serve()
    costs = measure(plan.ring)
    for _ in range(RUNS):
        seconds = []
        for _ in range(queries):
            start = time.perf_counter()
            serve()
            seconds.append(time.perf_counter() - start)
        before, costs = costs, measure(plan.ring)
        times.append(statistics.median(seconds))
        expected.append((plan.predicted_ms(before) + plan.predicted_ms(costs)) / 2e3)
    return statistics.median(times), statistics.median(e / t for e, t in zip(expected, times, strict=True))


def errors(plan: he.Plan, problems: tuple[Problem, ...]) -> tuple[float, float]:
    """Return the largest errors that are seen, against the definition and against the plain run."""
    client, worst = he.Client(plan), np.zeros(2)
    with he.Server(plan, client.evaluation_keys()) as server:
        for x in problems:
            references = he.reference(x), he.simulate(plan, x)
            for _ in range(RUNS):
                out = client.decrypt(server.attend(client.encrypt(x)))
                worst = np.maximum(worst, [np.abs(out - y).max() for y in references])
    return float(worst[0]), float(worst[1])


def rows() -> Iterator[Row]:
    """Ratios to the baselines, times, predictions and errors."""
    ratios, slack, power = [], [], {}
    for n, d, heads, p in GRID:
        x, given = random_call(n, d, heads, p)
        plan = he.plan(n, n, d, None, heads, p, **given)
        client = he.Client(plan)
        with he.Server(plan, client.evaluation_keys()) as server:
            seconds, ratio = compared(plan, 3, partial(server.attend, client.encrypt(x)))
        power[heads, n, d, p] = seconds
        error, noise = errors(plan, (x, edge_call(x, given)))
        at = f"{heads} x {n} x {d}, p={p}"
        yield Row(f"{at} server, {plan.upload_bytes / 1e6:.0f} MB up, degree {plan.ring.degree}", seconds, "s")
        ratios.append(ratio)
        yield Row(f"{at} predicted over measured time", ratio, "ratio")
        slack.append(plan.error / error)
        yield Row(f"{at} error's bound over the worst seen", slack[-1], "ratio", at_least=1.0, at_most=30.0)
        yield Row(f"{at} noise's bound over the worst seen", plan.noise / noise, "ratio", at_least=1.0)
    worst = max(ratios, key=lambda r: abs(r - 1))
    yield Row("predicted over measured time, furthest from 1", worst, "ratio", at_most=1.15, at_least=0.85)
    yield Row("error's bound over the worst seen, largest", max(slack), "ratio", at_most=30.0)
    for n, d, heads in (SIZES[0], SIZES[-1]):
        yield from sigmoid(n, d, heads, power[heads, n, d, 2])
    yield from block()
    yield from encoder()
    workers = os.cpu_count() or 1
    for heads, p, most in ((1, 2, 0.8), (1, 4, 1.2), (12, 2, 8.0)):
        x, given = random_call(128, 64, heads, p)
        for upload in ("full", "whole"):
            plan = he.plan(128, 128, 64, None, heads, p, **given, upload=upload, workers=workers)
            at = f"{heads} x 128 x 64, p={p}, {workers} workers, {plan.upload_bytes / 1e6:.0f} MB up"
            yield Row(at, timed(plan, x, workers), "s", at_most=most if upload == "whole" else None)
    yield from decoding()


def sigmoid(n: int, d: int, heads: int, power: float) -> Iterator[Row]:
    """Sigmoid attention, its errors on inputs as they are drawn, and its time over power-softmax's, p = 2."""
    x, given = random_sigmoid(n, d, heads)
    plan = he.plan_sigmoid(n, n, d, heads=heads, **given)
    client = he.Client(plan)
    with he.Server(plan, client.evaluation_keys()) as server:
        seconds, ratio = compared(plan, 3, partial(server.attend, client.encrypt(x)))
    error, noise = errors(plan, (x,))
    at = f"sigmoid {heads} x {n} x {d}, degree {plan.polynomial.degree}"
    yield Row(f"{at} server, {plan.upload_bytes / 1e6:.0f} MB up, degree {plan.ring.degree}", seconds, "s")
    yield Row(f"{at} over power-softmax, p=2", seconds / power, "ratio")
    yield Row(f"{at} predicted over measured time", ratio, "ratio")
    yield Row(f"{at} error's bound over the worst seen", plan.error / error, "ratio", at_least=1.0)
    yield Row(f"{at} noise's bound over the worst seen", plan.noise / noise, "ratio", at_least=1.0)


def decoding() -> Iterator[Row]:
    """A sequence of 128 tokens: the time of the last of them, and the worst error of those that are attended to.

    Of one head all are. Of twelve, which would take above a minute, those between the first and the last six go into
    the cache without a step of their own: the last ones' cache, time and error are the same.
    """
    for heads in (1, 12):
        x = random_call(128, 64, heads, 2)[0].replace(causal="bottom_right")
        q, k, v = (np.asarray(a)[0] for a in (x.query, x.key, x.value))
        plan = he.plan_decoding(128, 64, heads=heads, **he.ranges(x, margin=0.05))
        client = he.DecodingClient(plan)
        server, exact, times, worst = he.DecodingServer(plan, client.evaluation_keys()), he.reference(x)[0], [], 0.0
        for i in range(128):
            token = client.encrypt_token(q[:, i], k[:, i], v[:, i])
            if heads > 1 and 0 < i < 127 - RUNS:
                appended(server._held, token)
                continue
            start = time.perf_counter()
            reply = server.step(token)
            times.append(time.perf_counter() - start)
            worst = max(worst, float(np.abs(client.decrypt(reply) - exact[:, i]).max()))
        seconds, predicted = statistics.median(times[-RUNS:]), plan.predicted_ms(measure(plan.ring)) / 1e3
        at = f"decoding {heads} x 128 x 64, p=2"
        up = f"{plan.upload_bytes / 1e6:.0f} MB up, {server.cache_bytes / 1e6:.0f} MB of cache"
        yield Row(f"{at}, the last token, {up}, degree {plan.ring.degree}", seconds, "s")
        yield Row(f"{at}, predicted over measured time", predicted / seconds, "ratio")
        yield Row(f"{at}, error's bound over the worst seen", plan.error / worst, "ratio", at_least=1.0)


def appended(held: Any, token: bytes) -> None:
    """Put a token into SEAL's cache, as a step does, and compute nothing else."""
    parts = unpack(token, TOKEN, held.plan.digest, 2**40).parts[1:]
    loaded = held._worker.loaded(list(map(Sent, parts, held.plan.part_limbs())))
    held.cache = held.cache.appended(held.arithmetic, loaded)


def a_block() -> tuple[Any, np.ndarray, np.ndarray]:
    """Return a block (16 tokens, d = 64, 4 heads, 256 hidden features, weights as PyTorch begins), tokens, result."""
    import torch

    from refattn.he import torch as nets

    torch.manual_seed(0)
    x = torch.randn(1, 16, 64, dtype=torch.float64)

    def made(denominator: tuple[float, float], low: float, high: float, most: float) -> nets.Block:
        torch.manual_seed(0)
        attention = nets.PowerSoftmaxAttention(64, 4, p=2, epsilon=1.0, denominator=denominator, tolerance=1e-2)
        norm, act = nets.PolynomialRMSNorm(64, low, high, 1e-2), nets.PolynomialActivation("gelu", most, 1e-2)
        return nets.Block(attention, norm, 256, act).double()

    first = made((1.0, 1e3), 0.1, 1.0, 1.0)
    with torch.no_grad():
        exact = first(x)[0].numpy()
    seen = [part.seen for part in (first.attention, first.norm, first.activation)]
    module = made(
        (1.0, 1.2 * seen[0][1]), seen[1][0] / 1.2, seen[1][1] * 1.2, 1.2 * max(abs(seen[2][0]), abs(seen[2][1]))
    )
    return module, x[0].numpy(), exact


def an_encoder(blocks: int, n: int = 16) -> tuple[Any, np.ndarray]:
    """Return an encoder (n tokens, d = 64, 4 heads, 256 hidden features, 10 classes, as PyTorch begins), and tokens.

    The polynomials are for what 64 inputs show, with room.
    """
    import torch

    from refattn.he import torch as nets

    torch.manual_seed(0)
    x = torch.randn(64, n, 64, dtype=torch.float64)

    def made(k: int) -> nets.Block:
        attention = nets.PowerSoftmaxAttention(64, 4, p=2, epsilon=1.0, denominator=(1.0, 1e3), tolerance=1e-2)
        norm, first = (nets.PolynomialRMSNorm(64, 0.1, 2.0, 1e-2) for _ in range(2))
        return nets.Block(attention, norm, 256, nets.PolynomialActivation("gelu", 4.0, 1e-2), first if k else None)

    module = nets.Encoder([made(k) for k in range(blocks)], torch.nn.Linear(64, 10)).double()
    he.ranges(module, x)
    return module, x[0].numpy()


def encoder(blocks: int = 4) -> Iterator[Row]:
    """Blocks end to end with masked refreshes, client and server in one process; against the model in the clear."""
    import torch

    from refattn.he import torch as nets

    module, x = an_encoder(blocks)
    with torch.no_grad():
        exact, clear = (nets.polynomial(module, on)(torch.tensor(x)[None])[0].numpy() for on in (False, True))
    program = he.Encoder(nets.weights_of(module, 16), tolerance=1e-2)
    plan, most = program.plan, he.noise_bound(program, x)
    client = he.Client(plan)
    server, times = he.Server(program, client.evaluation_keys()), []

    def attend(message: bytes) -> bytes:
        start = time.perf_counter()
        answer = server.attend(message)
        times.append(time.perf_counter() - start)
        return answer

    start = time.perf_counter()
    out = client.ask(x, attend)
    took = time.perf_counter() - start
    at = f"{blocks}-layer encoder 16 x 64, degree {plan.ring.degree}, {plan.ring.levels} levels"
    up = f"{plan.upload_bytes / 1e6:.0f} MB up in {plan.rounds} rounds, {plan.key_bytes / 1e6:.0f} MB of keys"
    yield Row(f"{at}, {up}, server", sum(times), "s")
    yield Row(f"{at}, client", took - sum(times), "s")
    yield Row(f"{at}, predicted over measured time", plan.predicted_ms() / 1e3 / sum(times), "ratio")
    off = float(np.abs(out - clear).max())
    yield Row(f"{at}, error against the model in the clear, its polynomials", off, "absolute", at_most=most)
    yield Row(f"{at}, noise's bound over that", most / off, "ratio", at_least=1.0)
    yield Row(f"{at}, error against the exact functions", float(np.abs(out - exact).max()), "absolute")
    yield Row(f"{at}, largest score", float(np.abs(exact).max()), "absolute")
    yield Row(f"{at}, encrypted class is the clear one", float(out.argmax() == exact.argmax()), "", at_least=1.0)


def block() -> Iterator[Row]:
    """A whole block, with random weights."""
    from refattn.he import torch as nets

    module, x, exact = a_block()
    for upload in ("full", "whole"):
        layer = he.Layer(nets.weights_of(module, 16), tolerance=1e-2, upload=upload)
        plan = layer.plan
        client = he.Client(plan)
        server = he.Server(layer, client.evaluation_keys())
        query = client.encrypt(x)
        seconds, ratio = compared(plan, 1, partial(server.attend, query))
        out = client.decrypt(server.attend(query))
        at = f"block 16 x 64, degree {plan.ring.degree}, {plan.ring.levels} levels"
        up = f"{plan.upload_bytes / 1e6:.0f} MB up, {plan.key_bytes / 1e6:.0f} MB of keys"
        most = 10.0 if upload == "whole" else None
        yield Row(f"{at}, {up}, server", seconds, "s", at_most=most)
        yield Row(f"block, {upload}, predicted over measured time", ratio, "ratio")
        error = float(np.abs(out - exact).max())
        yield Row(f"block, {upload}, error against the exact functions", error, "absolute")
        yield Row(f"block, {upload}, noise", float(np.abs(out - layer.simulate(x)).max()), "absolute")
