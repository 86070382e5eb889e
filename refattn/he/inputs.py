"""A problem as a plan wants it: checked against its sizes and ranges, scaled and filled up; and a run without keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import to_float64
from ..errors import InvalidProblem, UnsupportedProblem
from ..exact import evaluate
from ..masks import visible
from ..problem import Problem
from ..variants import VARIANTS
from .arithmetic import Numbers
from .call import Call
from .planned import Program
from .sampled import Sampled

__all__ = ["called", "decoded", "encoded", "fits", "reference", "sequence_of", "simulate", "simulated"]

Float = NDArray[np.float64]
Complex = NDArray[np.complex128]


def reference(problem: Problem) -> Float:
    """Return attention, (b, h, n_q, d_v), correctly rounded to float64: what a plan approximates.

    Parameters
    ----------
    problem : Problem
        Of variant "power" or "sigmoid".

    Raises
    ------
    InvalidProblem
        It has an option that the operator does not know or cannot take.
    UnsupportedProblem
        It is of another variant, or a part of the call, e.g. a softcap, means nothing to it.
    """
    checked(problem, "sigmoid" if getattr(problem, "variant", "") == "sigmoid" else "power")
    return to_float64(evaluate(problem, rounding="float64").out)


def called(plan: Any, x: Any) -> Any:
    """Return a problem as a call of a plan's operator, with the plan's options; anything else as it is."""
    if not isinstance(x, Problem) or x.variant == plan.operator:
        return x
    names = ("offset",) if plan.operator == "sigmoid" else ("p", "epsilon")
    return x.replace(variant=plan.operator, options={n: getattr(plan, n) for n in names if hasattr(plan, n)})


def checked(problem: Problem, operator: str = "power") -> dict[str, Any]:
    """Return a problem's own options with defaults filled in, checked as the exact evaluation checks them.

    This is the one check for what is computed exactly and on ciphertexts: an option that one refuses, both do.
    """
    if not isinstance(problem, Problem):
        raise InvalidProblem(f"he: got {type(problem).__name__}, expected a Problem")
    if problem.variant != operator:
        raise UnsupportedProblem(f"he: computes variant {operator!r}, got {problem.variant!r}")
    return dict(VARIANTS[operator].settings(problem))


def simulate(plan: Program, problem: Problem, seed: int | None = None) -> Float:
    """Return what the encrypted program computes, on float64 numbers: the same polynomial, without keys.

    Parameters
    ----------
    plan : Plan
        The program.
    problem : Problem
        As :meth:`refattn.he.Client.encrypt` takes it.
    seed : int, optional
        Of noise that is drawn as the scheme draws it; by default there is none.

    Returns
    -------
    (b, h, n_q, d_v) array

    Raises
    ------
    InvalidProblem
        Sizes, options or numbers that are not the plan's.
    """
    return simulated(plan, problem, seed)


def simulated(program: Program, x: Any, seed: int | None) -> Float:
    """Return what a program computes on plain numbers, with drawn noise where there is a seed."""
    plan = program.plan
    shape, slots = plan.encoded(x)
    if seed is None:
        plain = Numbers()
        outs = [y for task in program.tasks([s for s, _ in slots]) for y in program.compute(plain, *task)]
    else:
        m = Sampled(plan.ring, seed)
        given = [m.fresh(s, limbs) for s, limbs in slots]
        outs = [y.slots for task in program.tasks(given) for y in program.compute(m, *task)]
    found: Float = plan.decoded(outs, shape)
    return found


def encoded(plan: Call, problem: Problem) -> tuple[tuple[int, ...], list[tuple[Complex, int]]]:
    """Return the result's shape, and slots and primes of each ciphertext of a query: by heads, then by blocks."""
    layout, top = plan.layout, plan.ring.levels + 1
    q, k, v, seen = slots_of(plan, problem)
    # what is filled up is 0 and hides nothing
    seen_here = seen | (np.arange(layout.queries) >= plan.n_q)[:, None] | (np.arange(layout.keys) >= plan.n_k)
    found: list[tuple[Complex, int]] = []
    done: set[int] = set()
    for block in layout.blocks():
        if block[0] not in done:
            done.add(block[0])
            found += [(x, top) for x in layout.key_slots(k, seen_here, block)]
            found += [(x, plan.value_limbs) for x in layout.value_slots(v, block)]
        found += [(x, top) for x in layout.query_slots(q, seen, block)]
    return problem.out_shape, found


