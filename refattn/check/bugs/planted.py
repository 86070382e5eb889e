"""Kernels known to be wrong: each is a right kernel with one small edit. The checker must fail every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import masks
from ...arrays import from_float64
from ...dtypes import FORMATS
from ...exact.agree import under
from ...exact.driver import reference
from ...exact.heads import heads
from ...exact.lowering import lower
from ...exact.stream import STREAMED
from ...norms import NORMS, has_norms
from ...positions import POSITIONS, ROTARY, partners, places, tables
from ...problem import Problem
from ...scales import spread, values
from ...validation import SCALES
from ...variants import Rows, Steps, variant_of
from ..call import Function
from ..kernels.tiled import tiled
from .dropped import DROPOUT_BUGS, SEED_BUGS, lse_of_kept
from .masked import MASK_BUGS
from .paged import PAGED_BUGS
from .positioned import POSITION_BUGS
from .typed import TYPE_BUGS

__all__ = ["PLANTED", "mistaken", "plain", "planted"]

Pair = tuple[NDArray[Any], NDArray[Any] | None]


def plain(problem: Problem) -> Any:
    """Return the right kernel that bugs are planted in: the tiled one, or any operator's definition in float32."""
    if variant_of(problem.variant).fused == STREAMED:
        return tiled(problem)
    found = reference(problem, np.float64 if problem.dtype == "float64" else np.float32)
    out = from_float64(FORMATS[problem.dtype].round_array(found["out"].astype(np.float64)), problem.dtype)
    more = [found[n] for n in ("lse", "state") if n in found]
    return (out, *more) if more else out


def planted(name: str) -> Function:
    """Return the wrong kernel of that name."""
    before, after = PLANTED[name]

    def kernel(problem: Problem) -> Any:
        # an operator that is lowered goes wrong after it
        as_is = problem.typed or problem.block_table is not None or name in SEED_BUGS
        call = problem if as_is else lower(problem).problem
        result = plain(before(call))
        out, lse = result if isinstance(result, tuple) else (result, None)
        out, lse = after(problem, out.copy(), None if lse is None else lse.copy())
        return out if lse is None else (out, lse)

    kernel.__name__ = f"planted_{name}"
    return kernel


def mistaken(variant: str, name: str) -> Function:
    """Return a kernel of an operator with one of the mistakes that its row in the table names."""
    v = variant_of(variant)
    shape = v.wrong[name][1]

    def kernel(problem: Problem) -> Any:
        if not isinstance(shape, Rows | Steps):
            return plain(lower(problem, shape).problem)
        with under(replace(v, name=f"{variant}/{name}", define=shape, fused="")) as other:
            return plain(problem.replace(variant=other.name))

    kernel.__name__ = f"mistaken_{name}"
    return kernel


def _only(problem: Problem, mask: NDArray[np.bool_]) -> Problem:
    """Allow only the keys of an (n_q, n_k) mask, on top of what is allowed."""
    return problem.replace(allowed=masks.both(problem.allowed, mask[None, None]))


def _own_key_dropped(p: Problem) -> Problem:
    mask = np.ones((p.n_q, p.n_k), bool)
    if p.causal and mask.size:
        last = np.nonzero(masks.causal(p.n_q, p.n_k, p.causal)[-1])[0]
        mask[-1, last[-1:]] = False
    return _only(p, mask)


def _keys_dropped(p: Problem, start: int) -> Problem:
    mask = np.ones((p.n_q, p.n_k), bool)
    mask[:, max(start, 1) :] = False
    return _only(p, mask)


def _causal_off_by_one(p: Problem) -> Problem:
    if p.causal is None or p.cu_seqlens_q is not None or p.window is not None:
        return p
    free = p.replace(causal=None)
    if not variant_of(p.variant).takes(free):
        return p
    return _only(free, masks.sliding_window(p.n_q, p.n_k, None, 1, p.causal))


def _corner_swapped(p: Problem) -> Problem:
    swap = {"bottom_right": "top_left", "top_left": "bottom_right", None: None}
    return p.replace(causal=swap[p.causal])


def _ignored(*names: str) -> Callable[[Problem], Problem]:
    def before(p: Problem) -> Problem:
        without = p.replace(**dict.fromkeys(names))
        return without if variant_of(p.variant).takes(without) else p

    return before


