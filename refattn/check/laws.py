"""Relations that need no reference: a right kernel agrees with itself when the call is rewritten."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import FORMATS
from ..norms import NORMS
from ..problem import Problem
from ..variants import Selected, Steps, variant_of
from .call_laws import CALL_LAWS
from .compare import Worst
from .gradient_laws import calls_between, gradient_steps, last_state_gradient, lse_gradient, row_sums, spread_gradient
from .inputs.draw import Draw
from .inputs.dropped import dropout, philox_case
from .inputs.positioned import norm_case
from .latent_law import latent_case, latent_expanded
from .law import Law
from .model import Capabilities
from .page_laws import pages_case, pages_moved, unowned_unread
from .protocol import changed_in_place, many_repeats, options_between, results_kept, shapes_between, two_threads
from .shape_laws import (
    batch_invariance,
    dropout_complement,
    first_case,
    full_budget_is_dense,
    grouped_heads,
    key_permutation,
    layout,
    lengths_cut,
    norm_scaled,
    offset_of_corner,
    past_31_bits,
    philox_moved,
    row_invariance,
    state_carried,
    state_gradient,
    values_doubled,
)
from .trial import Trial, agree, same_out

__all__ = ["LAWS", "Law", "law_problem"]

Float = NDArray[np.float64]


def _determinism(ask: Trial, p: Problem) -> Worst:
    """Compare every array of two runs bit for bit; of a kernel that says it is not deterministic, within its bound."""
    d = Draw(FORMATS[p.dtype], np.random.default_rng(2), p.variant)
    dout = d.tensor(d.normal(*p.out_shape))
    runs = [ask.everything(p, dout) for _ in range(2)]
    limits: dict[str, Any] = dict.fromkeys(runs[0], 0.0)
    if not ask.able.deterministic:
        limits = {n: 2 * x for n, x in (ask.allowed(p) | (ask.allowed(p, dout) if ask.has_gradients else {})).items()}
    text = "two runs on the same input differ"
    found = [agree(x, runs[1][n], limits[n], f"{text} in {n}", n) for n, x in runs[0].items() if n in limits]
    return max(found, key=lambda w: w.ratio)


def _masked_keys_unread(ask: Trial, p: Problem) -> Worst:
    hidden = ~p.allowed.any((0, 1, 2))
    key, value = p.key.copy(), p.value.copy()
    key[:, :, hidden], value[:, :, hidden] = 3, -7
    text = "a key that no row may see changes the output"
    return agree(ask.out(p.replace(key=key, value=value)), ask.out(p), 0.0, text)


def _split_and_merge(ask: Trial, p: Problem) -> Worst:
    """Halve the keys (one half masked for half of the rows) and merge the two answers through their lse."""
    half = p.n_k // 2
    parts = [
        p.replace(key=p.key[:, :, s], value=p.value[:, :, s], allowed=p.allowed[..., s])
        for s in (slice(half), slice(half, None))
    ]
    results = [ask.result(x) for x in parts]
    limits = [ask.allowed(x) for x in parts]
    if any(r.lse is None for r in results):
        return Worst("out", np.inf, (), np.nan, np.nan, 0.0, 1, 1, ("no lse was returned",))
    lse, out = ([x.astype(np.float64) for x in many] for many in zip(*((r.lse, r.out) for r in results), strict=True))
    with np.errstate(all="ignore"):
        total = np.logaddexp(*lse)[..., None]
        shares = [np.exp(x[..., None] - total) for x in lse]
        merged = np.sum([s * np.where(s > 0, o, 0) for s, o in zip(shares, out, strict=True)], axis=0)
        slack = np.nan_to_num(limits[0]["lse"] + limits[1]["lse"])[..., None] * np.minimum(*shares)
        slack = 2 * slack * np.abs(out[0] - out[1])
        allowed = sum(s * b["out"] for s, b in zip(shares, limits, strict=True)) + slack + ask.allowed(p)["out"]
    found = agree(merged, ask.out(p), allowed, "two halves merged through lse differ from the whole")
    for name, got, must in (("empty-lse", lse, -np.inf), ("empty-row", out, 0.0)):
        empty = [~q.allowed.any(3).repeat(p.heads, 1) for q in parts]
        gone = np.zeros(merged.shape[:3], bool)
        for x, rows in zip(got, empty, strict=True):
            gone |= rows & (x != must).reshape(*rows.shape, -1).any(3)
        rest = np.where(gone[..., None], ask.out(p), merged)
        if found.failures and agree(rest, ask.out(p), allowed, "").failures == 0:
            return replace(found, edges={name: found.failures})  # the merge is as right as what it was given
    return found


def _batch_independence(ask: Trial, p: Problem) -> Worst:
    other = p.replace(**{n: np.concatenate([x[:1], x[1:][::-1] * x.dtype.type(0.5)]) for n, x in p.arrays().items()})
    # one scale for a whole tensor is made from every batch
    limit = (ask.allowed(p)["out"] + ask.allowed(other)["out"])[:1] if ask.model.scales == "tensor" else 0.0
    return agree(ask.out(p)[:1], ask.out(other)[:1], limit, "what another batch holds changes the output")


def _bias_shifted(ask: Trial, p: Problem) -> Worst:
    moved = p.replace(bias=(p.bias + p.bias.dtype.type(4)).astype(p.bias.dtype))
    return same_out(ask, moved, p, "a constant added to all scores changes the output")


def _whole_bias(d: Draw) -> Problem:
    # so that the shift by 4 is exact in every format: -4 to 3 becomes 0 to 7, three bits
    return d.problem(bias=np.clip(np.rint(2 * d.normal(1, 2, 37, 67)), -4, 3))


def _half_masked(d: Draw) -> Problem:
    allowed = np.ones((1, 1, 37, 66), bool)
    allowed[..., ::2, 33:] = False  # every second row sees nothing of the second half, every third not all of a half
    allowed[..., 1::3, ::4] = False
    return d.problem(37, 66, allowed=allowed)


def _hidden_keys(d: Draw) -> Problem:
    return d.problem(allowed=np.broadcast_to(np.arange(67) % 5 != 3, (1, 1, 37, 67)).copy())


LAWS = {
    law.name: law
    for law in (
        Law(
            "full_budget_is_dense",
            "with every candidate chosen the operator is its core",
            first_case(),
            full_budget_is_dense,
            shape=Selected,
        ),
        Law(
            "state_carried",
            "a call that goes on from a returned state is right for that state",
            first_case(),
            state_carried,
            "state",
            shape=Steps,
        ),
        Law(
            "state_gradient",
            "what the state of the start adds to out is what its gradient says",
            first_case(state=True),
            state_gradient,
            "dstate",
            uses=frozenset({"state"}),
        ),
        Law(
            "last_state_gradient",
            "a gradient that arrives at the last state, too, is right",
            first_case(state=True, b=2),
            last_state_gradient,
            "dstate_out",
            uses=frozenset({"state"}),
        ),
        Law("determinism", "the same call twice gives the same bits", lambda d: d.problem(65, 130), _determinism),
        Law(
            "changed_in_place",
            "numbers changed in place change the answer",
            lambda d: d.problem(),
            changed_in_place,
        ),
        Law(
            "results_kept",
            "a result stays as it is when the kernel is called again",
            lambda d: d.problem(),
            results_kept,
        ),
        Law("shapes_between", "calls of other shapes between do not matter", lambda d: d.problem(5, 7), shapes_between),
        Law(
            "options_between",
            "calls with other options between do not matter",
            lambda d: d.problem(17, 33),
            options_between,
        ),
        Law(
            "many_repeats", "a call is right however often it is repeated", lambda d: d.problem(3, 5, d=8), many_repeats
        ),
        Law(
            "two_threads",
            "a call from one of two threads is right",
            lambda d: d.problem(70, 200),
            two_threads,
            "threads",
        ),
        Law("key_permutation", "the order of the keys does not matter", lambda d: d.problem(), key_permutation),
        Law("batch_independence", "a batch does not matter to another", lambda d: d.problem(b=3), _batch_independence),
        Law(
            "batch_invariance",
            "a batch alone gives what it gives among others; the same bits where the capabilities say so",
            lambda d: d.problem(2, 259, b=3),
            batch_invariance,
        ),
        Law(
            "row_invariance",
            "rows in chunks, and a row alone, have the bits that they have among all; where the capabilities say so",
            lambda d: d.problem(2051, 2100, b=2, h=4, h_kv=2, d=64, causal="bottom_right"),
            row_invariance,
            "row_invariant",
            uses=frozenset({"causal"}),
        ),
        Law(
            "lengths_cut",
            "a batch item of which a part is used gives what that part alone gives",
            lambda d: d.problem(
                b=3, causal="bottom_right", lengths_q=np.array([20, 37, 1]), lengths_k=np.array([67, 40, 33])
            ),
            lengths_cut,
            uses=frozenset({"causal", "lengths_q", "lengths_k"}),
        ),
        Law(
            "offset_of_corner",
            "the top left corner moved to the other is the bottom right one",
            lambda d: d.problem(causal="top_left", offset=30),
            offset_of_corner,
            uses=frozenset({"causal", "offset"}),
        ),
        Law(
            "dropout_complement",
            "what a mask keeps and what it drops add up to the call without dropout, divided by 1 - p",
            lambda d: d.problem(b=2, **dropout(d, 0.25, 1, 2, 37, 67)),
            dropout_complement,
            uses=frozenset({"dropout_mask"}),
        ),
        *CALL_LAWS,
        Law("norm_scaled", "the size of normed rows does not matter", norm_case, norm_scaled, uses=frozenset(NORMS)),
        Law(
            "philox_moved", "heads draw one after another", philox_case, philox_moved, uses=frozenset({"philox_layout"})
        ),
        Law(
            "pages_moved",
            "where the pages of a cache lie does not matter",
            pages_case,
            pages_moved,
            uses=frozenset({"causal", "lengths_k"}),
        ),
        Law(
            "unowned_unread",
            "what nobody owns in a cache does not matter",
            pages_case,
            unowned_unread,
            uses=frozenset({"causal", "lengths_k"}),
        ),
        Law("values_doubled", "the output is linear in the values", lambda d: d.problem(), values_doubled),
        Law("layout", "strides do not matter", lambda d: d.problem(b=2, h=3), layout),
        Law(
            "bias_shifted",
            "a constant added to a row's scores does not matter",
            _whole_bias,
            _bias_shifted,
            uses=frozenset({"bias"}),
        ),
        Law(
            "masked_keys_unread",
            "what stands behind the mask does not matter",
            _hidden_keys,
            _masked_keys_unread,
            uses=frozenset({"allowed"}),
        ),
        Law(
            "latent_expanded",
            "attention over a latent equals that over the keys and values that are made of it",
            latent_case,
            latent_expanded,
        ),
        Law("grouped_heads", "grouped heads equal repeated key heads", lambda d: d.problem(h=6, h_kv=2), grouped_heads),
        Law(
            "split_and_merge",
            "two halves of the keys, merged through lse, equal the whole",
            _half_masked,
            _split_and_merge,
            "lse",
            uses=frozenset({"allowed"}),
        ),
        Law(
            "gradient_steps",
            "dq, dk and dv are the derivatives of out: a step changes out by what they say",
            lambda d: d.problem(5, 19, h=2, d=8),
            gradient_steps,
            "dq",
        ),
        Law(
            "spread_gradient",
            "a gradient that is one number spread over out is the same as an array of it",
            lambda d: d.problem(b=2),
            spread_gradient,
            "dq",
        ),
        Law(
            "calls_between",
            "gradients do not depend on the forward pass that was last",
            lambda d: d.problem(9, 40),
            calls_between,
            "dq",
        ),
        Law(
            "lse_gradient",
            "a gradient that arrives at lse, too, is right",
            lambda d: d.problem(9, 40, h=4, h_kv=2, causal="bottom_right", sink=d.normal(4)),
            lse_gradient,
            "dlse",
            uses=frozenset({"causal", "sink"}),
        ),
        Law(
            "dk_sums",
            "the rows of dS sum to 0, so dk sums to 0 over the keys",
            lambda d: d.problem(),
            row_sums("dk", 2, "dk does not sum to 0 over the keys"),
            "dk",
        ),
        Law(
            "dbias_sums",
            "the rows of dS sum to 0, so dbias sums to 0 over the keys",
            _whole_bias,
            row_sums("dbias", 3, "a row of dbias does not sum to 0"),
            "dbias",
            uses=frozenset({"bias"}),
        ),
        Law(
            "past_31_bits",
            "offsets past 2**31 elements do not matter",
            lambda d: d.problem(2, 1024, h=61, d=64),
            past_31_bits,
            named_only="it needs 8 to 20 GB, here and on the device",
        ),
    )
}
"""The laws, by name."""
ABOUT = ("philox_layout", "rotary", "positions_q")
"""Options without which a law of them is of nothing."""


def law_problem(law: Law, dtype: str, variant: str, able: Capabilities | None = None) -> Problem:
    """Return the problem that a law is tried on: where an operator does not take it, the first that it names itself.

    In pages, with rotary positions or a seed of dropout, it has what a kernel can do, where that is given.
    """
    v = variant_of(variant)
    p = law.problem(Draw(FORMATS[dtype], np.random.default_rng(1), variant))
    if v.takes(p):
        plain = p.block_table is None and p.philox_layout is None and p.rotary is None
        if able is None or plain or not able.missing(p):
            return p
        made = law.problem(Draw(FORMATS[dtype], np.random.default_rng(1), variant, able))
        return p if any(getattr(made, n) is None and getattr(p, n) is not None for n in ABOUT) else made
    settings = {"b": p.batch, "h": p.heads, "h_kv": p.heads_kv} | dict(next(iter(v.cases.values()), {}))
    settings["options"] = v.fitted(settings.get("options", {}), p.heads)
    return Draw(FORMATS[dtype], np.random.default_rng(1), variant).problem(**settings)