def decoded(plan: Call, slots: Sequence[Complex], shape: tuple[int, ...]) -> Float:
    """Return out from the slots of a reply."""
    layout = plan.layout
    pairs = np.zeros((plan.heads, layout.queries, layout.pairs), np.complex128)
    blocks = layout.blocks()
    each = len(slots) // len(blocks)
    for i, block in enumerate(blocks):
        layout.read(divided(plan, slots[each * i : each * (i + 1)]), pairs, block)
    return out_of(plan, shape, pairs)


def divided(plan: Call, found: Sequence[Complex]) -> list[NDArray[np.complex128]]:
    """Return a block's result from the slots of its ciphertexts: the client's part of the program."""
    if plan.inverse is not None:
        return [x * plan.inverse.output_factor for x in found]
    with np.errstate(divide="ignore", invalid="ignore"):  # slots that no query is in
        return [np.asarray(x / (found[-1].real + plan.epsilon * plan.input_factor)) for x in found[:-1]]


def out_of(plan: Call, shape: tuple[int, ...], pairs: NDArray[np.complex128]) -> Float:
    """Return out, of shape (b, h, n_q, d_v), from pairs of outputs as complex numbers."""
    whole = np.stack([pairs.real, pairs.imag], -1).reshape(plan.heads, plan.layout.queries, -1)
    return np.asarray(whole[:, : plan.n_q, : plan.d_v].reshape(shape))


def slots_of(plan: Call, p: Problem) -> tuple[Float, Float, Float, NDArray[np.bool_]]:
    """Return query (scaled), key and value filled up with zeros, and which keys each query sees."""
    fits(plan, p)
    layout = plan.layout
    width = 2 * layout.pairs
    q, k, v = (to_float64(np.asarray(x)) for x in (p.query, p.key, p.value))
    k, v = (np.repeat(x, p.heads // p.heads_kv, 1) for x in (k, v))
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    seen = np.zeros((plan.heads, layout.queries, layout.keys), bool)
    for head in range(plan.heads):
        of = (head // p.heads, head % p.heads)
        seen[head, : plan.n_q, : plan.n_k] = visible(p, *of, slice(0, plan.n_q), slice(0, plan.n_k))
    _in_range(plan, q, k, v, seen)

    def filled(x: Float, rows: int) -> Float:
        return np.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, width - x.shape[2])))

    scaled = q * (plan.scale * plan.input_factor ** (1 / plan.p))
    return filled(scaled, layout.queries), filled(k, layout.keys), filled(v, layout.keys), seen


def fits(plan: Call, p: Problem) -> None:
    """Refuse a problem that is not the plan's."""
    settings = checked(p)
    if p.kind != "numpy":
        raise UnsupportedProblem(f"he: takes arrays of numpy, got {p.kind}; problem.to('numpy') gives them")
    form, epsilon = settings["form"], settings["epsilon"]
    if form not in ("plain", "mean"):
        raise UnsupportedProblem(f"he: got form {form!r}, expected 'plain' or 'mean'; reference computes the others")
    if form == "mean":  # the plain form with an epsilon of as many times, where all rows see as many keys
        seen = {int(n) for b in range(p.batch) for h in range(p.heads) for n in _counts(p, b, h)}
        if len(seen) > 1:
            raise UnsupportedProblem("he: the mean form needs rows that all see as many keys")
        epsilon *= seen.pop()
    if p.cu_seqlens_q is not None:
        raise UnsupportedProblem("he: takes no packed sequences")
    found = {n: getattr(p, n) for n in ("n_q", "n_k", "d_k", "d_v")} | {"heads": p.batch * p.heads}
    found |= {"p": settings["p"], "epsilon": epsilon}
    found["scale"] = 1 / math.sqrt(p.d_k) if p.scale is None else p.scale
    for name, x in found.items():
        if x != getattr(plan, name):
            raise InvalidProblem(f"{name}: got {x}, expected the plan's {getattr(plan, name)}")


