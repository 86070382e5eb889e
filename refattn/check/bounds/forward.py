r"""What a kernel's arithmetic must lose: an error bound for every element, from the definition and the rounding model.

The definition runs over the arithmetic of losses (:mod:`refattn.check.bounds.losses`), which notes what each operation
may lose in a kernel of the Model. The bound of an element of out is the sum over all nodes of the adjoint's size times
the loss, the predicted variance that of adjoint squared times variance (:mod:`refattn.check.bounds.graph`). Three facts
about attention sharpen it:

- an error in a weight that stands in numerator and denominator moves out by ``(v_jc - o_ic) / z``: the adjoint;
- a mean with weights that cannot be negative stays in the hull of the values, whatever the weights' errors;
- the weights are rounded to their own type before they meet the values; the denominator may sum them before or after.

There is no tolerance to choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import FORMATS, format_of
from ...errors import UnsupportedProblem
from ...exact.answer import Answer
from ...exact.anywhere import beside, largest, on_host
from ...exact.heads import Head, heads, rows_of
from ...problem import Problem
from ...variants import Steps, variant_of
from ..model import C, Model, inside_type
from .graph import Graph
from .losses import Losses, Lossy
from .nodes import Node
from .operands import Operands
from .pieces import ways_of
from .rules import by_chance, floor
from .smoothed import put_back, smoothed
from .stepped import at_once, stepped
from .truth import on_the_gpu

__all__ = ["HeadLosses", "bounds", "forward", "head_losses"]

Float = NDArray[np.float64]
CHUNK, CHUNK_THERE = 2**21, 2**26
"""Elements of (rows, keys, d_v) alive at a time, on the CPU and on a GPU."""


def bounds(answer: Answer, model: Model) -> dict[str, Float]:
    """Return the largest error that a right kernel of this model can make, for every element.

    Parameters
    ----------
    answer : Answer
        The exact answer (from ``evaluate(problem)``).
    model : Model
        The kernel's rounding model.

    Returns
    -------
    dict
        ``out`` (b, h_q, n_q, d_v) and, where the operator has one, ``lse`` (b, h_q, n_q): absolute errors, float64.
        0 where the contract fixes the value (rows without keys, rows that are NaN).
    """
    return forward(answer, model)[0]


def forward(answer: Answer, model: Model) -> tuple[dict[str, Float], dict[str, Float]]:
    """Return the bounds of out and lse, and the predicted variances of their errors.

    The arguments are those of :func:`bounds`. A variance is NaN where the scores' errors are too large to foresee.
    """
    problem = answer.call
    _expect_settings(problem, model)
    variant = variant_of(problem.variant)
    shapes = {"out": problem.out_shape} | ({"lse": problem.out_shape[:3]} if variant.has_lse else {})
    names = list(shapes)
    limit, variance = ({n: np.zeros(shapes[n]) for n in names} for _ in range(2))
    exact = answer.enclosures["out"].mid
    together = isinstance(variant.shape, Steps) and variant.rows is not None and variant.rows.together
    by_pieces = together or any(ways_of(one, model) for one in heads(problem))
    for one in heads(problem) if variant.rows is not None and not by_pieces else ():
        at = (one.batch, one.head, one.rows)
        live = np.nonzero(one.live)[0]
        put, each = on_the_gpu(one.live.sum() * one.v.size), one.v.size
        size = max(1, (CHUNK if put is np.asarray else CHUNK_THERE) // max(1, each))
        for start in range(0, len(live), size):
            rows = live[start : start + size]
            found = _rows(one, rows, exact[at][rows], model, put)
            for n in names:
                limit[n][at][rows], variance[n][at][rows] = found[n]
        if one.sink is not None and "lse" in names:  # rows that see the sink alone: it is taken to base 2 and back
            alone, back = ~one.allowed.any(1) & ~one.spoilt, format_of(model.lse).unit_roundoff
            limit["lse"][at][alone] = (4 * format_of(model.accumulator).unit_roundoff + back) * abs(one.sink)
    if isinstance(variant.shape, Steps):
        _recurrence(answer, variant.shape, model, limit, variance)
    for n in limit:
        mid = answer.enclosures[n].mid
        form = format_of(problem.out_type if n == "out" else model.accumulator if n == "state" else model.lse)
        with np.errstate(over="ignore", invalid="ignore"):
            last = form.ulp_array(np.where(np.isfinite(mid), mid, 0.0))
            variance[n] += by_chance(form, model) * last**2 / 12
    return limit, variance


def _expect_settings(p: Problem, model: Model) -> None:
    """Refuse numbers of a call that are 0 or 1 in a kernel's accumulator: it divides by 0, and nothing bounds that."""
    form = format_of(model.accumulator)
    if p.norm_eps is not None and p.norm_eps < form.smallest_normal:
        raise UnsupportedProblem(
            f"norm_eps: {p.norm_eps:g} has no bounds in {form.name}, whose smallest normal number is "
            f"{form.smallest_normal:.3g}"
        )
    if p.dropout_p is not None and form.round_array(np.array(p.dropout_p)) >= 1:
        raise UnsupportedProblem(f"dropout_p: {p.dropout_p!r} has no bounds in {form.name}, where 1 - p is 0")


