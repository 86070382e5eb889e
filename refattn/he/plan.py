"""The planner: ring, chain, layout, inverse, keys, time and error of an encrypted call, before any key exists."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedProblem
from ..problem import Problem
from .arguments import check_arguments, plans
from .arithmetic import Counted, Levels, Numbers
from .call import Call
from .circuit import attend
from .costs import COSTS, Costs, predicted_ms
from .inputs import decoded, encoded, fits
from .inverse import Inverse, choose
from .layout import BatchLayout, Layout, layouts_for
from .linear import Plain
from .noise import Bounds, Ring, quantile

__all__ = ["Attention", "Plan", "fastest", "plan"]

MOST_BITS = {8192: 218, 16384: 438, 32768: 881}
"""Bits of a chain at 128 bits of security (homomorphicencryption.org's table, SEAL's TC128)."""
LEAST_MIDDLE, MOST_MIDDLE, MOST_FIRST = 25, 48, 60
P = TypeVar("P", bound="Attention")


class Attention(Call):
    """What plans of attention compute, and say, alike."""

    @classmethod
    def shared_of(cls, layout: Any, n_k: int, context: int) -> tuple[int, int]:
        """Return the ciphertexts of a block's keys, and how many more are not encrypted; as many hold values."""
        return layout.shared_parts, 0

    @property
    def plan(self) -> Self:
        """What a server needs to compute it: this."""
        return self

    def fits(self, p: Problem) -> None:
        """Refuse a problem that is not the plan's."""
        fits(self, p)

    def compute(self, m: Any, shared: Sequence[Any], queries: Sequence[Any]) -> list[Any]:
        """Return a block's result by an arithmetic."""
        keys, values = shared[: len(shared) // 2], shared[len(shared) // 2 :]
        return attend(m, self.layout, self.p, self.inverse, self.epsilon, queries, keys, values)

    def predicted_ms(self, costs: Costs = COSTS, workers: int = 1) -> float:
        """Return the server's time: the program, and reading the query's ciphertexts; workers have a core each."""
        degree, blocks, loads = self.ring.degree, self.layout.blocks(), self.loads()
        groups = len({h for h, _ in blocks})
        if workers > 1 and groups % workers:  # then those that share keys and values are computed apart
            loads = Counter({k: c * len(blocks) // groups for k, c in loads.items()})
        whole = predicted_ms(costs, degree, self.counts) * len(blocks) + predicted_ms(costs, degree, loads)
        return whole / len(blocks) * math.ceil(len(blocks) / workers)

    def waiting_ms(self) -> float:
        """Return what plans are compared by: the time of the server with as many workers as they are made for."""
        return self.predicted_ms(workers=self.workers)

    def report(self) -> dict[str, Any]:
        """Return all that the plan says, as what JSON holds."""
        inverse = "the client divides"
        if self.inverse is not None:
            inverse = f"{self.inverse.doublings} doublings, {self.inverse.quadratics} quadratics"
        switches = sum(c for (n, _), c in self.counts.items() if n == "switch_key") * len(self.layout.blocks())
        return {
            "degree": self.ring.degree,
            "chain_bits": self.ring.bits,
            "most_bits": MOST_BITS[self.ring.degree],
            "levels": dict(self.levels),
            "inverse": inverse,
            "inverse_degree": None if self.inverse is None else self.inverse.order - 1,
            "layout": asdict(self.layout),
            "blocks": len(self.layout.blocks()),
            "rotation_keys": len(self.rotations),
            "key_switches": switches,
            "operations_of_a_block": {f"{n} at {limbs} primes": c for (n, limbs), c in sorted(self.counts.items())},
            "predicted_ms": self.predicted_ms(),
            "key_bytes": self.key_bytes,
            "upload_bytes": self.upload_bytes,
            "error_approximation": self.approximation,
            "error_noise": self.noise,
        }


@dataclass(frozen=True)
class Plan(Attention):
    """An encrypted call, planned; its attributes are those of ``refattn.he.call.Call``."""

    def encoded(self, problem: Problem) -> tuple[tuple[int, ...], list[tuple[NDArray[np.complex128], int]]]:
        """Return the result's shape, and slots and primes of each ciphertext of a query."""
        return encoded(self, problem)

    def decoded(self, slots: Sequence[NDArray[np.complex128]], shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return out from the slots of a reply."""
        return decoded(self, slots, shape)

    def tasks(self, parts: Sequence[Any]) -> list[tuple[Sequence[Any], Sequence[Any]]]:
        """Return the ciphertexts of each block: those that its head's blocks share, and its own."""
        found, at, shared, previous = [], 0, 2 * self.layout.shared_parts, None
        for head, _ in self.layout.blocks():
            if head != previous:
                previous, first = head, at
                at += shared
            found.append((parts[first : first + shared], parts[at : at + self.layout.query_parts]))
            at += self.layout.query_parts
        return found


@plans("power", "call he.plan_sigmoid")
def plan(
    n_q: int,
    n_k: int,
    d_k: int,
    d_v: int | None = None,
    heads: int = 1,
    p: int = 2,
    *,
    denominator: tuple[float, float],
    epsilon: float = 0.0,
    scale: float | None = None,
    norms: tuple[float, float],
    value_most: float,
    tolerance: float = 1e-2,
    normalize: str = "server",
    mode: str = "latency",
    upload: str = "full",
    workers: int = 1,
    inverse: Inverse | None = None,
) -> Plan:
    """Return the fastest plan for power-softmax attention on ciphertexts within a tolerance.

    Parameters
    ----------
    n_q, n_k, d_k, d_v, heads : int
        Sizes; d_v is d_k by default. heads counts those of all batches.
    p : int
        2, 4, 6 or 8.
    denominator : (low, high)
        The range of sum_j (scale·q_i·k_j)**p + epsilon over all rows, above 0.
    epsilon, scale : float
        As in :func:`refattn.power_attention`; scale is 1/sqrt(d_k) by default.
    norms : (query, key)
        The largest Euclidean norms of their rows.
    value_most : float
        The largest size of an element of value.
    tolerance : float
        The largest error of an element of out.
    normalize : {"server", "client"}
        Who divides. The client learns the denominators where it does.
    mode : {"latency", "throughput"}
        A call's numbers share few ciphertexts, or each has one of its own with a slot for each of up to thousands of
        heads: a long time and a large upload, little by head; masks may differ by input, not by query.
    upload : {"full", "compact", "whole"}
        "full": a ciphertext comes as one polynomial and the seed of another, compressed. "compact", in latency mode:
        the queries come once instead of turned by the client, which is half the bytes and more rotations on the
        server. "whole": both polynomials as they are, over twice the bytes of "full", which the server reads in a
        tenth of the time.
    workers : int
        How many processes the server will have: a plan for many cuts a head's queries apart, where one for few does
        more of the work for all of them at once. Any number of them computes any plan.
    inverse : Inverse, optional
        The polynomial for 1/D; by default the one with the fastest plan.

    Raises
    ------
    InvalidInput
        A size, range or name that has no meaning.
    UnsupportedProblem
        No ring at 128 bits of security does it; the text names the step that ran out of levels and what would help.
        Or arguments of sigmoid attention: the text names what plans it.
    """
    check_arguments(
        n_q, n_k, d_k, d_v, heads, p, denominator, epsilon, norms, value_most, tolerance, normalize, mode, upload,
        workers, scale, inverse,
    )  # fmt: skip
    d_v = d_k if d_v is None else d_v
    given = {
        "n_q": n_q, "n_k": n_k, "d_k": d_k, "d_v": d_v, "heads": heads, "p": p, "denominator": denominator,
        "epsilon": epsilon, "scale": scale, "norms": norms, "value_most": value_most, "normalize": normalize,
        "mode": mode, "upload": upload, "workers": workers, "tolerance": tolerance,
    }  # fmt: skip

    def layouts(slots: int) -> Sequence[Layout | BatchLayout]:
        return layouts_for(slots, n_q, n_k, d_k, d_v, heads, mode, upload)

    return fastest(Plan, given, layouts, inverse)


def fastest(
    kind: type[P],
    given: dict[str, Any],
    layouts: Callable[[int], Sequence[Layout | BatchLayout]],
    inverse: Inverse | None,
) -> P:
    """Return the fastest plan of a kind, from checked arguments, the layouts for some slots, and a polynomial or None.

    Raises
    ------
    UnsupportedProblem
        No ring at 128 bits of security does it.
    """
    low, high = (float(x) for x in given["denominator"])
    given = given | {n: float(given[n]) for n in ("epsilon", "value_most", "tolerance")}
    given["denominator"], given["norms"] = (low, high), tuple(map(float, given["norms"]))
    given["scale"] = 1 / math.sqrt(given["d_k"]) if given["scale"] is None else float(given["scale"])
    tolerance = given["tolerance"]
    inverses: Sequence[Inverse | None] = [None]
    if given["normalize"] == "server":
        inverses = [inverse] if inverse else choose(low, high, tolerance / given["value_most"])[:4]
    best: P | None = None
    obstacles: list[str] = []
    for candidate in inverses:
        for degree in MOST_BITS:
            # obstacles of the polynomial with the fewest levels are told, last those in the largest ring
            best = _try(kind, given, candidate, degree, layouts, obstacles if candidate is inverses[0] else [], best)
    if best is None:
        why = obstacles[-1] if obstacles else f"no polynomial is within {tolerance:.3g} on ({low:.3g}, {high:.3g})"
        raise UnsupportedProblem(
            f"he: {why}; a smaller p, a narrower denominator (a larger epsilon), a larger tolerance or "
            "normalize='client' would help"
        )
    return best


def _try(
    kind: type[P], given: dict[str, Any], inverse: Inverse | None, degree: int,
    layouts: Callable[[int], Sequence[Layout | BatchLayout]], obstacles: list[str], best: P | None,
) -> P | None:  # fmt: skip
    """Return the fastest of the plans at a degree and one that is there, and note what was in the way."""
    try:
        found = layouts(degree // 2)
    except UnsupportedProblem as e:
        obstacles.append(str(e).removeprefix("he: "))
        return best
    for layout in found:
        best = _with_layout(kind, given, inverse, degree, layout, obstacles, best) or best
    return best


def _with_layout(
    kind: type[P], given: dict[str, Any], inverse: Inverse | None, degree: int, layout: Layout | BatchLayout,
    obstacles: list[str], best: P | None,
) -> P | None:  # fmt: skip
    """Return the plan with a layout, or None: for what was in the way, or as the best so far is as fast."""
    queries = layout.query_parts
    shared, more = kind.shared_of(layout, given["n_k"], given.get("context", 0))
    known: list[Any] = [Plain(np.zeros(1, complex))] * more
    counting, top = Levels(), Counted(99)
    common = (layout, given["p"], inverse, given["epsilon"])
    outs = attend(counting, *common, [top] * queries, [top] * shared + known, [top] * shared + known)
    depth = 99 - min(x.limbs for x in outs)
    # a special prime larger than the others keeps the key switching's noise small
    above = _above(given, inverse)
    middle = min(MOST_MIDDLE, (MOST_BITS[degree] - MOST_FIRST - above) // (depth + 1))
    if middle < LEAST_MIDDLE:
        room = (MOST_BITS[degree] - MOST_FIRST - above) // LEAST_MIDDLE - 1
        used, out_at = 0, ""
        for step, n in counting.levels.items():
            used += n
            if used > room and not out_at:
                out_at = step
        obstacles.append(
            f"{depth} levels are needed ({', '.join(f'{s} {n}' for s, n in counting.levels.items() if n)}), and degree "
            f"{degree} has room for {room} at 128 bits of security: step {out_at!r} runs out"
        )
        return None
    first = min(MOST_FIRST, middle + above)
    ring = Ring(degree, first, middle, MOST_FIRST, depth)
    exact, top = Levels(), Counted(depth + 1)
    at_values = Counted(depth + 1 - counting.levels["products"] - counting.levels["power"])
    attend(exact, *common, [top] * queries, [top] * shared + known, [at_values] * shared + known)
    approximation = 0.0 if inverse is None else inverse.relative_error * given["value_most"]
    made = kind(
        **given,
        ring=ring,
        layout=layout,
        inverse=inverse,
        levels={s: n for s, n in exact.levels.items() if n},
        counts=exact.counts,
        rotations=tuple(sorted({r % ring.slots for r in exact.rotations})),
        approximation=approximation,
        noise=0.0,
    )
    if best is not None and made.waiting_ms() >= best.waiting_ms():
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite bound is above every tolerance
        noise = noise_of(made)
        made = replace(made, noise=math.inf if math.isnan(noise) else noise)
    if not made.error <= made.tolerance:
        obstacles.append(
            f"at degree {degree} with primes of {middle} bits the error's bound is {made.approximation:.2g} + "
            f"{made.noise:.2g} (approximation, noise), above the tolerance {made.tolerance:.2g}"
        )
        return None
    return made


def _above(given: dict[str, Any], inverse: Inverse | None) -> int:
    """Return how many bits the last prime has above the scale: for the largest result, twice, and its sign."""
    largest = math.sqrt(2) * given["value_most"] / (1.0 if inverse is None else inverse.output_factor)
    return max(3, math.ceil(math.log2(max(largest, 1.0))) + 2)


def noise_of(p: Attention) -> float:
    """Return the bound on what CKKS noise adds to an element of out."""
    low, high = ((x - p.epsilon) * p.input_factor for x in p.denominator)
    points = low + (high - low) * np.linspace(0, 1, 257) ** 2  # closest where quotients change most
    m = Bounds(p.ring, math.sqrt(2) * p.value_most, points)
    pairs = p.layout.pairs
    factor = p.scale * p.input_factor ** (1 / p.p)
    q = m.fresh(p.norms[0] * factor / 2 / math.sqrt(pairs))
    k = m.fresh(p.norms[1] / math.sqrt(pairs))
    v = m.fresh(math.sqrt(2) * p.value_most)
    shared, known = p.shared_of(p.layout, p.n_k, getattr(p, "context", 0))
    # the first span has the key with all the weight: one of ciphertexts, whose noise is larger than known numbers'
    keys, values = (
        [replace(x, variance=p.sums * x.variance)] * shared + [Plain(x.value.astype(complex), x.scale)] * known
        for x in (k, v)
    )
    outs = attend(m, p.layout, p.p, p.inverse, p.epsilon, [q] * p.layout.query_parts, keys, values)
    count = p.heads * p.n_q * p.d_v * p.replies
    if p.inverse is None:
        # d(n/d) = dn/d - n/d · dd/d, where d has its epsilon
        variance = outs[0].variance + 2 * p.value_most**2 * outs[-1].variance
        return quantile(count) * math.sqrt(float((variance / (points + p.epsilon * p.input_factor) ** 2).max()))
    out = outs[0]
    numbers, step = Numbers(), (points[-1] - points[0]) * 1e-6

    def circuit(x: Any) -> Any:
        return p.inverse.apply(numbers, np.ones_like(x), x, p.epsilon)  # type: ignore[union-attr]

    slope = np.abs(circuit(points + step) - circuit(points - step)) / (2 * step)
    variance = out.variance + (math.sqrt(2) * p.value_most * points * slope) ** 2 * m.denominator_variance
    return quantile(count) * p.inverse.output_factor * math.sqrt(float(variance.max()))