def sequence_of(plan: Any, p: Problem) -> tuple[list[tuple[Float, Float, Float]], Float | None]:
    """Return a call's rows as the tokens of a sequence, (query, key, value) each, and the keys of its context or None.

    Raises
    ------
    InvalidProblem
        Its sizes or options are not the plan's, or a row sees others than the tokens before it and its own.
    """
    checked(p, plan.operator)
    replace(plan, n_q=p.n_q, n_k=p.n_k).fits(p)
    n, context, longest = p.n_q, p.n_k - p.n_q, getattr(plan, "longest", 0)
    if p.batch != 1 or context != getattr(plan, "context", 0) or n > longest:
        raise InvalidProblem(
            f"query: got {n} tokens after {context} in the clear, in a batch of {p.batch}, expected one sequence of at "
            f"most {longest} after {getattr(plan, 'context', 0)}, by the plan"
        )
    steps = np.tril(np.ones((n, p.n_k), bool), context)
    if any((visible(p, 0, h, slice(0, n), slice(0, p.n_k)) != steps).any() for h in range(p.heads)):
        raise InvalidProblem("causal: a token sees those before it and itself; pass causal='bottom_right' and no mask")
    q, k, v = (to_float64(np.asarray(x))[0] for x in (p.query, p.key, p.value))
    k, v = (np.repeat(x, p.heads // p.heads_kv, 0) for x in (k, v))
    tokens = [(q[:, i], k[:, context + i], v[:, context + i]) for i in range(n)]
    return tokens, k[:, :context] if context else None


def _counts(p: Problem, batch: int, head: int) -> NDArray[np.int64]:
    return np.asarray(visible(p, batch, head, slice(0, p.n_q), slice(0, p.n_k)).sum(1))


def _in_range(plan: Call, q: Float, k: Float, v: Float, seen: NDArray[np.bool_]) -> None:
    """Refuse numbers outside the plan's ranges: the result would be wrong without a sign of it."""
    largest = {
        "query": (np.linalg.norm(q, axis=2), plan.norms[0], "row norm"),
        "key": (np.linalg.norm(k, axis=2), plan.norms[1], "row norm"),
        "value": (np.abs(v).max(2), plan.value_most, "element"),
    }
    for name, (sizes, most, what) in largest.items():
        if not sizes.max() <= most:  # NaN, too
            raise InvalidProblem(f"{name}: its largest {what} is {sizes.max():.4g}, beyond the plan's {most:.4g}")
    low, high = plan.denominator
    seen = seen[:, : plan.n_q, : plan.n_k]
    sums = ((plan.scale * np.einsum("hid,hjd->hij", q, k)) ** plan.p * seen).sum(2) + plan.epsilon
    # a row that sees no key is 0 over epsilon; where the client divides, noise over epsilon: its bound grows so much
    unsure = plan.inverse is None and plan.noise * low > plan.tolerance * plan.epsilon
    outside = (seen.any(2) | unsure) & ~((sums >= low) & (sums <= high))
    if outside.any():
        head, row = (int(x) for x in np.argwhere(outside)[0])
        raise InvalidProblem(
            f"denominator: head {head}, row {row} has {sums[head, row]:.4g}, outside the plan's "
            f"({low:.4g}, {high:.4g}), where its inverse holds; plan a wider range"
            + ("" if seen[head, row].any() else ", or normalize='server' for rows that see no key")
        )