def _joined(p: Problem) -> Problem:
    """Take packed sequences for one; of a recurrence it starts from the first one's state."""
    if p.cu_seqlens_q is None or p.state is None:
        return _ignored("cu_seqlens_q", "cu_seqlens_k")(p)
    return p.replace(cu_seqlens_q=None, cu_seqlens_k=None, state=p.state[:1])


def _last_of_all(p: Problem, out: NDArray[Any], more: NDArray[Any] | None) -> Pair:
    """Return the state after the last token for each sequence."""
    return out, np.repeat(more, p.state_shape[0], 0) if more is not None and more.ndim == 4 else more


def _window_off_by_one(p: Problem) -> Problem:
    return p if p.window is None else p.replace(window=tuple(None if w is None else w + 1 for w in p.window))


def _heads_tiled(p: Problem) -> Problem:
    at = np.arange(p.heads) % p.heads_kv
    return p.replace(key=p.key[:, at], value=p.value[:, at])


def _same(p: Problem) -> Problem:
    return p


def _keep(p: Problem, out: NDArray[Any], lse: NDArray[Any] | None) -> Pair:
    return out, lse


def _zeroed_head(p: Problem, out: NDArray[Any], lse: NDArray[Any] | None) -> Pair:
    out[:, p.heads // 2] = 0
    return out, lse


def _empty(p: Problem) -> NDArray[np.bool_]:
    mask = np.zeros(p.out_shape[:3], bool)
    for one in heads(p):
        mask[one.batch, one.head, one.rows] = ~one.allowed.any(1)
    return mask


def _empty_nan(p: Problem, out: NDArray[Any], lse: NDArray[Any] | None) -> Pair:
    out[_empty(p)] = np.nan
    return out, lse


def _empty_mean(p: Problem, out: NDArray[Any], lse: NDArray[Any] | None) -> Pair:
    group = p.heads // p.heads_kv
    if p.n_k and _empty(p).any():
        mean = np.repeat(p.value.astype(np.float64).mean(2, keepdims=True), group, axis=1)
        out = np.where(_empty(p)[..., None], mean, out.astype(np.float64)).astype(out.dtype)
    return out, lse


def _empty_lse_zero(p: Problem, out: NDArray[Any], lse: NDArray[Any] | None) -> Pair:
    if lse is not None:
        lse[np.isneginf(lse)] = 0
    return out, lse


def _base_two(p: Problem, out: NDArray[Any], lse: NDArray[Any] | None) -> Pair:
    return out, None if lse is None else (lse / np.log(2)).astype(lse.dtype)


def _neighbour_row(p: Problem, out: NDArray[Any], lse: NDArray[Any] | None) -> Pair:
    if p.n_q > 1:
        out[:, :, p.n_q // 2] = out[:, :, p.n_q // 2 - 1]
    return out, lse


def _too_narrow(p: Problem, out: NDArray[Any], lse: NDArray[Any] | None) -> Pair:
    x = out.astype(np.float64)
    with np.errstate(all="ignore"):
        unit = FORMATS[p.dtype].ulp_array(x) * 16
        coarse = np.where(np.isfinite(x), np.rint(x / unit) * unit, x)
    return from_float64(FORMATS[p.dtype].round_array(coarse), p.dtype), lse


def _masked_value_read(p: Problem, out: NDArray[Any], lse: NDArray[Any] | None) -> Pair:
    with np.errstate(all="ignore"):
        leak = np.repeat((p.value.astype(np.float64) * 0).sum(2, keepdims=True), p.heads // p.heads_kv, axis=1)
        return (out.astype(np.float64) + leak).astype(out.dtype), lse


def _cap_after_bias(p: Problem, out: NDArray[Any], lse: NDArray[Any] | None) -> Pair:
    if p.softcap is None or p.bias is None:
        return out, lse
    for one in heads(p):
        o = one.plain()
        s = np.tanh((one.q @ one.k.T * o.scale + one.bias) / p.softcap) * p.softcap
        w = np.where(one.allowed, np.exp(s), 0)
        z = w.sum(1, keepdims=True) + (0 if one.sink is None else np.exp(one.sink))
        out[one.batch, one.head, one.rows] = (w @ one.v / np.where(z > 0, z, 1)).astype(out.dtype)
    return out, lse


def _clamped(p: Problem) -> Problem:
    """Clamp scores at a sentinel of -1e4, as kernels do that mask with it: rows far below become uniform."""
    top = max((float(np.abs(one.q @ one.k.T * one.plain().scale).max(initial=0)) for one in heads(p)), default=0.0)
    return p.replace(scale=0.0) if top > 1e4 and variant_of(p.variant).has_lse else p


def _lengths_one_more(p: Problem) -> Problem:
    room = np.full(p.batch, p.n_k) if p.cu_seqlens_k is None else np.diff(p.cu_seqlens_k)
    return p if p.lengths_k is None else p.replace(lengths_k=np.minimum(p.lengths_k + 1, room))


def _corner_of_all(p: Problem) -> Problem:
    """Align the diagonal with the whole axes, not with what is used of them."""
    if p.corner == "top_left" or p.lengths_k is None or p.cu_seqlens_k is not None:
        return p
    rows = np.full(p.batch, p.n_q) if p.lengths_q is None else p.lengths_q
    return p.replace(offset=(p.n_k - p.n_q) - (p.lengths_k - rows) + (0 if p.offset is None else p.offset))


def _first_offset(p: Problem) -> Problem:
    return p if p.offset is None or isinstance(p.offset, int) else p.replace(offset=int(p.offset[0]))


def _scale_of_next(axis: int) -> Callable[[Problem], Problem]:
    """Take the scale of the next head, or of the next token or block."""

    def before(p: Problem) -> Problem:
        scales = {n: getattr(p, n) for n in SCALES[:3]}
        arrays = {n: x for n, x in scales.items() if x is not None and not isinstance(x, float)}
        return p.replace(**{n: np.roll(x, 1, axis) for n, x in arrays.items()})

    return before


def _pairs_swapped(p: Problem) -> Problem:
    swap = {"half": "interleaved", "interleaved": "half", None: None}
    return p.replace(rotary=swap[p.rotary])


def _other_way(p: Problem) -> Problem:
    """Turn queries and keys by their angles the other way round."""
    return p if p.rotary is None else p.replace(rotary_sin=-p.rotary_sin)


def _rest_dropped(p: Problem) -> Problem:
    """Take no product of the columns that are not turned."""
    if p.rotary is None:
        return p
    query = p.query.copy()
    query[..., 2 * p.rotary_cos.shape[1] :] = 0
    return p.replace(query=query)


def _before_scale(p: Problem) -> Problem:
    """Turn keys before they meet their scale."""
    if p.rotary is None or p.key_scale is None:
        return p
    key = _turned(p, p.key.astype(np.float64), 1) * spread(np.asarray(p.key_scale, np.float64), p.key.shape)
    query = _turned(p, values(p, "query"), 0)
    found = (from_float64(FORMATS[p.dtype].round_array(x), p.dtype) for x in (query, key))
    none = dict.fromkeys(("key_scale", "query_scale", *ROTATED))
    return p.replace(**dict(zip(("query", "key"), found, strict=True)), **none)


def _turned(p: Problem, x: NDArray[np.float64], which: int) -> NDArray[np.float64]:
    found = x.copy()
    for b in range(p.batch):
        for seq in p.segments(b):
            part, (cos, sin) = x[b, :, seq[which]], tables(p, places(p, b, *seq)[which])
            found[b, :, seq[which]] = part * cos + part[..., partners(p)] * sin
    return found


def _unweighted(p: Problem) -> Problem:
    """Divide rows by their root mean square, and leave the weights out."""
    return p.replace(**{n: np.ones_like(x) for n in NORMS if (x := getattr(p, n)) is not None})


def _norm_last(p: Problem) -> Problem:
    """Take the norm of what is turned already."""
    if p.rotary is None or not has_norms(p):
        return p
    found = {}
    for which, name in enumerate(("query", "key")):
        x, w = _turned(p, getattr(p, name).astype(np.float64), which), getattr(p, NORMS[which])
        if w is not None:
            x = x / np.sqrt((x * x).mean(3, keepdims=True) + p.norm_eps) * np.asarray(w, np.float64)
        found[name] = from_float64(FORMATS[p.dtype].round_array(x), p.dtype)
    return p.replace(**found, **dict.fromkeys((*ROTATED, *NORMS, "norm_eps")))


def _absorbed_scale(p: Problem) -> Problem:
    """Scale the scores of latent attention by the width of the latent, which the values have."""
    return p.replace(scale=p.d_v**-0.5) if p.heads_kv == 1 < p.heads and p.d_v < p.d_k else p


def _next_slope(p: Problem) -> Problem:
    return p if p.alibi_slopes is None else p.replace(alibi_slopes=np.roll(p.alibi_slopes, 1, -1))


def _next_position(p: Problem) -> Problem:
    """Turn each query as the one behind it."""
    if p.rotary is None or not p.n_q:
        return p
    whole = np.zeros((p.batch, p.n_q), np.int64)
    for b in range(p.batch):
        for rows, keys in p.segments(b):
            whole[b, rows] = places(p, b, rows, keys)[0]
    return p.replace(positions_q=np.minimum(whole + 1, p.rotary_cos.shape[0] - 1))


TILE = 64
EDITS = (MASK_BUGS, PAGED_BUGS, DROPOUT_BUGS, SEED_BUGS, POSITION_BUGS, TYPE_BUGS)
ROTATED = ("rotary", *ROTARY)
PLANTED: dict[str, tuple[Callable[[Problem], Problem], Callable[..., Pair]]] = {
    "zeroed_head": (_same, _zeroed_head),
    "own_key_dropped": (_own_key_dropped, _keep),
    "last_key_dropped": (lambda p: _keys_dropped(p, p.n_k - 1), _keep),
    "tail_tile_dropped": (lambda p: _keys_dropped(p, p.n_k // TILE * TILE if p.n_k > TILE else p.n_k), _keep),
    "wrong_scale": (lambda p: p.replace(scale=1 / p.d_k if p.scale is None else p.scale * 0.75), _keep),
    "scale_of_latent_width": (_absorbed_scale, _keep),
    "causal_off_by_one": (_causal_off_by_one, _keep),
    "causal_ignored": (_ignored("causal"), _keep),
    "causal_corner_swapped": (_corner_swapped, _keep),
    "window_off_by_one": (_window_off_by_one, _keep),
    "window_ignored": (_ignored("window"), _keep),
    "allowed_ignored": (_ignored("allowed"), _keep),
    "bias_ignored": (_ignored("bias"), _keep),
    "softcap_ignored": (_ignored("softcap"), _keep),
    "softcap_after_bias": (_same, _cap_after_bias),
    "sink_ignored": (_ignored("sink"), _keep),
    "heads_tiled": (_heads_tiled, _keep),
    "sequences_joined": (_joined, _last_of_all),
    "lengths_ignored": (_ignored("lengths_q", "lengths_k"), _keep),
    "lengths_one_more": (_lengths_one_more, _keep),
    "corner_of_unused": (_corner_of_all, _keep),
    "offset_ignored": (_ignored("offset"), _keep),
    "offset_of_first_batch": (_first_offset, _keep),
    "alignment_ignored": (_ignored("alignment"), _keep),
    "key_scale_ignored": (_ignored("key_scale"), _keep),
    "value_scale_ignored": (_ignored("value_scale"), _keep),
    "out_scale_ignored": (_ignored("out_scale"), _keep),
    "scale_of_next_head": (_scale_of_next(1), _keep),
    "scale_of_next_token": (_scale_of_next(2), _keep),
    "scale_of_next_channel": (_scale_of_next(3), _keep),
    "rotary_ignored": (_ignored(*ROTATED, *POSITIONS), _keep),
    "rotary_pairs_swapped": (_pairs_swapped, _keep),
    "rotary_other_way": (_other_way, _keep),
    "rotary_rest_dropped": (_rest_dropped, _keep),
    "rotary_before_scale": (_before_scale, _keep),
    "query_at_next_position": (_next_position, _keep),
    "positions_ignored": (_ignored(*POSITIONS), _keep),
    "norm_ignored": (_ignored(*NORMS, "norm_eps"), _keep),
    "norm_unweighted": (_unweighted, _keep),
    "norm_after_rotary": (_norm_last, _keep),
    "alibi_ignored": (_ignored("alibi_slopes"), _keep),
    "alibi_of_next_head": (_next_slope, _keep),
    "value_of_next_key": (lambda p: p.replace(value=np.roll(p.value, 1, axis=2)), _keep),
    "lse_base_two": (_same, _base_two),
    "lse_of_empty_row_zero": (_same, _empty_lse_zero),
    "empty_row_nan": (_same, _empty_nan),
    "empty_row_mean": (_same, _empty_mean),
    "neighbour_row": (_same, _neighbour_row),
    "output_too_narrow": (_same, _too_narrow),
    "masked_value_read": (_same, _masked_value_read),
    "scores_clamped": (_clamped, _keep),
    "dropout_in_lse": (_same, lse_of_kept),
    **{name: (before, _keep) for bugs in EDITS for name, before in bugs.items()},
}
"""Planted bugs by name: an edit of the problem that the kernel is given, and one of what it returns."""
