"""Random calls of softmax attention for a device: every option of the streaming path, formats, and what is special."""

from functools import cache

import numpy as np

from refattn import Problem, rules
from refattn.arrays import from_float64
from refattn.check.inputs.families import cases
from refattn.dtypes import FLOAT4, format_of
from refattn.pages import in_pages
from refattn.scales import quantised
from refattn.variants import VARIANTS, Steps, variant_of

__all__ = ["FORMS", "backward", "compare", "draw", "drawn_rows", "operator"]

FORMS = ("float64", "float32", "float16", "bfloat16")
KINDS = ("int8", "float8", "mx", "mxfp4", "nvfp4")
FAMILIES = {
    "gaussian": lambda r, s: r.standard_normal(s),
    "same sign": lambda r, s: 1 + 2.0**-20 * r.standard_normal(s),
    "wide exponents": lambda r, s: r.standard_normal(s) * 2.0 ** r.integers(-30, 4, s),
    "integers": lambda r, s: r.integers(-3, 4, s) * 1.0,  # ties and zeros
    "peaked": lambda r, s: r.standard_normal(s) * 8.0,
    "constant": lambda r, s: np.full(s, float(r.standard_normal())),
}


def draw(rng, most=400):
    """Return a problem and the formats that out and lse are rounded to."""
    n, m, d, d_v = (int(x) for x in (rng.integers(1, 40), rng.integers(1, most), *rng.choice([1, 3, 8, 16, 40], 2)))
    d = 0 if rng.random() < 0.04 else d
    packed = rng.random() < 0.15
    two = lambda: 1 + int(rng.random() < 0.3)  # noqa: E731
    b, h_kv = (1 if packed else two()), two()
    h = h_kv * two()
    form = FORMS[rng.integers(len(FORMS))]
    pick = lambda s: FAMILIES[list(FAMILIES)[rng.integers(len(FAMILIES))]](rng, s)  # noqa: E731
    cast = lambda x: from_float64(format_of(form).round_array(x), form)  # noqa: E731
    q, k, v = pick((b, h, n, d)), pick((b, h_kv, m, d)), pick((b, h_kv, m, d_v))
    if form == "float64" and rng.random() < 0.1:
        v = v * 2.0 ** int(rng.choice([-1000, -300, 300, 900]))
    if rng.random() < 0.1:
        k[..., rng.integers(m), :] = np.nan
    if rng.random() < 0.1:
        v[..., rng.integers(m), 0] = np.inf
    more = options(rng, b, h, n, m, packed)
    if "bias" in more:
        more["bias"] = cast(more["bias"])
    if "sink" in more:
        more["sink"] = cast(more["sink"])
    out, lse = (FORMS[rng.integers(len(FORMS))] for _ in range(2))
    p = Problem(*map(cast, (q, k, v)), **more)
    kind = rng.random()
    if kind < 0.25:
        p = stored(rng, p)
    if kind > 0.9 or kind < 0.1:  # some of both
        p = paged(rng, p)
    return p, out, lse


