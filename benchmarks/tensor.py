"""Triple-wise attention on the CPU, one thread: streaming beside a plain PyTorch einsum, polynomials, routing, bounds.

Floor of the exact forms: n³ exponentials and 2·n³·(d + d_v) operations; of the polynomial: 3·n·C(d + g, g)·(d_v + 1)
multiplications. Times are medians of 5, or of one run where a run takes over ten seconds.
"""

from __future__ import annotations

import math
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from refattn import tensor
from refattn.bench import Row
from refattn.errors import UnsupportedProblem
from refattn.tensor.costs import measure

EXAMPLES = 100_000


def seconds(call: Callable[[], Any]) -> float:
    """Return the median seconds of a call."""
    times: list[float] = []
    while len(times) < 5 and (not times or times[0] < 10):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def arrays(n: int, d: int, size: float, d_v: int | None = None, dtype: str = "float64") -> list[Any]:
    """Return query, two kinds of keys and their values: uniform up to a size."""
    rng = np.random.default_rng(0)
    shapes = [(1, 1, n, d)] * 3 + [(1, 1, n, d_v or d)] * 2
    return [rng.uniform(-size, size, s).astype(dtype) for s in shapes]


def rows() -> Iterator[Row]:
    """Speed beside einsum, memory, polynomial against exact, exponents, routing, certificates."""
    with threadpool_limits(1):
        yield from forms()
        yield from memory()
        yield from polynomials()
        yield from routing()
        yield from certificates()


def forms() -> Iterator[Row]:
    """Each exact form beside the straightforward einsum of PyTorch, on one thread."""
    try:
        import torch
    except ModuleNotFoundError as e:
        raise UnsupportedProblem("bench tensor: needs PyTorch") from e
    torch.set_num_threads(1)
    n = 384
    for d in (15, 63):
        given = arrays(n, d, 1.0, dtype="float32")
        q, k1, k2, v1, v2 = (torch.tensor(x[0, 0]) for x in given)

        def scores(form: str, q: Any = q, k1: Any = k1, k2: Any = k2) -> Any:
            if form == "trilinear":
                return torch.einsum("il,jl,kl->ijk", q, k1, k2)
            if form == "determinant":
                i, j, k = (x.unflatten(-1, (-1, 3)) for x in (q, k1, k2))
                cross = torch.linalg.cross(i[:, None], j[None].expand(len(q), -1, -1, -1))
                return torch.einsum("ijl,kl->ijk", cross.flatten(2), k.flatten(1))
            a, b, c = (q @ k1.T)[:, :, None], (k1 @ k2.T)[None], (q @ k2.T)[:, None]
            return {"strassen": a + b + c, "tree": a + b, "rank_one": a + c}[form]

        for form in tensor.FORMS:

            def plain(form: str = form, scores: Any = scores, d: int = d, v1: Any = v1, v2: Any = v2) -> Any:
                p = torch.softmax((scores(form) / d).flatten(1), 1).unflatten(1, (n, n))
                return torch.einsum("ijk,jc,kc->ic", p, v1, v2)

            ours, theirs = seconds(partial(tensor.attention, *given, form=form)), seconds(plain)
            yield Row(f"{form} n={n} d={d} einsum over ours", theirs / ours, "ratio", at_least=1.0)
            yield Row(f"{form} n={n} d={d} ours", ours, "s")


def memory() -> Iterator[Row]:
    """What a call of n = 2048 allocates beyond its output, in units of n·d numbers."""
    for form in tensor.FORMS:
        found = []
        for n in (1024, 2048):
            given = arrays(n, 6, 1.0, dtype="float32")
            given[0] = given[0][:, :, :64]
            tracemalloc.start()
            tensor.attention(*given, form=form)
            found.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        yield Row(f"{form} memory at n=2048 over n=1024", found[1] / found[0], "ratio", at_most=2.2)


