"""Random calls for both computations, and where they differ."""

import ml_dtypes
import numpy as np

import refattn
from refattn.arrays import to_float64

from .attention import FORMATS, nearest, other, softmax

TYPES = {n: getattr(ml_dtypes, n, None) or getattr(np, n) for n in FORMATS}


WINDOWS = [(x, y) for x in (None, 0, 2, 4) for y in (None, 0, 1, 3)] + [(None, -1), (-2, None), (-1, 3), (4, -2)]


def draw(seed):
    """A call with any options, and an arriving gradient or None."""
    rng = np.random.default_rng(seed)

    def maybe(share, make):
        return make() if rng.random() < share else None

    dtype = str(rng.choice(list(FORMATS)))
    kind, wide = TYPES[dtype], np.float64 if dtype == "float64" else np.float32
    b, h_kv, group = (int(rng.integers(1, n)) for n in (3, 3, 3))
    n_q, n_k, d_k, d_v = (int(x) for x in rng.integers(1, 8, 4))
    size = float(rng.choice([0.1, 1.0, 5.0]))
    ints = rng.random() < 0.2

    def tensor(*shape):
        x = rng.integers(-2, 3, shape) if ints else rng.standard_normal(shape) * size
        return np.asarray(x, np.float64).astype(kind)

    def masked(*shape):
        return tuple(1 if rng.random() < 0.3 else n for n in shape)

    full, narrow = (b, h_kv * group, n_q, n_k), dtype.startswith("float8")
    more = {
        "scale": maybe(0.4, lambda: float(rng.choice([0.3, 1.0, -0.5, 0.0, 2.0]))),
        "causal": maybe(0.5, lambda: str(rng.choice(["bottom_right", "top_left"]))),
        "window": maybe(0.3, lambda: WINDOWS[rng.integers(len(WINDOWS))]),
        "softcap": maybe(0.25, lambda: float(rng.choice([0.5, 2.0, 30.0]))),
        "sink": maybe(0.3, lambda: rng.standard_normal(h_kv * group).astype(wide)),
        "allowed": maybe(0.3, lambda: rng.random(masked(*full)) < 0.7),
        "bias": maybe(0.3, lambda: np.where(rng.random(s := masked(*full)) < 0.1, -np.inf, 2 * rng.standard_normal(s))),
        "weight": maybe(0.15, lambda: rng.integers(0, 4, masked(*full)).astype(kind)),
    }
    if more["bias"] is not None:
        more["bias"] = more["bias"].astype(np.float32 if narrow else kind)
    if b == 1 and rng.random() < 0.5:
        cut = [np.sort(rng.integers(0, n + 1, 2)) for n in (n_q, n_k)]
        names = ("cu_seqlens_q", "cu_seqlens_k")
        more |= {m: np.array([0, *c, n], np.int32) for m, c, n in zip(names, cut, (n_q, n_k), strict=True)}
    if more["window"] is not None and (more["window"][0] or 0) < 0:
        more["causal"] = None
    more |= {} if rng.random() < 0.6 else another(rng, more)
    if more.get("variant", "softmax") == "softmax":
        more |= placed(rng, more, b, n_q, n_k)
    heads = (b, h_kv * group, n_q, d_k), (b, h_kv, n_k, d_k), (b, h_kv, n_k, d_v)
    problem = refattn.Problem(*(tensor(*s) for s in heads), **more)
    return problem, maybe(0.5, lambda: tensor(*problem.out_shape)) if problem.variant == "softmax" else None


def placed(rng, more, b, n_q, n_k):
    """How much of each item or sequence is used, and where the diagonal lies."""
    found = {}
    for axis, n in (("q", n_q), ("k", n_k)):
        ends = more.get(f"cu_seqlens_{axis}")
        room = np.full(b, n) if ends is None else np.diff(ends)
        if rng.random() < 0.25:
            found[f"lengths_{axis}"] = rng.integers(0, room + 1)
    if rng.random() < 0.25:
        found["offset"] = int(rng.integers(-3, 4)) if rng.random() < 0.5 else rng.integers(-3, 4, len(room))
    if more["causal"] is None and rng.random() < 0.4:
        found["alignment"] = "top_left"
    return found


def another(rng, more):
    """What makes a call one of another operator: its name and options, and softmax's options left out."""
    variant = str(rng.choice(["linear", "power", "sigmoid"]))
    options = {
        "linear": {
            "feature": str(rng.choice(["identity", "relu", "elu1", "exp"])),
            "normalize": bool(rng.random() < 0.7),
        },
        "power": {"p": int(rng.choice([2, 4])), "form": str(rng.choice(["plain", "stable", "mean"]))},
        "sigmoid": {} if rng.random() < 0.5 else {"offset": -1.5},
    }[variant]
    none = dict.fromkeys(("softcap", "sink", "weight"))
    return none | {"variant": variant, "options": options} | ({} if variant == "sigmoid" else {"bias": None})


def plain(problem, dout):
    """The same call as numbers and nested lists."""
    arrays = ("query", "key", "value", "sink", "bias", "weight", "allowed")
    call = {n: getattr(problem, n) for n in ("scale", "causal", "window", "softcap", "alignment")}
    call |= {n: getattr(problem, n) for n in ("batch", "heads", "heads_kv", "n_q", "n_k", "d_k", "d_v")}
    for name in arrays:
        x = getattr(problem, name)
        call[name] = None if x is None else (x if x.dtype == bool else to_float64(x)).tolist()
    q, k = ([0, n] if c is None else c.tolist() for c, n in (
        (problem.cu_seqlens_q, problem.n_q), (problem.cu_seqlens_k, problem.n_k)
    ))  # fmt: skip
    call["sequences"] = list(zip(q, q[1:], k, k[1:], strict=False))
    for name in ("lengths_q", "lengths_k", "offset"):
        x = getattr(problem, name)
        call[name] = x if x is None or isinstance(x, int) else x.tolist()
    call |= {"variant": problem.variant, "options": dict(problem.options)}
    call["dout"] = None if dout is None else to_float64(dout).tolist()
    return call


def differences(seed):
    """How many elements were compared, and those that differ: (array, index, refattn's, the other's)."""
    problem, dout = draw(seed)
    dlse = None
    if dout is not None and seed % 3 == 0:
        dlse = np.random.default_rng(seed).standard_normal(problem.out_shape[:3])
    answer = refattn.evaluate(problem, rounding=problem.dtype, gradients=dout, dlse=dlse)
    call = plain(problem, dout) | {"dlse": None if dlse is None else dlse.tolist()}
    wanted, count, found = (softmax if problem.variant == "softmax" else other)(call), 0, []
    for name in wanted if dout is None else [n for n in wanted if n.startswith("d")]:
        got = to_float64(answer.values[name])
        for at in np.ndindex(*got.shape):
            x = wanted[name]
            for i in at:
                x = x[i]
            count += 1
            expected = nearest(x, str(answer.values[name].dtype))
            if float(got[at]) != expected and not (np.isnan(got[at]) and np.isnan(expected)):
                found.append((name, at, float(got[at]), expected))
    return count, found
