"""Relations of calls that are parts of others: of lengths and corners, and of operators of one shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..dtypes import FORMATS
from ..exact.lowering import core_of
from ..problem import Problem
from ..variants import Selected, variant_of
from .bounds.expected import expected
from .compare import Worst
from .inputs.draw import Draw
from .trial import Trial, agree, same_out

__all__ = [
    "batch_invariance",
    "dropout_complement",
    "first_case",
    "full_budget_is_dense",
    "grouped_heads",
    "key_permutation",
    "layout",
    "lengths_cut",
    "norm_scaled",
    "offset_of_corner",
    "past_31_bits",
    "philox_moved",
    "row_invariance",
    "state_carried",
    "state_gradient",
    "values_doubled",
]


def lengths_cut(ask: Trial, p: Problem) -> Worst:
    """Cut each batch item to what is used of it."""
    whole, limit, found = ask.out(p), ask.allowed(p)["out"], []
    for b in range(p.batch):
        ((rows, keys),) = p.segments(b)
        item = slice(b, b + 1)
        parts = {"query": p.query[item, :, rows], "key": p.key[item, :, keys], "value": p.value[item, :, keys]}
        alone = ask.out(p.replace(**parts, lengths_q=None, lengths_k=None))
        text = f"the used part of batch item {b} alone gives another output"
        found.append(agree(alone, whole[item, :, rows], 2 * limit[item, :, rows], text))
    return max(found, key=lambda w: w.ratio)


def offset_of_corner(ask: Trial, p: Problem) -> Worst:
    """Name the corner that an offset moves the diagonal to."""
    limit = 2 * ask.allowed(p)["out"]
    text = "top_left with an offset to the other corner is not bottom_right"
    return agree(ask.out(p), ask.out(p.replace(causal="bottom_right", offset=None)), limit, text)


def batch_invariance(ask: Trial, p: Problem) -> Worst:
    """Compute each batch item alone."""
    alone = [ask.out(p.replace(**{n: x[i : i + 1] for n, x in p.arrays().items()})) for i in range(p.batch)]
    limit: Any = 0.0 if ask.able.batch_invariant else 2 * ask.allowed(p)["out"]
    return agree(np.concatenate(alone), ask.out(p), limit, "a batch alone gives another output than among others")


def row_invariance(ask: Trial, p: Problem) -> Worst:
    """Compute rows in chunks, each with the keys up to its last row, one of them a single row; the same bits."""
    before, whole, n = p.n_k - p.n_q, ask.out(p), p.n_q
    found = []
    for i, j in ((0, n // 3), (n // 3, n - 1), (n - 1, n)):
        keys = {name: getattr(p, name)[:, :, : before + j] for name in ("key", "value")}
        out = ask.out(p.replace(query=p.query[:, :, i:j], **keys))
        text = f"rows {i} to {j - 1} alone have other bits than among all {n}"
        found.append(agree(out, whole[:, :, i:j], 0.0, text))
    return max(found, key=lambda w: w.ratio)


def dropout_complement(ask: Trial, p: Problem) -> Worst:
    """Keep what was dropped and drop what was kept: both together are the call without dropout."""
    other, whole = p.replace(dropout_mask=~p.dropout_mask), p.replace(dropout_mask=None, dropout_p=None)
    by = 1 / (1 - (p.dropout_p or 0.0))
    limit = ask.allowed(p)["out"] + ask.allowed(other)["out"] + by * ask.allowed(whole)["out"]
    text = "what a mask keeps and what it drops do not add up to the call without dropout"
    return agree(ask.out(p) + ask.out(other), by * ask.out(whole), limit, text)


def norm_scaled(ask: Trial, p: Problem) -> Worst:
    """Double queries and keys, and take four times the epsilon."""
    twice = {n: (2 * getattr(p, n)).astype(getattr(p, n).dtype) for n in ("query", "key")}
    other = p.replace(**twice, norm_eps=4 * (p.norm_eps or 0.0))
    text = "queries and keys that are twice as large, with four times the epsilon, give another output"
    return agree(ask.out(other), ask.out(p), 2 * ask.allowed(p)["out"], text)


def philox_moved(ask: Trial, p: Problem) -> Worst:
    """Leave the first head out, and move the offset by the numbers that it draws."""
    step = 32 if p.philox_layout == "flash" else p.n_q * p.n_k
    rest = {n: getattr(p, n)[:, 1:] for n in ("query", "key", "value")}
    moved = p.replace(**rest, philox_offset=int(p.philox_offset or 0) + step)
    text = "the other heads, drawn from an offset past the first, are not what they are beside it"
    return agree(ask.out(moved), ask.out(p)[:, 1:], 2 * ask.allowed(moved)["out"], text)


def grouped_heads(ask: Trial, p: Problem) -> Worst:
    """Repeat the key heads."""
    group = p.heads // p.heads_kv
    wide = p.replace(key=np.repeat(p.key, group, axis=1), value=np.repeat(p.value, group, axis=1))
    limit = 2 * ask.allowed(p)["out"]
    return agree(ask.out(p), ask.out(wide), limit, "grouped heads differ from repeated ones")


def key_permutation(ask: Trial, p: Problem) -> Worst:
    """Take the keys in another order."""
    order = np.random.default_rng(0).permutation(p.n_k)
    moved = p.replace(key=p.key[:, :, order], value=p.value[:, :, order])
    return same_out(ask, moved, p, "the order of the keys matters")


def layout(ask: Trial, p: Problem) -> Worst:
    """Lay every array out as (b, n, h, d)."""
    turned = {n: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for n, x in p.arrays().items()}
    limit = 2 * ask.allowed(p)["out"]
    return agree(ask.out(p.replace(**turned)), ask.out(p), limit, "strides change the output")


def values_doubled(ask: Trial, p: Problem) -> Worst:
    """Double the values."""
    twice = p.replace(value=(p.value * p.value.dtype.type(2)).astype(p.value.dtype))
    form, out = FORMATS[p.dtype], 2 * ask.out(p)
    # among subnormal numbers twice a rounded number is one place from twice the number, rounded
    step = form.smallest_subnormal if ask.model.subnormals else 2 * form.smallest_normal
    limit = np.where(np.abs(out) < 4 * form.smallest_normal, step, 0.0)
    return agree(ask.out(twice), out, limit, "values twice as large do not double the output")


def full_budget_is_dense(ask: Trial, p: Problem) -> Worst:
    """Compare the operator with its whole budget to its core on every key."""
    shape = variant_of(p.variant).shape
    known = expected(core_of(p, shape) if isinstance(shape, Selected) else p, ask.model)
    text = "with every candidate chosen it is not what its core is"
    return agree(ask.out(p), known.answer.enclosures["out"].mid, known.allowed["out"], text)


def state_carried(ask: Trial, p: Problem) -> Worst:
    """Stop half way and go on from the state that the kernel returned: the rest must be right for that state."""
    half = p.n_q // 2
    cut = [{n: x[:, :, s] for n, x in p.arrays().items() if n != "state"} for s in (slice(half), slice(half, None))]
    first = ask.result(p.replace(**cut[0]))
    if first.state is None:
        return Worst("state", np.inf, (), np.nan, np.nan, 0.0, 1, 1, ("no state was returned",))
    rest = p.replace(**cut[1], state=first.state)
    known, start = expected(rest, ask.model), expected(p.replace(**cut[0]), ask.model)
    text = "going on from a returned state is not right for that state"
    found = agree(ask.out(rest), known.answer.enclosures["out"].mid, known.allowed["out"], text)
    said = "the returned state is not the state after the last token"
    state = first.state.astype(np.float64)
    whole = agree(state, start.answer.enclosures["state"].mid, start.allowed["state"], said, "state")
    return max(found, whole, key=lambda w: w.ratio)


def state_gradient(ask: Trial, p: Problem) -> Worst:
    """Take the state away: out is linear in it, so dout·out changes by its gradient times the state."""
    d = Draw(FORMATS[p.dtype], np.random.default_rng(2), p.variant)
    dout, none = d.tensor(d.normal(*p.out_shape)), p.replace(state=np.zeros_like(p.state))
    wide, state = dout.astype(np.float64), p.state.astype(np.float64)
    change = (wide * (ask.out(p) - ask.out(none))).sum((2, 3))
    said = (ask.gradients(p, dout)["dstate"] * state).sum((2, 3))
    lost = (np.abs(wide) * (ask.allowed(p)["out"] + ask.allowed(none)["out"])).sum((2, 3))
    lost = lost + (ask.allowed(p, dout)["dstate"] * np.abs(state)).sum((2, 3))
    return agree(said, change, lost, "dstate times the state is not what the state adds to out", "dstate")


def first_case(**more: Any) -> Callable[[Draw], Problem]:
    """Return a maker of the first call that an operator names for itself, with its whole budget where it chooses.

    More settings of the call may be given.
    """

    def build(d: Draw) -> Problem:
        v = variant_of(d.variant)
        settings: dict[str, Any] = {**next(iter(v.cases.values()), {}), **more}
        if isinstance(v.shape, Selected):
            settings["options"] = {**settings.get("options", {}), **v.shape.full}
        return d.problem(**settings)

    return build


PAST = 2**31


def past_31_bits(ask: Trial, p: Problem) -> Worst:
    """Repeat a few heads until their elements pass 2**31: the last ones must equal the first."""
    many = -(-(PAST + 1) // (p.n_k * p.d_k * p.heads)) + 1
    whole = {n: np.tile(x, (1, many, 1, 1)) for n, x in p.arrays().items()}
    out = ask.out(p.replace(**whole)).reshape(many, p.heads, p.n_q, p.d_v)
    text = "heads past 2**31 elements differ from the same heads before"
    return agree(out[-2:], np.broadcast_to(ask.out(p), (2, *out.shape[1:])), 2 * ask.allowed(p)["out"], text)
