"""A call's terms as FlexAttention's score_mod, by FlexAttention itself and by a loop over every score."""

import math

import numpy as np
import pytest
import torch

from refattn import InvalidInput, Problem, UnsupportedProblem, check_problem, evaluate, rules
from refattn.check.model import flash
from refattn.scores import score_mod

flex = pytest.importorskip("torch.nn.attention.flex_attention")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def small(n_q=5, n_k=9, b=2, h=4, seed=0, **more):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((b, h, n_q, 16), (b, h, n_k, 16), (b, h, n_k, 16)))
    return Problem(q, k, v, **more)


SLOPES = np.array([[0.5, 0.25, 0.125, 1.0], [1.0, 2.0, -0.5, 0.0]], np.float32)
BIAS = np.random.default_rng(1).standard_normal((1, 4, 5, 9)).astype(np.float32)
WEIGHT = np.random.default_rng(2).integers(0, 3, (2, 1, 1, 9)).astype(np.float32) + np.eye(1, 9, 4, dtype=np.float32)
ENDS = {"cu_seqlens_q": np.array([0, 2, 5]), "cu_seqlens_k": np.array([0, 4, 9])}
CALLS = {
    "nothing": small(),
    "softcap": small(softcap=2.0, scale=0.7),
    "slopes": small(alibi_slopes=SLOPES),
    "slopes, at an offset": small(alibi_slopes=SLOPES[0], offset=-2, causal="top_left"),
    "slopes, given positions": small(alibi_slopes=SLOPES, positions_q=np.arange(5) * 3, positions_k=np.arange(9)[::-1]),
    "bias": small(bias=BIAS),
    "bias of keys": small(bias=np.where(np.arange(9) % 4, BIAS[:, :1, :1], -np.inf)),
    "weight": small(weight=WEIGHT),
    "all": small(softcap=3.0, alibi_slopes=SLOPES, bias=BIAS, weight=WEIGHT, causal="bottom_right"),
    "packed": small(b=1, alibi_slopes=SLOPES[0], **ENDS),
    "lengths": small(alibi_slopes=SLOPES, lengths_k=np.array([9, 4]), causal="bottom_right"),
    "window": small(window=(3, 0), alignment="top_left", bias=BIAS),
    "window, packed": small(b=1, window=(1, 1), **ENDS),
    "more rows than keys": small(9, 5, causal="bottom_right"),
    "array": small(allowed=np.random.default_rng(3).random((2, 4, 5, 9)) < 0.6, causal="bottom_right"),
    "array of keys": small(allowed=np.arange(9).reshape(1, 1, 1, 9) % 3 > 0, lengths_q=np.array([5, 2])),
}


def seen(p):
    """Which keys queries see, from the call's own words."""
    mask = np.zeros((p.batch, 1, p.n_q, p.n_k), bool)
    for b in range(p.batch):
        for rows, keys in p.segments(b):
            n, m = rows.stop - rows.start, keys.stop - keys.start
            first = (p.offset or 0) + (m - n if p.corner == "bottom_right" else 0)
            far = np.arange(m) - np.arange(n)[:, None] - first
            left, right = p.window or (None, None)
            here = far <= 0 if p.causal else np.ones_like(far, bool)
            here &= (left is None or far >= -left) & (right is None or far <= right)
            mask[b, 0, rows, keys] = here
    allowed = True if p.allowed is None else p.allowed
    return np.broadcast_to(mask & allowed, (p.batch, p.heads, p.n_q, p.n_k))


def kernel(p):
    """FlexAttention with the call's score_mod and nothing else."""
    t = p.to("torch")
    return flex.flex_attention(t.query, t.key, t.value, score_mod(t if p.kind == "torch" else p), scale=p.scale)


@pytest.mark.parametrize("label", [n for n in CALLS if n not in ("nothing", "softcap", "slopes", "bias")])
def test_flexattention_with_it_is_right(label):
    p = CALLS[label]
    report = check_problem(kernel, p, label, model=flash)
    assert report.right, [c.message for c in report.checks]


@pytest.mark.parametrize("label", CALLS)
def test_every_score_is_the_formulas(label):
    p, mod = CALLS[label], score_mod(CALLS[label])
    shown = seen(p)
    for b, h, i, j in np.ndindex(p.batch, p.heads, p.n_q, p.n_k):
        got = mod(torch.tensor(1.25), *(torch.tensor(x) for x in (b, h, i, j))).item()
        if not shown[b, h, i, j]:
            assert got == -math.inf
            continue
        segment = next(s for s in p.segments(b) if s[0].start <= i < s[0].stop)
        rows, keys = segment
        first = (keys.stop - keys.start) - (rows.stop - rows.start) if p.corner == "bottom_right" else 0
        first += p.offset or 0
        at_q = int(p.positions_q[i]) if p.positions_q is not None else i - rows.start + first
        at_k = int(p.positions_k[j]) if p.positions_k is not None else j - keys.start
        s = 1.25
        if p.softcap is not None:
            s = p.softcap * math.tanh(s / p.softcap)
        if p.alibi_slopes is not None:
            slopes = np.broadcast_to(p.alibi_slopes, (p.batch, p.heads))
            s -= float(slopes[b, h]) * abs(at_q - at_k)
        s += 0.0 if p.bias is None else float(np.broadcast_to(p.bias, (p.batch, p.heads, p.n_q, p.n_k))[b, h, i, j])
        weight = 1.0 if p.weight is None else float(p.weight[b, 0, 0, j])
        s += math.log(weight) if weight else -math.inf
        # five roundings to float32, of numbers of at most 64
        assert got == s or abs(got - s) <= 5 * 2.0**-24 * 64


def test_a_wrong_term_is_seen():
    """Signed distances, and a bias before the softcap."""
    for label, change in (
        ("slopes", lambda p: p.replace(alibi_slopes=-p.alibi_slopes)),
        ("all", lambda p: p.replace(softcap=None)),
    ):
        p = CALLS[label]
        report = check_problem(lambda x, change=change: kernel(change(x)), p, label, model=flash)
        assert not report.right


def test_a_bias_of_pytorchs_is_not_copied():
    t = CALLS["bias"].to("torch")
    bias = t.bias.clone().requires_grad_()
    value = score_mod(t.replace(bias=bias))(torch.tensor(0.0), 1, 2, 3, 4)
    (found,) = torch.autograd.grad(value, bias)
    assert found.nonzero().tolist() == [[0, 2, 3, 4]]


def test_beside_a_rule():
    rule = rules.causal() & rules.window(3, 0)
    p = small(9, 9, softcap=2.0, allowed=rule)
    q, k, v = (torch.as_tensor(x) for x in (p.query, p.key, p.value))
    out = flex.flex_attention(q, k, v, score_mod(p), rules.block_mask(rule, 9, 9, 4))
    # a few dozen roundings of numbers below 4
    assert np.abs(out.numpy() - evaluate(p).out).max() <= 50 * 2.0**-24 * 4


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (small(sink=np.zeros(4, np.float32)), "sink: is no term of a score"),
        (small(dropout_p=0.5, dropout_mask=np.ones((1, 1, 5, 9), bool)), "dropout_mask: is no term"),
        (small(key_scale=2.0), "key_scale: is no term"),
        (small(9, 9, variant="sigmoid"), "variant: score_mod is of softmax attention, got sigmoid"),
    ],
)
def test_what_is_no_term_is_refused(p, text):
    with pytest.raises(UnsupportedProblem, match=text):
        score_mod(p)
    with pytest.raises(InvalidInput, match="problem: got 3, expected a Problem"):
        score_mod(3)
