"""Plain reference functions of PyTorch, JAX and ONNX, and the calls of refattn that say the same.

``python -m tests.peers.references [N]`` judges every case of the package onnx, draws N calls of each (300 if unsaid)
over all of their own options, compares every result with the exact one, and prints what differs.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refattn import MismatchError, Model, Problem, assert_close
from refattn.check.kernels import find

from ..conftest import tensor


@dataclass
class Call:
    """A call as refattn puts it, what the other function gave, and how that one rounds."""

    name: str
    problem: Problem
    out: Any
    model: Model
    lse: Any = None
    probabilities: Any = None

    def part(self, i):
        """Return one batch item, and the last key head with its query heads."""
        p, at, group = self.problem, slice(i, i + 1), self.problem.heads // self.problem.heads_kv

        def cut(x, heads=p.heads, many=group):
            x = x[at] if len(x) == p.batch else x
            return x[:, -many:] if x.ndim > 2 and x.shape[1] == heads else x

        arrays = {n: cut(x, p.heads_kv, 1) if n in ("key", "value") else cut(x) for n, x in p.arrays().items()}
        rest = {n: None if getattr(self, n) is None else cut(getattr(self, n)) for n in ("out", "lse", "probabilities")}
        return replace(self, problem=p.replace(**arrays), **rest)

    def judge(self):
        """Raise MismatchError where a result is further from the exact one than its arithmetic must lose."""
        assert_close(self.out, self.problem, lse=self.lse, model=self.model)
        if self.probabilities is not None:  # they are what attention to unit vectors gives
            b, h, n = self.problem.key.shape[:3]
            unit = np.broadcast_to(np.eye(n, dtype=self.out.dtype), (b, h, n, n)).copy()
            assert_close(self.probabilities, self.problem.replace(value=unit), model=self.model)


def pick(rng, *options):
    return options[int(rng.integers(len(options)))]


def shapes(rng, square=False):
    """Lengths, widths and heads of a small call."""
    n_q, n_k = (int(x) for x in rng.integers(1, 9, 2))
    group, h_kv = pick(rng, 1, 1, 2, 3), pick(rng, 1, 2)
    d, d_v = (int(x) for x in rng.integers(1, 9, 2))
    return pick(rng, 1, 2), group * h_kv, h_kv, n_q, n_q if square else n_k, d, d_v


def tensors(rng, dtype, b, h, h_kv, n_q, n_k, d, d_v):
    return [tensor(rng, s, dtype) for s in ((b, h, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d_v))]


def spread(rng, b, h, n_q, n_k):
    """A mask's shape: each axis whole or 1."""
    return tuple(n if rng.random() < 0.6 else 1 for n in (b, h, n_q, n_k))


def seen(rng, shape):
    """A mask that hides some keys; rows without keys are apart (docs/peers.md)."""
    mask = rng.random(shape) < 0.7
    mask[..., 0] = True
    return mask