def _recurrence(
    answer: Answer, shape: Steps, model: Model, limit: dict[str, Float], variance: dict[str, Float]
) -> None:
    """Widen what is allowed and predicted of out to a kernel that goes token by token, and add its last state."""
    final, inside = FORMATS[answer.call.out_type], format_of(model.accumulator)
    limit["state"], variance["state"] = (np.zeros(answer.enclosures["state"].mid.shape) for _ in range(2))
    for one in heads(answer.call):
        at, own = (one.batch, one.head, one.rows), (one.sequence, one.head)
        out, state = stepped(one, shape, model)
        ways = ways_of(one, model)
        outs = [out, *(x.forward()[0] for x in ways), *([] if ways else at_once(one, model))]
        for (found, spread), n, where, form in (*((x, "out", at, final) for x in outs), (state, "state", own, inside)):
            exact = np.nan_to_num(np.abs(answer.enclosures[n].mid[where]), posinf=0.0)
            u, tiny = (by_chance(form, model) * x for x in (form.unit_roundoff, floor(form, model)))
            total = found * (1 + u) + u * exact + tiny
            limit[n][where] = np.maximum(limit[n][where], total)
            variance[n][where] = np.maximum(variance[n][where], spread)
        limit["out"][at][~one.live] = 0.0


@dataclass(frozen=True)
class HeadLosses:
    """What a definition gives for some rows of one head over the arithmetic of losses.

    Attributes
    ----------
    out, lse : Lossy
        Its outputs; lse None where the operator has none.
    f : Losses
        The arithmetic, which knows the weights.
    lost_values : (n_k, d_v) array
        What the values lose before they are multiplied.
    dropped : bool
        Whether the weights are what dropout keeps of them.
    """

    out: Lossy
    lse: Lossy | None
    f: Losses
    lost_values: Float
    dropped: bool = False

    @property
    def weights(self) -> Node:
        """What the values were multiplied with, (n_q, n_k), up to the row's factor."""
        assert self.f.weights is not None
        return self.f.weights.node

    @property
    def summed(self) -> Node:
        """What the denominator adds up: the weights, before dropout."""
        node: Node = self.weights
        if self.dropped:
            node = node.links[0].parent.links[0].parent
        return node

    @property
    def divides(self) -> bool:
        """Tell whether the weights' product with the values is divided, by a number for each row."""
        return "quotient" in self.out.node.marks

    @property
    def divided(self) -> Any:
        """What divides the weights' product with the values, (n_q, 1), or 1 where nothing does."""
        n = self.out.node
        return n.links[1].parent.a if self.divides else 1.0

    @property
    def shares(self) -> Float:
        """What each key's value counts in the output, (n_q, n_k); 0 in rows that see no key."""
        with np.errstate(all="ignore"):
            return np.asarray(np.where(self.divided == 0, 0.0, self.weights.a / self.divided))

    @property
    def probabilities(self) -> Float:
        """The same before dropout."""
        with np.errstate(all="ignore"):
            return np.asarray(np.where(self.divided == 0, 0.0, self.summed.a / self.divided))

    @property
    def score_errors(self) -> Float:
        """The largest error of every score before its exponential, (n_q, n_k)."""
        n = self.weights
        while "exp" not in n.marks and n.links:
            n = n.links[0].parent
        return np.asarray(np.broadcast_to(n.links[0].parent.span, self.weights.a.shape))

    @property
    def score_variances(self) -> Any:
        """The variance of every weight's relative error before dropout, (n_q, n_k)."""
        n = self.summed
        with np.errstate(all="ignore"):
            return np.where(n.a > 0, n.flow[1] / np.square(n.a), 0.0)