def polynomials() -> Iterator[Row]:
    """n = 4096, d = 4, entries up to 1/2: polynomial at 1e-8 beside exact streaming; exponents of cost in n."""
    given = arrays(4096, 4, 0.5)
    q, k1, k2, v1, v2 = given
    found = tensor.polynomial(q, (k1, k2), (v1, v2), tolerance=1e-8)
    fast = seconds(lambda: tensor.polynomial(q, (k1, k2), (v1, v2), tolerance=1e-8))
    start = time.perf_counter()
    exact = tensor.attention(*given)
    slow = time.perf_counter() - start
    yield Row("n=4096 d=4 polynomial at 1e-8", fast, "s")
    yield Row("n=4096 d=4 exact", slow, "s")
    yield Row("n=4096 d=4 exact over polynomial", slow / fast, "ratio", at_least=1e4)
    logits = float(np.abs(q).max() * np.abs(k1).max() * np.abs(k2).max())
    said = tensor.crossover(4096, 4, logits, 1e-8, costs=measure())
    yield Row("n=4096 d=4 predicted over measured, exact", said.exact_seconds / slow, "ratio")
    yield Row("n=4096 d=4 predicted over measured, polynomial", said.polynomial_seconds / fast, "ratio")
    error = float(np.abs(found.out - exact).max())
    yield Row("n=4096 d=4 error over its bound", error / float(found.bound.max()), "ratio", at_most=1.0)
    for name, sizes, call in (
        ("polynomial", (8192, 32768, 131072), lambda g: tensor.polynomial(g[0], g[1:3], g[3:], degree=found.degree)),
        ("exact", (256, 512, 1024), lambda g: tensor.attention(*g)),
    ):
        times = [seconds(partial(call, arrays(n, 4, 0.5))) for n in sizes]
        slope = math.log(times[-1] / times[0]) / math.log(sizes[-1] / sizes[0])
        limit = 1.1 if name == "polynomial" else None
        yield Row(f"exponent of n, {name}, n from {sizes[0]} to {sizes[-1]}", slope, "power", at_most=limit)


def routing() -> Iterator[Row]:
    """Auto with a share of rows whose logits are too large for the polynomial, by this machine's costs."""
    n, d = 512, 4
    costs = measure()
    for hot in (0.0, 0.05, 0.2):
        rng = np.random.default_rng(1)
        given = arrays(n, d, 1.0, 8)
        given[0] *= np.where(rng.random(n) < hot, 6.0, 0.6)[:, None]
        route = partial(tensor.auto, *given, tolerance=1e-6, costs=costs)
        found, exact = route(), tensor.attention(*given)
        at = f"auto, {hot:.0%} hot rows"
        yield Row(f"{at}, error", float(np.abs(found.out - exact).max()), "absolute", at_most=1e-6)
        yield Row(f"{at}, share of the polynomial", found.share, "share")
        ours, whole = seconds(route), seconds(lambda g=given: tensor.attention(*g))
        yield Row(f"{at}, exact over auto", whole / ours, "ratio")
        yield Row(f"{at}, predicted over measured time", found.predicted_seconds / ours, "ratio", 2.0, 0.5)


def certificates() -> Iterator[Row]:
    """Random small problems that seek the bound: signs at the bound, clusters, normal numbers."""
    rng = np.random.default_rng(2)
    worst, violated, slack = 0.0, 0, []
    for index in range(EXAMPLES // 64):
        family, degree, d, size = index % 3, 1 + index % 8, 1 + index % 5, rng.uniform(0.05, 1.8)

        def made(*shape: int, family: int = family, size: float = size) -> Any:
            if family == 0:
                return rng.choice([-size, size], shape)
            if family == 1:
                return size * (rng.choice([-1, 1], (*shape[:2], 1, shape[3])) + 0.05 * rng.standard_normal(shape))
            return size * rng.standard_normal(shape)

        # 64 problems at once, as batches
        q, k1, k2 = made(64, 1, 4, d), made(64, 1, 8, d), made(64, 1, 8, d)
        v1, v2 = rng.choice([-1.0, 1.0], (2, 64, 1, 8, 2))
        found = tensor.polynomial(q, (k1, k2), (v1, v2), degree=degree)
        s = np.einsum("bhil,bhjl,bhkl->bhijk", q, k1, k2) / d
        p = np.exp(s - s.max((3, 4), keepdims=True))
        exact = np.einsum("bhijk,bhjc,bhkc->bhic", p, v1, v2) / p.sum((3, 4))[..., None]
        # float64's own rounding of the exact sums
        error = np.maximum(np.abs(found.out - exact).max(3) - 1e-14, 0)
        ratio = error / found.bound
        violated += int((ratio > 1).any((1, 2)).sum())
        worst = max(worst, float(ratio.max()))
        slack += list((1 / ratio[error > 1e-12]).tolist())
    yield Row(f"certificates violated of {EXAMPLES // 64 * 64} problems", violated, "problems", at_most=0)
    yield Row("largest error over its bound", worst, "ratio", at_most=1.0)
    yield Row("median of bound over error", statistics.median(slack), "ratio")