def torch_call(rng):
    """scaled_dot_product_attention, math backend, and torch.nn.attention.bias."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    dtype = pick(rng, "float32", "float32", "float64", "bfloat16", "float16")
    b, h, h_kv, n_q, n_k, *_ = size = shapes(rng)
    q, k, v = tensors(rng, dtype, *size)
    kind = pick(rng, "none", "is_causal", "bool", "float", "upper_left", "lower_right")
    scale = pick(rng, None, 0.3, 1.0)
    more, mask, causal = {}, None, False
    given = [torch.from_numpy(x.astype(np.float32) if x.dtype.itemsize < 4 else x) for x in (q, k, v)]
    given = [x.to(getattr(torch, dtype)) for x in given]
    if kind == "is_causal":
        causal, more["causal"] = True, "top_left"
    elif kind == "bool":
        more["allowed"] = seen(rng, spread(rng, b, h, n_q, n_k))
        mask = torch.from_numpy(more["allowed"])
    elif kind == "float":
        more["bias"] = tensor(rng, spread(rng, b, h, n_q, n_k), dtype)
        mask = torch.from_numpy(more["bias"].astype(np.float64)).to(getattr(torch, dtype))
    elif kind == "upper_left":
        mask, more["causal"] = causal_upper_left(n_q, n_k), "top_left"
    elif kind == "lower_right" and n_k >= n_q:
        mask, more["causal"] = causal_lower_right(n_q, n_k), "bottom_right"
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*given, mask, is_causal=causal, scale=scale, enable_gqa=h != h_kv)
    p = Problem(q, k, v, scale, **more)
    return Call(f"torch {kind}", p, out, find("torch-sdpa-math")[0].model(dtype))


def jax_call(rng):
    """jax.nn.dot_product_attention, with its lse; float16 cannot be compiled for a CPU."""
    import jax

    dtype = pick(rng, "float32", "bfloat16")
    b, h, h_kv, n_q, n_k, d, _ = shapes(rng)
    q, k, v = tensors(rng, dtype, b, h, h_kv, n_q, n_k, d, d)
    more: dict[str, Any] = {"scale": pick(rng, None, 0.3)}
    theirs: dict[str, Any] = {"scale": more["scale"]}
    if rng.random() < 0.3:
        more["bias"] = theirs["bias"] = tensor(rng, spread(rng, b, h, n_q, n_k), dtype)
    if rng.random() < 0.3:
        more["allowed"] = theirs["mask"] = seen(rng, spread(rng, b, h, n_q, n_k))
    if rng.random() < 0.4:
        more["causal"], theirs["is_causal"] = "top_left", True
    if rng.random() < 0.3:
        left, right = int(rng.integers(n_q, 10)), int(rng.integers(0, 4))  # the first key is always in sight
        more["window"] = theirs["local_window_size"] = (left, right)
        more |= {} if "causal" in more else {"alignment": "top_left"}
    if rng.random() < 0.3:
        more["lengths_k"] = rng.integers(1, n_k + 1, b).astype(np.int32)
        theirs["key_value_seq_lengths"] = more["lengths_k"]
    function = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, return_residual=True, **theirs))
    out, lse = (np.asarray(x) for x in function(*(x.swapaxes(1, 2) for x in (q, k, v))))
    model = replace(find("jax")[0].model(dtype), lse=dtype)
    return Call(f"jax {' '.join(theirs)}", Problem(q, k, v, **more), out.swapaxes(1, 2), model, lse.swapaxes(1, 2))


def onnx_model(dtype):
    """How ONNX's reference rounds: everything in the type of its inputs."""
    return Model(dtype, dtype, dtype, lse=dtype)


def onnx_problem(given, settings):
    """Return the call that an Attention node of opset 23 to 25 means."""
    q, k, v = (given[n] for n in "QKV")
    if q.ndim == 3:
        many = settings["q_num_heads"], settings["kv_num_heads"], settings["kv_num_heads"]
        q, k, v = (x.reshape(*x.shape[:2], h, -1).swapaxes(1, 2) for x, h in zip((q, k, v), many, strict=True))
    past = given.get("past_key")
    if past is not None:
        k, v = (np.concatenate([given[n], x], 2) for n, x in (("past_key", k), ("past_value", v)))
    more: dict[str, Any] = {"scale": settings.get("scale"), "softcap": settings.get("softcap") or None}
    mask, lengths = given.get("attn_mask"), given.get("nonpad_kv_seqlen")
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        if short := k.shape[2] - mask.shape[3]:  # keys past a short mask are hidden
            end = False if mask.dtype == bool else -np.inf
            mask = np.concatenate([mask, np.full((*mask.shape[:3], short), end, mask.dtype)], 3)
        more["allowed" if mask.dtype == bool else "bias"] = mask
    sides = [settings.get(f"{side}_window_size", -1) for side in ("left", "right")]
    if max(sides) >= 0:
        more |= {"window": tuple(None if x < 0 else x for x in sides), "alignment": "top_left"}
    if settings.get("is_causal"):
        more |= {"causal": "top_left", "alignment": None}
    if lengths is not None:
        more["lengths_k"] = lengths
    if "causal" in more or "window" in more:
        if lengths is not None:
            more["offset"] = lengths - q.shape[2]
        elif past is not None:
            more["offset"] = past.shape[2]
    return Problem(q, k, v, **more)


def onnx_of(name, given, settings, outputs):
    """Return what ONNX's reference gave as a call; `outputs` are Y, the caches and qk_matmul_output, if there."""
    p = onnx_problem(given, settings)
    y, present_key, present_value, scores = outputs
    for cache, x in ((present_key, p.key), (present_value, p.value)):
        assert cache is None or (cache.shape == x.shape and cache.tobytes() == np.ascontiguousarray(x).tobytes()), name
    y = y.reshape(*y.shape[:2], p.heads, -1).swapaxes(1, 2) if y.ndim == 3 else y
    shown = scores if settings.get("qk_matmul_output_mode") == 3 else None
    return Call(name, p, y, onnx_model(p.dtype), probabilities=shown)