def head_losses(one: Head, rows: Any, model: Model, unit: float = 1.0) -> HeadLosses:
    """Run an operator's definition over the arithmetic of losses.

    Parameters
    ----------
    one : Head
        One head.
    rows : index
        Which of its rows.
    model : Model
        The kernel's rounding model.
    unit : float
        A power of two that the values are multiplied with.
    """
    one = smoothed(one, model.block * model.smoothed_queries) if model.smoothed else one
    f, lost = Losses(model, one.k.shape[0]), Operands.of(one, model)
    q = f.leaf(one.q[rows], ("q", "d"), lost.q[rows], lost.var_q[rows])
    k = f.leaf(one.k, ("k", "d"), lost.k, lost.var_k)
    v = f.leaf(one.v * unit, ("k", "v"), lost.v * unit, lost.var_v * unit**2)
    with np.errstate(all="ignore"):
        out, lse = rows_of(one).define(q, k, v, one.options(f, rows))
    head = HeadLosses(out, lse, f, lost.v * unit, one.kept is not None)
    if lse is not None:
        _merged(head, model, one, unit)
    if head.dropped:
        _rescaled(head, model, one, unit)
    return head


def _rescaled(head: HeadLosses, model: Model, one: Head, unit: float) -> None:
    """Add what 1 / (1 - p) loses, which is common to all weights: p, 1 - p and its inverse are rounded.

    A kernel that stores its scores may store what dropout leaves, too, or the values divided by 1 - p. One that rounds
    weights may do so before and after, as PyTorch's memory-efficient kernel does; predicted is one rounding.
    """
    p, f, node = float(one.problem.dropout_p or 0.0), head.f, head.out.node
    relative = f.times(3 + p / (1 - p))
    node.err = node.err + relative * np.abs(head.out.a)
    node.var = node.var + (relative * head.out.a) ** 2 / 3
    if f.u_weights:  # once before weights are dropped, and once more after they are divided
        node.err = node.err + f.u_weights * (np.abs(head.shares) @ np.abs(one.v * unit))
    if f.u_scores:
        size = np.abs(head.shares), np.abs(one.v * unit)
        node.err = node.err + f.u_scores * (size[0] @ size[1])
        node.var = node.var + f.var_scores * (size[0] ** 2 @ size[1] ** 2)


