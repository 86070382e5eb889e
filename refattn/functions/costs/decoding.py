"""Kinetics' cost of decoding: FLOPs and bytes of a model that answers with dense or sparse attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from ...errors import InvalidInput
from ..arguments import function, instance, real, whole

__all__ = [
    "Decoder",
    "Decoding",
    "block_topk_decoding",
    "context_of_equal_cost",
    "crossover",
    "dense_decoding",
    "keys_read",
    "pass_at_k",
    "topk_decoding",
]

BYTES = 2
"""Of a number in the cache."""


class Decoder(NamedTuple):
    """A model's shape: its parameters, layers, heads, heads of keys and values, and features of a head."""

    parameters: Any
    layers: int
    heads: int
    heads_kv: int
    d: int


@dataclass(frozen=True)
class Decoding:
    """What answering costs.

    Attributes
    ----------
    compute : int
        FLOPs, two for a multiplication with its addition.
    memory : int
        Bytes of keys and values that are read, two a number. Those of the weights are left out: batches share them.
    """

    compute: Any
    memory: Any

    def eflops(self, intensity: Any = 562.5) -> Any:
        """Return compute + intensity · memory, in FLOPs.

        Parameters
        ----------
        intensity : number
            I, FLOPs that a byte read is worth: 562.5 is 4.5 PFLOP/s over 8 TB/s, as the released code has it.

        Raises
        ------
        InvalidInput
            An intensity below 0.
        """
        return self.compute + real("intensity", intensity, 0) * self.memory


def _shape(model: Decoder, context: int, generated: int, samples: int) -> tuple[Any, int, int, int, int, int]:
    """Return parameters, queries' and keys' features of all layers, and the sizes, after checking them."""
    instance("model", model, Decoder, "it holds parameters, layers, heads, heads_kv and d")
    parameters, layers, heads, heads_kv, d = model
    sides = {"layers": layers, "heads": heads, "heads_kv": heads_kv, "d": d}
    layers, heads, heads_kv, d = (whole(name, x, 1) for name, x in sides.items())
    if heads % heads_kv:
        raise InvalidInput(f"heads_kv: got {heads_kv}, which must divide heads, {heads}; give the model's own")
    sizes = whole("context", context, 0), whole("generated", generated, 1), whole("samples", samples, 1)
    return real("parameters", parameters, 1), heads * d * layers, heads_kv * d * layers, *sizes


def dense_decoding(model: Decoder, context: int, generated: int, samples: int = 1) -> Decoding:
    """Return the cost of answers with dense attention.

    compute = (2PT + 2(2c + T)T·H·D)·n, memory = 2(2c + Tn)T·H_kv·D bytes, with D features of a head times layers.
    Samples share the prompt, which is read once for all. A token's own key counts as half a key: the sums over tokens
    are cT + T²/2.

    Parameters
    ----------
    model : Decoder
        P, layers, H, H_kv and features.
    context, generated, samples : int
        c tokens of the prompt, T tokens after it, n answers.

    Raises
    ------
    InvalidInput
        A size below 1, a prompt below 0, heads of keys that do not divide the heads.

    Source: Sadhukhan et al., Kinetics; its public code was read (cost_model/utils.py).
    """
    p, queries, keys, c, t, n = _shape(model, context, generated, samples)
    compute = (2 * p * t + 2 * (2 * c + t) * t * queries) * n
    return Decoding(compute, BYTES * (2 * c + t * n) * t * keys)


def _read_four_times(budget: int, c: int, t: int) -> int:
    """Return four times the keys read under a budget, a token's own counted as half one."""
    short = max(0, budget - c)
    reached = min(short, t)
    return 4 * budget * t - 4 * short * reached + 2 * reached**2


def topk_decoding(
    model: Decoder,
    context: int,
    generated: int,
    budget: int,
    samples: int = 1,
    *,
    mode: Literal["paper", "released"] = "paper",
) -> Decoding:
    """Return the cost of answers that read the top keys of a budget, found without a search.

    compute = (2PT + 4K·H·D)·n, memory = 4K·H_kv·D·n bytes, with K = BT - max(0, B - c)²/2 keys read; where T does not
    reach the budget, all: cT + T²/2. Samples share nothing.

    Parameters
    ----------
    model : Decoder
        P, layers, H, H_kv and features.
    context, generated, samples : int
        c tokens of the prompt, T tokens after it, n answers.
    budget : int
        B, the most keys that a token reads.
    mode : "paper" or "released"
        "released" is K = BT + max(0, B - c)²/2, as the code has it, more than are there.

    Raises
    ------
    InvalidInput
        A size or a budget below 1, a prompt below 0, heads of keys that do not divide the heads, another mode.

    Source: Sadhukhan et al., Kinetics; its public code was read (cost_model/utils.py). The sign of the default is that
    of its formula for blocks.
    """
    p, queries, keys, c, t, n = _shape(model, context, generated, samples)
    budget = whole("budget", budget, 1)
    if mode not in ("paper", "released"):
        raise InvalidInput(f"mode: got {mode!r}, expected 'paper' or 'released'")
    released = 4 * budget * t + 2 * max(0, budget - c) ** 2
    read = _read_four_times(budget, c, t) if mode == "paper" else released
    return Decoding((2 * p * t + read * queries) * n, read * keys * n)


