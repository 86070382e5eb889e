"""The gate of norms' gradients: right kernels in PyTorch pass, and wrong weights' gradients fail.

``python -m tests.check.norms_gate [COUNT] [SEED] [MOST]`` draws COUNT calls with norms, rotary positions, or both, or
rows that are alike, of at most MOST keys, and judges PyTorch's own gradients of them in each type: by its flash kernel,
and by products that are written out. It prints the median and the largest rms error over the predicted one, by array,
and how many runs failed. Then it does the same with one weight's gradient off by factors, and prints how many of those
passed.
"""

import sys

import numpy as np
import torch

from refattn import Capabilities, Problem, check_problem
from refattn.arrays import from_float64, to_kind, to_numpy
from refattn.check.model import FEATURES, FURTHER, MODELS
from refattn.dtypes import FORMATS

SHORT = {"query": "dq", "key": "dk", "value": "dv", "query_norm": "dquery_norm", "key_norm": "dkey_norm"}
DTYPES = ("float32", "float16", "bfloat16")
FACTORS = (1.5, 1.1, 1.03)


def attend(p, written):
    """Attention as models call it: norm and turn in float32, each written in the input's type."""
    q, k = (placed(p, i) for i in (0, 1))
    causal = None
    if p.causal is not None:
        causal = torch.ones(p.n_q, p.n_k, dtype=torch.bool).tril(p.n_k - p.n_q)
    if not written:
        return torch.nn.functional.scaled_dot_product_attention(q, k, p.value, causal, enable_gqa=True)
    group = p.heads // p.heads_kv
    k, v = (x.repeat_interleave(group, 1) for x in (k, p.value))
    scores = q @ k.mT * p.d_k**-0.5
    scores = scores if causal is None else scores.masked_fill(~causal, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def placed(p, which):
    """Queries (0) or keys (1) as they are multiplied."""
    x, w = (p.query, p.key)[which], (p.query_norm, p.key_norm)[which]
    kind = x.dtype
    if w is not None:
        wide = x.float()
        x = (wide * (wide.square().mean(-1, keepdim=True) + p.norm_eps).rsqrt() * w).to(kind)
    if p.rotary is None:
        return x
    at = torch.arange(x.shape[2]) + (p.n_k - p.n_q if which == 0 else 0)
    cos, sin, r = p.rotary_cos[at], p.rotary_sin[at], p.rotary_cos.shape[1]
    a, b, rest = x[..., :r].float(), x[..., r : 2 * r].float(), x[..., 2 * r :]
    return torch.cat([(a * cos - b * sin).to(kind), (b * cos + a * sin).to(kind), rest], -1)


def kernel(written=False, edit=None):
    """A kernel of one's own with gradients by autograd; `edit` changes them."""

    def out(p):
        return attend(p.to("torch"), written)

    def gradients(problem, dout):
        p = problem.to("torch")
        leaves = {n: x.detach().requires_grad_() for n, x in p.arrays().items() if n in SHORT}
        found = torch.autograd.grad(attend(p.replace(**leaves), written), list(leaves.values()), to_kind(dout, "torch"))
        named = dict(zip(map(SHORT.get, leaves), map(to_numpy, found), strict=True))
        return named if edit is None else edit(named)

    out.gradients = gradients
    out.capabilities = Capabilities(set(DTYPES), FEATURES | FURTHER, gradients=set(SHORT.values()))
    return out


def drawn(rng, dtype, alike=0.2, most=130):
    """A call with one norm or two, and what arrives at its output; some have rows that are `alike`."""
    group, h, b = rng.choice([1, 2, 4]), rng.integers(1, 3), rng.integers(1, 3)
    n_k = min(rng.choice([1, 7, 40, 90, 130]), most)
    d, d_v = rng.choice([2, 8, 32, 64]), rng.choice([4, 32])
    n_q = int(rng.integers(1, n_k + 1))
    sizes = {"query": (b, h * group, n_q, d), "key": (b, h, n_k, d), "value": (b, h, n_k, d_v)}
    x = {n: rng.normal(size=s) * 2.0 ** rng.integers(-6, 4, (*s[:3], 1)) for n, s in sizes.items()}
    x["value"] = rng.normal(size=sizes["value"]) + rng.choice([0, 2])
    for n in ("query", "key", "value"):
        if rng.random() < alike:  # rows that are alike: what they lose goes the same way
            x[n][:] = x[n][:, :, :1]
    more = {n: np.exp(rng.normal(size=d) / 2).astype(np.float32) for n in ("query_norm", "key_norm")}
    if rng.random() < 0.3:
        del more[rng.choice(list(more))]
    if rng.random() < 0.5 and d > 2:
        angle = np.arange(n_k)[:, None] * 100.0 ** (-np.arange(d // 2) / d * 2)
        more |= {"rotary": "half", "rotary_cos": np.cos(angle).astype(np.float32)}
        more |= {"rotary_sin": np.sin(angle).astype(np.float32)}
    more |= {"causal": [None, "bottom_right"][rng.integers(2)], "norm_eps": rng.choice([1e-6, 1e-2])}
    if "rotary" in more and rng.random() < 0.3:
        more = {n: x for n, x in more.items() if "norm" not in n}
    form = FORMATS[dtype]
    arrays = {n: from_float64(form.round_array(a), dtype) for n, a in x.items()}
    dout = rng.normal(size=(b, h * group, n_q, d_v)) * rng.choice([1, 0.01]) + rng.choice([0, 1])
    return Problem(**arrays, **more), from_float64(form.round_array(dout), dtype)


def judged(k, p, dout, written):
    """The arrays of a call's check of gradients."""
    model = MODELS["math" if written else "flash"](p.dtype)
    return check_problem(k, p, "drawn", gradients=dout, model=model).checks[1]


def main(count=100, seed=0, most=130):
    """Print the figures; return how many right runs failed."""
    rng, rms, failed, passed = np.random.default_rng(seed), {}, 0, dict.fromkeys(FACTORS, 0)
    asked = 0
    for i in range(count):
        dtype, written = DTYPES[i % 3], bool(i // 3 % 2)
        p, dout = drawn(rng, dtype, most=most)
        check = judged(kernel(written), p, dout, written)
        if check.verdict != "passed":
            failed += 1
            print("FAILED", i, p, check.verdict, check.message)
        for w in check.arrays:
            rms.setdefault((dtype, w.array), []).append(w.figures.rms)
        if i % 5:
            continue
        p, dout = drawn(rng, dtype, 0, most)
        if p.n_k > 1:  # of one key nothing depends on the scores
            asked += 1
            for factor in FACTORS:
                wrong = kernel(written, lambda g, f=factor: g | {n: x * f for n, x in g.items() if n.endswith("norm")})
                passed[factor] += judged(wrong, p, dout, written).verdict == "passed"
    for at, x in sorted(rms.items()):
        print(*at, f"median {np.nanmedian(x):.3f} largest {np.nanmax(x):.3f} none {np.isnan(x).sum()} of {len(x)}")
    print(f"{failed} of {count} right runs failed; of {asked} passed with weights' gradients times", passed)
    return failed or not count


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