def onnx_cases():
    """Return every case of the Attention operator in the backend tests of the package onnx, as calls."""
    import onnx
    from onnx.backend.test.case.node import attention

    found, real = [], attention.expect

    def noted(node, inputs, outputs, name, **_):
        names = [n for n in node.input if n]
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        given = dict(zip(names, inputs, strict=True))
        results = dict(zip([n for n in node.output if n], outputs, strict=True))
        order = ("Y", "present_key", "present_value", "qk_matmul_output")
        found.append(onnx_of(name, given, settings, [results.get(n) for n in order]))

    attention.expect = noted
    state = np.random.get_state()  # they are drawn from NumPy's own
    np.random.seed(0)
    try:
        for n in sorted(vars(attention.Attention)):
            if n.startswith("export"):
                getattr(attention.Attention, n)()
    finally:
        attention.expect = real
        np.random.set_state(state)
    return found


def onnx_call(rng):
    """A drawn call of ONNX's reference."""
    from onnx.reference.ops.op_attention import _compute_attention

    dtype = pick(rng, "float32", "float32", "float64", "float16", "bfloat16")
    b, h, h_kv, n_q, n_k, d, d_v = size = shapes(rng)
    given = dict(zip("QKV", tensors(rng, dtype, *size), strict=True))
    settings: dict[str, Any] = {"is_causal": pick(rng, 0, 1), "qk_matmul_output_mode": 3}
    settings |= pick(rng, {}, {"scale": 0.3}) | pick(rng, {}, {"softcap": 2.0})
    settings |= pick(rng, {}, {"left_window_size": 9, "right_window_size": int(rng.integers(0, 4))})
    cache, total = pick(rng, "none", "past", "lengths"), n_k
    if cache == "past":
        past = int(rng.integers(1, 5))
        given |= {f"past_{n}": tensor(rng, (b, h_kv, past, x), dtype) for n, x in (("key", d), ("value", d_v))}
        total += past
    elif cache == "lengths":
        given["nonpad_kv_seqlen"] = rng.integers(1, n_k + 1, b)
    kind = pick(rng, "none", "bool", "float")
    if kind != "none":
        rows = list(spread(rng, b, h, n_q, 1)[:3])
        if settings["is_causal"] and "left_window_size" not in settings:
            rows[2] = n_q  # a mask of one row is wrong there (docs/peers.md)
        shape = (*rows, total if cache == "none" else total - int(rng.integers(total)))
        given["attn_mask"] = seen(rng, shape) if kind == "bool" else tensor(rng, shape, dtype)
    names = {"attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"} & set(given)
    with np.errstate(all="ignore"):
        outputs = _compute_attention(*(given[n] for n in "QKV"), **{n: given[n] for n in names}, **settings)
    return onnx_of(f"onnx {cache} {kind} {settings}", given, settings, outputs)


DRAWN = {"torch": torch_call, "jax": jax_call, "onnx": onnx_call}


def differing(name, count, seed=0):
    """Return the drawn calls of a peer whose results differ, with what is said of them."""
    return judged(DRAWN[name](np.random.default_rng([seed, i])) for i in range(count))


def judged(calls):
    """Return the calls that differ, with what is said of them."""
    found = []
    for i, call in enumerate(calls):
        try:
            call.judge()
        except MismatchError as e:
            found.append((i, call, str(e)))
        if i % 50 == 49 and "jax" in sys.modules:
            sys.modules["jax"].clear_caches()  # it keeps what it compiled for every shape
    return found


def main(count):
    """Print what differs, and return how many calls do."""
    total = 0
    for peer in ("onnx's cases", *DRAWN):
        bad = differing(peer, count) if peer in DRAWN else judged(onnx_cases())
        total += len(bad)
        print(f"{peer}: {count if peer in DRAWN else 'all'} calls, {len(bad)} differ", flush=True)
        for i, call, text in bad[:5]:
            print(f"  {i}: {call.name}\n  {text}", flush=True)
    return total


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)))