def _merged(head: HeadLosses, model: Model, one: Head, unit: float) -> None:
    """Add what merging parts of the keys loses: a part weighs exp of its lse less the whole's, both rounded."""
    parts = model.merges(one.k.shape[0], one.sink is not None)
    assert head.lse is not None
    f, n, lse = head.f, head.summed, np.abs(head.lse.a)
    if parts > 1:
        more = (parts - 1) * f.u * (2 * lse + model.exp_ulps + 4) * n.a
        n.err, n.span = n.err + more, n.span + more
        more = (parts - 1) * f.u * (lse + 2) * np.abs(head.out.a)
        head.out.node.err = head.out.node.err + more
        head.out.node.var = head.out.node.var + f.cu * ((parts - 1) * lse**2 + 4 * parts) * head.out.a**2
    if model.from_lse:  # a rounded lse leaves the sum of the weights beside 1
        more = f.u * (2 * lse + model.exp_ulps + 4) * (np.abs(head.shares) @ np.abs(one.v * unit))
        head.out.node.err = head.out.node.err + more
        head.out.node.var = head.out.node.var + f.cu * (2 * lse**2 + 4) * head.out.a**2
    if model.denominator:  # equal weights are rounded alike
        u = inside_type(model.denominator).unit_roundoff * model.times
        head.out.node.err = head.out.node.err + u * (np.abs(head.shares) @ np.abs(one.v * unit))
        head.out.node.var = head.out.node.var + C * u**2 * head.out.a**2
        head.lse.node.err, head.lse.node.var = head.lse.node.err + u / (1 - u), head.lse.node.var + C * u**2
    head.lse.node.err = head.lse.node.err + parts * f.u * (2 * lse + model.exp_ulps + 4)
    # equal parts are merged with the same error again and again
    head.lse.node.var = head.lse.node.var + f.cu * (parts + parts**2) * head.lse.a**2


def _rows(
    one: Head, rows: NDArray[np.intp], o: Float, model: Model, put: Callable[[Float], Any]
) -> dict[str, tuple[Float, Float]]:
    final, by = FORMATS[one.problem.out_type], one.out_scale or 1.0
    # sums of the largest float64 numbers leave float64's range: work in smaller units there (a power of two)
    unit = 2.0**-64 if np.abs(one.v).max(initial=0.0) > 2.0**900 else 1.0
    o = np.where(np.isfinite(o), o * by * unit, 0.0)
    with np.errstate(all="ignore"):
        head = head_losses(one, rows, model, unit)
        graph = Graph([x.node for x in (head.out, head.lse) if x is not None])
        total, variance = _of_out(one, head, graph, o, rows, model, unit, put)
        if one.out_scale is not None:  # one division, or a product with a rounded inverse
            u = format_of(model.accumulator).unit_roundoff
            total, variance, o = (total + 2 * u * np.abs(o)) / by, variance / by**2, o / by
        last, tiny = (by_chance(final, model) * x for x in (final.unit_roundoff, floor(final, model)))
        total = total * (1 + last) + last * np.abs(o) + tiny * ((total > 0) | (o != 0))
        if not model.subnormals:  # values that are subnormal were read as zero
            total = total + final.smallest_normal
        found = {"out": (total / unit, variance / unit**2)}
        if head.lse is not None:
            lse, spread = head.lse.node.flow
            for joint, g, _ in graph.joints(head.lse.node, 1):
                lse = lse + (np.abs(g[0]) * joint.flow[0]).sum(1, keepdims=True)
                spread = spread + (np.square(g[0]) * joint.flow[1]).sum(1, keepdims=True)
            back, value = format_of(model.lse), head.lse.a
            if model.smoothed:
                value, lse, spread = put_back(one, rows, head.f, value, lse, spread)
            last, tiny = (by_chance(back, model) * x for x in (back.unit_roundoff, floor(back, model)))
            lse = np.where(np.isfinite(value), lse + last * np.abs(value), np.inf)
            found["lse"] = ((lse + tiny)[:, 0], np.broadcast_to(spread, lse.shape)[:, 0])
    return found