def block_topk_decoding(
    model: Decoder, context: int, generated: int, block: int, chosen: int, local: int = 0, samples: int = 1
) -> Decoding:
    """Return the cost of answers that read the top blocks of keys, and of the search for them.

    That of `topk_decoding` with budget B = local + block·chosen, and a product of the query with every block's mean:
    floor((2c + T)/block)·T·H·D·n more FLOPs, floor((2c + Tn)/block)·T·H_kv·D more bytes. In the search samples share
    the prompt, in what they read they do not.

    Parameters
    ----------
    model : Decoder
        P, layers, H, H_kv and features.
    context, generated, samples : int
        c tokens of the prompt, T tokens after it, n answers.
    block, chosen : int
        Keys of a block, and how many blocks are read.
    local : int
        Latest keys that are read besides.

    Raises
    ------
    InvalidInput
        A size below 1, a prompt or local below 0, heads of keys that do not divide the heads.

    Source: Sadhukhan et al., Kinetics; its public code was read (cost_model/utils.py).
    """
    _, queries, keys, c, t, n = _shape(model, context, generated, samples)
    block, chosen, local = whole("block", block, 1), whole("chosen", chosen, 1), whole("local", local, 0)
    read = topk_decoding(model, c, t, local + block * chosen, n)
    search = (2 * c + t) // block * t * queries * n, (2 * c + t * n) // block * t * keys
    return Decoding(read.compute + search[0], read.memory + search[1])


def keys_read(budget: int, context: int, generated: int) -> int:
    """Return the sum over generated tokens of min(budget, context + t), for t from 1.

    Parameters
    ----------
    budget : int
        The most keys that a token reads.
    context, generated : int
        Tokens of the prompt, and after it.

    Raises
    ------
    InvalidInput
        A budget or generated tokens below 1, a prompt below 0.
    """
    budget, context = whole("budget", budget, 1), whole("context", context, 0)
    generated = whole("generated", generated, 1)
    short = min(max(0, budget - context), generated)  # tokens with fewer keys than the budget
    return budget * generated - (budget - context) * short + short * (short + 1) // 2


def context_of_equal_cost(
    parameters: Any, layers: int, heads: int, heads_kv: int, d: int, intensity: Any = 562.5
) -> Any:
    """Return the context at which a token's attention costs as much as its 2P FLOPs: 2P / (4(H + I·H_kv)·D).

    Parameters
    ----------
    parameters, layers, heads, heads_kv, d
        The model's shape, see `Decoder`.
    intensity : number
        FLOPs that a byte read is worth.

    Raises
    ------
    InvalidInput
        A size below 1, heads of keys that do not divide the heads, an intensity below 0.
    """
    p, queries, keys, *_ = _shape(Decoder(parameters, layers, heads, heads_kv, d), 0, 1, 1)
    return 2 * p / (4 * queries + 4 * real("intensity", intensity, 0) * keys)


def crossover(cheap: Callable[[int], Any], dear: Callable[[int], Any], most: int) -> int | None:
    """Return the least x from which on, up to `most`, cheap(x) < dear(x); None where it is not at `most`.

    Costs with rounded parts may cross several times: this is where the last crossing is. All x down from `most` to it
    are tried.

    Parameters
    ----------
    cheap, dear : callable
        Costs of a whole number, such as generated tokens.
    most : int
        Where the search ends.

    Raises
    ------
    InvalidInput
        `most` below 1.
    """
    x = whole("most", most, 1) + 1
    for name, cost in (("cheap", cheap), ("dear", dear)):
        function(name, cost)
        real(f"{name}({most})", cost(most), -math.inf)
    while x > 1 and cheap(x - 1) < dear(x - 1):
        x -= 1
    return x if x <= most else None


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the chance that k of n answers, drawn without putting back, have a correct one: 1 - C(n - c, k)/C(n, k).

    Parameters
    ----------
    samples, correct, k : int
        n answers, c of them correct, and how many are drawn.

    Raises
    ------
    InvalidInput
        Fewer than one answer, more correct ones or draws than answers.

    Source: Chen et al. (arXiv 2107.03374), equation 1, recalled; Kinetics' coverage, whose public code was read.
    """
    n = whole("samples", samples, 1)
    c, k = whole("correct", correct, 0, n), whole("k", k, 1, n)
    return float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