def stored(rng, p):
    """Return a call whose numbers are stored in a type of their own, with scales; itself where no scale holds them."""
    given = [(n, getattr(p, n).astype(np.float64)) for n in ("query", "key", "value")]
    most = [np.abs(x).max(initial=0.0) for _, x in given]
    if not all(x == 0 or 2.0**-60 < x < 2.0**60 for x in most):  # and no NaN
        return p
    changed = {"out_dtype": p.dtype}
    kind = KINDS[rng.integers(len(KINDS))]
    for name, x in given:
        b, h, n, d = x.shape
        along = [m if rng.random() < 0.4 else 1 for m in (b, h, n)]
        elements, scales, wide = {
            "int8": ("int8", "float32", 1),
            "float8": (("float8_e4m3fn", "float8_e5m2")[rng.integers(2)], "float32", d),
            "mx": ("float8_e4m3fn", "float8_e8m0fnu", 8),
            "mxfp4": (FLOAT4.name, "float8_e8m0fnu", 8),
            "nvfp4": (FLOAT4.name, "float8_e4m3fn", 8),
        }[kind]
        if rng.random() < 0.2 or not x.size:
            continue  # as it is
        blocks = (*along, d // wide if d % wide == 0 else 1)
        x = np.clip(x, -400.0, 400.0) if kind == "nvfp4" else x
        changed[name], scale = quantised(x, elements, blocks, scales)
        if kind == "nvfp4":  # times a number for the tensor
            scale = (scale.astype(np.float64) * 0.75).astype(np.float32)
        changed[f"{name}_scale"] = float(scale[0, 0, 0, 0]) if scale.size == 1 and rng.random() < 0.5 else scale
    if rng.random() < 0.4:
        changed["out_scale"] = 0.3 if rng.random() < 0.5 else rng.uniform(0.01, 4, (1, p.heads, 1, 1))
    return p.replace(**changed)


def paged(rng, p):
    """Return a call whose keys lie in pages, some of them new; itself where its scales are by key."""
    by_key = [
        x for x in (p.key_scale, p.value_scale) if isinstance(x, np.ndarray) and (x.shape[0], x.shape[2]) != (1, 1)
    ]
    if p.cu_seqlens_q is not None or by_key:
        return p
    sizes = [s for s in (1, 4, 7, 16, p.n_k) if s and p.n_k % s == 0]
    most = p.n_k if p.lengths_k is None else int(p.lengths_k.min())
    new = int(rng.integers(0, min(most, 9) + 1))
    return in_pages(p, sizes[rng.integers(len(sizes))], ["NHD", "HND"][rng.integers(2)], rng, new=new)


def options(rng, b, h, n, m, packed):
    more = {}
    if rng.random() < 0.4:
        more["causal"] = ["bottom_right", "top_left"][rng.integers(2)]
    if rng.random() < 0.25:
        left, right = int(rng.integers(0, m + 1)), int(rng.integers(0, m + 1))
        more["window"] = (left, None if rng.random() < 0.5 else right)
        if rng.random() < 0.4:  # a side below 0
            right = -int(rng.integers(1, 4))
            more["window"] = [(left - right, right), (None, right), (right, left - right)][rng.integers(3)]
            if more.get("causal"):
                more["window"] = (left - right, right)
    if rng.random() < 0.2 and "causal" not in more:
        more["alignment"] = ["bottom_right", "top_left"][rng.integers(2)]
    if rng.random() < 0.25:
        many = (3,) if packed else (b,)
        more["offset"] = int(rng.integers(-9, 10)) if rng.random() < 0.5 else rng.integers(-9, 10, many)
    if rng.random() < 0.3:
        more["softcap"] = float(2.0 ** rng.integers(-3, 6) * rng.uniform(1, 2))
    if rng.random() < 0.3:
        more["sink"] = rng.standard_normal(h) * float(rng.choice([1.0, 30.0]))
        if rng.random() < 0.2:
            more["sink"][0] = -np.inf
    if rng.random() < 0.3:
        shape = (b, h, n, m) if rng.random() < 0.5 else (1, 1, 1, m)
        more["bias"] = rng.standard_normal(shape) * 3
        more["bias"][rng.random(shape) < 0.1] = -np.inf
    if rng.random() < 0.3:
        rule = rules.document(rng.integers(0, 3, n).tolist(), rng.integers(0, 3, m).tolist())
        more["allowed"] = rng.random((b, 1, n, m)) < 0.7 if rng.random() < 0.5 else rule
    if rng.random() < 0.2:
        more["scale"] = float(rng.choice([0.125, 0.3, -1.0, 2.0]))
    if packed:
        cut_q, cut_k = (np.sort(rng.integers(0, x + 1, 2)) for x in (n, m))
        more |= {"cu_seqlens_q": np.array([0, *cut_q, n]), "cu_seqlens_k": np.array([0, *cut_k, m])}
    elif rng.random() < 0.2:
        more |= {"lengths_q": rng.integers(0, n + 1, b), "lengths_k": rng.integers(0, m + 1, b)}
    return more


@cache
def small(name):
    return [c for c in cases(name) if not c.sampled and all(c.problem(f).n_k < 300 for f in FORMS[:1])]


def operator(rng, most=None):
    """Return a call of an operator with its options, softmax with weights, dropout, norms and positions too.

    It is in one of the formats, and has at most so many scores. A recurrence is none.
    """
    names = [n for n in VARIANTS if not isinstance(variant_of(n).shape, Steps)]
    while True:
        known = small(names[rng.integers(len(names))])
        p = known[rng.integers(len(known))].problem(FORMS[rng.integers(len(FORMS))])
        if most is None or p.batch * p.heads * p.n_q * p.n_k <= most:
            return p


def drawn_rows(rng, gradients=False):
    """Yield calls (1, 2, 3, 5) that no streaming path knows: one for each function of scores, and softmax's options.

    Those with gradients are without what has none, and without zeros, which need balls.
    """
    n, m, d = 3, 5, 4
    q, k, v = (rng.standard_normal((1, h, x, d)) for h, x in ((2, n), (1, m), (1, m)))
    bias, allowed = rng.standard_normal((1, 2, n, m)), rng.random((1, 1, n, m)) < 0.7
    bits = np.where(rng.random((1, 2, n, d)) < 0.5, 1.0, -1.0), np.where(rng.random((1, 1, m, d)) < 0.5, 1.0, -1.0)
    angle = rng.uniform(0, 6, (20, 2))
    turned = {"rotary": "half", "rotary_cos": np.cos(angle), "rotary_sin": np.sin(angle)}
    normed = {"query_norm": rng.uniform(0.5, 2, d), "key_norm": rng.uniform(0.5, 2, d), "norm_eps": 1e-6}
    dropped = {"dropout_p": 0.25, "dropout_mask": rng.random((1, 2, n, m)) < 0.75}
    decay = {"feature": "elu1", "decay": (0.1, 0.4)}
    for name, more in (
        ("sigmoid", {"bias": bias, "allowed": allowed}),
        ("linear", {"causal": "bottom_right", "options": decay}),
        ("power", {"allowed": allowed, "options": {"form": "mean" if gradients else "stable", "p": 4}}),
        *([] if gradients else [("relu", {"causal": "bottom_right", "scale": 0.3})]),
        ("urpe", {"bias": bias, "options": {"gain": ((0.5, -1.0, 2.0),)}}),
        ("softmax", {"weight": rng.integers(1, 3, (1, 1, 1, m)) * 1.0, "softcap": 2.0**11, "out_scale": 3.0}),
        ("softmax", turned | normed | dropped | {"sink": np.array([0.5, -1.0])}),
        ("softmax", {"alibi_slopes": np.array([0.5, 0.25]), "bias": bias}),
    ):
        yield Problem(q, k, v, variant=name, **more)
    yield Problem(*bits, v, variant="ecoformer", allowed=allowed)


def backward(rng, most):
    """Return a problem whose gradients a GPU computes, and the gradients that arrive at out and, or None, at lse.

    Calls with many scores have no ties: those end in Arb on the CPU, twice.
    """
    while True:
        p, *_ = draw(rng, most)
        if p.block_table is not None or p.batch * p.heads * p.n_q * p.n_k > 8 * most:  # keys in pages have none
            continue
        numbers = [np.abs(x.astype(np.float64)) for x in (p.query, p.key, p.value)]
        largest = [float(x.max(initial=0.0)) for x in numbers]
        if not all(x == 0 or 2.0**-199 < x < 2.0**199 for x in largest):  # NaN or inf, too
            continue
        tied = any(x.size and not np.ptp(x) for x in numbers) or all((x % 1 == 0).all() for x in numbers)
        if not (tied and p.n_k > 40):
            break
    dout = FAMILIES[list(FAMILIES)[rng.integers(len(FAMILIES))]](rng, p.out_shape)
    dout[rng.random(p.out_shape[:3]) < 0.1] = 0.0
    dlse = rng.standard_normal(p.out_shape[:3]) * (rng.random(p.out_shape[:3]) < 0.9)
    return p, dout, dlse if rng.random() < 0.4 else None


def compare(mine, theirs):
    """Return how many elements differ in any bit, NaN being NaN, or in being decided."""
    assert mine.values.keys() == theirs.values.keys()
    wrong = sum(mine.undecided[n] != theirs.undecided[n] for n in mine.values)
    for name, x in mine.values.items():
        y, wide = theirs.values[name], f"u{x.dtype.itemsize}"
        assert x.dtype == y.dtype
        both_nan = np.isnan(x.astype(np.float64)) & np.isnan(y.astype(np.float64))
        wrong += int(((x.view(wide) != y.view(wide)) & ~both_nan).sum())
    return wrong