def _of_out(
    one: Head,
    head: HeadLosses,
    graph: Graph,
    o: Float,
    rows: NDArray[np.intp],
    model: Model,
    unit: float,
    put: Callable[[Float], Any],
) -> tuple[Float, Float]:
    """Return the bound and the variance of out, its own rounding apart."""
    node, weights, shape = head.out.node, head.weights, head.out.a.shape
    rest, variance = (np.broadcast_to(x, shape).copy() for x in node.flow)
    moved: Float = np.zeros(shape)
    for joint, g, parts in graph.joints(node, shape[1], put):
        size = np.abs(g)
        part = _over_keys(size, joint.flow[0], joint)
        variance += _over_keys(g * g, joint.flow[1], joint)
        if joint is weights or joint.above(weights):
            moved += part
        else:
            rest += part
        if joint is head.summed:
            variance += _by_parts(one, head, g, model)
        for product, alone in parts:  # of a sum of several means each has weights of its own
            assert product.cast is not None
            rest += _over_keys(np.maximum(np.abs(alone), size), product.cast[0], joint)
            variance += (
                _over_keys(alone * alone, product.cast[1], joint) + _over_keys(alone, product.cast[2], joint) ** 2
            )
    if node.amplify is None:
        return moved + rest, variance
    # whatever the weights are, their mean lies among the values, and roundings are in proportion to the largest
    seen, v = one.allowed[rows], np.abs(one.v * unit) + head.lost_values
    hull = _farthest(put(one.v * unit), put(o), seen)
    hull = np.maximum(hull, np.abs(o)) if "more" in node.marks else hull
    most = (node.relative + 2 * head.f.u + head.f.u_weights) * _largest(put(v)[None], seen)
    under = (head.f.floor_weights + head.f.floor) * (seen @ v) + head.f.floor * seen.sum(1, keepdims=True)
    # below a row's maximum the denominator is at least 1
    most = most + (under if "shifted" in weights.marks else under * node.amplify / np.abs(head.divided))
    most = most + node.err + _largest(put(head.lost_values)[None], seen)
    total = np.fmin(moved * node.amplify, hull) + np.fmin(rest * node.amplify, most)
    total = np.where(seen @ v == 0, 0.0, total)  # products with 0 are 0, whatever the weights are
    return total * (1 + head.f.u), variance


def _farthest(v: Any, o: Any, seen: NDArray[np.bool_]) -> Float:
    """Return how far the values of the keys that each row sees are from its output at most, (n_q, d_v)."""
    if seen.size and seen.all():  # the least or the largest value, rounding is monotone
        found: Float = on_host(np.maximum(np.abs(v.max(0) - o), np.abs(v.min(0) - o)))
        return found
    return _largest(np.abs(v[None] - o[:, None]), seen)


def _largest(x: Any, seen: NDArray[np.bool_]) -> Float:
    """Return the largest of sizes of the keys that each row sees, (n_q, d_v), or (1, d_v) where all see the same."""
    if len(x) == 1 and seen.all():
        return np.asarray(on_host(largest(x, 1)))
    found: Float = on_host(largest(np.where(beside(x, seen)[:, :, None], x, 0.0), 1))
    return found


def _over_keys(g: Any, x: Any, joint: Node) -> Float:
    x = np.broadcast_to(x, joint.a.shape)
    if isinstance(g, np.ndarray):
        return np.asarray(np.einsum("cij,ij->ic", g, x))
    found: Float = on_host((g * beside(g, x)).sum(2)).T
    return found


def _by_parts(one: Head, head: HeadLosses, g: Any, model: Model) -> Any:
    """Return the variance of out by the errors of the parts that are merged: each is common to all keys of its part."""
    if head.lse is None or model.merges(one.k.shape[0], one.sink is not None) < 2:
        return 0.0
    terms, starts = g * beside(g, head.summed.a), range(0, one.k.shape[0], model.split)
    by_part = on_host(np.stack([terms[:, :, i : i + model.split].sum(2) for i in starts], 2))
    moved = np.square(by_part).sum(2).T
    if one.sink is not None:  # the sink's part is what the keys' leave
        moved = moved + np.square(by_part.sum(2)).T
    return head.f.cu * (2 * np.square(head.lse.a) + 2) * moved
