"""URPE attention: softmax attention whose weights are multiplied by a gain that depends on the relative position."""

from __future__ import annotations

from typing import Any

from .option import Option, finite
from .shapes import Rows
from .variant import COMMON_BUGS, COMMON_LAWS, Variant

__all__ = ["URPE"]

EXPECTED = "None or a tuple of one row of 2·reach + 1 finite numbers, or one row for each of {} query heads"


def weights(q: Any, k: Any, o: Any) -> tuple[Any, Any, Any]:
    """Return the weights of softmax without their denominators, these, and the log-sum-exp."""
    s = q @ k.T * o.scale
    if o.bias is not None:
        s = s + o.bias
    m = s.shift(o.allowed)
    p = (s - m).exp(where=o.allowed)
    z = p.sum()
    return p, z, m + z.log()


def attention(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Define attention of one head: the gain comes after the denominator, which does not know of it."""
    p, z, lse = weights(q, k, o)
    if o.gain is not None:
        p = p * (o.toeplitz(o.gain) * o.one)  # times one: a kernel rounds the gain to the type it computes in
    return (p @ v) / z, lse


def by_diagonals(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Write the same as a sum over the gain's values: each times what the keys at its distance give."""
    p, z, lse = weights(q, k, o)
    p = p / z
    if o.gain is None:
        return p @ v, lse
    reach = len(o.gain) // 2
    out = (p * 0) @ v
    for c, at in zip(o.gain, range(-reach, reach + 1), strict=True):
        seen = o.allowed  # keys `at` places ahead; those of the ends, and beyond
        if at > -reach:
            seen = seen & (o.distance * -1 + (0.5 - at)).positive()
        if at < reach:
            seen = seen & (o.distance + (0.5 + at)).positive()
        out = out + (p.where(seen) @ v) * c
    return out, lse


def gains(value: Any, heads: int) -> str | None:
    """Check for None, or a tuple of one row for all heads or of a row for each head."""
    ok = value is None or (isinstance(value, tuple) and len(value) in (1, heads) and all(_row(x) for x in value))
    return None if ok else EXPECTED.format(heads)


def _row(x: Any) -> bool:
    odd = isinstance(x, tuple) and len(x) % 2 == 1
    return odd and all(y is not None and finite(y, 0) is None for y in x)


SIGNED = (0.5, -1.0, 0.25, 2.0, 1.0, 0.0, -0.75)


def samples(heads: int) -> tuple[Any, ...]:
    """Return gains to try: one row for all heads, and a row for each."""
    return None, ((1.0, 1.0, 0.0),), tuple(SIGNED[i % 3 : 7 - i % 3] for i in range(heads))


def renormalised(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Multiply before the sum of the weights is taken."""
    p, z, lse = weights(q, k, o)
    if o.gain is None:
        return (p @ v) / z, lse
    p = p * o.toeplitz(o.gain)
    return (p @ v) / p.sum(), lse


def added(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
    """Add the gain to the scores, as a bias."""
    s = q @ k.T * o.scale
    s = s if o.bias is None else s + o.bias
    s = s if o.gain is None else s + o.toeplitz(o.gain)
    m = s.shift(o.allowed)
    p = (s - m).exp(where=o.allowed)
    return (p @ v) / p.sum(), m + p.sum().log()


def with_gain(change: Any) -> Rows:
    """Return the definition with another gain than the call's."""

    def define(q: Any, k: Any, v: Any, o: Any) -> tuple[Any, Any]:
        if o.gain is not None:
            o.gain = change(o.gain)
        return attention(q, k, v, o)

    return Rows(define)


URPE = Variant(
    name="urpe",
    define=attention,
    forms={"by_diagonals": by_diagonals},
    formula="out_i = sum_j gain[j - i'] exp(s_ij) v_j / sum_j exp(s_ij),  s_ij = scale·q_i·k_j + bias_ij;  "
    "lse_i = log sum_j exp(s_ij)",
    unit="u · sum_j p_ij |gain[j - i'] v_jc|",
    source="Luo et al., Your Transformer May Not be as Powerful as You Expect, arXiv 2205.13401: recalled, not read "
    "again; multihead_attention.py of the release at 47b711f was read.",
    compared="MultiheadAttention of the release at 47b711f in float64 on a CPU: 3 calls of 7 to 64 tokens with biases "
    "and gains, within 1.2e-15",
    uses=frozenset({"causal", "window", "bias", "allowed"}),
    options={
        "gain": Option(
            None,
            "a number for each distance j - i' from -reach to reach, the end ones beyond: a row for all heads, or one "
            "for each; None is 1",
            gains,
            samples,
            places=True,
        )
    },
    laws=(*COMMON_LAWS, "split_and_merge", "bias_shifted", "gradient_steps", "dk_sums", "dbias_sums"),
    bugs=(*COMMON_BUGS, "bias_ignored"),
    contract=(
        "A row without any key gives out 0 and lse -inf.",
        "The gain does not count in the denominator, nor in the lse.",
        "i' is the row's place on the diagonal: bottom right without causal.",
        "A key that is not allowed is never read; one whose gain is 0 is.",
    ),
    has_lse=True,
    cases={
        "gain": {"options": {"gain": (SIGNED,)}},
        "gain-by-head": {"n_q": 61, "n_k": 61, "h": 4, "h_kv": 2, "options": {"gain": tuple(
            tuple(((5 * i + 3 * j) % 8 - 2) / 4 for j in range(5 + 2 * i)) for i in range(4)
        )}},
        "places-told-apart": {"n_q": 67, "n_k": 67, "scale": 0.0, "options": {"gain": ((1.0, 1.0, 0.0),)}},
        "gain-of-all-distances": {
            "n_q": 33, "n_k": 33, "causal": "bottom_right",
            "options": {"gain": (tuple((j * 7 % 16 + 1) / 8 for j in range(65)),)},
        },
        "gain-not-of-two": {"causal": "top_left", "options": {"gain": ((0.1, 0.7, 1.3),)}},
    },
    wrong={
        "renormalised": ("the sum of the weights is taken after the gain", Rows(renormalised)),
        "gain_left_out": ("the gain is not read", with_gain(lambda g: None)),
        "gain_turned": ("the gain goes by i - j", with_gain(lambda g: g[::-1])),
        "gain_added": ("the gain is added to the scores", Rows(added)),
        "gain_one_further": ("distances are one off", with_gain(lambda g: (g[0], *g, g[-1])[:-2])),
        "nothing_beyond_the_ends": (
            "beyond the last distances the gain is 0", with_gain(lambda g: (0.0, *g, 0.0)),
        ),
        "one_beyond_the_ends": ("beyond the last distances the gain is 1", with_gain(lambda g: (1.0, *g, 1.0))),
    },
)  # fmt: skip
