"""The plan of decoding: one query at a time, keys and values of all tokens before it at the server."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, InvalidProblem, UnsupportedProblem
from ..validation import shown
from .arguments import MOST_SIZE, check_arguments, is_count, plans
from .arithmetic import Numbers
from .cache import Cache, Tokens, context_of
from .inputs import decoded
from .inverse import Inverse
from .layer import LINE
from .layout import Layout, token_layouts
from .plan import Attention, fastest
from .planned import MOST_BYTES, bytes_text
from .sampled import Sampled

__all__ = ["DecodingPlan", "plan_decoding"]

Float = NDArray[np.float64]
D = TypeVar("D", bound="DecodingPlan")


@dataclass(frozen=True)
class DecodingPlan(Attention):
    """Decoding on ciphertexts, planned for every step up to the longest; other attributes as of a ``Plan``.

    Attributes
    ----------
    context : int
        Tokens before the first encrypted one that the server knows in the clear.
    n_k : int
        Tokens in all: of the context, and encrypted ones at most.
    """

    context: int = 0
    layout: Layout

    @classmethod
    def shared_of(cls, layout: Any, n_k: int, context: int) -> tuple[int, int]:
        """Return the ciphertexts of a block's keys when all are there, and how many more parts are the context's."""
        known = context // layout.rows
        return (-(-n_k // layout.rows) - known) * layout.parts, known * layout.parts

    @property
    def longest(self) -> int:
        """Encrypted tokens at most."""
        return self.n_k - self.context

    @property
    def sums(self) -> int:
        """How many tokens are added up in a ciphertext of the cache; with each comes the noise of its encryption."""
        rest = self.context % self.layout.rows > 0  # numbers in the clear that are added are rounded, too
        return min(self.layout.rows, self.longest + rest)

    @property
    def replies(self) -> int:
        """Results of a sequence: the bound on the noise is for all of them."""
        return self.longest

    @property
    def token_factors(self) -> tuple[float, float]:
        """What a token's query, and its value, are multiplied with before they are encrypted."""
        return self.scale * self.input_factor ** (1 / self.p), 1.0

    def check_token(self, q: Float, keys: Float, number: int, whole: bool) -> None:
        """Refuse a token whose denominators, with all keys that it sees, leave the range; not `whole`: with some."""
        low, high = self.denominator
        sums = ((self.scale * np.einsum("hd,hjd->hj", q, keys)) ** self.p).sum(1) + self.epsilon
        outside = ~(sums <= high) | (whole & ~(sums >= low))
        if outside.any():
            head = int(np.argwhere(outside)[0, 0])
            raise InvalidProblem(
                f"denominator: head {head} of token {number} has {sums[head]:.4g}, outside the plan's ({low:.4g}, "
                f"{high:.4g}), where its inverse holds; plan a wider range"
            )

    def loads(self) -> Counter[tuple[str, int]]:
        """Return the ciphertexts of a token by (`load`, primes left)."""
        return Counter((self.load, limbs) for limbs in self.part_limbs())

    def part_limbs(self) -> list[int]:
        """Return the primes left of each ciphertext of a token: by blocks of its query, key and value."""
        top, parts = self.ring.levels + 1, self.layout.parts
        block = [top] * (self.layout.query_parts + parts) + [self.value_limbs] * parts
        return block * len(self.layout.blocks())

    def tasks(self, parts: Sequence[Any]) -> list[tuple[Sequence[Any], Sequence[Any]]]:
        """Return the ciphertexts of a token for each block of heads: its key's and value's, and its query's."""
        queries = self.layout.query_parts
        each = queries + 2 * self.layout.parts
        of = [parts[i * each : (i + 1) * each] for i in range(len(self.layout.blocks()))]
        return [(x[queries:], x[:queries]) for x in of]

    @property
    def cache_bytes(self) -> int:
        """Of the ciphertexts in the longest cache, at the server."""
        return 16 * self._words * self.shared_of(self.layout, self.n_k, self.context)[0]

    @property
    def context_bytes(self) -> int:
        """Of the plaintexts of whole spans in the clear, at the server."""
        return 8 * self._words * self.shared_of(self.layout, self.n_k, self.context)[1]

    @property
    def _words(self) -> int:
        """Numbers in a polynomial of a key's ciphertext and in one of a value's, over all blocks of heads."""
        return (self.ring.levels + 1 + self.value_limbs) * self.ring.degree * len(self.layout.blocks())

    @property
    def token_bytes(self) -> int:
        """Of a token in the longest cache, on average: it grows by several tokens at once."""
        return -(-self.cache_bytes // self.longest)

    @property
    def digest(self) -> bytes:
        """What messages name the plan by."""
        return hashlib.sha256(b"decoding" + self.context.to_bytes(8, "little") + super().digest).digest()

    def report(self) -> dict[str, Any]:
        """Return all that the plan says, of a token with the longest cache, as what JSON holds."""
        names = ("longest", "context", "cache_bytes", "token_bytes", "context_bytes")
        return {n: getattr(self, n) for n in names} | super().report()

    def words(self) -> str:
        """Return what the plan says in a sentence: time, bytes, security, error."""
        kept = f", {bytes_text(self.token_bytes)} of cache a token, {bytes_text(self.cache_bytes)} at {self.longest}"
        after = f" after {self.context} in the clear" if self.context else ""
        return "a token: " + super().words() + kept + after

    def waiting_ms(self) -> float:
        """Return what plans are compared by: the time of the server, and of the upload by the line it is for."""
        return super().waiting_ms() + LINE[self.upload] * self.upload_bytes

    def warnings(self, seconds: float | None = None) -> list[str]:
        """Return what a user may not want: a long time (by default that of one core), or many bytes."""
        kept = [f"the cache grows to {bytes_text(self.cache_bytes)}"] if self.cache_bytes > MOST_BYTES else []
        return super().warnings(seconds) + kept

    def decoded(self, slots: Sequence[NDArray[np.complex128]], shape: tuple[int, ...]) -> Float:
        """Return out from the slots of a reply."""
        return decoded(self, slots, shape)

    def simulate(self, q: Any, k: Any, v: Any, context: Any = None, seed: int | None = None) -> Float:
        """Return what the encrypted steps compute, on float64 numbers: the same polynomial, without keys.

        Parameters
        ----------
        q, k, v : (heads, n, d) arrays
            The tokens of a sequence.
        context : (k, v), optional
            Keys and values in the clear, (heads, context, d).
        seed : int, optional
            Of noise that is drawn as the scheme draws it; by default there is none.

        Returns
        -------
        (heads, n, d_v) array

        Raises
        ------
        InvalidProblem
            Sizes or numbers that are not the plan's.
        """
        cache, found = Cache(self, context_of(self, context)), []
        tokens = Tokens(self, None if context is None else context[0])
        m: Any = Numbers() if seed is None else Sampled(self.ring, seed)
        for i in range(np.shape(q)[1]):
            slots = tokens.encoded(*(np.asarray(x)[:, i] for x in (q, k, v)))
            parts = [s if seed is None else m.fresh(s, limbs) for s, limbs in slots]
            cache = cache.appended(m, parts)
            outs = cache.attend(m, parts)
            found.append(self.decoded([getattr(x, "slots", x) for x in outs], (self.heads, self.d_v)))
        return np.stack(found, 1)


@plans("power", "call he.plan_sigmoid_decoding")
def plan_decoding(
    longest: int,
    d: int,
    d_v: int | None = None,
    heads: int = 1,
    p: int = 2,
    *,
    context: int = 0,
    denominator: tuple[float, float],
    epsilon: float = 0.0,
    scale: float | None = None,
    norms: tuple[float, float],
    value_most: float,
    tolerance: float = 1e-2,
    normalize: str = "server",
    upload: str = "full",
    inverse: Inverse | None = None,
) -> DecodingPlan:
    """Return a plan for decoding on ciphertexts: each new token attends to all before it, and to itself.

    It is the one with the least time of the server and of sending a token, over a line of 1 Gbit/s, or of 10 where
    ``upload`` is "whole".

    Levels, rotations and the error's bound hold for every step of a sequence; the time and the bytes of the cache are
    those of the last one.

    Parameters
    ----------
    longest : int
        Encrypted tokens of a sequence at most.
    d, d_v, heads : int
        Features of queries and keys, and of values (d by default); heads, those of all batches.
    p : int
        2, 4, 6 or 8.
    context : int
        Tokens before them whose keys and values the server knows in the clear.
    denominator, epsilon, scale, norms, value_most, tolerance, normalize, inverse
        As :func:`refattn.he.plan` takes them: the denominators are those of all steps, the norms and values also those
        of the context. ``he.ranges`` of a call with ``causal="bottom_right"`` has them.
    upload : {"full", "whole"}
        As :func:`refattn.he.plan` takes it.

    Raises
    ------
    InvalidInput
        A size, range or name that has no meaning.
    UnsupportedProblem
        No ring at 128 bits of security does it; the text names the step that ran out of levels and what would help.
        Or arguments of sigmoid attention: the text names what plans it.
    """
    n_k = tokens_of(longest, context, upload)
    check_arguments(
        1, n_k, d, d_v, heads, p, denominator, epsilon, norms, value_most, tolerance, normalize, "latency", upload, 1,
        scale, inverse,
    )  # fmt: skip
    d_v = d if d_v is None else d_v
    given = {
        "n_q": 1, "n_k": n_k, "d_k": d, "d_v": d_v, "heads": heads, "p": p, "denominator": denominator,
        "epsilon": epsilon, "scale": scale, "norms": norms, "value_most": value_most, "normalize": normalize,
        "mode": "latency", "upload": upload, "workers": 1, "tolerance": tolerance, "context": context,
    }  # fmt: skip

    def layouts(slots: int) -> list[Layout]:
        return token_layouts(slots, n_k, max(d, d_v), heads)

    return appending(fastest(DecodingPlan, given, layouts, inverse))


def tokens_of(longest: Any, context: Any, upload: Any) -> int:
    """Return a sequence's tokens in all, the lengths checked; errors as of `plan_decoding`."""
    for name, n, least in (("longest", longest, 1), ("context", context, 0)):
        if not is_count(n, least, MOST_SIZE):
            raise InvalidInput(
                f"{name}: got {shown(n)}, expected an integer of at least {least} and at most {MOST_SIZE}"
            )
    if upload == "compact":
        raise UnsupportedProblem("he: upload='compact' is not for decoding, where a token has few ciphertexts")
    return int(longest + context)


def appending(made: D) -> D:
    """Return a plan whose counts have a token's way into the cache, too."""
    counts = Counter(made.counts)
    for limbs in (made.ring.levels + 1, made.value_limbs):
        counts["add", limbs] += made.layout.parts  # its key and value
    return replace(made, counts=counts)
